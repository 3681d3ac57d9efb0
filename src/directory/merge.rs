//! Merges the snapshots of several layouts into one.
//!
//! Each layout (a format under a prefix) is listed and watched on its own. The merged snapshot has
//! one instance per address.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

use crate::instance::Instance;
use crate::reasons::SeenReasons;
use crate::snapshot::{Freshness, InstanceKey, Snapshot};

/// The latest snapshot of each layout, and the merged snapshot that readers see.
///
/// Logs when a layout becomes stale or live, and each new reason while it is stale. A reason that
/// was given before, as when members fail in different ways in turn, replaces the latest one
/// without waking readers.
#[derive(Debug)]
pub(super) struct MergedView {
    state: Mutex<State>,
    merged: watch::Sender<Arc<Snapshot>>,
}

#[derive(Debug)]
struct State {
    snapshots: Vec<Snapshot>,
    /// The reasons for which each layout was stale since it was last live.
    seen_reasons: Vec<SeenReasons>,
    drain_revisions: DrainRevisions,
}

/// The draining instances, each with the newest revision that says so. Layouts report their changes
/// one after the other, so a draining mark must outlive its deleted entry until the other layouts
/// have deleted theirs too, or a newer entry says otherwise.
type DrainRevisions = BTreeMap<InstanceKey, i64>;

impl MergedView {
    /// Takes the first snapshot of each layout, in the order of precedence. Returns the layouts'
    /// inputs and the merged snapshot, which does not change any more once all inputs are dropped.
    pub(super) fn start(
        snapshots: Vec<Snapshot>,
    ) -> (Vec<LayoutInput>, watch::Receiver<Arc<Snapshot>>) {
        let count = snapshots.len();
        let mut drain_revisions = DrainRevisions::new();
        let first = Arc::new(merge(&snapshots, &mut drain_revisions));
        let (merged, receiver) = watch::channel(first);
        let view = Arc::new(Self {
            state: Mutex::new(State {
                snapshots,
                seen_reasons: (0..count).map(|_| SeenReasons::default()).collect(),
                drain_revisions,
            }),
            merged,
        });
        let input = |index| LayoutInput {
            view: Arc::clone(&view),
            index,
        };
        ((0..count).map(input).collect(), receiver)
    }

    /// The caller holds the lock of `state`, so that no older merged snapshot replaces this one.
    fn publish(&self, state: &mut State, index: usize, snapshot: Snapshot) {
        let State {
            snapshots,
            seen_reasons,
            drain_revisions,
        } = state;
        let before = &snapshots[index];
        let is_news = is_news(before, &snapshot, &mut seen_reasons[index])
            || !has_equal_contents(before, &snapshot);
        // A lower revision is of another history, whose revisions cannot be compared with these.
        if snapshot.revision < snapshots[index].revision {
            drain_revisions.clear();
        }
        snapshots[index] = snapshot;
        let merged = merge(snapshots, drain_revisions);
        self.merged.send_if_modified(|latest| {
            *latest = Arc::new(merged);
            is_news
        });
    }
}

/// The place of one layout in the merged view.
#[derive(Debug)]
pub(super) struct LayoutInput {
    view: Arc<MergedView>,
    index: usize,
}

impl LayoutInput {
    /// Publishes the layout's snapshot, merged with the latest snapshots of the others.
    pub(super) fn publish(&self, snapshot: Snapshot) {
        self.view.publish(&mut self.state(), self.index, snapshot);
    }

    /// Marks the layout's snapshot stale, for this reason from now on.
    pub(super) fn mark_stale(&self, reason: &str) {
        // No reader is left.
        if self.view.merged.is_closed() {
            return;
        }
        let mut state = self.state();
        let mut snapshot = state.snapshots[self.index].clone();
        let since = match snapshot.freshness {
            Freshness::Live => SystemTime::now(),
            Freshness::Stale { since, .. } => since,
        };
        let reason = reason.into();
        snapshot.freshness = Freshness::Stale { since, reason };
        self.view.publish(&mut state, self.index, snapshot);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.view.state.lock()
    }
}

/// Whether the freshness of a layout changed in a way that readers should notice. Logs the change.
fn is_news(before: &Snapshot, after: &Snapshot, seen: &mut SeenReasons) -> bool {
    let range = after.range();
    let (reason, was_live) = match (&before.freshness, &after.freshness) {
        (Freshness::Live, Freshness::Live) => return false,
        (Freshness::Stale { .. }, Freshness::Live) => {
            tracing::info!(range, "a directory is live again");
            return true;
        }
        (before, Freshness::Stale { reason, .. }) => (reason, before.is_live()),
    };
    if was_live {
        seen.clear();
    }
    let is_new = seen.insert(reason, SystemTime::now());
    if is_new {
        tracing::warn!(range, %reason, "a directory is stale");
    }
    is_new
}

/// Whether two snapshots differ at most in their freshness.
fn has_equal_contents(a: &Snapshot, b: &Snapshot) -> bool {
    Arc::ptr_eq(&a.instances, &b.instances)
        && Arc::ptr_eq(&a.mod_revisions, &b.mod_revisions)
        && (a.revision, a.undecodable) == (b.revision, b.undecodable)
}

/// Merges the snapshots of all layouts. If there are several, all of them identify instances by
/// address.
fn merge(snapshots: &[Snapshot], drain_revisions: &mut DrainRevisions) -> Snapshot {
    // A single layout that identifies instances by key needs no merging.
    if let [only] = snapshots
        && only.mod_revisions.is_empty()
    {
        drain_revisions.clear();
        return only.clone();
    }
    let mut instances = snapshots
        .first()
        .map(|first| Arc::clone(&first.instances))
        .unwrap_or_default();
    for snapshot in snapshots.iter().skip(1) {
        for (key, instance) in snapshot.instances.iter() {
            if !instances.contains_key(key) {
                Arc::make_mut(&mut instances).insert(key.clone(), Arc::clone(instance));
            }
        }
    }
    *drain_revisions = update_drain_revisions(snapshots, drain_revisions);
    let differing: Vec<InstanceKey> = instances
        .iter()
        .filter(|(key, instance)| instance.draining != drain_revisions.contains_key(*key))
        .map(|(key, _)| key.clone())
        .collect();
    for key in differing {
        let draining = drain_revisions.contains_key(&key);
        if let Some(instance) = Arc::make_mut(&mut instances).get_mut(&key) {
            *instance = Arc::new(Instance::clone(instance).draining(draining));
        }
    }
    let ranges: Vec<&str> = snapshots.iter().map(Snapshot::range).collect();
    Snapshot {
        range: ranges.join(", ").into(),
        instances,
        mod_revisions: Arc::default(),
        revision: snapshots.iter().map(Snapshot::revision).min().unwrap_or(0),
        freshness: merge_freshness(snapshots),
        undecodable: snapshots.iter().map(Snapshot::undecodable).sum(),
    }
}

/// The draining instances and the revision that says so.
///
/// The newest entry of an address decides, because older entries are left over from earlier
/// processes. A draining mark outlives its deleted entry while all remaining entries are older.
/// Entries of one revision are of one registration; if one of them drains, the instance drains,
/// because not every format can carry the mark.
fn update_drain_revisions(snapshots: &[Snapshot], before: &DrainRevisions) -> DrainRevisions {
    // The newest entry of an address. Among entries of one revision, `true` is the greater mark.
    let newest = |key| {
        let marks = snapshots.iter().filter_map(|snapshot| {
            let revision = snapshot.mod_revisions.get(key).copied().unwrap_or_default();
            Some((revision, snapshot.instances.get(key)?.draining))
        });
        marks.max()
    };
    // Only an instance that drains now or drained before can be draining: few of thousands.
    let draining_now = snapshots.iter().flat_map(|snapshot| {
        let instances = snapshot.instances.iter();
        instances.filter(|(_, instance)| instance.draining)
    });
    draining_now
        .map(|(key, _)| key)
        .chain(before.keys())
        .filter_map(|key| {
            let newest = newest(key)?;
            let (revision, draining) = before
                .get(key)
                .map_or(newest, |revision| newest.max((*revision, true)));
            draining.then(|| (key.clone(), revision))
        })
        .collect()
}

/// The merged snapshot is live if all layouts are live. Otherwise it is as stale as the layout that
/// has been stale the longest, with that layout's range in the reason.
fn merge_freshness(snapshots: &[Snapshot]) -> Freshness {
    let stale = snapshots
        .iter()
        .filter_map(|snapshot| match &snapshot.freshness {
            Freshness::Stale { since, reason } => Some((*since, &snapshot.range, reason)),
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
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::directory::keys::address_key;

    /// A snapshot whose instances were all written at `revision`.
    fn snapshot(range: &str, revision: i64, instances: &[Instance]) -> Snapshot {
        let keyed = instances
            .iter()
            .map(|instance| (address_key(instance), Arc::new(instance.clone())));
        let mod_revisions = instances
            .iter()
            .map(|instance| (address_key(instance), revision));
        Snapshot {
            range: range.into(),
            instances: Arc::new(keyed.collect()),
            mod_revisions: Arc::new(mod_revisions.collect()),
            revision,
            freshness: Freshness::Live,
            undecodable: 1,
        }
    }

    fn on(address: &str) -> Instance {
        Instance::new("a", address)
    }

    #[test]
    fn first_layout_describes_an_address_until_no_layout_has_it() {
        let first = snapshot("x/", 5, &[on("h:1").weight(1), on("h:2")]);
        let second = snapshot("y/", 3, &[on("h:1").weight(2), on("h:3")]);
        let (inputs, merged) = MergedView::start(vec![first, second]);
        let weights = || -> Vec<(String, u32)> {
            let merged = merged.borrow();
            assert!(merged.iter().all(|(key, _)| merged.get(key).is_some()));
            let weight = |(key, instance): (&InstanceKey, &Arc<Instance>)| {
                assert_eq!(key.as_str(), instance.address);
                (key.to_string(), instance.weight)
            };
            merged.iter().map(weight).collect()
        };
        let expected = |weights: &[(&str, u32)]| -> Vec<(String, u32)> {
            weights.iter().map(|(a, w)| ((*a).to_owned(), *w)).collect()
        };
        assert_eq!(
            weights(),
            expected(&[("h:1", 1), ("h:2", 100), ("h:3", 100)])
        );
        assert_eq!(merged.borrow().revision(), 3);
        assert_eq!(merged.borrow().undecodable(), 2);
        assert_eq!(merged.borrow().range(), "x/, y/");

        inputs[0].publish(snapshot("x/", 9, &[on("h:2")]));
        assert_eq!(
            weights(),
            expected(&[("h:1", 2), ("h:2", 100), ("h:3", 100)])
        );
        inputs[1].publish(snapshot("y/", 9, &[]));
        assert_eq!(weights(), expected(&[("h:2", 100)]));
        assert_eq!(merged.borrow().revision(), 9);
    }

    /// Whether the only instance drains, and its zone.
    fn only(merged: &watch::Receiver<Arc<Snapshot>>) -> Option<(bool, String)> {
        let merged = merged.borrow();
        let instance = merged.instances().next()?;
        Some((instance.draining, instance.zone.clone().unwrap_or_default()))
    }

    #[test]
    fn newest_entry_says_draining_and_first_layout_the_rest() {
        let calm = || [on("h:1").zone("calm")];
        let draining = || [on("h:1").zone("draining").draining(true)];
        let x = |revision, instances: &[Instance]| snapshot("x/", revision, instances);
        let y = |revision, instances: &[Instance]| snapshot("y/", revision, instances);
        for (snapshots, drains, zone) in [
            ([x(1, &calm()), y(2, &draining())], true, "calm"),
            ([x(2, &draining()), y(1, &calm())], true, "draining"),
            // The mark of a killed process does not apply to its successor.
            ([x(1, &draining()), y(2, &calm())], false, "draining"),
            ([x(2, &calm()), y(1, &draining())], false, "calm"),
            // In one transaction, one of the formats may have no place for the mark.
            ([x(2, &calm()), y(2, &draining())], true, "calm"),
        ] {
            let (_inputs, merged) = MergedView::start(snapshots.into());
            assert_eq!(only(&merged), Some((drains, zone.to_owned())));
        }
    }

    #[test]
    fn drains_until_gone_from_all_layouts_or_a_newer_entry() {
        let calm = [on("h:1").zone("y")];
        let drains = [on("h:1").zone("x").draining(true)];
        let start = || {
            let first = vec![snapshot("x/", 5, &drains), snapshot("y/", 4, &calm)];
            MergedView::start(first)
        };
        let is = |drains, zone: &str| Some((drains, zone.to_owned()));

        let (inputs, merged) = start();
        assert_eq!(only(&merged), is(true, "x"));
        // The instance leaves, and one layout reports it before the other.
        inputs[0].publish(snapshot("x/", 6, &[]));
        assert_eq!(only(&merged), is(true, "y"));
        inputs[1].publish(snapshot("y/", 6, &[]));
        assert_eq!(only(&merged), None);
        // The next process at this address does not drain.
        inputs[1].publish(snapshot("y/", 7, &calm));
        assert_eq!(only(&merged), is(false, "y"));

        let (inputs, merged) = start();
        inputs[0].publish(snapshot("x/", 6, &[]));
        inputs[1].publish(snapshot("y/", 8, &calm));
        assert_eq!(only(&merged), is(false, "y"));

        // Revisions of another history cannot be compared with these.
        let (inputs, merged) = start();
        inputs[0].publish(snapshot("x/", 2, &[]));
        assert_eq!(only(&merged), is(false, "y"));
    }

    #[test]
    fn single_layout_by_address_remembers_draining_as_well() {
        let drains = [on("h:1").draining(true)];
        let (inputs, merged) = MergedView::start(vec![snapshot("x/", 5, &drains)]);
        // The draining entry is gone; the remaining entry of the address is older.
        let older = Snapshot {
            revision: 6,
            ..snapshot("x/", 4, &[on("h:1")])
        };
        inputs[0].publish(older);
        assert_eq!(only(&merged), Some((true, String::new())));
    }

    proptest! {
        /// Checks the rule in another formulation: of all entries of the address since it appeared,
        /// the newest draining entry counts unless a present entry is newer. The order of the
        /// reports does not matter.
        #[test]
        fn draining_is_independent_of_the_order_of_reports(
            reports in proptest::collection::vec(
                (0usize..3, proptest::option::of((1i64..20, any::<bool>()))),
                1..20,
            ),
        ) {
            let entry = |entry: Option<(i64, bool)>| match entry {
                Some((revision, draining)) => Snapshot {
                    revision: 99,
                    ..snapshot("x/", revision, &[on("h:1").draining(draining)])
                },
                None => snapshot("x/", 99, &[]),
            };
            let mut now = [None; 3];
            let mut last_drain = None;
            let (inputs, merged) = MergedView::start(now.map(entry).into());
            for (index, report) in reports {
                now[index] = report;
                inputs[index].publish(entry(report));
                let present = now.iter().flatten();
                let newest = present.clone().map(|(revision, _)| *revision).max();
                let drain = present.filter(|(_, draining)| *draining).map(|(at, _)| *at).max();
                last_drain = newest.and(last_drain.max(drain));
                // A newer entry ends it for good.
                last_drain = last_drain.filter(|drain| Some(*drain) >= newest);
                let expected = newest.map(|_| last_drain.is_some());
                prop_assert_eq!(only(&merged).map(|(draining, _)| draining), expected);
            }
        }
    }

    #[test]
    fn stale_while_a_layout_is_and_names_its_range() {
        let stale = |range: &str, seconds| Snapshot {
            freshness: Freshness::Stale {
                since: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
                reason: "cut".into(),
            },
            ..snapshot(range, 1, &[on("h:1")])
        };
        let live = || snapshot("z/", 1, &[on("h:2")]);
        let (inputs, merged) = MergedView::start(vec![live(), stale("x/", 7), stale("y/", 5)]);
        let freshness = || merged.borrow().freshness().clone();
        let expected = |range: &str, seconds| Freshness::Stale {
            since: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
            reason: format!("{range}: cut").into(),
        };
        assert_eq!(freshness(), expected("y/", 5));
        inputs[2].publish(live());
        assert_eq!(freshness(), expected("x/", 7));
        // The instances of the stale layout stay in use.
        assert_eq!(merged.borrow().len(), 2);
        inputs[1].publish(live());
        assert_eq!(freshness(), Freshness::Live);
    }

    #[test]
    fn reasons_that_alternate_wake_readers_once() {
        let live = || snapshot("x/", 1, &[on("h:1")]);
        let first = live();
        let stale = |reason: String| Snapshot {
            freshness: Freshness::Stale {
                since: SystemTime::UNIX_EPOCH,
                reason: reason.into(),
            },
            ..first.clone()
        };
        let (inputs, mut merged) = MergedView::start(vec![first.clone()]);
        let mut wakes = 0;
        for attempt in 0..100 {
            let kind = ["refused", "denied"][attempt % 2];
            inputs[0].publish(stale(format!("{kind} after {attempt}ms")));
            wakes += u32::from(merged.has_changed().unwrap());
            let shown = merged.borrow_and_update().freshness().to_string();
            assert!(
                shown.ends_with(&format!("{kind} after {attempt}ms")),
                "{shown}"
            );
        }
        assert_eq!(wakes, 2);
        // A reason of the next outage is new.
        inputs[0].publish(live());
        inputs[0].publish(stale("refused".to_owned()));
        assert!(merged.has_changed().unwrap());
    }
}
