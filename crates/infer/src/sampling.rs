//! From the logits of one position to the next token: the likeliest, or a draw.
//!
//! The options work in the order in which Hugging Face transformers applies them, each on what the one before it left:
//!
//! 1. `repetition_penalty` divides positive and multiplies negative logits of the tokens that occur in the prompt or the text.
//! 2. `temperature` divides the logits; 0 takes the likeliest token, the lowest id of equals, and nothing below matters.
//! 3. `top_k` keeps the k largest logits, and all that equal the k-th.
//! 4. `top_p` keeps the smallest set of likeliest tokens whose probabilities reach it; of equals the lower ids.
//! 5. `min_p` keeps what is at least this share as probable as the likeliest token.
//!
//! What is kept is renormalised and drawn from. The draw is a function of (seed, position), so a text does not depend on what else is
//! being generated; (temperature, `top_p`, seed) alone give the same bits as ever.

use std::cmp::Ordering;

use mixtura_data::rng::SplitMix64;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token.
    pub temperature: f64,
    /// How many of the likeliest tokens are kept; 0 keeps all.
    pub top_k: usize,
    /// Probability mass kept; 1 keeps everything.
    pub top_p: f64,
    /// Least probability kept, as a share of the likeliest token's; 0 keeps everything.
    pub min_p: f64,
    /// Above 1 makes what has occurred less likely, below 1 more; 1 changes nothing.
    pub repetition_penalty: f64,
    /// Seed of the draws.
    pub seed: u64,
}

/// Options or logits that no token can be chosen by.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplingError {
    /// A value of [`Sampling`] that is not possible.
    #[error("{option} is {found}, but it must be {expected}")]
    Option {
        /// The field's name.
        option: &'static str,
        /// The value given.
        found: f64,
        /// What would be possible.
        expected: &'static str,
    },
    /// Logits that are not a distribution.
    #[error(
        "the model's logits are not a distribution: {reason}; its weights are damaged, or numbers overflow in this precision"
    )]
    Logits {
        /// What is wrong with them.
        reason: String,
    },
}

/// A token and what the model thinks of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoredToken {
    /// Its id.
    pub id: u32,
    /// The natural logarithm of its probability under the model: the log softmax of the logits as they came, before any option.
    pub log_probability: f64,
}

/// A token that may be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// Its id.
    pub id: u32,
    /// How likely it is to be drawn.
    pub probability: f64,
}

impl Sampling {
    /// Always the likeliest token.
    pub const GREEDY: Self =
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 };

    /// Refuses the first value that is not possible.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let refuse = |option, found, expected| Err(SamplingError::Option { option, found, expected });
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return refuse("temperature", self.temperature, "a number of at least 0 (0 takes the likeliest token)");
        }
        if self.top_k > u32::MAX as usize {
            return refuse("top_k", self.top_k as f64, "a number of tokens below 2^32 (0 keeps all)");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", self.top_p, "a share above 0 and at most 1 (1 keeps everything)");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return refuse("min_p", self.min_p, "a share from 0 to 1 (0 keeps everything)");
        }
        // The bounds are far outside of what is useful and keep a penalised f32 far inside of what f64 holds.
        if !(0.01..=100.0).contains(&self.repetition_penalty) {
            let expected = "a factor from 0.01 to 100 (1 changes nothing)";
            return refuse("repetition_penalty", self.repetition_penalty, expected);
        }
        Ok(())
    }

    /// The token that follows, given the logits at `position` and the ids of prompt and text so far (`seen`, in any order and number;
    /// only the penalty looks at them).
    pub fn next(&self, logits_v: &[f32], seen: &[u32], position: u64) -> Result<ScoredToken, SamplingError> {
        let log_mass = log_mass(logits_v)?;
        let id = self.choose(logits_v, seen, position);
        Ok(ScoredToken { id, log_probability: logits_v[id as usize] as f64 - log_mass })
    }

    /// The tokens among which [`Sampling::next`] draws, each with its probability, likeliest first.
    pub fn candidates(&self, logits_v: &[f32], seen: &[u32]) -> Result<Vec<Candidate>, SamplingError> {
        check(logits_v)?;
        let scores_v = self.penalised(logits_v, seen);
        if self.temperature == 0.0 {
            return Ok(vec![Candidate { id: likeliest(&scores_v), probability: 1.0 }]);
        }
        let mut kept = self.weigh(&scores_v);
        kept.sort_unstable_by(likelier);
        let mass: f64 = kept.iter().map(|c| c.weight).sum();
        let possible = kept.iter().filter(|c| c.weight > 0.0);
        Ok(possible.map(|c| Candidate { id: c.id, probability: c.weight / mass }).collect())
    }

    /// [`Sampling::next`] without the questions.
    fn choose(&self, logits_v: &[f32], seen: &[u32], position: u64) -> u32 {
        let scores_v = self.penalised(logits_v, seen);
        if self.temperature == 0.0 {
            return likeliest(&scores_v);
        }
        let kept = self.weigh(&scores_v);
        let mass: f64 = kept.iter().map(|c| c.weight).sum();
        let mut left = uniform(self.seed, position) * mass;
        for candidate in &kept {
            left -= candidate.weight;
            if left < 0.0 {
                return candidate.id;
            }
        }
        // Rounding left a sliver above the last candidate.
        kept.iter().rev().find(|c| c.weight > 0.0).map_or(0, |c| c.id)
    }

    /// The logits after the repetition penalty.
    fn penalised(&self, logits_v: &[f32], seen: &[u32]) -> Vec<f64> {
        let mut scores_v: Vec<f64> = logits_v.iter().map(|&z| z as f64).collect();
        if self.repetition_penalty != 1.0 {
            for &id in seen {
                // From the logit, not from the score: a token that occurs twice is penalised once.
                if let Some(&z) = logits_v.get(id as usize) {
                    let z = z as f64;
                    let penalised = if z < 0.0 { z * self.repetition_penalty } else { z / self.repetition_penalty };
                    scores_v[id as usize] = penalised;
                }
            }
        }
        scores_v
    }

    /// What temperature and filters leave. Likeliest first where a filter is on, by id where none is: the order is part of the draw.
    fn weigh(&self, scores_v: &[f64]) -> Vec<Weighted> {
        let max = scores_v.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let least = self.least_of_top_k(scores_v);
        let mut kept: Vec<Weighted> = scores_v
            .iter()
            .enumerate()
            .filter(|&(_, &z)| z >= least)
            .map(|(id, &z)| Weighted { id: id as u32, weight: ((z - max) / self.temperature).exp() })
            .collect();
        if self.top_p < 1.0 {
            let mass: f64 = kept.iter().map(|c| c.weight).sum();
            keep_likeliest(&mut kept, self.top_p * mass);
        } else if self.top_k > 0 || self.min_p > 0.0 {
            kept.sort_unstable_by(likelier);
        }
        if self.min_p > 0.0 {
            // The likeliest token weighs exp(0) = 1.
            kept.retain(|c| c.weight >= self.min_p);
        }
        kept
    }

    /// The k-th largest score; minus infinity where all are kept.
    fn least_of_top_k(&self, scores_v: &[f64]) -> f64 {
        if self.top_k == 0 || self.top_k >= scores_v.len() {
            return f64::NEG_INFINITY;
        }
        let mut sorted_v = scores_v.to_vec();
        *sorted_v.select_nth_unstable_by(self.top_k - 1, |a, b| b.total_cmp(a)).1
    }
}

/// The `n` likeliest tokens with the logarithms of their probabilities under the model, the lower id first of equals. Tokens that the
/// model rules out (a logit of minus infinity) are not among them.
pub fn top_log_probabilities(logits_v: &[f32], n: usize) -> Result<Vec<ScoredToken>, SamplingError> {
    let log_mass = log_mass(logits_v)?;
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0));
    let mut tokens: Vec<(u32, f32)> = (0..).zip(logits_v.iter().copied()).filter(|t| t.1 > f32::NEG_INFINITY).collect();
    if n < tokens.len() {
        tokens.select_nth_unstable_by(n, order);
        tokens.truncate(n);
    }
    tokens.sort_unstable_by(order);
    Ok(tokens.iter().map(|&(id, z)| ScoredToken { id, log_probability: z as f64 - log_mass }).collect())
}

/// A token with its share of the mass, not normalised.
#[derive(Clone, Copy)]
struct Weighted {
    id: u32,
    weight: f64,
}

/// Likelier first, the lower id of equals.
fn likelier(a: &Weighted, b: &Weighted) -> Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

/// Keeps the likeliest candidates, in order, until their weights reach `enough`. Sorts no further than it must: a vocabulary has 50,000
/// tokens, and 0.9 of the mass is often a dozen.
fn keep_likeliest(candidates: &mut Vec<Weighted>, enough: f64) {
    let (mut sorted, mut block, mut kept) = (0, 64, 0.0);
    while sorted < candidates.len() {
        let end = candidates.len().min(sorted + block);
        if end < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(block - 1, likelier);
        }
        candidates[sorted..end].sort_unstable_by(likelier);
        for last in sorted..end {
            kept += candidates[last].weight;
            if kept >= enough {
                candidates.truncate(last + 1);
                return;
            }
        }
        (sorted, block) = (end, block * 4);
    }
}

/// The index of the largest score, the lowest of equals.
pub fn likeliest<T: PartialOrd>(scores_v: &[T]) -> u32 {
    let mut best = 0;
    for (id, z) in scores_v.iter().enumerate() {
        if *z > scores_v[best] {
            best = id;
        }
    }
    best as u32
}

/// The logarithm of the sum of the exponentials: a logit minus this is a log probability.
fn log_mass(logits_v: &[f32]) -> Result<f64, SamplingError> {
    let max = check(logits_v)? as f64;
    let mass: f64 = logits_v.iter().map(|&z| (z as f64 - max).exp()).sum();
    Ok(max + mass.ln())
}

/// The largest logit, or why these are not logits.
fn check(logits_v: &[f32]) -> Result<f32, SamplingError> {
    let mut max = f32::NEG_INFINITY;
    let mut impossible = 0usize;
    for &z in logits_v {
        max = max.max(z);
        impossible += is_impossible(z) as usize;
    }
    if impossible > 0 {
        let first = logits_v.iter().position(|&z| is_impossible(z)).unwrap_or(0);
        let (all, z) = (logits_v.len(), logits_v[first]);
        let reason = format!("{impossible} of {all} are not a number or infinite, the first is {z} for token {first}");
        return Err(SamplingError::Logits { reason });
    }
    if max == f32::NEG_INFINITY {
        let reason = match logits_v.len() {
            0 => "there are none".into(),
            all => format!("all {all} are minus infinity, which leaves no token"),
        };
        return Err(SamplingError::Logits { reason });
    }
    Ok(max)
}

/// Minus infinity is a logit (a token that is ruled out); these are not.
fn is_impossible(z: f32) -> bool {
    z.is_nan() || z == f32::INFINITY
}

/// A number in [0, 1) from (seed, position), by SplitMix64.
fn uniform(seed: u64, position: u64) -> f64 {
    let mut z = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(position.wrapping_mul(0xD1B5_4A32_D192_ED03));
    for _ in 0..2 {
        z = SplitMix64::new(z).next_u64();
    }
    (z >> 11) as f64 / (1u64 << 53) as f64
}
