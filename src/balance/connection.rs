//! One HTTP/2 connection: calls go out on it, a task of its own drives it.
//!
//! On h2 itself rather than on hyper's client, which hands each call through a queue to a task and each
//! answer through another task back: two more turns of the scheduler per call than the stream
//! itself needs. And h2 says for certain whether a call was sent.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{Connection as H2Connection, SendRequest};
use h2::{Ping, PingPong, Reason, RecvStream, SendStream};
use http::{Request, Response};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use tokio::sync::{Notify, oneshot};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::connect::BoxIo;
use super::failure;
use super::replay::AttemptBody;
use super::wire::{Ending, Observed};
use crate::error::chain;

/// For what has arrived already: no network takes part in it.
const READ_OUT: Duration = Duration::from_secs(1);

/// When a peer counts as lost: pinged after so long without a sign of it, and given so long to answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct KeepAlive {
    pub(super) interval: Option<Duration>,
    pub(super) timeout: Duration,
    pub(super) while_idle: bool,
}

/// What the connection's task, its I/O and its calls share.
#[derive(Debug)]
pub(super) struct Shared {
    open: AtomicBool,
    opened: Instant,
    /// When a read last brought something, a sign of life: nanoseconds since it was opened.
    heard: AtomicU64,
    calls: AtomicU32,
    spent: Notify,
    pub(super) ending: Ending,
}

impl Shared {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            open: AtomicBool::new(true),
            opened: Instant::now(),
            heard: AtomicU64::new(0),
            calls: AtomicU32::new(0),
            spent: Notify::new(),
            ending: Ending::default(),
        })
    }

    /// No new call may be sent.
    pub(super) fn shut(&self) {
        self.open.store(false, Ordering::Release);
    }

    /// No new call can be sent, although the connection may live on: another is needed.
    fn spend(&self) {
        self.shut();
        self.spent.notify_one();
    }

    /// Resolves when no new call can be sent.
    pub(super) async fn spent(&self) {
        self.spent.notified().await;
    }

    pub(super) fn heard(&self) {
        let since = self.opened.elapsed().as_nanos() as u64;
        self.heard.store(since, Ordering::Relaxed);
    }

    fn last_heard(&self) -> Instant {
        self.opened + Duration::from_nanos(self.heard.load(Ordering::Relaxed))
    }
}

/// Sends calls on a connection. Cheap to clone. The connection closes when no sender and no call is
/// left.
#[derive(Clone)]
pub(super) struct Sender {
    h2: SendRequest<Bytes>,
    shared: Arc<Shared>,
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender")
            .field("shared", &self.shared)
            .finish_non_exhaustive()
    }
}

/// A call that got no response.
#[derive(Debug)]
pub(super) struct SendError {
    pub(super) fate: Fate,
    pub(super) error: h2::Error,
    /// What is known of the connection's end.
    pub(super) ending: Option<String>,
}

/// How far a call got that has no response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// No server can have acted on it, for certain.
    Unsent,
    /// It cannot be sent at all, on any connection.
    Rejected,
    /// A server may have acted on it.
    Unknown,
}

impl Sender {
    pub(super) fn is_open(&self) -> bool {
        self.shared.open.load(Ordering::Acquire)
    }

    /// Makes one call. Dropping the future, or the response's body, resets the stream.
    pub(super) async fn send(
        mut self,
        request: Request<()>,
        body: AttemptBody,
    ) -> Result<Response<Incoming>, SendError> {
        let open = OpenCall::new(&self.shared);
        let failed = |shared: &Shared, fate, error| SendError {
            fate,
            error,
            ending: shared.ending.get(),
        };
        if let Err(error) = std::future::poll_fn(|cx| self.h2.poll_ready(cx)).await {
            // It is closing, or has run out of stream ids.
            self.shared.spend();
            return Err(failed(&self.shared, Fate::Unsent, error));
        }
        let sent = self.h2.send_request(request, body.is_end_stream());
        let (response, stream) = match sent {
            Ok(sent) => sent,
            Err(error) => {
                // The connection's fault if it cannot take any other call either.
                let usable = std::future::poll_fn(|cx| self.h2.poll_ready(cx)).await;
                let fate = match usable {
                    Ok(()) => Fate::Rejected,
                    Err(_) => {
                        self.shared.spend();
                        Fate::Unsent
                    }
                };
                return Err(failed(&self.shared, fate, error));
            }
        };
        let upload = upload(stream, body);
        // Counted as a reference to the connection; a response that takes long needs none.
        drop(self.h2);
        match response.await {
            Ok(response) => Ok(response.map(|stream| Incoming {
                stream,
                upload,
                call: Some(open),
            })),
            Err(error) if failure::is_refused(&error) => {
                Err(failed(&self.shared, Fate::Unsent, error))
            }
            Err(error) => Err(failed(&self.shared, Fate::Unknown, error)),
        }
    }
}

/// Counts a call as open on its connection until it is dropped.
#[derive(Debug)]
struct OpenCall(Arc<Shared>);

impl OpenCall {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.calls.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(shared))
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The task that sends a streamed body; dropped, it stops, and the stream is reset if it was not sent
/// to its end.
#[derive(Debug)]
struct Upload(AbortHandle);

impl Drop for Upload {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Sends the body: at once what is at hand, in a task of its own what is still to come.
fn upload(mut stream: SendStream<Bytes>, body: AttemptBody) -> Option<Upload> {
    match body {
        AttemptBody::Whole(None) => None,
        AttemptBody::Whole(Some(bytes)) => {
            // It is in memory anyway; h2 sends it as the peer's window allows. Should the stream be
            // gone already, the response says why.
            let _ = stream.send_data(bytes, true);
            None
        }
        body @ AttemptBody::Streamed { .. } => {
            let task = tokio::spawn(pump(stream, body));
            Some(Upload(task.abort_handle()))
        }
    }
}

/// The sending half of a call. Let go before its end, whatever the reason, it resets the stream: the
/// server must not wait for the rest.
struct Outgoing {
    stream: SendStream<Bytes>,
    ended: bool,
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if !self.ended {
            self.stream.send_reset(Reason::CANCEL);
        }
    }
}

/// Sends a body as the peer's window allows, until it ends or the peer wants no more.
async fn pump(stream: SendStream<Bytes>, mut body: AttemptBody) {
    let mut outgoing = Outgoing {
        stream,
        ended: false,
    };
    let stream = &mut outgoing.stream;
    loop {
        let frame = tokio::select! {
            biased;
            _ = std::future::poll_fn(|cx| stream.poll_reset(cx)) => break,
            frame = body.frame() => frame,
        };
        let mut data = match frame {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => data,
                // gRPC requests have no trailers.
                Err(_) => continue,
            },
            Some(Err(status)) => {
                tracing::debug!(%status, "a request's body failed");
                return;
            }
            None => {
                let _ = stream.send_data(Bytes::new(), true);
                break;
            }
        };
        while !data.is_empty() {
            stream.reserve_capacity(data.len());
            match std::future::poll_fn(|cx| stream.poll_capacity(cx)).await {
                // The window has shrunk meanwhile.
                Some(Ok(0)) => {}
                Some(Ok(granted)) => {
                    let piece = data.split_to(granted.min(data.len()));
                    if stream.send_data(piece, false).is_err() {
                        return;
                    }
                }
                Some(Err(_)) | None => return,
            }
        }
    }
    outgoing.ended = true;
}

/// The body of a response, as it comes from the wire.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) stream: RecvStream,
    upload: Option<Upload>,
    call: Option<OpenCall>,
}

impl Incoming {
    /// The response is over: what is still being sent is not wanted any more.
    pub(super) fn finish(&mut self) {
        self.upload = None;
        self.call = None;
    }

    pub(super) fn ending(&self) -> Option<String> {
        self.call.as_ref().and_then(|call| call.0.ending.get())
    }
}

/// A connection that was just opened, and the task that drives it.
pub(super) struct Opened {
    pub(super) sender: Sender,
    /// Why its task has ended.
    pub(super) closed: oneshot::Receiver<String>,
}

/// Starts the task that drives the connection. It ends with the connection: when the peer closes it, when
/// a ping goes unanswered, or when no sender and no call is left.
pub(super) fn start(
    h2: SendRequest<Bytes>,
    connection: H2Connection<Observed<BoxIo>, Bytes>,
    shared: Arc<Shared>,
    keep_alive: KeepAlive,
    broken: oneshot::Receiver<String>,
) -> Opened {
    let (tell, closed) = oneshot::channel();
    let task = drive(connection, Arc::clone(&shared), keep_alive, broken);
    tokio::spawn(async move {
        let _ = tell.send(task.await);
    });
    let sender = Sender { h2, shared };
    Opened { sender, closed }
}

async fn drive(
    mut connection: H2Connection<Observed<BoxIo>, Bytes>,
    shared: Arc<Shared>,
    keep_alive: KeepAlive,
    broken: oneshot::Receiver<String>,
) -> String {
    let pings = connection.ping_pong();
    let result = tokio::select! {
        biased;
        result = &mut connection => result,
        () = silence(pings, &shared, keep_alive) => {
            shared.ending.set(|| "no answer to keep-alive".to_owned());
            Ok(())
        }
        why = read_out(broken) => {
            shared.ending.set(|| why);
            Ok(())
        }
    };
    shared.shut();
    let how = shared
        .ending
        .get()
        .or_else(|| result.err().map(|error| chain(&error)));
    match how {
        Some(how) => format!("connection lost: {how}"),
        None => "connection closed".to_owned(),
    }
}

/// Resolves a while after the connection could not be written to any more, with the reason. What the
/// peer had sent is read by then, and with it how the peer itself sees the end.
async fn read_out(broken: oneshot::Receiver<String>) -> String {
    let Ok(why) = broken.await else {
        return std::future::pending().await;
    };
    tokio::time::sleep(READ_OUT).await;
    why
}

/// Resolves when the peer has not been heard of for the keep-alive interval and has not answered a ping
/// within the time-out.
async fn silence(pings: Option<PingPong>, shared: &Shared, keep_alive: KeepAlive) {
    let (Some(mut pings), Some(interval)) = (pings, keep_alive.interval) else {
        return std::future::pending().await;
    };
    loop {
        let last = shared.last_heard();
        tokio::time::sleep_until(last + interval).await;
        if shared.last_heard() != last {
            continue;
        }
        let idle = shared.calls.load(Ordering::Relaxed) == 0;
        if idle && !keep_alive.while_idle {
            tokio::time::sleep(interval).await;
            continue;
        }
        let deadline = Instant::now() + keep_alive.timeout;
        // It fails while one is unanswered, whose answer will do.
        let _ = pings.send_ping(Ping::opaque());
        let answer = std::future::poll_fn(|cx| pings.poll_pong(cx));
        match tokio::time::timeout_at(deadline, answer).await {
            Ok(Ok(_)) => {}
            // The connection has ended, and says so itself.
            Ok(Err(_)) => return std::future::pending().await,
            // Whatever was heard counts: a peer that sends is there.
            Err(_) if shared.last_heard() != last => {}
            Err(_) => return,
        }
    }
}
