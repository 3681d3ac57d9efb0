//! How long a lease certainly lasts.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// When a lease may expire at the earliest: a TTL after its last confirmed renewal was sent.
///
/// etcd starts the TTL when it renews the lease, which is later. A reader can compare the time with
/// its own clock even if the renewals' task stood still meanwhile. Clones share the time.
#[derive(Debug, Clone)]
pub(in crate::client) struct LeaseClock(Arc<Mutex<Instant>>);

impl LeaseClock {
    /// The clock of a lease of `ttl` whose confirmed renewal was sent at `sent_at`.
    pub(in crate::client) fn new(sent_at: Instant, ttl: Duration) -> Self {
        Self(Arc::new(Mutex::new(sent_at + ttl)))
    }

    /// Records a confirmed renewal. A response that is late changes nothing if a later renewal was
    /// confirmed before.
    pub(in crate::client) fn renew(&self, sent_at: Instant, ttl: Duration) {
        let mut expires_at = self.0.lock();
        *expires_at = (*expires_at).max(sent_at + ttl);
    }

    /// When the lease may expire at the earliest.
    pub(in crate::client) fn expires_at(&self) -> Instant {
        *self.0.lock()
    }

    /// Whether the lease may have expired.
    pub(in crate::client) fn has_expired(&self) -> bool {
        Instant::now() >= self.expires_at()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn late_response_does_not_turn_the_clock_back() {
        let ttl = Duration::from_secs(6);
        let start = Instant::now();
        let clock = LeaseClock::new(start, ttl);
        let of_reader = clock.clone();
        clock.renew(start + ttl / 3, ttl);
        clock.renew(start, ttl);
        assert_eq!(of_reader.expires_at(), start + ttl / 3 + ttl);

        tokio::time::advance(ttl).await;
        assert!(!of_reader.has_expired());
        tokio::time::advance(ttl / 3).await;
        assert!(of_reader.has_expired());
    }
}
