//! The calls as they go over the wire: what etcd-client asks for, on a member that can answer.
//!
//! Between etcd-client, which writes and reads the messages and knows the user, and the
//! [`BalancedChannel`], which keeps the members connected and picks one. Here a call gets what only
//! someone who knows etcd can give it:
//!
//! - a read that failed is sent to another member, and one that is slow to answer is sent to another
//!   beside the first: a member that hangs costs a read a fifth of its time, and not its life. A write is
//!   sent again only by the channel, where it provably reached no member;
//! - the limits of messages, gzip, and the debug log.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use http::{HeaderName, HeaderValue, Request, Response, request};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{BoxError, Service};

use super::call_log::CallLog;
use super::message::{Answers, Codec, Requests};
use super::method::{AUTHENTICATE, Method};
use super::response::{Answer, code_in, message_in, name_old_token, not_from_etcd, whole};
use crate::backoff::Backoff;
use crate::balance::BalancedChannel;
use crate::balance::{AttemptedEndpoints, EndpointState};

/// How often a read is sent within its time, once after each such part of it, as long as none was
/// answered: beyond the members that hang, there are those that wait for a leader that does.
const ATTEMPTS_IN_TIME: u32 = 5;

/// How long a new token may be unknown to some member: it reaches them in the order of the log, and
/// one may lag behind.
const TOKEN_SPREADS_WITHIN: Duration = Duration::from_secs(2);

/// With this header a member that is cut off from its cluster ends a stream instead of leaving it
/// silent, and refuses a call before it looks at it. etcd's own client asks for it on leases as well.
const HAS_LEADER: HeaderName = HeaderName::from_static("hasleader");

tokio::task_local! {
    /// How the calls within are to be made.
    static ROUTE: Route;
}

/// Where calls go, other than to any member.
#[derive(Debug, Clone, Default)]
pub(in crate::client) struct Route {
    /// Only here.
    pub(in crate::client) only: Option<BalancedChannel>,
    /// Not here, if possible.
    pub(in crate::client) tried: Option<AttemptedEndpoints>,
}

impl Route {
    /// The calls that `work` makes, made so.
    pub(in crate::client) async fn of<T>(self, work: impl Future<Output = T>) -> T {
        ROUTE.scope(self, work).await
    }
}

/// What etcd-client calls. Clones are the same.
#[derive(Debug, Clone)]
pub(in crate::client) struct Wire {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Taken away by `close`, while a raw client may still be held.
    channel: ArcSwapOption<BalancedChannel>,
    codec: Codec,
    log: bool,
    /// How long a read is tried.
    patience: Duration,
    closed: CancellationToken,
    /// What a member said last that may pass.
    said: ArcSwapOption<String>,
    /// When a token was last given out.
    token: std::sync::Mutex<Option<Instant>>,
    /// Held by whoever asks for one for all.
    renewal: tokio::sync::Mutex<()>,
}

impl Wire {
    pub(super) fn new(
        channel: BalancedChannel,
        config: &crate::config::Config,
        closed: &CancellationToken,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                channel: ArcSwapOption::from_pointee(channel),
                codec: Codec {
                    max_send: config.max_call_send_msg_size,
                    max_recv: config.max_call_recv_msg_size,
                    gzip: config.enable_compression,
                    lesser: false,
                },
                log: config.enable_grpc_debug_log,
                patience: config.request_timeout,
                closed: closed.clone(),
                said: ArcSwapOption::empty(),
                token: std::sync::Mutex::new(None),
                renewal: tokio::sync::Mutex::new(()),
            }),
        }
    }

    /// For etcd-client.
    pub(super) fn channel(&self) -> etcd_client::Channel {
        etcd_client::Channel::Custom(tower::util::BoxCloneSyncService::new(self.clone()))
    }

    /// Closes the connections; those that carry calls follow with the last of them.
    pub(in crate::client) fn close(&self) {
        self.shared.channel.store(None);
    }

    /// Has the user's token renewed by `renew`, for whoever was refused with the one from before `since`.
    /// Of those that wait for it at the same time one does it for all.
    pub(in crate::client) async fn renewed_since<E>(
        &self,
        since: Instant,
        renew: impl Future<Output = Result<(), E>>,
    ) -> Result<(), E> {
        // The one lock that is held while something is awaited, and that is what it is for.
        let _one_at_a_time = self.shared.renewal.lock().await;
        let given = *self.shared.token();
        if given.is_some_and(|given| given >= since) {
            return Ok(());
        }
        renew.await
    }

    /// What a member said last to a read, of what may pass: `Unavailable`, and why.
    pub(super) fn said(&self) -> Option<String> {
        self.shared.said.load_full().map(Arc::unwrap_or_clone)
    }

    /// Why no member can be asked now; `None` while one is connected.
    pub(in crate::client) fn unready(&self) -> Option<String> {
        let channel = self.shared.channel.load_full()?;
        unready(&channel)
    }
}

/// Why no endpoint can be called now; `None` while one is connected.
fn unready(channel: &BalancedChannel) -> Option<String> {
    let members = channel.endpoints();
    if members.iter().any(|m| m.state == EndpointState::Ready) {
        return None;
    }
    let each = members.iter().map(|member| {
        let why = member.last_error.as_deref().unwrap_or("not connected yet");
        format!("{}: {why}", member.address)
    });
    Some(each.collect::<Vec<_>>().join("; "))
}

impl Service<Request<Body>> for Wire {
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<Body>, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let shared = Arc::clone(&self.shared);
        let route = ROUTE.try_with(Route::clone).unwrap_or_default();
        Box::pin(async move {
            let answer = match route.only {
                Some(only) => shared.call(&only, request, route.tried).await,
                None => match shared.channel.load_full() {
                    Some(channel) => shared.call(&channel, request, route.tried).await,
                    None => Err(Status::cancelled("the client is closed")),
                },
            };
            Ok(answer?)
        })
    }
}

impl Shared {
    async fn call(
        self: &Arc<Self>,
        channel: &BalancedChannel,
        request: Request<Body>,
        tried: Option<AttemptedEndpoints>,
    ) -> Result<Response<Body>, Status> {
        let (mut head, body) = request.into_parts();
        let method = Method::of(head.uri.path());
        if method == Method::Streams || needs_leader(method, head.uri.path()) {
            let yes = HeaderValue::from_static("true");
            head.headers.insert(HAS_LEADER, yes);
        }
        let codec = self.codec.to(head.uri.path());
        codec.announce(&mut head.headers);
        // Reads and the log need to know where calls went; a write has no use for it.
        let tried = tried
            .or_else(|| (self.log || method != Method::Write).then(AttemptedEndpoints::default));
        let mut log = self
            .log
            .then(|| CallLog::begin(&head.uri, tried.clone().unwrap_or_default()));
        if matches!(method, Method::Streams | Method::AnswerStream) {
            return self.stream(channel, head, body, tried, method, log).await;
        }
        let message = whole(body).await.and_then(|plain| codec.request(plain));
        let message = or_refused(message, &mut log)?;
        let mut call = Call {
            shared: self,
            channel,
            head,
            message,
            codec,
            tried,
            log,
            begun: Instant::now(),
        };
        let part = self.patience / ATTEMPTS_IN_TIME;
        let answer = match method {
            Method::Read => call.hedged(&[part; ATTEMPTS_IN_TIME as usize - 1]).await,
            // A password costs etcd much, the more so when it has much to do, and there is no hurry: it is
            // sent at 0, 2 and 4 of 5 parts of the time, and whoever waits for it has the rest.
            Method::Authenticate => call.hedged(&[part * 2, part * 2]).await.map(or_no_token),
            Method::Repeatable => call.persistent().await,
            _ => call.led().await,
        };
        if let Some(log) = call.log {
            log.end(answer.as_ref().map_or_else(Status::code, Answer::code));
        }
        let answer = self.understood(answer?)?;
        Ok(answer.into_response())
    }

    /// A server without gzip says so in words that do not lead back to the configuration; and an old
    /// token is not called one.
    fn understood(&self, answer: Answer) -> Result<Answer, Status> {
        if self.codec.gzip && answer.code() == Code::Unimplemented {
            return Err(no_gzip(&answer.message()));
        }
        Ok(answer.renewable())
    }

    async fn stream(
        self: &Arc<Self>,
        channel: &BalancedChannel,
        head: request::Parts,
        body: Body,
        tried: Option<AttemptedEndpoints>,
        method: Method,
        log: Option<CallLog>,
    ) -> Result<Response<Body>, Status> {
        let codec = self.codec.to(head.uri.path());
        let mut log = log;
        let body = match method {
            Method::Streams => Body::new(Requests { codec, body }),
            _ => {
                let message = whole(body).await.and_then(|plain| codec.request(plain));
                Body::new(http_body_util::Full::new(or_refused(message, &mut log)?))
            }
        };
        let request = Request::from_parts(head, body);
        let opened = channel.call_avoiding(request, tried.as_ref());
        let opened = match &mut log {
            Some(log) => {
                let opened = log.attempt(opened).await;
                log.opened();
                opened
            }
            None => opened.await,
        };
        let mut end = move |code| {
            if let Some(log) = log.take() {
                log.end(code);
            }
        };
        let opened = opened.and_then(|response| not_from_etcd(&response).map(|()| response));
        let (mut head, body) = match opened {
            Ok(response) => response.into_parts(),
            Err(status) => {
                end(status.code());
                return Err(status);
            }
        };
        name_old_token(&mut head.headers);
        if let Some(code) = code_in(&head.headers) {
            end(code);
            if codec.gzip && code == Code::Unimplemented {
                return Err(no_gzip(&message_in(&head.headers)));
            }
        }
        codec.answer(&mut head.headers)?;
        let closed = self.closed.clone().cancelled_owned();
        let answers = Answers::new(codec, body, closed, move |trailers, status| {
            end(match status {
                Some(status) => status.code(),
                None => code_in(trailers).unwrap_or(Code::Ok),
            });
        });
        Ok(Response::from_parts(head, Body::new(answers)))
    }

    fn token_was_given(&self) {
        *self.token() = Some(Instant::now());
    }

    fn token_is_new(&self) -> bool {
        self.token()
            .is_some_and(|given| given.elapsed() < TOKEN_SPREADS_WITHIN)
    }

    fn token(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.token
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A call with one message each way, as often as it takes.
struct Call<'a> {
    shared: &'a Shared,
    channel: &'a BalancedChannel,
    head: request::Parts,
    message: Bytes,
    codec: Codec,
    tried: Option<AttemptedEndpoints>,
    log: Option<CallLog>,
    begun: Instant,
}

impl Call<'_> {
    /// The first answer of several members, each asked when those before it have been slow: after one
    /// pause the next.
    async fn hedged(&self, pauses: &[Duration]) -> Result<Answer, Status> {
        let mut pauses = pauses.iter();
        let mut pause = move || pauses.next().map_or(Duration::MAX, |pause| *pause);
        let mut first = pin!(self.persistent());
        tokio::select! {
            biased;
            answer = &mut first => return answer,
            () = sleep(pause()) => {}
        }
        let mut failed = false;
        let mut others = FuturesUnordered::new();
        loop {
            others.push(Box::pin(self.persistent()));
            let mut next = pin!(sleep(pause()));
            loop {
                let answer = tokio::select! {
                    biased;
                    answer = &mut first, if !failed => {
                        failed = true;
                        answer
                    }
                    Some(answer) = others.next() => answer,
                    () = &mut next => break,
                };
                if answer.is_ok() || (others.is_empty() && failed) {
                    return answer;
                }
            }
        }
    }

    /// By a member that has a leader, if there is one. Without it a write would hang on a member that is cut
    /// off from the others, and may be done after all.
    async fn led(&mut self) -> Result<Answer, Status> {
        let mut pauses = None;
        loop {
            let answer = self.known_user().await?;
            let path = self.head.uri.path();
            let is_refused = answer.is_without_leader() && needs_leader(Method::Write, path);
            if !is_refused || self.is_hopeless() {
                return Ok(answer);
            }
            self.tried.get_or_insert_with(AttemptedEndpoints::default);
            sleep(pauses.get_or_insert_with(Backoff::for_etcd).next()).await;
        }
    }

    /// Until it is answered, one member after the other, unless the answer is that it cannot be done.
    async fn persistent(&self) -> Result<Answer, Status> {
        let mut pauses = None;
        loop {
            let answer = self.known_user().await;
            let code = answer.as_ref().map_or_else(Status::code, Answer::code);
            if !is_passing(code) || self.is_hopeless() {
                return answer;
            }
            let said = answer.map_or_else(
                |status| status.message().to_owned(),
                |answer| answer.message(),
            );
            self.shared.said.store(Some(Arc::new(said)));
            sleep(pauses.get_or_insert_with(Backoff::for_etcd).next()).await;
        }
    }

    /// Whether it was tried for all of its time, or for half of it without a member to try it on.
    fn is_hopeless(&self) -> bool {
        let (tried, patience) = (self.begun.elapsed(), self.shared.patience);
        tried >= patience || (tried >= patience / 2 && unready(self.channel).is_some())
    }

    /// One that no member refuses only because the user's new token has not reached it yet. Such a
    /// refusal comes before anything is done, so this holds for writes too.
    async fn known_user(&self) -> Result<Answer, Status> {
        let mut pauses = None;
        loop {
            let answer = self.once().await?;
            if answer.code() != Code::Unauthenticated || !self.shared.token_is_new() {
                if answer.code() == Code::Ok && self.head.uri.path() == AUTHENTICATE {
                    self.shared.token_was_given();
                }
                return Ok(answer);
            }
            sleep(pauses.get_or_insert_with(Backoff::for_etcd).next()).await;
        }
    }

    async fn once(&self) -> Result<Answer, Status> {
        let mut request = Request::new(Body::new(http_body_util::Full::new(self.message.clone())));
        *request.method_mut() = self.head.method.clone();
        *request.uri_mut() = self.head.uri.clone();
        *request.version_mut() = self.head.version;
        *request.headers_mut() = self.head.headers.clone();
        let attempt = pin!(async {
            let response = self
                .channel
                .call_avoiding(request, self.tried.as_ref())
                .await?;
            Answer::read(response, &self.codec).await
        });
        match &self.log {
            Some(log) => log.attempt(attempt).await,
            None => attempt.await,
        }
    }
}

/// Whether it can do nothing without a leader, and must not wait for one on a member that is cut off. A read
/// is asked for elsewhere anyway, and what is for one member alone is for that one in any state.
fn needs_leader(method: Method, path: &str) -> bool {
    matches!(method, Method::Write | Method::Authenticate)
        && path.starts_with("/etcdserverpb.")
        && !path.starts_with("/etcdserverpb.Maintenance/")
}

/// Without users in etcd there is no token to be had, and none is needed: it goes on without, as etcd's own
/// client does.
fn or_no_token(answer: Answer) -> Answer {
    if !answer.is_auth_not_enabled() {
        return answer;
    }
    tracing::warn!(
        "a username is configured, but authentication is not enabled in etcd; going on without"
    );
    Answer::no_token()
}

/// What another member may not say, or the same a moment later: it is going down, or the cluster is
/// choosing a leader.
pub(in crate::client) fn is_passing(code: Code) -> bool {
    matches!(code, Code::Unavailable | Code::Cancelled | Code::Internal)
}

/// The message, or why it is not sent, which is logged as well.
fn or_refused(message: Result<Bytes, Status>, log: &mut Option<CallLog>) -> Result<Bytes, Status> {
    message.inspect_err(|status| {
        if let Some(log) = log.take() {
            log.refuse(status.code());
        }
    })
}

fn no_gzip(said: &str) -> Status {
    Status::unimplemented(format!(
        "this etcd server has no gzip, which enable_compression asks for; leave it out \
         (the server: {said})"
    ))
}
