//! One registration: the desired value in etcd, and the progress towards it.

use tokio::time::Instant;

use super::action::{Action, Timestamp};
use super::ensure::{Ensure, EntryId, TargetRecords};
use super::presence::{Desired, Presence};
use super::registration_state::RegistrationState;
use super::retry_schedule::RetrySchedule;
use super::status::{EntryHandle, StatusSender};
use crate::error::Error;

#[derive(Debug)]
pub(super) struct Entry {
    id: EntryId,
    pub(super) desired: Desired,
    pub(super) target: TargetRecords,
    /// Counts the values of `target`, including those of earlier entries with the same key.
    pub(super) generation: u64,
    /// Keys of an earlier entry that may exist under one of this registrar's leases and must go.
    pub(super) stale_keys: Vec<String>,
    pub(super) presence: Presence,
    /// Until when some of the keys may be under a lease that was replaced, so that the end of the
    /// present lease does not delete them.
    pub(super) earlier_lease_until: Option<Instant>,
    /// The revision at which the keys were last found as they should be. Watch events up to this
    /// revision are old news. 0 after the watch restarted, because etcd may have lost its history.
    pub(super) seen_revision: i64,
    /// The latest revision at which the entry had its keys: a later registration's keys are newer.
    /// 0 after a later registration was found. `None` for a new entry, which takes its keys from
    /// other registrations, because the later registration wins.
    pub(super) owned_revision: Option<i64>,
    /// Whether the keys must be read again because another client may have changed them.
    pub(super) needs_check: bool,
    /// Whether a write with a lost response can still arrive. A paused process or network can
    /// deliver the write at any time, until the lease that the write names is gone.
    pub(super) late_write: bool,
    pub(super) retry_schedule: RetrySchedule,
    pub(super) status: StatusSender,
}

/// The knowledge that a new entry takes over from earlier entries with the same keys.
#[derive(Debug, Default)]
pub(super) struct Inherited {
    /// The generation to start with.
    pub(super) generation: u64,
    /// Keys of the earlier entry that the new one does not have.
    pub(super) stale_keys: Vec<String>,
    /// Whether an earlier entry's keys may exist.
    pub(super) may_exist: bool,
    /// Until when they may be under a lease that was replaced.
    pub(super) earlier_lease_until: Option<Instant>,
    /// Whether a write of an earlier entry can still arrive.
    pub(super) late_write: bool,
}

impl Entry {
    pub(super) fn new(
        id: EntryId,
        target: TargetRecords,
        desired: Desired,
        inherited: Inherited,
        now: Timestamp,
    ) -> (Self, EntryHandle) {
        let (status, receiver) = StatusSender::new(id.key.clone(), desired, now);
        let handle = EntryHandle {
            id: id.clone(),
            generation: inherited.generation,
            status: receiver,
        };
        let entry = Self {
            id,
            desired,
            target,
            generation: inherited.generation,
            stale_keys: inherited.stale_keys,
            presence: if inherited.may_exist {
                Presence::InDoubt
            } else {
                Presence::Absent
            },
            earlier_lease_until: inherited.earlier_lease_until,
            seen_revision: 0,
            owned_revision: None,
            needs_check: false,
            late_write: inherited.late_write,
            retry_schedule: RetrySchedule::default(),
            status,
        };
        (entry, handle)
    }

    pub(super) fn has_id(&self, id: &EntryId) -> bool {
        self.id == *id
    }

    /// Whether the keys should be in etcd.
    pub(super) fn should_exist(&self) -> bool {
        self.desired == Desired::Registered
    }

    /// Whether etcd differs from the desired state, as far as known.
    pub(super) fn is_pending(&self) -> bool {
        if !self.should_exist() {
            return self.presence.may_exist();
        }
        self.needs_check
            || match self.presence {
                Presence::Present { generation } => generation != self.generation,
                Presence::Absent | Presence::InDoubt | Presence::Deleting => true,
                Presence::Superseded { .. } => false,
            }
    }

    /// Whether etcd has an earlier value of the entry.
    pub(super) fn has_unwritten_change(&self) -> bool {
        let written = self.presence.generation();
        written.is_some_and(|written| written != self.generation)
    }

    /// Whether any of the entry's keys may be left in etcd.
    pub(super) fn has_leftovers(&self) -> bool {
        self.presence.may_exist() && self.keys().next().is_some()
    }

    /// Whether some of the keys may be under a lease that was replaced.
    pub(super) fn is_under_earlier_lease(&self, now: Instant) -> bool {
        self.earlier_lease_until.is_some_and(|until| now < until)
    }

    /// Priority among due entries, smallest first: never tried, then least recently tried, so that
    /// one failing entry cannot starve the rest. Among entries never tried, deletions precede
    /// writes, because a full etcd still accepts deletions.
    pub(super) fn priority(&self) -> impl Ord + use<> {
        (self.retry_schedule.last_attempt(), self.should_exist())
    }

    /// All keys that the entry may have in etcd.
    pub(super) fn keys(&self) -> impl Iterator<Item = &String> {
        self.target.keys().chain(&self.stale_keys)
    }

    /// Begins to bring the entry's keys into etcd, under `lease`.
    pub(super) fn begin_ensure(
        &mut self,
        lease: i64,
        own_leases: Vec<i64>,
        now: Instant,
    ) -> Action {
        self.retry_schedule.record_attempt(now);
        self.presence.mark_maybe_written();
        self.needs_check = false;
        Action::Ensure(Ensure {
            entry: self.id.clone(),
            records: self.target.records.clone(),
            stale_keys: self.stale_keys.clone(),
            lease,
            own_leases,
            owned_revision: self.owned_revision,
            generation: self.generation,
        })
    }

    /// Begins to delete the entry's keys from etcd.
    pub(super) fn begin_delete(&mut self, own_leases: Vec<i64>, now: Instant) -> Action {
        self.retry_schedule.record_attempt(now);
        self.presence.mark_deleting();
        Action::Delete {
            entry: self.id.clone(),
            keys: self.keys().cloned().collect(),
            own_leases,
        }
    }

    /// Reports the entry as registered or draining, if etcd has it.
    pub(super) fn report_present(&mut self, now: Timestamp) {
        let Presence::Present { generation } = self.presence else {
            return;
        };
        if !self.should_exist() {
            return;
        }
        let state = if self.target.draining && generation == self.generation {
            RegistrationState::Draining
        } else {
            RegistrationState::Registered
        };
        self.status.report_present(state, generation, now);
    }

    /// Reports that the registration with the lease `by` owns one of the keys.
    pub(super) fn report_superseded(&mut self, by: i64, now: Timestamp) {
        if self.desired != Desired::Deregistered {
            self.status.report_superseded(by, now);
        }
    }

    /// Reports that the entry may be missing from etcd because of `fault`. Another registration of
    /// the key is the more important news, so a superseded entry keeps its state.
    pub(super) fn report_recovering(&mut self, fault: &'static str, now: Timestamp) {
        if self.can_recover() {
            let written = self.presence.generation();
            self.status.report_recovering(fault, written, now);
        }
    }

    /// Reports that the entry may be missing from etcd because of `fault`, which `error` explains.
    pub(super) fn report_fault(&mut self, fault: &'static str, error: &Error, now: Timestamp) {
        if self.can_recover() {
            self.status.set_error(Some(error.clone()));
            self.report_recovering(fault, now);
        } else {
            self.report_failure(error, now);
        }
    }

    fn can_recover(&self) -> bool {
        self.should_exist() && !self.presence.is_superseded() && !self.status.is_unwritten()
    }

    /// Reports that an attempt to bring etcd into the desired state failed.
    pub(super) fn report_failure(&mut self, error: &Error, now: Timestamp) {
        if self.should_exist() || self.presence.is_superseded() || !self.presence.may_exist() {
            self.status.report_failure(error, now);
        } else {
            self.status.report_removing(error, now);
        }
    }
}
