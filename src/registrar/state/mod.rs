//! The registrar's step function: desired state and what is known of etcd go in, the next thing to
//! do comes out.
//!
//! There is no state called "given up": whatever fails is tried again, and what was lost with a
//! lease is wanted still. No I/O and no clock in here.

mod action;
mod entry;
mod held;
mod lease;
mod status;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

pub(super) use action::{Action, Ensure, Heard, Next, Now, Outcome, Pairs};
use entry::Entry;
pub(super) use held::{Held, Verdict, is_ours};
use lease::Lease;
pub use status::RegistrationState;
pub(super) use status::{Status, Ticket};

use crate::backoff::Backoff;
use crate::error::{Error, Result};

/// Within which time those that lost their key or their lease come back, each at a random moment of it: ten thousand
/// processes whose leases end together make twenty grants a millisecond and not ten thousand at once.
/// Half of the second within which one is to be back.
const RECOVER_WITHIN: Duration = Duration::from_millis(500);

/// How many of its earlier leases a registrar knows as its own. A key under one that is older is
/// another's; the lease has long ended by then.
const LEASES_KNOWN: usize = 16;

/// What should be in etcd, and what is.
#[derive(Debug)]
pub(super) struct Reconciler {
    entries: BTreeMap<String, Entry>,
    lease: Option<Lease>,
    /// The leases that were granted, the latest last.
    ours: VecDeque<i64>,
    mutating: Option<Instant>,
    renewing: Option<Instant>,
    retry_at: Option<Instant>,
    /// `retry_at` is, or was, a random moment for those who lost something together; once is enough.
    spread: bool,
    backoff: Backoff,
    renewal_backoff: Backoff,
    next_token: u64,
    /// The client was closed: nothing will reach etcd any more.
    closed: Option<Error>,
}

/// What a reconciler has to do with some keys.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// Nothing.
    None,
    /// It has one of them, in an entry that is being withdrawn.
    Leaving,
    /// It has this one.
    Wanted(String),
}

impl Reconciler {
    pub(super) fn new() -> Self {
        Self {
            entries: BTreeMap::new(),
            lease: None,
            ours: VecDeque::new(),
            mutating: None,
            renewing: None,
            retry_at: None,
            spread: false,
            backoff: Backoff::for_etcd(),
            renewal_backoff: Backoff::for_etcd(),
            next_token: 0,
            closed: None,
        }
    }

    pub(super) fn claim(&self, pairs: &Pairs) -> Claim {
        let is_among = |key: &String| pairs.iter().any(|(among, _)| among == key);
        let mut claim = Claim::None;
        for entry in self.entries.values() {
            if let Some(key) = entry.keys().find(&is_among) {
                if entry.wanted && entry.pairs.iter().any(|(ours, _)| *ours == key) {
                    return Claim::Wanted(key);
                }
                claim = Claim::Leaving;
            }
        }
        claim
    }

    /// How many keys it has to do with.
    pub(super) fn len(&self) -> usize {
        self.entries
            .values()
            .map(|entry| entry.keys().count())
            .sum()
    }

    /// Wants each key to have its value.
    pub(super) fn register(&mut self, pairs: Pairs, draining: bool, ready: bool) -> Result<Ticket> {
        if let Some(closed) = &self.closed {
            return Err(closed.clone());
        }
        if let Claim::Wanted(key) = self.claim(&pairs) {
            return Err(Error::InstanceAlreadyRegistered { key });
        }
        let key = pairs
            .first()
            .map_or_else(String::new, |(key, _)| key.clone());
        let is_ours = |key: &String| pairs.iter().any(|(ours, _)| ours == key);
        // One that is being withdrawn is taken over as it stands, and from any other the keys that
        // are ours now. What may be at them is known of us from then on.
        let mut gone = Vec::new();
        let (mut touched, mut late) = (false, false);
        for (of, entry) in &mut self.entries {
            if *of == key {
                gone.extend(entry.keys().filter(|key| !is_ours(key)));
            } else if entry.keys().any(|key| is_ours(&key)) {
                entry.pairs.retain(|(key, _)| !is_ours(key));
                entry.gone.retain(|key| !is_ours(key));
            } else {
                continue;
            }
            touched |= entry.touched;
            late |= entry.late;
        }
        let before = self.entries.get(&key);
        let generation = before.map_or(0, |before| before.generation + 1);
        let state = if ready {
            RegistrationState::Registering
        } else {
            RegistrationState::Unready
        };
        let (status, receiver) = watch::channel(Status {
            state,
            written: None,
            error: None,
            held_back: !ready,
            over: false,
        });
        let token = self.next_token;
        self.next_token += 1;
        let entry = Entry {
            token,
            pairs,
            gone,
            draining,
            wanted: true,
            ready,
            generation,
            written: None,
            revision: 0,
            was_in: false,
            suspect: false,
            superseded: false,
            touched,
            late,
            refused: None,
            undone: None,
            tried_at: None,
            status,
        };
        if let Some(before) = self.entries.insert(key, entry) {
            before.report_state(RegistrationState::Deregistered);
        }
        self.retry_at = None;
        Ok(Ticket {
            token,
            generation,
            status: receiver,
        })
    }

    /// Wants other values under the same keys. Returns the generation to wait for; `None` if it is not
    /// registered.
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
            // What is superseded keeps saying so: the change is not going to be in etcd soon.
            if self.closed.is_none() && !entry.superseded {
                entry.report(|status| status.error = None);
            }
        }
        Some(entry.generation)
    }

    /// Says whether what it is registered for is ready. Returns whether that is of interest still.
    pub(super) fn set_ready(&mut self, key: &str, token: u64, ready: bool) -> bool {
        let Some(entry) = self.entries.get_mut(key) else {
            return false;
        };
        if entry.token != token || !entry.wanted {
            return false;
        }
        if entry.ready != ready {
            entry.ready = ready;
            entry.begin_anew();
            entry.report(|status| status.held_back = !ready);
            if ready && (entry.written.is_some() || entry.superseded) {
                // It was not taken out, and stands where it stood. What was noticed meanwhile was not told.
                entry.suspect = true;
            } else if ready && self.closed.is_none() {
                entry.report_registering();
            }
            self.retry_at = None;
        }
        true
    }

    /// Wants the key gone.
    pub(super) fn withdraw(&mut self, key: &str, token: u64) {
        if let Some(entry) = self.entries.get_mut(key)
            && entry.token == token
        {
            entry.wanted = false;
            entry.begin_anew();
            let is_closed = self.closed.is_some();
            entry.report(|status| {
                status.over = true;
                if !is_closed {
                    status.error = None;
                }
            });
            self.retry_at = None;
        }
    }

    /// Whether nothing is wanted and nothing is left.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.lease.is_none() && self.mutating.is_none()
    }

    /// The keys to be watched: those that should be in etcd, and those at which a late write may appear.
    pub(super) fn to_watch(&self) -> impl Iterator<Item = &String> {
        let entries = self.entries.values();
        let pairs = entries.flat_map(|entry| &entry.pairs);
        pairs.map(|(key, _)| key)
    }

    /// What the watch of a key tells.
    pub(super) fn heard(&mut self, key: &str, heard: &Heard, now: Now) {
        let lease = self.lease.as_ref().map(Lease::id);
        let of = |entry: &&mut Entry| entry.pairs.iter().any(|(of, _)| of == key);
        let Some(entry) = self.entries.values_mut().find(of) else {
            return;
        };
        let Heard::Changed { revision, held } = heard else {
            // There may have been a gap, after which etcd may even have another history.
            entry.revision = 0;
            // Also while it should not be in, for it may be wanted again before it is taken out.
            entry.suspect = true;
            entry.touched |= entry.late && !entry.belongs_in();
            return;
        };
        if *revision <= entry.revision {
            return;
        }
        if !entry.belongs_in() {
            entry.suspect = true;
            // A write that was given up on has arrived.
            let ours = self.ours.make_contiguous();
            entry.touched |= held.as_ref().is_some_and(|held| is_ours(held, ours));
            return;
        }
        let as_wanted = held.as_ref().is_some_and(|held| {
            Some(held.lease) == lease
                && entry
                    .pairs
                    .iter()
                    .any(|(of, value)| of == key && *value == held.value)
        });
        if as_wanted {
            // Maybe by a write whose answer was lost.
            entry.was_in = true;
            return;
        }
        // Also while it is being looked at: what was heard may be later than what was seen.
        entry.suspect = true;
        // An own write that is older than the newest is no news, and another's registration is looked
        // at before it is called one.
        let noticed = match held {
            Some(held) if held.lease == 0 => "its key was overwritten",
            Some(_) => return,
            None => "its key was deleted",
        };
        if entry.written.is_some() {
            entry.report_recovering(now, noticed);
            entry.pause_undone(now.instant);
            // Maybe its lease has ended, and with it those of many others.
            if held.is_none() {
                self.spread(now);
            }
        }
    }

    /// Waits for a random moment, once.
    fn spread(&mut self, now: Now) {
        if !self.spread {
            self.spread = true;
            let at = now.instant + RECOVER_WITHIN.mul_f64(fastrand::f64());
            self.retry_at = Some(self.retry_at.map_or(at, |before| before.max(at)));
        }
    }

    /// The next thing to do. What it returns as `Do` counts as begun; tell
    /// [`finished`](Self::finished) its outcome.
    pub(super) fn next(&mut self, now: Now) -> Next {
        if self.closed.is_some() {
            return Next::WaitUntil(None);
        }
        self.notice_overdue(now);
        if let Some(lease) = &self.lease
            && self.renewing.is_none()
            && now.instant >= lease.renew_at()
            && self.entries.values().any(Entry::belongs_in)
        {
            self.renewing = Some(now.instant);
            return Next::Do(Action::Renew { lease: lease.id() });
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
        let lease = self.lease.as_ref().map(Lease::id);
        if !self.entries.values().any(Entry::belongs_in) {
            if let Some(lease) = lease {
                self.entries.values_mut().for_each(Entry::taken_out);
                return Some(Action::Revoke { lease });
            }
            // With the lease, a late write has lost what it could be under.
            self.settle(|_| true);
            return None;
        }
        let is_left = |entry: &Entry| entry.touched && entry.keys().next().is_some();
        self.settle(|entry| lease.is_none() || !is_left(entry));
        self.entries
            .retain(|_, entry| entry.wanted || is_left(entry) || (entry.late && lease.is_some()));
        let Some(lease) = lease else {
            return Some(Action::Grant);
        };
        let is_due = |entry: &Entry| {
            entry.is_pending() && entry.not_before().is_none_or(|at| now.instant >= at)
        };
        let due = self.entries.iter_mut().filter(|(_, entry)| is_due(entry));
        let (key, entry) = due.min_by_key(|(_, entry)| entry.turn())?;
        entry.tried_at = Some(now.instant);
        let (key, ours) = (key.clone(), Vec::from(self.ours.clone()));
        if !entry.belongs_in() {
            let keys = entry.keys().collect();
            entry.taken_out();
            return Some(Action::Delete { key, keys, ours });
        }
        entry.touched = true;
        entry.suspect = false;
        Some(Action::Ensure(Ensure {
            key,
            token: entry.token,
            pairs: entry.pairs.clone(),
            gone: entry.gone.clone(),
            lease,
            ours,
            take: !entry.was_in,
            generation: entry.generation,
        }))
    }

    /// Tells those that should not be in etcd and are not that they are where they should be.
    fn settle(&mut self, is_out: impl Fn(&Entry) -> bool) {
        let lease = self.lease.is_some();
        self.entries.retain(|_, entry| {
            if entry.belongs_in() || !is_out(entry) {
                return true;
            }
            if entry.wanted {
                entry.taken_out();
                entry.report_state(RegistrationState::Unready);
                return true;
            }
            entry.report_state(RegistrationState::Deregistered);
            lease && entry.late
        });
    }

    /// Always in the future: what is due has been begun, or waits for something else to end.
    fn wake_at(&self) -> Option<Instant> {
        let lease = self.lease.as_ref();
        let any_in = self.entries.values().any(Entry::belongs_in);
        let renewal = lease
            .filter(|_| self.renewing.is_none() && any_in)
            .map(Lease::renew_at);
        let overdue = lease.and_then(Lease::overdue_at);
        let mutation = match self.retry_at {
            _ if self.mutating.is_some() => None,
            Some(at) => Some(at),
            None => {
                let pending = self.entries.values().filter(|entry| entry.is_pending());
                pending.filter_map(Entry::not_before).min()
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
        match action {
            Action::Renew { lease } => self.renew_finished(*lease, outcome, begun, now),
            Action::Ensure(ensure) => self.ensure_finished(ensure, outcome, now),
            Action::Delete { key, .. } => self.delete_finished(key, outcome, now),
            Action::Grant => match outcome {
                Outcome::Granted { lease, ttl } => {
                    self.ours.push_back(lease);
                    if self.ours.len() > LEASES_KNOWN {
                        self.ours.pop_front();
                    }
                    self.lease = Some(Lease::granted(lease, ttl, begun));
                    self.worked();
                }
                Outcome::Failed(error) => self.mutation_failed(error, now),
                _ => {}
            },
            Action::Revoke { .. } => match outcome {
                Outcome::Done | Outcome::LeaseGone => {
                    self.drop_lease();
                    // Back in, they are new, as after a deletion.
                    for entry in self.entries.values_mut().filter(|e| !e.belongs_in()) {
                        entry.was_in = false;
                    }
                    self.worked();
                }
                Outcome::Failed(error) => self.mutation_failed(error, now),
                _ => {}
            },
        }
    }

    fn renew_finished(&mut self, id: i64, outcome: Outcome, begun: Instant, now: Now) {
        // Else it is of a lease that was replaced meanwhile.
        let Some(lease) = self.lease.as_mut().filter(|lease| lease.id() == id) else {
            return;
        };
        match outcome {
            Outcome::Renewed => {
                lease.renewed(begun);
                self.renewal_backoff.reset();
                for entry in self.entries.values().filter(|entry| !entry.suspect) {
                    entry.report_written();
                }
            }
            Outcome::LeaseGone => self.lease_lost(now),
            Outcome::Failed(error) => {
                lease.renew_again_at(now.instant + self.renewal_backoff.next());
                for entry in self.entries.values().filter(|entry| !entry.superseded) {
                    entry.report(|status| status.error = Some(error.clone()));
                }
            }
            _ => {}
        }
    }

    fn ensure_finished(&mut self, ensure: &Ensure, outcome: Outcome, now: Now) {
        let is_current = self
            .lease
            .as_ref()
            .is_some_and(|lease| lease.id() == ensure.lease);
        let entry = self.entries.get_mut(&ensure.key);
        let is_its = |entry: &&mut Entry| entry.token == ensure.token;
        match outcome {
            Outcome::LeaseGone if is_current => self.lease_lost(now),
            Outcome::Ensured { revision } => {
                // Written under a lease that was lost meanwhile, it went with it.
                if let Some(entry) = entry.filter(is_its).filter(|_| is_current) {
                    entry.refused = None;
                    entry.gone.clear();
                    entry.written = Some(ensure.generation);
                    entry.revision = revision;
                    entry.was_in = true;
                    entry.superseded = false;
                    entry.report_written();
                }
                self.worked();
            }
            Outcome::Superseded { by } => {
                if let Some(entry) = entry.filter(is_its) {
                    entry.refused = None;
                    entry.written = None;
                    entry.superseded = true;
                    if entry.wanted {
                        entry.report_superseded(by, &ensure.key, now);
                    }
                }
                self.worked();
            }
            Outcome::Failed(error) => {
                let is_refusal = is_of_one(&error);
                if let Some(entry) = entry {
                    entry.suspect |= entry.written.is_some() || entry.superseded;
                }
                if is_refusal {
                    self.refused(&ensure.key, error, now);
                } else {
                    let is_put = |key: String| ensure.pairs.iter().any(|(put, _)| *put == key);
                    let has_one = |entry: &&mut Entry| entry.keys().any(is_put);
                    // Whoever has the keys now.
                    for entry in self.entries.values_mut().filter(has_one) {
                        entry.late = true;
                    }
                    self.mutation_failed(error, now);
                }
            }
            _ => {}
        }
    }

    fn delete_finished(&mut self, key: &str, outcome: Outcome, now: Now) {
        match outcome {
            Outcome::Done => {
                if let Some(entry) = self.entries.get_mut(key) {
                    entry.touched = false;
                    // Back in, it is new: it takes the key as the later one.
                    entry.was_in = false;
                    entry.gone.clear();
                }
                self.worked();
            }
            Outcome::Failed(error) if is_of_one(&error) => self.refused(key, error, now),
            Outcome::Failed(error) => self.mutation_failed(error, now),
            _ => {}
        }
    }

    fn worked(&mut self) {
        self.backoff.reset();
        // What was under way when something was lost says nothing about that.
        if !(self.spread && self.retry_at.is_some()) {
            self.retry_at = None;
            self.spread = false;
        }
    }

    /// etcd is not to be reached, or not able to: everything waits.
    fn mutation_failed(&mut self, error: Error, now: Now) {
        self.retry_at = Some(now.instant + self.backoff.next());
        let pending = |entry: &&Entry| entry.is_pending() && !entry.superseded;
        for entry in self.entries.values().filter(pending) {
            entry.report(|status| status.error = Some(error.clone()));
        }
    }

    /// etcd said no to one entry: that is the only one that waits.
    fn refused(&mut self, key: &str, error: Error, now: Now) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.pause_refused(now.instant);
            entry.report(|status| status.error = Some(error));
            entry.report_recovering(now, "etcd refused it");
        }
    }

    /// etcd has not answered for the whole time to live. The lease is still being renewed, since it
    /// is etcd who decides: after a restart it counts a lease's time from the start.
    fn notice_overdue(&mut self, now: Now) {
        if let Some(lease) = &mut self.lease
            && lease.is_newly_overdue(now.instant)
        {
            self.recovering(now, "etcd has not answered for the lease's time to live");
        }
    }

    fn lease_lost(&mut self, now: Now) {
        self.drop_lease();
        self.recovering(now, "the lease has expired or was revoked");
        self.spread(now);
    }

    /// The client was closed: nothing will reach etcd any more.
    pub(super) fn closed(&mut self, error: &Error, now: Now) {
        self.closed = Some(error.clone());
        for entry in self.entries.values() {
            entry.report(|status| {
                status.over = true;
                status.error = Some(error.clone());
            });
        }
        self.recovering(now, "nothing keeps it alive any more");
    }

    fn drop_lease(&mut self) {
        self.lease = None;
        for entry in self.entries.values_mut() {
            entry.written = None;
            entry.touched = false;
            entry.late = false;
            // Who has it now may have changed as well.
            entry.suspect |= entry.superseded;
            entry.gone.clear();
        }
    }

    fn recovering(&mut self, now: Now, noticed: &str) {
        for entry in self.entries.values() {
            entry.report_recovering(now, noticed);
        }
    }
}

/// Whether a failure is one entry's alone, and not the way to etcd's: etcd has refused it, or others
/// write to its keys all the time.
fn is_of_one(error: &Error) -> bool {
    error.is_permanent() || error.code() == Some(tonic::Code::Aborted)
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
