//! Whether calls wait for an endpoint.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// The calls that wait for an endpoint. Connection tasks that pause between two attempts look at
/// it.
#[derive(Debug, Default)]
pub(crate) struct Demand {
    waiting: AtomicUsize,
    arrived: Notify,
}

impl Demand {
    /// Counts a waiting call until the guard is dropped.
    pub(crate) fn register(&self) -> DemandGuard<'_> {
        // Sequentially consistent, so that either this notification or the count is seen by a
        // connection task that begins to wait at the same time.
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.arrived.notify_waiters();
        DemandGuard(self)
    }

    /// Whether a call waits.
    pub(super) fn is_any(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// Resolves while a call waits.
    pub(super) async fn wait_for_call(&self) {
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            // Registered before the look at the count, so that no call is missed in between.
            arrived.as_mut().enable();
            if self.is_any() {
                return;
            }
            arrived.await;
        }
    }
}

/// Counts a call that waits for an endpoint.
#[derive(Debug)]
#[must_use = "the call counts as waiting until the guard is dropped"]
pub(crate) struct DemandGuard<'a>(&'a Demand);

impl Drop for DemandGuard<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn resolves_while_a_call_waits() {
        let demand = Demand::default();
        let mut before = Box::pin(demand.wait_for_call());
        assert!((&mut before).now_or_never().is_none());
        let call = demand.register();
        assert!((&mut before).now_or_never().is_some());
        assert!(demand.wait_for_call().now_or_never().is_some());
        drop(call);
        assert!(demand.wait_for_call().now_or_never().is_none());
    }
}
