//! The layouts in which a model can lie on the disk.

use std::fmt;

/// A family of checkpoints: names and shapes of tensors, and the keys of `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// OLMoE: softmax over all experts, QK-norm over the full projection.
    Olmoe,
    /// Mixtral: weights always normalised, no QK-norm.
    Mixtral,
    /// Llama: the dense model with the same attention as Mixtral.
    Llama,
    /// Our own: every parameter under the name and in the shape that the model uses, for what the others cannot express.
    Mixtura,
}

impl Family {
    /// All of them, the specific ones first.
    pub const ALL: [Self; 4] = [Self::Olmoe, Self::Mixtral, Self::Llama, Self::Mixtura];

    /// The value of `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Olmoe => "olmoe",
            Self::Mixtral => "mixtral",
            Self::Llama => "llama",
            Self::Mixtura => "mixtura",
        }
    }

    /// The class name under `architectures`.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Olmoe => "OlmoeForCausalLM",
            Self::Mixtral => "MixtralForCausalLM",
            Self::Llama => "LlamaForCausalLM",
            Self::Mixtura => "MixturaDecoder",
        }
    }

    /// The family of a `model_type`.
    pub fn from_model_type(model_type: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.model_type() == model_type)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.model_type())
    }
}
