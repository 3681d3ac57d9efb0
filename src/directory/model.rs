//! The state machine against a model of etcd: random histories, pages, events, losses and wipes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use proptest::prelude::*;

use super::state::{Entry, Input, Machine, Todo};
use crate::format::EtcdNaming;
use crate::snapshot::Snapshot;

const RANGE: &str = "services/a/";

/// What happens next.
#[derive(Debug, Clone)]
enum Happening {
    /// A transaction: keys that get a value, or go.
    Write(BTreeMap<u8, Option<u16>>),
    /// The machine's next exchange with etcd: so many keys to a page, so many revisions to a
    /// message, and so many that were sent before are sent again.
    Exchange {
        page: usize,
        revisions: usize,
        repeated: usize,
    },
    /// The exchange fails.
    Loss,
    /// etcd starts over with nothing in it. Every connection ends with it.
    Wipe,
}

fn happening() -> impl Strategy<Value = Happening> {
    let write = proptest::collection::btree_map(0u8..8, proptest::option::of(0u16..4), 1..4);
    prop_oneof![
        10 => write.prop_map(Happening::Write),
        10 => (1usize..5, 1usize..4, 0usize..3).prop_map(|(page, revisions, repeated)| {
            Happening::Exchange { page, revisions, repeated }
        }),
        2 => Just(Happening::Loss),
        1 => Just(Happening::Wipe),
    ]
}

type State = BTreeMap<u8, (i64, u16)>;

/// An etcd with all that ever was in it.
struct Etcd {
    /// The state at each revision from 1 on, and what changed in it.
    history: Vec<(State, Vec<Entry>)>,
}

impl Etcd {
    fn new() -> Self {
        let empty = (State::new(), Vec::new());
        Self {
            history: vec![empty],
        }
    }

    fn revision(&self) -> i64 {
        self.history.len() as i64
    }

    fn at(&self, revision: i64) -> &(State, Vec<Entry>) {
        &self.history[revision as usize - 1]
    }

    fn write(&mut self, transaction: BTreeMap<u8, Option<u16>>) {
        let revision = self.revision() + 1;
        let mut state = self.at(self.revision()).0.clone();
        let mut changed = Vec::new();
        for (id, address) in transaction {
            match address {
                Some(address) => drop(state.insert(id, (revision, address))),
                // etcd has no event for the deletion of what is not there.
                None if state.remove(&id).is_none() => continue,
                None => {}
            }
            changed.push(entry(id, revision, address));
        }
        // Nor a revision for a transaction that changes nothing.
        if !changed.is_empty() {
            self.history.push((state, changed));
        }
    }
}

fn entry(id: u8, mod_revision: i64, address: Option<u16>) -> Entry {
    Entry {
        key: format!("{RANGE}{id}").into_bytes(),
        // Of no account where every value can be decoded.
        create_revision: 1,
        mod_revision,
        value: address.map(|address| format!(r#"{{"Addr":"h:{address}"}}"#).into_bytes()),
    }
}

/// The machine, and what a driver would keep between its steps.
struct Bench {
    etcd: Etcd,
    machine: Machine,
    todo: Todo,
    /// Up to which revision the open watch has sent.
    sent: i64,
    /// Whether this etcd was shown yet: until then the revision may go back.
    fresh: bool,
    last: i64,
}

impl Bench {
    fn new(by_address: bool) -> Self {
        let machine = Machine::new(Arc::new(EtcdNaming), "services".into(), "a".into());
        let machine = if by_address {
            machine.by_address()
        } else {
            machine
        };
        Self {
            etcd: Etcd::new(),
            todo: machine.start(),
            machine,
            sent: 0,
            fresh: true,
            last: 0,
        }
    }

    fn happens(&mut self, happening: Happening) -> Result<(), TestCaseError> {
        match happening {
            Happening::Write(transaction) => self.etcd.write(transaction),
            Happening::Wipe => {
                self.etcd = Etcd::new();
                self.fresh = true;
                self.step(lost())?;
            }
            Happening::Loss => self.step(lost())?,
            Happening::Exchange {
                page,
                revisions,
                repeated,
            } => self.exchange(page, revisions, repeated)?,
        }
        Ok(())
    }

    /// Does what the machine asks for, as etcd would answer.
    fn exchange(
        &mut self,
        page: usize,
        revisions: usize,
        repeated: usize,
    ) -> Result<(), TestCaseError> {
        match &self.todo {
            Todo::List { from, revision } => {
                let now = self.etcd.revision();
                let (state, _) = self.etcd.at(revision.unwrap_or(now));
                let mut entries: Vec<Entry> = state
                    .iter()
                    .map(|(id, (mod_revision, address))| entry(*id, *mod_revision, Some(*address)))
                    .filter(|entry| entry.key >= *from)
                    .collect();
                let more = entries.len() > page;
                entries.truncate(page);
                // As etcd does, a page tells the newest revision even when it is of an older one.
                let revision = now;
                self.step(Input::Page {
                    entries,
                    more,
                    revision,
                })
            }
            Todo::Watch { from_revision } => {
                self.sent = from_revision - 1;
                self.step(Input::Watching)
            }
            Todo::Listen => {
                let up_to = (self.sent + revisions as i64).min(self.etcd.revision());
                let since = (self.sent - repeated as i64).max(0);
                let entries: Vec<Entry> = (since + 1..=up_to)
                    .flat_map(|revision| self.etcd.at(revision).1.clone())
                    .collect();
                self.sent = up_to;
                match entries.last().map(|entry| entry.mod_revision) {
                    Some(revision) => self.step(Input::Events { entries, revision }),
                    None => Ok(()),
                }
            }
            Todo::RelistAfterBackoff => {
                self.todo = self.machine.start();
                Ok(())
            }
        }
    }

    fn step(&mut self, input: Input) -> Result<(), TestCaseError> {
        let news;
        (self.todo, news) = self.machine.step(input, SystemTime::now());
        if news {
            let snapshot = self.machine.snapshot();
            self.check(&snapshot)?;
        }
        Ok(())
    }

    /// Each snapshot is a state that etcd had, and none is older than the one before it. A stale one
    /// may be of an etcd that has been wiped since.
    fn check(&mut self, snapshot: &Snapshot) -> Result<(), TestCaseError> {
        if self.fresh {
            if !snapshot.freshness().is_live() {
                return Ok(());
            }
            self.fresh = false;
            self.last = 0;
        }
        prop_assert!(snapshot.revision() >= self.last);
        self.last = snapshot.revision();
        let (state, _) = self.etcd.at(snapshot.revision());
        // With the keys they are shown under. By address, the one written last, of those that were written
        // together that of the last key.
        let mut written: Vec<(&u8, &(i64, u16))> = state.iter().collect();
        written.sort_by_key(|(_, (mod_revision, _))| *mod_revision);
        let by_address = self.machine.is_by_address();
        let truth: BTreeMap<String, (String, String)> = written
            .into_iter()
            .map(|(id, (_, address))| {
                let address = format!("h:{address}");
                let key = match by_address {
                    true => address.clone(),
                    false => format!("{RANGE}{id}"),
                };
                (key, (id.to_string(), address))
            })
            .collect();
        let shown: BTreeMap<String, (String, String)> = snapshot
            .iter()
            .map(|(key, i)| (key.to_string(), (i.id.clone(), i.address.clone())))
            .collect();
        prop_assert_eq!(shown, truth, "at revision {}", snapshot.revision());
        Ok(())
    }
}

fn lost() -> Input {
    let reason = "lost".into();
    Input::Lost { reason }
}

proptest! {
    #[test]
    fn whatever_happens_every_snapshot_is_a_state_that_etcd_had_and_the_last_is_the_truth(
        happenings in proptest::collection::vec(happening(), 0..80),
        by_address: bool,
    ) {
        let mut bench = Bench::new(by_address);
        for happening in happenings {
            bench.happens(happening)?;
        }
        // Then nothing more happens, and the machine catches up.
        for _ in 0..200 {
            bench.exchange(2, 2, 1)?;
        }
        let snapshot = bench.machine.snapshot();
        prop_assert!(snapshot.freshness().is_live());
        bench.check(&snapshot)?;
        let (truth, _) = bench.etcd.at(bench.etcd.revision());
        if !by_address {
            prop_assert_eq!(snapshot.len(), truth.len());
        }
        let (shown, _) = bench.etcd.at(snapshot.revision());
        prop_assert_eq!(shown, truth);
    }
}
