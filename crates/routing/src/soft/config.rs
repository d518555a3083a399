//! Which soft layer: `[model.moe.soft]` of a config file, and what each kind sees.

use super::merge::FirstSegment;
use super::soft_moe::Mixing;
use serde::{Deserialize, Serialize};

/// A soft layer: nothing is selected, every expert has a part in every token. `kind` names the variant in a file.
///
/// ```
/// use mixtura_routing::soft::config::SoftConfig;
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
        /// Sequences of a group; the last group of a batch may have fewer. 32 in the paper.
        #[serde(default = "paper_group")]
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
        #[serde(default = "block_length")]
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

fn paper_group() -> usize {
    32
}

/// Short enough that most of a sequence has something to look back to.
fn block_length() -> usize {
    32
}

impl SoftConfig {
    /// The layer of that kind with its published numbers.
    pub fn of(kind: &str) -> Option<Self> {
        Some(match kind {
            "soft_moe" => Self::SoftMoe { slots_per_expert: one(), mixing: Mixing::Soft, allow_future: false },
            "smear" => Self::Smear { allow_future: false },
            "lory" => Self::Lory { segment: lory_segment(), first_segment: FirstSegment::Uniform, allow_future: false },
            "mixture_of_tokens" => {
                Self::MixtureOfTokens { group: paper_group(), temperature: unit(), emit: Emit::Merge }
            }
            "block_causal" => Self::BlockCausal { block: block_length(), slots_per_expert: one() },
            _ => return None,
        })
    }

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

    /// The same, with the leak accepted where there is one: a layer used alone may be an encoder's.
    pub fn with_future(self) -> Self {
        match self {
            Self::SoftMoe { slots_per_expert, mixing, .. } => {
                Self::SoftMoe { slots_per_expert, mixing, allow_future: true }
            }
            Self::Smear { .. } => Self::Smear { allow_future: true },
            Self::Lory { segment, first_segment, .. } => Self::Lory { segment, first_segment, allow_future: true },
            causal => causal,
        }
    }
}
