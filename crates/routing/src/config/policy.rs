//! Which rule selects experts: `policy = "switch"`, or with numbers of one's own `policy = { top_p = { mass = 0.8 } }`.
//!
//! Numbers that a file leaves out are those of the policy's paper, so that a name alone is a policy.

use super::by_name::{Named, name_or_table};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Every published system that is more than a policy, in the order of the manual.
pub const SYSTEMS: [&str; 16] = [
    "st_moe",
    "mixtral",
    "olmoe",
    "deepseek_moe",
    "v_moe",
    "tutel",
    "rts",
    "sats",
    "moe_plus_plus",
    "hmoe",
    "residual_moe",
    "soft_moe",
    "smear",
    "lory",
    "mixture_of_tokens",
    "block_causal_soft",
];

/// How experts are selected from scores. `mixtura route explain --policy NAME` tells each one's rules and sources.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "snake_case", deny_unknown_fields)]
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
        /// Equal groups of consecutive experts; 8 in DeepSeek-V3.
        #[serde(default = "number::<8>")]
        groups: usize,
        /// Groups a token may use; 4 in DeepSeek-V3.
        #[serde(default = "number::<4>")]
        keep: usize,
    },
    /// Shazeer 2017, appendix B: the `keep` best groups, then the `top_k / keep` best experts inside each; weights are products.
    /// The layer passes one logit per expert and one per group, see [`RouterConfig::logits_per_token`](super::RouterConfig::logits_per_token).
    Hierarchical {
        /// Equal groups of consecutive experts; 16 in the paper.
        #[serde(default = "number::<16>")]
        groups: usize,
        /// Groups a token uses; 2 in the paper.
        #[serde(default = "number::<2>")]
        keep: usize,
    },
    /// GShard: top-2 with a second choice that may be skipped at random in training.
    Gshard {
        /// When the second choice is skipped; `"paper"` when left out.
        #[serde(default = "of_the_paper")]
        second: SecondChoice,
    },
    /// DeepSpeed top-1 with RSample: the largest logit plus Gumbel noise in training, weighted by the clean probability.
    SampledTop1,
    /// DeepSpeed top-2: the second expert is sampled with Gumbel noise in training.
    SampledSecond,
    /// The smallest prefix of the sorted probabilities that reaches `mass` (HMoE); k varies by token.
    TopP {
        /// Between 0 and 1; 0.6 in HMoE.
        #[serde(default = "hmoe_mass")]
        mass: f64,
    },
    /// Every positive logit (ReMoE); k varies by token and may be 0.
    Relu,
    /// Experts take their `T k / E` best tokens: perfectly even, not causal.
    ExpertChoice,
    /// Expert Choice with at most `cap` experts per token, by entropy-regularised assignment.
    ExpertChoiceCapped {
        /// Most experts per token; 2 in the paper, which also tries 3.
        #[serde(default = "number::<2>")]
        cap: usize,
    },
    /// Shazeer appendix F: expert choice in training, learned thresholds in evaluation; weights renormalised.
    Batchwise,
    /// A fixed table from token ids to experts, passed as `given_tk`; weight 1. Which table: [`RouterConfig::hash_table`](super::RouterConfig::hash_table).
    Hash,
    /// BASE: exactly T/E tokens per expert, maximising total affinity, in training; greedy in evaluation.
    Base,
    /// Top-k of the balanced transport plan in training, of the scores in evaluation.
    Sinkhorn,
    /// Phi-3.5-MoE: two maxima, each weighted by a softmax over the logits close to it.
    SparseMixer {
        /// Logits further than `2 eps` from the maximum, relatively, do not take part; matters in evaluation too. 0.01 in
        /// Phi-3.5-MoE.
        #[serde(default = "phi_eps")]
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

/// Of Mesh TensorFlow and ST-MoE.
pub(crate) const MESH_THRESHOLD: f64 = 0.2;

fn number<const N: usize>() -> usize {
    N
}

fn of_the_paper() -> SecondChoice {
    SecondChoice::Paper
}

fn hmoe_mass() -> f64 {
    0.6
}

fn phi_eps() -> f64 {
    0.01
}

impl Named for Policy {
    const NAMES: &'static [&'static str] = &[
        "top_k",
        "switch",
        "noisy_top_k",
        "group_limited",
        "hierarchical",
        "gshard",
        "sampled_top1",
        "sampled_second",
        "top_p",
        "relu",
        "expert_choice",
        "expert_choice_capped",
        "batchwise",
        "hash",
        "base",
        "sinkhorn",
        "sparse_mixer",
    ];

    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "top_k" => Self::TopK,
            "switch" => Self::Switch,
            "noisy_top_k" => Self::NoisyTopK,
            "group_limited" => Self::GroupLimited { groups: number::<8>(), keep: number::<4>() },
            "hierarchical" => Self::Hierarchical { groups: number::<16>(), keep: number::<2>() },
            "gshard" => Self::Gshard { second: of_the_paper() },
            "sampled_top1" => Self::SampledTop1,
            "sampled_second" => Self::SampledSecond,
            "top_p" => Self::TopP { mass: hmoe_mass() },
            "relu" => Self::Relu,
            "expert_choice" => Self::ExpertChoice,
            "expert_choice_capped" => Self::ExpertChoiceCapped { cap: number::<2>() },
            "batchwise" => Self::Batchwise,
            "hash" => Self::Hash,
            "base" => Self::Base,
            "sinkhorn" => Self::Sinkhorn,
            "sparse_mixer" => Self::SparseMixer { eps: phi_eps() },
            _ => return None,
        })
    }

    fn from_table<'de, D: Deserializer<'de>>(table: D) -> Result<Self, D::Error> {
        Self::deserialize(table)
    }

    fn unknown<E: de::Error>(name: &str) -> E {
        match SYSTEMS.contains(&name) {
            false => E::unknown_variant(name, Self::NAMES),
            true => E::custom(format!(
                "`{name}` is a system rather than a policy: write recipe = \"{name}\" in [model.moe] instead"
            )),
        }
    }
}

impl Policy {
    /// Every name.
    pub const NAMES: &'static [&'static str] = <Self as Named>::NAMES;

    /// The policy called `name` in a file, with its paper's numbers.
    ///
    /// ```
    /// use mixtura_routing::Policy;
    /// assert_eq!(Policy::named("top_p"), Some(Policy::TopP { mass: 0.6 }));
    /// assert_eq!(Policy::named("mixtral"), None, "a system: see Recipe::named");
    /// ```
    pub fn named(name: &str) -> Option<Self> {
        <Self as Named>::named(name)
    }

    /// What a file calls it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::TopK => "top_k",
            Self::Switch => "switch",
            Self::NoisyTopK => "noisy_top_k",
            Self::GroupLimited { .. } => "group_limited",
            Self::Hierarchical { .. } => "hierarchical",
            Self::Gshard { .. } => "gshard",
            Self::SampledTop1 => "sampled_top1",
            Self::SampledSecond => "sampled_second",
            Self::TopP { .. } => "top_p",
            Self::Relu => "relu",
            Self::ExpertChoice => "expert_choice",
            Self::ExpertChoiceCapped { .. } => "expert_choice_capped",
            Self::Batchwise => "batchwise",
            Self::Hash => "hash",
            Self::Base => "base",
            Self::Sinkhorn => "sinkhorn",
            Self::SparseMixer { .. } => "sparse_mixer",
        }
    }

    /// The most experts that one token can get of `experts`, with `top_k` choices where the policy counts them by token.
    pub fn most_per_token(&self, experts: usize, top_k: usize) -> usize {
        match *self {
            // Some probability is at least 1/E.
            Self::TopP { mass } if mass * experts as f64 <= 1.0 => 1,
            Self::ExpertChoiceCapped { cap } => cap.min(experts),
            _ if self.counts_by_token() => top_k,
            _ => experts,
        }
    }

    /// Whether every token has exactly k choices.
    pub(crate) fn counts_by_token(&self) -> bool {
        let by_expert = matches!(self, Self::ExpertChoice | Self::ExpertChoiceCapped { .. } | Self::Batchwise);
        !by_expert && !self.is_ragged()
    }

    /// Whether a token's choices vary in number, whatever k is.
    pub fn is_ragged(&self) -> bool {
        matches!(self, Self::TopP { .. } | Self::Relu)
    }
}

/// When GShard's second choice is skipped; evaluation never skips.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum SecondChoice {
    /// Never.
    #[default]
    All,
    /// The paper: kept with probability `min(1, 2 g2)`; a skipped choice still takes its place in the queue.
    Paper,
    /// Mesh TensorFlow: kept with probability `min(1, g2 / threshold)`; a skipped choice leaves its place. 0.2 there.
    Threshold(f64),
}

impl Serialize for Policy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for Policy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        name_or_table(deserializer)
    }
}

impl Named for SecondChoice {
    const NAMES: &'static [&'static str] = &["all", "paper", "threshold"];

    fn named(name: &str) -> Option<Self> {
        match name {
            "all" => Some(Self::All),
            "paper" => Some(Self::Paper),
            "threshold" => Some(Self::Threshold(MESH_THRESHOLD)),
            _ => None,
        }
    }

    fn from_table<'de, D: Deserializer<'de>>(table: D) -> Result<Self, D::Error> {
        Self::deserialize(table)
    }
}

impl Serialize for SecondChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for SecondChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        name_or_table(deserializer)
    }
}
