//! The pauses between attempts: exponential backoff with jitter.

use std::ops::Range;
use std::time::Duration;

use backon::BackoffBuilder;

/// The growth from one pause to the next: the factor of gRPC's connection backoff.
const FACTOR: f32 = 1.6;

/// The random factor of each pause, which spreads the reconnects of ten thousand processes that
/// lose etcd at the same time. The range does not start at zero, because a process could then try
/// twice at once.
const JITTER: Range<f64> = 0.5..1.0;

/// The first pause before another attempt to reach etcd. Short, because most losses are the restart
/// of one member.
const ETCD_MIN: Duration = Duration::from_millis(50);

/// The longest pause between attempts to reach etcd. Registrations must be restored within two
/// seconds after etcd is back, and this leaves one second for the work.
const ETCD_MAX: Duration = Duration::from_secs(1);

/// An endless sequence of pauses that grow from `min` to `max`, each with jitter.
#[derive(Debug)]
pub(crate) struct Backoff {
    min: Duration,
    max: Duration,
    jitter: Range<f64>,
    growth: backon::ExponentialBackoff,
}

impl Backoff {
    /// The pauses between attempts to reach etcd, from 50 ms to 1 s.
    pub(crate) fn for_etcd() -> Self {
        Self::with_jitter(ETCD_MIN, ETCD_MAX, JITTER)
    }

    /// Each pause is multiplied by a random number in `jitter`.
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

    /// The next pause.
    pub(crate) fn next(&mut self) -> Duration {
        let pause = self.growth.next().unwrap_or(self.max);
        let Range { start, end } = self.jitter;
        pause.mul_f64(start + (end - start) * fastrand::f64())
    }

    /// Starts again at the first pause, after a success.
    pub(crate) fn reset(&mut self) {
        *self = Self::with_jitter(self.min, self.max, self.jitter.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_maximum_and_reset() {
        let (min, max) = (ETCD_MIN, ETCD_MAX);
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
