//! The step function against a model of etcd and of others who write there: answers that are lost, writes
//! that arrive late, watches with gaps, leases that end, wipes, and a clock that jumps.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::SystemTime;

use proptest::prelude::*;

use super::*;

const TTL: Duration = Duration::from_secs(9);

/// The leases of another registrar are above this.
const FOREIGN: i64 = 1_000;

/// How many keys there are.
const KEYS: u8 = 4;

#[derive(Debug, Clone)]
enum Happening {
    /// The handles: register, ready or not, change, withdraw, ready or not. By the instance.
    Register(u8, bool),
    Update(u8, u8),
    Withdraw(u8),
    Ready(u8, bool),
    /// The registrar takes steps and etcd does what it asks for, in so many exchanges.
    Work(u8),
    /// One exchange, whose answer is lost; and whether it was done, is never done, or is done later.
    Lost(Fate),
    /// What is late arrives.
    Late,
    /// So many events arrive.
    Hear(u8),
    /// The watches are lost, with what they had to tell, and begin again.
    Gap,
    /// By hand. From here on by the key.
    Overwrite(u8),
    Delete(u8),
    /// Another process registers it, or leaves.
    Foreign(u8),
    ForeignGone(u8),
    /// The lease ends, by hand or by expiry.
    LeaseEnds,
    Wipe,
    Time(u16),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Done,
    Never,
    Late,
}

fn happening() -> impl Strategy<Value = Happening> {
    use Happening::*;
    let (id, key) = (0u8..3, 0u8..KEYS);
    let fate = prop_oneof![Just(Fate::Done), Just(Fate::Never), Just(Fate::Late)];
    prop_oneof![
        4 => (id.clone(), any::<bool>()).prop_map(|(id, ready)| Register(id, ready)),
        2 => (id.clone(), any::<u8>()).prop_map(|(id, value)| Update(id, value)),
        2 => id.clone().prop_map(Withdraw),
        2 => (id, any::<bool>()).prop_map(|(id, ready)| Ready(id, ready)),
        8 => (1u8..5).prop_map(Work),
        5 => fate.prop_map(Lost),
        3 => Just(Late),
        6 => (1u8..6).prop_map(Hear),
        2 => Just(Gap),
        1 => key.clone().prop_map(Overwrite),
        1 => key.clone().prop_map(Delete),
        1 => key.clone().prop_map(Foreign),
        1 => key.prop_map(ForeignGone),
        1 => Just(LeaseEnds),
        1 => Just(Wipe),
        4 => (1u16..5_000).prop_map(Time),
    ]
}

/// A transaction on its way, with the revisions that it compares with.
struct Write {
    unchanged: Vec<(String, i64)>,
    puts: Vec<(String, Vec<u8>)>,
    deletes: Vec<String>,
    lease: i64,
}

struct Bench {
    reconciler: Reconciler,
    now: Now,
    tickets: BTreeMap<u8, Ticket>,
    desired: BTreeMap<u8, (Vec<u8>, bool)>,
    revision: i64,
    keys: BTreeMap<String, Held>,
    leases: BTreeSet<i64>,
    next_lease: i64,
    late: Vec<Write>,
    untold: VecDeque<(String, i64, Option<Held>)>,
    watched: BTreeSet<String>,
}

fn name(key: u8) -> String {
    format!("k{key}")
}

/// The first is the instance's own. The last key is that of two instances, one after the other.
fn keys(id: u8) -> Vec<String> {
    let shared = (id < 2).then_some(KEYS - 1);
    [id].into_iter().chain(shared).map(name).collect()
}

fn pairs(id: u8, value: &[u8]) -> Pairs {
    let pair = |key| (key, value.to_vec());
    keys(id).into_iter().map(pair).collect()
}

impl Bench {
    fn new() -> Self {
        Self {
            reconciler: Reconciler::new(),
            now: Now {
                instant: Instant::now(),
                wall: SystemTime::UNIX_EPOCH,
            },
            tickets: BTreeMap::new(),
            desired: BTreeMap::new(),
            revision: 1,
            keys: BTreeMap::new(),
            leases: BTreeSet::new(),
            next_lease: 1,
            late: Vec::new(),
            untold: VecDeque::new(),
            watched: BTreeSet::new(),
        }
    }

    fn tell(&mut self, key: &str) {
        if self.watched.contains(key) {
            let held = self.keys.get(key).cloned();
            self.untold.push_back((key.to_owned(), self.revision, held));
        }
    }

    fn put(&mut self, key: &str, lease: i64, value: Vec<u8>) {
        let mod_revision = self.revision;
        let held = Held {
            lease,
            mod_revision,
            value,
        };
        self.keys.insert(key.to_owned(), held);
        self.tell(key);
    }

    fn delete(&mut self, key: &str) {
        if self.keys.remove(key).is_some() {
            self.tell(key);
        }
    }

    fn end_lease(&mut self, lease: i64) {
        self.revision += 1;
        self.leases.remove(&lease);
        let of = |(key, held): (&String, &Held)| (held.lease == lease).then(|| key.clone());
        let keys: Vec<String> = self.keys.iter().filter_map(of).collect();
        for key in keys {
            self.delete(&key);
        }
    }

    /// `None`: the lease is not there.
    fn apply(&mut self, write: &Write) -> Option<bool> {
        let unchanged = |(key, revision): &(String, i64)| {
            self.keys.get(key).map_or(0, |held| held.mod_revision) == *revision
        };
        if !write.unchanged.iter().all(unchanged) {
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

    fn found(&self, keys: impl Iterator<Item = String>) -> Vec<Option<Held>> {
        keys.map(|key| self.keys.get(&key).cloned()).collect()
    }

    fn compared(&self, keys: impl Iterator<Item = String>) -> Vec<(String, i64)> {
        let revision = |key: &String| self.keys.get(key).map_or(0, |held| held.mod_revision);
        keys.map(|key| (key.clone(), revision(&key))).collect()
    }

    /// What the exchange does at etcd: nothing more than reading, or a write.
    fn plan(&self, action: &Action) -> std::result::Result<Outcome, Write> {
        match action {
            Action::Ensure(ensure) => {
                let pairs = || ensure.pairs.iter().map(|(key, _)| key.clone());
                let gone = || ensure.gone.iter().cloned();
                match ensure.judge(&self.found(pairs()), &self.found(gone())) {
                    Verdict::Fine => Ok(Outcome::Ensured {
                        revision: self.revision,
                    }),
                    Verdict::Superseded { by } => Ok(Outcome::Superseded { by }),
                    Verdict::Write { put, delete } => Err(Write {
                        unchanged: self.compared(pairs().chain(gone())),
                        puts: put.iter().map(|at| ensure.pairs[*at].clone()).collect(),
                        deletes: delete.iter().map(|at| ensure.gone[*at].clone()).collect(),
                        lease: ensure.lease,
                    }),
                }
            }
            Action::Delete { keys, ours, .. } => {
                let mine = |key: &&String| self.keys.get(*key).is_some_and(|h| is_ours(h, ours));
                let mine: Vec<String> = keys.iter().filter(mine).cloned().collect();
                if mine.is_empty() {
                    return Ok(Outcome::Done);
                }
                Err(Write {
                    unchanged: self.compared(mine.iter().cloned()),
                    puts: Vec::new(),
                    deletes: mine,
                    lease: 0,
                })
            }
            _ => Ok(Outcome::Done),
        }
    }

    fn done(&mut self, action: &Action) -> Outcome {
        match action {
            Action::Grant => {
                let lease = self.next_lease;
                self.next_lease += 1;
                self.leases.insert(lease);
                Outcome::Granted { lease, ttl: TTL }
            }
            Action::Renew { lease } if self.leases.contains(lease) => Outcome::Renewed,
            Action::Renew { .. } => Outcome::LeaseGone,
            Action::Revoke { lease } => {
                self.end_lease(*lease);
                Outcome::Done
            }
            Action::Ensure(_) | Action::Delete { .. } => match self.plan(action) {
                Ok(outcome) => outcome,
                Err(write) => match self.apply(&write) {
                    None => Outcome::LeaseGone,
                    Some(_) if matches!(action, Action::Delete { .. }) => Outcome::Done,
                    Some(_) => Outcome::Ensured {
                        revision: self.revision,
                    },
                },
            },
        }
    }

    /// Watches what is to be watched; each new watch says that it has begun.
    fn watch(&mut self) {
        let wanted: BTreeSet<String> = self.reconciler.to_watch().cloned().collect();
        let begun: Vec<String> = wanted.difference(&self.watched).cloned().collect();
        self.untold.retain(|(key, ..)| wanted.contains(key));
        self.watched = wanted;
        for key in begun {
            self.reconciler.heard(&key, &Heard::Begun, self.now);
        }
    }

    fn step(&mut self) -> Option<Action> {
        let next = self.reconciler.next(self.now);
        self.watch();
        match next {
            Next::Do(action) => Some(action),
            Next::WaitUntil(at) => {
                assert!(at.is_none_or(|at| at > self.now.instant), "it would spin");
                None
            }
        }
    }

    fn work(&mut self, exchanges: u8) {
        for _ in 0..exchanges {
            let Some(action) = self.step() else { return };
            let outcome = self.done(&action);
            self.reconciler.finished(&action, outcome, self.now);
        }
    }

    fn lose(&mut self, fate: Fate) {
        let Some(action) = self.step() else { return };
        match fate {
            Fate::Done => drop(self.done(&action)),
            Fate::Never => {}
            Fate::Late => {
                if let Err(write) = self.plan(&action) {
                    self.late.push(write);
                }
            }
        }
        let (operation, after) = ("test".into(), Duration::ZERO);
        let error = Error::Timeout { operation, after };
        self.reconciler
            .finished(&action, Outcome::Failed(error), self.now);
    }

    fn arrive(&mut self) {
        for write in std::mem::take(&mut self.late) {
            self.apply(&write);
        }
    }

    fn hear(&mut self, events: usize) {
        for _ in 0..events {
            let Some((key, revision, held)) = self.untold.pop_front() else {
                return;
            };
            let heard = Heard::Changed { revision, held };
            self.reconciler.heard(&key, &heard, self.now);
            self.watch();
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now.instant += time;
        self.now.wall += time;
    }

    fn happens(&mut self, happening: Happening) {
        match happening {
            Happening::Register(id, ready) => {
                let value = vec![id];
                let registered = self.reconciler.register(pairs(id, &value), false, ready);
                let is_free = keys(id).iter().all(|key| !self.is_desired(key));
                assert_eq!(registered.is_ok(), is_free);
                if let Ok(ticket) = registered {
                    self.tickets.insert(id, ticket);
                    self.desired.insert(id, (value, ready));
                }
            }
            Happening::Update(id, to) => {
                if let Some((value, _)) = self.desired.get_mut(&id) {
                    *value = vec![id, to];
                    let pairs = pairs(id, value);
                    let token = self.tickets[&id].token;
                    assert!(
                        self.reconciler
                            .update(&name(id), token, pairs, false)
                            .is_some()
                    );
                }
            }
            Happening::Withdraw(id) => {
                if self.desired.remove(&id).is_some() {
                    let token = self.tickets[&id].token;
                    self.reconciler.withdraw(&name(id), token);
                }
            }
            Happening::Ready(id, is) => {
                if let Some((_, ready)) = self.desired.get_mut(&id) {
                    *ready = is;
                    let token = self.tickets[&id].token;
                    assert!(self.reconciler.set_ready(&name(id), token, is));
                }
            }
            Happening::Work(exchanges) => self.work(exchanges),
            Happening::Lost(fate) => self.lose(fate),
            Happening::Late => self.arrive(),
            Happening::Hear(events) => self.hear(events.into()),
            Happening::Gap => {
                self.untold.clear();
                self.watched.clear();
                self.watch();
            }
            Happening::Overwrite(key) => {
                self.revision += 1;
                self.put(&name(key), 0, b"by hand".to_vec());
            }
            Happening::Delete(key) => {
                self.revision += 1;
                self.delete(&name(key));
            }
            Happening::Foreign(key) => {
                self.revision += 1;
                self.leases.insert(FOREIGN + i64::from(key));
                self.put(&name(key), FOREIGN + i64::from(key), b"theirs".to_vec());
            }
            Happening::ForeignGone(key) => self.end_lease(FOREIGN + i64::from(key)),
            Happening::LeaseEnds => {
                if let Some(lease) = self.leases.iter().rfind(|lease| **lease < FOREIGN).copied() {
                    self.end_lease(lease);
                }
            }
            Happening::Wipe => {
                self.keys.clear();
                self.leases.clear();
                self.revision = 1;
                self.late.clear();
                self.untold.clear();
                self.watched.clear();
                self.watch();
            }
            Happening::Time(millis) => self.pass(Duration::from_millis(millis.into())),
        }
    }

    /// Everything that is on its way arrives, and etcd answers.
    fn calm(&mut self) {
        for _ in 0..60 {
            self.work(50);
            self.arrive();
            self.hear(usize::MAX);
            self.pass(TTL / 9);
        }
    }

    fn is_desired(&self, key: &String) -> bool {
        self.desired.keys().any(|id| keys(*id).contains(key))
    }

    fn check(&self) -> std::result::Result<(), TestCaseError> {
        for id in 0..3 {
            let held: Vec<_> = keys(id).iter().map(|key| self.keys.get(key)).collect();
            let is_foreign = |held: &&Held| held.lease >= FOREIGN;
            let state = self
                .tickets
                .get(&id)
                .map(|t| t.status.borrow().state.clone());
            match self.desired.get(&id) {
                Some((_, true)) if held.iter().flatten().any(is_foreign) => {
                    let superseded = matches!(state, Some(RegistrationState::Superseded { .. }));
                    prop_assert!(superseded, "{id}: {state:?}");
                }
                Some((value, true)) => {
                    let fine =
                        |held: &Held| held.value == *value && self.leases.contains(&held.lease);
                    let fine = held.iter().all(|held| held.is_some_and(fine));
                    prop_assert!(fine, "{id}: {held:?} and not {value:?}, {state:?}");
                    prop_assert_eq!(state, Some(RegistrationState::Registered));
                }
                wanted => {
                    // Else it is another instance's by now.
                    let is_its = |key: &String| wanted.is_some() || !self.is_desired(key);
                    let held = keys(id).into_iter().filter(is_its);
                    let mut held = held.filter_map(|key| self.keys.get(&key));
                    let ours = held.find(|held| held.lease != 0 && !is_foreign(held));
                    prop_assert!(ours.is_none(), "{id} is still there: {ours:?}");
                    let fine = match state {
                        Some(RegistrationState::Unready) => wanted.is_some(),
                        Some(RegistrationState::Deregistered) | None => wanted.is_none(),
                        _ => false,
                    };
                    prop_assert!(fine, "{id}: {state:?}");
                }
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn whatever_happens_in_the_end_etcd_has_what_it_should_and_each_knows_where_it_stands(
        happenings in proptest::collection::vec(happening(), 0..60),
    ) {
        let mut bench = Bench::new();
        for happening in happenings {
            bench.happens(happening);
        }
        bench.calm();
        bench.check()?;
        // And when the others go, all are back.
        for key in 0..KEYS {
            bench.end_lease(FOREIGN + i64::from(key));
        }
        bench.calm();
        bench.check()?;
    }
}
