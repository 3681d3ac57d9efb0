//! The reconciler: its state, and the choice of the next action.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::action::{Action, Step, Timestamp};
use super::ensure::EntryId;
use super::entry::Entry;
use super::event::Event;
use super::lease::{Flaw, Lease};
use super::presence::Desired;
use crate::backoff::Backoff;
use crate::error::Error;

/// The longest random pause before recovery from a lost key or lease. Ten thousand processes whose
/// leases end together then request twenty grants per millisecond, not ten thousand at once. Half
/// of the second within which a registration should be back.
pub(super) const MAX_RECOVERY_JITTER: Duration = Duration::from_millis(500);

/// How many granted leases the registrar remembers as its own. A key under an older lease counts as
/// another registration's; such a lease has long expired.
const KNOWN_LEASES: usize = 16;

/// The desired registrations of one lease, and their known state in etcd.
#[derive(Debug)]
pub(in crate::registrar) struct Reconciler {
    /// The registrations by their first key.
    pub(super) entries: BTreeMap<String, Entry>,
    pub(super) lease: Option<Lease>,
    /// The revision at which an entry was last found, written or deleted in etcd.
    pub(super) latest_revision: i64,
    /// The leases granted to this registrar, the newest last.
    pub(super) own_leases: VecDeque<i64>,
    /// When the current mutation started. At most one grant, write, deletion or revocation runs at
    /// a time.
    pub(super) mutation_started: Option<Instant>,
    /// When the current renewal started. A renewal runs beside a mutation.
    pub(super) renewal_started: Option<Instant>,
    /// The time before which no mutation starts.
    pub(super) retry_at: Option<Instant>,
    /// Whether the pause of [`MAX_RECOVERY_JITTER`] was scheduled since the last success; one pause
    /// is enough.
    pub(super) jittered: bool,
    pub(super) mutation_backoff: Backoff,
    pub(super) renewal_backoff: Backoff,
    pub(super) next_token: u64,
    /// The error that closed the client. No request can reach etcd any more.
    pub(super) close_error: Option<Error>,
}

impl Reconciler {
    pub(in crate::registrar) fn new() -> Self {
        Self {
            entries: BTreeMap::new(),
            lease: None,
            latest_revision: 0,
            own_leases: VecDeque::new(),
            mutation_started: None,
            renewal_started: None,
            retry_at: None,
            jittered: false,
            mutation_backoff: Backoff::for_etcd(),
            renewal_backoff: Backoff::for_etcd(),
            next_token: 0,
            close_error: None,
        }
    }

    /// The number of keys of all entries.
    pub(in crate::registrar) fn len(&self) -> usize {
        self.entries
            .values()
            .map(|entry| entry.keys().count())
            .sum()
    }

    /// Whether no entry and no lease is left.
    pub(in crate::registrar) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.lease.is_none() && self.mutation_started.is_none()
    }

    /// The error that closed the client.
    pub(in crate::registrar) fn close_error(&self) -> Option<&Error> {
        self.close_error.as_ref()
    }

    /// The keys to watch, because they should exist or because a late write can create them.
    pub(in crate::registrar) fn watched_keys(&self) -> impl Iterator<Item = &String> {
        self.entries.values().flat_map(|entry| entry.target.keys())
    }

    pub(super) fn entry_mut(&mut self, id: &EntryId) -> Option<&mut Entry> {
        let entry = self.entries.get_mut(&id.key)?;
        entry.has_id(id).then_some(entry)
    }

    /// Records an event.
    pub(in crate::registrar) fn on_event(&mut self, event: Event, now: Timestamp) {
        match event {
            Event::Key { key, event } => self.on_key_event(&key, &event, now),
            Event::Finished { action, outcome } => self.on_finished(&action, outcome, now),
            Event::ClientClosed(error) => self.on_client_closed(&error, now),
        }
    }

    /// Chooses the next action. A returned action counts as started; its outcome must be reported
    /// as [`Event::Finished`].
    pub(in crate::registrar) fn step(&mut self, now: Timestamp) -> Step {
        if self.close_error.is_some() {
            return Step::SleepUntil(None);
        }
        self.check_overdue(now);
        if let Some(lease) = self.lease_to_renew(now.instant) {
            self.renewal_started = Some(now.instant);
            return Step::Perform(Action::Renew { lease });
        }
        if self.mutation_started.is_none() && self.retry_at.is_none_or(|at| now.instant >= at) {
            self.retry_at = None;
            if let Some(action) = self.next_mutation(now) {
                self.mutation_started = Some(now.instant);
                return Step::Perform(action);
            }
        }
        Step::SleepUntil(self.wake_at())
    }

    fn any_should_exist(&self) -> bool {
        self.entries.values().any(Entry::should_exist)
    }

    /// Reports the entries as recovering when no renewal was confirmed for the whole TTL. The
    /// registrar still renews the lease, because only etcd decides whether the lease is gone: after
    /// a restart etcd counts the TTL from its start.
    fn check_overdue(&mut self, now: Timestamp) {
        if let Some(lease) = &mut self.lease
            && lease.mark_overdue(now.instant)
        {
            self.report_recovering("no renewal was confirmed for the TTL of the lease", now);
        }
    }

    fn lease_to_renew(&self, now: Instant) -> Option<i64> {
        let lease = self.lease.as_ref()?;
        let is_due = self.renewal_started.is_none() && now >= lease.renew_at();
        (is_due && self.any_should_exist()).then(|| lease.id())
    }

    fn next_mutation(&mut self, now: Timestamp) -> Option<Action> {
        let any_should_exist = self.any_should_exist();
        if !any_should_exist && !self.must_delete_singly(now.instant) {
            return self.release_lease(now);
        }
        self.settle_removed(|entry| !entry.has_leftovers(), now);
        let now = now.instant;
        let lease = self.lease_for_writes();
        if lease.is_none() && any_should_exist {
            return Some(Action::Grant);
        }
        let own_leases = Vec::from_iter(self.own_leases.iter().copied());
        let entry = self
            .entries
            .values_mut()
            .filter(|entry| entry.is_pending() && entry.retry_schedule.is_due(now))
            .min_by_key(|entry| entry.priority())?;
        Some(match lease {
            Some(lease) if entry.should_exist() => entry.begin_ensure(lease, own_leases, now),
            _ => entry.begin_delete(own_leases, now),
        })
    }

    /// Whether there are keys that a revocation of the lease would not delete. After the TTL etcd
    /// has deleted them by itself.
    pub(in crate::registrar) fn must_delete_singly(&self, now: Instant) -> bool {
        let is_refused = |lease: &Lease| lease.flaw() == Some(Flaw::Refused) && !lease.is_overdue();
        let is_refused = self.lease.as_ref().is_some_and(is_refused);
        let is_left = |entry: &Entry| is_refused || entry.is_under_earlier_lease(now);
        let mut entries = self.entries.values();
        entries.any(|entry| entry.has_leftovers() && is_left(entry))
    }

    /// Removes an entry whose keys etcd refuses to delete.
    pub(in crate::registrar) fn forget(&mut self, id: &EntryId) {
        if self.entry_mut(id).is_some() {
            self.entries.remove(&id.key);
        }
    }

    /// The lease to put keys under, unless it must be granted first. An outdated lease is replaced
    /// when no entry has keys under it that must be deleted, and a refused one at once.
    fn lease_for_writes(&self) -> Option<i64> {
        let lease = self.lease.as_ref()?;
        let is_leaving = |entry: &Entry| !entry.should_exist() && entry.has_leftovers();
        let is_usable = match lease.flaw() {
            None => true,
            Some(Flaw::Outdated) => self.entries.values().any(is_leaving),
            Some(Flaw::Refused) => false,
        };
        is_usable.then(|| lease.id())
    }

    /// Revokes the lease once no entry needs it. Without a lease, no write can arrive any more, so
    /// the removal of the entries is complete.
    fn release_lease(&mut self, now: Timestamp) -> Option<Action> {
        let Some(lease) = &self.lease else {
            self.settle_removed(|_| true, now);
            return None;
        };
        for entry in self.entries.values_mut() {
            entry.presence.mark_deleting();
        }
        Some(Action::Revoke { lease: lease.id() })
    }

    /// Completes the entries that should not exist and, according to `is_gone`, do not. A
    /// deregistered entry with a late write stays until the lease is gone, so that its keys remain
    /// watched.
    fn settle_removed(&mut self, is_gone: impl Fn(&Entry) -> bool, now: Timestamp) {
        let has_lease = self.lease.is_some();
        self.entries.retain(|_, entry| {
            if entry.should_exist() || !is_gone(entry) {
                return true;
            }
            if entry.desired == Desired::HeldBack {
                entry.presence.mark_deleting();
                entry.status.report_unready(now);
                return true;
            }
            entry.status.report_deregistered(now);
            has_lease && entry.late_write
        });
    }

    /// The time of the next step without an event. Always in the future: everything due has been
    /// started, or waits for an action to finish.
    fn wake_at(&self) -> Option<Instant> {
        let lease = self.lease.as_ref();
        let renewal = lease
            .filter(|_| self.renewal_started.is_none() && self.any_should_exist())
            .map(Lease::renew_at);
        let overdue = lease.and_then(Lease::overdue_at);
        let mutation = match self.retry_at {
            _ if self.mutation_started.is_some() => None,
            Some(at) => Some(at),
            None => {
                let pending = self.entries.values().filter(|entry| entry.is_pending());
                pending
                    .filter_map(|entry| entry.retry_schedule.not_before())
                    .min()
            }
        };
        [renewal, overdue, mutation].into_iter().flatten().min()
    }

    /// Records a granted lease. Keys under a flawed lease, which it replaces, must be put again.
    pub(super) fn set_lease(&mut self, lease: Lease, now: Timestamp) {
        if let Some(flawed) = self.lease {
            if flawed.flaw() == Some(Flaw::Outdated) {
                self.report_recovering("etcd was restored from an earlier state", now);
            }
            // A renewal of the replaced lease may still be on its way.
            let until = now.instant + flawed.ttl() * 2;
            for entry in self.entries.values_mut() {
                if entry.presence.may_exist() {
                    entry.earlier_lease_until = Some(until);
                }
                entry.presence.mark_lease_replaced();
                entry.retry_schedule.clear_refusal();
            }
        }
        self.own_leases.push_back(lease.id());
        if self.own_leases.len() > KNOWN_LEASES {
            self.own_leases.pop_front();
        }
        self.lease = Some(lease);
    }

    /// Records that the lease is gone, and with it every key and every late write under it.
    pub(super) fn drop_lease(&mut self, now: Instant) {
        self.lease = None;
        for entry in self.entries.values_mut() {
            // The registration that supersedes this entry may be gone as well.
            entry.needs_check |= entry.presence.is_superseded();
            if entry.is_under_earlier_lease(now) {
                entry.presence.mark_lease_replaced();
                continue;
            }
            entry.presence.mark_lease_lost();
            entry.late_write = false;
            entry.stale_keys.clear();
        }
    }

    /// Delays the recovery by a random part of [`MAX_RECOVERY_JITTER`], once per fault.
    pub(super) fn jitter_recovery(&mut self, now: Instant) {
        if !self.jittered {
            self.jittered = true;
            let at = now + MAX_RECOVERY_JITTER.mul_f64(fastrand::f64());
            self.retry_at = Some(self.retry_at.map_or(at, |earlier| earlier.max(at)));
        }
    }

    pub(super) fn report_recovering(&mut self, fault: &'static str, now: Timestamp) {
        for entry in self.entries.values_mut() {
            entry.report_recovering(fault, now);
        }
    }
}
