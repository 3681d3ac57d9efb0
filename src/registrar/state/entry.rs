//! One registration: what should be in etcd, and what is known of that.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::action::{Now, Pairs};
use super::status::{RegistrationState, Status};
use crate::backoff::Backoff;
use crate::error::Error;

/// After how long without others undoing it an entry is restored at once again.
const QUIET: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) token: u64,
    pub(super) pairs: Pairs,
    /// Keys of an earlier entry that may be in etcd under a lease of ours and are to go.
    pub(super) gone: Vec<String>,
    pub(super) draining: bool,
    pub(super) wanted: bool,
    /// What it is registered for says that it is ready.
    pub(super) ready: bool,
    /// Counts the changes of `pairs`.
    pub(super) generation: u64,
    /// The generation that is in etcd under the present lease.
    pub(super) written: Option<u64>,
    /// The revision at which that was seen.
    pub(super) revision: i64,
    /// Whether it was in etcd before: from then on it takes its key from no other.
    pub(super) was_in: bool,
    /// Something may have changed it: to be looked at.
    pub(super) suspect: bool,
    /// Another registration has its key. Nothing is done until the watch tells of a change.
    pub(super) superseded: bool,
    /// Whether it may be in etcd under the present lease.
    pub(super) touched: bool,
    /// A write whose answer was lost may still be done, for as long as the lease is there that it is
    /// under: a process that is paused, or a network that is, may pass it on at any time.
    pub(super) late: bool,
    /// etcd has refused it; the others go on meanwhile.
    pub(super) refused: Option<Pause>,
    /// Somebody has undone it, and may do so over and over.
    pub(super) undone: Option<Pause>,
    /// When something was last tried for it that is wanted still.
    pub(super) tried_at: Option<Instant>,
    pub(super) status: watch::Sender<Status>,
}

/// When one entry is tried again, while the others go on.
#[derive(Debug)]
pub(super) struct Pause {
    retry_at: Instant,
    backoff: Backoff,
}

impl Pause {
    fn ending(now: Instant) -> Self {
        Self {
            retry_at: now,
            backoff: Backoff::for_etcd(),
        }
    }

    fn prolong(&mut self, now: Instant) {
        self.retry_at = now + self.backoff.next();
    }
}

impl Entry {
    /// Whether it should be in etcd.
    pub(super) fn belongs_in(&self) -> bool {
        self.wanted && self.ready
    }

    /// Whether etcd does not have it as it should be, as far as is known.
    pub(super) fn is_pending(&self) -> bool {
        if self.belongs_in() {
            self.suspect || (!self.superseded && self.written != Some(self.generation))
        } else {
            self.touched
        }
    }

    /// Before when it is not tried, if so.
    pub(super) fn not_before(&self) -> Option<Instant> {
        let pauses = [&self.refused, &self.undone];
        pauses
            .into_iter()
            .flatten()
            .map(|pause| pause.retry_at)
            .max()
    }

    /// Whose turn it is of those that are due: the least. Deletions go first, for etcd takes them also when
    /// it takes nothing else, being full. What was tried is behind what was not, or not for as long: it may be
    /// the only one for which that is in vain.
    pub(super) fn turn(&self) -> impl Ord + use<> {
        (self.tried_at, self.belongs_in())
    }

    /// What is wanted of it has changed: what was in vain before may not be so now.
    pub(super) fn begin_anew(&mut self) {
        (self.refused, self.undone, self.tried_at) = (None, None, None);
    }

    /// etcd has refused it: rights may change.
    pub(super) fn pause_refused(&mut self, now: Instant) {
        let pause = self.refused.get_or_insert_with(|| Pause::ending(now));
        pause.prolong(now);
    }

    /// What was written has been undone: restored at once, unless it was a moment ago as well. Whoever does
    /// so without end, such as another tool that has its own idea of the key, is not answered blow
    /// for blow.
    pub(super) fn pause_undone(&mut self, now: Instant) {
        match &mut self.undone {
            Some(pause) if now < pause.retry_at + QUIET => pause.prolong(now),
            undone => *undone = Some(Pause::ending(now)),
        }
    }

    /// It is being deleted, or is out: from now on it cannot be relied on to be in etcd.
    pub(super) fn taken_out(&mut self) {
        self.written = None;
        self.superseded = false;
    }

    /// All keys that may be in etcd.
    pub(super) fn keys(&self) -> impl Iterator<Item = String> {
        let keys = self.pairs.iter().map(|(key, _)| key);
        keys.chain(&self.gone).cloned()
    }

    pub(super) fn report(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
    }

    pub(super) fn report_state(&self, state: RegistrationState) {
        self.status.send_if_modified(|status| {
            let news = status.state != state;
            status.state = state;
            news
        });
    }

    /// It is new, or as one that is.
    pub(super) fn report_registering(&self) {
        self.report(|status| {
            status.state = RegistrationState::Registering;
            status.written = None;
            status.error = None;
        });
    }

    pub(super) fn report_written(&self) {
        if !self.belongs_in() || self.written.is_none() {
            return;
        }
        let state = if self.draining && self.written == Some(self.generation) {
            RegistrationState::Draining
        } else {
            RegistrationState::Registered
        };
        let changed = |status: &mut Status| {
            let news = status.state != state || status.written != self.written;
            status.state = state;
            status.written = self.written;
            status.error = None;
            news
        };
        self.status.send_if_modified(changed);
    }

    pub(super) fn report_superseded(&self, by: i64, key: &str, now: Now) {
        self.report(|status| {
            let since = match status.state {
                RegistrationState::Superseded { since, by: same } if same == by => since,
                _ => now.wall,
            };
            status.state = RegistrationState::Superseded { since, by };
            status.written = None;
            status.error = Some(Error::Superseded {
                key: key.to_owned(),
                by,
            });
        });
    }

    pub(super) fn report_recovering(&self, now: Now, noticed: &str) {
        if !self.belongs_in() || self.superseded {
            return;
        }
        self.report(|status| {
            let since = match status.state {
                // Never was in etcd, so there is nothing to recover.
                RegistrationState::Registering | RegistrationState::Unready => return,
                // Since when matters more than the latest thing that was noticed.
                RegistrationState::Recovering { since, .. } => since,
                _ => now.wall,
            };
            let reason = match &status.error {
                Some(error) => format!("{noticed} ({error})").into(),
                None => noticed.into(),
            };
            status.state = RegistrationState::Recovering { since, reason };
            status.written = self.written;
        });
    }
}
