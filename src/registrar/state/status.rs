//! The status of a registration: its state and progress, as the reconciler reports them.

use std::sync::Arc;

use tokio::sync::watch;

use super::action::Timestamp;
use super::ensure::EntryId;
use super::presence::Desired;
use super::registration_state::RegistrationState;
use crate::error::Error;
use crate::reasons::SeenReasons;

/// The reason of a new registration.
const NOT_WRITTEN: &str = "not written yet";

/// The reason of a registration that was not written, because no report of its server's readiness
/// has come.
const NOT_REPORTED: &str = "the server has not reported that it is ready";

const SUPERSEDED: &str = "another process registered the key later";

/// A registration's state and progress, as the reconciler reports it to the handles.
#[derive(Debug, Clone)]
pub(in crate::registrar) struct Status {
    pub(in crate::registrar) state: RegistrationState,
    /// Counts the new states and the new reasons. A reason that was reported before, as when
    /// members fail in different ways in turn, replaces the latest one without being counted.
    pub(in crate::registrar) announced: u64,
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
///
/// Logs each new state and each new reason once.
#[derive(Debug)]
pub(super) struct StatusSender {
    /// The entry's key, for the log.
    key: String,
    sender: watch::Sender<Status>,
    /// The first part of the reason, which failures to mend the fault follow in parentheses.
    fault: Option<&'static str>,
    /// Why the instance is held back.
    held_back_reason: &'static str,
    seen: SeenReasons,
}

impl StatusSender {
    pub(super) fn new(
        key: String,
        desired: Desired,
        now: Timestamp,
    ) -> (Self, watch::Receiver<Status>) {
        let is_held_back = desired == Desired::HeldBack;
        let since = now.wall;
        let state = if is_held_back {
            let reason = NOT_REPORTED.into();
            RegistrationState::Unready { since, reason }
        } else {
            let reason = NOT_WRITTEN.into();
            RegistrationState::Registering { since, reason }
        };
        let (sender, receiver) = watch::channel(Status {
            state,
            announced: 0,
            written: None,
            error: None,
            held_back: is_held_back,
            terminal: false,
        });
        let sender = Self {
            key,
            sender,
            fault: None,
            held_back_reason: NOT_REPORTED,
            seen: SeenReasons::default(),
        };
        (sender, receiver)
    }

    /// Sets the error for callers that wait. The state keeps its reason.
    pub(super) fn set_error(&self, error: Option<Error>) {
        self.sender.send_modify(|status| status.error = error);
    }

    /// Ends the registration. A caller that waits gets the error, so both are set at once.
    pub(super) fn set_terminal(&self, error: Option<Error>) {
        self.sender.send_modify(|status| {
            status.terminal = true;
            status.error = error;
        });
    }

    /// Records that the instance is held back, and why.
    pub(super) fn hold_back(&mut self, reason: &'static str, now: Timestamp) {
        self.held_back_reason = reason;
        self.sender.send_modify(|status| status.held_back = true);
        let is_unready = matches!(
            self.sender.borrow().state,
            RegistrationState::Unready { .. }
        );
        if is_unready {
            self.report_unready(now);
        }
    }

    /// Records that the instance is not held back any more.
    pub(super) fn release(&self) {
        self.sender.send_modify(|status| status.held_back = false);
    }

    /// Reports that the instance is not in etcd, because it is held back.
    pub(super) fn report_unready(&mut self, now: Timestamp) {
        let reason = self.held_back_reason;
        self.fault = Some(reason);
        let state = RegistrationState::Unready {
            since: now.wall,
            reason: reason.into(),
        };
        self.report(state, now, |_| {});
    }

    /// Reports that the instance is being written as if for the first time.
    pub(super) fn report_registering(&mut self, now: Timestamp) {
        self.fault = None;
        let state = RegistrationState::Registering {
            since: now.wall,
            reason: NOT_WRITTEN.into(),
        };
        self.report(state, now, |status| {
            status.written = None;
            status.error = None;
        });
    }

    /// Reports that etcd has this generation of the instance. `state` is `Registered` or
    /// `Draining`.
    pub(super) fn report_present(
        &mut self,
        state: RegistrationState,
        generation: u64,
        now: Timestamp,
    ) {
        self.fault = None;
        self.report(state, now, |status| {
            status.written = Some(generation);
            status.error = None;
        });
    }

    /// Reports that the instance is deregistered, and not in etcd any more.
    pub(super) fn report_deregistered(&mut self, now: Timestamp) {
        self.fault = None;
        self.report(RegistrationState::Deregistered, now, |_| {});
    }

    /// Reports that the registration with the lease `by` owns one of the keys.
    pub(super) fn report_superseded(&mut self, by: i64, now: Timestamp) {
        self.fault = Some(SUPERSEDED);
        let key = self.key.clone();
        let state = RegistrationState::Superseded {
            since: now.wall,
            by,
            reason: SUPERSEDED.into(),
        };
        self.report(state, now, |status| {
            status.written = None;
            status.error = Some(Error::Superseded { key, by });
        });
    }

    /// Reports that the instance, whose generation `written` was in etcd, may be missing there
    /// because of `fault`. The reason ends with the last error.
    pub(super) fn report_recovering(
        &mut self,
        fault: &'static str,
        written: Option<u64>,
        now: Timestamp,
    ) {
        self.fault = Some(fault);
        let state = RegistrationState::Recovering {
            since: now.wall,
            reason: describe(Some(fault), self.sender.borrow().error.as_ref()),
        };
        self.report(state, now, |status| status.written = written);
    }

    /// Whether the instance was not in etcd before, so that it has nothing to recover.
    pub(super) fn is_unwritten(&self) -> bool {
        use RegistrationState::{Registering, Unready};
        matches!(
            self.sender.borrow().state,
            Registering { .. } | Unready { .. }
        )
    }

    /// Reports that an attempt to bring etcd into the desired state failed.
    pub(super) fn report_failure(&mut self, error: &Error, now: Timestamp) {
        let mut state = self.sender.borrow().state.clone();
        state.set_reason(describe(self.fault, Some(error)));
        // Callers that wait learn that the registration is superseded, not that a check failed.
        let is_superseded = matches!(state, RegistrationState::Superseded { .. });
        self.report(state, now, |status| {
            if !is_superseded {
                status.error = Some(error.clone());
            }
        });
    }

    /// Reports that an attempt to delete the instance failed.
    pub(super) fn report_removing(&mut self, error: &Error, now: Timestamp) {
        self.fault = None;
        let state = RegistrationState::Removing {
            since: now.wall,
            reason: describe(None, Some(error)),
        };
        self.report(state, now, |status| status.error = Some(error.clone()));
    }

    /// Sets the state, which keeps the time since which it holds if it is the present one. Logs a
    /// new state and a new reason.
    fn report(
        &mut self,
        mut state: RegistrationState,
        now: Timestamp,
        change: impl FnOnce(&mut Status),
    ) {
        let (key, seen) = (&self.key, &mut self.seen);
        self.sender.send_modify(|status| {
            change(status);
            let is_continued = state.continue_from(&status.state);
            if !is_continued {
                seen.clear();
            }
            let is_new_reason = |reason| seen.insert(reason, now.wall);
            if state.reason().is_some_and(is_new_reason) || !is_continued {
                log(key, &state);
                status.announced += 1;
            }
            status.state = state;
        });
    }
}

/// The reason of a state: the fault, and the latest failure to mend it.
fn describe(fault: Option<&str>, error: Option<&Error>) -> Arc<str> {
    match (fault, error) {
        (Some(fault), Some(error)) => format!("{fault} ({error})").into(),
        (Some(fault), None) => fault.into(),
        (None, Some(error)) => error.to_string().into(),
        (None, None) => NOT_WRITTEN.into(),
    }
}

fn log(key: &str, state: &RegistrationState) {
    let name = state.name();
    match state {
        RegistrationState::Registering { reason, .. }
        | RegistrationState::Recovering { reason, .. }
        | RegistrationState::Superseded { reason, .. }
        | RegistrationState::Removing { reason, .. } => {
            tracing::warn!(key, state = name, %reason, "etcd does not have the desired state");
        }
        RegistrationState::Unready { reason, .. } => {
            tracing::info!(key, state = name, %reason, "the state of a registration changed");
        }
        RegistrationState::Registered
        | RegistrationState::Draining
        | RegistrationState::Deregistered => {
            tracing::info!(key, state = name, "the state of a registration changed");
        }
    }
}
