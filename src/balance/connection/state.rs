//! The state that a connection's task, its I/O and its calls share.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use futures::task::AtomicWaker;
use tokio::sync::Notify;
use tokio::time::Instant;

/// What ended the connection, as its I/O saw it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ending(Arc<Mutex<Option<String>>>);

impl Ending {
    pub(crate) fn set(&self, text: impl FnOnce() -> String) {
        let mut ending = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ending.get_or_insert_with(text);
    }

    pub(crate) fn get(&self) -> Option<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// What the connection's task, its I/O and its calls share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) open: AtomicBool,
    opened: Instant,
    /// When a read last brought something, a sign of life: nanoseconds since it was opened.
    heard: AtomicU64,
    /// Streams that are in use.
    pub(crate) calls: AtomicUsize,
    /// How many the server allows at a time.
    pub(crate) limit: AtomicUsize,
    /// Those in use whose calls were given up, and which may still have to be reset.
    pub(crate) given_up: AtomicUsize,
    /// The connection's task.
    pub(crate) driver: AtomicWaker,
    /// Whom to tell when there is room for a call again.
    pub(crate) freed: OnceLock<Arc<Notify>>,
    spent: Notify,
    pub(crate) ending: Ending,
}

impl Shared {
    pub(crate) fn new() -> Arc<Self> {
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
    pub(crate) fn shut(&self) {
        self.open.store(false, Ordering::Release);
    }

    /// No new call can be sent, although the connection may live on: another is needed.
    pub(crate) fn spend(&self) {
        self.shut();
        self.spent.notify_one();
    }

    /// Resolves when no new call can be sent.
    pub(crate) async fn spent(&self) {
        self.spent.notified().await;
    }

    pub(crate) fn heard(&self) {
        let since = self.opened.elapsed().as_nanos() as u64;
        self.heard.store(since, Ordering::Relaxed);
    }

    pub(crate) fn how_it_ended(&self) -> String {
        match self.ending.get() {
            Some(how) => format!("connection lost: {how}"),
            None => "connection closed".to_owned(),
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.calls.load(Ordering::SeqCst) >= self.limit.load(Ordering::SeqCst)
    }

    /// One stream more is in use, if the server allows it.
    pub(crate) fn enter(&self) -> bool {
        let limit = self.limit.load(Ordering::SeqCst);
        let one_more = |calls| (calls < limit).then_some(calls + 1);
        let (set, fetch) = (Ordering::SeqCst, Ordering::SeqCst);
        self.calls.fetch_update(set, fetch, one_more).is_ok()
    }

    /// So many streams are in use no more.
    ///
    /// In one order with what those do who wait: they register, and then look whether there is room.
    pub(crate) fn leave(&self, count: usize) {
        let calls = self.calls.fetch_sub(count, Ordering::SeqCst);
        if calls >= self.limit.load(Ordering::SeqCst) {
            self.tell_freed();
        }
    }

    pub(crate) fn set_limit(&self, limit: usize) {
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

    pub(crate) fn last_heard(&self) -> Instant {
        self.opened + Duration::from_nanos(self.heard.load(Ordering::Relaxed))
    }
}
