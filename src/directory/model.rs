//! Checks the state machine against a model of etcd with random histories, pages, events, losses
//! and wipes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use proptest::prelude::*;

use super::event::{Action, Changes, Event, KeyValueAt, Page};
use super::state::ListWatchState;
use crate::format::EtcdNaming;
use crate::snapshot::Snapshot;

const RANGE: &str = "services/a/";

/// One step of a history.
#[derive(Debug, Clone)]
enum Op {
    /// A transaction that sets keys to a port, or deletes them (`None`).
    Write(BTreeMap<u8, Option<u16>>),
    /// The next exchange of the state machine with etcd.
    Exchange(Sizes),
    /// The exchange fails.
    Loss,
    /// etcd starts over with no data. Every connection ends.
    Wipe,
}

#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// Keys in a page.
    page: usize,
    /// Revisions in a message of the watch.
    revisions: usize,
    /// Revisions that the watch sends a second time.
    repeated: usize,
}

fn op() -> impl Strategy<Value = Op> {
    let write = proptest::collection::btree_map(0u8..8, proptest::option::of(0u16..4), 1..4);
    prop_oneof![
        10 => write.prop_map(Op::Write),
        10 => (1usize..5, 1usize..4, 0usize..3).prop_map(|(page, revisions, repeated)| {
            Op::Exchange(Sizes { page, revisions, repeated })
        }),
        2 => Just(Op::Loss),
        1 => Just(Op::Wipe),
    ]
}

type State = BTreeMap<u8, (i64, u16)>;

/// An etcd that remembers its whole history.
struct Etcd {
    /// The state at each revision from 1 on, with the changes of that revision.
    history: Vec<(State, Vec<KeyValueAt>)>,
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

    fn at(&self, revision: i64) -> &(State, Vec<KeyValueAt>) {
        &self.history[revision as usize - 1]
    }

    fn write(&mut self, transaction: BTreeMap<u8, Option<u16>>) {
        let revision = self.revision() + 1;
        let mut state = self.at(self.revision()).0.clone();
        let mut changed = Vec::new();
        for (id, address) in transaction {
            match address {
                Some(address) => drop(state.insert(id, (revision, address))),
                // etcd has no event for the deletion of an absent key.
                None if state.remove(&id).is_none() => continue,
                None => {}
            }
            changed.push(entry(id, revision, address));
        }
        // A transaction that changes nothing has no revision either.
        if !changed.is_empty() {
            self.history.push((state, changed));
        }
    }
}

fn entry(id: u8, mod_revision: i64, address: Option<u16>) -> KeyValueAt {
    KeyValueAt {
        key: format!("{RANGE}{id}").into_bytes(),
        // Irrelevant, because every value can be decoded.
        create_revision: 1,
        mod_revision,
        value: address.map(|address| format!(r#"{{"Addr":"h:{address}"}}"#).into_bytes()),
    }
}

/// The state machine and a model of its driver. The open watch is represented by the last revision
/// that it has sent.
struct Harness {
    etcd: Etcd,
    state: ListWatchState<i64>,
    /// Whether no live snapshot has shown this etcd yet: until then the revision may go back.
    fresh: bool,
    /// The revision of the last snapshot.
    last: i64,
}

impl Harness {
    fn new(by_address: bool) -> Self {
        let format = Arc::new(EtcdNaming);
        let state = ListWatchState::new(format, "services".into(), "a".into());
        let state = if by_address {
            state.by_address()
        } else {
            state
        };
        Self {
            etcd: Etcd::new(),
            state,
            fresh: true,
            last: 0,
        }
    }

    fn apply(&mut self, op: Op) -> Result<(), TestCaseError> {
        match op {
            Op::Write(transaction) => self.etcd.write(transaction),
            Op::Wipe => {
                self.etcd = Etcd::new();
                self.fresh = true;
                self.step(lost_event())?;
            }
            Op::Loss => self.step(lost_event())?,
            Op::Exchange(sizes) => self.exchange(sizes)?,
        }
        Ok(())
    }

    /// Performs the next action of the state machine as etcd would respond.
    fn exchange(&mut self, sizes: Sizes) -> Result<(), TestCaseError> {
        let event = match self.state.action() {
            Action::List { from, revision } => {
                let now = self.etcd.revision();
                let (stored, _) = self.etcd.at(revision.unwrap_or(now));
                let mut entries: Vec<KeyValueAt> = stored
                    .iter()
                    .map(|(id, (mod_revision, address))| entry(*id, *mod_revision, Some(*address)))
                    .filter(|entry| entry.key.as_slice() >= from)
                    .collect();
                let more = entries.len() > sizes.page;
                entries.truncate(sizes.page);
                // Like etcd, a page reports the newest revision even if it is of an older one.
                let revision = now;
                Event::Page(Page {
                    entries,
                    more,
                    revision,
                })
            }
            Action::Watch { from_revision, .. } => Event::WatchOpened(from_revision - 1),
            Action::Receive(sent) => {
                let up_to = (*sent + sizes.revisions as i64).min(self.etcd.revision());
                let since = (*sent - sizes.repeated as i64).max(0);
                let entries: Vec<KeyValueAt> = (since + 1..=up_to)
                    .flat_map(|revision| self.etcd.at(revision).1.clone())
                    .collect();
                *sent = up_to;
                let Some(revision) = entries.last().map(|entry| entry.mod_revision) else {
                    return Ok(());
                };
                Event::Changes(Changes { entries, revision })
            }
            Action::Backoff => Event::BackoffElapsed,
        };
        self.step(event)
    }

    fn step(&mut self, event: Event<i64>) -> Result<(), TestCaseError> {
        if self.state.step(event, SystemTime::now()) {
            let snapshot = self.state.snapshot();
            self.check(&snapshot)?;
        }
        Ok(())
    }

    /// Checks that a snapshot is a state that etcd had, and not older than the snapshot before it.
    /// A stale snapshot may be of an etcd that was wiped since.
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
        let (stored, _) = self.etcd.at(snapshot.revision());
        // By snapshot key. If several keys hold one address the newest one counts, and among keys
        // of one transaction the last one.
        let mut written: Vec<(&u8, &(i64, u16))> = stored.iter().collect();
        written.sort_by_key(|(_, (mod_revision, _))| *mod_revision);
        let by_address = self.state.is_by_address();
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

fn lost_event() -> Event<i64> {
    let reason = "lost".into();
    Event::Lost { reason }
}

proptest! {
    #[test]
    fn snapshots_are_states_of_etcd_and_converge(
        ops in proptest::collection::vec(op(), 0..80),
        by_address: bool,
    ) {
        let mut harness = Harness::new(by_address);
        for op in ops {
            harness.apply(op)?;
        }
        // Without further writes the state machine catches up.
        for _ in 0..200 {
            harness.exchange(Sizes { page: 2, revisions: 2, repeated: 1 })?;
        }
        let snapshot = harness.state.snapshot();
        prop_assert!(snapshot.freshness().is_live());
        harness.check(&snapshot)?;
        let (truth, _) = harness.etcd.at(harness.etcd.revision());
        if !by_address {
            prop_assert_eq!(snapshot.len(), truth.len());
        }
        let (shown, _) = harness.etcd.at(snapshot.revision());
        prop_assert_eq!(shown, truth);
    }
}
