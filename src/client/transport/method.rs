//! How each method of etcd's API may be called: whether it may be repeated, and whether it streams.

/// How a call may be treated, decided by its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CallKind {
    /// Changes nothing. Sent again after a failure, and to a second member beside the first when
    /// the first is slow.
    Read,
    /// May be executed twice, but costs etcd much. Sent again only after a failure.
    Idempotent,
    /// Fetches a user's token. All other calls wait for the token, and checking a password costs
    /// etcd tens of milliseconds of processor time.
    Authenticate,
    /// May change something. Sent again only when no member can have executed it.
    Write,
    /// The response is a stream. Sent once.
    ServerStream,
    /// Request and response are streams.
    Bidi,
}

impl CallKind {
    /// The kind of a call to this path. An unknown method is a write.
    pub(super) fn of(path: &str) -> Self {
        let path = path.strip_prefix('/').unwrap_or(path);
        match path.split_once('/') {
            Some(("etcdserverpb.KV", "Range"))
            | Some(("etcdserverpb.Lease", "LeaseTimeToLive" | "LeaseLeases"))
            | Some(("etcdserverpb.Cluster", "MemberList"))
            | Some(("etcdserverpb.Maintenance", "Status" | "HashKV"))
            | Some((
                "etcdserverpb.Auth",
                "AuthStatus" | "UserGet" | "UserList" | "RoleGet" | "RoleList",
            ))
            | Some(("v3electionpb.Election", "Leader")) => Self::Read,
            Some(("etcdserverpb.Auth", "Authenticate")) => Self::Authenticate,
            // The member reads its whole database.
            Some(("etcdserverpb.Maintenance", "Hash")) => Self::Idempotent,
            Some(("etcdserverpb.KV", "RangeStream"))
            | Some(("etcdserverpb.Maintenance", "Snapshot"))
            | Some(("v3electionpb.Election", "Observe")) => Self::ServerStream,
            Some(("etcdserverpb.Watch", "Watch"))
            | Some(("etcdserverpb.Lease", "LeaseKeepAlive")) => Self::Bidi,
            _ => Self::Write,
        }
    }

    /// Whether a unary call needs a leader, so that a member without one should refuse the call
    /// instead of letting it wait. Reads are sent to other members anyway, and a maintenance call
    /// is meant for a particular member in any state.
    pub(super) fn needs_leader(self, path: &str) -> bool {
        matches!(self, Self::Write | Self::Authenticate)
            && path.starts_with("/etcdserverpb.")
            && !path.starts_with("/etcdserverpb.Maintenance/")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_methods_are_writes() {
        for (path, kind) in [
            ("/etcdserverpb.KV/Range", CallKind::Read),
            ("/etcdserverpb.KV/Put", CallKind::Write),
            ("/etcdserverpb.KV/Txn", CallKind::Write),
            ("/etcdserverpb.Auth/Authenticate", CallKind::Authenticate),
            ("/etcdserverpb.Lease/LeaseGrant", CallKind::Write),
            ("/etcdserverpb.Lease/LeaseKeepAlive", CallKind::Bidi),
            ("/etcdserverpb.Watch/Watch", CallKind::Bidi),
            ("/v3lockpb.Lock/Lock", CallKind::Write),
            ("/etcdserverpb.KV/New", CallKind::Write),
            ("Range", CallKind::Write),
            ("", CallKind::Write),
        ] {
            assert_eq!(CallKind::of(path), kind, "{path}");
        }
    }
}
