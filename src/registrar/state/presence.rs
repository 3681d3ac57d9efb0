//! The desired state of an entry, and its known state in etcd.

/// The state that the user wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::registrar) enum Desired {
    /// The keys should exist.
    Registered,
    /// The keys should not exist until the instance's server is ready.
    HeldBack,
    /// The keys should not exist, and the entry is removed once they are gone.
    Deregistered,
}

/// A report of the readiness of an instance's server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::registrar) enum Readiness {
    Ready,
    NotReady,
    /// No task follows the readiness any more.
    NotFollowed,
}

impl Readiness {
    /// Why an instance is held back; `None` if it is not.
    pub(super) fn held_back_reason(self) -> Option<&'static str> {
        match self {
            Self::Ready => None,
            Self::NotReady => Some("the server is not ready"),
            Self::NotFollowed => Some(
                "the server's readiness is not followed any more, because a runtime has ended or \
                 the stream `ready` has panicked",
            ),
        }
    }
}

/// The presence of the entry's keys in etcd under the registrar's leases, as far as known.
///
/// ```text
///            write sent            seen in etcd
///   Absent ------------> InDoubt ---------------> Present { generation }
///     ^  ^                    |                          |
///     |  |    deletion sent   v                          |
///     |  +-- deleted ------ Deleting <-------------------+
///     |                                                  |
///     +-------------- lease lost or revoked -------------+
/// ```
///
/// `Superseded` is reached from every state when another registration is found at one of the keys.
/// From there a write leads to `Present`, and a deletion to `Deleting` or `Absent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    /// The keys do not exist. Only a late write, as [`Entry::late_write`] describes, can create
    /// them.
    ///
    /// [`Entry::late_write`]: super::entry::Entry::late_write
    Absent,
    /// Some of the keys may exist, because a write was sent and its effect is not confirmed.
    InDoubt,
    /// Some of the keys may exist. A deletion was sent, and no write has arrived since.
    Deleting,
    /// The keys existed with the values of this generation.
    Present { generation: u64 },
    /// Another registration owns one of the keys. The entry waits until a watch reports a change.
    Superseded {
        /// Whether some of the keys may exist as `InDoubt` says.
        in_doubt: bool,
    },
}

impl Presence {
    /// Whether some of the keys may exist under one of the registrar's leases.
    pub(super) fn may_exist(self) -> bool {
        !matches!(self, Self::Absent | Self::Superseded { in_doubt: false })
    }

    /// Whether the keys were found in etcd, either as written or owned by another registration.
    pub(super) fn is_known(self) -> bool {
        matches!(self, Self::Present { .. } | Self::Superseded { .. })
    }

    pub(super) fn is_superseded(self) -> bool {
        matches!(self, Self::Superseded { .. })
    }

    /// The generation that is in etcd.
    pub(super) fn generation(self) -> Option<u64> {
        match self {
            Self::Present { generation } => Some(generation),
            _ => None,
        }
    }

    /// Records that a write was sent, or may still arrive.
    pub(super) fn mark_maybe_written(&mut self) {
        match self {
            Self::Absent | Self::Deleting => *self = Self::InDoubt,
            Self::Superseded { in_doubt } => *in_doubt = true,
            Self::InDoubt | Self::Present { .. } => {}
        }
    }

    /// Records that another registration owns one of the keys.
    pub(super) fn mark_superseded(&mut self) {
        let in_doubt = self.may_exist();
        *self = Self::Superseded { in_doubt };
    }

    /// Records that a deletion was sent, or is not needed: the keys no longer count as present.
    pub(super) fn mark_deleting(&mut self) {
        *self = if self.may_exist() {
            Self::Deleting
        } else {
            Self::Absent
        };
    }

    /// Records that the deletion was executed. A write that arrived meanwhile may have followed the
    /// deletion, so the keys stay in doubt.
    pub(super) fn mark_deleted(&mut self) {
        if *self == Self::Deleting {
            *self = Self::Absent;
        }
    }

    /// Records that another lease replaced the one that the keys are under.
    pub(super) fn mark_lease_replaced(&mut self) {
        if let Self::Present { .. } = self {
            *self = Self::InDoubt;
        }
    }

    /// Records that the lease is gone, and with it every key under it.
    pub(super) fn mark_lease_lost(&mut self) {
        *self = match self {
            Self::Superseded { .. } => Self::Superseded { in_doubt: false },
            _ => Self::Absent,
        };
    }
}
