//! The pause after a connection's first response.
//!
//! Some servers and proxies close a connection after each response, without GOAWAY. A call that is
//! written before the end arrives is lost, because nothing proves that the server has not seen it.
//! So after the first response, if no other call is in flight, the next call waits for a moment. If
//! the connection ends meanwhile, the call is sent on another one.
//!
//! Other calls in flight would be lost with such a connection in any case, so with them there is no
//! pause, and calls under load are not held up. Nor is there one if the connection of the endpoint
//! before ended with GOAWAY, because such a server announces the end of each.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Sleep, sleep};

/// How long calls wait. A server that closes after a response does so in the same moment, so the
/// end arrives right behind the response, however far away the server is.
const PAUSE: Duration = Duration::from_millis(5);

/// The first response has not ended.
const AWAITED: u8 = 0;
/// Calls wait.
const PAUSED: u8 = 1;
/// Calls do not wait any more.
const OVER: u8 = 2;

/// The first response of a connection. Shared by the connection's task, its I/O and its calls.
#[derive(Debug, Default)]
pub(super) struct FirstResponse {
    /// Relaxed, because a call that misses a change behaves as one that was sent a moment earlier.
    phase: AtomicU8,
    over: Notify,
    last_end: LastEnd,
}

/// Whether the connection of an endpoint that ended last was ended with GOAWAY. Shared by the
/// connections of the endpoint.
#[derive(Debug, Clone, Default)]
pub(super) struct LastEnd(Arc<AtomicBool>);

/// All are equal, because the past is no property of a target.
impl PartialEq for LastEnd {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for LastEnd {}

impl FirstResponse {
    /// The first response of a new connection.
    pub(super) fn new(last_end: LastEnd) -> Self {
        let was_announced = last_end.0.load(Ordering::Relaxed);
        Self {
            phase: AtomicU8::new(if was_announced { OVER } else { AWAITED }),
            over: Notify::new(),
            last_end,
        }
    }

    /// Records the end of the connection, with or without GOAWAY, for the endpoint's next one.
    pub(super) fn record_close(&self, is_announced: bool) {
        self.last_end.0.store(is_announced, Ordering::Relaxed);
    }

    /// Records that a response has ended. `is_alone` says whether no other call is in flight.
    pub(super) fn record_end(&self, is_alone: impl FnOnce() -> bool) {
        if self.phase.load(Ordering::Relaxed) == AWAITED {
            let phase = if is_alone() { PAUSED } else { OVER };
            self.phase.store(phase, Ordering::Relaxed);
        }
    }

    pub(super) fn is_paused(&self) -> bool {
        self.phase.load(Ordering::Relaxed) == PAUSED
    }

    /// Ends the pause: the time is over, or the connection accepts no more calls.
    pub(super) fn resume(&self) {
        if self.phase.swap(OVER, Ordering::SeqCst) == PAUSED {
            self.over.notify_waiters();
        }
    }

    /// Waits until the pause is over.
    pub(super) async fn wait(&self) {
        let over = self.over.notified();
        tokio::pin!(over);
        // Registered before the look at the phase, so that no notification is lost in between.
        over.as_mut().enable();
        if self.phase.load(Ordering::SeqCst) == PAUSED {
            over.await;
        }
    }
}

/// The timer that ends the pause. The task that drives the connection polls it, because callers may
/// be outside of a runtime.
#[derive(Debug, Default)]
pub(super) struct PauseTimer(Option<Pin<Box<Sleep>>>);

impl PauseTimer {
    pub(super) fn poll(&mut self, first: &FirstResponse, cx: &mut Context<'_>) {
        if !first.is_paused() {
            return;
        }
        let timer = self.0.get_or_insert_with(|| Box::pin(sleep(PAUSE)));
        if let Poll::Ready(()) = timer.as_mut().poll(cx) {
            first.resume();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::Arc;

    use futures::FutureExt as _;
    use tokio::time::Instant;

    use super::*;

    #[test]
    fn only_the_first_response_without_other_calls_pauses() {
        let first = FirstResponse::default();
        assert_eq!(first.wait().now_or_never(), Some(()));
        first.record_end(|| true);
        assert!(first.is_paused() && first.wait().now_or_never().is_none());
        first.resume();
        first.record_end(|| true);
        assert_eq!(first.wait().now_or_never(), Some(()));

        let busy = FirstResponse::default();
        busy.record_end(|| false);
        busy.record_end(|| true);
        assert!(!busy.is_paused());
    }

    #[test]
    fn end_with_goaway_excludes_a_pause_of_the_next_connection() {
        let last_end = LastEnd::default();
        for is_announced in [false, true, false] {
            FirstResponse::new(last_end.clone()).record_close(is_announced);
            let next = FirstResponse::new(last_end.clone());
            next.record_end(|| true);
            assert_eq!(next.is_paused(), !is_announced);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn timer_ends_the_pause_once() {
        let first = Arc::new(FirstResponse::default());
        first.record_end(|| true);
        let started = Instant::now();
        let mut timer = PauseTimer::default();
        let driver = poll_fn(|cx| {
            timer.poll(&first, cx);
            Poll::<()>::Pending
        });
        tokio::select! {
            () = first.wait() => assert_eq!(started.elapsed(), PAUSE),
            () = driver => {}
        }
    }
}
