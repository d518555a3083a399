//! AdamW with decoupled weight decay, in one pass over param, grad, m and v.
//!
//! ```text
//! g = grad_scale * grad                 (clipping, loss scale: folded in)
//! m = beta1 m + (1 - beta1) g           v = beta2 v + (1 - beta2) g^2
//! param = param (1 - lr weight_decay) - lr (m / bias_correction1) / (sqrt(v / bias_correction2) + eps)
//! ```
//!
//! Memory bound at 28 bytes per parameter (read four arrays, write three). Elements are independent, so the split over threads cannot
//! change a bit.

use crate::isa::Isa;
use crate::lanes::{LANES, Lanes, Real, per_isa};
use rayon::prelude::*;

/// Elements per task: four arrays of 128 KiB.
const TASK_ELEMENTS: usize = 1 << 15;

/// One step's constants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWParams {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay (multiplied by the learning rate).
    pub weight_decay: f32,
    /// `1 - beta1^step`.
    pub bias_correction1: f32,
    /// `1 - beta2^step`.
    pub bias_correction2: f32,
    /// Factor on the gradient, 1 for none.
    pub grad_scale: f32,
}

impl AdamWParams {
    /// The constants of step number `step`, counted from 1.
    ///
    /// # Panics
    /// If `step` is 0.
    pub fn at_step(
        lr: f32,
        beta1: f32,
        beta2: f32,
        eps: f32,
        weight_decay: f32,
        step: u64,
        grad_scale: f32,
    ) -> AdamWParams {
        assert!(step > 0, "adamw: steps are counted from 1");
        let correction = |beta: f32| (1.0 - power(f64::from(beta), step)) as f32;
        let (bias_correction1, bias_correction2) = (correction(beta1), correction(beta2));
        AdamWParams { lr, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2, grad_scale }
    }
}

/// `base^exponent` by squaring: products only, so the same bits everywhere.
fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut product = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            product *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    product
}

/// Updates `param`, `m` and `v` in place.
///
/// # Panics
/// If the four slices differ in length.
pub fn adamw_step(isa: Isa, params: &AdamWParams, param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]) {
    check(param, grad, m, v);
    if param.len() <= TASK_ELEMENTS {
        return step_slice(isa, params, param, grad, m, v);
    }
    (
        param.par_chunks_mut(TASK_ELEMENTS),
        grad.par_chunks(TASK_ELEMENTS),
        m.par_chunks_mut(TASK_ELEMENTS),
        v.par_chunks_mut(TASK_ELEMENTS),
    )
        .into_par_iter()
        .for_each(|(param, grad, m, v)| step_slice(isa, params, param, grad, m, v));
}

fn check(param: &[f32], grad: &[f32], m: &[f32], v: &[f32]) {
    assert!(
        param.len() == grad.len() && param.len() == m.len() && param.len() == v.len(),
        "adamw_step: param has {} values, grad {}, m {}, v {}",
        param.len(),
        grad.len(),
        m.len(),
        v.len()
    );
}

per_isa! {
    fn step_slice = step_slice_body(params: &AdamWParams, param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]);
}

#[inline(always)]
fn step_slice_body<L: Lanes>(params: &AdamWParams, param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]) {
    let whole = param.len() / LANES * LANES;
    let constants = Constants::<L>::new(params);
    for i in (0..whole).step_by(LANES) {
        let at = i..i + LANES;
        let (p, g) = (L::load(&param[at.clone()]), L::load(&grad[at.clone()]));
        let (p, m_new, v_new) = constants.update(p, g, L::load(&m[at.clone()]), L::load(&v[at.clone()]));
        p.store(&mut param[at.clone()]);
        m_new.store(&mut m[at.clone()]);
        v_new.store(&mut v[at]);
    }
    let constants = Constants::<f32>::new(params);
    for i in whole..param.len() {
        (param[i], m[i], v[i]) = constants.update(param[i], grad[i], m[i], v[i]);
    }
}

/// The constants in every lane.
struct Constants<R> {
    grad_scale: R,
    beta1: R,
    one_minus_beta1: R,
    beta2: R,
    one_minus_beta2: R,
    keep: R,
    step: R,
    inv_root_correction2: R,
    eps: R,
}

impl<R: Real> Constants<R> {
    #[inline(always)]
    fn new(p: &AdamWParams) -> Constants<R> {
        Constants {
            grad_scale: R::splat(p.grad_scale),
            beta1: R::splat(p.beta1),
            one_minus_beta1: R::splat(1.0 - p.beta1),
            beta2: R::splat(p.beta2),
            one_minus_beta2: R::splat(1.0 - p.beta2),
            keep: R::splat(1.0 - p.lr * p.weight_decay),
            step: R::splat(p.lr / p.bias_correction1),
            inv_root_correction2: R::splat(1.0 / p.bias_correction2.sqrt()),
            eps: R::splat(p.eps),
        }
    }

    #[inline(always)]
    fn update(&self, param: R, grad: R, m: R, v: R) -> (R, R, R) {
        let g = grad.mul(self.grad_scale);
        let m = m.mul_add(self.beta1, g.mul(self.one_minus_beta1));
        let v = v.mul_add(self.beta2, g.mul(g).mul(self.one_minus_beta2));
        let root = v.sqrt().mul_add(self.inv_root_correction2, self.eps);
        let param = m.mul(self.step).div(root).neg_mul_add(R::splat(1.0), param.mul(self.keep));
        (param, m, v)
    }
}

/// [`adamw_step`] one element at a time; the same bits.
pub fn adamw_step_reference(params: &AdamWParams, param: &mut [f32], grad: &[f32], m: &mut [f32], v: &mut [f32]) {
    check(param, grad, m, v);
    let constants = Constants::<f32>::new(params);
    for i in 0..param.len() {
        (param[i], m[i], v[i]) = constants.update(param[i], grad[i], m[i], v[i]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_same_bits, numbers, pools};

    fn three_steps(
        len: usize,
        step: impl Fn(&AdamWParams, &mut [f32], &[f32], &mut [f32], &mut [f32]),
    ) -> [Vec<f32>; 3] {
        let (mut param, mut m, mut v) = (numbers(1, len), vec![0.0; len], vec![0.0; len]);
        for t in 1..=3 {
            let params = AdamWParams::at_step(1e-2, 0.9, 0.95, 1e-8, 0.1, t, 0.5);
            step(&params, &mut param, &numbers(10 + t, len), &mut m, &mut v);
        }
        [param, m, v]
    }

    #[test]
    fn every_isa_and_number_of_threads_gives_the_bits_of_the_reference() {
        for len in [0, 1, 15, 16, 1000, TASK_ELEMENTS + 17, 3 * TASK_ELEMENTS] {
            let want = three_steps(len, adamw_step_reference);
            for isa in Isa::available() {
                for got in pools(|| three_steps(len, |p, param, grad, m, v| adamw_step(isa, p, param, grad, m, v))) {
                    for (what, (got, want)) in ["param", "m", "v"].iter().zip(got.iter().zip(&want)) {
                        assert_same_bits(&format!("{isa}, {len} values, {what}"), got, want);
                    }
                }
            }
        }
    }

    #[test]
    fn a_step_is_the_published_rule_in_f64() {
        let (mut param, grad, mut m, mut v) = (numbers(1, 50), numbers(2, 50), numbers(3, 50), vec![0.25_f32; 50]);
        let want: Vec<f64> = (0..50)
            .map(|i| {
                let g = 0.5 * f64::from(grad[i]);
                let m = 0.9 * f64::from(m[i]) + 0.1 * g;
                let v = 0.95 * 0.25 + 0.05 * g * g;
                let (m_hat, v_hat) = (m / (1.0 - 0.9_f64.powi(7)), v / (1.0 - 0.95_f64.powi(7)));
                f64::from(param[i]) * (1.0 - 1e-2 * 0.1) - 1e-2 * m_hat / (v_hat.sqrt() + 1e-8)
            })
            .collect();
        adamw_step(
            Isa::current(),
            &AdamWParams::at_step(1e-2, 0.9, 0.95, 1e-8, 0.1, 7, 0.5),
            &mut param,
            &grad,
            &mut m,
            &mut v,
        );
        for (ours, want) in param.iter().zip(want) {
            assert!((f64::from(*ours) - want).abs() < 1e-6, "{ours} against {want}");
        }
    }

    #[test]
    #[should_panic(expected = "param has 3 values, grad 2")]
    fn slices_of_different_length_are_named() {
        let params = AdamWParams::at_step(1e-2, 0.9, 0.95, 1e-8, 0.1, 1, 1.0);
        adamw_step(Isa::Scalar, &params, &mut [0.0; 3], &[0.0; 2], &mut [0.0; 3], &mut [0.0; 3]);
    }
}
