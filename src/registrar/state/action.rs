//! What the step function asks for, and what it is told.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::held::Held;
use crate::error::Error;

/// The time, both ways of telling it.
#[derive(Debug, Clone, Copy)]
pub(in crate::registrar) struct Now {
    pub(in crate::registrar) instant: Instant,
    pub(in crate::registrar) wall: SystemTime,
}

/// What an instance is in etcd: a key and a value in each format that it is written in. The first key
/// stands for all of them.
pub(in crate::registrar) type Pairs = Vec<(String, Vec<u8>)>;

/// One piece of work at etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::registrar) enum Action {
    Grant,
    Renew {
        lease: i64,
    },
    /// Look at an entry's keys and, where they are not as they should be, make them so, all at once.
    Ensure(Ensure),
    /// Delete all of an entry's keys at once, each if it is under a lease of ours: another process
    /// may have taken it over.
    Delete {
        /// The entry's key.
        key: String,
        keys: Vec<String>,
        /// Every lease that was ours.
        ours: Vec<i64>,
    },
    /// Revoke the lease, which deletes every key that belongs to it.
    Revoke {
        lease: i64,
    },
}

/// How an entry's keys should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::registrar) struct Ensure {
    /// The entry's key.
    pub(in crate::registrar) key: String,
    /// The entry's token: the next to have this key is another one.
    pub(in crate::registrar) token: u64,
    pub(in crate::registrar) pairs: Pairs,
    /// Keys that it had before; to go, if they are under a lease of ours.
    pub(in crate::registrar) gone: Vec<String>,
    pub(in crate::registrar) lease: i64,
    pub(in crate::registrar) ours: Vec<i64>,
    /// Take the keys also from another registration: this one is new, and the later one wins.
    pub(in crate::registrar) take: bool,
    pub(in crate::registrar) generation: u64,
}

/// What came of an action.
#[derive(Debug)]
pub(in crate::registrar) enum Outcome {
    Granted {
        lease: i64,
        ttl: Duration,
    },
    Renewed,
    /// The entry's keys are as they should be, and were so at this revision.
    Ensured {
        revision: i64,
    },
    /// One of the keys is another registration's. Nothing was written.
    Superseded {
        by: i64,
    },
    /// Deleted, revoked.
    Done,
    /// etcd does not know the lease (any more).
    LeaseGone,
    Failed(Error),
}

/// What the watch of a key tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::registrar) enum Heard {
    /// It has begun, maybe after a gap.
    Begun,
    /// The key was changed, or deleted, in this revision.
    Changed { revision: i64, held: Option<Held> },
}

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::registrar) enum Next {
    Do(Action),
    /// Nothing before this time, unless something is wanted, heard or ends.
    WaitUntil(Option<Instant>),
}
