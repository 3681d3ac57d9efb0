//! Property test of the state machine against a model of etcd and its other clients: lost
//! responses, late writes, gaps in watches, expired leases, wipes, and jumps of the clock.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use tokio::time::Instant;
use tonic::Status;

use super::*;
use crate::error::Error;

const TTL: Duration = Duration::from_secs(9);

/// The leases of other registrars are numbered from here.
const FOREIGN: i64 = 1_000;

/// The number of keys.
const KEYS: u8 = 4;

#[derive(Debug, Clone)]
enum Op {
    /// Register this instance, ready or not.
    Register(u8, bool),
    /// Change this instance's value.
    Update(u8, u8),
    /// Deregister this instance.
    Deregister(u8),
    /// Set whether this instance's server is ready.
    SetReady(u8, bool),
    /// Perform up to this number of actions.
    Work(u8),
    /// Perform one action; the late writes and all events arrive before its response.
    WorkLate,
    /// Perform one action whose response is lost.
    LoseResponse(ActionEffect),
    /// Perform one action. If it renews or revokes the lease, etcd refuses that.
    RefuseLease,
    /// Apply the late writes.
    ApplyLateWrites,
    /// Deliver up to this number of watch events.
    DeliverEvents(u8),
    /// Restart the watches; pending events are lost.
    RestartWatches,
    /// Overwrite this key by hand.
    Overwrite(u8),
    /// Delete this key by hand.
    Delete(u8),
    /// Register this key by another process.
    RegisterForeign(u8),
    /// End the other process's registration of this key.
    EndForeign(u8),
    /// End the newest lease of the registrar, as by expiry.
    EndLease,
    /// Wipe etcd.
    Wipe,
    /// Take a snapshot of etcd.
    TakeSnapshot,
    /// Restore etcd from the last snapshot.
    Restore,
    /// Advance the clock by this number of milliseconds.
    Advance(u16),
}

/// The effect of an action whose response is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ActionEffect {
    Applied,
    Dropped,
    Late,
}

fn op() -> impl Strategy<Value = Op> {
    use Op::*;
    let (id, key) = (0u8..3, 0u8..KEYS);
    let effect = prop_oneof![
        Just(ActionEffect::Applied),
        Just(ActionEffect::Dropped),
        Just(ActionEffect::Late)
    ];
    prop_oneof![
        4 => (id.clone(), any::<bool>()).prop_map(|(id, ready)| Register(id, ready)),
        2 => (id.clone(), any::<u8>()).prop_map(|(id, value)| Update(id, value)),
        2 => id.clone().prop_map(Deregister),
        2 => (id, any::<bool>()).prop_map(|(id, ready)| SetReady(id, ready)),
        8 => (1u8..5).prop_map(Work),
        3 => Just(WorkLate),
        5 => effect.prop_map(LoseResponse),
        1 => Just(RefuseLease),
        3 => Just(ApplyLateWrites),
        6 => (1u8..6).prop_map(DeliverEvents),
        2 => Just(RestartWatches),
        1 => key.clone().prop_map(Overwrite),
        1 => key.clone().prop_map(Delete),
        1 => key.clone().prop_map(RegisterForeign),
        1 => key.prop_map(EndForeign),
        1 => Just(EndLease),
        1 => Just(Wipe),
        1 => Just(TakeSnapshot),
        1 => Just(Restore),
        4 => (1u16..5_000).prop_map(Advance),
    ]
}

/// A transaction on its way to etcd.
struct Write {
    /// The modification revisions that the transaction compares.
    unchanged: Vec<(String, i64)>,
    puts: Vec<(String, Vec<u8>)>,
    deletes: Vec<String>,
    lease: i64,
}

/// A reconciler, the model of etcd, and the state that the model expects.
struct Harness {
    reconciler: Reconciler,
    now: Timestamp,
    handles: BTreeMap<u8, EntryHandle>,
    /// The value of each registered instance, and whether its server is ready.
    desired: BTreeMap<u8, (Vec<u8>, bool)>,
    revision: i64,
    keys: BTreeMap<String, StoredKey>,
    leases: BTreeSet<i64>,
    /// When each lease of the registrar was granted or renewed.
    renewed_at: BTreeMap<i64, Instant>,
    /// Whether etcd was restored from a snapshot that no revision has shown yet.
    is_restored: bool,
    /// Whether keys may come back after a deletion, by a late write or a restore.
    has_returning_keys: bool,
    /// Whether the registrar read on after a restore without a revision below its last one, so that
    /// it cannot know of the restore.
    has_hidden_restore: bool,
    /// The revision of the last response that the registrar got under its lease.
    known_revision: i64,
    /// The revision, the keys and the leases of the last snapshot.
    snapshot: (i64, BTreeMap<String, StoredKey>, BTreeSet<i64>),
    next_lease: i64,
    late_writes: Vec<Write>,
    /// Watch events that are not delivered yet.
    events: VecDeque<(String, i64, Option<StoredKey>)>,
    watched: BTreeSet<String>,
}

fn name(key: u8) -> String {
    format!("k{key}")
}

/// The keys of an instance. The first one is its own. Instances 0 and 1 share the last key, so only
/// one of them can be registered at a time.
fn keys(id: u8) -> Vec<String> {
    let shared = (id < 2).then_some(KEYS - 1);
    [id].into_iter().chain(shared).map(name).collect()
}

fn target(id: u8, value: &[u8]) -> TargetRecords {
    let record = |key| (key, value.to_vec());
    TargetRecords {
        records: keys(id).into_iter().map(record).collect(),
        draining: false,
    }
}

impl Harness {
    fn new() -> Self {
        Self {
            reconciler: Reconciler::new(),
            now: Timestamp {
                instant: Instant::now(),
                wall: SystemTime::UNIX_EPOCH,
            },
            handles: BTreeMap::new(),
            desired: BTreeMap::new(),
            revision: 1,
            keys: BTreeMap::new(),
            leases: BTreeSet::new(),
            renewed_at: BTreeMap::new(),
            is_restored: false,
            has_returning_keys: false,
            has_hidden_restore: false,
            known_revision: 0,
            snapshot: (1, BTreeMap::new(), BTreeSet::new()),
            next_lease: 1,
            late_writes: Vec::new(),
            events: VecDeque::new(),
            watched: BTreeSet::new(),
        }
    }

    fn notify(&mut self, key: &str) {
        if self.watched.contains(key) {
            let stored = self.keys.get(key).cloned();
            self.events
                .push_back((key.to_owned(), self.revision, stored));
        }
    }

    fn put(&mut self, key: &str, lease: i64, value: Vec<u8>) {
        let mod_revision = self.revision;
        let stored = StoredKey {
            lease,
            mod_revision,
            value,
        };
        self.keys.insert(key.to_owned(), stored);
        self.notify(key);
    }

    fn delete(&mut self, key: &str) {
        if self.keys.remove(key).is_some() {
            self.notify(key);
        }
    }

    fn end_lease(&mut self, lease: i64) {
        self.revision += 1;
        self.leases.remove(&lease);
        let is_under = |(_, stored): &(&String, &StoredKey)| stored.lease == lease;
        let keys = self.keys.iter().filter(is_under);
        let keys: Vec<String> = keys.map(|(key, _)| key.clone()).collect();
        for key in keys {
            self.delete(&key);
        }
    }

    /// Applies a write. Returns whether its comparisons hold; `None` if its lease does not exist.
    fn apply_write(&mut self, write: &Write) -> Option<bool> {
        let mod_revision = |key: &String| self.keys.get(key).map_or(0, |key| key.mod_revision);
        let mut compared = write.unchanged.iter();
        if !compared.all(|(key, revision)| mod_revision(key) == *revision) {
            return Some(false);
        }
        if !write.puts.is_empty() && !self.leases.contains(&write.lease) {
            return None;
        }
        self.revision += 1;
        for (key, value) in &write.puts {
            self.put(key, write.lease, value.clone());
        }
        for key in &write.deletes {
            self.delete(key);
        }
        Some(true)
    }

    fn read(&self, keys: impl Iterator<Item = String>) -> Vec<Option<StoredKey>> {
        keys.map(|key| self.keys.get(&key).cloned()).collect()
    }

    fn comparisons(&self, keys: impl Iterator<Item = String>) -> Vec<(String, i64)> {
        let revision = |key: &String| self.keys.get(key).map_or(0, |key| key.mod_revision);
        keys.map(|key| (key.clone(), revision(&key))).collect()
    }

    /// The executor's part of an action: the result of a read, or a write.
    fn plan(&self, action: &Action) -> std::result::Result<ActionOutcome, Write> {
        match action {
            Action::Ensure(ensure) => {
                let record_keys = || ensure.records.iter().map(|(key, _)| key.clone());
                let stale_keys = || ensure.stale_keys.iter().cloned();
                match ensure.plan(&self.read(record_keys()), &self.read(stale_keys())) {
                    WritePlan::UpToDate => Ok(ActionOutcome::Ensured {
                        read_at: self.revision,
                        revision: self.revision,
                    }),
                    WritePlan::Superseded { by } => Ok(ActionOutcome::Superseded { by }),
                    WritePlan::Write { put, delete } => {
                        let deletes = delete.iter().map(|at| ensure.stale_keys[*at].clone());
                        Err(Write {
                            unchanged: self.comparisons(record_keys().chain(stale_keys())),
                            puts: put.iter().map(|at| ensure.records[*at].clone()).collect(),
                            deletes: deletes.collect(),
                            lease: ensure.lease,
                        })
                    }
                }
            }
            Action::Delete {
                keys, own_leases, ..
            } => {
                let stored = |key: &String| self.keys.get(key);
                let is_own = |key: &&String| stored(key).is_some_and(|k| k.is_own(own_leases));
                let own: Vec<String> = keys.iter().filter(is_own).cloned().collect();
                if own.is_empty() {
                    let (read_at, revision) = (self.revision, self.revision);
                    return Ok(ActionOutcome::Deleted { read_at, revision });
                }
                Err(Write {
                    unchanged: self.comparisons(own.iter().cloned()),
                    puts: Vec::new(),
                    deletes: own,
                    lease: 0,
                })
            }
            _ => Ok(ActionOutcome::Revoked),
        }
    }

    fn perform(&mut self, action: &Action) -> ActionOutcome {
        match action {
            Action::Grant => {
                let lease = self.next_lease;
                self.next_lease += 1;
                self.leases.insert(lease);
                self.renewed_at.insert(lease, self.now.instant);
                ActionOutcome::Granted { lease, ttl: TTL }
            }
            Action::Renew { lease } if self.leases.contains(lease) => {
                self.renewed_at.insert(*lease, self.now.instant);
                ActionOutcome::Renewed {
                    sent_at: self.now.instant,
                }
            }
            Action::Renew { .. } => ActionOutcome::LeaseGone,
            Action::Revoke { lease } => {
                self.end_lease(*lease);
                ActionOutcome::Revoked
            }
            Action::Ensure(_) | Action::Delete { .. } => match self.plan(action) {
                Ok(outcome) => outcome,
                Err(write) => {
                    let read_at = self.revision;
                    let applied = self.apply_write(&write);
                    let revision = self.revision;
                    match applied {
                        None => ActionOutcome::LeaseGone,
                        Some(_) if matches!(action, Action::Delete { .. }) => {
                            ActionOutcome::Deleted { read_at, revision }
                        }
                        Some(_) => ActionOutcome::Ensured { read_at, revision },
                    }
                }
            },
        }
    }

    /// Watches the keys that the reconciler asks for. Each new watch reports its start.
    fn update_watches(&mut self) {
        let wanted: BTreeSet<String> = self.reconciler.watched_keys().cloned().collect();
        let started: Vec<String> = wanted.difference(&self.watched).cloned().collect();
        self.events.retain(|(key, ..)| wanted.contains(key));
        self.watched = wanted;
        for key in started {
            self.on_key_event(key, KeyEvent::Started);
        }
    }

    fn restart_watches(&mut self) {
        self.events.clear();
        self.watched.clear();
        self.update_watches();
    }

    fn on_key_event(&mut self, key: String, event: KeyEvent) {
        self.reconciler
            .on_event(Event::Key { key, event }, self.now);
    }

    fn finish(&mut self, action: Action, outcome: ActionOutcome) {
        match outcome {
            ActionOutcome::Granted { .. } => {
                self.is_restored = false;
                self.known_revision = 0;
            }
            ActionOutcome::Ensured { read_at, revision }
            | ActionOutcome::Deleted { read_at, revision } => {
                self.has_hidden_restore |= self.is_restored && read_at >= self.known_revision;
                self.is_restored = false;
                self.known_revision = revision;
            }
            _ => {}
        }
        self.reconciler
            .on_event(Event::Finished { action, outcome }, self.now);
    }

    fn step(&mut self) -> Option<Action> {
        let step = self.reconciler.step(self.now);
        self.update_watches();
        self.assert_deregistered_are_gone();
        match step {
            Step::Perform(action) => Some(action),
            Step::SleepUntil(at) => {
                assert!(at.is_none_or(|at| at > self.now.instant), "busy loop");
                None
            }
        }
    }

    /// An instance is reported as deregistered only once etcd has none of its keys.
    fn assert_deregistered_are_gone(&self) {
        if self.has_returning_keys {
            return;
        }
        for (id, handle) in &self.handles {
            // etcd deletes the keys of a lease after the TTL by itself.
            let is_alive = |lease: &i64| {
                let renewed_at = self.renewed_at.get(lease);
                renewed_at.is_some_and(|at| self.now.instant < *at + TTL)
            };
            // A key that instances share may belong to the other one, or will soon.
            let is_its = |key: &&StoredKey| is_alive(&key.lease) && key.value.first() == Some(id);
            let its_keys = keys(*id).into_iter().filter(|key| !self.is_desired(key));
            let left = its_keys.filter_map(|key| self.keys.get(&key)).find(is_its);
            let state = handle.status.borrow().state.clone();
            let is_gone = state != RegistrationState::Deregistered || left.is_none();
            assert!(is_gone, "{id} is deregistered, but has {left:?}");
        }
    }

    fn work(&mut self, actions: u8) {
        for _ in 0..actions {
            let Some(action) = self.step() else { return };
            let outcome = self.perform(&action);
            self.finish(action, outcome);
        }
    }

    fn work_late(&mut self) {
        let Some(action) = self.step() else { return };
        let outcome = self.perform(&action);
        self.apply_late_writes();
        self.deliver_events(usize::MAX);
        self.finish(action, outcome);
    }

    fn lose_response(&mut self, effect: ActionEffect) {
        let Some(action) = self.step() else { return };
        match effect {
            ActionEffect::Applied => drop(self.perform(&action)),
            ActionEffect::Dropped => {}
            ActionEffect::Late => {
                if let Err(write) = self.plan(&action) {
                    self.late_writes.push(write);
                    self.has_returning_keys = true;
                }
            }
        }
        let error = Error::Timeout {
            operation: "test".into(),
            after: Duration::ZERO,
            reason: "text".into(),
        };
        self.finish(action, ActionOutcome::Failed(error));
    }

    fn refuse_lease(&mut self) {
        let Some(action) = self.step() else { return };
        let outcome = match action {
            Action::Renew { .. } | Action::Revoke { .. } => {
                ActionOutcome::LeaseRefused(Error::Rpc {
                    operation: "test".into(),
                    status: Box::new(Status::permission_denied("test")),
                })
            }
            _ => self.perform(&action),
        };
        self.finish(action, outcome);
    }

    fn apply_late_writes(&mut self) {
        for write in std::mem::take(&mut self.late_writes) {
            self.apply_write(&write);
        }
    }

    fn deliver_events(&mut self, events: usize) {
        for _ in 0..events {
            let Some((key, revision, stored)) = self.events.pop_front() else {
                return;
            };
            self.on_key_event(key, KeyEvent::Changed { revision, stored });
            self.update_watches();
        }
    }

    fn advance(&mut self, time: Duration) {
        self.now.instant += time;
        self.now.wall += time;
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Register(id, ready) => self.register(id, ready),
            Op::Update(id, to) => {
                if let Some((value, _)) = self.desired.get_mut(&id) {
                    *value = vec![id, to];
                    let target = target(id, value);
                    let updated = self.reconciler.update(&self.handles[&id].id, target);
                    assert!(updated.is_some());
                }
            }
            Op::Deregister(id) => {
                if self.desired.remove(&id).is_some() {
                    self.reconciler.deregister(&self.handles[&id].id);
                }
            }
            Op::SetReady(id, is_ready) => {
                if let Some((_, ready)) = self.desired.get_mut(&id) {
                    *ready = is_ready;
                    let readiness = match is_ready {
                        true => Readiness::Ready,
                        false => Readiness::NotReady,
                    };
                    let id = &self.handles[&id].id;
                    assert!(self.reconciler.set_ready(id, readiness, self.now));
                }
            }
            Op::Work(actions) => self.work(actions),
            Op::WorkLate => self.work_late(),
            Op::LoseResponse(effect) => self.lose_response(effect),
            Op::RefuseLease => self.refuse_lease(),
            Op::ApplyLateWrites => self.apply_late_writes(),
            Op::DeliverEvents(events) => self.deliver_events(events.into()),
            Op::RestartWatches => self.restart_watches(),
            Op::Overwrite(key) => {
                self.revision += 1;
                self.put(&name(key), 0, b"by hand".to_vec());
            }
            Op::Delete(key) => {
                self.revision += 1;
                self.delete(&name(key));
            }
            Op::RegisterForeign(key) => {
                self.revision += 1;
                self.leases.insert(FOREIGN + i64::from(key));
                self.put(&name(key), FOREIGN + i64::from(key), b"theirs".to_vec());
            }
            Op::EndForeign(key) => self.end_lease(FOREIGN + i64::from(key)),
            Op::EndLease => {
                let mut own = self.leases.iter().filter(|lease| **lease < FOREIGN);
                if let Some(lease) = own.next_back().copied() {
                    self.end_lease(lease);
                }
            }
            Op::Wipe => self.restore((1, BTreeMap::new(), BTreeSet::new())),
            Op::TakeSnapshot => {
                self.snapshot = (self.revision, self.keys.clone(), self.leases.clone());
            }
            Op::Restore => {
                self.is_restored = true;
                self.has_returning_keys = true;
                self.restore(self.snapshot.clone());
            }
            Op::Advance(millis) => self.advance(Duration::from_millis(millis.into())),
        }
    }

    fn register(&mut self, id: u8, ready: bool) {
        let value = vec![id];
        let desired = if ready {
            Desired::Registered
        } else {
            Desired::HeldBack
        };
        let registered = self
            .reconciler
            .register(target(id, &value), desired, self.now);
        let is_free = keys(id).iter().all(|key| !self.is_desired(key));
        assert_eq!(registered.is_ok(), is_free);
        if let Ok(handle) = registered {
            self.handles.insert(id, handle);
            self.desired.insert(id, (value, ready));
        }
    }

    fn restore(&mut self, snapshot: (i64, BTreeMap<String, StoredKey>, BTreeSet<i64>)) {
        (self.revision, self.keys, self.leases) = snapshot;
        self.late_writes.clear();
        self.restart_watches();
    }

    /// Lets time pass without faults, until everything has settled and the leases that the
    /// reconciler does not renew have expired.
    fn quiesce(&mut self) {
        self.settle();
        let renewed = self.reconciler.lease.map(|lease| lease.id());
        let is_expired = |lease: &&i64| **lease < FOREIGN && Some(**lease) != renewed;
        let expired: Vec<i64> = self.leases.iter().filter(is_expired).copied().collect();
        for lease in expired {
            self.end_lease(lease);
        }
        self.settle();
    }

    fn settle(&mut self) {
        for _ in 0..60 {
            self.work(50);
            self.apply_late_writes();
            self.deliver_events(usize::MAX);
            self.advance(TTL / 9);
        }
    }

    fn is_desired(&self, key: &String) -> bool {
        self.desired.keys().any(|id| keys(*id).contains(key))
    }

    fn check(&self) -> std::result::Result<(), TestCaseError> {
        for id in 0..3 {
            self.check_instance(id)?;
        }
        Ok(())
    }

    fn check_instance(&self, id: u8) -> std::result::Result<(), TestCaseError> {
        let stored: Vec<_> = keys(id).iter().map(|key| self.keys.get(key)).collect();
        let is_foreign = |key: &&StoredKey| key.lease >= FOREIGN;
        let handle = self.handles.get(&id);
        let state = handle.map(|handle| handle.status.borrow().state.clone());
        match self.desired.get(&id) {
            Some((_, true)) if stored.iter().flatten().any(is_foreign) => {
                let is_superseded = matches!(state, Some(RegistrationState::Superseded { .. }));
                prop_assert!(is_superseded, "{id}: {state:?}");
            }
            Some((value, true)) => {
                let is_right =
                    |key: &StoredKey| key.value == *value && self.leases.contains(&key.lease);
                let are_right = stored.iter().all(|key| key.is_some_and(is_right));
                prop_assert!(are_right, "{id}: {stored:?}, not {value:?}, {state:?}");
                prop_assert_eq!(state, Some(RegistrationState::Registered));
            }
            desired => {
                // A key of a deregistered instance may belong to another instance by now.
                let is_its = |key: &String| desired.is_some() || !self.is_desired(key);
                let its_keys = keys(id).into_iter().filter(is_its);
                let mut stored = its_keys.filter_map(|key| self.keys.get(&key));
                let own = stored.find(|key| key.lease != 0 && !is_foreign(key));
                // A key that was deleted since the snapshot may stay under the lease that the
                // registrar keeps, if no revision shows that etcd was restored: the response to the
                // deletion was lost, or others have written as much since then.
                let may_stay = self.has_hidden_restore;
                prop_assert!(may_stay || own.is_none(), "{id} is still in etcd: {own:?}");
                let is_right = match state {
                    Some(RegistrationState::Unready { .. }) => desired.is_some(),
                    Some(RegistrationState::Deregistered) | None => desired.is_none(),
                    _ => false,
                };
                prop_assert!(is_right, "{id}: {state:?}");
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// After any sequence of operations, etcd and every handle reach the desired state.
    #[test]
    fn etcd_and_handles_converge(ops in proptest::collection::vec(op(), 0..60)) {
        let mut harness = Harness::new();
        for op in ops {
            harness.apply(op);
        }
        harness.quiesce();
        harness.check()?;
        // When the other processes end, every registration returns.
        for key in 0..KEYS {
            harness.end_lease(FOREIGN + i64::from(key));
        }
        harness.quiesce();
        harness.check()?;
    }
}
