//! Follows one layout in a background task.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::{Mutex, MutexGuard};

use super::cache::{Cache, CacheWriter};
use super::driver::Driver;
use super::list_watch::EtcdRange;
use super::merge::LayoutInput;
use super::publisher::Publisher;
use super::state::ListWatchState;
use crate::client::RawWatch;

/// Why a snapshot is stale after its task has ended early.
const NOT_FOLLOWED: &str = "no task is watching etcd any more, because its Tokio runtime has ended";

/// Follows one layout. Each runtime that uses the directory has a task for it; one task at a time
/// follows etcd, and the others wait to take over when its runtime shuts down.
pub(super) struct Follower {
    range: EtcdRange,
    cache: Option<Cache>,
    /// Locked by the task that follows etcd. `None` once the client is closed.
    state: Mutex<Option<FollowState>>,
}

/// The state that one task hands over to the next. The directory's streams end when the last
/// layout's `input` is dropped.
struct FollowState {
    state: ListWatchState<RawWatch>,
    input: LayoutInput,
}

impl Follower {
    /// Continues from `state`, whose snapshot is published already.
    pub(super) fn new(
        range: EtcdRange,
        state: ListWatchState<RawWatch>,
        input: LayoutInput,
        cache: Option<Cache>,
    ) -> Arc<Self> {
        Arc::new(Self {
            range,
            cache,
            state: Mutex::new(Some(FollowState { state, input })),
        })
    }

    /// Waits until no other task follows etcd, then follows it until the client is closed.
    pub(super) fn run(self: Arc<Self>) -> impl Future<Output = ()> + Send {
        // Part of the future from the beginning, because a runtime that ends early drops its tasks
        // before their first poll.
        let unstarted = StaleUnlessFollowed(Arc::clone(&self));
        async move {
            let mut guard = StaleOnDrop(self.state.lock().await);
            drop(unstarted);
            if let Some(FollowState { state, input }) = &mut *guard.0 {
                let cache_writer = self.cache.clone().map(CacheWriter::spawn);
                let mut publisher = Publisher::new(input, cache_writer);
                publisher.write_cache(&state.snapshot());
                let mut driver = Driver::new(self.range.clone());
                driver.follow(state, &mut publisher).await;
                *guard.0 = None;
            }
        }
    }
}

/// Marks the layout stale if no task follows etcd.
struct StaleUnlessFollowed(Arc<Follower>);

impl Drop for StaleUnlessFollowed {
    fn drop(&mut self) {
        if let Ok(state) = self.0.state.try_lock() {
            drop(StaleOnDrop(state));
        }
    }
}

/// Marks the layout stale if the task ends early, because its runtime shuts down or it panics. The
/// next task lists again.
struct StaleOnDrop<'a>(MutexGuard<'a, Option<FollowState>>);

impl Drop for StaleOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(FollowState { state, input }) = &mut *self.0 {
            state.restart(NOT_FOLLOWED, SystemTime::now());
            input.mark_stale(NOT_FOLLOWED);
        }
    }
}
