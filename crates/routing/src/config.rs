//! What a router is, as written in a config file under `[model.moe.router]` and `[model.moe.balance]`.
//!
//! Text becomes an enum here, once; unknown keys are refused here. A policy without parameters is a string
//! (`policy = "top_k"`), one with parameters a table (`policy = { group_limited = { groups = 8, keep = 4 } }`).

use crate::error::RoutingError;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// How a token becomes one score per expert. The parameters live in the model; routing starts from the scores.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Scorer {
    /// `x W`, no bias.
    #[default]
    Linear,
}

/// What turns logits into probabilities or gates.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Activation {
    /// Softmax over all experts, before selection (Switch, OLMoE, DeepSeekMoE; Mixtral with `normalize = true`).
    #[default]
    Softmax,
    /// Softmax over the selected logits only (Shazeer, Mixtral's own order, GPT-OSS). Its rows sum to 1 by construction.
    SoftmaxSelected,
    /// `1 / (1 + e^-z)` per expert (DeepSeek-V3).
    Sigmoid,
}

/// When a token's weights are divided by their sum. In a file: `false`, `true` (before dropping) or `"after_drop"`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Normalize {
    /// Raw activations: rows sum to at most 1 (softmax).
    Never,
    /// By the sum over all selected experts, dropped ones included.
    #[default]
    BeforeDrop,
    /// By the sum over the experts that kept the token: a single survivor has weight 1 and no gradient.
    AfterDrop,
}

/// Noise in training; evaluation has none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Noise {
    /// None.
    #[default]
    None,
    /// Shazeer 2017: logits plus a normal times `softplus(x W_noise) + floor`; the layer passes `x W_noise` as `raw_noise_te`.
    Softplus {
        /// Added to the standard deviation: 0 in the paper, 0.01 in tensor2tensor.
        #[serde(default)]
        floor: f64,
    },
    /// V-MoE: logits plus a normal of standard deviation `scale / E`.
    Normal {
        /// 1 in V-MoE.
        scale: f64,
    },
    /// Switch: the router's input times a uniform on [1 - eps, 1 + eps]; applied by the layer with [`crate::route::input_jitter`].
    Jitter {
        /// 0.01 in the paper.
        eps: f64,
    },
}

/// How experts are selected from scores.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Policy {
    /// The k largest scores of each token; ties to the lower expert.
    #[default]
    TopK,
    /// Switch: the single largest, weighted by its raw probability.
    Switch,
    /// Shazeer 2017: the k largest noisy scores, softmax over them.
    NoisyTopK,
}

/// Who gets a slot first when an expert is full.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DropOrder {
    /// Pairs in order (token, choice): a later token never evicts an earlier one, so decoders stay causal.
    #[default]
    TokenMajor,
    /// All first choices, then all second choices (GShard, DeepSpeed, Tutel): not causal when k > 1.
    ChoiceMajor,
}

/// `[model.moe.router]`. The number of experts and k are the layer's, see [`crate::RouteShape`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterConfig {
    /// From token to logits.
    pub scorer: Scorer,
    /// From logits to probabilities.
    pub activation: Activation,
    /// From probabilities to choices.
    pub policy: Policy,
    /// Whether weights are divided by their sum.
    pub normalize: Normalize,
    /// Multiplies every weight (DeepSeek-V3: 2.5).
    pub weight_scale: f64,
    /// Noise in training.
    pub noise: Noise,
    /// Slots per expert relative to an even share, in training; 0 = no limit, no drops.
    pub capacity_factor: f64,
    /// The same in evaluation; 0 = no limit, which is this project's rule.
    pub eval_capacity_factor: f64,
    /// Smallest capacity.
    pub capacity_min: usize,
    /// Capacity is rounded up to a multiple of this.
    pub capacity_multiple: usize,
    /// Who gets a slot first.
    pub drop_order: DropOrder,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            scorer: Scorer::Linear,
            activation: Activation::Softmax,
            policy: Policy::TopK,
            normalize: Normalize::BeforeDrop,
            weight_scale: 1.0,
            noise: Noise::None,
            capacity_factor: 0.0,
            eval_capacity_factor: 0.0,
            capacity_min: 4,
            capacity_multiple: 1,
            drop_order: DropOrder::TokenMajor,
        }
    }
}

impl RouterConfig {
    /// Switch top-1 with raw probabilities and dropless.
    pub fn switch() -> Self {
        Self { policy: Policy::Switch, normalize: Normalize::Never, ..Self::default() }
    }

    /// Shazeer's noisy top-k: softmax over the selected noisy logits, noise floor 0.
    pub fn noisy_top_k() -> Self {
        Self {
            policy: Policy::NoisyTopK,
            activation: Activation::SoftmaxSelected,
            noise: Noise::Softplus { floor: 0.0 },
            ..Self::default()
        }
    }

    /// Refuses what cannot be routed with `experts` experts and `top_k` choices.
    pub fn validate(&self, experts: usize, top_k: usize) -> Result<(), RoutingError> {
        if experts == 0 {
            return Err(RoutingError::NoExperts);
        }
        if top_k == 0 || top_k > experts {
            return Err(RoutingError::TopK { top_k, experts });
        }
        non_negative("capacity_factor", self.capacity_factor)?;
        non_negative("eval_capacity_factor", self.eval_capacity_factor)?;
        if !(self.weight_scale.is_finite() && self.weight_scale != 0.0) {
            return Err(config_error("weight_scale", self.weight_scale, "expected a finite number other than 0"));
        }
        if self.capacity_multiple == 0 {
            return Err(config_error("capacity_multiple", 0, "expected at least 1"));
        }
        match self.noise {
            Noise::None => {}
            Noise::Softplus { floor } => non_negative("noise.softplus.floor", floor)?,
            Noise::Normal { scale } => non_negative("noise.normal.scale", scale)?,
            Noise::Jitter { eps } if (0.0..1.0).contains(&eps) => {}
            Noise::Jitter { eps } => return Err(config_error("noise.jitter.eps", eps, "expected 0 <= eps < 1")),
        }
        if self.policy == Policy::Switch && top_k != 1 {
            return Err(config_error("policy", "switch", &format!("switch is top-1, but top_k = {top_k}")));
        }
        if self.policy == Policy::NoisyTopK && top_k == 1 && self.activation == Activation::SoftmaxSelected {
            return Err(config_error(
                "policy",
                "noisy_top_k",
                "with top_k = 1 the softmax over one expert is always 1 and the gate gets no gradient: use k >= 2 or policy = \"switch\"",
            ));
        }
        Ok(())
    }
}

/// Which balance loss; every one is k-normalised, 1 at perfect balance (0 for the CV forms).
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
}

/// Over which tokens selection fractions are counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BalanceScope {
    /// Counts of the whole optimizer step, over micro-batches and ranks, where the caller has them.
    #[default]
    Global,
    /// Counts of this call's tokens.
    Micro,
    /// One loss per sequence, averaged (DeepSeek-V3).
    Sequence,
}

/// `[model.moe.balance]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BalanceConfig {
    /// Which loss.
    pub loss: BalanceLoss,
    /// Its coefficient; the model averages over layers.
    pub coefficient: f64,
    /// Where selections are counted.
    pub scope: BalanceScope,
    /// Coefficient of the z-loss, mean squared log-sum-exp of the logits.
    pub z_loss: f64,
    /// Step of the loss-free bias update (DeepSeek-V3: 0.001); 0 = no bias.
    pub bias_update: f64,
}

impl Default for BalanceConfig {
    fn default() -> Self {
        Self {
            loss: BalanceLoss::Switch,
            coefficient: 0.01,
            scope: BalanceScope::Global,
            z_loss: 0.001,
            bias_update: 0.0,
        }
    }
}

impl BalanceConfig {
    /// Refuses negative or non-finite coefficients.
    pub fn validate(&self) -> Result<(), RoutingError> {
        non_negative("balance.coefficient", self.coefficient)?;
        non_negative("balance.z_loss", self.z_loss)?;
        non_negative("balance.bias_update", self.bias_update)
    }
}

fn non_negative(key: &'static str, value: f64) -> Result<(), RoutingError> {
    if value.is_finite() && value >= 0.0 {
        Ok(())
    } else {
        Err(config_error(key, value, "expected a finite number >= 0"))
    }
}

fn config_error(key: &'static str, value: impl ToString, reason: &str) -> RoutingError {
    RoutingError::Config { key, value: value.to_string(), reason: reason.to_string() }
}

impl Serialize for Normalize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Never => serializer.serialize_bool(false),
            Self::BeforeDrop => serializer.serialize_bool(true),
            Self::AfterDrop => serializer.serialize_str("after_drop"),
        }
    }
}

impl<'de> Deserialize<'de> for Normalize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Normalize;
            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("true, false, \"never\", \"before_drop\" or \"after_drop\"")
            }
            fn visit_bool<E: de::Error>(self, value: bool) -> Result<Normalize, E> {
                Ok(if value { Normalize::BeforeDrop } else { Normalize::Never })
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Normalize, E> {
                match value {
                    "never" => Ok(Normalize::Never),
                    "before_drop" => Ok(Normalize::BeforeDrop),
                    "after_drop" => Ok(Normalize::AfterDrop),
                    _ => Err(E::unknown_variant(value, &["never", "before_drop", "after_drop"])),
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}
