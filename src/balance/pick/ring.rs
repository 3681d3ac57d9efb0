//! A weighted list: each endpoint has as many slots as its weight.

use std::ops::Range;

/// The longest ring. Positions are multiplied by strides, which must not overflow.
const MAX_LENGTH: u64 = 1 << 31;

/// The shortest ring of unequal weights. A shorter ring may have no stride near the golden section
/// (a ring of six slots has only 1 and 5), so each weight is multiplied until the ring is long
/// enough.
const MIN_LENGTH: u64 = 64;

/// A ring with one slot for each unit of weight. The slots of an endpoint are adjacent.
#[derive(Debug)]
pub(super) struct Ring {
    length: u64,
    /// For each endpoint, the slot after its last. `u32` leaves more room in the processor's caches
    /// than `u64`.
    ends: Box<[u32]>,
    /// For each bucket of `1 << bucket_bits` slots, the endpoint of the bucket's first slot, where
    /// the search for a slot starts. One entry more names the last endpoint.
    index: Box<[u32]>,
    bucket_bits: u32,
}

impl Ring {
    /// `weights` must all be above 0.
    pub(super) fn new(weights: impl Iterator<Item = u32>) -> Self {
        let mut weights: Vec<u64> = weights.map(u64::from).collect();
        let divisor = weights.iter().copied().fold(0, gcd).max(1);
        weights.iter_mut().for_each(|weight| *weight /= divisor);
        let sum: u64 = weights.iter().sum();
        if sum < MIN_LENGTH && sum > weights.len() as u64 {
            let times = MIN_LENGTH.div_ceil(sum);
            weights.iter_mut().for_each(|weight| *weight *= times);
        }
        if sum > MAX_LENGTH {
            // Rounding changes the proportions by less than one in a billion per endpoint.
            let scale = MAX_LENGTH as f64 / sum as f64;
            for weight in &mut weights {
                *weight = ((*weight as f64 * scale) as u64).max(1);
            }
        }
        let ends: Box<[u32]> = weights
            .iter()
            .scan(0, |end, weight| {
                *end += *weight as u32;
                Some(*end)
            })
            .collect();
        let length = u64::from(ends.last().copied().unwrap_or(0));
        // No bucket is longer than the mean weight, so that on average no more than one endpoint
        // ends in a bucket.
        let mean = length / (ends.len() as u64).max(1);
        let bucket_bits = mean.max(1).ilog2();
        let buckets = (0..length).step_by(1 << bucket_bits);
        let firsts = buckets.scan(0, |endpoint, slot| {
            while u64::from(ends[*endpoint]) <= slot {
                *endpoint += 1;
            }
            Some(*endpoint as u32)
        });
        let last = (ends.len() as u32).saturating_sub(1);
        let index = firsts.chain([last]).collect();
        Self {
            length,
            ends,
            index,
            bucket_bits,
        }
    }

    /// The number of slots.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Whether all weights are equal. Each endpoint then has one slot, which has the endpoint's
    /// index.
    pub(super) fn is_even(&self) -> bool {
        self.length == self.ends.len() as u64
    }

    /// The index of the endpoint at a slot.
    pub(super) fn endpoint_at(&self, slot: u64) -> usize {
        if self.is_even() {
            return slot as usize;
        }
        let bucket = (slot >> self.bucket_bits) as usize;
        // The endpoint lies between the first of this bucket and the first of the next.
        let (first, last) = (self.index[bucket] as usize, self.index[bucket + 1] as usize);
        first + self.ends[first..last].partition_point(|end| u64::from(*end) <= slot)
    }

    fn slots_of(&self, index: usize) -> Range<u64> {
        if self.is_even() {
            return index as u64..index as u64 + 1;
        }
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        u64::from(start)..u64::from(self.ends[index])
    }

    /// Draws two different endpoints at random, in proportion to their weights. The ring must have
    /// two.
    pub(super) fn sample_pair(&self) -> (usize, usize) {
        // One random number gives two independent fractions of the ring, so that the processor
        // looks up both at once.
        let random = fastrand::u64(..);
        let halves = [random >> 32, random & u64::from(u32::MAX)];
        let [first, second] = halves.map(|half| self.endpoint_at((half * self.length) >> 32));
        if first != second {
            return (first, second);
        }
        let of_first = self.slots_of(first);
        let length = of_first.end - of_first.start;
        let mut slot = fastrand::u64(..self.length - length);
        if slot >= of_first.start {
            slot += length;
        }
        (first, self.endpoint_at(slot))
    }
}

pub(super) fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_differ_and_follow_the_weights() {
        const DRAWS: usize = 60_000;
        for weights in [&[1, 1, 1][..], &[3, 2, 1], &[99, 1], &[10, 10, 100]] {
            let ring = Ring::new(weights.iter().copied());
            let mut firsts = vec![0; weights.len()];
            for _ in 0..DRAWS {
                let (first, second) = ring.sample_pair();
                assert_ne!(first, second);
                assert!(second < weights.len());
                firsts[first] += 1;
            }
            let sum: u32 = weights.iter().sum();
            for (count, weight) in firsts.iter().zip(weights) {
                let expected = DRAWS as f64 * f64::from(*weight) / f64::from(sum);
                // Six standard deviations.
                let margin = 6.0 * expected.sqrt();
                let off = (f64::from(*count) - expected).abs();
                assert!(off <= margin, "{weights:?}: {firsts:?}");
            }
        }
    }
}
