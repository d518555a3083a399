//! From tokens to logits, as plain references: linear, cosine, two-layer MLP, fuzzy membership. Parameters are the caller's.
//!
//! `x_td` is `[T, d]`; the result is `[T, E]`. The model's own scorers compute the same through its kernels.

use crate::real::Real;

/// `x W`, W `[d, E]`.
pub fn linear_logits<S: Real>(x_td: &[S], w_de: &[S], width: usize) -> Vec<S> {
    let experts = w_de.len() / width.max(1);
    let mut out = Vec::with_capacity(x_td.len() / width.max(1) * experts);
    for x in x_td.chunks_exact(width.max(1)) {
        for e in 0..experts {
            out.push(x.iter().enumerate().map(|(i, &v)| v * w_de[i * experts + e]).sum());
        }
    }
    out
}

/// Keeps the direction of a zero vector defined.
const NORM_EPSILON: f64 = 1e-6;

/// X-MoE: cosine of `P x` (P is [d_e, d]) with every expert's embedding e_i ([E, d_e]); divide by tau for logits.
pub fn cosine_scores<S: Real>(x_td: &[S], project: &[S], embeddings: &[S], width: usize) -> Vec<S> {
    let inner = project.len() / width.max(1);
    let experts = embeddings.len() / inner.max(1);
    let mut out = Vec::with_capacity(x_td.len() / width.max(1) * experts);
    for x in x_td.chunks_exact(width.max(1)) {
        let h: Vec<S> = project.chunks_exact(width).map(|row| dot(row, x)).collect();
        for e in embeddings.chunks_exact(inner.max(1)) {
            let norms = (dot(&h, &h) * dot(e, e)).sqrt();
            out.push(dot(&h, e) / norms.larger(S::of(NORM_EPSILON)));
        }
    }
    out
}

/// Torchscale's variant: the projected token keeps its length, embeddings have length 1 in the score.
pub fn torchscale_scores<S: Real>(x_td: &[S], project: &[S], embeddings: &[S], width: usize) -> Vec<S> {
    let inner = project.len() / width.max(1);
    let mut out = Vec::new();
    for x in x_td.chunks_exact(width.max(1)) {
        let h: Vec<S> = project.chunks_exact(width).map(|row| dot(row, x)).collect();
        out.extend(
            embeddings.chunks_exact(inner.max(1)).map(|e| dot(&h, e) / dot(e, e).sqrt().larger(S::of(NORM_EPSILON))),
        );
    }
    out
}

/// What an MLP gate puts between its layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hidden {
    /// Hyperbolic tangent (MoE++).
    Tanh,
    /// Rectifier.
    Relu,
}

/// `act(x W1) W2`; W1 `[d, m]`, W2 `[m, E]`, no biases.
pub fn mlp_logits<S: Real>(x_td: &[S], w1: &[S], w2: &[S], width: usize, hidden: Hidden) -> Vec<S> {
    let inner = w1.len() / width.max(1);
    let mut h = linear_logits(x_td, w1, width);
    for v in &mut h {
        *v = match hidden {
            Hidden::Relu => v.larger(S::ZERO),
            // (1 - e^-2|v|) / (1 + e^-2|v|) with the sign of v: no overflow.
            Hidden::Tanh => {
                let magnitude = if *v < S::ZERO { -*v } else { *v };
                let decay = (-(magnitude + magnitude)).exp();
                let t = (S::ONE - decay) / (S::ONE + decay);
                if *v < S::ZERO { -t } else { t }
            }
        };
    }
    linear_logits(&h, w2, inner)
}

/// Logarithm of `d2^(-1/(m-1))` with d2 the squared distance to each prototype plus 1e-9: its softmax is the fuzzy membership.
pub fn fuzzy_logits<S: Real>(x_td: &[S], prototypes_ed: &[S], width: usize, fuzzifier: f64) -> Vec<S> {
    let power = S::of(-1.0 / (fuzzifier - 1.0));
    let mut out = Vec::new();
    for x in x_td.chunks_exact(width.max(1)) {
        for c in prototypes_ed.chunks_exact(width.max(1)) {
            let d2: S = x.iter().zip(c).map(|(&a, &b)| (a - b) * (a - b)).sum();
            out.push((d2 + S::of(1e-9)).ln() * power);
        }
    }
    out
}

/// MoE++ gating residual: `z + z_previous Wg`, Wg `[E, E]`.
pub fn residual_logits<S: Real>(logits_te: &[S], previous_te: &[S], wg: &[S], experts: usize) -> Vec<S> {
    let carried = linear_logits(previous_te, wg, experts);
    logits_te.iter().zip(carried).map(|(&z, c)| z + c).collect()
}

fn dot<S: Real>(a: &[S], b: &[S]) -> S {
    a.iter().zip(b).map(|(&x, &y)| x * y).sum()
}
