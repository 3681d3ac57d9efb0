//! Picking the endpoint of an attempt.
//!
//! A [`Picker`] is an immutable list of the ready endpoints. The pool swaps it for another when the
//! set or a connection changes, and calls read it without a lock. The time of a pick does not grow
//! with the number of endpoints, and a pick allocates nothing.
//!
//! To add a policy, add a variant to [`BalancePolicy`] and to [`Algorithm`], and a file beside
//! `round_robin.rs` that chooses an index. The compiler then points at each match that needs an
//! arm, and a test of `policy.rs` at `BalancePolicy::ALL`, from which names are parsed.

mod candidate;
mod load;
mod policy;
mod ring;
mod round_robin;
mod two_choices;

use tokio::time::Instant;

pub(crate) use candidate::Candidate;
pub(crate) use load::Load;
pub use policy::{BalancePolicy, ParseBalancePolicyError};
use ring::Ring;
pub(crate) use round_robin::Cursor;
use round_robin::Schedule;

/// The ready endpoints, and the algorithm that chooses among them.
#[derive(Debug)]
pub(crate) struct Picker<C> {
    candidates: Box<[C]>,
    algorithm: Algorithm,
}

#[derive(Debug)]
enum Algorithm {
    PeakEwma(Ring),
    LeastRequest(Ring),
    RoundRobin(Schedule),
}

/// How many unusable or excluded choices the policy may make before all endpoints are searched.
const CHOICES: usize = 3;

impl<C: Candidate> Picker<C> {
    /// `cursor` continues the round robin of the previous picker.
    pub(crate) fn new(policy: BalancePolicy, candidates: Vec<C>, cursor: &Cursor) -> Self {
        let ring = Ring::new(candidates.iter().map(Candidate::weight));
        let algorithm = match policy {
            BalancePolicy::PeakEwma => Algorithm::PeakEwma(ring),
            BalancePolicy::LeastRequest => Algorithm::LeastRequest(ring),
            BalancePolicy::RoundRobin => Algorithm::RoundRobin(Schedule::new(ring, cursor.clone())),
        };
        Self {
            candidates: candidates.into(),
            algorithm,
        }
    }

    pub(crate) fn candidates(&self) -> &[C] {
        &self.candidates
    }

    /// Picks a usable endpoint for an attempt that starts `now`. An endpoint that `exclude` matches
    /// is picked only if no other is usable.
    pub(crate) fn pick(&self, now: Instant, exclude: impl Fn(&C) -> bool) -> Option<&C> {
        if self.candidates.is_empty() {
            return None;
        }
        for _ in 0..CHOICES {
            let choice = &self.candidates[self.choose(now)];
            if choice.is_usable() && !exclude(choice) {
                return Some(choice);
            }
        }
        // Rare: several connections have just closed, or nearly all endpoints are excluded.
        let start = fastrand::usize(..self.candidates.len());
        let (before, after) = self.candidates.split_at(start);
        let usable = || after.iter().chain(before).filter(|c| c.is_usable());
        usable().find(|c| !exclude(c)).or_else(|| usable().next())
    }

    fn choose(&self, now: Instant) -> usize {
        match &self.algorithm {
            Algorithm::PeakEwma(ring) => {
                let is_faster = |a: &C, b: &C| two_choices::is_faster(a, b, now);
                two_choices::choose(&self.candidates, ring, now, is_faster)
            }
            Algorithm::LeastRequest(ring) => {
                two_choices::choose(&self.candidates, ring, now, two_choices::is_less_loaded)
            }
            Algorithm::RoundRobin(schedule) => schedule.choose(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    pub(super) struct Fake {
        pub(super) load: Load,
        pub(super) weight: u32,
        pub(super) usable: bool,
    }

    impl Candidate for Fake {
        fn load(&self) -> &Load {
            &self.load
        }

        fn weight(&self) -> u32 {
            self.weight
        }

        fn is_usable(&self) -> bool {
            self.usable
        }
    }

    pub(super) fn fakes(weights: &[u32]) -> Vec<Fake> {
        let start = Instant::now();
        weights
            .iter()
            .map(|weight| Fake {
                load: Load::new(start),
                weight: *weight,
                usable: true,
            })
            .collect()
    }

    #[test]
    fn unusable_endpoints_are_never_picked() {
        for policy in BalancePolicy::ALL {
            let none = Picker::<Fake>::new(policy, vec![], &Cursor::default());
            assert!(none.pick(Instant::now(), |_| false).is_none());
            let mut closed = fakes(&[100, 100]);
            closed.iter_mut().for_each(|fake| fake.usable = false);
            let closed = Picker::new(policy, closed, &Cursor::default());
            assert!(closed.pick(Instant::now(), |_| false).is_none());
        }
    }

    #[test]
    fn single_usable_endpoint_is_always_found() {
        for policy in BalancePolicy::ALL {
            let mut many = fakes(&[100; 50]);
            many.iter_mut().for_each(|fake| fake.usable = false);
            many[37].usable = true;
            many[37].weight = 7;
            let picker = Picker::new(policy, many, &Cursor::default());
            for _ in 0..100 {
                let picked = picker.pick(Instant::now(), |_| false).unwrap();
                assert_eq!(picked.weight, 7);
            }
        }
    }

    #[test]
    fn excluded_endpoint_is_the_last_resort() {
        for policy in BalancePolicy::ALL {
            let picker = Picker::new(policy, fakes(&[100, 99, 98]), &Cursor::default());
            for _ in 0..100 {
                let picked = picker.pick(Instant::now(), |fake| fake.weight == 99);
                assert_ne!(picked.unwrap().weight, 99);
                assert!(picker.pick(Instant::now(), |_| true).is_some());
            }
        }
    }

    #[test]
    fn loaded_and_slow_endpoints_lose() {
        let now = Instant::now();
        for policy in [BalancePolicy::PeakEwma, BalancePolicy::LeastRequest] {
            let three = fakes(&[100, 100, 100]);
            for _ in 0..10 {
                three[1].load.begin();
            }
            let picker = Picker::new(policy, three, &Cursor::default());
            for _ in 0..100 {
                let picked = picker.pick(now, |_| false).unwrap();
                assert_eq!(picked.load.in_flight(), 0, "{policy:?}");
            }
        }
        let slow = fakes(&[1, 2]);
        slow[0].load.observe(Duration::from_millis(100), false, now);
        slow[1].load.observe(Duration::from_millis(2), false, now);
        let picker = Picker::new(BalancePolicy::PeakEwma, slow, &Cursor::default());
        for _ in 0..100 {
            assert_eq!(picker.pick(now, |_| false).unwrap().weight, 2);
        }
    }

    #[test]
    fn latency_noise_does_not_shift_shares() {
        let now = Instant::now();
        let two = fakes(&[1, 1]);
        two[0]
            .load
            .observe(Duration::from_micros(2_100), false, now);
        two[1]
            .load
            .observe(Duration::from_micros(1_500), false, now);
        let picker = Picker::new(BalancePolicy::PeakEwma, two, &Cursor::default());
        let first = (0..1_000)
            .filter(|_| std::ptr::eq(picker.pick(now, |_| false).unwrap(), &picker.candidates[0]))
            .count();
        assert!((400..=600).contains(&first), "{first}");
    }

    #[test]
    fn failing_fast_loses_to_slow() {
        let now = Instant::now();
        for policy in [BalancePolicy::PeakEwma, BalancePolicy::LeastRequest] {
            let two = fakes(&[3, 2]);
            two[0].load.observe(Duration::from_millis(1), true, now);
            two[1].load.observe(Duration::from_secs(30), false, now);
            (0..100).for_each(|_| two[1].load.begin());
            let picker = Picker::new(policy, two, &Cursor::default());
            for _ in 0..100 {
                assert_eq!(picker.pick(now, |_| false).unwrap().weight, 2, "{policy:?}");
            }
            // The cooldown of the failure is over.
            let later = now + Duration::from_secs(2);
            assert_eq!(
                picker.pick(later, |_| false).unwrap().weight,
                3,
                "{policy:?}"
            );
        }
    }

    /// The share of the picks that each endpoint gets while `in_flight` calls of equal length are
    /// in flight.
    fn shares(policy: BalancePolicy, weights: &[u32], in_flight: usize) -> Vec<f64> {
        const PICKS: usize = 100_000;
        let now = Instant::now();
        let candidates = fakes(weights);
        for fake in &candidates {
            fake.load.observe(Duration::from_millis(5), false, now);
        }
        let picker = Picker::new(policy, candidates, &Cursor::default());
        let mut flying = std::collections::VecDeque::new();
        let mut counts = vec![0; weights.len()];
        for _ in 0..PICKS {
            let picked = picker.pick(now, |_| false).unwrap();
            let of_picked = |fake: &Fake| std::ptr::eq(fake, picked);
            counts[picker.candidates.iter().position(of_picked).unwrap()] += 1;
            picked.load.begin();
            flying.push_back(picked);
            if flying.len() > in_flight {
                flying.pop_front().unwrap().load.end();
            }
        }
        let share = |count| f64::from(count) / PICKS as f64;
        counts.into_iter().map(share).collect()
    }

    #[test]
    fn weights_are_shares_when_idle_and_busy() {
        for policy in BalancePolicy::ALL {
            for weights in [
                &[100, 50][..],
                &[1, 99],
                &[10, 10, 10, 10, 10, 10, 10, 10, 10, 100],
                &[7, 7, 7],
            ] {
                for in_flight in [0, 1, 3, 30, 1_000] {
                    let shares = shares(policy, weights, in_flight);
                    let sum: u32 = weights.iter().sum();
                    for (share, weight) in shares.iter().zip(weights) {
                        let due = f64::from(*weight) / f64::from(sum);
                        // A few calls cannot be divided exactly; the heavier endpoint gets more
                        // than its share.
                        let range = match in_flight {
                            0 | 1_000 => due - 0.01..due + 0.01,
                            _ => 0.6 * due..1.2 * due,
                        };
                        assert!(
                            range.contains(share),
                            "{policy:?}, {in_flight} in flight: {weights:?} get {shares:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn load_is_compared_per_weight() {
        let now = Instant::now();
        for policy in [BalancePolicy::PeakEwma, BalancePolicy::LeastRequest] {
            let picker = Picker::new(policy, fakes(&[300, 100]), &Cursor::default());
            // No call ends, so that the calls in flight are the picks.
            for _ in 0..400 {
                picker.pick(now, |_| false).unwrap().load.begin();
            }
            let heavy = picker.candidates[0].load.in_flight();
            assert!((299..=301).contains(&heavy), "{policy:?}: {heavy}");
        }
    }
}
