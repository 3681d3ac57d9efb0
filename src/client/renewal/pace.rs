//! How long a renewal waits for a response.

use std::time::Duration;

/// How long a renewal waits for a response before another member is asked. Grows with the lease's
/// TTL, because a longer TTL leaves more time for a member that is slow but not stuck.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::client) struct Pace {
    hedge_after: Duration,
}

/// For a lease whose TTL is not known yet. Even etcd's minimum TTL of 2 s leaves time for each of
/// three members.
const WITHOUT_TTL: Duration = Duration::from_millis(500);

/// Far more than a renewal takes in one region (milliseconds).
const LONGEST: Duration = Duration::from_secs(1);

impl Pace {
    /// A renewal is due after a third of the TTL. A twelfth therefore leaves time for eight tries:
    /// at a TTL of 6 s, eight in 4 s. An election takes 1.5 to 2.3 s.
    pub(in crate::client) fn of_ttl(ttl: Option<Duration>) -> Self {
        Self {
            hedge_after: ttl.map_or(WITHOUT_TTL, |ttl| (ttl / 12).min(LONGEST)),
        }
    }

    /// The silence of a stream after which another member is asked.
    pub(super) fn hedge_after(self) -> Duration {
        self.hedge_after
    }

    /// The silence of a stream after which the member is asked on a new one. Twice as long after
    /// each such replacement in a row, so that a network that is slower than expected does not lose
    /// every response.
    pub(super) fn replace_after(self, replaced: u32) -> Duration {
        self.hedge_after * 3 * 2_u32.pow(replaced.min(4))
    }
}
