//! What a pick goes by: how much is in flight on an endpoint, and how long its answers take.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// How fast an old latency is forgotten: after this time it counts 1/e.
///
/// Finagle and linkerd, where peak EWMA comes from, use 10 s. One slow answer keeps an endpoint
/// away from its share for a few times this long, which matters more among the handful of endpoints
/// that most services have than asking a slow one again every ten seconds.
const DECAY: Duration = Duration::from_secs(3);

/// What a failed call costs at least. Failing fast must not make an endpoint look fast, and a second
/// is more than what an endpoint that works takes.
const PENALTY: Duration = Duration::from_secs(1);

/// How long one whose last answer was a failure is left alone while there are others. The penalty
/// alone is less than what a stall of this process makes every other endpoint's latency look like; this
/// is the time between two attempts to find out whether it works again.
const AVOIDED: Duration = Duration::from_secs(1);

/// The load of one endpoint. It belongs to the endpoint and survives changes of the set around it.
#[derive(Debug)]
pub(crate) struct Load {
    in_flight: AtomicU32,
    latency: Ewma,
    /// Nanoseconds since the epoch, and one more; 0 unless the last answer was a failure.
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

    /// Calls that were sent and whose answers have not ended.
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// The moving peak of the latency, `None` before the first answer.
    pub(crate) fn latency(&self, now: Instant) -> Option<Duration> {
        self.latency
            .at(now)
            .map(|nanos| Duration::from_nanos(nanos as u64))
    }

    /// In nanoseconds.
    pub(crate) fn latency_nanos(&self, now: Instant) -> Option<f64> {
        self.latency.at(now)
    }

    /// Whether it has failed last, a moment ago.
    pub(crate) fn is_failing(&self, now: Instant) -> bool {
        let failed = self.failed.load(Ordering::Relaxed);
        failed != 0
            && u128::from(self.latency.since_epoch(now).saturating_sub(failed)) < AVOIDED.as_nanos()
    }

    pub(crate) fn begin(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn end(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// An answer came, or the call failed.
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

    /// The call was given up after so long: its answer would have taken longer still.
    pub(crate) fn observe_at_least(&self, waited: Duration, now: Instant) {
        // Before the first answer as well: one that hangs from the beginning is not to stay unknown.
        if self.latency(now).is_none_or(|latency| latency < waited) {
            self.latency.add(waited, now);
        }
    }
}

/// Above any latency: 584 years.
const UNMEASURED: u64 = u64::MAX;

/// A moving average that rises to a peak at once and falls slowly.
///
/// Two words that are written one after the other: a reader between them sees a value that is
/// off by one sample for nanoseconds, which is less than what a lock would cost every pick.
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

    /// The part of the last value that still counts.
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
    fn a_latency_rises_at_once_and_falls_slowly() {
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
    fn a_failure_never_looks_fast() {
        let start = Instant::now();
        let load = Load::new(start);
        load.observe(MS, true, start);
        assert_eq!(load.latency(start), Some(PENALTY));
        load.observe(3 * PENALTY, true, start);
        assert_eq!(load.latency(start), Some(3 * PENALTY));
    }

    #[test]
    fn what_was_waited_in_vain_is_the_least_that_an_answer_takes() {
        let start = Instant::now();
        let load = Load::new(start);
        load.observe_at_least(50 * MS, start);
        assert_eq!(load.latency(start), Some(50 * MS));
        load.observe_at_least(20 * MS, start);
        assert_eq!(load.latency(start), Some(50 * MS));
        load.observe_at_least(70 * MS, start);
        assert_eq!(load.latency(start), Some(70 * MS));
        assert!(!load.is_failing(start));
    }

    #[test]
    fn it_is_failing_until_it_succeeds_or_is_due_for_another_try() {
        let start = Instant::now();
        let load = Load::new(start);
        assert!(!load.is_failing(start));
        load.observe(MS, true, start);
        assert!(load.is_failing(start));
        assert!(load.is_failing(start + AVOIDED - MS));
        assert!(!load.is_failing(start + AVOIDED + MS));
        load.observe(MS, true, start + AVOIDED);
        assert!(load.is_failing(start + AVOIDED + MS));
        load.observe(MS, false, start + AVOIDED);
        assert!(!load.is_failing(start + AVOIDED + MS));
    }
}
