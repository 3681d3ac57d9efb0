//! Publishes the snapshots of one layout, with few snapshots for many changes.

use std::time::Duration;

use tokio::time::Instant;

use super::cache::CacheWriter;
use super::merge::LayoutInput;
use super::state::ListWatchState;
use crate::snapshot::Snapshot;

/// The shortest time between two snapshots that publish changes. A single change is published at
/// once. Of a thousand changes a second, several are published together, because each snapshot of
/// ten thousand instances takes milliseconds to build and to compare.
pub(super) const PUBLISH_INTERVAL: Duration = Duration::from_millis(20);

/// Publishes snapshots to the directory, and writes live snapshots to the cache.
pub(super) struct Publisher<'a> {
    input: &'a LayoutInput,
    cache: Option<CacheWriter>,
    published_at: Instant,
    /// Whether the state has changes that are not published yet. Only while the watch is open.
    pending: bool,
}

impl<'a> Publisher<'a> {
    pub(super) fn new(input: &'a LayoutInput, cache: Option<CacheWriter>) -> Self {
        Self {
            input,
            cache,
            published_at: Instant::now(),
            pending: false,
        }
    }

    /// Writes the snapshot to the cache if it is live.
    pub(super) fn write_cache(&self, snapshot: &Snapshot) {
        if let Some(cache) = &self.cache
            && snapshot.freshness.is_live()
        {
            cache.write_latest(snapshot);
        }
    }

    /// When pending changes are due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.pending.then(|| self.published_at + PUBLISH_INTERVAL)
    }

    /// Publishes the snapshot if it `changed`, unless the last one is too recent. A change of
    /// freshness from live to stale is published at once.
    pub(super) fn update<W>(&mut self, state: &mut ListWatchState<W>, changed: bool) {
        self.pending |= changed;
        let may_wait = state.is_live() && self.published_at.elapsed() < PUBLISH_INTERVAL;
        if self.pending && !may_wait {
            self.publish(state);
        }
    }

    pub(super) fn publish<W>(&mut self, state: &mut ListWatchState<W>) {
        let snapshot = state.snapshot();
        self.write_cache(&snapshot);
        self.input.publish(snapshot);
        self.published_at = Instant::now();
        self.pending = false;
    }
}
