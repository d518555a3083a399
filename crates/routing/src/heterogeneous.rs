//! Experts of different widths (HMoE, Wang et al. 2024): the P-penalty makes wide experts pay for their parameters.
//!
//! `E sum_i M_i Pbar_i`, `M_i = f_i h_i`, f_i selections per token. With equal widths it is the classical loss times k h; dividing
//! widths by their mean, this project's form, removes h. The router-entropy term is `-sum P log P`: the printed sign of the
//! paper would increase entropy when minimised, against its stated purpose.

/// The penalty with widths as given; divide them by their mean for the normalised form.
pub fn parameter_penalty(fraction_e: &[f64], mean_prob_e: &[f64], width_e: &[f64]) -> f64 {
    let terms = fraction_e.iter().zip(mean_prob_e).zip(width_e);
    fraction_e.len() as f64 * terms.map(|((f, p), h)| f * h * p).sum::<f64>()
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

/// Hidden units actually computed, relative to as many selections of an expert of mean width.
pub fn flops_ratio(demand_e: &[u32], width_e: &[f64]) -> f64 {
    let mean = width_e.iter().sum::<f64>() / width_e.len().max(1) as f64;
    let selections: f64 = demand_e.iter().map(|&c| f64::from(c)).sum();
    if selections == 0.0 {
        return 0.0;
    }
    demand_e.iter().zip(width_e).map(|(&c, h)| f64::from(c) * h).sum::<f64>() / (selections * mean)
}
