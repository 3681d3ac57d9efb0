//! The better of two at random.
//!
//! Nearly as even as the best of all, at a cost that does not grow, and without the herd that
//! the best of all draws: when many clients see the same loads, they do not all choose alike
//! (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing").

use tokio::time::Instant;

use super::Candidate;
use super::ring::Ring;

/// The index of one of `candidates`, which must not be empty.
///
/// The two are drawn in proportion to their weights, and the first keeps the call unless the other is
/// better: among those that are alike the weights are the shares. One that cannot be used loses, and so does one
/// that fails: failing fast must not look like being idle. All is asked of both before either is chosen, so
/// that among thousands of endpoints, which no cache holds, the processor waits for all that it needs to know
/// at once.
pub(super) fn choose<C: Candidate>(
    candidates: &[C],
    ring: &Ring,
    now: Instant,
    is_better: impl Fn(&C, &C) -> bool,
) -> usize {
    if candidates.len() == 1 {
        return 0;
    }
    let (first, second) = ring.draw_two();
    let (one, other) = (&candidates[first], &candidates[second]);
    let rank = |candidate: &C| (candidate.is_usable(), !candidate.load().is_failing(now));
    let (rank_of_one, rank_of_other) = (rank(one), rank(other));
    let is_other = if rank_of_one == rank_of_other {
        is_better(other, one)
    } else {
        rank_of_other > rank_of_one
    };
    if is_other { second } else { first }
}

/// Fewer calls in flight, per weight.
///
/// It must be so with the call to come and without it. Without it alone, an idle endpoint with a small weight
/// would be better than one with a large weight and a single call; with it alone, of two that are idle
/// the one with the larger weight would always be.
pub(super) fn is_less_loaded<C: Candidate>(a: &C, b: &C) -> bool {
    let calls = |candidate: &C| u64::from(candidate.load().in_flight());
    let (calls_a, calls_b) = (calls(a), calls(b));
    let (weight_a, weight_b) = (u64::from(a.weight()), u64::from(b.weight()));
    calls_a * weight_b < calls_b * weight_a && (calls_a + 1) * weight_b < (calls_b + 1) * weight_a
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
    let latency = |candidate: &C| candidate.load().latency_nanos(now);
    let (Some(latency_a), Some(latency_b)) = (latency(a), latency(b)) else {
        return is_less_loaded(a, b);
    };
    let (latency_a, latency_b) = (latency_a.max(FLOOR_NANOS), latency_b.max(FLOOR_NANOS));
    if latency_a < latency_b * ALIKE && latency_b < latency_a * ALIKE {
        return is_less_loaded(a, b);
    }
    // As in `is_less_loaded`, twice: the call to come counts per weight, and as much for either.
    let (weight_a, weight_b) = (f64::from(a.weight()), f64::from(b.weight()));
    let mean = (weight_a + weight_b) / 2.0;
    let cost = |candidate: &C, latency: f64, weight: f64| {
        let calls = f64::from(candidate.load().in_flight());
        (
            latency * (calls + 1.0) / weight,
            latency * (calls / weight + 1.0 / mean),
        )
    };
    let (a, b) = (cost(a, latency_a, weight_a), cost(b, latency_b, weight_b));
    a.0 < b.0 && a.1 < b.1
}
