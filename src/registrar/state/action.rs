//! The output of the step function: the next action, or the time of the next step.

use std::time::SystemTime;

use tokio::time::Instant;

use super::ensure::{Ensure, EntryId};

/// The current time, monotonic for deadlines and wall-clock for users.
#[derive(Debug, Clone, Copy)]
pub(in crate::registrar) struct Timestamp {
    pub(in crate::registrar) instant: Instant,
    pub(in crate::registrar) wall: SystemTime,
}

impl Timestamp {
    pub(in crate::registrar) fn now() -> Self {
        Self {
            instant: Instant::now(),
            wall: SystemTime::now(),
        }
    }
}

/// A request to etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::registrar) enum Action {
    /// Grant a lease.
    Grant,
    /// Renew a lease.
    Renew { lease: i64 },
    /// Bring an entry's keys into etcd.
    Ensure(Ensure),
    /// Delete an entry's keys in one transaction. A key that is not under one of `own_leases`
    /// stays, because another process may have taken it over.
    Delete {
        entry: EntryId,
        /// The keys to delete.
        keys: Vec<String>,
        /// Every lease that this registrar was granted.
        own_leases: Vec<i64>,
    },
    /// Revoke the lease, which deletes every key under it.
    Revoke { lease: i64 },
}

/// The result of one step.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::registrar) enum Step {
    /// Perform the action, and report its outcome as an event.
    Perform(Action),
    /// Step again at this time, or after the next event or request, whichever comes first.
    SleepUntil(Option<Instant>),
}
