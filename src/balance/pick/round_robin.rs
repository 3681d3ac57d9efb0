//! Weighted round robin, smooth and in constant time.
//!
//! A ring has one slot for each unit of weight, and the slots of an endpoint are adjacent. Picks
//! walk the ring with a stride that shares no divisor with its length, so that each slot is visited
//! exactly once per round: the proportions are exact. A stride near the golden section of the ring
//! spreads the picks of every endpoint evenly over the round (the three-distance theorem), which
//! makes it smooth. With equal weights the ring has one slot per endpoint and the stride is 1:
//! plain round robin.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::ring::{Ring, gcd};

/// The position in the round. The successive pickers of a channel share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cursor(Arc<AtomicU64>);

#[derive(Debug)]
pub(super) struct Schedule {
    cursor: Cursor,
    ring: Ring,
    stride: u64,
}

impl Schedule {
    pub(super) fn new(ring: Ring, cursor: Cursor) -> Self {
        let stride = if ring.is_even() {
            1
        } else {
            stride(ring.length())
        };
        Self {
            cursor,
            ring,
            stride,
        }
    }

    /// The index of the next endpoint. The ring must have one.
    pub(super) fn choose(&self) -> usize {
        let position = self.cursor.0.fetch_add(1, Ordering::Relaxed);
        let length = self.ring.length();
        self.ring
            .endpoint_at(position % length * self.stride % length)
    }
}

/// The number nearest to the golden section of `length` that shares no divisor with it.
fn stride(length: u64) -> u64 {
    let golden = (length as f64 * 0.618_033_988_749_895) as u64;
    (0..length)
        .flat_map(|distance| [golden.saturating_sub(distance), golden + distance])
        .find(|candidate| (1..length).contains(candidate) && gcd(*candidate, length) == 1)
        .unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn picks(weights: &[u32], count: usize) -> Vec<usize> {
        let schedule = Schedule::new(Ring::new(weights.iter().copied()), Cursor::default());
        (0..count).map(|_| schedule.choose()).collect()
    }

    #[test]
    fn equal_weights_are_plain_round_robin() {
        assert_eq!(picks(&[100; 3], 6), [0, 1, 2, 0, 1, 2]);
        assert_eq!(picks(&[7], 3), [0, 0, 0]);
    }

    #[test]
    fn every_hundred_picks_are_split_99_to_1() {
        let picks = picks(&[99, 1], 1_000);
        assert_eq!(picks.iter().filter(|pick| **pick == 1).count(), 10);
        for hundred in picks.chunks(100) {
            assert_eq!(hundred.iter().filter(|pick| **pick == 1).count(), 1);
        }
    }

    #[test]
    fn picks_are_mixed() {
        let picks = picks(&[3, 2, 1], 60);
        let longest_run = picks.chunk_by(|a, b| a == b).map(<[usize]>::len).max();
        assert!(longest_run <= Some(2), "{picks:?}");
        for six in picks.chunks(6) {
            let first = six.iter().filter(|pick| **pick == 0).count();
            assert!((2..=4).contains(&first), "{picks:?}");
        }
    }

    #[test]
    fn cursor_continues_across_pickers() {
        let cursor = Cursor::default();
        let next = || Schedule::new(Ring::new([1, 1, 1].into_iter()), cursor.clone()).choose();
        assert_eq!([next(), next(), next(), next()], [0, 1, 2, 0]);
    }

    #[test]
    fn huge_weights_keep_their_proportion() {
        let picks = picks(&[u32::MAX, u32::MAX / 3, 1], 4_000);
        let first = picks.iter().filter(|pick| **pick == 0).count();
        assert!((2_980..=3_020).contains(&first), "{first}");
    }

    proptest! {
        #[test]
        fn round_gives_each_endpoint_its_weight(
            weights in proptest::collection::vec(1u32..40, 1..20),
        ) {
            let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
            let round = Ring::new(weights.iter().copied()).length();
            let picks = picks(&weights, round as usize);
            for (index, weight) in weights.iter().enumerate() {
                let count = picks.iter().filter(|pick| **pick == index).count() as u64;
                prop_assert_eq!(count * total, u64::from(*weight) * round);
            }
        }
    }
}
