//! The leases that this client has granted as probes.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// The TTL of a probe, in seconds. Above etcd's usual minimum of 2 s, which would replace a smaller
/// TTL, and short, because keys that are put under a probe in the meantime stay until it expires.
const TTL: i64 = 13;

/// A longer minimum TTL than any etcd has: one and a half times its longest election timeout, 50 s.
const LONGEST_MINIMUM: i64 = 75;

/// How long a probe is remembered: until it has expired, even if etcd granted it some time after it
/// was requested.
const REMEMBERED_FOR: Duration = Duration::from_secs(120);

/// The probes that may exist.
///
/// To find out whether a lease still exists, the client tries to grant one with the same id. If
/// that succeeds, the lease was gone, and the new one is a probe that the client revokes at once. A
/// probe that could not be revoked, or whose grant got no response, must not be taken for the
/// lease. etcd never changes the TTL of a lease, so a probe gets another TTL than the lease had.
///
/// Only the client that requested a probe knows it. Another client that renews the same lease takes
/// the probe for it, and keeps it alive, until the probe is revoked.
#[derive(Debug, Default)]
pub(super) struct Probes(Mutex<HashMap<i64, Probe>>);

#[derive(Debug)]
struct Probe {
    ttl: i64,
    forget_at: Instant,
}

/// The TTL of a probe for a lease, which differs from the lease's.
pub(super) fn probe_ttl(lease_ttl: Option<i64>) -> i64 {
    match lease_ttl {
        Some(ttl @ TTL..=LONGEST_MINIMUM) => ttl + 1,
        _ => TTL,
    }
}

impl Probes {
    /// Remembers a probe before it is requested, and again with the TTL that etcd granted. Returns
    /// whether an earlier one is remembered.
    pub(super) fn remember(&self, id: i64, ttl: i64) -> bool {
        let now = Instant::now();
        let mut probes = self.0.lock();
        probes.retain(|_, probe| now < probe.forget_at);
        let forget_at = now + REMEMBERED_FOR;
        probes.insert(id, Probe { ttl, forget_at }).is_some()
    }

    pub(super) fn forget(&self, id: i64) {
        self.0.lock().remove(&id);
    }

    /// Whether the lease with this id and TTL is a probe.
    pub(super) fn contains(&self, id: i64, ttl: i64) -> bool {
        let probes = self.0.lock();
        probes
            .get(&id)
            .is_some_and(|probe| probe.ttl == ttl && Instant::now() < probe.forget_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn probe_is_remembered_until_it_has_expired() {
        let probes = Probes::default();
        assert!(!probes.remember(7, 13));
        assert!(probes.contains(7, 13));
        assert!(!probes.contains(7, 14) && !probes.contains(8, 13));
        assert!(probes.remember(7, 15));
        assert!(!probes.contains(7, 13) && probes.contains(7, 15));
        tokio::time::advance(REMEMBERED_FOR).await;
        assert!(!probes.contains(7, 15));
        assert!(!probes.remember(8, 13));
        probes.forget(8);
        assert!(!probes.contains(8, 13));
        assert!(probes.0.lock().is_empty());
    }

    #[test]
    fn probe_has_another_ttl_than_the_lease() {
        for ttl in [1, 12, 13, 14, 75, 76, 600] {
            assert_ne!(probe_ttl(Some(ttl)), ttl);
            // The lease may have any minimum TTL of etcd.
            assert_ne!(probe_ttl(Some(ttl)).max(ttl.min(75)), ttl);
        }
    }
}
