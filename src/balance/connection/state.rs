//! The state that a connection's driver task, its I/O and its calls share.

use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Waker;
use std::time::Duration;

use futures::task::AtomicWaker;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::cancelled_streams::CancelledStreams;
use super::capacity::Capacity;
use super::close_reason::CloseReason;
use super::first_response::FirstResponse;
use super::header_limits::HeaderLimits;
use super::liveness::Liveness;

/// A server that has accepted this stream or a later one has served calls, even if it has responded
/// to none: 16 calls were sent, which may all have been cancelled. A connection that accepts fewer
/// must carry a response to count as one that worked.
const LAST_OF_SERVED: u32 = 2 * 16 - 1;

/// The state of one connection.
#[derive(Debug)]
pub(crate) struct ConnectionState {
    accepting: AtomicBool,
    /// Calls that are handing their request to h2.
    opening: AtomicUsize,
    opened_at: Instant,
    /// The last sign of life of the peer, in nanoseconds since `opened_at`.
    last_activity: AtomicU64,
    /// The longest that a write has waited for room since bytes arrived, in nanoseconds.
    longest_write_wait: AtomicU64,
    /// Whether HEADERS or DATA arrived since the keep-alive last looked.
    data_arrived: AtomicBool,
    pub(super) liveness: Liveness,
    pub(super) header_limits: HeaderLimits,
    pub(super) first_response: FirstResponse,
    /// Streams in use, cancelled ones included until h2 has reset them.
    streams: AtomicUsize,
    /// Streams in use that the peer has ended. Not exact: the end of a stream whose response was
    /// not read to the end counts until no stream is in use.
    ended: AtomicIsize,
    /// The server's limit on concurrent streams.
    stream_limit: AtomicUsize,
    /// Streams of cancelled calls that h2 may not have reset yet. They still count against the
    /// limit.
    cancelled: AtomicUsize,
    pub(super) cancelled_streams: CancelledStreams,
    driver: AtomicWaker,
    /// Notified when the connection has a free stream again.
    capacity: OnceLock<Arc<Capacity>>,
    exhausted: Notify,
    /// The last stream whose HEADERS were handed to the system.
    last_written: AtomicU32,
    /// The last stream that the peer may act on, by its latest GOAWAY; `u32::MAX` before the first.
    last_accepted: AtomicU32,
    /// Whether nothing is written any more.
    stopped_writing: AtomicBool,
    /// Whether the server has served calls: the head of a response has arrived, or a GOAWAY says
    /// that the server has acted on several streams.
    has_served: AtomicBool,
    /// Whether a GOAWAY says that the server has accepted a call.
    has_accepted: AtomicBool,
    served: Notify,
    pub(crate) close_reason: CloseReason,
}

impl ConnectionState {
    #[cfg(test)]
    pub(crate) fn new() -> Arc<Self> {
        Self::with(HeaderLimits::new(u32::MAX), FirstResponse::default())
    }

    pub(super) fn with(header_limits: HeaderLimits, first_response: FirstResponse) -> Arc<Self> {
        Arc::new(Self {
            accepting: AtomicBool::new(true),
            opening: AtomicUsize::new(0),
            opened_at: Instant::now(),
            last_activity: AtomicU64::new(0),
            longest_write_wait: AtomicU64::new(0),
            data_arrived: AtomicBool::new(false),
            liveness: Liveness::default(),
            header_limits,
            first_response,
            streams: AtomicUsize::new(0),
            ended: AtomicIsize::new(0),
            stream_limit: AtomicUsize::new(0),
            cancelled: AtomicUsize::new(0),
            cancelled_streams: CancelledStreams::default(),
            driver: AtomicWaker::new(),
            capacity: OnceLock::new(),
            exhausted: Notify::new(),
            last_written: AtomicU32::new(0),
            last_accepted: AtomicU32::new(u32::MAX),
            stopped_writing: AtomicBool::new(false),
            has_served: AtomicBool::new(false),
            has_accepted: AtomicBool::new(false),
            served: Notify::new(),
            close_reason: CloseReason::default(),
        })
    }

    /// Whether the connection accepts new calls.
    pub(crate) fn is_accepting(&self) -> bool {
        self.accepting.load(Ordering::Acquire)
    }

    pub(crate) fn stop_accepting(&self) {
        self.accepting.store(false, Ordering::SeqCst);
        self.first_response.resume();
    }

    /// Lets a call hand its request to h2 until the result is dropped, if the connection accepts
    /// calls.
    ///
    /// Sequentially consistent, like [`stop_accepting`](Self::stop_accepting): either the call sees
    /// that the connection accepts no more, or the I/O sees the call.
    pub(super) fn begin_opening(&self) -> Option<OpeningStream<'_>> {
        self.opening.fetch_add(1, Ordering::SeqCst);
        let opening = OpeningStream(self);
        self.accepting.load(Ordering::SeqCst).then_some(opening)
    }

    /// Whether a call is handing its request to h2.
    pub(super) fn is_opening_stream(&self) -> bool {
        self.opening.load(Ordering::SeqCst) > 0
    }

    /// Records that h2 accepts no more calls, although the connection may stay open. The endpoint
    /// then needs another connection.
    pub(crate) fn mark_exhausted(&self) {
        self.stop_accepting();
        self.exhausted.notify_one();
    }

    /// Resolves after [`mark_exhausted`](Self::mark_exhausted).
    pub(crate) async fn wait_until_exhausted(&self) {
        self.exhausted.notified().await;
    }

    /// Records that HEADERS or DATA arrived. Servers forget the pings that they have counted when
    /// they send one.
    pub(super) fn record_data(&self) {
        self.data_arrived.store(true, Ordering::Relaxed);
    }

    /// Whether HEADERS or DATA arrived since the last call of this function.
    pub(super) fn take_data_arrived(&self) -> bool {
        self.data_arrived.swap(false, Ordering::Relaxed)
    }

    /// Waits until a ping has shown that the connection works, if the connection was idle for so
    /// long that it may be broken. Returns whether calls can be sent.
    pub(super) async fn prove(&self) -> bool {
        self.liveness.wait(|| self.driver.wake()).await;
        self.is_accepting() && !self.liveness.is_suspect()
    }

    /// Hands out no streams until the peer responds. Calls wait as if all streams were in use.
    pub(super) fn suspend_calls(&self) {
        self.set_stream_limit(0);
        self.liveness.set_suspect();
    }

    /// Records a sign that the peer lives: bytes arrived, or the system got rid of bytes of ours.
    pub(crate) fn record_activity(&self) {
        let since_opened = self.opened_at.elapsed().as_nanos() as u64;
        self.last_activity.store(since_opened, Ordering::Relaxed);
    }

    pub(crate) fn last_activity(&self) -> Instant {
        self.opened_at + Duration::from_nanos(self.last_activity.load(Ordering::Relaxed))
    }

    /// Records that a write has waited for room.
    pub(super) fn record_write_wait(&self, wait: Duration) {
        let wait = wait.as_nanos() as u64;
        self.longest_write_wait.fetch_max(wait, Ordering::Relaxed);
    }

    /// Records that bytes arrived, so that the peer has read at least some of ours.
    pub(super) fn forget_write_waits(&self) {
        if !self.longest_write_wait().is_zero() {
            self.longest_write_wait.store(0, Ordering::Relaxed);
        }
    }

    pub(super) fn longest_write_wait(&self) -> Duration {
        Duration::from_nanos(self.longest_write_wait.load(Ordering::Relaxed))
    }

    /// Records the last stream whose HEADERS were handed to the system.
    pub(super) fn record_written(&self, stream: u32) {
        self.last_written.store(stream, Ordering::Release);
    }

    /// Whether the HEADERS of a stream were handed to the system.
    pub(super) fn is_written(&self, stream: u32) -> bool {
        stream <= self.last_written.load(Ordering::Acquire)
    }

    /// Records the last stream of a GOAWAY. The latest counts: a graceful shutdown begins with the
    /// largest stream id (RFC 9113, section 6.8).
    pub(super) fn record_go_away(&self, last_stream: u32) {
        self.last_accepted.store(last_stream, Ordering::Release);
    }

    /// Whether no stream lies between the last that the peer's GOAWAY accepts and this one, which
    /// the GOAWAY excludes. Ids of streams are odd and consecutive.
    pub(super) fn is_first_excluded(&self, stream: u32) -> bool {
        let last_accepted = self.last_accepted.load(Ordering::Acquire);
        stream <= last_accepted.saturating_add(2)
    }

    /// Records that nothing is written any more.
    pub(super) fn stop_writing(&self) {
        self.stopped_writing.store(true, Ordering::SeqCst);
    }

    pub(super) fn has_stopped_writing(&self) -> bool {
        self.stopped_writing.load(Ordering::SeqCst)
    }

    /// Whether no byte of a stream was or will be handed to the system.
    pub(super) fn is_never_written(&self, stream: u32) -> bool {
        // In this order, because streams may be written until then.
        self.has_stopped_writing() && !self.is_written(stream)
    }

    /// Records that a GOAWAY accepts calls up to this stream, if the calls are ours.
    pub(super) fn record_accepted(&self, last_stream: u32) {
        if last_stream == 0 || !self.is_written(last_stream) {
            return;
        }
        self.has_accepted.store(true, Ordering::SeqCst);
        if last_stream >= LAST_OF_SERVED {
            self.record_served();
        }
    }

    pub(super) fn has_accepted(&self) -> bool {
        self.has_accepted.load(Ordering::SeqCst)
    }

    /// Records that the server has served a call.
    pub(crate) fn record_served(&self) {
        // Only the first is stored, because this runs for every response.
        if !self.has_served.load(Ordering::Relaxed) {
            self.has_served.store(true, Ordering::SeqCst);
            self.served.notify_waiters();
        }
    }

    pub(super) fn has_served(&self) -> bool {
        self.has_served.load(Ordering::SeqCst)
    }

    /// Resolves when the server has served a call.
    pub(super) async fn wait_until_served(&self) {
        let served = self.served.notified();
        tokio::pin!(served);
        // Registered before the look at the flag, so that no response is missed in between.
        served.as_mut().enable();
        if !self.has_served() {
            served.await;
        }
    }

    pub(crate) fn describe_close(&self) -> String {
        match self.close_reason.get() {
            Some(reason) => format!("connection lost: {reason}"),
            None => "connection closed".to_owned(),
        }
    }

    /// Whether a stream is open for the peer, too. A stream may be in use for much longer, while
    /// its response waits to be read. Only the driver's task calls this.
    pub(super) fn has_open_stream(&self) -> bool {
        let streams = self.streams.load(Ordering::SeqCst);
        if streams == 0 {
            self.ended.store(0, Ordering::Relaxed);
        }
        let ended = self.ended.load(Ordering::Relaxed);
        usize::try_from(ended).map_or(streams > 0, |ended| streams > ended)
    }

    /// Records that the peer has ended a stream. The end of a cancelled stream does not count.
    pub(super) fn record_stream_end(&self, stream: u32) {
        self.first_response
            .record_end(|| self.streams.load(Ordering::SeqCst) == 1);
        if !self.cancelled_streams.remove(stream) {
            self.ended.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Records that a stream that the peer has ended is about to be given back.
    pub(super) fn forget_stream_end(&self) {
        self.ended.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether a stream is in use.
    pub(super) fn has_calls(&self) -> bool {
        self.streams.load(Ordering::SeqCst) > 0
    }

    /// Whether as many streams are in use as the server allows.
    pub(crate) fn is_full(&self) -> bool {
        self.streams.load(Ordering::SeqCst) >= self.stream_limit()
    }

    pub(crate) fn stream_limit(&self) -> usize {
        self.stream_limit.load(Ordering::SeqCst)
    }

    pub(crate) fn set_stream_limit(&self, limit: usize) {
        if self.stream_limit() != limit {
            self.stream_limit.store(limit, Ordering::SeqCst);
            self.notify_capacity();
        }
    }

    /// Takes a stream, if the server's limit leaves one.
    pub(crate) fn acquire_stream(&self) -> bool {
        let limit = self.stream_limit();
        let add_one = |streams| (streams < limit).then_some(streams + 1);
        let (set, fetch) = (Ordering::SeqCst, Ordering::SeqCst);
        self.streams.fetch_update(set, fetch, add_one).is_ok()
    }

    /// Gives streams back.
    ///
    /// Sequentially consistent; see [`Capacity::notify_free_stream`].
    pub(crate) fn release_streams(&self, count: usize) {
        let streams = self.streams.fetch_sub(count, Ordering::SeqCst);
        if streams >= self.stream_limit() {
            self.notify_capacity();
        }
    }

    /// Gives a stream back once the driver has reset it, and wakes the driver.
    pub(crate) fn cancel_stream(&self) {
        self.cancelled.fetch_add(1, Ordering::SeqCst);
        self.driver.wake();
    }

    /// Streams cancelled since the last call of this function.
    pub(crate) fn take_cancelled(&self) -> usize {
        self.cancelled.swap(0, Ordering::SeqCst)
    }

    pub(crate) fn register_driver(&self, waker: &Waker) {
        self.driver.register(waker);
    }

    /// `capacity` is notified whenever the connection has a free stream after it had none.
    pub(crate) fn set_capacity(&self, capacity: &Arc<Capacity>) {
        let _ = self.capacity.set(Arc::clone(capacity));
    }

    fn notify_capacity(&self) {
        if let Some(capacity) = self.capacity.get() {
            capacity.notify_free_stream();
        }
    }
}

/// A call that is handing its request to h2.
pub(super) struct OpeningStream<'a>(&'a ConnectionState);

impl Drop for OpeningStream<'_> {
    fn drop(&mut self) {
        self.0.opening.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn is_notified(capacity: &Capacity) -> bool {
        capacity.notified().now_or_never().is_some()
    }

    #[test]
    fn streams_stay_within_the_limit() {
        let state = ConnectionState::new();
        assert!(!state.acquire_stream());
        state.set_stream_limit(2);
        assert!(state.acquire_stream() && state.acquire_stream());
        assert!(state.is_full() && !state.acquire_stream());
        state.release_streams(1);
        assert!(!state.is_full() && state.acquire_stream());
    }

    #[test]
    fn only_a_full_connection_notifies_of_capacity() {
        let state = ConnectionState::new();
        let capacity = Arc::<Capacity>::default();
        capacity.set_waiting(1);
        state.set_capacity(&capacity);
        state.set_stream_limit(2);
        assert!(is_notified(&capacity));
        assert!(state.acquire_stream());
        state.release_streams(1);
        assert!(!is_notified(&capacity));
        assert!(state.acquire_stream() && state.acquire_stream());
        state.release_streams(1);
        assert!(is_notified(&capacity));
        assert!(state.acquire_stream());
        capacity.set_waiting(0);
        state.release_streams(1);
        assert!(!is_notified(&capacity), "no call waits");
    }

    #[test]
    fn cancelled_stream_counts_until_it_is_reset() {
        let state = ConnectionState::new();
        state.set_stream_limit(1);
        assert!(state.acquire_stream());
        state.cancel_stream();
        assert!(state.is_full());
        let reset = state.take_cancelled();
        state.release_streams(reset);
        assert_eq!(reset, 1);
        assert!(!state.has_open_stream() && state.acquire_stream());
    }

    #[test]
    fn stream_that_the_peer_has_ended_is_not_open() {
        let state = ConnectionState::new();
        state.set_stream_limit(2);
        assert!(state.acquire_stream() && state.acquire_stream());
        assert!(state.has_open_stream());
        state.record_stream_end(1);
        assert!(state.has_open_stream());
        state.forget_stream_end();
        state.release_streams(1);
        assert!(state.has_open_stream());
        state.record_stream_end(1);
        assert!(!state.has_open_stream());
        // Cancelled while its end arrived.
        state.release_streams(1);
        assert!(!state.has_open_stream());
        assert!(state.acquire_stream() && state.has_open_stream());
    }

    #[test]
    fn lost_connection_names_the_cause() {
        let state = ConnectionState::new();
        assert_eq!(state.describe_close(), "connection closed");
        state.close_reason.set(|| "reset by peer".to_owned());
        assert_eq!(state.describe_close(), "connection lost: reset by peer");
    }

    #[test]
    fn connection_that_accepts_no_calls_opens_no_stream() {
        let state = ConnectionState::new();
        let opening = state.begin_opening();
        assert!(opening.is_some());
        state.stop_accepting();
        assert!(state.is_opening_stream());
        drop(opening);
        assert!(state.begin_opening().is_none());
        assert!(!state.is_opening_stream());
    }

    #[test]
    fn end_of_a_cancelled_stream_counts_for_no_other() {
        let state = ConnectionState::new();
        state.set_stream_limit(2);
        assert!(state.acquire_stream() && state.acquire_stream());
        state.cancelled_streams.insert(1);
        state.cancel_stream();
        let reset = state.take_cancelled();
        state.release_streams(reset);
        state.record_stream_end(1);
        assert!(state.has_open_stream());
        state.record_stream_end(3);
        assert!(!state.has_open_stream());
    }

    #[test]
    fn first_excluded_stream_follows_the_last_of_the_latest_goaway() {
        let state = ConnectionState::new();
        for (last_stream, first, second) in
            [(0x7fff_ffff, 3, None), (5, 7, Some(9)), (0, 1, Some(3))]
        {
            state.record_go_away(last_stream);
            assert!(state.is_first_excluded(first));
            assert!(second.is_none_or(|second| !state.is_first_excluded(second)));
        }
    }
}
