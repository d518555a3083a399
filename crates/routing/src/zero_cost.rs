//! MoE++ (Jin et al. 2024): experts that cost nothing beside the FFN experts, and the balance that prefers them by `tau`.
//!
//! Order of experts: FFN..., constant..., copy..., zero... Weights are raw top-2 probabilities (the paper's equation 1); the
//! released code removes the zero expert's weight and renormalises, which [`renormalise_after_zero`] gives.

use crate::activation::{normalise_row, softmax};
pub use crate::config::{ZeroComputation, ZeroCost};
use crate::losses::mean_probability_backward;
use crate::real::Real;

/// `softmax(Wc x)`, Wc `[2, d]` row by row.
pub fn constant_mix<S: Real>(x: &[S], wc: &[S]) -> [S; 2] {
    let mut logits = [S::ZERO; 2];
    for (z, row) in logits.iter_mut().zip(wc.chunks_exact(x.len().max(1))) {
        *z = row.iter().zip(x).map(|(&w, &v)| w * v).sum();
    }
    let mut mix = [S::ZERO; 2];
    softmax(&logits, &mut mix);
    mix
}

/// The constant expert: `a1 x + a2 v`.
pub fn constant_expert<S: Real>(x: &[S], wc: &[S], v: &[S]) -> Vec<S> {
    let [a, b] = constant_mix(x, wc);
    x.iter().zip(v).map(|(&x, &v)| a * x + b * v).collect()
}

/// `sum_i eta_i f_i Pbar_i`, eta 1 for FFN experts and `tau` for the others; no factor E. f sums to k.
pub fn balance_loss(fraction_e: &[f64], mean_prob_e: &[f64], ffn: usize, tau: f64) -> f64 {
    let eta = |i: usize| if i < ffn { 1.0 } else { tau };
    fraction_e.iter().zip(mean_prob_e).enumerate().map(|(i, (f, p))| eta(i) * f * p).sum()
}

/// Gradient of [`balance_loss`] for the logits: `(1/T) P[t,i] (eta_i f_i - sum_j P[t,j] eta_j f_j)`; `[T, E]`, f constant.
pub fn balance_loss_backward(fraction_e: &[f64], probs_te: &[f64], ffn: usize, tau: f64) -> Vec<f64> {
    let cost_e: Vec<f64> = fraction_e.iter().enumerate().map(|(i, f)| if i < ffn { *f } else { tau * f }).collect();
    mean_probability_backward(&cost_e, probs_te)
}

/// The released code's weights: zero experts' weights removed, the rest of the row divided by its sum (0 if nothing is left).
pub fn renormalise_after_zero(combine_te: &[f64], experts: usize, is_zero: impl Fn(usize) -> bool) -> Vec<f64> {
    let mut out = combine_te.to_vec();
    for row in out.chunks_exact_mut(experts.max(1)) {
        row.iter_mut().enumerate().filter(|(e, _)| is_zero(*e)).for_each(|(_, w)| *w = 0.0);
        normalise_row(row);
    }
    out
}
