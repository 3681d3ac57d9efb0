//! The lease that the keys are under.

use std::time::Duration;

use tokio::time::Instant;

/// A lease and its expiry. The expiry is counted from the moment at which the last confirmed
/// renewal was sent, which is the earliest time at which etcd can have received it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lease {
    id: i64,
    /// The TTL that etcd granted, which may be longer than requested.
    ttl: Duration,
    renew_at: Instant,
    expires_at: Instant,
    /// Whether `expires_at` has passed without a confirmed renewal.
    overdue: bool,
    /// Why another lease must replace this one.
    flaw: Option<Flaw>,
}

/// Why a lease must be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flaw {
    /// etcd has gone back to an earlier history since the grant. Keys that were deleted since then
    /// may be back under the lease, so the lease must expire.
    Outdated,
    /// etcd refuses to renew or to revoke the lease. Some releases do so when the user may not write
    /// one of its keys any more. The other keys of the lease would expire with it.
    Refused,
}

impl Lease {
    /// A lease whose grant was requested at `sent_at`.
    pub(super) fn new(id: i64, ttl: Duration, sent_at: Instant) -> Self {
        Self {
            id,
            ttl,
            renew_at: sent_at + ttl / 3,
            expires_at: sent_at + ttl,
            overdue: false,
            flaw: None,
        }
    }

    pub(super) fn id(&self) -> i64 {
        self.id
    }

    /// The time of the next renewal: a third of the TTL after the last confirmed one, sooner after
    /// a failure.
    pub(super) fn renew_at(&self) -> Instant {
        self.renew_at
    }

    /// Records that etcd confirmed the renewal sent at `sent_at`.
    pub(super) fn on_renewed(&mut self, sent_at: Instant) {
        let flaw = self.flaw;
        *self = Self::new(self.id, self.ttl, sent_at);
        self.flaw = flaw;
    }

    /// Schedules another renewal after a failed one.
    pub(super) fn retry_renewal_at(&mut self, at: Instant) {
        self.renew_at = at;
    }

    /// The time at which the lease becomes overdue; `None` if it is overdue already.
    pub(super) fn overdue_at(&self) -> Option<Instant> {
        (!self.overdue).then_some(self.expires_at)
    }

    /// Marks the lease as overdue once its TTL has passed without a confirmed renewal. Returns
    /// `true` only for the call that sets the mark.
    pub(super) fn mark_overdue(&mut self, now: Instant) -> bool {
        let is_newly_overdue = !self.overdue && now >= self.expires_at;
        self.overdue |= is_newly_overdue;
        is_newly_overdue
    }

    /// Whether the TTL has passed without a confirmed renewal.
    pub(super) fn is_overdue(&self) -> bool {
        self.overdue
    }

    pub(super) fn ttl(&self) -> Duration {
        self.ttl
    }

    pub(super) fn mark_flawed(&mut self, flaw: Flaw) {
        self.flaw = Some(flaw);
    }

    pub(super) fn flaw(&self) -> Option<Flaw> {
        self.flaw
    }
}
