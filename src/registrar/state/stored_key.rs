//! A key as etcd stores it, and the registration that owns it.

use crate::client::KeyValue;

/// A key that exists in etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::registrar) struct StoredKey {
    /// The lease that the key is under; 0 if it has none.
    pub(in crate::registrar) lease: i64,
    pub(in crate::registrar) mod_revision: i64,
    pub(in crate::registrar) value: Vec<u8>,
}

impl StoredKey {
    /// Whether this registrar wrote the key: the key is under one of `own_leases`.
    pub(in crate::registrar) fn is_own(&self, own_leases: &[i64]) -> bool {
        own_leases.contains(&self.lease)
    }

    /// Whether another registration owns the key: the key is under a lease that this registrar was
    /// never granted. A key without a lease is not a registration, no matter which client wrote it.
    pub(super) fn is_foreign(&self, own_leases: &[i64]) -> bool {
        self.lease != 0 && !self.is_own(own_leases)
    }
}

impl From<&KeyValue> for StoredKey {
    fn from(kv: &KeyValue) -> Self {
        Self {
            lease: kv.lease(),
            mod_revision: kv.mod_revision(),
            value: kv.value().to_vec(),
        }
    }
}
