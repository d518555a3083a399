//! Experts without a network beside those with one (MoE++): how many of which kind, and what they may be combined with.

use super::{DropOrder, Policy, RouterConfig};
use crate::error::RoutingError;
use serde::{Deserialize, Serialize};

/// `[model.moe.zero_computation]`: experts without a network, after the others in the order constant, copy, zero.
///
/// `balance.loss = "switch"` becomes [`balance_loss`](crate::zero_cost::balance_loss) with coefficient `beta`.
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
