//! Soft routing: no selection, so no [`crate::Assignment`]; experts see mixtures of tokens, or tokens see mixtures of experts.
//!
//! Every function is generic, so running it on [`crate::reference::dual_numbers::Dual`] gives its exact gradient. Which of these are causal is
//! decided in `tests/causality.rs`: merging by a mean of earlier segments and block-causal slots are; the others are not.

pub mod config;
pub mod soft_moe;
pub mod merge;
pub mod mixture_of_tokens;
pub mod block_causal;

use crate::real::Real;

/// `sum_j weights[j] rows[j]`, rows of `width`.
pub(crate) fn mix<S: Real>(weights: impl Iterator<Item = S>, rows: &[S], width: usize) -> Vec<S> {
    let mut out = vec![S::ZERO; width];
    for (w, row) in weights.zip(rows.chunks_exact(width.max(1))) {
        for (o, &v) in out.iter_mut().zip(row) {
            *o += w * v;
        }
    }
    out
}
