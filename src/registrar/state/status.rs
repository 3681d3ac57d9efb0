//! What the handles of a registration see.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;

use crate::error::Error;

/// Where a registration stands.
///
/// There is no state called "given up": from every one but `Deregistered` it is brought to where it
/// should be, for as long as the process lives.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegistrationState {
    /// Held back, for its server does not say that it is ready; see
    /// [`register_while_ready`](crate::Registrar::register_while_ready). Not in etcd.
    Unready,
    /// On its way into etcd for the first time.
    Registering,
    /// In etcd, under a lease that is being kept alive.
    Registered,
    /// It was in etcd, and cannot be relied on to be there now. It is being brought back, for as
    /// long as it takes.
    Recovering {
        /// When the registrar noticed.
        since: SystemTime,
        /// What it noticed.
        reason: Arc<str>,
    },
    /// Another process has registered the same key later, and has it. When that registration goes,
    /// this one comes back.
    Superseded {
        /// When the registrar noticed.
        since: SystemTime,
        /// The other's lease.
        by: i64,
    },
    /// In etcd and marked as about to leave.
    Draining,
    /// Withdrawn: not in etcd any more. Final.
    Deregistered,
}

/// A registration's state, and the last error on the way to it.
#[derive(Debug, Clone)]
pub(in crate::registrar) struct Status {
    pub(in crate::registrar) state: RegistrationState,
    /// How often its value was changed, and up to which change it is in etcd; `None` when it cannot be
    /// relied on to be there.
    pub(in crate::registrar) written: Option<u64>,
    /// What went wrong last; `None` once something worked.
    pub(in crate::registrar) error: Option<Error>,
    /// Its server does not say that it is ready: what is wanted is put when it does.
    pub(in crate::registrar) held_back: bool,
    /// It comes back no more, whatever its server says: it is withdrawn, maybe not gone yet, or the client
    /// was closed.
    pub(in crate::registrar) over: bool,
}

/// One registration of a key.
#[derive(Debug)]
pub(in crate::registrar) struct Ticket {
    /// Tells it from an earlier registration of the same key.
    pub(in crate::registrar) token: u64,
    /// The generation to wait for.
    pub(in crate::registrar) generation: u64,
    pub(in crate::registrar) status: watch::Receiver<Status>,
}
