//! SparseMixer-v2 as Phi-3.5-MoE runs it: two maxima in turn, each weighted by a softmax over the logits close to it.
//!
//! Logits with `(max - z) / max(|z|, max) > 2 eps` do not take part; for the second, the first is removed. The two weights do
//! not sum to 1 and often sum to nearly 2. The published training estimator (sampling with Heun's correction) is not here:
//! training uses the same deterministic weights with their exact gradient. O(T E). Sources: Liu et al. 2023;
//! modeling_phimoe.py of Phi-3.5-MoE.

use crate::assignment::Choices;
use crate::real::Real;

/// Weight of every pair.
pub fn weights<S: Real>(choices: &Choices, logits_te: &[S], experts: usize, eps: S) -> Vec<S> {
    let mut weights = Vec::with_capacity(choices.pairs());
    for t in 0..choices.tokens() {
        let row = &logits_te[t * experts..(t + 1) * experts];
        let list = choices.of_token(t);
        for (j, &e) in list.iter().enumerate() {
            let top = row[e as usize];
            let total: S = close(row, &list[..j], top, eps).map(|i| (row[i] - top).exp()).sum();
            weights.push(S::ONE / total);
        }
    }
    weights
}

/// Gradient of [`weights`]: `dlogits` `[T, E]` is added to.
pub fn backward<S: Real>(
    choices: &Choices,
    logits_te: &[S],
    experts: usize,
    eps: S,
    dpair: &[S],
    dlogits_te: &mut [S],
) {
    for t in 0..choices.tokens() {
        let row = &logits_te[t * experts..(t + 1) * experts];
        let list = choices.of_token(t);
        for (j, &e) in list.iter().enumerate() {
            let top = row[e as usize];
            let total: S = close(row, &list[..j], top, eps).map(|i| (row[i] - top).exp()).sum();
            let w = S::ONE / total;
            let d = dpair[choices.pair_range(t).start + j] * w;
            for i in close(row, &list[..j], top, eps) {
                dlogits_te[t * experts + i] -= d * (row[i] - top).exp() * w;
            }
            dlogits_te[t * experts + e as usize] += d;
        }
    }
}

/// Experts that take part in the softmax around `top`.
fn close<'a, S: Real>(row: &'a [S], taken: &'a [u32], top: S, eps: S) -> impl Iterator<Item = usize> + 'a {
    let near = move |z: S| {
        let magnitude = if z < S::ZERO { -z } else { z };
        // Written as a product: a quotient would be 0/0 where both are 0.
        top - z <= (eps + eps) * magnitude.larger(top)
    };
    (0..row.len()).filter(move |&i| !taken.contains(&(i as u32)) && near(row[i]))
}
