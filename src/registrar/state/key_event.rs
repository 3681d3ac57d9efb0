//! Changes of the keys by other clients, as the watches report them.

use super::action::Timestamp;
use super::entry::Entry;
use super::event::KeyEvent;
use super::lease::Lease;
use super::reconciler::Reconciler;
use super::stored_key::StoredKey;

impl Reconciler {
    pub(super) fn on_key_event(&mut self, key: &str, event: &KeyEvent, now: Timestamp) {
        let lease = self.lease.as_ref().map(Lease::id);
        let mut entries = self.entries.values_mut();
        let Some(entry) = entries.find(|entry| entry.target.has_key(key)) else {
            return;
        };
        let KeyEvent::Changed { revision, stored } = event else {
            entry.on_watch_started();
            return;
        };
        if *revision <= entry.seen_revision {
            return;
        }
        let stored = stored.as_ref();
        if !entry.should_exist() {
            let own_leases = self.own_leases.make_contiguous();
            entry.on_unwanted_change(stored.is_some_and(|key| key.is_own(own_leases)));
        } else if !stored.is_some_and(|stored| entry.target.matches(key, stored, lease)) {
            let was_present = entry.presence.generation().is_some();
            entry.on_conflict(stored, now);
            // The lease may have expired, together with those of many other processes.
            if was_present && stored.is_none() {
                self.jitter_recovery(now.instant);
            }
        } else {
            // Written by this registrar, perhaps with a lost response.
            entry.owned_revision = Some(*revision);
        }
    }
}

impl Entry {
    /// Handles the start of a watch, which may have missed changes. etcd may also have lost its
    /// history.
    fn on_watch_started(&mut self) {
        self.seen_revision = 0;
        // Set even while the keys should not exist, because the entry may become ready before they
        // are removed.
        self.needs_check = true;
        if self.late_write && !self.should_exist() {
            self.presence.mark_maybe_written();
        }
    }

    /// Handles a change of a key that should not exist. If the key is this registrar's own, a late
    /// write has arrived.
    fn on_unwanted_change(&mut self, is_own: bool) {
        self.needs_check = true;
        if is_own {
            self.presence.mark_maybe_written();
        }
    }

    /// Handles a change by which a key differs from the target.
    fn on_conflict(&mut self, stored: Option<&StoredKey>, now: Timestamp) {
        // Set also while the keys are being read, because the change may be later than the read.
        self.needs_check = true;
        let fault = match stored {
            None => "the key was deleted",
            Some(stored) if stored.lease == 0 => "the key was overwritten by another client",
            // Either an older write of this registrar, or another registration: the check tells
            // which.
            Some(_) => return,
        };
        if self.presence.generation().is_some() {
            self.report_recovering(fault, now);
            self.retry_schedule.pause_after_conflict(now.instant);
        }
    }
}
