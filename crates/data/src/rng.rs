//! Random draws of the data side: SplitMix64 streams and a keyed permutation, both pure functions of their key.
//!
//! Data order must not depend on threads or on how far a run got, so nothing here keeps a global state: a stream is opened by
//! hashing (seed, purpose, index), and the shuffle of an epoch is a permutation that is evaluated at one position at a time.

/// SplitMix64: the generator of the propositions specification (H2) and of every other draw in this crate.
///
/// ```
/// let mut rng = mixtura_data::rng::SplitMix64::new(1);
/// assert_eq!(rng.next_u64(), 10451216379200822465);
/// ```
#[derive(Clone, Debug)]
pub struct SplitMix64 {
    state: u64,
}

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

impl SplitMix64 {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The stream of (seed, purpose, index): streams of different keys are independent for our purposes.
    pub fn keyed(seed: u64, purpose: u64, index: u64) -> Self {
        Self { state: mix(mix(mix(seed ^ GOLDEN) ^ purpose) ^ index) }
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        mix(self.state)
    }

    /// A draw from `0..n` by remainder, as the H2 generator does it (its bias is below `n / 2^64`). Panics when `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "SplitMix64::below: nothing to draw from");
        (self.next_u64() % n as u64) as usize
    }

    /// One of the elements, uniformly. Panics on an empty slice.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// The finaliser of SplitMix64: a bijection of 64-bit words in which every input bit reaches every output bit.
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A keyed permutation of `0..n`, evaluated at one position: a shuffle without the shuffled list, so that a loader can jump to any row.
///
/// A four-round Feistel network over the next power of four permutes a range at most four times `n`; positions that land outside
/// `0..n` are sent through again (cycle walking), which keeps the map a bijection.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    n: u64,
    half_bits: u32,
    key: u64,
}

impl Permutation {
    /// The permutation of `0..n` under a key. Panics when `n` is 0.
    pub fn new(n: u64, key: u64) -> Self {
        assert!(n > 0, "Permutation::new: an empty range has no permutation to evaluate");
        let bits = 64 - (n - 1).leading_zeros();
        Self { n, half_bits: bits.div_ceil(2).max(1), key }
    }

    /// Where position `i` goes. Panics when `i` is outside the range.
    pub fn at(&self, i: u64) -> u64 {
        assert!(i < self.n, "Permutation::at: position {i} of a range of {}", self.n);
        let mask = (1u64 << self.half_bits) - 1;
        let mut x = i;
        loop {
            let (mut left, mut right) = (x >> self.half_bits, x & mask);
            for round in 0..4 {
                let f = mix(right ^ mix(self.key.wrapping_add(round))) & mask;
                (left, right) = (right, left ^ f);
            }
            x = (left << self.half_bits) | right;
            if x < self.n {
                return x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_draws_are_those_of_the_published_generator() {
        let mut rng = SplitMix64::new(1);
        let first: Vec<u64> = (0..3).map(|_| rng.next_u64()).collect();
        assert_eq!(first, [10451216379200822465, 13757245211066428519, 17911839290282890590]);
    }

    #[test]
    fn a_permutation_visits_every_position_once() {
        for n in [1u64, 2, 3, 5, 16, 17, 100, 1000, 4097] {
            for key in 0..3 {
                let permutation = Permutation::new(n, key);
                let mut seen: Vec<u64> = (0..n).map(|i| permutation.at(i)).collect();
                seen.sort_unstable();
                assert!(seen.iter().copied().eq(0..n), "n = {n}, key = {key}");
            }
        }
    }

    #[test]
    fn keys_give_different_orders() {
        let order = |key| (0..50).map(|i| Permutation::new(50, key).at(i)).collect::<Vec<_>>();
        assert_ne!(order(1), order(2));
        assert_ne!(order(1), (0..50).collect::<Vec<_>>());
    }
}
