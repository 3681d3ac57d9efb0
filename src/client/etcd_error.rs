//! The errors of etcd that this crate tells apart.

/// What etcd says of a token that is older than its users and roles (`ErrAuthOldRevision`).
pub(super) const OLD_TOKEN: &str = "revision of auth store is old";
