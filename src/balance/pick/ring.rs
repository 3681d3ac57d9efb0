//! Endpoints side by side, each as long as its weight.

use std::ops::Range;

/// The longest ring: positions are multiplied by strides, which must not overflow.
const LONGEST: u64 = 1 << 31;

/// The shortest ring of unequal weights: a short one may have no stride near the golden section (one
/// of six slots has only 1 and 5), so that it is gone over several times at once.
const SHORTEST: u64 = 64;

/// A ring with one slot for each unit of weight, an endpoint's slots side by side.
#[derive(Debug)]
pub(super) struct Ring {
    length: u64,
    /// For each endpoint, the slot after its last. Half as long as a `u64`, it leaves more room in the
    /// processor's caches.
    ends: Box<[u32]>,
    /// For each part of the ring, of `1 << part` slots, the endpoint that holds the part's first slot: where
    /// the search for a slot begins; and the last endpoint.
    guide: Box<[u32]>,
    part: u32,
}

impl Ring {
    /// `weights` must all be above 0.
    pub(super) fn new(weights: impl Iterator<Item = u32>) -> Self {
        let mut weights: Vec<u64> = weights.map(u64::from).collect();
        let divisor = weights.iter().copied().fold(0, gcd).max(1);
        weights.iter_mut().for_each(|weight| *weight /= divisor);
        let sum: u64 = weights.iter().sum();
        if sum < SHORTEST && sum > weights.len() as u64 {
            let times = SHORTEST.div_ceil(sum);
            weights.iter_mut().for_each(|weight| *weight *= times);
        }
        if sum > LONGEST {
            // Rounding changes the proportions by less than one in a billion per endpoint.
            let scale = LONGEST as f64 / sum as f64;
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
        // At most the mean of the weights, so that no more than one endpoint ends in a part on average.
        let mean = length / (ends.len() as u64).max(1);
        let part = mean.max(1).ilog2();
        let holders = (0..length).step_by(1 << part).scan(0, |holder, slot| {
            while u64::from(ends[*holder]) <= slot {
                *holder += 1;
            }
            Some(*holder as u32)
        });
        let last = (ends.len() as u32).saturating_sub(1);
        let guide = holders.chain([last]).collect();
        Self {
            length,
            ends,
            guide,
            part,
        }
    }

    /// How many slots there are.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Whether all weights are the same: then each endpoint has one slot, that of its index.
    pub(super) fn is_even(&self) -> bool {
        self.length == self.ends.len() as u64
    }

    /// The index of the endpoint that has a slot.
    pub(super) fn holder_of(&self, slot: u64) -> usize {
        if self.is_even() {
            return slot as usize;
        }
        let part = (slot >> self.part) as usize;
        // It is none before the part's first and none after the next part's.
        let (first, last) = (self.guide[part] as usize, self.guide[part + 1] as usize);
        first + self.ends[first..last].partition_point(|end| u64::from(*end) <= slot)
    }

    fn slots_of(&self, index: usize) -> Range<u64> {
        if self.is_even() {
            return index as u64..index as u64 + 1;
        }
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        u64::from(start)..u64::from(self.ends[index])
    }

    /// Two endpoints at random, not the same twice, each in proportion to its weight. There must be two.
    pub(super) fn draw_two(&self) -> (usize, usize) {
        // From one random number, each half of which is a fraction of the ring; and neither waits for the
        // other.
        let random = fastrand::u64(..);
        let halves = [random >> 32, random & u64::from(u32::MAX)];
        let [first, second] = halves.map(|half| self.holder_of((half * self.length) >> 32));
        if first != second {
            return (first, second);
        }
        let of_first = self.slots_of(first);
        let length = of_first.end - of_first.start;
        let mut slot = fastrand::u64(..self.length - length);
        if slot >= of_first.start {
            slot += length;
        }
        (first, self.holder_of(slot))
    }
}

pub(super) fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_are_drawn_in_proportion_to_their_weights_and_never_one_twice() {
        const DRAWS: usize = 60_000;
        for weights in [&[1, 1, 1][..], &[3, 2, 1], &[99, 1], &[10, 10, 100]] {
            let ring = Ring::new(weights.iter().copied());
            let mut firsts = vec![0; weights.len()];
            for _ in 0..DRAWS {
                let (first, second) = ring.draw_two();
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
