//! The better of two at random.
//!
//! Nearly as even as the best of all, at a cost that does not grow, and without the herd that
//! the best of all draws: when many clients see the same loads, they do not all choose alike
//! (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing").

use tokio::time::Instant;

use super::Candidate;

/// The index of one of `candidates`, which must not be empty.
pub(super) fn choose<C>(candidates: &[C], is_better: impl Fn(&C, &C) -> bool) -> usize {
    if candidates.len() == 1 {
        return 0;
    }
    let first = fastrand::usize(..candidates.len());
    let mut second = fastrand::usize(..candidates.len() - 1);
    if second >= first {
        second += 1;
    }
    if is_better(&candidates[second], &candidates[first]) {
        second
    } else {
        first
    }
}

/// Fewer calls in flight, per weight. The one to come counts, so that an idle endpoint with a small
/// weight does not look as good as an idle one with a large weight.
pub(super) fn is_less_loaded<C: Candidate>(a: &C, b: &C) -> bool {
    let calls = |candidate: &C| u64::from(candidate.load().in_flight()) + 1;
    calls(a) * u64::from(b.weight()) < calls(b) * u64::from(a.weight())
}

/// Below this, latencies on one machine or in one rack are the scheduler's noise.
const FLOOR_NANOS: f64 = 1e6;

/// Latencies that differ by less than this count as alike.
///
/// Followed however little it is, the difference would send everything to one of several equals
/// while there is not enough load to make up for it: with few calls, and so none in flight, the
/// least latency always wins.
const ALIKE: f64 = 2.0;

/// Less latency times calls in flight, per weight; the latency counts only where it really differs.
///
/// One that has not answered yet is compared by its calls alone: assuming a latency would either
/// flood it before its first answer or starve it of the calls that would measure it.
pub(super) fn is_faster<C: Candidate>(a: &C, b: &C, now: Instant) -> bool {
    let (failing_a, failing_b) = (a.load().is_failing(now), b.load().is_failing(now));
    if failing_a != failing_b {
        return failing_b;
    }
    let latency = |candidate: &C| candidate.load().latency_nanos(now);
    let (Some(latency_a), Some(latency_b)) = (latency(a), latency(b)) else {
        return is_less_loaded(a, b);
    };
    let (latency_a, latency_b) = (latency_a.max(FLOOR_NANOS), latency_b.max(FLOOR_NANOS));
    if latency_a < latency_b * ALIKE && latency_b < latency_a * ALIKE {
        return is_less_loaded(a, b);
    }
    let cost = |candidate: &C, latency: f64| {
        latency * (f64::from(candidate.load().in_flight()) + 1.0) / f64::from(candidate.weight())
    };
    cost(a, latency_a) < cost(b, latency_b)
}
