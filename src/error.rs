//! The one error type of the crate.

use std::time::Duration;

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, as the user of the crate sees it.
///
/// Each message says what was tried, on what, and where it helps, what to do. Secrets (passwords,
/// tokens, keys) and the values stored in etcd never appear in one.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument or a field of a configuration cannot be used. Nothing was sent.
    #[error("invalid {field} {value:?}: {reason}")]
    Invalid {
        /// The field or argument, as it is spelled in the API.
        field: &'static str,
        /// What was given; never a secret.
        value: String,
        /// Why it cannot be used, and what can.
        reason: String,
    },

    /// No etcd member answered in time.
    #[error("no etcd member answered within {after:?}; tried {}: {reason}", .endpoints.join(", "))]
    Unreachable {
        /// The endpoints that were tried.
        endpoints: Vec<String>,
        /// How long it was tried.
        after: Duration,
        /// The last thing that was seen.
        reason: String,
    },

    /// An operation did not finish in its time; what it asked for may have happened or not.
    #[error("{operation} did not finish within {after:?}")]
    Timeout {
        /// What was tried, with its key or id.
        operation: String,
        /// The time it was given.
        after: Duration,
    },

    /// etcd, or the way to it, answered with an error.
    #[error("{operation} failed: {} ({:?})", .status.message(), .status.code())]
    Rpc {
        /// What was tried, with its key or id.
        operation: String,
        /// The answer.
        #[source]
        status: Box<tonic::Status>,
    },

    /// The history that was asked for has been compacted away; list again, and watch from there.
    #[error(
        "the requested revision has been compacted; the oldest available is {compact_revision}"
    )]
    Compacted {
        /// The oldest revision that a watch can still start from.
        compact_revision: i64,
    },

    /// The lease has expired or was revoked, or never was.
    #[error("lease {id:x} is not there: it has expired or was revoked")]
    LeaseNotFound {
        /// The lease's id.
        id: i64,
    },

    /// A lease could not be renewed for its whole TTL. It may have expired; the renewals go on.
    #[error("lease {id:x} was not confirmed for {after:?} and may have expired: {reason}")]
    LeaseUnconfirmed {
        /// The lease's id.
        id: i64,
        /// The time since the last renewal that was answered.
        after: Duration,
        /// The last thing that was seen.
        reason: String,
    },

    /// etcd's history is shorter than what was seen of it: its data was wiped, or restored from
    /// a backup. List again, and watch from there.
    #[error("etcd went back from revision {seen} to {now}: its data was wiped or restored")]
    RevisionWentBack {
        /// The highest revision that etcd had told of.
        seen: i64,
        /// The revision it is at now.
        now: i64,
    },

    /// The client was closed.
    #[error("the client {name:?} is closed")]
    Closed {
        /// The client's name.
        name: String,
    },

    /// A client of this name is registered already; it stays in place.
    #[error(
        "a client named {name:?} is registered already; unregister it first, or choose another name"
    )]
    ClientAlreadyRegistered {
        /// The name.
        name: String,
    },

    /// No client of this name is registered.
    #[error("no client named {name:?} is registered; registered are: {}", list(.known))]
    UnknownClient {
        /// The name that was asked for.
        name: String,
        /// The names that are registered, sorted.
        known: Vec<String>,
    },

    /// No default client was chosen.
    #[error("no default client is set; call `register_default(config)`, or `set_default(name)` with one of: {}", list(.known))]
    NoDefaultClient {
        /// The names that are registered, sorted.
        known: Vec<String>,
    },

    /// Several clients were to be closed and some could not be closed cleanly; all are closed.
    #[error("closing failed for {}", .failures.iter().map(|(name, error)| format!("{name:?} ({error})")).collect::<Vec<_>>().join(", "))]
    CloseAll {
        /// Each client that failed, and how.
        failures: Vec<(String, Error)>,
    },

    /// The registration has ended: it was deregistered, or another took its place.
    #[error("{key} is not registered any more; register it anew")]
    Deregistered {
        /// The instance's key in etcd.
        key: String,
    },

    /// Another process has registered the same key later. When that registration goes, this one is
    /// back.
    #[error(
        "{key} is registered by another, under lease {by:x}; give each process an id of its own"
    )]
    Superseded {
        /// The instance's key in etcd.
        key: String,
        /// The other's lease.
        by: i64,
    },

    /// This instance is registered already through the same registrar.
    #[error(
        "{key} is registered already by this registrar; use the registration you have, or another id"
    )]
    InstanceAlreadyRegistered {
        /// The instance's key in etcd.
        key: String,
    },
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

impl Error {
    pub(crate) fn invalid(
        field: &'static str,
        value: impl Into<String>,
        reason: impl Into<String>,
    ) -> Self {
        Error::Invalid {
            field,
            value: value.into(),
            reason: reason.into(),
        }
    }

    /// An error of etcd-client as ours, with what was tried.
    pub(crate) fn from_etcd(operation: impl Into<String>, error: etcd_client::Error) -> Self {
        let status = match error {
            etcd_client::Error::GRpcStatus(status) => with_causes(status),
            etcd_client::Error::TransportError(error) => tonic::Status::unavailable(chain(&error)),
            other => tonic::Status::unknown(other.to_string()),
        };
        Error::Rpc {
            operation: operation.into(),
            status: Box::new(status),
        }
    }

    /// The gRPC status code, where etcd or the way to it answered with one.
    pub fn code(&self) -> Option<tonic::Code> {
        match self {
            Error::Rpc { status, .. } => Some(status.code()),
            _ => None,
        }
    }

    /// Whether etcd would answer the same again: the request or the user is at fault, not the
    /// way to etcd or its state.
    pub(crate) fn is_permanent(&self) -> bool {
        use tonic::Code::*;
        match self {
            Error::Invalid { .. } => true,
            Error::Rpc { status, .. } => matches!(
                status.code(),
                InvalidArgument
                    | PermissionDenied
                    | Unauthenticated
                    | FailedPrecondition
                    | Unimplemented
                    | OutOfRange
            ),
            _ => false,
        }
    }
}

/// A status that was made on this side says "tcp connect error" and hides why in its sources.
fn with_causes(status: tonic::Status) -> tonic::Status {
    use std::error::Error as _;
    let mut text = status.message().to_owned();
    append_causes(&mut text, status.source());
    if text == status.message() {
        return status;
    }
    tonic::Status::with_details_and_metadata(
        status.code(),
        text,
        status.details().to_vec().into(),
        status.metadata().clone(),
    )
}

/// An error with its causes in one line: the outermost alone often says as little as
/// "transport error".
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    append_causes(&mut text, error.source());
    text
}

fn append_causes(text: &mut String, mut source: Option<&(dyn std::error::Error + 'static)>) {
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Layers repeat each other, and tonic's own says no more than that it is one.
        if cause_text != "transport error" && !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
}
