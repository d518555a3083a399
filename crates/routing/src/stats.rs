//! What a routing looked like, in a handful of numbers per layer: how even the load was, how much was dropped, how sure
//! the router is. Computed in f64 whatever the routing's precision.

use crate::assignment::{Assignment, Choices};
use crate::config::Activation;
use crate::input::RouterInput;
use crate::real::Real;
use serde::{Deserialize, Serialize};

pub mod specialisation;

/// Per-layer routing statistics. With zero tokens every value is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct RoutingStats {
    /// Coefficient of variation of the load (selections per expert before capacity, population standard deviation / mean).
    pub load_cv: f64,
    /// Largest load over mean load; 1 = balanced.
    pub max_over_mean: f64,
    /// Fraction of experts nobody selected.
    pub dead: f64,
    /// Entropy of the load divided by ln E; 1 = balanced.
    pub entropy: f64,
    /// Fraction of selections that got no slot.
    pub dropped: f64,
    /// Mean over tokens of the largest minus the second largest probability.
    pub top1_margin: f64,
    /// Mean over tokens of the entropy of the router's softmax, divided by ln E; 0 = certain.
    pub token_entropy: f64,
    /// Root mean square of the router's logits.
    pub logit_rms: f64,
    /// Mean squared log-sum-exp: the z-loss without its coefficient.
    pub z: f64,
}

impl RoutingStats {
    /// Statistics of one routing call; padding is not counted.
    pub fn new<S: Real>(
        input: &RouterInput<S>,
        choices: &Choices,
        assignment: &Assignment,
        probs_te: &[S],
        lse_t: &[S],
        activation: Activation,
    ) -> Self {
        let experts = assignment.experts;
        let mut stats = Self::from_load(&assignment.demand);
        stats.dropped = ratio(assignment.dropped.len() as f64, choices.pairs() as f64);
        let (mut tokens, mut margin, mut squares, mut entropy, mut z) = (0.0, 0.0, 0.0, 0.0, 0.0);
        let rows = input.logits_te.chunks_exact(experts).zip(probs_te.chunks_exact(experts)).zip(lse_t);
        for (t, ((logits, probs), &lse)) in rows.enumerate() {
            if input.real_t.is_some_and(|real| !real[t]) {
                continue;
            }
            tokens += 1.0;
            margin += top_margin(probs);
            squares += dot(logits, logits);
            // Entropy of a softmax without logarithms: lse - <p, z>.
            if activation.is_softmax() {
                entropy += (lse.f64() - dot(probs, logits)).max(0.0);
            }
            z += lse.f64() * lse.f64();
        }
        stats.top1_margin = ratio(margin, tokens);
        stats.token_entropy = ratio(entropy, tokens * (experts as f64).ln());
        stats.logit_rms = ratio(squares, tokens * experts as f64).sqrt();
        stats.z = ratio(z, tokens);
        stats
    }

    /// With the logit statistics of other logits than the probabilities come from; padding is not counted.
    pub(crate) fn with_logits<S: Real>(self, logits_ts: &[S], lse_t: &[S], real_t: Option<&[bool]>) -> Self {
        let width = logits_ts.len() / lse_t.len().max(1);
        let (mut tokens, mut squares, mut z) = (0.0, 0.0, 0.0);
        let rows = logits_ts.chunks_exact(width.max(1)).zip(lse_t).enumerate();
        for (_, (logits, lse)) in rows.filter(|(t, _)| real_t.is_none_or(|real| real[*t])) {
            tokens += 1.0;
            squares += dot(logits, logits);
            z += lse.f64() * lse.f64();
        }
        Self { logit_rms: ratio(squares, tokens * width as f64).sqrt(), z: ratio(z, tokens), ..self }
    }

    /// The four statistics of a load alone; the rest 0.
    pub fn from_load(load_e: &[u32]) -> Self {
        let experts = load_e.len() as f64;
        let total: f64 = load_e.iter().map(|&c| f64::from(c)).sum();
        if total == 0.0 {
            return Self::default();
        }
        let mean = total / experts;
        let variance = load_e.iter().map(|&c| (f64::from(c) - mean).powi(2)).sum::<f64>() / experts;
        let entropy: f64 = load_e.iter().filter(|c| **c > 0).map(|&c| f64::from(c) / total).map(|f| -f * f.ln()).sum();
        Self {
            load_cv: variance.sqrt() / mean,
            max_over_mean: f64::from(load_e.iter().copied().max().unwrap_or(0)) / mean,
            dead: load_e.iter().filter(|c| **c == 0).count() as f64 / experts,
            entropy: if load_e.len() == 1 { 1.0 } else { entropy / experts.ln() },
            ..Self::default()
        }
    }
}

/// 0 where there is nothing to divide by.
fn ratio(value: f64, by: f64) -> f64 {
    if by > 0.0 { value / by } else { 0.0 }
}

/// Product sum in four f64 lanes.
fn dot<S: Real>(a: &[S], b: &[S]) -> f64 {
    let mut lanes = [0.0f64; 4];
    let (a4, b4) = (a.chunks_exact(4), b.chunks_exact(4));
    let tail: f64 = a4.remainder().iter().zip(b4.remainder()).map(|(&x, &y)| x.f64() * y.f64()).sum();
    for (x, y) in a4.zip(b4) {
        for i in 0..4 {
            lanes[i] += x[i].f64() * y[i].f64();
        }
    }
    (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]) + tail
}

fn top_margin<S: Real>(probs: &[S]) -> f64 {
    let (mut first, mut second) = (S::ZERO, S::ZERO);
    for &p in probs {
        if p > first {
            second = first;
            first = p;
        } else if p > second {
            second = p;
        }
    }
    (first - second).f64()
}
