//! The state machine that lists and watches one layout. Events go in, the next action comes out.
//!
//! ```text
//!                     last page              opened
//!   Start ---> Page ------------> OpenWatch --------> Live
//!     ^         | failed             | failed          | watch lost, or history compacted
//!     |         v                    v                 |
//!     +------ Backoff <--------------+-----------------+
//! ```
//!
//! The state machine does no I/O and reads no clock; the caller passes the time in. Three rules
//! keep its snapshots true:
//!
//! - The snapshot shows a list only when the list is complete. All pages of a list are of the
//!   revision of the first page.
//! - The watch starts at the revision after the list, so no change falls between list and watch.
//! - After a loss, the next list replaces everything, so instances that left meanwhile are removed.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use super::event::{Action, Changes, Event, Fingerprint, Page};
use super::keys::{self, DecodedKey, Decoder, Keys};
use crate::format::{Format, KeyRange};
use crate::snapshot::{Freshness, Instances, ModRevisions, Snapshot};

/// One service in one format under one prefix. `W` is an open watch.
#[derive(Debug)]
pub(super) struct ListWatchState<W> {
    decoder: Decoder,
    range: KeyRange,
    range_name: Arc<str>,
    phase: Phase<W>,
    keys: Keys,
    revision: i64,
    /// The number of `keys` whose newest value could not be decoded.
    undecodable: usize,
    /// The cache file of the published instances, until a list replaces them.
    cached_in: Option<Arc<str>>,
    published: Published,
}

enum Phase<W> {
    /// The watch is open, so the snapshot is live.
    Live(W),
    /// No watch is open, so the snapshot is stale.
    Stale {
        since: SystemTime,
        /// The latest one: the cause of the loss, or of the last failed attempt.
        reason: Arc<str>,
        next: Relist,
    },
}

/// The next step towards an open watch.
#[derive(Debug)]
enum Relist {
    /// Request the first page.
    Start,
    /// Request the next page, which starts at `from`. `keys` holds the pages before it.
    Page {
        revision: i64,
        from: Vec<u8>,
        keys: Keys,
    },
    /// The list is complete: open the watch.
    OpenWatch {
        from_revision: i64,
        listed: Fingerprint,
    },
    /// Wait, then start over.
    Backoff,
}

/// The contents of the snapshot.
#[derive(Debug, Default)]
struct Published {
    instances: Arc<Instances>,
    mod_revisions: Arc<ModRevisions>,
    /// Whether the keys have changed since `instances` was built.
    dirty: bool,
}

impl<W> ListWatchState<W> {
    pub(super) fn new(format: Arc<dyn Format>, prefix: String, service: String) -> Self {
        let decoder = Decoder::new(format, prefix, service);
        let range = decoder.range();
        Self {
            decoder,
            range_name: String::from_utf8_lossy(&range.start).into(),
            range,
            phase: Phase::Stale {
                since: SystemTime::now(),
                reason: "not listed yet".into(),
                next: Relist::Start,
            },
            keys: Keys::new(),
            revision: 0,
            undecodable: 0,
            cached_in: None,
            published: Published::default(),
        }
    }

    /// Identifies instances by address even if the format identifies them by key.
    pub(super) fn by_address(mut self) -> Self {
        self.decoder = self.decoder.by_address();
        self
    }

    pub(super) fn is_by_address(&self) -> bool {
        self.decoder.is_by_address()
    }

    pub(super) fn format_name(&self) -> &'static str {
        self.decoder.format_name()
    }

    pub(super) fn range(&self) -> &KeyRange {
        &self.range
    }

    pub(super) fn range_name(&self) -> &str {
        &self.range_name
    }

    pub(super) fn service(&self) -> &str {
        self.decoder.service()
    }

    pub(super) fn is_live(&self) -> bool {
        matches!(self.phase, Phase::Live(_))
    }

    /// Publishes a cached snapshot until the first list is complete. A list that is complete
    /// already stays, because it is newer than the cache. `cause` says why etcd was not followed.
    pub(super) fn restore(&mut self, cached: Snapshot, cause: &str) {
        if self.revision > 0 {
            self.restart(cause, SystemTime::now());
            return;
        }
        self.published.instances = cached.instances;
        self.published.mod_revisions = cached.mod_revisions;
        self.revision = cached.revision;
        self.undecodable = cached.undecodable;
        if let Freshness::Stale { since, reason } = cached.freshness {
            self.phase = Phase::Stale {
                since,
                reason: Arc::clone(&reason),
                next: Relist::Start,
            };
            self.cached_in = Some(reason);
        }
        self.restart(cause, SystemTime::now());
    }

    /// Drops the watch and starts over with a list, without a backoff.
    pub(super) fn restart(&mut self, reason: &str, now: SystemTime) {
        self.lose(reason.into(), now, Relist::Start);
    }

    /// The next thing to do.
    pub(super) fn action(&mut self) -> Action<'_, W> {
        let next = match &mut self.phase {
            Phase::Live(watch) => return Action::Receive(watch),
            Phase::Stale { next, .. } => next,
        };
        match next {
            Relist::Start => Action::List {
                from: &self.range.start,
                revision: None,
            },
            Relist::Page { revision, from, .. } => Action::List {
                from,
                revision: Some(*revision),
            },
            Relist::OpenWatch {
                from_revision,
                listed,
            } => Action::Watch {
                from_revision: *from_revision,
                listed: *listed,
            },
            Relist::Backoff => Action::Backoff,
        }
    }

    /// Applies the result of an action. Returns whether the [`snapshot`](Self::snapshot) changed.
    pub(super) fn step(&mut self, event: Event<W>, now: SystemTime) -> bool {
        match event {
            Event::Page(page) => self.on_page(page, now),
            Event::WatchOpened(watch) => {
                // Live only from here on: changes after a list alone would go unnoticed.
                let was_live = self.is_live();
                self.phase = Phase::Live(watch);
                !was_live
            }
            Event::Changes(changes) => self.on_changes(changes),
            Event::Lost { reason } => self.lose(reason.into(), now, Relist::Backoff),
            Event::BackoffElapsed => {
                self.set_next(Relist::Start);
                false
            }
        }
    }

    /// The whole set of instances as it is now.
    pub(super) fn snapshot(&mut self) -> Snapshot {
        if self.published.dirty {
            self.rebuild();
        }
        Snapshot {
            range: Arc::clone(&self.range_name),
            instances: Arc::clone(&self.published.instances),
            mod_revisions: Arc::clone(&self.published.mod_revisions),
            revision: self.revision,
            freshness: self.freshness(),
            undecodable: self.undecodable,
        }
    }

    fn freshness(&self) -> Freshness {
        match &self.phase {
            Phase::Live(_) => Freshness::Live,
            Phase::Stale { since, reason, .. } => Freshness::Stale {
                since: *since,
                reason: Arc::clone(reason),
            },
        }
    }

    /// Makes the snapshot stale. If it is stale already, only the reason changes. Returns whether
    /// the snapshot changed.
    fn lose(&mut self, reason: Arc<str>, now: SystemTime, next: Relist) -> bool {
        let reason = match &self.cached_in {
            Some(cached_in) => format!("{cached_in}: {reason}").into(),
            None => reason,
        };
        let (since, changed) = match &self.phase {
            Phase::Live(_) => (now, true),
            Phase::Stale {
                since,
                reason: before,
                ..
            } => (*since, reason != *before),
        };
        self.phase = Phase::Stale {
            since,
            reason,
            next,
        };
        changed
    }

    /// Does nothing while the watch is open.
    fn set_next(&mut self, to: Relist) {
        if let Phase::Stale { next, .. } = &mut self.phase {
            *next = to;
        }
    }

    fn on_page(&mut self, page: Page, now: SystemTime) -> bool {
        let Phase::Stale { next, .. } = &mut self.phase else {
            return false;
        };
        let (revision, mut keys) = match std::mem::replace(next, Relist::Start) {
            Relist::Page { revision, keys, .. } => (revision, keys),
            Relist::Start | Relist::OpenWatch { .. } | Relist::Backoff => {
                (page.revision, Keys::new())
            }
        };
        let next_key = page.entries.last().map(|last| {
            // The smallest key after the last one.
            let mut next = last.key.clone();
            next.push(0);
            next
        });
        // After etcd was wiped, values of the old history say nothing about keys of the new one.
        let earlier = (revision >= self.revision).then_some(&self.keys);
        for entry in page.entries {
            self.decoder.upsert(&mut keys, earlier, entry);
        }
        match next_key {
            Some(from) if page.more => {
                self.set_next(Relist::Page {
                    revision,
                    from,
                    keys,
                });
                false
            }
            // Without an entry there is no key to continue from, even if `more` is set.
            _ => {
                self.complete_list(keys, revision, now);
                true
            }
        }
    }

    fn complete_list(&mut self, keys: Keys, revision: i64, now: SystemTime) {
        // A list is read from a quorum, so a lower revision means that the history itself went
        // back.
        if revision < self.revision {
            tracing::warn!(
                range = %self.range_name,
                before = self.revision,
                now = revision,
                "etcd was wiped or restored: its revision went back; following the new history"
            );
        }
        self.undecodable = keys::count_undecodable(&keys);
        self.revision = revision;
        if let Phase::Stale { since, reason, .. } = &mut self.phase
            && self.cached_in.take().is_some()
        {
            // The instances are those in etcd now, not those of the file.
            (*since, *reason) = (now, "not watched yet".into());
        }
        self.set_next(Relist::OpenWatch {
            from_revision: revision + 1,
            listed: keys::fingerprint(&keys),
        });
        self.keys = keys;
        self.rebuild();
    }

    fn on_changes(&mut self, changes: Changes) -> bool {
        let mut keys = std::mem::take(&mut self.keys);
        let mut changed = BTreeSet::new();
        for entry in changes.entries {
            // A resumed watch may repeat changes.
            if entry.mod_revision <= self.revision {
                continue;
            }
            let key = entry.key.clone();
            // The snapshot still shows the value before the first change of a key in this batch.
            if !self.is_by_address() && !changed.contains(&key) {
                self.unpublish(keys.get(&key));
            }
            let is_undecodable = |keys: &Keys| keys.get(&key).is_some_and(|key| key.undecodable);
            let was_undecodable = is_undecodable(&keys);
            if entry.value.is_some() {
                self.decoder.upsert(&mut keys, None, entry);
            } else {
                keys.remove(&key);
            }
            self.undecodable += usize::from(is_undecodable(&keys));
            self.undecodable -= usize::from(was_undecodable);
            changed.insert(key);
        }
        self.keys = keys;
        self.revision = self.revision.max(changes.revision);
        if self.is_by_address() {
            // Rebuilding looks at all keys, so it waits until the next snapshot is taken.
            self.published.dirty |= !changed.is_empty();
        } else {
            self.publish_keys(&changed);
        }
        !changed.is_empty()
    }

    /// Removes the instances of a key from the snapshot. Not for instances that are identified by
    /// address, because another key may hold the same one.
    fn unpublish(&mut self, key: Option<&DecodedKey>) {
        for (key, _) in key.iter().flat_map(|key| &key.instances) {
            Arc::make_mut(&mut self.published.instances).remove(key);
        }
    }

    /// Adds the instances of these keys to the snapshot, without touching thousands of others.
    fn publish_keys(&mut self, changed: &BTreeSet<Vec<u8>>) {
        let keys = changed.iter().filter_map(|key| self.keys.get(key));
        for (key, instance) in keys.flat_map(|key| &key.instances) {
            let instances = Arc::make_mut(&mut self.published.instances);
            instances.insert(key.clone(), Arc::clone(instance));
        }
    }

    /// Builds the snapshot from all keys. If several keys hold an instance, the newest one counts:
    /// where the address identifies an instance, the process that listens there now wrote the
    /// newest key, and earlier processes left the older keys.
    fn rebuild(&mut self) {
        let mut keys: Vec<&DecodedKey> = self.keys.values().collect();
        keys.sort_by_key(|key| key.mod_revision);
        let (mut instances, mut mod_revisions) = (Instances::new(), ModRevisions::new());
        for decoded in keys {
            for (key, instance) in &decoded.instances {
                if self.is_by_address() {
                    mod_revisions.insert(key.clone(), decoded.mod_revision);
                }
                instances.insert(key.clone(), Arc::clone(instance));
            }
        }
        self.published = Published {
            instances: Arc::new(instances),
            mod_revisions: Arc::new(mod_revisions),
            dirty: false,
        };
    }
}

impl<W> fmt::Debug for Phase<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Live(_) => f.write_str("Live"),
            Self::Stale {
                since,
                reason,
                next,
            } => f
                .debug_struct("Stale")
                .field("since", since)
                .field("reason", reason)
                .field("next", next)
                .finish(),
        }
    }
}

#[cfg(test)]
mod tests;
