//! What a router is, as written in a config file under `[model.moe.router]` and `[model.moe.balance]`.
//!
//! Text becomes an enum here, once; unknown keys are refused here. A policy without parameters is a string
//! (`policy = "top_k"`), one with parameters a table (`policy = { group_limited = { groups = 8, keep = 4 } }`).

use crate::error::RoutingError;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

mod balance;

pub use balance::{BalanceConfig, BalanceLoss, BalanceScope};

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

/// How experts are selected from scores. `mixtura route explain --policy NAME` tells each one's rules and sources.
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
    /// DeepSeek-V3: the k largest among the `keep` best of `groups` groups of experts.
    GroupLimited {
        /// Equal groups of consecutive experts.
        groups: usize,
        /// Groups a token may use.
        keep: usize,
    },
    /// Shazeer 2017, appendix B: the `keep` best groups, then the `top_k / keep` best experts inside each; weights are products.
    /// The layer passes one logit per expert and one per group, see [`RouterConfig::logits_per_token`].
    Hierarchical {
        /// Equal groups of consecutive experts.
        groups: usize,
        /// Groups a token uses.
        keep: usize,
    },
    /// GShard: top-2 with a second choice that may be skipped at random in training.
    Gshard {
        /// When the second choice is skipped.
        #[serde(default)]
        second: SecondChoice,
    },
    /// DeepSpeed top-1 with RSample: the largest logit plus Gumbel noise in training, weighted by the clean probability.
    SampledTop1,
    /// DeepSpeed top-2: the second expert is sampled with Gumbel noise in training.
    SampledSecond,
    /// The smallest prefix of the sorted probabilities that reaches `mass` (HMoE); k varies by token.
    TopP {
        /// Between 0 and 1.
        mass: f64,
    },
    /// Every positive logit (ReMoE); k varies by token and may be 0.
    Relu,
    /// Experts take their `T k / E` best tokens: perfectly even, not causal.
    ExpertChoice,
    /// Expert Choice with at most `cap` experts per token, by entropy-regularised assignment.
    ExpertChoiceCapped {
        /// Most experts per token.
        cap: usize,
    },
    /// Shazeer appendix F: expert choice in training, learned thresholds in evaluation; weights renormalised.
    Batchwise,
    /// A fixed table from token ids to experts, passed as `given_tk`; weight 1. Which table: [`RouterConfig::hash_table`].
    Hash,
    /// BASE: exactly T/E tokens per expert, maximising total affinity, in training; greedy in evaluation.
    Base,
    /// Top-k of the balanced transport plan in training, of the scores in evaluation.
    Sinkhorn,
    /// Phi-3.5-MoE: two maxima, each weighted by a softmax over the logits close to it.
    SparseMixer {
        /// Logits further than `2 eps` from the maximum, relatively, do not take part; matters in evaluation too.
        eps: f64,
    },
}

/// The table of a hash layer. Choice j of an id is expert `(table[id] + j) mod E`; ids outside the table go to `id mod E`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum HashTable {
    /// `id mod E`: no table at all, and the skew of the token frequencies.
    #[default]
    Modulo,
    /// Drawn once from the model's seed.
    Random,
    /// By token frequency, heaviest first to the lightest expert; made before training from counts of the training text.
    Balanced,
}

impl Policy {
    /// Whether a token's choices vary in number, whatever k is.
    pub fn is_ragged(&self) -> bool {
        matches!(self, Self::TopP { .. } | Self::Relu)
    }
}

/// When GShard's second choice is skipped; evaluation never skips.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum SecondChoice {
    /// Never.
    #[default]
    All,
    /// The paper: kept with probability `min(1, 2 g2)`; a skipped choice still takes its place in the queue.
    Paper,
    /// Mesh TensorFlow: kept with probability `min(1, g2 / threshold)`; a skipped choice leaves its place.
    Threshold(f64),
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
    /// The table of `policy = "hash"`.
    pub hash_table: HashTable,
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
            hash_table: HashTable::Modulo,
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

    /// How a token of a batch comes to influence an earlier one, with `top_k` choices each; `None` for a causal router. What a
    /// language model trained with a leak has learned to use is missing when it generates.
    ///
    /// ```
    /// use mixtura_routing::{Policy, RouterConfig};
    /// assert_eq!(RouterConfig::default().leak(true, 2), None);
    /// let config = RouterConfig { policy: Policy::ExpertChoice, ..RouterConfig::default() };
    /// assert!(config.leak(true, 2).unwrap().contains("best tokens of the whole batch"));
    /// ```
    pub fn leak(&self, training: bool, top_k: usize) -> Option<&'static str> {
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
        if factor == 0.0 {
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
            return Err(config_error("weight_scale", self.weight_scale, "a finite number other than 0"));
        }
        if self.capacity_multiple == 0 {
            return Err(config_error("capacity_multiple", 0, "at least 1"));
        }
        match self.noise {
            Noise::None => {}
            Noise::Softplus { floor } => non_negative("noise.softplus.floor", floor)?,
            Noise::Normal { scale } => non_negative("noise.normal.scale", scale)?,
            Noise::Jitter { eps } if (0.0..1.0).contains(&eps) => {}
            Noise::Jitter { eps } => return Err(config_error("noise.jitter.eps", eps, "0 <= eps < 1")),
        }
        if self.hash_table != HashTable::Modulo && self.policy != Policy::Hash {
            let name = if self.hash_table == HashTable::Random { "random" } else { "balanced" };
            return Err(config_error("hash_table", name, "\"modulo\": only policy = \"hash\" has a table"));
        }
        self.validate_policy(experts, top_k)
    }

    fn validate_policy(&self, experts: usize, top_k: usize) -> Result<(), RoutingError> {
        let exactly = |name: &'static str, k: usize| match top_k == k {
            true => Ok(()),
            false => Err(config_error("policy", name, &format!("top_k = {k}, found top_k = {top_k}"))),
        };
        match self.policy {
            Policy::Switch => exactly("switch", 1)?,
            Policy::SampledTop1 => exactly("sampled_top1", 1)?,
            Policy::Base => exactly("base", 1)?,
            Policy::Gshard { second } => {
                exactly("gshard", 2)?;
                if let SecondChoice::Threshold(t) = second
                    && !(t > 0.0 && t.is_finite())
                {
                    return Err(config_error("policy.gshard.second.threshold", t, "a finite number > 0"));
                }
            }
            Policy::SampledSecond => exactly("sampled_second", 2)?,
            Policy::SparseMixer { eps } => {
                exactly("sparse_mixer", 2)?;
                non_negative("policy.sparse_mixer.eps", eps)?;
            }
            Policy::TopP { mass } if !(mass > 0.0 && mass <= 1.0) => {
                return Err(config_error("policy.top_p.mass", mass, "0 < mass <= 1"));
            }
            Policy::TopP { .. } if !self.activation.is_softmax() => {
                return Err(config_error("policy", "top_p", "probabilities: activation = \"softmax\""));
            }
            Policy::Relu if self.activation != Activation::Relu => {
                return Err(config_error("policy", "relu", "activation = \"relu\""));
            }
            Policy::GroupLimited { groups, keep } => {
                if groups == 0 || !experts.is_multiple_of(groups) {
                    return Err(RoutingError::Groups { groups, experts });
                }
                if keep == 0 || keep > groups {
                    return Err(config_error(
                        "policy.group_limited.keep",
                        keep,
                        &format!("1 to {groups}, the number of groups"),
                    ));
                }
                if keep * (experts / groups) < top_k {
                    let room =
                        format!("groups that hold top_k = {top_k} experts, found {} experts in each", experts / groups);
                    return Err(config_error("policy.group_limited.keep", keep, &room));
                }
            }
            Policy::Hierarchical { groups, keep } => self.validate_levels(experts, top_k, groups, keep)?,
            Policy::ExpertChoiceCapped { cap } if cap == 0 => {
                return Err(config_error("policy.expert_choice_capped.cap", cap, "at least 1"));
            }
            _ => {}
        }
        if self.policy == Policy::NoisyTopK && top_k == 1 && self.activation == Activation::SoftmaxSelected {
            return Err(config_error(
                "policy",
                "noisy_top_k",
                "top_k >= 2 or policy = \"switch\": the softmax over one expert is always 1 and its gate gets no gradient",
            ));
        }
        Ok(())
    }
}

impl RouterConfig {
    fn validate_levels(&self, experts: usize, top_k: usize, groups: usize, keep: usize) -> Result<(), RoutingError> {
        if groups == 0 || !experts.is_multiple_of(groups) {
            return Err(RoutingError::Groups { groups, experts });
        }
        let per_group = experts / groups;
        if keep == 0 || keep > groups {
            return Err(config_error("policy.hierarchical.keep", keep, &format!("1..={groups}")));
        }
        if !top_k.is_multiple_of(keep) || top_k / keep > per_group {
            let reason =
                format!("a keep of which top_k = {top_k} is 1 to {per_group} times as many, the experts of a group");
            return Err(config_error("policy.hierarchical.keep", keep, &reason));
        }
        if (keep == 1 && groups > 1) || (top_k == keep && per_group > 1) {
            let reason = "at least two groups and two experts in each: a softmax over one choice is always 1 and gets no gradient";
            return Err(config_error("policy.hierarchical.keep", keep, reason));
        }
        if self.activation != Activation::SoftmaxSelected {
            return Err(config_error("policy", "hierarchical", "activation = \"softmax_selected\", on both levels"));
        }
        if self.normalize == Normalize::AfterDrop {
            return Err(config_error(
                "normalize",
                "after_drop",
                "true or false: the weights of policy = \"hierarchical\" are products",
            ));
        }
        Ok(())
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
