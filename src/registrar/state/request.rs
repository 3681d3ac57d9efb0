//! Requests of the registration handles, which change the desired state.

use super::action::Timestamp;
use super::ensure::{EntryId, TargetRecords};
use super::entry::{Entry, Inherited};
use super::presence::{Desired, Readiness};
use super::reconciler::Reconciler;
use super::status::EntryHandle;
use crate::error::{Error, Result};

/// How a new target's keys overlap with the entries of a reconciler.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::registrar) enum Overlap {
    /// No entry has one of the keys.
    None,
    /// An entry that is being deregistered has one of the keys.
    Deregistering,
    /// An active entry has this key.
    Active(String),
}

impl Reconciler {
    /// Finds the entries that share keys with `target`.
    pub(in crate::registrar) fn find_overlap(&self, target: &TargetRecords) -> Overlap {
        let mut overlap = Overlap::None;
        for entry in self.entries.values() {
            let Some(key) = entry.keys().find(|key| target.has_key(key)) else {
                continue;
            };
            if entry.desired != Desired::Deregistered && entry.target.has_key(key) {
                return Overlap::Active(key.clone());
            }
            overlap = Overlap::Deregistering;
        }
        overlap
    }

    /// Adds an entry that brings `target` into etcd, now or when it is no longer held back.
    pub(in crate::registrar) fn register(
        &mut self,
        target: TargetRecords,
        desired: Desired,
        now: Timestamp,
    ) -> Result<EntryHandle> {
        if let Some(error) = &self.close_error {
            return Err(error.clone());
        }
        if let Overlap::Active(key) = self.find_overlap(&target) {
            return Err(Error::InstanceAlreadyRegistered { key });
        }
        let key = target.keys().next().cloned().unwrap_or_default();
        let inherited = self.inherit(&key, &target);
        let id = EntryId {
            key: key.clone(),
            token: self.next_token,
        };
        self.next_token += 1;
        let (entry, handle) = Entry::new(id, target, desired, inherited, now);
        if let Some(mut replaced) = self.entries.insert(key, entry) {
            replaced.status.report_deregistered(now);
        }
        self.retry_at = None;
        Ok(handle)
    }

    /// Takes the keys of a new entry from the entries that are being deregistered, with everything
    /// known about those keys. The entry with the same first key is about to be replaced, so its
    /// other keys become stale keys of the new one.
    fn inherit(&mut self, key: &str, target: &TargetRecords) -> Inherited {
        let mut inherited = Inherited::default();
        for (other_key, other) in &mut self.entries {
            if other_key == key {
                inherited.generation = other.generation + 1;
                let stale_keys = other.keys().filter(|key| !target.has_key(key));
                inherited.stale_keys = stale_keys.cloned().collect();
            } else if other.keys().any(|key| target.has_key(key)) {
                other.target.records.retain(|(key, _)| !target.has_key(key));
                other.stale_keys.retain(|key| !target.has_key(key));
            } else {
                continue;
            }
            inherited.may_exist |= other.presence.may_exist();
            inherited.earlier_lease_until =
                inherited.earlier_lease_until.max(other.earlier_lease_until);
            inherited.late_write |= other.late_write;
        }
        inherited
    }

    /// Changes the value of an entry. Returns the generation that has the change; `None` if the
    /// entry is being deregistered, or was replaced.
    pub(in crate::registrar) fn update(
        &mut self,
        id: &EntryId,
        target: TargetRecords,
    ) -> Option<u64> {
        let is_closed = self.close_error.is_some();
        let entry = self.active_entry_mut(id)?;
        // A draining mark counts as a change even where no format expresses it.
        if entry.target != target {
            entry.generation += 1;
            entry.target = target;
            entry.retry_schedule.clear_refusal();
            // While another registration owns the key, the change does not reach etcd soon, and the
            // error keeps saying why.
            if !is_closed && !entry.presence.is_superseded() {
                entry.status.set_error(None);
            }
        }
        Some(entry.generation)
    }

    /// Records whether the instance's server is ready. Returns `false` if the entry is being
    /// deregistered, or was replaced: further reports have no effect.
    pub(in crate::registrar) fn set_ready(
        &mut self,
        id: &EntryId,
        readiness: Readiness,
        now: Timestamp,
    ) -> bool {
        let is_closed = self.close_error.is_some();
        let Some(entry) = self.active_entry_mut(id) else {
            return false;
        };
        let is_ready = readiness == Readiness::Ready;
        let was_ready = entry.should_exist();
        if let Some(reason) = readiness.held_back_reason() {
            entry.desired = Desired::HeldBack;
            entry.status.hold_back(reason, now);
        } else if !was_ready {
            entry.desired = Desired::Registered;
            entry.status.release();
            if entry.presence.is_known() {
                // The keys were not removed. Read them again, because changes were not reported
                // while the entry was held back.
                entry.needs_check = true;
            } else if !is_closed {
                entry.status.report_registering(now);
            }
        }
        if was_ready != is_ready {
            entry.retry_schedule.reset();
            self.retry_at = None;
        }
        true
    }

    /// Deregisters an entry: its keys are deleted, and then the entry is removed.
    pub(in crate::registrar) fn deregister(&mut self, id: &EntryId) {
        let close_error = self.close_error.clone();
        let Some(entry) = self.entry_mut(id) else {
            return;
        };
        entry.desired = Desired::Deregistered;
        entry.retry_schedule.reset();
        entry.status.set_terminal(close_error);
        self.retry_at = None;
    }

    fn active_entry_mut(&mut self, id: &EntryId) -> Option<&mut Entry> {
        self.entry_mut(id)
            .filter(|entry| entry.desired != Desired::Deregistered)
    }
}
