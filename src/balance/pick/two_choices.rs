//! The better of two endpoints drawn at random.
//!
//! Two choices balance nearly as evenly as picking the best of all endpoints, and the cost does not
//! grow with their number. They also avoid herds: many clients that see the same loads do not all
//! pick the same endpoint (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing").

use tokio::time::Instant;

use super::candidate::Candidate;
use super::ring::Ring;

/// Chooses the index of one of `candidates`, which must not be empty.
///
/// Two are drawn in proportion to their weights, and the first wins unless the second is better, so
/// that equal endpoints get calls in proportion to their weights. An endpoint that is unusable
/// loses, and so does a failing one, because failing fast must not look like being idle. Both
/// endpoints are read before either is chosen: the data of thousands of endpoints does not fit into
/// the processor's cache, and this way the processor waits for memory once.
pub(super) fn choose<C: Candidate>(
    candidates: &[C],
    ring: &Ring,
    now: Instant,
    is_better: impl Fn(&C, &C) -> bool,
) -> usize {
    if candidates.len() == 1 {
        return 0;
    }
    let (first, second) = ring.sample_pair();
    let (a, b) = (&candidates[first], &candidates[second]);
    let rank = |candidate: &C| (candidate.is_usable(), !candidate.load().is_failing(now));
    let (rank_a, rank_b) = (rank(a), rank(b));
    let is_b_better = if rank_a == rank_b {
        is_better(b, a)
    } else {
        rank_b > rank_a
    };
    if is_b_better { second } else { first }
}

/// Whether `a` has fewer calls in flight than `b`, per weight.
///
/// The comparison must hold with and without the call that is about to be sent. Only without the
/// call, an idle endpoint with a small weight would beat one with a large weight and a single call.
/// Only with the call, the larger weight would always win between two idle endpoints.
pub(super) fn is_less_loaded<C: Candidate>(a: &C, b: &C) -> bool {
    let calls = |candidate: &C| u64::from(candidate.load().in_flight());
    let (calls_a, calls_b) = (calls(a), calls(b));
    let (weight_a, weight_b) = (u64::from(a.weight()), u64::from(b.weight()));
    calls_a * weight_b < calls_b * weight_a && (calls_a + 1) * weight_b < (calls_b + 1) * weight_a
}

/// 1 ms. Smaller differences between latencies on one machine or in one rack come from the
/// scheduler.
const FLOOR_NANOS: f64 = 1e6;

/// Latencies that differ by less than this factor count as equal.
///
/// Without a tolerance, one of several equal endpoints would get all calls under light load: with
/// nothing in flight the lowest latency always wins, however small the difference.
const LATENCY_TOLERANCE: f64 = 2.0;

/// Whether `a` has less latency times calls in flight than `b`, per weight. Latencies within
/// [`LATENCY_TOLERANCE`] count as equal.
///
/// An endpoint without a response so far is compared by its calls alone. An assumed latency would
/// either flood it before its first response or starve it of the calls that would measure it.
pub(super) fn is_faster<C: Candidate>(a: &C, b: &C, now: Instant) -> bool {
    let latency = |candidate: &C| candidate.load().latency_nanos(now);
    let (Some(latency_a), Some(latency_b)) = (latency(a), latency(b)) else {
        return is_less_loaded(a, b);
    };
    let (latency_a, latency_b) = (latency_a.max(FLOOR_NANOS), latency_b.max(FLOOR_NANOS));
    if latency_a < latency_b * LATENCY_TOLERANCE && latency_b < latency_a * LATENCY_TOLERANCE {
        return is_less_loaded(a, b);
    }
    // Two comparisons, as in `is_less_loaded`: the call that is about to be sent counts once per
    // weight, and once the same for both endpoints.
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
