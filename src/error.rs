//! The error type of the crate.

mod causes;

use std::time::Duration;

use tonic::Code;

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
    #[error("no etcd member responded within {after:?}; tried {}: {reason}", .endpoints.join(", "))]
    #[non_exhaustive]
    Unreachable {
        /// The endpoints that were tried.
        endpoints: Vec<String>,
        /// How long the client tried.
        after: Duration,
        /// The last failure.
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
        /// Why each member is not connected.
        reason: String,
    },

    /// An operation did not finish in time. etcd may have executed the request or not.
    #[error("{operation} did not finish within {after:?}")]
    #[non_exhaustive]
    Timeout {
        /// The operation, with its key or id.
        operation: String,
        /// The timeout.
        after: Duration,
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
    #[error(
        "the requested revision has been compacted; the oldest available is {compact_revision}"
    )]
    #[non_exhaustive]
    Compacted {
        /// The oldest revision that a watch can still start from.
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

    /// The gRPC status code of an error that a remote call ended with.
    ///
    /// [`Rpc`](Self::Rpc) has the code of its status. The errors that the client itself detects
    /// during a call have the code that gRPC gives to such an error: `UNAVAILABLE` for
    /// [`NotConnected`](Self::NotConnected), [`StreamLost`](Self::StreamLost) and
    /// [`LeaseNotApplied`](Self::LeaseNotApplied), `ABORTED` for [`Conflict`](Self::Conflict) and
    /// [`DataReplaced`](Self::DataReplaced), `FAILED_PRECONDITION` for [`KeyLost`](Self::KeyLost).
    /// All others have none.
    pub fn code(&self) -> Option<Code> {
        match self {
            Error::Rpc { status, .. } => Some(status.code()),
            Error::NotConnected { .. }
            | Error::StreamLost { .. }
            | Error::LeaseNotApplied { .. } => Some(Code::Unavailable),
            Error::Conflict { .. } | Error::DataReplaced { .. } => Some(Code::Aborted),
            Error::KeyLost { .. } => Some(Code::FailedPrecondition),
            _ => None,
        }
    }

    /// Whether the same operation may succeed later without a change of the program or of the
    /// user's permissions.
    ///
    /// `true` means that etcd, or the way to etcd, was at fault: no member responded, a timeout, a
    /// lost stream, a conflict with another writer, or a status such as `UNAVAILABLE`, `INTERNAL`
    /// or `RESOURCE_EXHAUSTED`. A full or corrupt etcd counts as well, because it needs an operator
    /// but not another request. `false` means that the request, the user or the state of this
    /// process has to change first: an invalid argument, a missing permission, a closed client, a
    /// lease that is gone, a compacted revision.
    ///
    /// A write whose error is retryable may nevertheless have been applied. Repeat a write only if
    /// applying it twice does no harm, or after a look at the key.
    ///
    /// ```
    /// use goo_etcd::{Client, Result};
    ///
    /// /// Writes a heartbeat. `false` means that the next one may succeed.
    /// async fn beat(client: &Client) -> Result<bool> {
    ///     match client.put("heartbeat", "1", None).await {
    ///         Ok(_) => Ok(true),
    ///         Err(error) if error.is_retryable() => Ok(false),
    ///         Err(error) => Err(error),
    ///     }
    /// }
    /// ```
    pub fn is_retryable(&self) -> bool {
        match self {
            Error::Rpc { status, .. } => !matches!(
                status.code(),
                Code::InvalidArgument
                    | Code::NotFound
                    | Code::AlreadyExists
                    | Code::PermissionDenied
                    | Code::Unauthenticated
                    | Code::FailedPrecondition
                    | Code::OutOfRange
                    | Code::Unimplemented
            ),
            Error::Unreachable { .. }
            | Error::NotConnected { .. }
            | Error::Timeout { .. }
            | Error::StreamLost { .. }
            | Error::LeaseUnconfirmed { .. }
            | Error::LeaseNotApplied { .. }
            | Error::DataReplaced { .. }
            | Error::Conflict { .. } => true,
            Error::Invalid { .. }
            | Error::Compacted { .. }
            | Error::LeaseNotFound { .. }
            | Error::RevisionWentBack { .. }
            | Error::KeyLost { .. }
            | Error::Closed { .. }
            | Error::ClientAlreadyRegistered { .. }
            | Error::UnknownClient { .. }
            | Error::NoDefaultClient { .. }
            | Error::CloseAll { .. }
            | Error::Deregistered { .. }
            | Error::Superseded { .. }
            | Error::InstanceAlreadyRegistered { .. }
            | Error::RuntimeEnded { .. }
            | Error::NoRuntime { .. }
            | Error::RegistrarClosed => false,
        }
    }

    /// Whether etcd refused the operation because the user lacks a permission.
    ///
    /// A wrong password is not meant: etcd reports one as an invalid argument.
    pub fn is_permission_denied(&self) -> bool {
        self.code() == Some(Code::PermissionDenied)
    }

    /// Whether the client was closed, by [`Client::close`](crate::Client::close) or
    /// [`close_all`](crate::close_all).
    pub fn is_closed(&self) -> bool {
        matches!(self, Error::Closed { .. })
    }

    /// Whether background work, such as a directory or a lock, must end with this error.
    ///
    /// Some errors are not retryable, but do not end such work. After a compacted or rewound
    /// history the work lists again. `NOT_FOUND` and `ALREADY_EXISTS` come from a proxy without a
    /// route to etcd, because the errors that etcd itself has with these codes are handled before.
    pub(crate) fn is_permanent(&self) -> bool {
        let may_pass = match self {
            Error::Compacted { .. } | Error::RevisionWentBack { .. } => true,
            Error::Rpc { status, .. } => {
                matches!(status.code(), Code::NotFound | Code::AlreadyExists)
            }
            _ => false,
        };
        !self.is_retryable() && !may_pass
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rpc(code: Code) -> Error {
        Error::Rpc {
            operation: "get \"key\"".into(),
            status: Box::new(tonic::Status::new(code, "text")),
        }
    }

    #[test]
    fn table_of_status_codes() {
        for (code, retryable) in [
            (Code::Cancelled, true),
            (Code::Unknown, true),
            (Code::InvalidArgument, false),
            (Code::DeadlineExceeded, true),
            (Code::NotFound, false),
            (Code::AlreadyExists, false),
            (Code::PermissionDenied, false),
            (Code::ResourceExhausted, true),
            (Code::FailedPrecondition, false),
            (Code::Aborted, true),
            (Code::OutOfRange, false),
            (Code::Unimplemented, false),
            (Code::Internal, true),
            (Code::Unavailable, true),
            (Code::DataLoss, true),
            (Code::Unauthenticated, false),
        ] {
            let error = rpc(code);
            assert_eq!(error.code(), Some(code));
            assert_eq!(error.is_retryable(), retryable, "{error}");
            let may_pass = matches!(code, Code::NotFound | Code::AlreadyExists);
            assert_eq!(error.is_permanent(), !retryable && !may_pass, "{error}");
            let is_denied = code == Code::PermissionDenied;
            assert_eq!(error.is_permission_denied(), is_denied, "{error}");
            assert!(!error.is_closed(), "{error}");
        }
    }

    fn check(error: &Error, retryable: bool, permanent: bool, code: Option<Code>) {
        assert_eq!(error.is_retryable(), retryable, "{error}");
        assert_eq!(error.is_permanent(), permanent, "{error}");
        assert_eq!(error.code(), code, "{error}");
        let is_closed = matches!(error, Error::Closed { .. });
        assert_eq!(error.is_closed(), is_closed, "{error}");
        assert!(!error.is_permission_denied(), "{error}");
    }

    const AFTER: Duration = Duration::from_secs(1);

    fn operation() -> String {
        "put \"key\"".to_owned()
    }

    fn reason() -> String {
        "text".to_owned()
    }

    #[test]
    fn failures_of_etcd_or_the_network_are_retryable() {
        let unreachable = Error::Unreachable {
            endpoints: vec!["localhost:2379".to_owned()],
            after: AFTER,
            reason: reason(),
        };
        check(&unreachable, true, false, None);
        let not_connected = Error::NotConnected {
            operation: operation(),
            after: AFTER,
            reason: reason(),
        };
        check(&not_connected, true, false, Some(Code::Unavailable));
        let timeout = Error::Timeout {
            operation: operation(),
            after: AFTER,
        };
        check(&timeout, true, false, None);
        let stream_lost = Error::StreamLost {
            operation: operation(),
            reason: reason(),
        };
        check(&stream_lost, true, false, Some(Code::Unavailable));
        let unconfirmed = Error::LeaseUnconfirmed {
            id: 7,
            after: AFTER,
            reason: reason(),
        };
        check(&unconfirmed, true, false, None);
        let not_applied = Error::LeaseNotApplied { id: 7 };
        check(&not_applied, true, false, Some(Code::Unavailable));
        let replaced = Error::DataReplaced {
            operation: operation(),
        };
        check(&replaced, true, false, Some(Code::Aborted));
        let conflict = Error::Conflict {
            operation: operation(),
            attempts: 5,
        };
        check(&conflict, true, false, Some(Code::Aborted));
    }

    #[test]
    fn lost_history_needs_another_list() {
        let compacted = Error::Compacted {
            compact_revision: 7,
        };
        check(&compacted, false, false, None);
        check(
            &Error::RevisionWentBack { seen: 7, now: 1 },
            false,
            false,
            None,
        );
    }

    #[test]
    fn other_errors_are_permanent() {
        let (key, name) = (|| "key".to_owned(), || "main".to_owned());
        let key_lost = Error::KeyLost { key: key() };
        check(&key_lost, false, true, Some(Code::FailedPrecondition));
        for error in [
            Error::invalid("ttl", "0", "text"),
            Error::LeaseNotFound { id: 7 },
            Error::Closed { name: name() },
            Error::ClientAlreadyRegistered { name: name() },
            Error::UnknownClient {
                name: name(),
                known: vec![name()],
            },
            Error::NoDefaultClient {
                known: vec![name()],
            },
            Error::CloseAll {
                failures: Vec::new(),
            },
            Error::Deregistered { key: key() },
            Error::Superseded { key: key(), by: 7 },
            Error::InstanceAlreadyRegistered { key: key() },
            Error::RuntimeEnded {
                operation: operation(),
                what: "the client",
            },
            Error::NoRuntime {
                operation: operation(),
                remedy: "",
            },
            Error::RegistrarClosed,
        ] {
            check(&error, false, true, None);
        }
    }
}
