//! Telling the queue of waiting calls that a stream may be free.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Notifies the task that serves waiting calls. Connections and the pool notify, and the queue
/// says how many calls wait.
#[derive(Debug, Default)]
pub(crate) struct Capacity {
    waiting: AtomicUsize,
    changed: Notify,
}

impl Capacity {
    /// Whether a call waits. New calls then queue too.
    pub(crate) fn is_awaited(&self) -> bool {
        self.waiting() > 0
    }

    /// How many calls wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    pub(crate) fn set_waiting(&self, calls: usize) {
        self.waiting.store(calls, Ordering::SeqCst);
    }

    /// Records that a connection has a free stream after it had none.
    ///
    /// Costs one load while no call waits. Sequentially consistent: a call first counts itself as
    /// waiting and is then tried once, and a stream is first freed and the count is then read. One
    /// of the two sides always sees the other.
    pub(crate) fn notify_free_stream(&self) {
        if self.is_awaited() {
            self.notify();
        }
    }

    /// Records that waiting calls should be tried.
    pub(crate) fn notify(&self) {
        self.changed.notify_one();
    }

    /// Waits for a notification. One that came since the last call of this function counts.
    pub(crate) async fn notified(&self) {
        self.changed.notified().await;
    }
}
