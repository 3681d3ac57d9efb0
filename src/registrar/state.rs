//! The registrar's step function: desired state and what is known of etcd go in, the next thing to
//! do comes out.
//!
//! There is no state called "given up": whatever fails is tried again, and what was lost with a
//! lease is wanted still. No I/O and no clock in here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::{Error, Result};

/// Where a registration stands.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegistrationState {
    /// On its way into etcd for the first time.
    Registering,
    /// In etcd, under a lease that is being kept alive.
    Registered,
    /// It was in etcd, and cannot be relied on to be there now. It is being brought back, for as
    /// long as it takes.
    Recovering {
        /// When the registrar noticed.
        since: SystemTime,
        /// What it noticed.
        reason: Arc<str>,
    },
    /// In etcd and marked as about to leave.
    Draining,
    /// Withdrawn: not in etcd any more. Final.
    Deregistered,
}

/// A registration's state, and the last error on the way to it.
#[derive(Debug, Clone)]
pub(super) struct Status {
    pub(super) state: RegistrationState,
    /// How often its value was changed, and up to which change it is in etcd.
    pub(super) written: Option<u64>,
    /// What went wrong last; `None` once something worked.
    pub(super) error: Option<Error>,
}

/// One registration of a key.
#[derive(Debug)]
pub(super) struct Ticket {
    /// Tells it from an earlier registration of the same key.
    pub(super) token: u64,
    /// The generation to wait for.
    pub(super) generation: u64,
    pub(super) status: watch::Receiver<Status>,
}

/// The time, both ways of telling it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Now {
    pub(super) instant: Instant,
    pub(super) wall: SystemTime,
}

/// What an instance is in etcd: a key and a value in each format that it is written in. The first key
/// stands for all of them.
pub(super) type Pairs = Vec<(String, Vec<u8>)>;

/// One exchange with etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    Grant,
    Renew {
        lease: i64,
    },
    /// Put all of an entry's pairs at once.
    Put {
        /// The entry's key.
        key: String,
        pairs: Pairs,
        /// Keys that it had before; to be deleted if they still belong to the lease.
        gone: Vec<String>,
        lease: i64,
        generation: u64,
    },
    /// Delete all of an entry's keys at once, each if it still belongs to the lease: another process
    /// may have taken it over.
    Delete {
        /// The entry's key.
        key: String,
        keys: Vec<String>,
        lease: i64,
    },
    /// Revoke the lease, which deletes every key that belongs to it.
    Revoke {
        lease: i64,
    },
}

/// What came of an action.
#[derive(Debug)]
pub(super) enum Outcome {
    Granted {
        lease: i64,
        ttl: Duration,
    },
    Renewed,
    /// Put, deleted, revoked.
    Done,
    /// etcd does not know the lease (any more).
    LeaseGone,
    Failed(Error),
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Do(Action),
    /// Nothing before this time, unless something is wanted or an action ends.
    WaitUntil(Option<Instant>),
}

#[derive(Debug)]
struct Entry {
    token: u64,
    pairs: Pairs,
    /// Keys of an earlier entry that may be in etcd under the present lease and are to go.
    gone: Vec<String>,
    draining: bool,
    wanted: bool,
    /// Counts the changes of `pairs`.
    generation: u64,
    /// The generation that is in etcd under the present lease.
    written: Option<u64>,
    /// Whether it may be in etcd under the present lease.
    touched: bool,
    /// etcd has refused it; the others go on meanwhile.
    refused: Option<Refused>,
    status: watch::Sender<Status>,
}

/// When what etcd has refused is tried again: rights may change.
#[derive(Debug)]
struct Refused {
    retry_at: Instant,
    backoff: Backoff,
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    id: i64,
    /// What etcd granted, which may be more than what was asked for.
    ttl: Duration,
    /// A third of the time to live after the last renewal that was answered, sooner after a failure.
    renew_at: Instant,
    /// When etcd drops it, as far as is known here: judged from when the last renewal that was
    /// answered was sent.
    expires: Instant,
    overdue: bool,
}

/// What should be in etcd, and what is.
#[derive(Debug)]
pub(super) struct Reconciler {
    entries: BTreeMap<String, Entry>,
    lease: Option<Lease>,
    mutating: Option<Instant>,
    renewing: Option<Instant>,
    retry_at: Option<Instant>,
    backoff: Backoff,
    renewal_backoff: Backoff,
    next_token: u64,
    /// The client was closed: nothing will reach etcd any more.
    closed: Option<Error>,
}

impl Reconciler {
    pub(super) fn new() -> Self {
        Self {
            entries: BTreeMap::new(),
            lease: None,
            mutating: None,
            renewing: None,
            retry_at: None,
            backoff: Backoff::for_etcd(),
            renewal_backoff: Backoff::for_etcd(),
            next_token: 0,
            closed: None,
        }
    }

    /// Wants each key to have its value.
    pub(super) fn register(&mut self, pairs: Pairs, draining: bool) -> Result<Ticket> {
        if let Some(closed) = &self.closed {
            return Err(closed.clone());
        }
        let key = pairs
            .first()
            .map_or_else(String::new, |(key, _)| key.clone());
        let is_ours = |key: &String| pairs.iter().any(|(ours, _)| ours == key);
        for entry in self.entries.values().filter(|entry| entry.wanted) {
            if let Some((key, _)) = entry.pairs.iter().find(|(key, _)| is_ours(key)) {
                let key = key.clone();
                return Err(Error::InstanceAlreadyRegistered { key });
            }
        }
        // One that is being withdrawn is taken over as it stands, and from any other the keys that
        // are ours now.
        let mut gone = Vec::new();
        for (of, entry) in &mut self.entries {
            if *of == key {
                gone.extend(entry.keys().filter(|key| !is_ours(key)));
            } else if !entry.wanted {
                entry.pairs.retain(|(key, _)| !is_ours(key));
                entry.gone.retain(|key| !is_ours(key));
            }
        }
        let before = self.entries.get(&key);
        let (generation, touched) = before.map_or((0, false), |b| (b.generation + 1, b.touched));
        let (status, receiver) = watch::channel(Status {
            state: RegistrationState::Registering,
            written: None,
            error: None,
        });
        let token = self.next_token;
        self.next_token += 1;
        let entry = Entry {
            token,
            pairs,
            gone,
            draining,
            wanted: true,
            generation,
            written: None,
            touched,
            refused: None,
            status,
        };
        if let Some(before) = self.entries.insert(key, entry) {
            before.report(|status| status.state = RegistrationState::Deregistered);
        }
        self.retry_at = None;
        Ok(Ticket {
            token,
            generation,
            status: receiver,
        })
    }

    /// Wants other values under the same keys. Returns the generation to wait for; `None` if it is not registered.
    pub(super) fn update(
        &mut self,
        key: &str,
        token: u64,
        pairs: Pairs,
        draining: bool,
    ) -> Option<u64> {
        let entry = self.entries.get_mut(key)?;
        if entry.token != token || !entry.wanted {
            return None;
        }
        // Where the format has no place for it, draining alone changes no value.
        if entry.pairs != pairs || entry.draining != draining {
            entry.generation += 1;
            entry.pairs = pairs;
            entry.draining = draining;
            entry.refused = None;
            if self.closed.is_none() {
                entry.report(|status| status.error = None);
            }
        }
        Some(entry.generation)
    }

    /// Wants the key gone.
    pub(super) fn withdraw(&mut self, key: &str, token: u64) {
        if let Some(entry) = self.entries.get_mut(key)
            && entry.token == token
        {
            entry.wanted = false;
            entry.refused = None;
            if self.closed.is_none() {
                entry.report(|status| status.error = None);
            }
            self.retry_at = None;
        }
    }

    /// Whether nothing is wanted and nothing is left.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.lease.is_none() && self.mutating.is_none()
    }

    /// The next thing to do. What it returns as `Do` counts as begun; tell
    /// [`finished`](Self::finished) its outcome.
    pub(super) fn next(&mut self, now: Now) -> Next {
        if self.closed.is_some() {
            return Next::WaitUntil(None);
        }
        self.notice_overdue(now);
        if let Some(lease) = self.lease
            && self.renewing.is_none()
            && now.instant >= lease.renew_at
            && self.entries.values().any(|entry| entry.wanted)
        {
            self.renewing = Some(now.instant);
            return Next::Do(Action::Renew { lease: lease.id });
        }
        if self.mutating.is_none() && self.retry_at.is_none_or(|at| now.instant >= at) {
            self.retry_at = None;
            if let Some(action) = self.mutation(now) {
                self.mutating = Some(now.instant);
                return Next::Do(action);
            }
        }
        Next::WaitUntil(self.wake_at())
    }

    fn mutation(&mut self, now: Now) -> Option<Action> {
        let lease = self.lease.map(|lease| lease.id);
        if !self.entries.values().any(|entry| entry.wanted) {
            return match lease {
                Some(lease) => Some(Action::Revoke { lease }),
                None => {
                    self.forget(|_| true);
                    None
                }
            };
        }
        let is_left = |entry: &Entry| entry.touched && entry.keys().next().is_some();
        self.forget(|entry| !entry.wanted && (lease.is_none() || !is_left(entry)));
        let Some(lease) = lease else {
            return Some(Action::Grant);
        };
        let is_due = |entry: &Entry| {
            let refused = entry.refused.as_ref();
            refused.is_none_or(|refused| now.instant >= refused.retry_at)
        };
        for (key, entry) in self.entries.iter_mut().filter(|(_, entry)| is_due(entry)) {
            if !entry.wanted {
                return Some(Action::Delete {
                    key: key.clone(),
                    keys: entry.keys().collect(),
                    lease,
                });
            }
            if entry.written != Some(entry.generation) {
                entry.touched = true;
                return Some(Action::Put {
                    key: key.clone(),
                    pairs: entry.pairs.clone(),
                    gone: entry.gone.clone(),
                    lease,
                    generation: entry.generation,
                });
            }
        }
        None
    }

    /// Always in the future: what is due has been begun, or waits for something else to end.
    fn wake_at(&self) -> Option<Instant> {
        let lease = self.lease.as_ref();
        let any_wanted = self.entries.values().any(|entry| entry.wanted);
        let renewal = lease
            .filter(|_| self.renewing.is_none() && any_wanted)
            .map(|lease| lease.renew_at);
        let overdue = lease
            .filter(|lease| !lease.overdue)
            .map(|lease| lease.expires);
        let mutation = match self.retry_at {
            _ if self.mutating.is_some() => None,
            Some(at) => Some(at),
            None => {
                let refused = self.entries.values().filter(|entry| entry.is_pending());
                let refused = refused.filter_map(|entry| entry.refused.as_ref());
                refused.map(|refused| refused.retry_at).min()
            }
        };
        [renewal, overdue, mutation].into_iter().flatten().min()
    }

    /// Takes the outcome of an action that [`next`](Self::next) returned.
    pub(super) fn finished(&mut self, action: &Action, outcome: Outcome, now: Now) {
        let begun = match action {
            Action::Renew { .. } => self.renewing.take(),
            _ => self.mutating.take(),
        }
        .unwrap_or(now.instant);
        match (action, outcome) {
            (Action::Renew { lease }, outcome) => {
                // Of a lease that was replaced meanwhile.
                if self.lease.is_none_or(|held| held.id != *lease) {
                    return;
                }
                match outcome {
                    Outcome::Renewed => self.renewed(begun),
                    Outcome::LeaseGone => self.lease_lost(now),
                    Outcome::Failed(error) => self.renewal_failed(error, now),
                    Outcome::Granted { .. } | Outcome::Done => {}
                }
            }
            (Action::Put { key, .. } | Action::Delete { key, .. }, Outcome::Failed(error))
                if error.is_permanent() =>
            {
                self.refused(key, error, now);
            }
            (_, Outcome::Failed(error)) => self.mutation_failed(error, now),
            (Action::Grant, Outcome::Granted { lease, ttl }) => {
                self.lease = Some(Lease {
                    id: lease,
                    ttl,
                    renew_at: begun + ttl / 3,
                    expires: begun + ttl,
                    overdue: false,
                });
                self.worked();
            }
            (
                Action::Put {
                    key,
                    gone,
                    lease,
                    generation,
                    ..
                },
                Outcome::Done,
            ) => {
                if let Some(entry) = self.entries.get_mut(key)
                    // Written under a lease that was lost meanwhile, it went with it.
                    && self.lease.is_some_and(|held| held.id == *lease)
                {
                    entry.refused = None;
                    // Not all: it may be of an entry that was taken over meanwhile.
                    entry.gone.retain(|key| !gone.contains(key));
                    entry.written = Some(*generation);
                    entry.report_written();
                }
                self.worked();
            }
            (Action::Delete { key, lease, .. }, Outcome::Done) => {
                if let Some(entry) = self.entries.get_mut(key)
                    && self.lease.is_some_and(|held| held.id == *lease)
                {
                    entry.touched = false;
                    entry.written = None;
                }
                self.worked();
            }
            (Action::Revoke { .. }, Outcome::Done | Outcome::LeaseGone) => {
                self.drop_lease();
                self.worked();
            }
            (Action::Put { lease, .. } | Action::Delete { lease, .. }, Outcome::LeaseGone) => {
                if self.lease.is_some_and(|held| held.id == *lease) {
                    self.lease_lost(now);
                }
            }
            (
                Action::Grant | Action::Put { .. } | Action::Delete { .. } | Action::Revoke { .. },
                Outcome::LeaseGone | Outcome::Granted { .. } | Outcome::Renewed | Outcome::Done,
            ) => {}
        }
    }

    fn worked(&mut self) {
        self.retry_at = None;
        self.backoff.reset();
    }

    fn renewed(&mut self, begun: Instant) {
        if let Some(lease) = &mut self.lease {
            lease.renew_at = begun + lease.ttl / 3;
            lease.expires = begun + lease.ttl;
            lease.overdue = false;
        }
        self.renewal_backoff.reset();
        for entry in self.entries.values() {
            entry.report_written();
        }
    }

    fn renewal_failed(&mut self, error: Error, now: Now) {
        if let Some(lease) = &mut self.lease {
            lease.renew_at = now.instant + self.renewal_backoff.next();
        }
        for entry in self.entries.values() {
            entry.report(|status| status.error = Some(error.clone()));
        }
    }

    /// etcd is not to be reached, or not able to: everything waits.
    fn mutation_failed(&mut self, error: Error, now: Now) {
        self.retry_at = Some(now.instant + self.backoff.next());
        for entry in self.entries.values().filter(|entry| entry.is_pending()) {
            entry.report(|status| status.error = Some(error.clone()));
        }
    }

    /// etcd said no to one entry: that is the only one that waits.
    fn refused(&mut self, key: &str, error: Error, now: Now) {
        if let Some(entry) = self.entries.get_mut(key) {
            let refused = entry.refused.get_or_insert_with(|| Refused {
                retry_at: now.instant,
                backoff: Backoff::for_etcd(),
            });
            refused.retry_at = now.instant + refused.backoff.next();
            entry.report(|status| status.error = Some(error));
        }
    }

    /// etcd has not answered for the whole time to live. The lease is still being renewed, since it
    /// is etcd who decides: after a restart it counts a lease's time from the start.
    fn notice_overdue(&mut self, now: Now) {
        if let Some(lease) = &mut self.lease
            && !lease.overdue
            && now.instant >= lease.expires
        {
            lease.overdue = true;
            self.recovering(now, "etcd has not answered for the lease's time to live");
        }
    }

    fn lease_lost(&mut self, now: Now) {
        self.drop_lease();
        self.recovering(now, "the lease has expired or was revoked");
        // Jittered: many may have lost theirs in the same moment.
        self.retry_at = Some(now.instant + self.backoff.next());
    }

    /// The client was closed: nothing will reach etcd any more.
    pub(super) fn closed(&mut self, error: &Error, now: Now) {
        self.closed = Some(error.clone());
        for entry in self.entries.values() {
            entry.report(|status| status.error = Some(error.clone()));
        }
        self.recovering(now, "nothing keeps it alive any more");
    }

    fn drop_lease(&mut self) {
        self.lease = None;
        for entry in self.entries.values_mut() {
            entry.written = None;
            entry.touched = false;
            entry.gone.clear();
        }
    }

    fn recovering(&mut self, now: Now, noticed: &str) {
        for entry in self.entries.values().filter(|entry| entry.wanted) {
            entry.report(|status| {
                let since = match status.state {
                    // Never was in etcd, so there is nothing to recover.
                    RegistrationState::Registering => return,
                    // Since when matters more than the latest thing that was noticed.
                    RegistrationState::Recovering { since, .. } => since,
                    _ => now.wall,
                };
                let reason = match &status.error {
                    Some(error) => format!("{noticed} ({error})").into(),
                    None => noticed.into(),
                };
                status.state = RegistrationState::Recovering { since, reason };
                status.written = entry.written;
            });
        }
    }

    fn forget(&mut self, gone: impl Fn(&Entry) -> bool) {
        self.entries.retain(|_, entry| {
            let gone = gone(entry);
            if gone {
                entry.report(|status| status.state = RegistrationState::Deregistered);
            }
            !gone
        });
    }
}

impl Entry {
    /// Whether etcd does not have it as it should be, as far as is known.
    fn is_pending(&self) -> bool {
        !self.wanted || self.written != Some(self.generation)
    }

    /// All keys that may be in etcd.
    fn keys(&self) -> impl Iterator<Item = String> {
        let keys = self.pairs.iter().map(|(key, _)| key);
        keys.chain(&self.gone).cloned()
    }

    fn report(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(change);
    }

    fn report_written(&self) {
        if !self.wanted || self.written.is_none() {
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
}

#[cfg(test)]
mod tests;
