//! `[model.moe.soft]`: which soft layer takes the place of sparse experts, and whether a language model may use it.

use mixtura_routing::soft::merge::FirstSegment;
use mixtura_routing::soft::soft_moe::Mixing;
use serde::{Deserialize, Serialize};

use crate::config::FfnActivation;
use crate::error::ConfigError;

/// A soft layer: nothing is selected, every expert has a part in every token. `kind` names the variant in a file.
///
/// ```
/// use mixtura_nn::SoftConfig;
/// let text = "kind = \"lory\"\nsegment = 64";
/// let Ok(SoftConfig::Lory { segment: 64, .. }) = toml::from_str(text) else { panic!("{text}") };
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum SoftConfig {
    /// Soft MoE: slots mix the tokens of the whole sequence. Not causal.
    SoftMoe {
        /// Slots of each expert.
        #[serde(default = "one")]
        slots_per_expert: usize,
        /// Which of the two mixtures is learned.
        #[serde(default)]
        mixing: Mixing,
        /// Accepts that tokens see later ones.
        #[serde(default)]
        allow_future: bool,
    },
    /// SMEAR: one expert merged for the whole sequence by its mean. Not causal.
    Smear {
        /// Accepts that tokens see later ones.
        #[serde(default)]
        allow_future: bool,
    },
    /// Lory: one expert merged for each segment, by the mean of the segment before. Causal with a uniform first segment.
    Lory {
        /// Tokens of a segment.
        #[serde(default = "lory_segment")]
        segment: usize,
        /// What the first segment is merged with.
        #[serde(default)]
        first_segment: FirstSegment,
        /// Accepts that tokens of the first segment see later ones of it.
        #[serde(default)]
        allow_future: bool,
    },
    /// Mixture of Tokens: each expert computes one mixture of the tokens at the same position of `group` sequences. Causal,
    /// but a sequence's output depends on the sequences it is batched with.
    MixtureOfTokens {
        /// Sequences of a group; the last group of a batch may have fewer.
        group: usize,
        /// Divides the logits.
        #[serde(default = "unit")]
        temperature: f64,
        /// How answers are handed back.
        #[serde(default)]
        emit: Emit,
    },
    /// Block-causal Soft MoE: the slots of a block mix all tokens of earlier blocks. Causal; needs shared experts, since the
    /// first block has nothing to look back to.
    BlockCausal {
        /// Tokens of a block.
        block: usize,
        /// Slots of each expert.
        #[serde(default = "one")]
        slots_per_expert: usize,
    },
}

/// The weights with which Mixture of Tokens hands an expert's answer back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Emit {
    /// Those of the mixture: they sum to 1 over the group's tokens.
    #[default]
    Merge,
    /// The softmax of the same logits over experts: they sum to 1 for each token.
    Experts,
}

fn one() -> usize {
    1
}

fn unit() -> f64 {
    1.0
}

/// The paper's segment.
fn lory_segment() -> usize {
    256
}

impl SoftConfig {
    /// The name in a file.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::SoftMoe { .. } => "soft_moe",
            Self::Smear { .. } => "smear",
            Self::Lory { .. } => "lory",
            Self::MixtureOfTokens { .. } => "mixture_of_tokens",
            Self::BlockCausal { .. } => "block_causal",
        }
    }

    /// How a token comes to see later ones of its sequence; `None` for a causal layer.
    pub fn leak(&self) -> Option<&'static str> {
        match self {
            Self::SoftMoe { .. } => Some("every slot mixes all tokens of the sequence, later ones included"),
            Self::Smear { .. } => Some("the expert is merged by the mean of the whole sequence, later tokens included"),
            Self::Lory { first_segment: FirstSegment::OwnMean, .. } => Some(
                "the first segment is merged by its own mean: stopping the gradient hides the slope, not the value, of its \
                 later tokens",
            ),
            Self::Lory { .. } | Self::MixtureOfTokens { .. } | Self::BlockCausal { .. } => None,
        }
    }

    /// Multiply-adds of the forward pass for one token, experts, mixing and merging together: width `d`, `experts` experts of
    /// `one` multiply-adds each, sequences of `sequence` tokens.
    pub fn multiply_adds_per_token(&self, d: usize, experts: usize, one: f64, sequence: usize) -> f64 {
        let scores = (d * experts) as f64;
        let merged = |tokens: usize| d as f64 + one + (scores + experts as f64 * one) / tokens.max(1) as f64;
        // Logits, mixing and handing back cost the same; the experts run once per slot, not once per token.
        let slots = |per_expert: usize, tokens: usize| {
            per_expert as f64 * (3.0 * scores + experts as f64 * one / tokens.max(1) as f64)
        };
        match *self {
            Self::SoftMoe { slots_per_expert, .. } => slots(slots_per_expert, sequence),
            Self::Smear { .. } => merged(sequence),
            Self::Lory { segment, .. } => merged(segment.min(sequence)),
            Self::MixtureOfTokens { group, .. } => slots(1, group),
            Self::BlockCausal { block, slots_per_expert } => slots(slots_per_expert, block),
        }
    }

    /// Whether it can be part of a decoder whose MoE layers have shared networks of width `d_shared` (0 for none).
    pub(crate) fn validate(&self, shared: bool) -> Result<(), ConfigError> {
        let positive = |key: &str, value: usize| match value {
            0 => Err(ConfigError::new(format!("moe.soft.{key}"), 0, "at least 1")),
            _ => Ok(()),
        };
        let allowed = match *self {
            Self::SoftMoe { slots_per_expert, allow_future, .. } => {
                positive("slots_per_expert", slots_per_expert)?;
                allow_future
            }
            Self::Smear { allow_future } => allow_future,
            Self::Lory { segment, allow_future, .. } => {
                positive("segment", segment)?;
                allow_future
            }
            Self::MixtureOfTokens { group, temperature, .. } => {
                positive("group", group)?;
                if !(temperature.is_finite() && temperature > 0.0) {
                    return Err(ConfigError::new("moe.soft.temperature", temperature, "a positive number"));
                }
                false
            }
            Self::BlockCausal { block, slots_per_expert } => {
                positive("block", block)?;
                positive("slots_per_expert", slots_per_expert)?;
                if !shared {
                    let expected = "at least 1 with moe.soft.kind = \"block_causal\", whose first block gets nothing from the \
                                    slots";
                    return Err(ConfigError::new("moe.shared_experts", 0, expected));
                }
                false
            }
        };
        match self.leak() {
            Some(leak) if !allowed => Err(ConfigError::new("moe.soft.kind", self.kind(), refusal(leak))),
            _ => Ok(()),
        }
    }
}

fn refusal(leak: &str) -> String {
    format!(
        "a causal layer, since a language model is trained to predict the tokens that this one would see: {leak}, so the \
         training loss would be too good and generation, which has no later tokens, would compute something else. Causal kinds \
         are \"block_causal\", \"lory\" with first_segment = \"uniform\", and \"mixture_of_tokens\". For research, \
         moe.soft.allow_future = true accepts the leak; such a model cannot generate"
    )
}

/// What a soft layer is made of, for use outside a [`Decoder`](crate::Decoder).
#[derive(Debug, Clone, PartialEq)]
pub struct SoftLayerConfig {
    /// Width D of the tokens.
    pub d_model: usize,
    /// Experts E.
    pub experts: usize,
    /// Hidden width F of an expert.
    pub d_expert: usize,
    /// Hidden width of the network that every token visits besides; 0 for none.
    pub d_shared: usize,
    /// Multiplies that network's output by sigmoid(w x).
    pub shared_gate: bool,
    /// Activation of the networks.
    pub activation: FfnActivation,
    /// Which soft layer.
    pub soft: SoftConfig,
    /// Standard deviation of the initial weights.
    pub init_std: f64,
    /// Standard deviation of the projections back to the model's width.
    pub out_init_std: f64,
}

impl SoftLayerConfig {
    /// SwiGLU experts, no shared network. Causality is the caller's business: any kind is accepted.
    pub fn new(d_model: usize, experts: usize, d_expert: usize, soft: SoftConfig) -> Self {
        Self {
            d_model,
            experts,
            d_expert,
            d_shared: 0,
            shared_gate: false,
            activation: FfnActivation::Swiglu,
            soft,
            init_std: 0.02,
            out_init_std: 0.02,
        }
    }
    /// How many numbers the layer holds; a token uses them all.
    pub(crate) fn parameters(&self) -> usize {
        let into = if self.activation.kernel().is_gated() { 3 } else { 2 };
        let network = |d_hidden: usize| into * self.d_model * d_hidden;
        let mixing = match self.soft {
            // phi and scale.
            SoftConfig::SoftMoe { slots_per_expert, .. } | SoftConfig::BlockCausal { slots_per_expert, .. } => {
                self.d_model * self.experts * slots_per_expert + 1
            }
            SoftConfig::Smear { .. } | SoftConfig::Lory { .. } | SoftConfig::MixtureOfTokens { .. } => {
                self.d_model * self.experts
            }
        };
        let gate = if self.shared_gate && self.d_shared > 0 { self.d_model } else { 0 };
        mixing + gate + network(self.d_shared) + self.experts * network(self.d_expert)
    }
}
