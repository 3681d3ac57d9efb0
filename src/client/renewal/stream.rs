//! A stream of renewals to one member.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::LeaseKeepAliveResponse;
use etcd_client::proto::PbLeaseKeepAliveResponse;
use http::uri::PathAndQuery;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Status, Streaming};
use tonic_prost::ProstCodec;

use super::plan;
use super::standing::Response;
use crate::balance::{AttemptRecord, AttemptedEndpoints};
use crate::client::etcd_error::EtcdError;
use crate::client::transport::{CallOptions, RpcService};

const PATH: PathAndQuery = PathAndQuery::from_static("/etcdserverpb.Lease/LeaseKeepAlive");

/// The most leases that wait for a response on one stream. Each of them takes some 100 bytes.
const MAX_UNANSWERED: usize = 65_536;

/// The request of a renewal. etcd-client does not export its own.
#[derive(Clone, PartialEq, prost::Message)]
struct LeaseKeepAliveRequest {
    #[prost(int64, tag = "1")]
    id: i64,
}

/// A response to a renewal.
#[derive(Debug, Clone)]
pub(in crate::client) struct Renewed {
    /// When the renewal was sent that etcd responded to. The lease lasts a TTL from then on.
    pub(in crate::client) sent_at: Instant,
    pub(in crate::client) response: LeaseKeepAliveResponse,
}

/// Why a stream ended.
#[derive(Debug, Clone)]
pub(super) struct StreamEnd {
    /// Whether the member has never responded on the stream. A stream keeps the token that it was
    /// opened with, so only the refusal of a fresh one says anything about the user.
    pub(super) is_fresh: bool,
    /// The lease whose renewal was next to be handled. etcd responds to the renewals of a stream in
    /// the order in which they were sent, so a refusal of one lease is the refusal of this one.
    pub(super) next: Option<i64>,
    pub(super) cause: EndCause,
}

impl StreamEnd {
    /// Whether the member refused one lease, which says nothing about the others.
    pub(super) fn is_of_one_lease(&self) -> bool {
        let EndCause::Status(status) = &self.cause else {
            return false;
        };
        self.next.is_some() && EtcdError::is_refusal_of_lease(status)
    }

    /// Whether the end says something about this lease.
    pub(super) fn concerns(&self, id: i64) -> bool {
        !self.is_of_one_lease() || self.next == Some(id)
    }
}

#[derive(Debug, Clone)]
pub(super) enum EndCause {
    /// The member or the connection ended the stream.
    Status(Box<Status>),
    /// The stream was closed here: it was silent, or its runtime ended.
    Closed,
}

/// An open stream, and the renewals that wait for a response on it. Dropping it ends the stream.
#[derive(Debug)]
pub(super) struct LeaseStream {
    waiting: Arc<Mutex<Waiting>>,
    requests: mpsc::Sender<LeaseKeepAliveRequest>,
    attempted: AttemptedEndpoints,
    opened_at: Instant,
    task: AbortOnDropHandle<()>,
}

/// The renewals without a response.
#[derive(Debug, Default)]
struct Waiting {
    /// At most one for each lease, so that a response is never taken for one to a later renewal.
    unanswered: HashMap<i64, Unanswered>,
    /// How many renewals were sent.
    sent: u64,
    /// Since when the member has owed a response and sent none.
    silent_since: Option<Instant>,
    last: Option<Response>,
    end: Option<StreamEnd>,
}

#[derive(Debug)]
struct Unanswered {
    /// The position of the renewal among those that were sent on the stream.
    number: u64,
    sent_at: Instant,
    /// Whether no other renewal waited for a response when this one was sent.
    is_alone: bool,
    callers: Vec<oneshot::Sender<Renewed>>,
}

impl LeaseStream {
    /// Opens a stream to a member that is not in `avoided`, if there is one. gRPC servers in Go
    /// send the head of a response with its first message, so this returns at once; the caller
    /// sends the first renewal.
    pub(super) fn open(
        rpc: RpcService,
        runtime: &Handle,
        avoided: impl IntoIterator<Item = Arc<str>>,
    ) -> Self {
        let (requests, to_send) = mpsc::channel(MAX_UNANSWERED);
        let attempted = AttemptedEndpoints::avoiding(avoided);
        let waiting = Arc::<Mutex<Waiting>>::default();
        let ends = EndOnDrop(Arc::clone(&waiting));
        let options = CallOptions {
            attempted: Some(attempted.clone()),
            ..CallOptions::default()
        };
        let running = async move {
            let responses = options.scope(call(rpc, to_send)).await;
            let status = ends.pass_on(responses).await;
            ends.end(EndCause::Status(Box::new(status)));
        };
        Self {
            waiting,
            requests,
            attempted,
            opened_at: Instant::now(),
            task: AbortOnDropHandle::new(runtime.spawn(running)),
        }
    }

    /// Sends a renewal, unless one of this lease is waiting for its response already. `None` if the
    /// stream has ended, or too many leases wait on it.
    pub(super) fn renew(&self, id: i64, now: Instant) -> Option<oneshot::Receiver<Renewed>> {
        let (caller, response) = oneshot::channel();
        let mut waiting = self.waiting.lock();
        if waiting.end.is_some() {
            return None;
        }
        if let Some(unanswered) = waiting.unanswered.get_mut(&id) {
            unanswered.callers.retain(|caller| !caller.is_closed());
            unanswered.callers.push(caller);
            return Some(response);
        }
        if waiting.unanswered.len() >= MAX_UNANSWERED {
            return None;
        }
        self.requests.try_send(LeaseKeepAliveRequest { id }).ok()?;
        waiting.silent_since.get_or_insert(now);
        waiting.sent += 1;
        let unanswered = Unanswered {
            number: waiting.sent,
            sent_at: now,
            is_alone: waiting.unanswered.is_empty(),
            callers: vec![caller],
        };
        waiting.unanswered.insert(id, unanswered);
        Some(response)
    }

    /// The member that the stream was sent to. `None` until one is connected.
    pub(super) fn member(&self) -> Option<Arc<str>> {
        self.attempted.last()
    }

    /// Whether the member takes no calls any more, while another does.
    pub(super) fn is_left(&self, ready: &[Arc<str>]) -> bool {
        !ready.is_empty() && self.member().is_some_and(|member| !ready.contains(&member))
    }

    /// Records a response for the operation that waited for it.
    pub(super) fn record_success(&self, record: &AttemptRecord) {
        if let Some(member) = self.member() {
            record.succeed(&member);
        }
    }

    /// Records the end of the stream for an operation that waited for a response.
    pub(super) fn record_end(&self, end: &StreamEnd, record: &AttemptRecord) {
        let EndCause::Status(status) = &end.cause else {
            return;
        };
        match self.member() {
            Some(member) => {
                record.begin(&member);
                record.fail(&member, status);
            }
            None => record.fail_unsent(status),
        }
    }

    /// The latest response.
    pub(super) fn last_response(&self) -> Option<Response> {
        self.waiting.lock().last
    }

    pub(super) fn opened_at(&self) -> Instant {
        self.opened_at
    }

    pub(super) fn end(&self) -> Option<StreamEnd> {
        self.waiting.lock().end.clone()
    }

    /// How long the member has owed a response without sending one.
    pub(super) fn silence(&self, now: Instant) -> Duration {
        let since = self.waiting.lock().silent_since;
        since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    pub(super) fn to_plan(&self) -> plan::Stream {
        if self.member().is_none() {
            return plan::Stream::Waiting;
        }
        match self.waiting.lock().silent_since {
            None => plan::Stream::Idle,
            Some(since) => plan::Stream::Owing(since),
        }
    }

    /// Ends the stream, also in etcd. Callers that wait on the stream ask elsewhere.
    pub(super) fn close(&self) {
        self.waiting.lock().end(EndCause::Closed);
        self.task.abort();
    }
}

impl Waiting {
    fn respond(&mut self, response: LeaseKeepAliveResponse, now: Instant) {
        let answered = self.unanswered.remove(&response.id());
        self.silent_since = (!self.unanswered.is_empty()).then_some(now);
        let round_trip = match &answered {
            Some(alone) if alone.is_alone => now - alone.sent_at,
            _ => self.last.map_or(Duration::ZERO, |last| last.round_trip),
        };
        self.last = Some(Response {
            at: now,
            round_trip,
        });
        let Some(Unanswered {
            sent_at, callers, ..
        }) = answered
        else {
            return;
        };
        for caller in callers {
            // A caller that has given up needs no response.
            drop(caller.send(Renewed {
                sent_at,
                response: response.clone(),
            }));
        }
    }

    /// Records the end. The callers notice because their channels close.
    fn end(&mut self, cause: EndCause) {
        let is_fresh = self.last.is_none();
        let unanswered = self.unanswered.iter();
        let next = unanswered.min_by_key(|(_, unanswered)| unanswered.number);
        let next = next.map(|(id, _)| *id);
        self.end.get_or_insert(StreamEnd {
            is_fresh,
            next,
            cause,
        });
        self.unanswered.clear();
        self.silent_since = None;
    }
}

/// Ends a stream with its task, which also ends with its runtime.
struct EndOnDrop(Arc<Mutex<Waiting>>);

impl EndOnDrop {
    /// Passes the responses on, until the stream ends.
    async fn pass_on(
        &self,
        responses: Result<Streaming<PbLeaseKeepAliveResponse>, Status>,
    ) -> Status {
        let mut responses = match responses {
            Ok(responses) => responses,
            Err(status) => return status,
        };
        loop {
            match responses.message().await {
                Ok(Some(response)) => {
                    let response = LeaseKeepAliveResponse(response);
                    self.0.lock().respond(response, Instant::now());
                }
                Ok(None) => return Status::unavailable("the server ended the stream"),
                Err(status) => return status,
            }
        }
    }

    fn end(&self, cause: EndCause) {
        self.0.lock().end(cause);
    }
}

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.end(EndCause::Closed);
    }
}

async fn call(
    rpc: RpcService,
    to_send: mpsc::Receiver<LeaseKeepAliveRequest>,
) -> Result<Streaming<PbLeaseKeepAliveResponse>, Status> {
    let mut request = Request::new(ReceiverStream::new(to_send));
    if let Some(token) = rpc.token().value() {
        request.metadata_mut().insert("token", token);
    }
    let mut grpc = tonic::client::Grpc::new(rpc);
    grpc.ready()
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let codec = ProstCodec::<LeaseKeepAliveRequest, PbLeaseKeepAliveResponse>::default();
    let response = grpc.streaming(request, PATH, codec).await?;
    Ok(response.into_inner())
}
