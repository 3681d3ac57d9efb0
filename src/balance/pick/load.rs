//! The load of an endpoint: the calls in flight, and the latency of its responses.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// The decay of an old latency: after this time it counts 1/e.
///
/// Finagle and linkerd, where peak EWMA comes from, use 10 s. One slow response keeps an endpoint
/// from its share for a few times this long. Most services have a handful of endpoints, for which
/// that matters more than trying a slow one again every ten seconds.
const DECAY: Duration = Duration::from_secs(3);

/// The least latency that a failed call counts as. Failing fast must not make an endpoint look
/// fast, and a healthy endpoint takes less than a second.
const PENALTY: Duration = Duration::from_secs(1);

/// How long an endpoint is avoided after a failure while there are others. The penalty alone is not
/// enough, because a stall of this process makes the latency of every other endpoint look higher.
/// After the cooldown the next call finds out whether the endpoint works again.
const FAILURE_COOLDOWN: Duration = Duration::from_secs(1);

/// The load of one endpoint. The endpoint owns it, so that it survives changes of the set.
#[derive(Debug)]
pub(crate) struct Load {
    in_flight: AtomicU32,
    latency: Ewma,
    /// When the last call failed, in nanoseconds since the epoch plus one; 0 if the last call
    /// succeeded.
    failed: AtomicU64,
}

impl Load {
    pub(crate) fn new(epoch: Instant) -> Self {
        Self {
            in_flight: AtomicU32::new(0),
            latency: Ewma {
                epoch,
                nanos: AtomicU64::new(UNMEASURED),
                updated: AtomicU64::new(0),
            },
            failed: AtomicU64::new(0),
        }
    }

    /// Attempts that were sent and whose response body has not ended.
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// The moving peak of the latency; `None` before the first response.
    pub(crate) fn latency(&self, now: Instant) -> Option<Duration> {
        self.latency
            .at(now)
            .map(|nanos| Duration::from_nanos(nanos as u64))
    }

    /// [`latency`](Self::latency) in nanoseconds.
    pub(crate) fn latency_nanos(&self, now: Instant) -> Option<f64> {
        self.latency.at(now)
    }

    /// Whether the last call failed, less than [`FAILURE_COOLDOWN`] ago.
    pub(crate) fn is_failing(&self, now: Instant) -> bool {
        let failed = self.failed.load(Ordering::Relaxed);
        failed != 0
            && u128::from(self.latency.since_epoch(now).saturating_sub(failed))
                < FAILURE_COOLDOWN.as_nanos()
    }

    /// Counts an attempt as in flight, until [`end`](Self::end).
    pub(crate) fn begin(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn end(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// Records the latency of a response or of a failed call.
    pub(crate) fn observe(&self, latency: Duration, failed: bool, now: Instant) {
        let cost = if failed {
            latency.max(PENALTY)
        } else {
            latency
        };
        self.latency.add(cost, now);
        if failed {
            let at = self.latency.since_epoch(now) + 1;
            self.failed.store(at, Ordering::Relaxed);
        } else if self.failed.load(Ordering::Relaxed) != 0 {
            self.failed.store(0, Ordering::Relaxed);
        }
    }

    /// Records how long a cancelled call waited. Its response would have taken longer.
    pub(crate) fn observe_lower_bound(&self, waited: Duration, now: Instant) {
        // Without a sample too, so that an endpoint that hangs from the start does not stay
        // unmeasured.
        if self.latency(now).is_none_or(|latency| latency < waited) {
            self.latency.add(waited, now);
        }
    }
}

/// No latency is as high as this, 584 years.
const UNMEASURED: u64 = u64::MAX;

/// A moving average that rises to a peak at once and falls slowly.
///
/// The two words are written one after the other. A reader in between sees a value that is off by
/// one sample, for nanoseconds, which matters less than a lock in every pick would.
#[derive(Debug)]
struct Ewma {
    epoch: Instant,
    nanos: AtomicU64,
    /// Nanoseconds since `epoch`.
    updated: AtomicU64,
}

impl Ewma {
    fn at(&self, now: Instant) -> Option<f64> {
        let nanos = self.nanos.load(Ordering::Relaxed);
        if nanos == UNMEASURED {
            return None;
        }
        Some(nanos as f64 * self.remaining(now))
    }

    /// The fraction of the last value that still counts.
    fn remaining(&self, now: Instant) -> f64 {
        let elapsed = self
            .since_epoch(now)
            .saturating_sub(self.updated.load(Ordering::Relaxed));
        (-(elapsed as f64) / DECAY.as_nanos() as f64).exp()
    }

    fn since_epoch(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_nanos() as u64
    }

    fn add(&self, sample: Duration, now: Instant) {
        let sample = (sample.as_nanos() as u64).min(UNMEASURED - 1);
        let last = self.nanos.load(Ordering::Relaxed);
        let next = if last == UNMEASURED {
            sample
        } else {
            let remaining = self.remaining(now);
            let (old, new) = (last as f64, sample as f64);
            if new > old * remaining {
                sample
            } else {
                (old * remaining + new * (1.0 - remaining)) as u64
            }
        };
        self.updated.store(self.since_epoch(now), Ordering::Relaxed);
        self.nanos.store(next, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn latency_rises_at_once_and_falls_slowly() {
        let start = Instant::now();
        let load = Load::new(start);
        assert_eq!(load.latency(start), None);
        load.observe(2 * MS, false, start);
        load.observe(100 * MS, false, start + MS);
        assert_eq!(load.latency(start + MS), Some(100 * MS));
        load.observe(2 * MS, false, start + 2 * MS);
        assert!(load.latency(start + 2 * MS).unwrap() > 99 * MS);
        let later = start + 5 * DECAY;
        assert!(load.latency(later).unwrap() < MS);
        load.observe(2 * MS, false, later);
        assert_eq!(load.latency(later), Some(2 * MS));
    }

    #[test]
    fn failure_counts_as_slow() {
        let start = Instant::now();
        let load = Load::new(start);
        load.observe(MS, true, start);
        assert_eq!(load.latency(start), Some(PENALTY));
        load.observe(3 * PENALTY, true, start);
        assert_eq!(load.latency(start), Some(3 * PENALTY));
    }

    #[test]
    fn abandoned_call_raises_latency_to_its_wait() {
        let start = Instant::now();
        let load = Load::new(start);
        load.observe_lower_bound(50 * MS, start);
        assert_eq!(load.latency(start), Some(50 * MS));
        load.observe_lower_bound(20 * MS, start);
        assert_eq!(load.latency(start), Some(50 * MS));
        load.observe_lower_bound(70 * MS, start);
        assert_eq!(load.latency(start), Some(70 * MS));
        assert!(!load.is_failing(start));
    }

    #[test]
    fn failing_ends_with_a_success_or_the_cooldown() {
        let start = Instant::now();
        let load = Load::new(start);
        assert!(!load.is_failing(start));
        load.observe(MS, true, start);
        assert!(load.is_failing(start));
        assert!(load.is_failing(start + FAILURE_COOLDOWN - MS));
        assert!(!load.is_failing(start + FAILURE_COOLDOWN + MS));
        load.observe(MS, true, start + FAILURE_COOLDOWN);
        assert!(load.is_failing(start + FAILURE_COOLDOWN + MS));
        load.observe(MS, false, start + FAILURE_COOLDOWN);
        assert!(!load.is_failing(start + FAILURE_COOLDOWN + MS));
    }
}
