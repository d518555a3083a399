//! Experts of different widths (HMoE, Wang et al. 2024): the P-penalty makes wide experts pay for their parameters.
//!
//! `E sum_i M_i Pbar_i`, `M_i = f_i h_i`, f_i selections per token. With equal widths it is the classical loss times k h; dividing
//! widths by their mean, this project's form, removes h. The router-entropy term is `-sum P log P`: the printed sign of the
//! paper would increase entropy when minimised, against its stated purpose. Coefficients in the paper: 0.1 and 0.03.
//!
//! `fraction_e` is selections per token (sums to k), `mean_prob_e` the mean of the router's softmax, `width_e` hidden widths; all
//! `[E]`. Gradients are for the logits `[T, E]`, selections constant; leave padding rows out.

use super::mean_probability_backward;

/// The penalty with widths as given; divide them by their mean for the normalised form.
pub fn parameter_penalty(fraction_e: &[f64], mean_prob_e: &[f64], width_e: &[f64]) -> f64 {
    let terms = fraction_e.iter().zip(mean_prob_e).zip(width_e);
    fraction_e.len() as f64 * terms.map(|((f, p), h)| f * h * p).sum::<f64>()
}

/// Gradient of [`parameter_penalty`] for the logits: `(E/T) P[t,i] (f_i h_i - sum_j P[t,j] f_j h_j)`; `[T, E]`.
///
/// A wide expert's logit falls and a narrow one's rises even at equal load, which is the purpose.
pub fn parameter_penalty_backward(fraction_e: &[f64], width_e: &[f64], probs_te: &[f64]) -> Vec<f64> {
    let experts = fraction_e.len() as f64;
    let cost_e: Vec<f64> = fraction_e.iter().zip(width_e).map(|(f, h)| experts * f * h).collect();
    mean_probability_backward(&cost_e, probs_te)
}

/// Widths divided by their mean.
pub fn normalised_widths(width_e: &[f64]) -> Vec<f64> {
    let mean = width_e.iter().sum::<f64>() / width_e.len().max(1) as f64;
    width_e.iter().map(|h| h / mean).collect()
}

/// Mean entropy of the router's distribution over tokens, in nats.
pub fn mean_entropy(probs_te: &[f64], experts: usize) -> f64 {
    let tokens = probs_te.len() / experts.max(1);
    if tokens == 0 {
        return 0.0;
    }
    -probs_te.iter().filter(|p| **p > 0.0).map(|p| p * p.ln()).sum::<f64>() / tokens as f64
}

/// Gradient of [`mean_entropy`] for the logits: `-(1/T) P[t,i] (ln P[t,i] + H_t)`, 0 where P is 0; `[T, E]`.
pub fn mean_entropy_backward(probs_te: &[f64], experts: usize) -> Vec<f64> {
    let tokens = (probs_te.len() / experts.max(1)) as f64;
    let mut dlogits_te = Vec::with_capacity(probs_te.len());
    for row in probs_te.chunks_exact(experts.max(1)) {
        let entropy = mean_entropy(row, experts);
        dlogits_te.extend(row.iter().map(|&p| if p > 0.0 { -p * (p.ln() + entropy) / tokens } else { 0.0 }));
    }
    dlogits_te
}

/// Hidden units actually computed, relative to as many selections of an expert of mean width.
pub fn flops_ratio(demand_e: &[u32], width_e: &[f64]) -> f64 {
    let mean = width_e.iter().sum::<f64>() / width_e.len().max(1) as f64;
    let selections: f64 = demand_e.iter().map(|&c| f64::from(c)).sum();
    if selections == 0.0 {
        return 0.0;
    }
    demand_e.iter().zip(width_e).map(|(&c, h)| f64::from(c) * h).sum::<f64>() / (selections * mean)
}
