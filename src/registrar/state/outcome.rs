//! Outcomes of actions, and the close of the client.

use tokio::time::Instant;

use super::action::{Action, Timestamp};
use super::ensure::{Ensure, EntryId};
use super::event::ActionOutcome;
use super::lease::{Flaw, Lease};
use super::presence::Presence;
use super::reconciler::Reconciler;
use crate::error::Error;

impl Reconciler {
    pub(super) fn on_finished(&mut self, action: &Action, outcome: ActionOutcome, now: Timestamp) {
        let started = match action {
            Action::Renew { .. } => self.renewal_started.take(),
            _ => self.mutation_started.take(),
        };
        let started = started.unwrap_or(now.instant);
        match action {
            Action::Grant => self.on_grant_finished(outcome, started, now),
            Action::Renew { lease } => self.on_renewal_finished(*lease, outcome, started, now),
            Action::Ensure(ensure) => self.on_ensure_finished(ensure, outcome, now),
            Action::Delete { entry, .. } => self.on_delete_finished(entry, outcome, now),
            Action::Revoke { .. } => self.on_revoke_finished(outcome, now),
        }
    }

    fn on_grant_finished(&mut self, outcome: ActionOutcome, started: Instant, now: Timestamp) {
        match outcome {
            ActionOutcome::Granted { lease, ttl } => {
                self.set_lease(Lease::new(lease, ttl, started), now);
                // The lease belongs to the present history, so earlier revisions do not matter.
                self.latest_revision = 0;
                self.on_success();
            }
            ActionOutcome::Failed(error) => self.on_failure(&error, now),
            _ => {}
        }
    }

    fn on_renewal_finished(
        &mut self,
        id: i64,
        outcome: ActionOutcome,
        started: Instant,
        now: Timestamp,
    ) {
        let Some(lease) = self.lease.as_mut().filter(|lease| lease.id() == id) else {
            // The renewed lease has been replaced.
            return;
        };
        match outcome {
            ActionOutcome::Renewed { sent_at } => {
                lease.on_renewed(sent_at.min(started));
                self.renewal_backoff.reset();
                let entries = self.entries.values_mut();
                for entry in entries.filter(|entry| !entry.needs_check) {
                    entry.report_present(now);
                }
            }
            ActionOutcome::LeaseGone => self.on_lease_lost(now),
            ActionOutcome::LeaseRefused(_) => {
                lease.retry_renewal_at(now.instant + self.renewal_backoff.next());
                // Another lease is granted, and the keys are put under it before this one expires.
                lease.mark_flawed(Flaw::Refused);
                let fault = "etcd refused to renew the lease, because the user may not write one \
                             of its keys";
                self.report_recovering(fault, now);
            }
            ActionOutcome::Failed(error) => {
                lease.retry_renewal_at(now.instant + self.renewal_backoff.next());
                let entries = self.entries.values_mut();
                for entry in entries.filter(|entry| !entry.presence.is_superseded()) {
                    entry.status.report_failure(&error, now);
                }
            }
            _ => {}
        }
    }

    fn on_ensure_finished(&mut self, ensure: &Ensure, outcome: ActionOutcome, now: Timestamp) {
        let lease = self.lease.as_ref().map(Lease::id);
        let is_current = lease == Some(ensure.lease);
        match outcome {
            ActionOutcome::Ensured { read_at, revision } => {
                self.on_ensured(ensure, revision, is_current, now);
                self.on_revisions(read_at, revision, now);
            }
            ActionOutcome::Superseded { by } => self.on_superseded(ensure, by, now),
            ActionOutcome::LeaseGone if is_current => self.on_lease_lost(now),
            ActionOutcome::Failed(error) => self.on_ensure_failed(ensure, error, now),
            _ => {}
        }
    }

    fn on_ensured(&mut self, ensure: &Ensure, revision: i64, is_current: bool, now: Timestamp) {
        // Keys under a lease that has been lost meanwhile are gone with that lease.
        if let Some(entry) = self.entry_mut(&ensure.entry).filter(|_| is_current) {
            entry.retry_schedule.clear_refusal();
            entry.stale_keys.clear();
            entry.earlier_lease_until = None;
            entry.presence = Presence::Present {
                generation: ensure.generation,
            };
            entry.seen_revision = revision;
            entry.owned_revision = Some(revision);
            entry.report_present(now);
        }
        self.on_success();
    }

    /// Notices that etcd has gone back to an earlier history. All reads and writes of the entries
    /// are linearizable, so within one history their revisions never decrease. The revision of the
    /// read is compared, because a write after it may just reach the latest revision again.
    fn on_revisions(&mut self, read_at: i64, revision: i64, now: Timestamp) {
        if read_at < self.latest_revision
            && let Some(lease) = &mut self.lease
        {
            lease.mark_flawed(Flaw::Outdated);
            self.jitter_recovery(now.instant);
        }
        self.latest_revision = revision;
    }

    fn on_superseded(&mut self, ensure: &Ensure, by: i64, now: Timestamp) {
        if let Some(entry) = self.entry_mut(&ensure.entry) {
            entry.retry_schedule.clear_refusal();
            entry.presence.mark_superseded();
            entry.owned_revision = Some(0);
            entry.report_superseded(by, now);
        }
        self.on_success();
    }

    fn on_ensure_failed(&mut self, ensure: &Ensure, error: Error, now: Timestamp) {
        if let Some(entry) = self.entry_mut(&ensure.entry) {
            entry.needs_check |= entry.presence.is_known();
        }
        if is_entry_error(&error) {
            if error.is_permission_denied() {
                self.check_lease(&ensure.entry, now.instant);
            }
            self.on_refused(&ensure.entry, error, now);
            return;
        }
        if let Some(entry) = self.entry_mut(&ensure.entry)
            && entry.has_unwritten_change()
        {
            entry.report_fault("etcd does not have the latest change", &error, now);
        }
        // The write may still arrive. The entry that has the keys by now must expect it.
        let is_written = |key: &String| ensure.records.iter().any(|(written, _)| written == key);
        for entry in self.entries.values_mut() {
            if entry.keys().any(is_written) {
                entry.late_write = true;
            }
        }
        self.on_failure(&error, now);
    }

    fn on_delete_finished(&mut self, id: &EntryId, outcome: ActionOutcome, now: Timestamp) {
        match outcome {
            ActionOutcome::Deleted { read_at, revision } => {
                if let Some(entry) = self.entry_mut(id) {
                    entry.presence.mark_deleted();
                    entry.earlier_lease_until = None;
                    // A later return counts as a new registration, which takes the keys from
                    // others.
                    entry.owned_revision = None;
                    entry.stale_keys.clear();
                }
                self.on_success();
                self.on_revisions(read_at, revision, now);
            }
            ActionOutcome::Failed(error) if is_entry_error(&error) => {
                self.on_refused(id, error, now)
            }
            ActionOutcome::Failed(error) => self.on_failure(&error, now),
            _ => {}
        }
    }

    fn on_revoke_finished(&mut self, outcome: ActionOutcome, now: Timestamp) {
        match outcome {
            ActionOutcome::Revoked | ActionOutcome::LeaseGone => {
                self.drop_lease(now.instant);
                for entry in self.entries.values_mut() {
                    if !entry.should_exist() {
                        // A later return counts as a new registration, as after a deletion.
                        entry.owned_revision = None;
                    }
                }
                self.on_success();
            }
            ActionOutcome::LeaseRefused(error) => self.on_revoke_refused(&error, now),
            ActionOutcome::Failed(error) => self.on_failure(&error, now),
            _ => {}
        }
    }

    /// Deletes the keys one by one from then on.
    fn on_revoke_refused(&mut self, error: &Error, now: Timestamp) {
        let lease = self.lease.as_mut();
        match lease.filter(|lease| lease.flaw() != Some(Flaw::Refused)) {
            Some(lease) => lease.mark_flawed(Flaw::Refused),
            None => self.on_failure(error, now),
        }
    }

    /// Renews the lease at once after etcd refused an entry. Some releases refuse every write under
    /// a lease with a key that the user may not write, and then they refuse the renewal as well.
    fn check_lease(&mut self, refused: &EntryId, now: Instant) {
        let mut others = self.entries.values().filter(|entry| !entry.has_id(refused));
        if let Some(lease) = &mut self.lease
            && others.any(|entry| entry.presence.may_exist())
        {
            lease.retry_renewal_at(now);
        }
    }

    fn on_lease_lost(&mut self, now: Timestamp) {
        self.drop_lease(now.instant);
        // etcd has responded, so earlier failures to reach it do not explain the loss.
        let entries = self.entries.values_mut();
        for entry in entries.filter(|entry| !entry.presence.is_superseded()) {
            entry.status.set_error(None);
        }
        self.report_recovering("the lease expired or was revoked", now);
        self.jitter_recovery(now.instant);
    }

    /// Ends the pause after a failure. A pause before recovery continues, because an action that
    /// was started before the fault says nothing about it.
    fn on_success(&mut self) {
        self.mutation_backoff.reset();
        if !(self.jittered && self.retry_at.is_some()) {
            self.retry_at = None;
            self.jittered = false;
        }
    }

    /// Pauses all mutations, because etcd cannot be reached or cannot do its work.
    fn on_failure(&mut self, error: &Error, now: Timestamp) {
        self.retry_at = Some(now.instant + self.mutation_backoff.next());
        for entry in self.entries.values_mut() {
            if entry.is_pending() {
                entry.report_failure(error, now);
            }
        }
    }

    /// Pauses one entry, because of an error that concerns only its keys. The others continue, and
    /// so does an entry that has replaced it.
    fn on_refused(&mut self, id: &EntryId, error: Error, now: Timestamp) {
        if let Some(entry) = self.entry_mut(id) {
            let fault = match error {
                Error::Conflict { .. } => "another client keeps changing the keys",
                _ => "etcd refused the request",
            };
            entry.retry_schedule.pause_after_refusal(now.instant);
            entry.report_fault(fault, &error, now);
        }
    }

    pub(super) fn on_client_closed(&mut self, error: &Error, now: Timestamp) {
        self.close_error = Some(error.clone());
        for entry in self.entries.values_mut() {
            entry.status.set_terminal(Some(error.clone()));
            entry.report_fault("the lease is no longer kept alive", error, now);
        }
    }
}

/// Whether an error concerns one entry only: etcd refused its keys, or other clients keep writing
/// to them. Other errors concern the connection to etcd, or etcd itself.
fn is_entry_error(error: &Error) -> bool {
    let is_refusal = error.is_permanent() && !error.is_closed();
    is_refusal || matches!(error, Error::Conflict { .. })
}
