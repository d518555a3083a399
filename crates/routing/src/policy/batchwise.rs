//! Strictly balanced gating (Shazeer et al. 2017, appendix F): `G = softmax * M`, renormalised.
//!
//! In training M keeps, per expert, the `k T / E` largest probabilities of the batch (expert choice, hence not causal); in
//! evaluation it keeps what exceeds a learned threshold per expert. The threshold loss pulls the second towards the first;
//! masks are constants, so its only gradient is for the thresholds. O(T E) in training, O(T E log E) in evaluation.

use crate::assignment::Choices;
use crate::real::Real;
use crate::select::order_descending;

/// Experts whose probability exceeds their threshold, largest first; a token may have none.
pub fn above_thresholds<S: Real>(probs_te: &[S], thresholds_e: &[S]) -> Choices {
    Choices::ragged(probs_te.chunks_exact(thresholds_e.len()).map(|row| {
        let mut order = order_descending(row);
        order.retain(|&e| row[e as usize] > thresholds_e[e as usize]);
        order
    }))
}

/// 1 where a pair was chosen; `[T, E]`.
pub fn mask(choices: &Choices, experts: usize) -> Vec<f64> {
    let mut mask = vec![0.0; choices.tokens() * experts];
    for t in 0..choices.tokens() {
        for &e in choices.of_token(t) {
            mask[t * experts + e as usize] = 1.0;
        }
    }
    mask
}

/// `sum (M_threshold - M_batch)(p - threshold)` and its gradient for the thresholds.
pub fn threshold_loss(probs_te: &[f64], thresholds_e: &[f64], batch: &[f64], threshold: &[f64]) -> (f64, Vec<f64>) {
    let experts = thresholds_e.len();
    let (mut loss, mut gradient) = (0.0, vec![0.0; experts]);
    for (i, &p) in probs_te.iter().enumerate() {
        let difference = threshold[i] - batch[i];
        loss += difference * (p - thresholds_e[i % experts]);
        gradient[i % experts] -= difference;
    }
    (loss, gradient)
}
