//! The leases that a client gives back when it is closed.

use std::collections::BTreeSet;

use parking_lot::Mutex;

/// The leases of the locks and elections that a client holds or waits for. They end with the
/// client; other leases belong to the user.
#[derive(Debug, Default)]
pub(super) struct HeldLeases(Mutex<BTreeSet<i64>>);

impl HeldLeases {
    /// Adds a lease, before it is granted.
    pub(super) fn add(&self, id: i64) {
        self.0.lock().insert(id);
    }

    /// Removes a lease that was revoked, or is left to expire.
    pub(super) fn remove(&self, id: i64) {
        self.0.lock().remove(&id);
    }

    pub(super) fn list(&self) -> Vec<i64> {
        self.0.lock().iter().copied().collect()
    }
}
