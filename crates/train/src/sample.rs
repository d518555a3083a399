//! From the logits of one position to the next token: the likeliest, or a draw.
//!
//! With temperature `t > 0` the probabilities are `softmax(z / t)`; `top_p < 1` keeps the smallest set of likeliest
//! tokens whose probabilities reach `top_p` and renormalises. Ties go to the lower token id. The draw is a function of
//! (seed, position), so a text does not depend on what else is being generated.

use mixtura_data::rng::SplitMix64;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token.
    pub temperature: f64,
    /// Probability mass kept; 1 keeps everything.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Sampling {
    /// Always the likeliest token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_p: 1.0, seed: 0 };

    /// Refuses what is not a distribution.
    pub fn validate(&self) -> Result<(), String> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(format!("--temperature {}: expected a number of at least 0", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(format!("--top-p {}: expected a share above 0 and at most 1", self.top_p));
        }
        Ok(())
    }

    /// The token that follows, given the logits at `position`.
    pub fn next(&self, logits_v: &[f32], position: u64) -> u32 {
        if self.temperature == 0.0 {
            return likeliest(logits_v);
        }
        let max = logits_v.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
        let mut candidates: Vec<(u32, f64)> = logits_v
            .iter()
            .enumerate()
            .map(|(id, &z)| (id as u32, ((z as f64 - max) / self.temperature).exp()))
            .collect();
        let mut mass: f64 = candidates.iter().map(|c| c.1).sum();
        if self.top_p < 1.0 {
            candidates.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let mut kept = 0.0;
            let enough = candidates.iter().position(|c| {
                kept += c.1;
                kept >= self.top_p * mass
            });
            candidates.truncate(enough.map_or(candidates.len(), |last| last + 1));
            mass = candidates.iter().map(|c| c.1).sum();
        }
        let mut left = uniform(self.seed, position) * mass;
        for &(id, weight) in &candidates {
            left -= weight;
            if left < 0.0 {
                return id;
            }
        }
        // Rounding left a sliver above the last candidate.
        candidates.last().map_or(0, |c| c.0)
    }
}

/// The index of the largest logit, the lowest of equals.
pub fn likeliest(logits_v: &[f32]) -> u32 {
    let mut best = 0;
    for (id, &z) in logits_v.iter().enumerate() {
        if z > logits_v[best] {
            best = id;
        }
    }
    best as u32
}

/// A number in [0, 1) from (seed, position), by SplitMix64.
fn uniform(seed: u64, position: u64) -> f64 {
    let mut z = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(position.wrapping_mul(0xD1B5_4A32_D192_ED03));
    for _ in 0..2 {
        z = SplitMix64::new(z).next_u64();
    }
    (z >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.0, (2.0f32).ln(), f32::NEG_INFINITY, (5.0f32).ln()];
        let sampling = Sampling { temperature: 1.0, top_p: 1.0, seed: 3 };
        let mut counts = [0usize; 4];
        (0..80_000).for_each(|p| counts[sampling.next(&logits, p) as usize] += 1);
        for (count, share) in counts.iter().zip([1.0, 2.0, 0.0, 5.0]) {
            assert!((*count as f64 / 10_000.0 - share).abs() < 0.1, "{counts:?}");
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_the_mass() {
        let logits = [1.0f32.ln(), 6.0f32.ln(), 3.0f32.ln()];
        let kept = |top_p| {
            let sampling = Sampling { temperature: 1.0, top_p, seed: 0 };
            let mut seen: Vec<u32> = (0..200).map(|p| sampling.next(&logits, p)).collect();
            seen.sort();
            seen.dedup();
            seen
        };
        assert_eq!((kept(0.5), kept(0.7), kept(1.0)), (vec![1], vec![1, 2], vec![0, 1, 2]));
    }

    #[test]
    fn temperature_zero_takes_the_lowest_of_the_likeliest() {
        assert_eq!(Sampling::GREEDY.next(&[0.0, 3.0, 3.0], 9), 1);
    }
}
