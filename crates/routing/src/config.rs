//! What a router is, as written in a config file under `[model.moe.router]` and `[model.moe.balance]`.
//!
//! Text becomes an enum here, once; unknown keys are refused here. A policy is a name (`policy = "top_p"`), or a table where its
//! numbers are not the paper's (`policy = { top_p = { mass = 0.8 } }`). Keys that are left out take the value of the policy's
//! recipe, see [`RouterConfig::of`]; [`GivenRouter`] is what was written, [`RouterConfig`] what it means.

use crate::error::RoutingError;
use by_name::{Named, name_or_table};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

mod by_name;
mod policy;
mod given;
mod checks;
mod balance;
mod zero_computation;

pub use balance::{BalanceConfig, BalanceLoss, BalanceScope, ReluControl};
pub use given::{GivenBalance, GivenRouter};
pub(crate) use policy::MESH_THRESHOLD;
pub use policy::{HashTable, Policy, SYSTEMS, SecondChoice};
pub use zero_computation::{ZeroComputation, ZeroCost};

/// How a token becomes one score per expert. The parameters live in the model; routing starts from the scores.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Scorer {
    /// `x W`, no bias.
    #[default]
    Linear,
    /// `cos(x W, e_i) / tau` with a learned temperature (X-MoE).
    Cosine,
    /// `act(x W1) W2`, hidden width 8 E (MoE++).
    Mlp,
    /// Membership from distances to prototypes (fuzzy c-means), as log-memberships.
    Fuzzy,
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
    /// `sqrt(ln(1 + e^z))` per expert.
    SqrtSoftplus,
    /// `max(z, 0)` per expert (ReMoE): the gate is the weight, and 0 means not selected.
    Relu,
}

impl Activation {
    /// A distribution over all experts; the others score each expert on its own.
    pub fn is_softmax(self) -> bool {
        matches!(self, Self::Softmax | Self::SoftmaxSelected)
    }

    /// What a file calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Softmax => "softmax",
            Self::SoftmaxSelected => "softmax_selected",
            Self::Sigmoid => "sigmoid",
            Self::SqrtSoftplus => "sqrt_softplus",
            Self::Relu => "relu",
        }
    }
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
#[serde(remote = "Self", rename_all = "snake_case", deny_unknown_fields)]
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
        #[serde(default = "v_moe_scale")]
        scale: f64,
    },
    /// Switch: the router's input times a uniform on [1 - eps, 1 + eps]; applied by the layer with [`crate::route::input_jitter`].
    Jitter {
        /// 0.01 in the paper.
        #[serde(default = "switch_eps")]
        eps: f64,
    },
}

impl Noise {
    /// What a file calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Softplus { .. } => "softplus",
            Self::Normal { .. } => "normal",
            Self::Jitter { .. } => "jitter",
        }
    }
}

fn v_moe_scale() -> f64 {
    1.0
}

fn switch_eps() -> f64 {
    0.01
}

impl Named for Noise {
    const NAMES: &'static [&'static str] = &["none", "softplus", "normal", "jitter"];

    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "none" => Self::None,
            "softplus" => Self::Softplus { floor: 0.0 },
            "normal" => Self::Normal { scale: v_moe_scale() },
            "jitter" => Self::Jitter { eps: switch_eps() },
            _ => return None,
        })
    }

    fn from_table<'de, D: Deserializer<'de>>(table: D) -> Result<Self, D::Error> {
        Self::deserialize(table)
    }
}

impl Serialize for Noise {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for Noise {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        name_or_table(deserializer)
    }
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
    /// Random token selection (DeepSpeed): a full expert keeps random tokens; in evaluation, position order.
    Random,
    /// A full expert keeps its highest scores (DeepSpeed top-k "probs").
    Score,
    /// Batch priority (V-MoE): tokens by their largest weight, then choice-major.
    BatchPriority,
    /// Batch priority by the sum of a token's weights.
    BatchPrioritySum,
    /// Similarity-aware (SATS-D): a full expert keeps confident tokens unlike those already kept; needs the tokens.
    Similarity,
    /// SATS-R: what `similarity` drops is offered to the token's next experts with room.
    SimilarityRedirect,
}

/// `[model.moe.router]`. The number of experts and k are the layer's, see [`crate::RouteShape`].
///
/// Read by itself, keys that are left out are those of the named policy with at least two choices; a layer's table, which knows
/// k, reads a [`GivenRouter`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "GivenRouter")]
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
    /// The table of `policy = "hash"`.
    pub hash_table: HashTable,
}

impl Default for RouterConfig {
    /// Top-k with k of at least 2: softmax, weights divided by their sum, dropless.
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
            hash_table: HashTable::Modulo,
        }
    }
}

impl RouterConfig {
    /// The recipe of `policy` for `top_k` choices: the paper's rules, which are what a config file means that names the policy
    /// and leaves the other keys out.
    ///
    /// A single choice divided by its sum is 1 whatever the logits are, so its router would learn nothing from the task. With
    /// `top_k = 1` weights are therefore raw.
    ///
    /// ```
    /// use mixtura_routing::{Normalize, Policy, RouterConfig};
    /// assert_eq!(RouterConfig::of(Policy::Switch, 1).normalize, Normalize::Never);
    /// assert_eq!(RouterConfig::of(Policy::TopK, 1).normalize, Normalize::Never);
    /// assert_eq!(RouterConfig::of(Policy::TopK, 2), RouterConfig::default());
    /// ```
    pub fn of(policy: Policy, top_k: usize) -> Self {
        let base = Self { policy: policy.clone(), ..Self::default() };
        let raw = Self { normalize: Normalize::Never, ..base.clone() };
        let capacity = |config: Self, drop_order| Self { capacity_factor: 1.25, drop_order, ..config };
        let recipe = match policy {
            Policy::TopK | Policy::TopP { .. } | Policy::Batchwise | Policy::Hash | Policy::SparseMixer { .. } => base,
            Policy::Switch | Policy::ExpertChoice | Policy::ExpertChoiceCapped { .. } => raw,
            Policy::NoisyTopK | Policy::Hierarchical { .. } => {
                Self { activation: Activation::SoftmaxSelected, noise: Noise::Softplus { floor: 0.0 }, ..base }
            }
            Policy::GroupLimited { .. } => Self { activation: Activation::Sigmoid, weight_scale: 2.5, ..base },
            Policy::Gshard { .. } => capacity(base, DropOrder::ChoiceMajor),
            Policy::SampledTop1 => capacity(raw, DropOrder::Random),
            Policy::SampledSecond => Self { normalize: Normalize::AfterDrop, ..capacity(base, DropOrder::ChoiceMajor) },
            Policy::Relu => Self { activation: Activation::Relu, ..raw },
            Policy::Base | Policy::Sinkhorn => Self { activation: Activation::Sigmoid, ..raw },
        };
        recipe.for_choices(top_k)
    }

    /// This recipe for `top_k` choices: with one, the weights that it would divide by their sum are raw.
    pub fn for_choices(self, top_k: usize) -> Self {
        let gated = self.policy.counts_by_token() && self.policy != Policy::Hash;
        match top_k == 1 && gated && self.activation != Activation::SoftmaxSelected {
            true => Self { normalize: Normalize::Never, ..self },
            false => self,
        }
    }

    /// Switch: [`of`](Self::of) `Policy::Switch`.
    pub fn switch() -> Self {
        Self::of(Policy::Switch, 1)
    }

    /// Shazeer's noisy top-k: [`of`](Self::of) `Policy::NoisyTopK`.
    pub fn noisy_top_k() -> Self {
        Self::of(Policy::NoisyTopK, 2)
    }

    /// How a token of a batch comes to influence an earlier one, with `top_k` choices each; `None` for a causal router. What a
    /// language model trained with a leak has learned to use is missing when it generates. `zero` are the layer's experts
    /// without a network, which have a capacity of their own in training.
    ///
    /// ```
    /// use mixtura_routing::{Policy, RouterConfig};
    /// assert_eq!(RouterConfig::default().leak(true, 2, None), None);
    /// let config = RouterConfig::of(Policy::ExpertChoice, 2);
    /// assert!(config.leak(true, 2, None).unwrap().contains("best tokens of the whole batch"));
    /// ```
    pub fn leak(&self, training: bool, top_k: usize, zero: Option<&ZeroComputation>) -> Option<&'static str> {
        match self.policy {
            Policy::ExpertChoice | Policy::ExpertChoiceCapped { .. } => {
                return Some(
                    "experts take the best tokens of the whole batch, so whether a token is taken depends on later ones",
                );
            }
            Policy::Batchwise if training => {
                return Some("in training experts take the best tokens of the whole batch");
            }
            Policy::Base | Policy::Sinkhorn if training => {
                return Some("in training tokens are assigned all at once, so a token's expert depends on later ones");
            }
            _ => {}
        }
        let factor = if training { self.capacity_factor } else { self.eval_capacity_factor };
        let gamma = zero.filter(|_| training).map_or(0.0, |zero| zero.gamma);
        if factor == 0.0 && gamma == 0.0 {
            return None;
        }
        let ragged = self.policy.is_ragged() || self.policy == Policy::Batchwise;
        match self.drop_order {
            _ if matches!(self.policy, Policy::Gshard { .. }) => {
                Some("with a capacity, first choices of later tokens take the slots of earlier tokens' second choices")
            }
            DropOrder::TokenMajor => None,
            DropOrder::ChoiceMajor if top_k == 1 && !ragged => None,
            DropOrder::ChoiceMajor => Some(
                "drop_order = \"choice_major\": later tokens' first choices take the slots of earlier tokens' second ones",
            ),
            DropOrder::Random if !training => None,
            DropOrder::Random
            | DropOrder::Score
            | DropOrder::BatchPriority
            | DropOrder::BatchPrioritySum
            | DropOrder::Similarity
            | DropOrder::SimilarityRedirect => Some(
                "at a full expert a later token may take the slot of an earlier one: drop_order = \"token_major\" would not",
            ),
        }
    }

    /// Logits that the scorer must give for a token: E, with two levels E for the experts and then one for each group.
    pub fn logits_per_token(&self, experts: usize) -> usize {
        match self.policy {
            Policy::Hierarchical { groups, .. } => experts + groups,
            _ => experts,
        }
    }
}

fn non_negative(key: &'static str, value: f64) -> Result<(), RoutingError> {
    if value.is_finite() && value >= 0.0 { Ok(()) } else { Err(config_error(key, value, "a finite number >= 0")) }
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
