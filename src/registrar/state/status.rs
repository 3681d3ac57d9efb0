//! The state of a registration, as its handles see it.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;

use super::action::Timestamp;
use super::ensure::EntryId;
use super::presence::Desired;
use crate::error::Error;

/// The state of a registration.
///
/// No state is final except `Deregistered`: from every other state the registrar keeps working
/// until etcd has the instance or the process ends.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegistrationState {
    /// Not in etcd, because the instance's server is not ready; see
    /// [`register_while_ready`](crate::Registrar::register_while_ready).
    Unready,
    /// Not in etcd yet; the registrar is writing the instance for the first time.
    Registering,
    /// In etcd, under a lease that is kept alive.
    Registered,
    /// Written before, but perhaps not in etcd now. The registrar is restoring the instance and
    /// keeps trying until it is back.
    #[non_exhaustive]
    Recovering {
        /// When the registrar noticed the fault.
        since: SystemTime,
        /// The fault.
        reason: Arc<str>,
    },
    /// The key belongs to another process, which registered it later. When that registration ends,
    /// this one returns.
    #[non_exhaustive]
    Superseded {
        /// When the registrar noticed the other registration.
        since: SystemTime,
        /// The lease of the other registration.
        by: i64,
    },
    /// In etcd, marked as draining.
    Draining,
    /// Deregistered, and not in etcd any more.
    Deregistered,
}

impl fmt::Display for RegistrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unready => f.write_str("unready"),
            Self::Registering => f.write_str("registering"),
            Self::Registered => f.write_str("registered"),
            Self::Recovering { reason, .. } => write!(f, "recovering: {reason}"),
            Self::Superseded { by, .. } => write!(f, "superseded by lease {by:x}"),
            Self::Draining => f.write_str("draining"),
            Self::Deregistered => f.write_str("deregistered"),
        }
    }
}

/// A registration's state and progress, as the reconciler reports it to the handles.
#[derive(Debug, Clone)]
pub(in crate::registrar) struct Status {
    pub(in crate::registrar) state: RegistrationState,
    /// The generation that is in etcd; `None` while the registrar does not know of any.
    pub(in crate::registrar) written: Option<u64>,
    /// The last error; `None` after a success.
    pub(in crate::registrar) error: Option<Error>,
    /// Whether the instance is held back because its server is not ready.
    pub(in crate::registrar) held_back: bool,
    /// Whether the registration can never return to etcd, because it is deregistered (perhaps not
    /// deleted yet) or the client was closed.
    pub(in crate::registrar) terminal: bool,
}

/// A registration's access to its entry.
#[derive(Debug)]
pub(in crate::registrar) struct EntryHandle {
    pub(in crate::registrar) id: EntryId,
    /// The generation whose write a caller of `register` waits for.
    pub(in crate::registrar) generation: u64,
    pub(in crate::registrar) status: watch::Receiver<Status>,
}

/// The reporting end of a registration's status.
#[derive(Debug)]
pub(super) struct StatusSender(watch::Sender<Status>);

impl StatusSender {
    pub(super) fn new(desired: Desired) -> (Self, watch::Receiver<Status>) {
        let is_held_back = desired == Desired::HeldBack;
        let state = if is_held_back {
            RegistrationState::Unready
        } else {
            RegistrationState::Registering
        };
        let (sender, receiver) = watch::channel(Status {
            state,
            written: None,
            error: None,
            held_back: is_held_back,
            terminal: false,
        });
        (Self(sender), receiver)
    }

    pub(super) fn set_error(&self, error: Option<Error>) {
        self.0.send_modify(|status| status.error = error);
    }

    pub(super) fn set_held_back(&self, is_held_back: bool) {
        self.0.send_modify(|status| status.held_back = is_held_back);
    }

    pub(super) fn set_terminal(&self) {
        self.0.send_modify(|status| status.terminal = true);
    }

    pub(super) fn set_state(&self, state: RegistrationState) {
        self.0.send_if_modified(|status| {
            let is_changed = status.state != state;
            status.state = state;
            is_changed
        });
    }

    /// Reports that the instance is being written as if for the first time.
    pub(super) fn report_registering(&self) {
        self.0.send_modify(|status| {
            status.state = RegistrationState::Registering;
            status.written = None;
            status.error = None;
        });
    }

    /// Reports that etcd has this generation of the instance.
    pub(super) fn report_present(&self, state: RegistrationState, generation: u64) {
        self.0.send_if_modified(|status| {
            let is_changed = status.state != state || status.written != Some(generation);
            status.state = state;
            status.written = Some(generation);
            status.error = None;
            is_changed
        });
    }

    /// Reports that the registration with the lease `by` owns `key`.
    pub(super) fn report_superseded(&self, by: i64, key: &str, now: Timestamp) {
        self.0.send_modify(|status| {
            let since = match status.state {
                RegistrationState::Superseded { since, by: same } if same == by => since,
                _ => now.wall,
            };
            status.state = RegistrationState::Superseded { since, by };
            status.written = None;
            status.error = Some(Error::Superseded {
                key: key.to_owned(),
                by,
            });
        });
    }

    /// Reports that the instance may be missing from etcd because of `fault`. An instance that was
    /// not in etcd before has nothing to recover, and keeps its state.
    pub(super) fn report_recovering(&self, fault: &str, written: Option<u64>, now: Timestamp) {
        self.0.send_modify(|status| {
            let since = match status.state {
                RegistrationState::Registering | RegistrationState::Unready => return,
                // The first fault tells since when the instance may be missing.
                RegistrationState::Recovering { since, .. } => since,
                _ => now.wall,
            };
            let reason = match &status.error {
                Some(error) => format!("{fault} ({error})").into(),
                None => fault.into(),
            };
            status.state = RegistrationState::Recovering { since, reason };
            status.written = written;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_says_the_state_and_its_cause() {
        let since = SystemTime::UNIX_EPOCH;
        let reason = "the key was deleted".into();
        for (state, shown) in [
            (RegistrationState::Registered, "registered"),
            (
                RegistrationState::Recovering { since, reason },
                "recovering: the key was deleted",
            ),
            (
                RegistrationState::Superseded { since, by: 0x2a },
                "superseded by lease 2a",
            ),
        ] {
            assert_eq!(state.to_string(), shown);
        }
    }
}
