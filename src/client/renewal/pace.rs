//! How long a renewal waits for a response.

use std::time::Duration;

/// How long a renewal waits for a response before it is sent again. Grows with the lease's TTL,
/// because a longer TTL leaves more time for a member that is slow but not stuck.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::client) struct Pace {
    unit: Duration,
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
            unit: ttl.map_or(WITHOUT_TTL, |ttl| (ttl / 12).min(LONGEST)),
        }
    }

    /// The silence of a stream after which another member is asked: longer for a member whose last
    /// response took long, but at most a third of the TTL.
    pub(super) fn hedge_after(self, round_trip: Duration) -> Duration {
        (round_trip * 2).clamp(self.unit, self.unit * 4)
    }

    /// The silence of a stream after which the member is asked on a further one: at most half of
    /// the TTL. In three units, each of three members is asked once.
    pub(super) fn reopen_after(self, round_trip: Duration) -> Duration {
        (round_trip * 2).clamp(self.unit * 3, self.unit * 6)
    }

    /// The silence of a stream after which it is closed, once another member has responded.
    pub(super) fn close_after(self, round_trip: Duration) -> Duration {
        (round_trip * 2).max(self.unit)
    }
}
