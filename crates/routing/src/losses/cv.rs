//! Squared coefficient of variation and the importance loss (Shazeer et al. 2017, appendix A).

use super::Auxiliary;
use crate::real::Real;
use crate::route::{Routed, RouterInput};

/// Keeps the quotient defined when nothing was routed.
const EPSILON: f64 = 1e-10;

/// `var / (mean^2 + 1e-10)` with the population variance; 0 for fewer than two values.
pub fn cv_squared(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    if values.len() < 2 {
        return 0.0;
    }
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    variance / (mean * mean + EPSILON)
}

/// The same with Bessel's correction, as the PyTorch ports have it: a factor n / (n - 1).
pub fn cv_squared_bessel(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    if values.len() < 2 { 0.0 } else { cv_squared(values) * n / (n - 1.0) }
}

/// Gradient of [`cv_squared`].
pub fn cv_squared_backward(values: &[f64]) -> Vec<f64> {
    let n = values.len() as f64;
    if values.len() < 2 {
        return vec![0.0; values.len()];
    }
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    let below = mean * mean + EPSILON;
    values.iter().map(|v| 2.0 * (v - mean) / (n * below) - 2.0 * variance * mean / (n * below * below)).collect()
}

/// Sum of combine weights per expert, from a dense `[T, E]` matrix or any rows of E.
pub fn importance<S: Real>(weights_te: &[S], experts: usize) -> Vec<f64> {
    let mut total = vec![0.0; experts];
    for row in weights_te.chunks_exact(experts) {
        for (t, w) in total.iter_mut().zip(row) {
            *t += w.f64();
        }
    }
    total
}

/// CV^2 of the importance of the weights before dropping; gradient times `coefficient` into `out`.
pub(super) fn importance_loss<S: Real>(
    input: &RouterInput<S>,
    routed: &Routed<S>,
    coefficient: f64,
    out: &mut Auxiliary<S>,
) -> f64 {
    let experts = routed.shape.experts;
    let mut total = vec![0.0; experts];
    for (&e, w) in routed.choices.experts.iter().zip(&routed.weight_of_pair) {
        total[e as usize] += w.f64();
    }
    let value = cv_squared(&total);
    if coefficient != 0.0 {
        let per_expert: Vec<S> = cv_squared_backward(&total).iter().map(|d| S::of(d * coefficient)).collect();
        let dpair: Vec<S> = routed.choices.experts.iter().map(|&e| per_expert[e as usize]).collect();
        let mut dnoisy = vec![S::ZERO; routed.logits_len()];
        routed.pair_weights_backward(&dpair, &mut dnoisy);
        out.dlogits_te.iter_mut().zip(&dnoisy).for_each(|(d, &n)| *d += n);
        if let (Some(draw), Some(raw)) = (&mut out.draw_noise_te, input.raw_noise_te) {
            routed.noise_backward(raw, &dnoisy, draw);
        }
    }
    value
}
