//! The state of a registration, as its users see it.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

/// The state of a registration.
///
/// No state is final except `Deregistered`: from every other state the registrar keeps working
/// until etcd has the instance or the process ends.
///
/// Every state in which etcd differs from what the user wants says [`since`](Self::since) when, and
/// has the latest [`reason`](Self::reason).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegistrationState {
    /// Not in etcd, because the instance's server is not ready; see
    /// [`register_while_ready`](crate::Registrar::register_while_ready).
    #[non_exhaustive]
    Unready {
        /// When the instance was held back or, if it was in etcd, when it was removed.
        since: SystemTime,
        /// Why the instance is held back.
        reason: Arc<str>,
    },
    /// Not in etcd yet; the registrar is writing the instance for the first time.
    #[non_exhaustive]
    Registering {
        /// When the registration started.
        since: SystemTime,
        /// The latest failure. Before the first failure, the reason says that the instance is not written yet.
        reason: Arc<str>,
    },
    /// In etcd, under a lease that is kept alive.
    Registered,
    /// Written before, but perhaps not in etcd now, or without its latest change. The registrar is
    /// restoring the instance and keeps trying until it is back.
    #[non_exhaustive]
    Recovering {
        /// When the registrar noticed the fault.
        since: SystemTime,
        /// The fault, and the latest failure to mend it.
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
        /// Says that another process registered the key, and names the latest failure to find out
        /// whether that registration has ended.
        reason: Arc<str>,
    },
    /// In etcd, marked as draining.
    Draining,
    /// Perhaps still in etcd, although the instance was deregistered or its server is not ready,
    /// because an attempt to delete it failed. The registrar keeps trying.
    #[non_exhaustive]
    Removing {
        /// When the first attempt failed.
        since: SystemTime,
        /// The latest failure.
        reason: Arc<str>,
    },
    /// Deregistered, and not in etcd any more.
    Deregistered,
}

impl RegistrationState {
    /// Since when etcd differs from what the user wants; `None` if it does not.
    pub fn since(&self) -> Option<SystemTime> {
        match self {
            Self::Unready { since, .. }
            | Self::Registering { since, .. }
            | Self::Recovering { since, .. }
            | Self::Superseded { since, .. }
            | Self::Removing { since, .. } => Some(*since),
            Self::Registered | Self::Draining | Self::Deregistered => None,
        }
    }

    /// The latest reason why etcd differs from what the user wants; `None` if it does not.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Unready { reason, .. }
            | Self::Registering { reason, .. }
            | Self::Recovering { reason, .. }
            | Self::Superseded { reason, .. }
            | Self::Removing { reason, .. } => Some(reason),
            Self::Registered | Self::Draining | Self::Deregistered => None,
        }
    }

    /// The state's name in messages.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Unready { .. } => "unready",
            Self::Registering { .. } => "registering",
            Self::Registered => "registered",
            Self::Recovering { .. } => "recovering",
            Self::Superseded { .. } => "superseded",
            Self::Draining => "draining",
            Self::Removing { .. } => "removing",
            Self::Deregistered => "deregistered",
        }
    }

    /// Keeps the time since which `before` holds, if this is the same state, perhaps with another
    /// reason. Returns whether it is.
    pub(super) fn continue_from(&mut self, before: &Self) -> bool {
        match (self, before) {
            (Self::Superseded { by, .. }, Self::Superseded { by: before, .. }) if by != before => {
                false
            }
            (Self::Unready { since, .. }, Self::Unready { since: start, .. })
            | (Self::Registering { since, .. }, Self::Registering { since: start, .. })
            | (Self::Recovering { since, .. }, Self::Recovering { since: start, .. })
            | (Self::Superseded { since, .. }, Self::Superseded { since: start, .. })
            | (Self::Removing { since, .. }, Self::Removing { since: start, .. }) => {
                *since = *start;
                true
            }
            (now, before) => now == before,
        }
    }

    /// Replaces the reason, where the state has one.
    pub(super) fn set_reason(&mut self, latest: Arc<str>) {
        match self {
            Self::Unready { reason, .. }
            | Self::Registering { reason, .. }
            | Self::Recovering { reason, .. }
            | Self::Superseded { reason, .. }
            | Self::Removing { reason, .. } => *reason = latest,
            Self::Registered | Self::Draining | Self::Deregistered => {}
        }
    }
}

/// The name, the lease that supersedes the registration, and the reason.
impl fmt::Display for RegistrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        if let Self::Superseded { by, .. } = self {
            write!(f, " by lease {by:x}")?;
        }
        match self.reason() {
            Some(reason) => write!(f, ": {reason}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_says_the_state_and_its_reason() {
        let since = SystemTime::UNIX_EPOCH;
        let reason: Arc<str> = "the key was deleted".into();
        let recovering = RegistrationState::Recovering {
            since,
            reason: Arc::clone(&reason),
        };
        assert_eq!(recovering.to_string(), "recovering: the key was deleted");
        assert_eq!(recovering.since(), Some(since));
        assert_eq!(recovering.reason(), Some("the key was deleted"));
        let by = 0x2a;
        let superseded = RegistrationState::Superseded { since, by, reason };
        assert_eq!(
            superseded.to_string(),
            "superseded by lease 2a: the key was deleted"
        );
        let registered = RegistrationState::Registered;
        assert_eq!(registered.to_string(), "registered");
        assert_eq!((registered.since(), registered.reason()), (None, None));
    }
}
