//! Mixture of Tokens (Antoniak et al. 2023): tokens at the same position of g sequences form a group; every expert computes
//! one mixture of the group and hands it back with the same weights.
//!
//! `w[t, e] = softmax over the GROUP of x_t C / temperature`. Weights sum to 1 over tokens, not over experts. Causal, but a
//! sequence's output depends on the other sequences of its group.

use super::mix;
use crate::activation::softmax;
use crate::real::Real;
use crate::scorers::linear_logits;

/// The weights and outputs of one group of tokens, x `[g, d]`.
pub fn group_forward<S: Real>(
    x_gd: &[S],
    controller_de: &[S],
    width: usize,
    temperature: S,
    expert: impl Fn(usize, &[S]) -> Vec<S>,
) -> (Vec<S>, Vec<S>) {
    let experts = controller_de.len() / width.max(1);
    let group = x_gd.len() / width.max(1);
    let logits = linear_logits(x_gd, controller_de, width);
    let mut weights_ge = vec![S::ZERO; group * experts];
    let mut y = vec![S::ZERO; x_gd.len()];
    let mut probs = vec![S::ZERO; group];
    for e in 0..experts {
        let column: Vec<S> = (0..group).map(|t| logits[t * experts + e] / temperature).collect();
        softmax(&column, &mut probs);
        let out = expert(e, &mix(probs.iter().copied(), x_gd, width));
        for t in 0..group {
            weights_ge[t * experts + e] = probs[t];
            for (y, &o) in y[t * width..(t + 1) * width].iter_mut().zip(&out) {
                *y += probs[t] * o;
            }
        }
    }
    (weights_ge, y)
}
