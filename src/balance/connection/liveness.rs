//! Whether a connection that was idle for long is known to work.
//!
//! An idle connection is pinged only a few times, because servers count pings (see
//! [`ping_budget`](super::ping_budget)). Afterwards the connection may break unnoticed. The
//! keep-alive marks it as unproven, and the next call waits for the response to a ping before
//! anything is sent.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// Shared by the keep-alive of a connection and the connection's calls.
#[derive(Debug, Default)]
pub(super) struct Liveness {
    /// Whether a call must wait for a ping. Looked at without ordering first, because a call that
    /// misses a change behaves as a call that was sent a moment earlier.
    unproven: AtomicBool,
    /// Whether the response to the ping is late. Calls no longer wait for it.
    suspect: AtomicBool,
    /// Whether a call waits.
    requested: AtomicBool,
    decided: Notify,
}

impl Liveness {
    pub(super) fn is_unproven(&self) -> bool {
        self.unproven.load(Ordering::Relaxed)
    }

    /// Makes calls wait for a ping. Only the keep-alive calls this.
    pub(super) fn set_unproven(&self) {
        if !self.is_unproven() {
            // A call that looked at the flag before the latest decision may have asked after it.
            self.requested.store(false, Ordering::Relaxed);
            // Release, so that no call sees the flag and asks before the store above takes effect.
            self.unproven.store(true, Ordering::Release);
        }
    }

    pub(super) fn is_suspect(&self) -> bool {
        self.suspect.load(Ordering::SeqCst)
    }

    /// Records that the response to the ping is late, and wakes the calls that wait.
    pub(super) fn set_suspect(&self) {
        self.suspect.store(true, Ordering::SeqCst);
        self.decided.notify_waiters();
    }

    /// Records that the peer is alive, or that the connection has ended, and wakes the calls that
    /// wait. Returns whether the connection was suspect.
    pub(super) fn decide(&self) -> bool {
        self.requested.store(false, Ordering::Relaxed);
        self.unproven.store(false, Ordering::SeqCst);
        let was_suspect = self.suspect.swap(false, Ordering::SeqCst);
        self.decided.notify_waiters();
        was_suspect
    }

    /// Whether a call waits for a ping. Only the keep-alive calls this.
    pub(super) fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Relaxed)
    }

    /// Waits until the connection works, is suspect or has ended. `wake` wakes the keep-alive.
    pub(super) async fn wait(&self, wake: impl Fn()) {
        loop {
            let decided = self.decided.notified();
            tokio::pin!(decided);
            // Registered before the look at the flag, so that no notification is lost in between.
            decided.as_mut().enable();
            if !self.unproven.load(Ordering::SeqCst) || self.is_suspect() {
                return;
            }
            self.requested.store(true, Ordering::Relaxed);
            wake();
            decided.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn late_request_asks_for_no_ping_in_the_next_idle_time() {
        let liveness = Liveness::default();
        liveness.set_unproven();
        liveness.decide();
        // As a call does that looked at the flag before the decision.
        liveness.requested.store(true, Ordering::Relaxed);
        liveness.set_unproven();
        assert!(!liveness.is_requested());
    }

    #[test]
    fn call_that_waits_keeps_its_request() {
        let liveness = Liveness::default();
        liveness.set_unproven();
        assert_eq!(liveness.wait(|| ()).now_or_never(), None);
        liveness.set_unproven();
        assert!(liveness.is_requested());
    }
}
