//! Shazeer's smooth load estimator: the probability that a token would select an expert if its noise were drawn again.
//!
//! `P[t,i] = Phi(u)`, `u = (clean_i - kth_excluding_i) / sd_i`, where the threshold is the k-th largest noisy logit of the
//! other experts: the (k+1)-th of all if i is selected, the k-th otherwise. The gradient flows through the threshold too,
//! because it is a noisy logit itself; [`ThresholdGradient::Stop`] gives the other reading.

use super::Auxiliary;
use super::cv::{cv_squared, cv_squared_backward};
use crate::activation::sigmoid;
use crate::real::Real;
use crate::route::{Routed, RouterInput};
use crate::select::top_k_row;

/// Whether the threshold, which is another expert's noisy logit, receives gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThresholdGradient {
    /// Yes: what tensor2tensor does, and this project's rule.
    Flow,
    /// No.
    Stop,
}

/// The estimate and what its gradient needs.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadEstimate {
    /// P(token selects expert) `[T, E]`.
    pub probability_te: Vec<f64>,
    /// Its sum over tokens `[E]`.
    pub load_e: Vec<f64>,
    u_te: Vec<f64>,
    sd_te: Vec<f64>,
    /// Index of the expert whose noisy logit is the threshold `[T, E]`.
    threshold_te: Vec<u32>,
}

impl LoadEstimate {
    /// From clean logits, noisy logits and standard deviations, all `[T, E]`; `None` if k = E, where no threshold exists.
    pub fn new<S: Real>(clean_te: &[S], noisy_te: &[S], sd_te: &[S], experts: usize, k: usize) -> Option<Self> {
        if k >= experts {
            return None;
        }
        let entries = clean_te.len();
        let mut estimate = Self {
            probability_te: Vec::with_capacity(entries),
            load_e: vec![0.0; experts],
            u_te: Vec::with_capacity(entries),
            sd_te: sd_te.iter().map(|s| s.f64()).collect(),
            threshold_te: Vec::with_capacity(entries),
        };
        let mut best = vec![0; k + 1];
        let mut values = vec![S::NEG_INFINITY; k + 1];
        for (t, noisy) in noisy_te.chunks_exact(experts).enumerate() {
            top_k_row(noisy, &mut values, &mut best);
            for i in 0..experts {
                let threshold = if best[..k].contains(&(i as u32)) { best[k] } else { best[k - 1] };
                let at = t * experts + i;
                let u = (clean_te[at].f64() - noisy[threshold as usize].f64()) / estimate.sd_te[at];
                let p = normal_cdf(u);
                estimate.probability_te.push(p);
                estimate.load_e[i] += p;
                estimate.u_te.push(u);
                estimate.threshold_te.push(threshold);
            }
        }
        Some(estimate)
    }

    /// From `dload_e` to gradients for (clean logits, noisy logits as thresholds, standard deviations), all `[T, E]`.
    pub fn backward(&self, dload_e: &[f64], threshold: ThresholdGradient) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
        let experts = self.load_e.len();
        let n = self.u_te.len();
        let (mut dclean, mut dnoisy, mut dsd) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
        for at in 0..n {
            let (t, i) = (at / experts, at % experts);
            let slope = dload_e[i] * normal_pdf(self.u_te[at]) / self.sd_te[at];
            dclean[at] += slope;
            dsd[at] -= slope * self.u_te[at];
            if threshold == ThresholdGradient::Flow {
                dnoisy[t * experts + self.threshold_te[at] as usize] -= slope;
            }
        }
        (dclean, dnoisy, dsd)
    }
}

/// CV^2 of the load; without noise (evaluation) or with k = E it is that of the hard load, which has no gradient.
pub(super) fn load_loss<S: Real>(
    input: &RouterInput<S>,
    routed: &Routed<S>,
    coefficient: f64,
    out: &mut Auxiliary<S>,
) -> f64 {
    let experts = routed.shape.experts;
    let hard = || cv_squared(&routed.assignment.demand.iter().map(|&c| f64::from(c)).collect::<Vec<_>>());
    let Some(noise) = &routed.noise else { return hard() };
    let estimate = LoadEstimate::new(input.logits_te, &noise.logits_te, &noise.sd_te, experts, routed.shape.top_k);
    let Some(mut estimate) = estimate else { return hard() };
    if let Some(real) = input.real_t {
        estimate.mask(real);
    }
    let value = cv_squared(&estimate.load_e);
    if coefficient != 0.0 {
        let dload: Vec<f64> = cv_squared_backward(&estimate.load_e).iter().map(|d| d * coefficient).collect();
        let (dclean, dnoisy, mut dsd) = estimate.backward(&dload, ThresholdGradient::Flow);
        for at in 0..dclean.len() {
            let real = input.real_t.is_none_or(|real| real[at / experts]);
            if real {
                out.dlogits_te[at] += S::of(dclean[at] + dnoisy[at]);
                dsd[at] += dnoisy[at] * noise.eps_te[at].f64();
            }
        }
        if let (Some(draw), Some(raw)) = (&mut out.draw_noise_te, input.raw_noise_te) {
            for at in (0..raw.len()).filter(|at| input.real_t.is_none_or(|real| real[at / experts])) {
                draw[at] += S::of(dsd[at] * sigmoid(raw[at].f64()));
            }
        }
    }
    value
}

impl LoadEstimate {
    fn mask(&mut self, real_t: &[bool]) {
        let experts = self.load_e.len();
        for (t, _) in real_t.iter().enumerate().filter(|(_, real)| !**real) {
            for i in 0..experts {
                self.load_e[i] -= self.probability_te[t * experts + i];
                self.probability_te[t * experts + i] = 0.0;
            }
        }
    }
}

/// Standard normal density.
pub fn normal_pdf(u: f64) -> f64 {
    (-0.5 * u * u).exp() / std::f64::consts::TAU.sqrt()
}

/// Standard normal distribution function, relative error about 1e-15 (absolute below -6).
///
/// |u| < 4: the series `phi(u) sum u^(2n+1) / (2n+1)!!`, whose terms all have one sign; beyond: the continued fraction of the tail.
pub fn normal_cdf(u: f64) -> f64 {
    if u.is_nan() {
        return u;
    }
    let x = u.abs();
    if x > 39.0 {
        return if u > 0.0 { 1.0 } else { 0.0 };
    }
    if x < 4.0 {
        let (mut term, mut total, mut n) = (x, x, 1.0);
        while term > total * 1e-17 {
            n += 2.0;
            term *= x * x / n;
            total += term;
        }
        let half = normal_pdf(x) * total;
        return if u >= 0.0 { 0.5 + half } else { 0.5 - half };
    }
    // Tail = pdf / (x + 1/(x + 2/(x + 3/...))), 60 levels from the inside out.
    let mut fraction = x;
    for level in (1..=60).rev() {
        fraction = x + f64::from(level) / fraction;
    }
    let tail = normal_pdf(x) / fraction;
    if u > 0.0 { 1.0 - tail } else { tail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_normal_distribution_matches_published_values() {
        for (u, p) in [
            (0.0, 0.5),
            (1.0, 0.841_344_746_068_542_9),
            (-1.96, 0.024_997_895_148_220_435),
            (3.5, 0.999_767_370_920_964_5),
            (-5.0, 2.866_515_718_791_939e-7),
            (-8.0, 6.220_960_574_271_784e-16),
        ] {
            let found = normal_cdf(u);
            assert!(((found - p) / p).abs() < 2e-12, "Phi({u}) = {found}, expected {p}");
        }
    }
}
