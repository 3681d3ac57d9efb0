//! Several sources as one service.
//!
//! Each source (a format under a prefix) lists and watches on its own, and what they show is put
//! together by address.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::watch;

use crate::instance::Instance;
use crate::snapshot::{Freshness, InstanceKey, Snapshot};

/// The snapshot of each source, and where the one that they make up is shown.
#[derive(Debug)]
pub(super) struct Sources {
    state: Mutex<State>,
    shown: watch::Sender<Arc<Snapshot>>,
}

#[derive(Debug)]
struct State {
    snapshots: Vec<Snapshot>,
    drained: Drained,
}

/// The revision at which what drains was last said to. Sources are heard of one after the other: that
/// an entry says so must outlive it, until the others are gone too or say otherwise later.
type Drained = BTreeMap<InstanceKey, i64>;

impl Sources {
    /// Takes the first snapshot of each, in the order of precedence.
    pub(super) fn begin(snapshots: Vec<Snapshot>) -> (Vec<Source>, watch::Receiver<Arc<Snapshot>>) {
        let count = snapshots.len();
        let mut drained = Drained::new();
        let (shown, receiver) = watch::channel(Arc::new(merged(&snapshots, &mut drained)));
        let sources = Arc::new(Self {
            state: Mutex::new(State { snapshots, drained }),
            shown,
        });
        let source = |at| Source {
            sources: Arc::clone(&sources),
            at,
        };
        ((0..count).map(source).collect(), receiver)
    }
}

/// One of several sources. When the last is dropped, what is shown will not change any more.
#[derive(Debug)]
pub(super) struct Source {
    sources: Arc<Sources>,
    at: usize,
}

impl Source {
    /// Shows what this source has now, with what the others had last.
    pub(super) fn show(&self, snapshot: Snapshot) {
        self.show_in(&mut self.state(), snapshot);
    }

    /// Shows that nothing keeps what this source has current, unless that is known.
    pub(super) fn abandon(&self) {
        // Nobody looks.
        if self.sources.shown.is_closed() {
            return;
        }
        let mut state = self.state();
        let mut last = state.snapshots[self.at].clone();
        if last.freshness.is_live() {
            last.freshness = Freshness::Stale {
                since: SystemTime::now(),
                reason: "nothing follows it any more".into(),
            };
            self.show_in(&mut state, last);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let state = self.sources.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }

    /// The state is held while the whole is shown, so that no older whole is shown after it.
    fn show_in(&self, state: &mut State, snapshot: Snapshot) {
        let State { snapshots, drained } = state;
        // Another history: its revisions cannot be compared with those before.
        if snapshot.revision < snapshots[self.at].revision {
            drained.clear();
        }
        snapshots[self.at] = snapshot;
        let whole = merged(snapshots, drained);
        self.sources.shown.send_replace(Arc::new(whole));
    }
}

/// The key of an instance where the address is what tells instances apart: the address, an IP
/// written in one way.
pub(super) fn key_of(instance: &Instance) -> InstanceKey {
    match instance.address.parse::<SocketAddr>() {
        Ok(address) => InstanceKey::new(address.to_string()),
        Err(_) => InstanceKey::new(instance.address.as_str()),
    }
}

/// One snapshot of them all. With several, each must be keyed by address.
fn merged(sources: &[Snapshot], drained: &mut Drained) -> Snapshot {
    let [first, others @ ..] = sources else {
        unreachable!("a directory has a source")
    };
    // One that tells apart by key has nothing to put together.
    if others.is_empty() && first.mod_revisions.is_empty() {
        drained.clear();
        return first.clone();
    }
    let mut instances = Arc::clone(&first.instances);
    for source in others {
        for (key, instance) in source.instances.iter() {
            if !instances.contains_key(key) {
                Arc::make_mut(&mut instances).insert(key.clone(), Arc::clone(instance));
            }
        }
    }
    *drained = draining(sources, drained);
    let differ: Vec<InstanceKey> = instances
        .iter()
        .filter(|(key, instance)| instance.draining != drained.contains_key(*key))
        .map(|(key, _)| key.clone())
        .collect();
    for key in differ {
        let draining = drained.contains_key(&key);
        if let Some(instance) = Arc::make_mut(&mut instances).get_mut(&key) {
            *instance = Arc::new(Instance::clone(instance).draining(draining));
        }
    }
    let ranges: Vec<&str> = sources.iter().map(Snapshot::range).collect();
    Snapshot {
        range: ranges.join(", ").into(),
        instances,
        mod_revisions: Arc::default(),
        revision: sources.iter().map(Snapshot::revision).min().unwrap_or(0),
        freshness: freshness(sources),
        undecodable: sources.iter().map(Snapshot::undecodable).sum(),
    }
}

/// Who drains, and since which revision: the entry that was written last says so, whatever is left
/// of a process that was there before; and what said so last and is gone still holds for as long as
/// all that is left is older.
///
/// Entries that were written in one transaction are of one registration, and not every format has a
/// place for it: one that says so is enough.
fn draining(sources: &[Snapshot], before: &Drained) -> Drained {
    let newest = |key| {
        let said = sources.iter().filter_map(|source| {
            let written = source.mod_revisions.get(key).copied().unwrap_or_default();
            Some((written, source.instances.get(key)?.draining))
        });
        said.max()
    };
    // Few of thousands, and none but these can be.
    let draining_now = sources.iter().flat_map(|source| {
        let instances = source.instances.iter();
        instances.filter(|(_, instance)| instance.draining)
    });
    draining_now
        .map(|(key, _)| key)
        .chain(before.keys())
        .filter_map(|key| {
            let said = newest(key)?;
            let remembered = before.get(key).map_or(said, |at| said.max((*at, true)));
            remembered.1.then(|| (key.clone(), remembered.0))
        })
        .collect()
}

/// Live when all are, otherwise as the one that has been stale the longest, with its name.
fn freshness(sources: &[Snapshot]) -> Freshness {
    let stale = sources.iter().filter_map(|source| match &source.freshness {
        Freshness::Stale { since, reason } => Some((*since, &source.range, reason)),
        Freshness::Live => None,
    });
    match stale.min_by_key(|(since, ..)| *since) {
        None => Freshness::Live,
        Some((since, range, reason)) => Freshness::Stale {
            since,
            reason: format!("{range}: {reason}").into(),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use proptest::prelude::*;

    use super::*;

    /// All of it written at `revision`.
    fn snapshot(range: &str, revision: i64, instances: &[Instance]) -> Snapshot {
        Snapshot {
            range: range.into(),
            instances: Arc::new(
                instances
                    .iter()
                    .map(|instance| (key_of(instance), Arc::new(instance.clone())))
                    .collect(),
            ),
            mod_revisions: Arc::new(
                instances
                    .iter()
                    .map(|instance| (key_of(instance), revision))
                    .collect(),
            ),
            revision,
            freshness: Freshness::Live,
            undecodable: 1,
        }
    }

    fn on(address: &str) -> Instance {
        Instance::new("a", address)
    }

    #[test]
    fn an_address_is_shown_once_as_the_first_source_says_and_until_it_is_gone_from_all() {
        let first = snapshot("x/", 5, &[on("h:1").weight(1), on("h:2")]);
        let second = snapshot("y/", 3, &[on("h:1").weight(2), on("h:3")]);
        let gone = snapshot("x/", 9, &[on("h:2")]);
        let (sources, shown) = Sources::begin(vec![first, second]);
        let look = || -> Vec<(String, u32)> {
            let shown = shown.borrow();
            assert!(shown.iter().all(|(key, _)| shown.get(key).is_some()));
            let look = |(key, instance): (&InstanceKey, &Arc<Instance>)| {
                assert_eq!(key.as_str(), instance.address);
                (key.to_string(), instance.weight)
            };
            shown.iter().map(look).collect()
        };
        let seen = |seen: &[(&str, u32)]| -> Vec<(String, u32)> {
            seen.iter().map(|(a, w)| ((*a).to_owned(), *w)).collect()
        };
        assert_eq!(look(), seen(&[("h:1", 1), ("h:2", 100), ("h:3", 100)]));
        assert_eq!(shown.borrow().revision(), 3);
        assert_eq!(shown.borrow().undecodable(), 2);
        assert_eq!(shown.borrow().range(), "x/, y/");
        sources[0].show(gone);
        assert_eq!(look(), seen(&[("h:1", 2), ("h:2", 100), ("h:3", 100)]));
        sources[1].show(snapshot("y/", 9, &[]));
        assert_eq!(look(), seen(&[("h:2", 100)]));
        assert_eq!(shown.borrow().revision(), 9);
    }

    /// What is shown of `h:1`: whether it drains, and the zone.
    fn seen(shown: &watch::Receiver<Arc<Snapshot>>) -> Option<(bool, String)> {
        let shown = shown.borrow();
        let instance = shown.instances().next()?;
        Some((instance.draining, instance.zone.clone().unwrap_or_default()))
    }

    #[test]
    fn the_entry_written_last_says_whether_it_drains_and_the_first_source_all_else() {
        let calm = || [on("h:1").zone("calm")];
        let draining = || [on("h:1").zone("draining").draining(true)];
        let x = |revision, what: &[Instance]| snapshot("x/", revision, what);
        let y = |revision, what: &[Instance]| snapshot("y/", revision, what);
        for (sources, drains, zone) in [
            ([x(1, &calm()), y(2, &draining())], true, "calm"),
            ([x(2, &draining()), y(1, &calm())], true, "draining"),
            // What a killed process left says nothing of the one that is there now.
            ([x(1, &draining()), y(2, &calm())], false, "draining"),
            ([x(2, &calm()), y(1, &draining())], false, "calm"),
            // In one transaction: one of the formats has no place for it.
            ([x(2, &calm()), y(2, &draining())], true, "calm"),
        ] {
            let (_sources, shown) = Sources::begin(sources.into());
            assert_eq!(seen(&shown), Some((drains, zone.to_owned())));
        }
    }

    #[test]
    fn who_drains_does_so_until_it_is_gone_from_all_or_a_later_entry_says_otherwise() {
        let calm = [on("h:1").zone("y")];
        let drains = [on("h:1").zone("x").draining(true)];
        let begin = || {
            let first = vec![snapshot("x/", 5, &drains), snapshot("y/", 4, &calm)];
            Sources::begin(first)
        };
        let is = |drains, zone: &str| Some((drains, zone.to_owned()));
        let (sources, shown) = begin();
        assert_eq!(seen(&shown), is(true, "x"));
        // It leaves, and one source hears of it before the other.
        sources[0].show(snapshot("x/", 6, &[]));
        assert_eq!(seen(&shown), is(true, "y"));
        sources[1].show(snapshot("y/", 6, &[]));
        assert_eq!(seen(&shown), None);
        // The next process at this address is another one.
        sources[1].show(snapshot("y/", 7, &calm));
        assert_eq!(seen(&shown), is(false, "y"));

        let (sources, shown) = begin();
        sources[0].show(snapshot("x/", 6, &[]));
        sources[1].show(snapshot("y/", 8, &calm));
        assert_eq!(seen(&shown), is(false, "y"));

        // In another history nothing is later or earlier than what was before.
        let (sources, shown) = begin();
        sources[0].show(snapshot("x/", 2, &[]));
        assert_eq!(seen(&shown), is(false, "y"));
    }

    #[test]
    fn a_single_source_that_tells_apart_by_address_remembers_as_well() {
        let drains = [on("h:1").draining(true)];
        let (sources, shown) = Sources::begin(vec![snapshot("x/", 5, &drains)]);
        // The entry that drained is gone; what is left of that address was written before it.
        let older = Snapshot {
            revision: 6,
            ..snapshot("x/", 4, &[on("h:1")])
        };
        sources[0].show(older);
        assert_eq!(seen(&shown), Some((true, String::new())));
    }

    proptest! {
        /// Against the rule said another way: of all entries of the address since it came, in
        /// whatever order the sources tell of them, the newest draining one counts unless one that
        /// is there now is newer.
        #[test]
        fn whatever_is_heard_in_whatever_order(
            heard in proptest::collection::vec(
                (0usize..3, proptest::option::of((1i64..20, any::<bool>()))),
                1..20,
            ),
        ) {
            let entry = |at: Option<(i64, bool)>| match at {
                Some((revision, draining)) => Snapshot {
                    revision: 99,
                    ..snapshot("x/", revision, &[on("h:1").draining(draining)])
                },
                None => snapshot("x/", 99, &[]),
            };
            let mut now = [None; 3];
            let mut last_drain = None;
            let (sources, shown) = Sources::begin(now.map(entry).into());
            for (at, what) in heard {
                now[at] = what;
                sources[at].show(entry(what));
                let there = now.iter().flatten();
                let newest = there.clone().map(|(revision, _)| *revision).max();
                let drain = there.filter(|(_, draining)| *draining).map(|(at, _)| *at).max();
                last_drain = newest.and(last_drain.max(drain));
                // Once contradicted it is over.
                last_drain = last_drain.filter(|drain| Some(*drain) >= newest);
                let expected = newest.map(|_| last_drain.is_some());
                prop_assert_eq!(seen(&shown).map(|(draining, _)| draining), expected);
            }
        }
    }

    #[test]
    fn the_whole_is_stale_as_long_as_a_source_is_and_says_which() {
        let stale = |range: &str, seconds| Snapshot {
            freshness: Freshness::Stale {
                since: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
                reason: "cut".into(),
            },
            ..snapshot(range, 1, &[on("h:1")])
        };
        let live = || snapshot("z/", 1, &[on("h:2")]);
        let (sources, shown) = Sources::begin(vec![live(), stale("x/", 7), stale("y/", 5)]);
        let freshness = || shown.borrow().freshness().clone();
        let said = |range: &str, seconds| Freshness::Stale {
            since: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
            reason: format!("{range}: cut").into(),
        };
        assert_eq!(freshness(), said("y/", 5));
        sources[2].show(live());
        assert_eq!(freshness(), said("x/", 7));
        // What the stale one knew is still in use.
        assert_eq!(shown.borrow().len(), 2);
        sources[1].show(live());
        assert_eq!(freshness(), Freshness::Live);
    }

    #[test]
    fn an_ip_address_is_the_same_however_it_is_written() {
        assert_eq!(key_of(&on("[::1]:80")), key_of(&on("[0:0:0::0:1]:80")));
        assert_ne!(key_of(&on("[::1]:80")), key_of(&on("[::1]:81")));
        assert_eq!(key_of(&on("host:80")).as_str(), "host:80");
    }
}
