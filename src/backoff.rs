//! Waiting between attempts: exponential, with jitter.

use std::ops::Range;
use std::time::Duration;

use backon::BackoffBuilder;

/// How the wait grows from one attempt to the next: the factor of gRPC's connection backoff.
const FACTOR: f32 = 1.6;

/// From half of what the growth has reached up to the whole of it: ten thousand processes that lost
/// etcd in the same moment do not come back in the same moment. Not from zero, which would let
/// one process try twice at once.
const JITTER: Range<f64> = 0.5..1.0;

/// The first wait for etcd, since most losses are one member restarting, and the longest: what was
/// lost is to be back within two seconds of etcd's return (G8), so that one second between attempts is
/// the most.
const ETCD: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// Waits that grow from `min` towards `max`, without end, each with jitter.
#[derive(Debug)]
pub(crate) struct Backoff {
    min: Duration,
    max: Duration,
    jitter: Range<f64>,
    growth: backon::ExponentialBackoff,
}

impl Backoff {
    /// The waits between attempts to reach etcd: from 50 ms to a second.
    pub(crate) fn for_etcd() -> Self {
        Self::with_jitter(ETCD.0, ETCD.1, JITTER)
    }

    /// A wait is what the growth has reached times a random number in `jitter`.
    pub(crate) fn with_jitter(min: Duration, max: Duration, jitter: Range<f64>) -> Self {
        let growth = backon::ExponentialBuilder::new()
            .with_factor(FACTOR)
            .with_min_delay(min.min(max))
            .with_max_delay(max)
            .without_max_times()
            .build();
        Self {
            min,
            max,
            jitter,
            growth,
        }
    }

    /// The next wait.
    pub(crate) fn next(&mut self) -> Duration {
        let reached = self.growth.next().unwrap_or(self.max);
        let Range { start, end } = self.jitter;
        reached.mul_f64(start + (end - start) * fastrand::f64())
    }

    /// Starts over, after something has worked.
    pub(crate) fn reset(&mut self) {
        *self = Self::with_jitter(self.min, self.max, self.jitter.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_maximum_stay_there_and_start_over_after_a_reset() {
        let (min, max) = ETCD;
        let mut backoff = Backoff::for_etcd();
        let first = backoff.next();
        assert!(first >= min / 2 && first <= min, "{first:?}");
        for _ in 0..100 {
            assert!(backoff.next() <= max);
        }
        let late = backoff.next();
        assert!(late >= max / 2, "{late:?}");
        backoff.reset();
        assert!(backoff.next() <= min);
    }
}
