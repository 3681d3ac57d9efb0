//! Classifies errors: their gRPC code, and whether another attempt may help.

use tonic::Code;

use super::Error;

impl Error {
    /// The gRPC status code of an error that a remote call ended with.
    ///
    /// [`Rpc`](Self::Rpc) has the code of its status. The errors that the client itself detects
    /// during a call have the code that gRPC gives to such an error: `UNAVAILABLE` for
    /// [`NotConnected`](Self::NotConnected), [`StreamLost`](Self::StreamLost) and
    /// [`LeaseNotApplied`](Self::LeaseNotApplied), `ABORTED` for [`Conflict`](Self::Conflict) and
    /// [`DataReplaced`](Self::DataReplaced), `FAILED_PRECONDITION` for [`KeyLost`](Self::KeyLost).
    /// [`Compacted`](Self::Compacted) has etcd's own code, `OUT_OF_RANGE`. All others have none.
    pub fn code(&self) -> Option<Code> {
        match self {
            Error::Rpc { status, .. } => Some(status.code()),
            Error::NotConnected { .. }
            | Error::StreamLost { .. }
            | Error::LeaseNotApplied { .. } => Some(Code::Unavailable),
            Error::Conflict { .. } | Error::DataReplaced { .. } => Some(Code::Aborted),
            Error::KeyLost { .. } => Some(Code::FailedPrecondition),
            Error::Compacted { .. } => Some(Code::OutOfRange),
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
    /// False for a wrong password, which etcd reports as an invalid argument.
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
    use std::time::Duration;

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
            reason: reason(),
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
        check(&compacted, false, false, Some(Code::OutOfRange));
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
