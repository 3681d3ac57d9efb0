//! What a method of etcd's is: whether it may be repeated, and whether it streams.

/// How a call may be treated, by its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// It changes nothing: sent again when it failed, and sent to a second member beside the
    /// first when that one is slow to answer.
    Read,
    /// It may be done twice, but costs etcd much: sent again only when it failed.
    Repeatable,
    /// How a user's token is had: everything waits for it, and a password costs etcd tens of milliseconds of
    /// processor time.
    Authenticate,
    /// It may change something: sent again only when it provably did not happen.
    Write,
    /// The answer is a stream.
    AnswerStream,
    /// Request and answer are streams.
    Streams,
}

impl Method {
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
            | Some(("v3electionpb.Election", "Leader")) => Method::Read,
            Some(("etcdserverpb.Auth", "Authenticate")) => Method::Authenticate,
            // It reads all there is.
            Some(("etcdserverpb.Maintenance", "Hash")) => Method::Repeatable,
            Some(("etcdserverpb.KV", "RangeStream"))
            | Some(("etcdserverpb.Maintenance", "Snapshot"))
            | Some(("v3electionpb.Election", "Observe")) => Method::AnswerStream,
            Some(("etcdserverpb.Watch", "Watch"))
            | Some(("etcdserverpb.Lease", "LeaseKeepAlive")) => Method::Streams,
            _ => Method::Write,
        }
    }
}

/// How a user's token is had.
pub(super) const AUTHENTICATE: &str = "/etcdserverpb.Auth/Authenticate";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_to_be_harmless_is_a_write() {
        for (path, method) in [
            ("/etcdserverpb.KV/Range", Method::Read),
            ("/etcdserverpb.KV/Put", Method::Write),
            ("/etcdserverpb.KV/Txn", Method::Write),
            ("/etcdserverpb.Auth/Authenticate", Method::Authenticate),
            ("/etcdserverpb.Lease/LeaseGrant", Method::Write),
            ("/etcdserverpb.Lease/LeaseKeepAlive", Method::Streams),
            ("/etcdserverpb.Watch/Watch", Method::Streams),
            ("/v3lockpb.Lock/Lock", Method::Write),
            ("/etcdserverpb.KV/New", Method::Write),
            ("Range", Method::Write),
            ("", Method::Write),
        ] {
            assert_eq!(Method::of(path), method, "{path}");
        }
    }
}
