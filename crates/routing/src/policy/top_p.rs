//! Top-p routing (Huang et al. 2024; HMoE, Wang et al. 2024, section 3): the smallest prefix of a token's sorted probabilities
//! whose sum reaches `mass`. 1 to E experts per token, causal. O(T E log E): every row is sorted.

use crate::assignment::Choices;
use crate::real::Real;
use crate::select::order_descending;

/// The chosen experts of every token, largest probability first; at least one.
pub fn select<S: Real>(probs_te: &[S], experts: usize, mass: S) -> Choices {
    Choices::ragged(probs_te.chunks_exact(experts).map(|row| {
        let mut order = order_descending(row);
        let mut sum = S::ZERO;
        let reached = order.iter().position(|&e| {
            sum += row[e as usize];
            sum >= mass
        });
        order.truncate(reached.map_or(experts, |last| last + 1));
        order
    }))
}
