//! The gRPC service beneath etcd-client, which sends each call to a member that can execute it.
//!
//! The service stands between etcd-client, which encodes the messages and adds the user's token,
//! and the [`BalancedChannel`], which keeps the members connected and picks one. The service adds
//! the parts that depend on etcd:
//!
//! - A failed read is sent to another member, and a slow read to another member beside the first. A
//!   member that hangs therefore costs a read a fifth of its timeout. A write is sent again only if
//!   no member can have executed it.
//! - The limits of messages, gzip, and the debug log.

use std::future::Future;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderName, HeaderValue, Request, Response};
use http_body_util::Full;
use tokio::runtime::Handle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{BoxError, Service};

use super::awaited_response::AwaitedResponse;
use super::call_log::CallLog;
use super::call_options::CallOptions;
use super::members::{FollowedMembers, Membership};
use super::message::{Codec, RequestStream, ResponseStream};
use super::method::CallKind;
use super::open_stream::StreamOpening;
use super::raw_client::EtcdService;
use super::response::{code_in, collect, is_error_in, map_not_grpc, map_refusal, message_in};
use super::token::{self, Token, authenticated_user};
use super::unary::UnaryCall;
use crate::balance::{AttemptedEndpoints, BalancedChannel, CallContext, ServedBy};
use crate::client::etcd_error::EtcdError;
use crate::config::Config;

/// With this header a member without a leader refuses a call before it looks at the request, and
/// ends a stream instead of leaving the stream silent. etcd's own client sends it for leases too.
const HAS_LEADER: HeaderName = HeaderName::from_static("hasleader");

/// The gRPC service that etcd-client calls. Clones share their state.
#[derive(Debug, Clone)]
pub(in crate::client) struct RpcService {
    pub(super) state: Arc<RpcState>,
}

#[derive(Debug)]
pub(super) struct RpcState {
    /// `None` once the client is closed, although a raw client may still hold the service.
    pub(super) channel: ArcSwapOption<BalancedChannel>,
    pub(super) membership: Arc<Membership>,
    codec: Codec,
    is_logging: bool,
    /// The name of the configured user.
    user: Option<String>,
    closed: CancellationToken,
    /// How long a call is repeated.
    timeout: Duration,
    token: Token,
    runtime: Handle,
}

impl RpcService {
    pub(super) fn new(
        members: &FollowedMembers,
        config: &Config,
        closed: &CancellationToken,
    ) -> Self {
        Self {
            state: Arc::new(RpcState {
                channel: ArcSwapOption::from_pointee(members.channel.clone()),
                membership: Arc::clone(&members.membership),
                codec: Codec {
                    max_send: config.max_call_send_msg_size,
                    max_recv: config.max_call_recv_msg_size,
                    gzip: config.enable_compression,
                    capped_at_4_mib: false,
                },
                is_logging: config.enable_grpc_debug_log,
                user: config.username.clone(),
                closed: closed.clone(),
                timeout: config.request_timeout,
                token: Token::default(),
                // The channel has found one.
                runtime: Handle::current(),
            }),
        }
    }

    /// The service as etcd-client takes it.
    pub(super) fn to_etcd_service(&self) -> EtcdService {
        EtcdService::new(self.clone())
    }

    /// Closes the connections. Connections that carry calls close after the last of their calls.
    pub(in crate::client) fn close(&self) {
        self.state.channel.store(None);
    }

    /// Whether the connections were closed.
    pub(in crate::client) fn is_closed(&self) -> bool {
        self.state.channel.load().is_none()
    }

    /// Renews the user's token by `renew`, unless etcd has issued one after `since`, the start of
    /// the call that was refused. Callers that wait at the same time share one renewal.
    pub(in crate::client) async fn renew_token<E>(
        &self,
        since: Instant,
        renew: impl Future<Output = Result<(), E>>,
    ) -> Result<(), E> {
        self.state
            .token
            .renew_unless_issued_since(since, renew)
            .await
    }

    /// The user's token.
    pub(in crate::client) fn token(&self) -> &Token {
        &self.state.token
    }

    /// The runtime on which the client was built.
    pub(in crate::client) fn runtime(&self) -> &Handle {
        &self.state.runtime
    }

    /// Whether the runtime has ended on which the client was built.
    pub(in crate::client) fn has_runtime_ended(&self) -> bool {
        let channel = self.state.channel.load();
        channel.as_ref().is_some_and(|channel| channel.has_ended())
    }
}

impl Service<Request<Body>> for RpcService {
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<Body>, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let state = Arc::clone(&self.state);
        let mut options = CallOptions::current();
        // Within the same scope etcd-client may also call `Authenticate`, which has another path.
        if let Some((path, message)) = options.message
            && request.uri().path() == path
        {
            *request.body_mut() = Body::new(Full::new(Bytes::from_static(message)));
        }
        Box::pin(async move {
            let response = match options.pinned.take() {
                Some(pinned) => state.call(&pinned, None, request, options).await,
                None => match state.channel.load_full() {
                    Some(channel) => {
                        let membership = Some(&state.membership);
                        state.call(&channel, membership, request, options).await
                    }
                    None => Err(Status::cancelled("the client is closed")),
                },
            };
            Ok(response?)
        })
    }
}

impl RpcState {
    async fn call(
        &self,
        channel: &BalancedChannel,
        membership: Option<&Arc<Membership>>,
        request: Request<Body>,
        options: CallOptions,
    ) -> Result<Response<Body>, Status> {
        let (mut head, body) = request.into_parts();
        let path = head.uri.path();
        let (kind, codec) = (CallKind::of(path), self.codec.for_path(path));
        if kind == CallKind::Bidi || kind.needs_leader(path) {
            let yes = HeaderValue::from_static("true");
            head.headers.insert(HAS_LEADER, yes);
        }
        // From `UnaryResponse::empty_token`. etcd 3.4 refuses this token even while authentication
        // is disabled, except for renewals. They keep it, because etcd from 3.5.28 on then refuses
        // the stream at once, and etcd-client fetches a token; without one etcd refuses the first
        // renewal.
        let is_empty = head
            .headers
            .get(token::HEADER)
            .is_some_and(HeaderValue::is_empty);
        if is_empty && path != "/etcdserverpb.Lease/LeaseKeepAlive" {
            head.headers.remove(token::HEADER);
        }
        codec.add_headers(&mut head.headers);
        // Reads avoid the members of their failed attempts, and the log names the last member. A
        // write needs neither.
        let is_tracked = self.is_logging || kind != CallKind::Write;
        let attempted = options.attempted;
        let attempted = attempted.or_else(|| is_tracked.then(AttemptedEndpoints::default));
        let context = CallContext {
            attempted: attempted.as_ref(),
            record: options.record.as_ref(),
        };
        let mut log = self
            .is_logging
            .then(|| CallLog::new(&head.uri, attempted.clone().unwrap_or_default()));
        if kind == CallKind::Bidi {
            let body = Body::new(RequestStream { codec, body });
            let request = Request::from_parts(head, body);
            let stream = self.stream(channel, membership, request, codec, context, log);
            return stream.await;
        }
        let plain = log_refusal(collect(body).await, &mut log)?;
        let renews_token = kind == CallKind::Authenticate
            && self.user.is_some()
            && authenticated_user(&plain) == self.user;
        let message = log_refusal(codec.encode(plain), &mut log)?;
        if kind == CallKind::ServerStream {
            let body = Body::new(Full::new(message));
            let request = Request::from_parts(head, body);
            let stream = self.stream(channel, membership, request, codec, context, log);
            return stream.await;
        }
        let mut call = UnaryCall {
            timeout: self.timeout,
            token: &self.token,
            renews_token,
            channel,
            membership: membership.map(Arc::as_ref),
            kind,
            head,
            message,
            codec,
            attempted,
            record: options.record,
            started: Instant::now(),
        };
        self.unary(&mut call, log).await
    }

    async fn unary(
        &self,
        call: &mut UnaryCall<'_>,
        log: Option<CallLog>,
    ) -> Result<Response<Body>, Status> {
        let result = call.send().await;
        if let Some(log) = log {
            match &result {
                Ok(response) => log.end(response.code(), response.served_by()),
                Err(status) => log.end(status.code(), None),
            }
        }
        let response = result?;
        if self.codec.gzip && response.code() == Code::Unimplemented {
            return Err(gzip_error(&response.message()));
        }
        Ok(response
            .with_refusal_mapped(self.user.is_some())
            .into_response())
    }

    async fn stream(
        &self,
        channel: &BalancedChannel,
        membership: Option<&Arc<Membership>>,
        request: Request<Body>,
        codec: Codec,
        context: CallContext<'_>,
        mut log: Option<CallLog>,
    ) -> Result<Response<Body>, Status> {
        let opening = StreamOpening {
            channel,
            membership: membership.map(Arc::as_ref),
            token: &self.token,
            context,
        };
        let response = opening.open(request).await;
        if let (Some(log), Ok(response)) = (&mut log, &response) {
            log.set_stream_server(response.extensions().get::<ServedBy>().cloned());
        }
        let mut awaited = AwaitedResponse::new(context.record, &response);
        let mut end_log = move |code| {
            if let Some(log) = log.take() {
                log.end(code, None);
            }
        };
        let response = response
            .map_err(map_not_grpc)
            .and_then(|response| check_stream_head(response, &codec, self.user.is_some()));
        let (head, body) = match response {
            Ok(response) => response.into_parts(),
            Err(status) => {
                awaited.fail(&status);
                end_log(status.code());
                return Err(status);
            }
        };
        // A response without a body has its status in the head.
        if let Some(code) = code_in(&head.headers) {
            awaited.fail(&Status::new(code, message_in(&head.headers)));
            end_log(code);
        }
        let (closed, has_user) = (self.closed.clone().cancelled_owned(), self.user.is_some());
        let server = head.extensions.get::<ServedBy>().cloned();
        let membership = membership.cloned();
        let body = ResponseStream::new(codec, body, closed, awaited, move |trailers, status| {
            // Over TLS etcd sends a refusal after the head.
            if is_error_in(trailers, EtcdError::Learner)
                && let Some(membership) = &membership
            {
                membership.record_refusal(server.as_ref());
            }
            map_refusal(trailers, has_user);
            end_log(match status {
                Some(status) => status.code(),
                None => code_in(trailers).unwrap_or(Code::Ok),
            });
        });
        Ok(Response::from_parts(head, Body::new(body)))
    }
}

/// Checks and translates the head of a streaming response.
fn check_stream_head(
    mut response: Response<Body>,
    codec: &Codec,
    has_user: bool,
) -> Result<Response<Body>, Status> {
    let headers = response.headers_mut();
    map_refusal(headers, has_user);
    if codec.gzip && code_in(headers) == Some(Code::Unimplemented) {
        return Err(gzip_error(&message_in(headers)));
    }
    codec.take_encoding(headers)?;
    Ok(response)
}

/// Logs a request that is not sent, because the request itself is at fault.
fn log_refusal(message: Result<Bytes, Status>, log: &mut Option<CallLog>) -> Result<Bytes, Status> {
    message.inspect_err(|status| {
        if let Some(log) = log.take() {
            log.refuse(status.code());
        }
    })
}

/// The error of a server without gzip, whose own message does not mention the configuration.
fn gzip_error(message: &str) -> Status {
    Status::unimplemented(format!(
        "this etcd server does not support gzip; disable enable_compression (server: {message})"
    ))
}
