//! One HTTP/2 connection: calls go out on it, a task of its own drives it.
//!
//! On h2 itself rather than on hyper's client, which hands each call through a queue to a task and each
//! answer through another task back: two more turns of the scheduler per call than the stream
//! itself needs. And h2 says for certain whether a call was sent.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::task::AtomicWaker;
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
    /// Streams that are in use.
    calls: AtomicUsize,
    /// How many the server allows at a time.
    limit: AtomicUsize,
    /// Those in use whose calls were given up, and which may still have to be reset.
    given_up: AtomicUsize,
    /// The connection's task.
    driver: AtomicWaker,
    /// Whom to tell when there is room for a call again.
    freed: OnceLock<Arc<Notify>>,
    spent: Notify,
    pub(super) ending: Ending,
}

impl Shared {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            open: AtomicBool::new(true),
            opened: Instant::now(),
            heard: AtomicU64::new(0),
            calls: AtomicUsize::new(0),
            limit: AtomicUsize::new(0),
            given_up: AtomicUsize::new(0),
            driver: AtomicWaker::new(),
            freed: OnceLock::new(),
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

    fn how_it_ended(&self) -> String {
        match self.ending.get() {
            Some(how) => format!("connection lost: {how}"),
            None => "connection closed".to_owned(),
        }
    }

    fn is_full(&self) -> bool {
        self.calls.load(Ordering::SeqCst) >= self.limit.load(Ordering::SeqCst)
    }

    /// One stream more is in use, if the server allows it.
    fn enter(&self) -> bool {
        let limit = self.limit.load(Ordering::SeqCst);
        let one_more = |calls| (calls < limit).then_some(calls + 1);
        let (set, fetch) = (Ordering::SeqCst, Ordering::SeqCst);
        self.calls.fetch_update(set, fetch, one_more).is_ok()
    }

    /// So many streams are in use no more.
    ///
    /// In one order with what those do who wait: they register, and then look whether there is room.
    fn leave(&self, count: usize) {
        let calls = self.calls.fetch_sub(count, Ordering::SeqCst);
        if calls >= self.limit.load(Ordering::SeqCst) {
            self.tell_freed();
        }
    }

    fn set_limit(&self, limit: usize) {
        if self.limit.load(Ordering::SeqCst) != limit {
            self.limit.store(limit, Ordering::SeqCst);
            self.tell_freed();
        }
    }

    fn tell_freed(&self) {
        if let Some(freed) = self.freed.get() {
            freed.notify_one();
        }
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

    /// Why it takes no more calls; `None` while it does.
    pub(super) fn ended(&self) -> Option<String> {
        (!self.is_open()).then(|| self.shared.how_it_ended())
    }

    /// The server's limit on streams, if it is reached.
    pub(super) fn limit_reached(&self) -> Option<usize> {
        let limit = self.shared.limit.load(Ordering::SeqCst);
        self.shared.is_full().then_some(limit)
    }

    /// Whether a call can be sent now.
    pub(super) fn is_usable(&self) -> bool {
        self.is_open() && !self.shared.is_full()
    }

    /// `freed` is notified whenever there is room for a call after there was none.
    pub(super) fn announce_room(&self, freed: &Arc<Notify>) {
        let _ = self.shared.freed.set(Arc::clone(freed));
    }

    /// A stream for one call, if it can be sent now.
    ///
    /// Beyond the server's limit none is handed to h2, which would queue it: h2 sends what it has in its
    /// queue even if the call was given up meanwhile, so that, once there is room, the server sees
    /// a row of streams that are opened and reset, which it takes for an attack.
    pub(super) fn reserve(&self) -> Option<Reserved> {
        let entered = self.is_open() && self.shared.enter();
        entered.then(|| Reserved {
            h2: self.h2.clone(),
            open: OpenCall {
                shared: Arc::clone(&self.shared),
                closed: false,
            },
        })
    }
}

/// A stream that one call may open.
pub(super) struct Reserved {
    h2: SendRequest<Bytes>,
    /// Let go of last: by then h2 knows what it has to reset.
    open: OpenCall,
}

impl Reserved {
    /// Makes the call. Dropping the future, or the response's body, resets the stream.
    pub(super) async fn send(
        self,
        request: Request<()>,
        body: AttemptBody,
    ) -> Result<Response<Incoming>, SendError> {
        let Self { mut h2, mut open } = self;
        let failed = |shared: &Shared, fate, error| SendError {
            fate,
            error,
            ending: shared.ending.get(),
        };
        if let Err(error) = std::future::poll_fn(|cx| h2.poll_ready(cx)).await {
            // It is closing, or has run out of stream ids.
            open.shared.spend();
            return Err(failed(&open.shared, Fate::Unsent, error));
        }
        let sent = h2.send_request(request, body.is_end_stream());
        let (response, stream) = match sent {
            Ok(sent) => sent,
            Err(error) => {
                // The connection's fault if it cannot take any other call either.
                let usable = std::future::poll_fn(|cx| h2.poll_ready(cx)).await;
                let fate = match usable {
                    Ok(()) => Fate::Rejected,
                    Err(_) => {
                        open.shared.spend();
                        Fate::Unsent
                    }
                };
                return Err(failed(&open.shared, fate, error));
            }
        };
        let upload = upload(stream, body);
        // Counted as a reference to the connection; a response that takes long needs none.
        drop(h2);
        match response.await {
            Ok(response) => Ok(response.map(|stream| Incoming {
                stream: Some(stream),
                upload,
                call: Some(open),
            })),
            Err(error) => {
                open.closed = true;
                let fate = if failure::is_refused(&error) {
                    Fate::Unsent
                } else {
                    Fate::Unknown
                };
                Err(failed(&open.shared, fate, error))
            }
        }
    }
}

/// A stream in use, until it is dropped.
#[derive(Debug)]
struct OpenCall {
    shared: Arc<Shared>,
    /// The stream has ended. Otherwise it is in use until the connection's task has reset it.
    closed: bool,
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        if self.closed {
            self.shared.leave(1);
        } else {
            self.shared.given_up.fetch_add(1, Ordering::SeqCst);
            self.shared.driver.wake();
        }
    }
}

/// The task that sends a streamed body; dropped, it stops, and the stream is reset if it was not sent
/// to its end.
#[derive(Debug)]
struct Upload(AbortHandle);

impl Upload {
    fn is_over(&self) -> bool {
        self.0.is_finished()
    }
}

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
    /// `None` once it is over.
    pub(super) stream: Option<RecvStream>,
    upload: Option<Upload>,
    /// Let go of last, as in [`Reserved`].
    call: Option<OpenCall>,
}

impl Incoming {
    /// Nothing is to be read any more.
    pub(super) fn is_at_end(&self) -> bool {
        self.stream.as_ref().is_none_or(RecvStream::is_end_stream)
    }

    /// The response is over: what is still being sent is not wanted any more, and neither is what may be to
    /// come. A reader may hold on to it for long, and takes up no stream.
    pub(super) fn finish(&mut self) {
        let received = self.is_at_end();
        let sent = self.upload.take().is_none_or(|upload| upload.is_over());
        self.stream = None;
        if let Some(mut call) = self.call.take() {
            call.closed = received && sent;
        }
    }

    pub(super) fn ending(&self) -> Option<String> {
        self.call.as_ref().and_then(|call| call.shared.ending.get())
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
        result = std::future::poll_fn(|cx| poll_connection(&mut connection, &shared, cx)) => result,
        () = silence(pings, &shared, keep_alive) => {
            shared.ending.set(|| "no answer to keep-alive".to_owned());
            Ok(())
        }
        why = read_out(broken) => {
            shared.ending.set(|| why);
            Ok(())
        }
    };
    // Known before it is closed, so that nobody sees it closed and not why.
    if let Err(error) = result {
        shared.ending.set(|| chain(&error));
    }
    shared.shut();
    shared.how_it_ended()
}

/// Polls the connection, and keeps the account of its streams.
fn poll_connection(
    connection: &mut H2Connection<Observed<BoxIo>, Bytes>,
    shared: &Shared,
    cx: &mut Context<'_>,
) -> Poll<Result<(), h2::Error>> {
    shared.driver.register(cx.waker());
    let given_up = shared.given_up.swap(0, Ordering::SeqCst);
    let polled = Pin::new(&mut *connection).poll(cx);
    if given_up > 0 {
        // By now they have been reset.
        shared.leave(given_up);
    }
    shared.set_limit(connection.max_concurrent_send_streams());
    polled
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
