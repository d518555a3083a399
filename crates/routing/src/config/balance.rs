//! What keeps the experts' loads even: `[model.moe.balance]`.

use super::{GivenBalance, Policy, RouterConfig, config_error, non_negative};
use crate::error::RoutingError;
use serde::{Deserialize, Serialize};

/// Which balance loss; 1 at perfect balance, 0 for the CV forms, k for the parameter penalty.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BalanceLoss {
    /// No balance loss.
    None,
    /// `(E/k) sum_i f_i Pbar_i` with f from all k choices before capacity.
    #[default]
    Switch,
    /// CV^2 of the summed combine weights (Shazeer).
    Importance,
    /// CV^2 of the smooth load estimate (Shazeer); needs noise, zero in evaluation.
    Load,
    /// Importance plus load, each with the coefficient.
    ImportanceLoad,
    /// HMoE: `E sum_i f_i Pbar_i h_i / mean(h)`, h_i the hidden width of expert i: wide experts pay for their parameters.
    ParameterPenalty,
}

/// `balance.controller`: where the coefficient starts and by which factor it moves.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReluControl {
    /// First coefficient.
    pub start: f64,
    /// Factor of one step, above 1.
    pub alpha: f64,
}

impl Default for ReluControl {
    /// The paper's values.
    fn default() -> Self {
        Self { start: 1e-8, alpha: 1.2 }
    }
}

/// Over which tokens selection fractions are counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BalanceScope {
    /// Counts of the whole optimizer step: the loss is that of one large batch. With several micro-batches the counts have to
    /// be known before the first loss, which costs a forward pass more.
    #[default]
    Global,
    /// Counts of the step's micro-batches so far, this one included: an approximation of `global` without its extra pass.
    Running,
    /// Counts of this call's tokens.
    Micro,
    /// One loss per sequence, averaged (DeepSeek-V3).
    Sequence,
}

/// `[model.moe.balance]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "GivenBalance")]
pub struct BalanceConfig {
    /// Which loss.
    pub loss: BalanceLoss,
    /// Its coefficient; the model averages over layers.
    pub coefficient: f64,
    /// Where selections are counted.
    pub scope: BalanceScope,
    /// Coefficient of the z-loss, mean squared log-sum-exp of the logits.
    pub z_loss: f64,
    /// Coefficient of the mean entropy of the router's softmax, `-sum p ln p`, which makes it surer (HMoE: 0.03).
    pub entropy: f64,
    /// Step of the loss-free bias update (DeepSeek-V3: 0.001); 0 = no bias.
    pub bias_update: f64,
    /// Moves the coefficient so that `policy = "relu"` keeps k of E gates, instead of `coefficient`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub controller: Option<ReluControl>,
}

impl Default for BalanceConfig {
    fn default() -> Self {
        Self {
            loss: BalanceLoss::Switch,
            coefficient: 0.01,
            scope: BalanceScope::Global,
            z_loss: 0.001,
            entropy: 0.0,
            bias_update: 0.0,
            controller: None,
        }
    }
}

impl BalanceConfig {
    /// Refuses negative or non-finite coefficients.
    pub fn validate(&self) -> Result<(), RoutingError> {
        non_negative("balance.coefficient", self.coefficient)?;
        non_negative("balance.z_loss", self.z_loss)?;
        non_negative("balance.entropy", self.entropy)?;
        non_negative("balance.bias_update", self.bias_update)?;
        let Some(ReluControl { start, alpha }) = self.controller else { return Ok(()) };
        if !(start.is_finite() && start > 0.0) {
            return Err(config_error("balance.controller.start", start, "a finite number > 0"));
        }
        if !(alpha.is_finite() && alpha > 1.0) {
            return Err(config_error("balance.controller.alpha", alpha, "a finite number > 1"));
        }
        Ok(())
    }

    /// Refuses what does not go with `router`.
    pub fn validate_with(&self, router: &RouterConfig) -> Result<(), RoutingError> {
        self.validate()?;
        if self.controller.is_some() && router.policy != Policy::Relu {
            return Err(config_error("balance.controller", "given", "none: it steers policy = \"relu\" only"));
        }
        if self.entropy > 0.0 && !router.activation.is_softmax() {
            return Err(config_error("balance.entropy", self.entropy, "0: only a softmax has an entropy"));
        }
        if self.bias_update > 0.0 && matches!(router.policy, Policy::Hierarchical { .. }) {
            let reason = "0: policy = \"hierarchical\" selects on two levels and has no bias";
            return Err(config_error("balance.bias_update", self.bias_update, reason));
        }
        Ok(())
    }
}
