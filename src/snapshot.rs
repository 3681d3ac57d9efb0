//! What a directory shows: a whole, immutable picture of a service.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::instance::Instance;

/// What tells one instance of a [`Snapshot`] from the others: its key in etcd.
///
/// In a format that may hold several instances in one value (go-micro's), it is followed by `#` and
/// the instance's address, so that it stays as it is whoever comes and goes beside it. Where instances are told apart by address (in a directory of several formats, and
/// in formats that say so, such as go-zero's) it is the address instead.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceKey(Arc<str>);

impl InstanceKey {
    pub(crate) fn new(key: impl Into<Arc<str>>) -> Self {
        Self(key.into())
    }

    /// The key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for InstanceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for InstanceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether a snapshot is being kept current.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Freshness {
    /// A watch is open: changes arrive as they happen.
    Live,
    /// The way to etcd is lost; this is what was last known, and it is still being used.
    Stale {
        /// When the directory noticed.
        since: SystemTime,
        /// What it noticed.
        reason: Arc<str>,
    },
}

impl Freshness {
    /// Whether changes arrive as they happen.
    pub fn is_live(&self) -> bool {
        matches!(self, Freshness::Live)
    }

    /// How long ago the snapshot stopped being kept current; zero while it is.
    pub fn age(&self) -> Duration {
        match self {
            Freshness::Live => Duration::ZERO,
            Freshness::Stale { since, .. } => since.elapsed().unwrap_or_default(),
        }
    }
}

pub(crate) type Instances = BTreeMap<InstanceKey, Arc<Instance>>;

/// The revision at which etcd last wrote what is known of an instance, where instances are told apart
/// by address: only there may several entries be of one instance.
pub(crate) type ModRevisions = BTreeMap<InstanceKey, i64>;

/// A service's instances as they were at one revision of etcd.
///
/// It never changes; a newer one replaces it. What it shows was in etcd at that revision, all of
/// it and nothing else: changes made in one transaction are seen together or not at all. In a
/// directory of several formats that holds for each of them, and one may be ahead of another.
#[derive(Clone)]
pub struct Snapshot {
    pub(crate) range: Arc<str>,
    pub(crate) instances: Arc<Instances>,
    pub(crate) mod_revisions: Arc<ModRevisions>,
    pub(crate) revision: i64,
    pub(crate) freshness: Freshness,
    pub(crate) undecodable: usize,
}

impl Snapshot {
    /// A set of instances from elsewhere than etcd, told apart by their ids.
    pub(crate) fn of(range: Arc<str>, instances: impl IntoIterator<Item = Instance>) -> Self {
        let keyed = instances
            .into_iter()
            .map(|instance| (InstanceKey::new(instance.id.as_str()), Arc::new(instance)));
        Self {
            range,
            instances: Arc::new(keyed.collect()),
            mod_revisions: Arc::default(),
            revision: 0,
            freshness: Freshness::Live,
            undecodable: 0,
        }
    }

    /// The key prefix that it was read from, such as `services/greeter/`; several are separated by
    /// a comma and a space.
    pub fn range(&self) -> &str {
        &self.range
    }

    /// The instances, ordered by key.
    pub fn instances(&self) -> impl ExactSizeIterator<Item = &Arc<Instance>> {
        self.instances.values()
    }

    /// The instances with their keys, ordered by key.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&InstanceKey, &Arc<Instance>)> {
        self.instances.iter()
    }

    /// The instance under a key.
    pub fn get(&self, key: &InstanceKey) -> Option<&Arc<Instance>> {
        self.instances.get(key)
    }

    /// How many instances there are.
    pub fn len(&self) -> usize {
        self.instances.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.instances.is_empty()
    }

    /// etcd's revision that this is a picture of.
    ///
    /// It never falls from one snapshot to a later one, unless etcd itself was wiped or restored. In
    /// a directory of several formats it is the smallest of theirs: all changes up to it are in, and
    /// some later ones may be. It stands still there while one of the formats has no changes, however
    /// many the others have.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// Whether it is being kept current, and if not, since when and why. A directory of several
    /// formats is live when all of them are; otherwise it tells of the one that has been stale the
    /// longest.
    pub fn freshness(&self) -> &Freshness {
        &self.freshness
    }

    /// How many entries in etcd were left out because they could not be decoded.
    pub fn undecodable(&self) -> usize {
        self.undecodable
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Snapshot")
            .field("range", &self.range)
            .field("revision", &self.revision)
            .field("freshness", &self.freshness)
            .field("instances", &self.instances)
            .field("undecodable", &self.undecodable)
            .finish()
    }
}

/// One difference between two snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// New, or changed in any way.
    Upsert(InstanceKey, Arc<Instance>),
    /// Gone.
    Remove(InstanceKey),
}

/// What turns `old` into `new`, in key order; removals and additions are independent of each other.
pub(crate) fn diff(old: &Instances, new: &Instances) -> Vec<Change> {
    let mut found = Vec::new();
    let mut old = old.iter().peekable();
    for (key, instance) in new {
        while let Some((gone, _)) = old.next_if(|(before, _)| *before < key) {
            found.push(Change::Remove(gone.clone()));
        }
        let unchanged = old
            .next_if(|(before, _)| *before == key)
            .is_some_and(|(_, before)| Arc::ptr_eq(before, instance) || before == instance);
        if !unchanged {
            found.push(Change::Upsert(key.clone(), Arc::clone(instance)));
        }
    }
    found.extend(old.map(|(gone, _)| Change::Remove(gone.clone())));
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn instances(entries: &BTreeMap<u8, u16>) -> Instances {
        entries
            .iter()
            .map(|(key, port)| {
                let instance = Instance::new("a", format!("h:{port}"));
                (InstanceKey::new(key.to_string()), Arc::new(instance))
            })
            .collect()
    }

    proptest! {
        #[test]
        fn applying_the_differences_to_the_old_gives_the_new_and_none_is_superfluous(
            old in proptest::collection::btree_map(0u8..12, 0u16..3, 0..12),
            new in proptest::collection::btree_map(0u8..12, 0u16..3, 0..12),
        ) {
            let (old, new) = (instances(&old), instances(&new));
            let found = diff(&old, &new);
            let mut result = old.clone();
            for difference in &found {
                match difference {
                    Change::Upsert(key, instance) => {
                        let before = result.insert(key.clone(), Arc::clone(instance));
                        prop_assert_ne!(before.as_ref(), Some(instance));
                    }
                    Change::Remove(key) => prop_assert!(result.remove(key).is_some()),
                }
            }
            prop_assert_eq!(result, new);
        }
    }

    #[test]
    fn a_live_snapshot_has_no_age_and_a_stale_one_has() {
        assert_eq!(Freshness::Live.age(), Duration::ZERO);
        let stale = Freshness::Stale {
            since: SystemTime::now() - Duration::from_secs(5),
            reason: "cut off".into(),
        };
        assert!(stale.age() >= Duration::from_secs(5));
    }
}
