//! MoE++ (Jin et al. 2024): experts that cost nothing beside the FFN experts, and the balance that prefers them by `tau`.
//!
//! Order of experts: FFN..., constant..., copy..., zero... Weights are raw top-2 probabilities (the paper's equation 1); the
//! released code removes the zero expert's weight and renormalises, which [`renormalise_after_zero`] gives.

use crate::activation::softmax;
use crate::capacity::Fraction;
use crate::config::{DropOrder, Policy, RouterConfig};
use crate::error::RoutingError;
use crate::losses::mean_probability_backward;
use crate::real::Real;
use serde::{Deserialize, Serialize};

/// `[model.moe.zero_computation]`: experts without a network, after the others in the order constant, copy, zero.
///
/// `balance.loss = "switch"` becomes [`balance_loss`] with coefficient `beta`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ZeroComputation {
    /// Constant experts.
    pub constant: usize,
    /// Copy experts.
    pub copy: usize,
    /// Zero experts.
    pub zero: usize,
    /// How much of an FFN expert's load such an expert pays for in the balance loss, and the ratio of their capacities.
    pub tau: f64,
    /// Capacity in training relative to an even share; 0 drops nothing.
    pub gamma: f64,
    /// Coefficient of the balance loss.
    pub beta: f64,
    /// Adds the logits of the previous MoE layer, times a learned matrix, to a layer's own.
    pub gating_residual: bool,
    /// The released code's weights: those of zero experts removed, the token's others divided by their sum.
    pub renorm_after_zero: bool,
}

impl Default for ZeroComputation {
    /// The paper's values.
    fn default() -> Self {
        Self {
            constant: 2,
            copy: 1,
            zero: 1,
            tau: 0.75,
            gamma: 1.1,
            beta: 0.01,
            gating_residual: true,
            renorm_after_zero: false,
        }
    }
}

impl ZeroComputation {
    /// How many experts it adds.
    pub fn experts(&self) -> usize {
        self.constant + self.copy + self.zero
    }

    /// Experts with a network, of `experts` in all.
    pub fn networks(&self, experts: usize) -> usize {
        experts.saturating_sub(self.experts())
    }

    /// What expert `index` of those without a network does.
    pub fn kind(&self, index: usize) -> ZeroCost {
        match index {
            i if i < self.constant => ZeroCost::Constant,
            i if i < self.constant + self.copy => ZeroCost::Copy,
            _ => ZeroCost::Zero,
        }
    }

    /// Per expert 1, or `tau` without a network; `[E]`.
    pub fn eta(&self, experts: usize) -> Vec<f64> {
        (0..experts).map(|e| if e < self.networks(experts) { 1.0 } else { self.tau }).collect()
    }

    /// Refuses what cannot be routed beside `networks` experts.
    pub fn validate(&self, networks: usize, router: &RouterConfig) -> Result<(), RoutingError> {
        let refuse = |key: &'static str, value: String, reason: &str| {
            Err(RoutingError::Config { key, value, reason: reason.to_string() })
        };
        if networks == 0 {
            return Err(RoutingError::NoExperts);
        }
        if self.experts() == 0 {
            return refuse("zero_computation", "no expert".into(), "at least one of constant, copy and zero");
        }
        for (key, value, least) in [
            ("zero_computation.tau", self.tau, f64::MIN_POSITIVE),
            ("zero_computation.gamma", self.gamma, 0.0),
            ("zero_computation.beta", self.beta, 0.0),
        ] {
            if !(least..1e6).contains(&value) {
                return refuse(key, value.to_string(), "a number from 0 to 1e6, tau above 0");
            }
        }
        if !matches!(router.policy, Policy::TopK | Policy::Switch | Policy::NoisyTopK | Policy::TopP { .. }) {
            let reason = "policy top_k, switch, noisy_top_k or top_p, with experts that have no network";
            return refuse("policy", format!("{:?}", router.policy), reason);
        }
        if self.renorm_after_zero && !router.activation.is_softmax() {
            let found = format!("{:?}", router.activation);
            return refuse("activation", found, "a softmax, for zero_computation.renorm_after_zero");
        }
        if router.capacity_factor != 0.0 || router.eval_capacity_factor != 0.0 {
            let reason = "0: zero_computation.gamma sets the capacities";
            return refuse("capacity_factor", router.capacity_factor.to_string(), reason);
        }
        if self.gamma > 0.0 && !matches!(router.drop_order, DropOrder::TokenMajor | DropOrder::ChoiceMajor) {
            let found = format!("{:?}", router.drop_order);
            return refuse("drop_order", found, "token_major or choice_major, with zero_computation");
        }
        Ok(())
    }

    /// Slots of every expert in training, `[E]`; `None` when `gamma` is 0, that is unlimited.
    ///
    /// [`capacities`] of the `k T` selections (the paper writes T, of which k fold would not fit), rounded up exactly, at most T
    /// and at least `minimum`. With `tau` 1 that is the capacity of equal experts with factor `gamma`.
    pub fn slots(&self, tokens: usize, experts: usize, top_k: usize, minimum: usize) -> Option<Vec<usize>> {
        let (gamma, tau) = (Fraction::from_decimal(self.gamma)?, Fraction::from_decimal(self.tau)?);
        if gamma.numerator == 0 || tokens == 0 {
            return None;
        }
        let networks = self.networks(experts);
        let below = gamma.denominator.checked_mul(
            tau.numerator.checked_mul(networks as u128)? + tau.denominator.checked_mul(self.experts() as u128)?,
        );
        let slots = |weight: u128| {
            let above = gamma.numerator.checked_mul(weight)?.checked_mul((tokens * top_k) as u128)?;
            Some(above.div_ceil(below?).min(tokens as u128) as usize)
        };
        // Decimals too long for exact integers: no file has them.
        let (wide, narrow) =
            capacities((tokens * top_k) as f64, networks as f64, self.experts() as f64, self.tau, self.gamma);
        let wide = slots(tau.numerator).unwrap_or(wide.ceil() as usize).max(minimum).max(1);
        let narrow = slots(tau.denominator).unwrap_or(narrow.ceil() as usize).max(minimum).max(1);
        Some((0..experts).map(|e| if e < networks { wide } else { narrow }).collect())
    }
}

/// What an expert without an FFN does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ZeroCost {
    /// `a1 x + a2 v`, `[a1, a2] = softmax(Wc x)`.
    Constant,
    /// x.
    Copy,
    /// 0.
    Zero,
}

/// `softmax(Wc x)`, Wc `[2, d]` row by row.
pub fn constant_mix<S: Real>(x: &[S], wc: &[S]) -> [S; 2] {
    let mut logits = [S::ZERO; 2];
    for (z, row) in logits.iter_mut().zip(wc.chunks_exact(x.len().max(1))) {
        *z = row.iter().zip(x).map(|(&w, &v)| w * v).sum();
    }
    let mut mix = [S::ZERO; 2];
    softmax(&logits, &mut mix);
    mix
}

/// The constant expert: `a1 x + a2 v`.
pub fn constant_expert<S: Real>(x: &[S], wc: &[S], v: &[S]) -> Vec<S> {
    let [a, b] = constant_mix(x, wc);
    x.iter().zip(v).map(|(&x, &v)| a * x + b * v).collect()
}

/// `sum_i eta_i f_i Pbar_i`, eta 1 for FFN experts and `tau` for the others; no factor E. f sums to k.
pub fn balance_loss(fraction_e: &[f64], mean_prob_e: &[f64], ffn: usize, tau: f64) -> f64 {
    let eta = |i: usize| if i < ffn { 1.0 } else { tau };
    fraction_e.iter().zip(mean_prob_e).enumerate().map(|(i, (f, p))| eta(i) * f * p).sum()
}

/// Gradient of [`balance_loss`] for the logits: `(1/T) P[t,i] (eta_i f_i - sum_j P[t,j] eta_j f_j)`; `[T, E]`, f constant.
pub fn balance_loss_backward(fraction_e: &[f64], probs_te: &[f64], ffn: usize, tau: f64) -> Vec<f64> {
    let cost_e: Vec<f64> = fraction_e.iter().enumerate().map(|(i, f)| if i < ffn { *f } else { tau * f }).collect();
    mean_probability_backward(&cost_e, probs_te)
}

/// Slots per FFN expert and per zero-cost expert, before rounding: `gamma tau T / (tau N_ffn + N_zc)` and `gamma T / (...)`.
pub fn capacities(tokens: f64, ffn: f64, zero_cost: f64, tau: f64, gamma: f64) -> (f64, f64) {
    let share = gamma * tokens / (tau * ffn + zero_cost);
    (tau * share, share)
}

/// The released code's weights: zero experts' weights removed, the rest of the row divided by its sum (0 if nothing is left).
pub fn renormalise_after_zero(combine_te: &[f64], experts: usize, is_zero: impl Fn(usize) -> bool) -> Vec<f64> {
    let mut out = combine_te.to_vec();
    for row in out.chunks_exact_mut(experts.max(1)) {
        row.iter_mut().enumerate().filter(|(e, _)| is_zero(*e)).for_each(|(_, w)| *w = 0.0);
        crate::compress::normalise_row(row);
    }
    out
}
