//! Soft MoE (Puigcerver et al. 2023): slots are convex mixtures of tokens, outputs convex mixtures of slot results.
//!
//! `logits[t, s] = scale <x^_t, phi^_s>` with both directions normalised over d; dispatch = softmax over TOKENS, combine =
//! softmax over all SLOTS; slots mix the raw tokens. Slot s belongs to expert `s / per_expert`. Not causal. One group = one
//! sequence. Cost `6 T s d` plus s expert rows.

use serde::{Deserialize, Serialize};

use super::mix;
use crate::activation::softmax;
use crate::real::Real;

/// Added inside the norm's square root.
pub const NORM_EPSILON: f64 = 1e-6;

/// Which of the two mixtures is learned; the rest are the paper's ablations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mixing {
    /// Both.
    #[default]
    Soft,
    /// Both uniform.
    Uniform,
    /// Uniform dispatch, learned combine.
    UniformDispatch,
    /// Learned dispatch, uniform combine.
    UniformCombine,
    /// Token t is slot `t mod slots`, and reads that slot back.
    Identity,
}

/// The layer's parameters.
#[derive(Debug, Clone, Copy)]
pub struct SoftMoe<'a, S> {
    /// `[d, slots]`, slots expert by expert.
    pub phi_ds: &'a [S],
    /// Slots.
    pub slots: usize,
    /// Slots per expert.
    pub per_expert: usize,
    /// The learned scale.
    pub scale: S,
    /// Inside the square root of the norms.
    pub epsilon: f64,
}

/// Everything the layer computed.
#[derive(Debug, Clone, PartialEq)]
pub struct SoftOutput<S> {
    /// `[T, slots]`.
    pub logits_ts: Vec<S>,
    /// Columns sum to 1 `[T, slots]`.
    pub dispatch_ts: Vec<S>,
    /// Rows sum to 1 `[T, slots]`.
    pub combine_ts: Vec<S>,
    /// `[slots, d]`.
    pub slots_sd: Vec<S>,
    /// `[slots, d]`.
    pub outputs_sd: Vec<S>,
    /// `[T, d]`.
    pub y_td: Vec<S>,
}

impl<S: Real> SoftMoe<'_, S> {
    /// Runs the layer on one sequence; `expert(e, x)` maps one slot.
    pub fn forward(
        &self,
        x_td: &[S],
        width: usize,
        mixing: Mixing,
        expert: impl Fn(usize, &[S]) -> Vec<S>,
    ) -> SoftOutput<S> {
        let tokens = x_td.len() / width.max(1);
        let logits_ts = self.logits(x_td, width);
        let (dispatch_ts, combine_ts) = self.mixtures(&logits_ts, tokens, mixing);
        let slots = self.slots;
        let mut slots_sd = Vec::with_capacity(slots * width);
        for s in 0..slots {
            slots_sd.extend(mix((0..tokens).map(|t| dispatch_ts[t * slots + s]), x_td, width));
        }
        let rows = slots_sd.chunks_exact(width.max(1)).enumerate();
        let outputs_sd: Vec<S> = rows.flat_map(|(s, x)| expert(s / self.per_expert.max(1), x)).collect();
        let rows = combine_ts.chunks_exact(slots.max(1));
        let y_td = rows.flat_map(|row| mix(row.iter().copied(), &outputs_sd, width)).collect();
        SoftOutput { logits_ts, dispatch_ts, combine_ts, slots_sd, outputs_sd, y_td }
    }

    /// `scale <x^, phi^>`; `[T, slots]`.
    pub fn logits(&self, x_td: &[S], width: usize) -> Vec<S> {
        let directions: Vec<Vec<S>> = (0..self.slots)
            .map(|s| unit(&(0..width).map(|d| self.phi_ds[d * self.slots + s]).collect::<Vec<_>>(), self.epsilon))
            .collect();
        let mut logits = Vec::with_capacity(x_td.len() / width.max(1) * self.slots);
        for x in x_td.chunks_exact(width.max(1)) {
            let x = unit(x, self.epsilon);
            logits.extend(directions.iter().map(|phi| self.scale * x.iter().zip(phi).map(|(&a, &b)| a * b).sum::<S>()));
        }
        logits
    }

    fn mixtures(&self, logits_ts: &[S], tokens: usize, mixing: Mixing) -> (Vec<S>, Vec<S>) {
        let slots = self.slots;
        let even = |n: usize| vec![S::of(1.0 / n.max(1) as f64); tokens * slots];
        if mixing == Mixing::Identity {
            let mut own = vec![S::ZERO; tokens * slots];
            (0..tokens).for_each(|t| own[t * slots + slot_of_token(t, slots)] = S::ONE);
            return (own.clone(), own);
        }
        let dispatch = match mixing {
            Mixing::Uniform | Mixing::UniformDispatch => even(tokens),
            _ => {
                let mut out = vec![S::ZERO; tokens * slots];
                let mut probs = vec![S::ZERO; tokens];
                for s in 0..slots {
                    let column: Vec<S> = (0..tokens).map(|t| logits_ts[t * slots + s]).collect();
                    softmax(&column, &mut probs);
                    (0..tokens).for_each(|t| out[t * slots + s] = probs[t]);
                }
                out
            }
        };
        let combine = match mixing {
            Mixing::Uniform | Mixing::UniformCombine => even(slots),
            _ => {
                let mut out = vec![S::ZERO; tokens * slots];
                for (row, probs) in logits_ts.chunks_exact(slots).zip(out.chunks_exact_mut(slots)) {
                    softmax(row, probs);
                }
                out
            }
        };
        (dispatch, combine)
    }
}

/// Identity routing's slot of a token.
pub fn slot_of_token(t: usize, slots: usize) -> usize {
    t % slots.max(1)
}

/// `v / sqrt(|v|^2 + epsilon)`.
pub(crate) fn unit<S: Real>(v: &[S], epsilon: f64) -> Vec<S> {
    let norm = (v.iter().map(|&a| a * a).sum::<S>() + S::of(epsilon)).sqrt();
    v.iter().map(|&a| a / norm).collect()
}
