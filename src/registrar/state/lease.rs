//! The lease that the instances are under.

use std::time::Duration;

use tokio::time::Instant;

/// A lease, and how long it lasts as far as is known here: judged from when the last renewal that was
/// answered was sent, whatever was sent since.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lease {
    id: i64,
    /// What etcd granted, which may be more than what was asked for.
    ttl: Duration,
    renew_at: Instant,
    expires: Instant,
    overdue: bool,
}

impl Lease {
    pub(super) fn granted(id: i64, ttl: Duration, begun: Instant) -> Self {
        Self {
            id,
            ttl,
            renew_at: begun + ttl / 3,
            expires: begun + ttl,
            overdue: false,
        }
    }

    pub(super) fn id(&self) -> i64 {
        self.id
    }

    /// A third of the time to live after the last renewal that was answered, sooner after a failure.
    pub(super) fn renew_at(&self) -> Instant {
        self.renew_at
    }

    pub(super) fn renewed(&mut self, begun: Instant) {
        *self = Self::granted(self.id, self.ttl, begun);
    }

    pub(super) fn renew_again_at(&mut self, at: Instant) {
        self.renew_at = at;
    }

    /// When etcd drops it, unless that has passed.
    pub(super) fn overdue_at(&self) -> Option<Instant> {
        (!self.overdue).then_some(self.expires)
    }

    /// Whether its time is over, the first time that this is asked then.
    pub(super) fn is_newly_overdue(&mut self, now: Instant) -> bool {
        let newly = !self.overdue && now >= self.expires;
        self.overdue |= newly;
        newly
    }
}
