//! Whether a language model may have a soft layer, and what one is made of.

use mixtura_routing::soft::config::{Emit, SoftConfig};
use mixtura_routing::soft::merge::FirstSegment;

use crate::error::ConfigError;
use crate::ffn::FfnActivation;

/// Whether `soft` can be part of a decoder whose MoE layers have shared networks of width `d_shared` (0 for none).
pub(crate) fn validate(soft: &SoftConfig, shared: bool) -> Result<(), ConfigError> {
    let positive = |key: &str, value: usize| match value {
        0 => Err(ConfigError::new(format!("moe.soft.{key}"), 0, "at least 1")),
        _ => Ok(()),
    };
    let allowed = match *soft {
        SoftConfig::SoftMoe { slots_per_expert, allow_future, .. } => {
            positive("slots_per_expert", slots_per_expert)?;
            allow_future
        }
        SoftConfig::Smear { allow_future } => allow_future,
        SoftConfig::Lory { segment, allow_future, .. } => {
            positive("segment", segment)?;
            allow_future
        }
        SoftConfig::MixtureOfTokens { group, temperature, .. } => {
            positive("group", group)?;
            if !(temperature.is_finite() && temperature > 0.0) {
                return Err(ConfigError::new("moe.soft.temperature", temperature, "a positive number"));
            }
            false
        }
        SoftConfig::BlockCausal { block, slots_per_expert } => {
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
    match soft.leak() {
        Some(leak) if !allowed => Err(ConfigError::new("moe.soft.kind", soft.kind(), refusal(leak))),
        _ => Ok(()),
    }
}

/// Refuses a layer whose mixture the task cannot move, on sequences of `context` tokens in batches of `batch`.
pub(crate) fn validate_training(soft: &SoftConfig, context: usize, batch: usize) -> Result<(), ConfigError> {
    let first_only = |key: &str, length: usize, what: &str| {
        let expected = format!(
            "less than data.context = {context}, or longer rows: {what}, so nothing that was decided about the first would ever \
             be used and the task gives the router no gradient"
        );
        if length < context { Ok(()) } else { Err(ConfigError::new(format!("moe.soft.{key}"), length, expected)) }
    };
    match *soft {
        SoftConfig::Lory { segment, first_segment: FirstSegment::Uniform, .. } => {
            first_only("segment", segment, "the first segment is merged uniformly")
        }
        SoftConfig::BlockCausal { block, .. } => first_only("block", block, "the first block sees no slots"),
        SoftConfig::MixtureOfTokens { group, emit: Emit::Merge, .. } if group.min(batch) == 1 => {
            let expected = format!(
                "at least 2 with data.batch of at least 2 (found {batch}), or emit = \"experts\": a mixture of one token has the \
                 weight 1, so the task gives the router no gradient"
            );
            Err(ConfigError::new("moe.soft.group", group, expected))
        }
        _ => Ok(()),
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
