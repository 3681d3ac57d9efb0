//! The error type of the crate.

mod causes;
mod classify;

use std::time::Duration;

pub(crate) use causes::chain;
use causes::with_causes;

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong.
///
/// Each message names the operation, its target and the cause, and where it helps, a remedy.
/// Messages never contain secrets (passwords, tokens, keys of certificates) or values stored in
/// etcd.
///
/// Beside the variants, [`is_retryable`](Self::is_retryable),
/// [`is_permission_denied`](Self::is_permission_denied), [`is_closed`](Self::is_closed) and
/// [`code`](Self::code) answer the common questions.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument or a field of a configuration cannot be used. The request was not sent.
    #[error("invalid {field} {value:?}: {reason}")]
    #[non_exhaustive]
    Invalid {
        /// The field or argument, as it is spelled in the API.
        field: &'static str,
        /// The value; `[redacted]` for a secret.
        value: String,
        /// Why the value cannot be used, and which values can.
        reason: String,
    },

    /// No etcd member responded while a client connected.
    #[error("no etcd member responded within {after:?}; tried {}: {reason}", list_first(.endpoints))]
    #[non_exhaustive]
    Unreachable {
        /// The endpoints that were tried.
        endpoints: Vec<String>,
        /// How long the client tried.
        after: Duration,
        /// The last failure of each member.
        reason: String,
    },

    /// No etcd member was connected when the time of a call ended. A write may have been executed,
    /// if its connection closed before the response arrived.
    #[error("{operation} failed: no etcd member was connected for {after:?}: {reason}")]
    #[non_exhaustive]
    NotConnected {
        /// The operation, with its key or id.
        operation: String,
        /// How long the call waited.
        after: Duration,
        /// The last failure of each member that was tried, and why the others are not connected.
        reason: String,
    },

    /// An operation did not finish in time. etcd may have executed the request or not.
    #[error("{operation} did not finish within {after:?}: {reason}")]
    #[non_exhaustive]
    Timeout {
        /// The operation, with its key or id.
        operation: String,
        /// The timeout.
        after: Duration,
        /// The members that were tried, and the last failure of each.
        reason: String,
    },

    /// A call ended with a gRPC status: etcd's, a proxy's, or one of this client's own, such as
    /// `UNAVAILABLE` for a broken connection and `OUT_OF_RANGE` for a message over a limit.
    #[error("{operation} failed: {} ({:?})", .status.message(), .status.code())]
    #[non_exhaustive]
    Rpc {
        /// The operation, with its key or id.
        operation: String,
        /// The status, with its code and message.
        #[source]
        status: Box<tonic::Status>,
    },

    /// The stream that carried a watch or the renewals of a lease was lost. The watch or the
    /// renewals continue on a new stream.
    #[error("{operation} lost its stream: {reason}")]
    #[non_exhaustive]
    StreamLost {
        /// The operation of the stream, with its key or id.
        operation: String,
        /// How the loss showed.
        reason: String,
    },

    /// The requested history has been compacted. List again, and watch from the revision of the
    /// list.
    #[error("the requested revision has been compacted{}", oldest(*.compact_revision))]
    #[non_exhaustive]
    Compacted {
        /// The oldest revision that can still be read, and that a watch can start from. 0 if etcd
        /// did not say it: etcd says it to a watch, which the client opens after another call was
        /// refused.
        compact_revision: i64,
    },

    /// The lease has expired, was revoked, or never existed.
    #[error("lease {id:x} does not exist: it has expired or was revoked")]
    #[non_exhaustive]
    LeaseNotFound {
        /// The lease's id.
        id: i64,
    },

    /// A lease could not be renewed for its whole TTL. The lease may have expired; the renewals go
    /// on.
    #[error("lease {id:x} was not renewed for {after:?} and may have expired: {reason}")]
    #[non_exhaustive]
    LeaseUnconfirmed {
        /// The lease's id.
        id: i64,
        /// The time since the last successful renewal was sent.
        after: Duration,
        /// How the last attempt failed.
        reason: String,
    },

    /// The lease exists, but a new leader has not applied its grant yet and cannot renew the lease
    /// (etcd#6978).
    #[error("lease {id:x} exists, but the new leader has not applied its grant yet")]
    #[non_exhaustive]
    LeaseNotApplied {
        /// The lease's id.
        id: i64,
    },

    /// etcd's history is shorter than it was: etcd's data was wiped, or restored from a backup.
    /// List again, and watch from the revision of the list.
    #[error("etcd went back from revision {seen} to {now}: its data was wiped or restored")]
    #[non_exhaustive]
    RevisionWentBack {
        /// The highest revision that etcd has reported.
        seen: i64,
        /// etcd's present revision.
        now: i64,
    },

    /// etcd's data was wiped, or restored from a backup, while it was read.
    #[error("{operation} failed: etcd's data was wiped or restored meanwhile")]
    #[non_exhaustive]
    DataReplaced {
        /// The read operation.
        operation: String,
    },

    /// Another client changed the same keys between the read and the write of each attempt.
    #[error("{operation} failed: gave up after {attempts} conflicting writes by another client")]
    #[non_exhaustive]
    Conflict {
        /// The operation, with its keys.
        operation: String,
        /// How many times the write was tried.
        attempts: usize,
    },

    /// The key of a lock or an election was deleted or overwritten by another client, so that the
    /// lock or the leadership is lost.
    #[error("{key} is lost: the key was deleted or overwritten by another client")]
    #[non_exhaustive]
    KeyLost {
        /// The key in etcd.
        key: String,
    },

    /// The client was closed.
    #[error("the client {name:?} is closed")]
    #[non_exhaustive]
    Closed {
        /// The client's name.
        name: String,
    },

    /// A client of this name is registered already; it stays in place.
    #[error(
        "a client named {name:?} is registered already; unregister it first, or choose another name"
    )]
    #[non_exhaustive]
    ClientAlreadyRegistered {
        /// The name.
        name: String,
    },

    /// No client of this name is registered.
    #[error("no client named {name:?} is registered; registered are: {}", list(.known))]
    #[non_exhaustive]
    UnknownClient {
        /// The requested name.
        name: String,
        /// The registered names, sorted.
        known: Vec<String>,
    },

    /// No default client was chosen.
    #[error(
        "no default client is set; call `register_default(config)`, or `set_default(name)` with \
         one of: {}",
        list(.known)
    )]
    #[non_exhaustive]
    NoDefaultClient {
        /// The registered names, sorted.
        known: Vec<String>,
    },

    /// Some clients could not be closed cleanly. All are closed.
    #[error("closing failed for {}", list_failures(.failures))]
    #[non_exhaustive]
    CloseAll {
        /// The name of each client that failed, and its error.
        failures: Vec<(String, Error)>,
    },

    /// The registration has ended: it was deregistered, or replaced by another of the same
    /// registrar.
    #[error("{key} is no longer registered; register it again")]
    #[non_exhaustive]
    Deregistered {
        /// The instance's key in etcd.
        key: String,
    },

    /// The same key was registered later by another process. When that registration ends, this one
    /// returns.
    #[error(
        "{key} is registered by another process, under lease {by:x}; give each process its own id"
    )]
    #[non_exhaustive]
    Superseded {
        /// The instance's key in etcd.
        key: String,
        /// The lease of the other registration.
        by: i64,
    },

    /// The same registrar has registered this instance already.
    #[error(
        "{key} is registered already by this registrar; use the existing registration, or another id"
    )]
    #[non_exhaustive]
    InstanceAlreadyRegistered {
        /// The instance's key in etcd.
        key: String,
    },

    /// The Tokio runtime that ran the background tasks of a client or registrar has ended.
    /// Every test function of Tokio, for example, has a runtime of its own. A write that was in
    /// progress may have been executed.
    #[error(
        "{operation} failed: the Tokio runtime that ran the background tasks has ended; build {what} on a runtime that lives as long as it is used"
    )]
    #[non_exhaustive]
    RuntimeEnded {
        /// The operation, with its key or id.
        operation: String,
        /// The object that lost its tasks, such as `the client`.
        what: &'static str,
    },

    /// An operation that needs a Tokio runtime was tried outside of one, or on one without timers
    /// or I/O.
    #[error("{operation} needs a Tokio runtime{remedy}")]
    #[non_exhaustive]
    NoRuntime {
        /// The operation, with its key or id.
        operation: String,
        /// The remedy, which the message ends with.
        remedy: &'static str,
    },

    /// The registrar was closed, and accepts no registration any more.
    #[error("the registrar is closed; build another one to register")]
    RegistrarClosed,
}

fn oldest(compact_revision: i64) -> String {
    match compact_revision {
        0 => String::new(),
        revision => format!("; the oldest available is {revision}"),
    }
}

/// How many endpoints a message lists.
const MAX_LISTED: usize = 10;

fn list_first(endpoints: &[String]) -> String {
    let listed = &endpoints[..endpoints.len().min(MAX_LISTED)];
    let listed = listed.join(", ");
    match endpoints.len().saturating_sub(MAX_LISTED) {
        0 => listed,
        more => format!("{listed} and {more} more"),
    }
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

fn list_failures(failures: &[(String, Error)]) -> String {
    let failures = failures
        .iter()
        .map(|(name, error)| format!("{name:?} ({error})"));
    failures.collect::<Vec<_>>().join(", ")
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

    /// Converts an error of etcd-client, and adds the operation.
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
}
