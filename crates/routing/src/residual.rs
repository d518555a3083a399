//! Layers that add something to the routed output: Residual-MoE, shared experts with a gate, and MoS distillation.

use crate::activation::{log_sum_exp, sigmoid, softmax};
use crate::real::Real;
use crate::scorers::linear_logits;
use serde::{Deserialize, Serialize};

/// How the dense network of a Residual-MoE layer joins the experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Residual {
    /// `c0 experts(x) + c1 dense(x)`, `[c0, c1] = softmax(x W + b)` (DeepSpeed's code).
    Coefficient,
    /// `experts(x) + dense(x)` (the paper's text).
    Sum,
}

/// Residual-MoE (DeepSpeed): `softmax(x Wc + b)`, Wc `[d, 2]`; index 0 weights the MoE branch, 1 the dense one; `[T, 2]`.
pub fn coefficients<S: Real>(x_td: &[S], wc_d2: &[S], bias: &[S], width: usize) -> Vec<S> {
    let mut logits = linear_logits(x_td, wc_d2, width);
    let mut out = vec![S::ZERO; logits.len()];
    for (row, probs) in logits.chunks_exact_mut(2).zip(out.chunks_exact_mut(2)) {
        row.iter_mut().zip(bias).for_each(|(z, &b)| *z += b);
        softmax(row, probs);
    }
    out
}

/// Qwen2-MoE: the shared expert's weight `sigmoid(w . x)`; `[T]`.
pub fn shared_gate<S: Real>(x_td: &[S], w_d: &[S]) -> Vec<S> {
    linear_logits(x_td, w_d, w_d.len()).into_iter().map(sigmoid).collect()
}

/// MegaBlocks' weighted sum: `(shared + k routed) / (k + 1)`.
pub fn weighted_shared<S: Real>(shared: S, routed: S, k: usize) -> S {
    let k = S::of(k as f64);
    (shared + k * routed) / (k + S::ONE)
}

/// Mixture of Students: cross-entropy and KL(teacher || student), means over rows of `classes` logits.
pub fn distillation(student: &[f64], teacher: &[f64], labels: &[usize], classes: usize) -> (f64, f64) {
    let rows = labels.len() as f64;
    let (mut ce, mut kl) = (0.0, 0.0);
    for ((s, t), &label) in student.chunks_exact(classes).zip(teacher.chunks_exact(classes)).zip(labels) {
        let (lse_s, lse_t) = (log_sum_exp(s), log_sum_exp(t));
        ce += lse_s - s.get(label).copied().unwrap_or(f64::NAN);
        for (zs, zt) in s.iter().zip(t) {
            let log_t = zt - lse_t;
            kl += log_t.exp() * (log_t - (zs - lse_s));
        }
    }
    if rows == 0.0 { (0.0, 0.0) } else { (ce / rows, kl / rows) }
}

/// Gradients of the two terms of [`distillation`] for the student's logits, each `[rows, classes]`:
/// `(softmax(s) - onehot(label)) / rows` and `(softmax(s) - softmax(t)) / rows`. The teacher is a constant.
pub fn distillation_backward(
    student: &[f64],
    teacher: &[f64],
    labels: &[usize],
    classes: usize,
) -> (Vec<f64>, Vec<f64>) {
    let rows = labels.len() as f64;
    let (mut dce, mut dkl) = (Vec::with_capacity(student.len()), Vec::with_capacity(student.len()));
    let (mut p, mut q) = (vec![0.0; classes], vec![0.0; classes]);
    for ((s, t), &label) in student.chunks_exact(classes).zip(teacher.chunks_exact(classes)).zip(labels) {
        softmax(s, &mut p);
        softmax(t, &mut q);
        dce.extend(p.iter().enumerate().map(|(c, p)| (p - if c == label { 1.0 } else { 0.0 }) / rows));
        dkl.extend(p.iter().zip(&q).map(|(p, q)| (p - q) / rows));
    }
    (dce, dkl)
}
