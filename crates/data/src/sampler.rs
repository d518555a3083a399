//! Which source the next row comes from.
//!
//! - `dispersed` (H3): the source with the largest deficit `share * (drawn + 1) / total - drawn_of_it`; ties go to the source rarest in
//!   the current batch, then to the lowest number. No source is ever a row ahead of or behind its share, so similar texts are spread.
//! - `grouped`: whole batches from one source, chosen by the same rule: the opposite policy, for comparison.
//! - `random`: independent draws by share.

use serde::{Deserialize, Serialize};

use crate::rng::SplitMix64;

/// How the rows of several sources are interleaved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mixing {
    /// Largest deficit first: similar texts are kept apart.
    #[default]
    Dispersed,
    /// A whole batch from one source at a time.
    Grouped,
    /// Independent draws.
    Random,
}

/// The order of sources, resumable from the rows drawn so far.
///
/// ```
/// use mixtura_data::{Mixing, Scheduler};
/// let mut scheduler = Scheduler::new(Mixing::Dispersed, 0, &[6, 3, 2, 1]);
/// assert_eq!(scheduler.next_batch(4), [0, 1, 2, 0]);
/// assert_eq!(scheduler.next_batch(4), [0, 1, 3, 0]);
/// ```
#[derive(Clone, Debug)]
pub struct Scheduler {
    mixing: Mixing,
    seed: u64,
    shares: Vec<u64>,
    drawn: Vec<u64>,
}

impl Scheduler {
    /// At the start. Panics without shares.
    pub fn new(mixing: Mixing, seed: u64, shares: &[u64]) -> Self {
        Self::resumed(mixing, seed, shares, &vec![0; shares.len()])
    }

    /// After `drawn` rows of each source; the position must be the start of a batch. Panics when the lengths differ.
    pub fn resumed(mixing: Mixing, seed: u64, shares: &[u64], drawn: &[u64]) -> Self {
        assert_eq!(shares.len(), drawn.len(), "Scheduler: {} shares, {} counts", shares.len(), drawn.len());
        assert!(shares.iter().any(|share| *share > 0), "Scheduler: no source has a share");
        Self { mixing, seed, shares: shares.to_vec(), drawn: drawn.to_vec() }
    }

    /// The sources of the next `rows` rows.
    pub fn next_batch(&mut self, rows: usize) -> Vec<usize> {
        let mut in_batch = vec![0u64; self.shares.len()];
        let mut batch = Vec::with_capacity(rows);
        for _ in 0..rows {
            let source = match (self.mixing, batch.first()) {
                (Mixing::Grouped, Some(first)) => *first,
                (Mixing::Random, _) => self.random(),
                _ => self.largest_deficit(&in_batch),
            };
            self.drawn[source] += 1;
            in_batch[source] += 1;
            batch.push(source);
        }
        batch
    }

    /// Rows drawn from each source.
    pub fn drawn(&self) -> &[u64] {
        &self.drawn
    }

    /// Exact in integers: `share * (drawn + 1) - drawn_of_it * total`, all deficits times `total`.
    fn largest_deficit(&self, in_batch: &[u64]) -> usize {
        let total: i128 = self.shares.iter().map(|share| i128::from(*share)).sum();
        let next: i128 = self.drawn.iter().map(|drawn| i128::from(*drawn)).sum::<i128>() + 1;
        let deficit = |s: usize| i128::from(self.shares[s]) * next - i128::from(self.drawn[s]) * total;
        let rank = |s: &usize| (-deficit(*s), in_batch[*s], *s);
        (0..self.shares.len()).filter(|s| self.shares[*s] > 0).min_by_key(rank).expect("some source has a share")
    }

    fn random(&self) -> usize {
        let drawn = self.drawn.iter().sum();
        let total: u64 = self.shares.iter().sum();
        let mut at = SplitMix64::keyed(self.seed, 0x006d_6978, drawn).next_u64() % total;
        for (source, share) in self.shares.iter().enumerate() {
            if at < *share {
                return source;
            }
            at -= share;
        }
        unreachable!("the draw is below the sum of the shares")
    }
}
