//! An immutable picture of a service's instances.

use std::borrow::Borrow;
use std::collections::{BTreeMap, btree_map};
use std::fmt;
use std::iter::FusedIterator;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::instance::Instance;

/// Identifies an instance within a [`Snapshot`]: its key in etcd.
///
/// In a format with several instances in one value (go-micro's), `#` and the instance's address
/// follow the key, so that the key of an instance does not change when another joins or leaves the
/// value.
///
/// Where the address identifies instances, the key is the address. That is the case in a directory
/// of several formats, and in formats that say so, such as go-zero's.
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

impl AsRef<str> for InstanceKey {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

/// A map by `InstanceKey` can be looked up by `&str`, because both compare and hash alike.
impl Borrow<str> for InstanceKey {
    fn borrow(&self) -> &str {
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

/// Whether a snapshot is kept current.
///
/// Displayed as `live`, or as `stale for 1m 30s: REASON`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Freshness {
    /// A watch is open: changes arrive as they happen.
    Live,
    /// The directory cannot reach etcd. The snapshot is the last known one and stays in use.
    #[non_exhaustive]
    Stale {
        /// When the directory noticed the loss.
        since: SystemTime,
        /// The latest reason: the cause of the loss, or why the last attempt to follow etcd again
        /// failed. A stream of snapshots shows a new reason once; [`since`](Self::Stale::since)
        /// stays.
        reason: Arc<str>,
    },
}

impl Freshness {
    /// Whether changes arrive as they happen.
    pub fn is_live(&self) -> bool {
        matches!(self, Freshness::Live)
    }

    /// How long ago the snapshot became stale; zero while it is live.
    pub fn age(&self) -> Duration {
        match self {
            Freshness::Live => Duration::ZERO,
            Freshness::Stale { since, .. } => since.elapsed().unwrap_or_default(),
        }
    }
}

impl fmt::Display for Freshness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Freshness::Live => f.write_str("live"),
            Freshness::Stale { reason, .. } => {
                let age = Duration::from_secs(self.age().as_secs());
                write!(f, "stale for {}: {reason}", humantime::format_duration(age))
            }
        }
    }
}

pub(crate) type Instances = BTreeMap<InstanceKey, Arc<Instance>>;

/// The revision at which etcd last wrote an instance. Filled only where the address identifies
/// instances, because only there several entries may be of one instance.
pub(crate) type ModRevisions = BTreeMap<InstanceKey, i64>;

/// A service's instances as they were at one revision of etcd.
///
/// A snapshot never changes; a newer one replaces it. Its instances are exactly the instances in
/// etcd at its revision, so the changes of one transaction appear together or not at all. In a
/// directory of several formats that holds for each format, and one format may be ahead of another.
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
    /// A set of instances that does not come from etcd, identified by their ids.
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

    /// The key prefix that the instances are read from, such as `services/greeter/`. A directory of
    /// several formats has several, separated by a comma and a space.
    pub fn range(&self) -> &str {
        &self.range
    }

    /// The instances, ordered by key.
    pub fn instances(&self) -> impl ExactSizeIterator<Item = &Arc<Instance>> {
        self.instances.values()
    }

    /// The instances with their keys, ordered by key.
    pub fn iter(&self) -> SnapshotIter<'_> {
        SnapshotIter(self.instances.iter())
    }

    /// The instance with this key, which may be given as an [`InstanceKey`] or as a `str`.
    pub fn get<Q>(&self, key: &Q) -> Option<&Arc<Instance>>
    where
        InstanceKey: Borrow<Q>,
        Q: Ord + ?Sized,
    {
        self.instances.get(key)
    }

    /// The number of instances.
    pub fn len(&self) -> usize {
        self.instances.len()
    }

    /// Whether the snapshot has no instances.
    pub fn is_empty(&self) -> bool {
        self.instances.is_empty()
    }

    /// The revision of etcd that the snapshot shows.
    ///
    /// Later snapshots have the same or a higher revision, unless etcd itself was wiped or
    /// restored. In a directory of several formats, the revision is the lowest one of the formats:
    /// the snapshot has all changes up to it, and perhaps some later ones. The revision does not
    /// advance while one of the formats has no changes, even if the others have many.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// Whether the snapshot is kept current, and if not, since when and why.
    ///
    /// A directory of several formats is live if all of them are. Otherwise this is the freshness
    /// of the format that has been stale the longest.
    pub fn freshness(&self) -> &Freshness {
        &self.freshness
    }

    /// The number of keys in etcd whose newest value cannot be decoded, or has an address that no
    /// client can call, such as `0.0.0.0:50051`. The last good value of such a key stays in force.
    pub fn undecodable(&self) -> usize {
        self.undecodable
    }
}

impl<'a> IntoIterator for &'a Snapshot {
    type Item = (&'a InstanceKey, &'a Arc<Instance>);
    type IntoIter = SnapshotIter<'a>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// An iterator over the instances of a [`Snapshot`] with their keys, ordered by key.
#[derive(Debug, Clone)]
pub struct SnapshotIter<'a>(btree_map::Iter<'a, InstanceKey, Arc<Instance>>);

impl<'a> Iterator for SnapshotIter<'a> {
    type Item = (&'a InstanceKey, &'a Arc<Instance>);

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.0.size_hint()
    }
}

impl DoubleEndedIterator for SnapshotIter<'_> {
    fn next_back(&mut self) -> Option<Self::Item> {
        self.0.next_back()
    }
}

impl ExactSizeIterator for SnapshotIter<'_> {}

impl FusedIterator for SnapshotIter<'_> {}

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

/// A change between two sets of instances.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    /// A new instance, or a new version of one.
    Upsert(InstanceKey, Arc<Instance>),
    Remove(InstanceKey),
}

/// The changes that turn `old` into `new`, in key order. No key has more than one change.
pub(crate) fn diff(old: &Instances, new: &Instances) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut old = old.iter().peekable();
    for (key, instance) in new {
        while let Some((removed, _)) = old.next_if(|(before, _)| *before < key) {
            changes.push(Change::Remove(removed.clone()));
        }
        let unchanged = old
            .next_if(|(before, _)| *before == key)
            .is_some_and(|(_, before)| Arc::ptr_eq(before, instance) || before == instance);
        if !unchanged {
            changes.push(Change::Upsert(key.clone(), Arc::clone(instance)));
        }
    }
    changes.extend(old.map(|(removed, _)| Change::Remove(removed.clone())));
    changes
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn instances(ports: &BTreeMap<u8, u16>) -> Instances {
        ports
            .iter()
            .map(|(key, port)| {
                let instance = Instance::new("a", format!("h:{port}"));
                (InstanceKey::new(key.to_string()), Arc::new(instance))
            })
            .collect()
    }

    proptest! {
        #[test]
        fn diff_turns_old_into_new_without_needless_changes(
            old in proptest::collection::btree_map(0u8..12, 0u16..3, 0..12),
            new in proptest::collection::btree_map(0u8..12, 0u16..3, 0..12),
        ) {
            let (old, new) = (instances(&old), instances(&new));
            let mut result = old.clone();
            for change in diff(&old, &new) {
                match change {
                    Change::Upsert(key, instance) => {
                        let before = result.insert(key, Arc::clone(&instance));
                        prop_assert_ne!(before, Some(instance));
                    }
                    Change::Remove(key) => prop_assert!(result.remove(&key).is_some()),
                }
            }
            prop_assert_eq!(result, new);
        }
    }

    #[test]
    fn freshness_has_an_age_only_while_stale() {
        assert_eq!(Freshness::Live.age(), Duration::ZERO);
        let stale = Freshness::Stale {
            since: SystemTime::now() - Duration::from_secs(5),
            reason: "cut off".into(),
        };
        assert!(stale.age() >= Duration::from_secs(5));
    }

    #[test]
    fn freshness_displays_age_and_reason() {
        assert_eq!(Freshness::Live.to_string(), "live");
        let stale = Freshness::Stale {
            since: SystemTime::now() - Duration::from_millis(90_100),
            reason: "cut off".into(),
        };
        let text = stale.to_string();
        assert!(text.starts_with("stale for 1m 3"), "{text}");
        assert!(text.ends_with("s: cut off"), "{text}");
    }

    #[test]
    fn maps_by_key_are_looked_up_by_text() {
        let key = || InstanceKey::new("services/a/1");
        assert_eq!(HashMap::from([(key(), 1)]).get("services/a/1"), Some(&1));
        assert_eq!(BTreeMap::from([(key(), 1)]).get("services/a/1"), Some(&1));
    }

    #[test]
    fn iterates_in_key_order_with_an_exact_size() {
        let addresses = ["h:2", "h:1"].map(|address| Instance::new("a", address).id(address));
        let snapshot = Snapshot::of("list".into(), addresses);
        let mut keys = Vec::new();
        for (key, instance) in &snapshot {
            assert_eq!(key.as_ref(), instance.address);
            keys.push(key.as_str());
        }
        assert_eq!(keys, ["h:1", "h:2"]);
        assert_eq!(snapshot.iter().len(), 2);
    }
}
