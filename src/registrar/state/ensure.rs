//! The keys that an entry needs in etcd, and the write that brings them there.

use super::stored_key::StoredKey;

/// The keys and values of an instance in etcd: one record per format. The first key identifies the
/// entry.
pub(in crate::registrar) type Records = Vec<(String, Vec<u8>)>;

/// The value that an instance should have in etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::registrar) struct TargetRecords {
    pub(in crate::registrar) records: Records,
    /// Whether the instance is marked as draining. Kept beside the records because some formats
    /// cannot express the mark.
    pub(in crate::registrar) draining: bool,
}

impl TargetRecords {
    pub(in crate::registrar) fn keys(&self) -> impl Iterator<Item = &String> {
        self.records.iter().map(|(key, _)| key)
    }

    pub(super) fn has_key(&self, key: &str) -> bool {
        self.keys().any(|own| own == key)
    }

    /// Whether `stored` is exactly the record of this key, under the lease `lease`.
    pub(super) fn matches(&self, key: &str, stored: &StoredKey, lease: Option<i64>) -> bool {
        let has_value = |(own, value): &(String, Vec<u8>)| own == key && *value == stored.value;
        Some(stored.lease) == lease && self.records.iter().any(has_value)
    }
}

/// Identifies an entry. The token distinguishes entries that have the same key one after another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::registrar) struct EntryId {
    /// The key of the entry's first record.
    pub(in crate::registrar) key: String,
    pub(in crate::registrar) token: u64,
}

/// A request to read an entry's keys, and to correct wrong keys in one transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::registrar) struct Ensure {
    pub(in crate::registrar) entry: EntryId,
    pub(in crate::registrar) records: Records,
    /// Keys of a predecessor of the entry, which are deleted if this registrar owns them.
    pub(in crate::registrar) stale_keys: Vec<String>,
    /// The lease to put the keys under.
    pub(in crate::registrar) lease: i64,
    /// Every lease that this registrar was granted.
    pub(in crate::registrar) own_leases: Vec<i64>,
    /// The latest revision at which the entry had its keys; `None` for a new entry. Only a newer
    /// key of another registration is a successor's.
    pub(in crate::registrar) owned_revision: Option<i64>,
    /// The generation of `records`.
    pub(in crate::registrar) generation: u64,
}

/// The write that an [`Ensure`] needs, given the keys found in etcd.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::registrar) enum WritePlan {
    /// All keys are as they should be.
    UpToDate,
    /// A later registration, which has the lease `by`, owns one of the keys, so no key is written.
    Superseded { by: i64 },
    /// Put the records with the indexes `put`, and delete the stale keys with the indexes `delete`.
    Write { put: Vec<usize>, delete: Vec<usize> },
}

impl Ensure {
    /// Plans the write, given the keys found in etcd: `found` for the records and `stale` for the
    /// stale keys, in the same order.
    pub(in crate::registrar) fn plan(
        &self,
        found: &[Option<StoredKey>],
        stale: &[Option<StoredKey>],
    ) -> WritePlan {
        let mut stored = found.iter().flatten();
        if let Some(successor) = stored.find(|key| self.is_successor(key)) {
            return WritePlan::Superseded {
                by: successor.lease,
            };
        }
        let is_up_to_date = |index: usize, value: &[u8]| {
            let stored = found.get(index).and_then(Option::as_ref);
            stored.is_some_and(|key| key.lease == self.lease && key.value == value)
        };
        let records = self.records.iter().enumerate();
        let put: Vec<usize> = records
            .filter_map(|(index, (_, value))| (!is_up_to_date(index, value)).then_some(index))
            .collect();
        let is_own = |key: &StoredKey| key.is_own(&self.own_leases);
        let stale = stale.iter().enumerate();
        let delete: Vec<usize> = stale
            .filter_map(|(index, key)| key.as_ref().is_some_and(is_own).then_some(index))
            .collect();
        if put.is_empty() && delete.is_empty() {
            WritePlan::UpToDate
        } else {
            WritePlan::Write { put, delete }
        }
    }

    /// Whether `stored` belongs to a later registration. A new entry is the latest registration
    /// itself. In one history, another registration's key is always newer than the revision at
    /// which the entry had the keys; an older key comes from a snapshot that etcd was restored
    /// from, and the process that wrote it may have ended since.
    fn is_successor(&self, stored: &StoredKey) -> bool {
        let is_newer = |owned| stored.mod_revision > owned;
        stored.is_foreign(&self.own_leases) && self.owned_revision.is_some_and(is_newer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored_key(lease: i64, value: &str) -> Option<StoredKey> {
        Some(StoredKey {
            lease,
            mod_revision: 7,
            value: value.into(),
        })
    }

    fn ensure(owned_revision: Option<i64>) -> Ensure {
        Ensure {
            entry: EntryId {
                key: "a".into(),
                token: 0,
            },
            records: vec![("a".into(), b"v".to_vec()), ("x/a".into(), b"w".to_vec())],
            stale_keys: vec!["old".into()],
            lease: 2,
            own_leases: vec![1, 2],
            owned_revision,
            generation: 0,
        }
    }

    fn put(put: &[usize]) -> WritePlan {
        WritePlan::Write {
            put: put.to_vec(),
            delete: Vec::new(),
        }
    }

    #[test]
    fn only_records_that_differ_are_written() {
        let plan = |a, b| ensure(Some(1)).plan(&[a, b], &[None]);
        assert_eq!(
            plan(stored_key(2, "v"), stored_key(2, "w")),
            WritePlan::UpToDate
        );
        assert_eq!(plan(None, None), put(&[0, 1]));
        assert_eq!(plan(stored_key(2, "v"), None), put(&[1]));
        assert_eq!(
            plan(stored_key(2, "by hand"), stored_key(2, "w")),
            put(&[0])
        );
        // The value is right, but the key would outlive the lease.
        assert_eq!(plan(stored_key(0, "v"), stored_key(2, "w")), put(&[0]));
        assert_eq!(plan(stored_key(1, "v"), stored_key(2, "w")), put(&[0]));
    }

    #[test]
    fn only_newer_keys_of_others_are_successors() {
        let found = [stored_key(2, "v"), stored_key(9, "w")];
        let plan = |owned_revision| ensure(owned_revision).plan(&found, &[None]);
        assert_eq!(plan(Some(6)), WritePlan::Superseded { by: 9 });
        // The entry had the key at the revision at which the other registration wrote it, so etcd
        // has gone back to an earlier history.
        assert_eq!(plan(Some(7)), put(&[1]));
        assert_eq!(plan(None), put(&[1]));
    }

    #[test]
    fn only_own_stale_keys_are_deleted() {
        let found = [stored_key(2, "v"), stored_key(2, "w")];
        let plan = |stale| ensure(Some(1)).plan(&found, &[stale]);
        assert_eq!(plan(stored_key(9, "")), WritePlan::UpToDate);
        assert_eq!(
            plan(stored_key(1, "")),
            WritePlan::Write {
                put: Vec::new(),
                delete: vec![0]
            }
        );
    }
}
