//! The errors of etcd that this crate tells apart.
//!
//! No other file of the crate knows etcd's error texts. etcd gives several errors the same gRPC
//! code, so its own clients tell them apart by their text as well. The texts come from etcd's
//! package `api/v3rpc/rpctypes`, and are the same from 3.4 to 3.7.

use tonic::{Code, Status};

use crate::error::Error;

/// The text of the error of a token that is older than its users and roles (`ErrAuthOldRevision`).
const OLD_TOKEN: &str = "revision of auth store is old";

/// The text of the refusal of a call without a user (`ErrUserEmpty`).
const NO_USER: &str = "user name is empty";

/// The text with which a learner refuses a call (`ErrGRPCNotSupportedForLearner`).
const LEARNER_REFUSAL: &str = "rpc not supported for learner";

/// An error of etcd's, decoded from its gRPC code and its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EtcdError {
    /// The requested revision has been compacted.
    Compacted,
    /// The member has no leader. etcd's own services respond this way before they look at the
    /// request; services that call etcd from within (`v3lock`, `v3election`) may have changed
    /// something.
    NoLeader,
    /// The member does not know the user's token, or the token has expired.
    InvalidToken,
    /// The token is older than the last change of users or roles. Only a new token helps, as with
    /// `InvalidToken`, but etcd uses the code of an invalid argument.
    OldToken,
    /// The call has no token, but needs a user.
    NoUser,
    /// The user lacks a permission. etcd before 3.5.5 says the same of an expired token.
    PermissionDenied,
    /// The user asked for a token while etcd has authentication disabled.
    AuthNotEnabled,
    /// The database is full. etcd then refuses everything that needs room, but still deletes.
    NoSpace,
    /// No lease with this id exists.
    LeaseNotFound,
    /// A lease with the id chosen for a grant exists.
    LeaseExists,
    /// The member is a learner and executes only `Status` and serializable reads. A learner refuses
    /// before it looks at the request: up to 3.5 as unavailable, from 3.6 on as a failed
    /// precondition.
    Learner,
    /// A message is larger than the client's limit, or would be.
    TooLarge,
    /// Any other error.
    Other,
}

/// Each error with its code and a part of its text.
const KNOWN: [(Code, &str, EtcdError); 11] = [
    (Code::OutOfRange, "has been compacted", EtcdError::Compacted),
    (
        Code::Unavailable,
        "etcdserver: no leader",
        EtcdError::NoLeader,
    ),
    (Code::InvalidArgument, OLD_TOKEN, EtcdError::OldToken),
    // The code that the transport gives this refusal.
    (Code::Unauthenticated, OLD_TOKEN, EtcdError::OldToken),
    (Code::InvalidArgument, NO_USER, EtcdError::NoUser),
    (
        Code::FailedPrecondition,
        "authentication is not enabled",
        EtcdError::AuthNotEnabled,
    ),
    (
        Code::ResourceExhausted,
        "database space exceeded",
        EtcdError::NoSpace,
    ),
    (Code::NotFound, "lease not found", EtcdError::LeaseNotFound),
    (
        Code::FailedPrecondition,
        "lease already exists",
        EtcdError::LeaseExists,
    ),
    (
        Code::FailedPrecondition,
        LEARNER_REFUSAL,
        EtcdError::Learner,
    ),
    (Code::Unavailable, LEARNER_REFUSAL, EtcdError::Learner),
];

impl EtcdError {
    /// Decodes an error of this crate.
    pub(crate) fn of(error: &Error) -> Self {
        match error {
            Error::Compacted { .. } => Self::Compacted,
            Error::LeaseNotFound { .. } => Self::LeaseNotFound,
            Error::Rpc { status, .. } => Self::decode(status.code(), status.message()),
            _ => Self::Other,
        }
    }

    /// Decodes an error of etcd-client.
    pub(crate) fn of_client(error: &etcd_client::Error) -> Self {
        match error {
            etcd_client::Error::GRpcStatus(status) => Self::decode(status.code(), status.message()),
            _ => Self::Other,
        }
    }

    /// Decodes a gRPC code and its message.
    pub(crate) fn decode(code: Code, message: &str) -> Self {
        let is_meant = |known: &&(Code, &str, Self)| known.0 == code && message.contains(known.1);
        if let Some((_, _, error)) = KNOWN.iter().find(is_meant) {
            return *error;
        }
        match code {
            Code::Unauthenticated => Self::InvalidToken,
            Code::PermissionDenied => Self::PermissionDenied,
            // The limits of messages are checked by this client and by tonic. etcd uses the code
            // for revisions and TTLs that are out of range.
            Code::OutOfRange if !message.starts_with("etcdserver") => Self::TooLarge,
            _ => Self::Other,
        }
    }

    /// Whether a status of a call for a lease is etcd's refusal of that lease. Some releases of etcd
    /// refuse to renew and to revoke a lease if the user may not write one of its keys. Gateways
    /// refuse calls with other texts.
    pub(crate) fn is_refusal_of_lease(status: &Status) -> bool {
        status.code() == Code::PermissionDenied && status.message().starts_with("etcdserver: ")
    }

    /// Whether etcd refused the user, because of the token or of a missing permission.
    pub(crate) fn is_auth_refusal(self) -> bool {
        matches!(
            self,
            Self::InvalidToken | Self::OldToken | Self::NoUser | Self::PermissionDenied
        )
    }
}

/// Whether a voting member of etcd refused a call only because of its user. A learner says first that
/// it is one, and a proxy has other texts.
pub(super) fn is_refusal_of_user(error: &etcd_client::Error) -> bool {
    let etcd_client::Error::GRpcStatus(status) = error else {
        return false;
    };
    let error = EtcdError::decode(status.code(), status.message());
    error.is_auth_refusal() && status.message().starts_with("etcdserver: ")
}

/// The status for the reason with which etcd cancels a watch. Watches share a stream, so etcd gives
/// the reason as a text without a code; the code here is the one of the same text in a unary
/// response. An old token gets the code of an expired one, because a new token helps.
pub(super) fn cancel_status(reason: &str) -> Status {
    let has = |text: &str| reason.contains(text);
    let code = if has("invalid auth token") || has(OLD_TOKEN) {
        Code::Unauthenticated
    } else if has("permission denied") {
        Code::PermissionDenied
    } else if has("has been compacted") {
        Code::OutOfRange
    } else if has(NO_USER) || has("duplicate ID") {
        Code::InvalidArgument
    } else {
        Code::Unavailable
    };
    match reason {
        "" => Status::new(code, "etcd cancelled the watch without a reason"),
        reason => Status::new(code, reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: [(Code, &str, EtcdError); 17] = [
        (
            Code::OutOfRange,
            "etcdserver: mvcc: required revision has been compacted",
            EtcdError::Compacted,
        ),
        (
            Code::OutOfRange,
            "etcdserver: mvcc: required revision is a future revision",
            EtcdError::Other,
        ),
        (
            Code::OutOfRange,
            "the response of 9 bytes is over max_call_recv_msg_size, 8 bytes",
            EtcdError::TooLarge,
        ),
        (
            Code::Unavailable,
            "etcdserver: no leader",
            EtcdError::NoLeader,
        ),
        (
            Code::Unavailable,
            "etcdserver: leader changed",
            EtcdError::Other,
        ),
        (
            Code::Unauthenticated,
            "etcdserver: invalid auth token",
            EtcdError::InvalidToken,
        ),
        (
            Code::InvalidArgument,
            "etcdserver: revision of auth store is old",
            EtcdError::OldToken,
        ),
        (
            Code::InvalidArgument,
            "etcdserver: user name is empty",
            EtcdError::NoUser,
        ),
        (
            Code::PermissionDenied,
            "etcdserver: permission denied",
            EtcdError::PermissionDenied,
        ),
        (
            Code::FailedPrecondition,
            "etcdserver: authentication is not enabled",
            EtcdError::AuthNotEnabled,
        ),
        (
            Code::FailedPrecondition,
            "etcdserver: lease already exists",
            EtcdError::LeaseExists,
        ),
        (
            Code::FailedPrecondition,
            "etcdserver: rpc not supported for learner",
            EtcdError::Learner,
        ),
        (
            Code::Unavailable,
            "etcdserver: rpc not supported for learner",
            EtcdError::Learner,
        ),
        (
            Code::NotFound,
            "etcdserver: requested lease not found",
            EtcdError::LeaseNotFound,
        ),
        (
            Code::NotFound,
            "etcdserver: member not found",
            EtcdError::Other,
        ),
        (
            Code::ResourceExhausted,
            "etcdserver: mvcc: database space exceeded",
            EtcdError::NoSpace,
        ),
        (
            Code::ResourceExhausted,
            "etcdserver: too many requests",
            EtcdError::Other,
        ),
    ];

    #[test]
    fn code_and_text_decode_to_the_error() {
        for (code, text, error) in TABLE {
            assert_eq!(EtcdError::decode(code, text), error, "{text}");
            let client = etcd_client::Error::GRpcStatus(Status::new(code, text));
            assert_eq!(EtcdError::of_client(&client), error, "{text}");
            assert_eq!(EtcdError::of(&Error::from_etcd("put", client)), error);
        }
    }

    #[test]
    fn cancel_reason_gets_the_code_of_its_text() {
        for (reason, code) in [
            ("etcdserver: invalid auth token", Code::Unauthenticated),
            (
                "etcdserver: revision of auth store is old",
                Code::Unauthenticated,
            ),
            ("etcdserver: permission denied", Code::PermissionDenied),
            ("etcdserver: user name is empty", Code::InvalidArgument),
            ("etcdserver: no leader", Code::Unavailable),
            ("", Code::Unavailable),
        ] {
            assert_eq!(cancel_status(reason).code(), code, "{reason}");
        }
    }
}
