//! What a decoder is made of: the `[model]` table of a configuration file, its checks, and the published presets.
//!
//! Legend: D `d_model`, E experts, K experts per token, F hidden width of an expert, L layers, V vocabulary.

mod moe;
mod size;

use mixtura_routing::{BalanceConfig, Normalize, RouterConfig};
use serde::{Deserialize, Serialize};

pub use moe::{AllLayers, EveryLayer, MoeConfig, MoeLayers, PerLayer};

use crate::attention::{AttentionConfig, QkNorm};
use crate::error::ConfigError;
use crate::ffn::FfnActivation;
use crate::moe::MoeLayerConfig;
use crate::soft::config::SoftLayerConfig;
use size::{LARGEST_SIZE, size};

/// A decoder-only transformer; `moe` absent makes every layer dense.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// Vocabulary size V. A training run takes it from its tokenizer when the file leaves it out.
    #[serde(default)]
    pub vocab: usize,
    /// Width D of the residual stream.
    pub d_model: usize,
    /// Number of layers L.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; as many as `heads` when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<usize>,
    /// Width of a head; `d_model / heads` when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Longest sequence.
    pub context: usize,
    /// Base of the rotary frequencies.
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f64,
    /// Added to the mean square inside every RMSNorm.
    #[serde(default = "default_norm_eps")]
    pub norm_eps: f64,
    /// RMSNorm of queries and keys before the rotation.
    #[serde(default)]
    pub qk_norm: QkNorm,
    /// Bound on the absolute value of queries, keys and values, after the norm and before the rotation (OLMoE); none when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip_qkv: Option<f64>,
    /// Whether the output projection is the transposed embedding.
    #[serde(default)]
    pub tied: bool,
    /// Hidden width of the dense feed-forward layers; needed when some layer has no experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub d_dense: Option<usize>,
    /// Activation of experts and dense feed-forward layers.
    #[serde(default)]
    pub activation: FfnActivation,
    /// Standard deviation of the initial weights.
    #[serde(default = "default_init_std")]
    pub init_std: f64,
    /// Divides the initial projections back into the residual stream by sqrt(2 L).
    #[serde(default)]
    pub scaled_residual_init: bool,
    /// The experts; a dense model has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe: Option<MoeConfig>,
}

/// No model has more parameters: 2^48.
const MOST_PARAMETERS: f64 = (1u64 << 48) as f64;
/// Validation looks at every layer.
const MOST_LAYERS: usize = 1 << 12;

fn default_rope_theta() -> f64 {
    10_000.0
}

fn default_norm_eps() -> f64 {
    1e-5
}

fn default_init_std() -> f64 {
    0.02
}

/// The feed-forward part of one layer, once every default is resolved.
#[derive(Debug, Clone, PartialEq)]
pub enum LayerFfn {
    /// One network of this hidden width.
    Dense {
        /// Hidden width.
        d_dense: usize,
    },
    /// Experts.
    Moe {
        /// Experts E that have a network.
        experts: usize,
        /// Hidden width F of each; the mean where they differ.
        d_expert: usize,
        /// Hidden width of all shared experts together, 0 for none.
        d_shared: usize,
    },
}

/// How many numbers a model holds, and how many of them one token touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParameterCounts {
    /// All parameters.
    pub total: usize,
    /// Those a token uses: all but the experts it does not visit. All of them in soft layers.
    pub active: usize,
    /// All parameters but embedding and untied output projection.
    pub total_without_embedding: usize,
    /// Active ones but embedding and untied output projection.
    pub active_without_embedding: usize,
}

impl ModelConfig {
    /// A dense model of this width, number of layers, heads and context, with 4 times as wide feed-forward layers and
    /// everything else at its default. The vocabulary is left for the tokenizer.
    pub fn new(d_model: usize, layers: usize, heads: usize, context: usize) -> Self {
        Self {
            vocab: 0,
            d_model,
            layers,
            heads,
            kv_heads: None,
            head_dim: None,
            context,
            rope_theta: default_rope_theta(),
            norm_eps: default_norm_eps(),
            qk_norm: QkNorm::None,
            clip_qkv: None,
            tied: false,
            d_dense: Some(4 * d_model),
            activation: FfnActivation::Swiglu,
            init_std: default_init_std(),
            scaled_residual_init: false,
            moe: None,
        }
    }

    /// Key and value heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads.unwrap_or(self.heads)
    }

    /// Width of a head; 0 when there are no heads, which [`validate`](Self::validate) refuses.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or_else(|| self.d_model.checked_div(self.heads).unwrap_or(0))
    }

    /// Columns of the fused query, key and value projection.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads()) * self.head_dim()
    }

    /// What the attention of every layer is made of.
    pub fn attention(&self) -> AttentionConfig {
        AttentionConfig {
            kv_heads: self.kv_heads(),
            head_dim: self.head_dim(),
            rope_theta: self.rope_theta,
            qk_norm: self.qk_norm,
            norm_eps: self.norm_eps,
            clip_qkv: self.clip_qkv,
            init_std: self.init_std,
            out_init_std: self.out_init_std(),
            ..AttentionConfig::new(self.d_model, self.heads)
        }
    }

    /// The feed-forward part of `layer`.
    pub fn layer_ffn(&self, layer: usize) -> Result<LayerFfn, ConfigError> {
        let experts = self.moe.as_ref().map_or(Ok(0), |moe| moe.experts_at(layer, self.layers))?;
        let Some(moe) = self.moe.as_ref().filter(|_| experts > 0) else {
            let d_dense = self.d_dense.filter(|&d| d > 0).ok_or_else(|| {
                ConfigError::new(
                    "d_dense",
                    self.d_dense.unwrap_or(0),
                    format!("a positive width, since layer {layer} is dense"),
                )
            })?;
            return Ok(LayerFfn::Dense { d_dense });
        };
        let each = &moe.d_expert_each;
        let mean = (!each.is_empty()).then(|| each.iter().sum::<usize>().div_ceil(each.len()));
        let d_expert = mean.or(moe.d_expert.at(layer)).filter(|&d| d > 0).ok_or_else(|| {
            ConfigError::new(
                "moe.d_expert",
                format!("{:?}", moe.d_expert),
                format!("a positive width for layer {layer}"),
            )
        })?;
        Ok(LayerFfn::Moe { experts, d_expert, d_shared: moe.shared_experts() * moe.d_shared.unwrap_or(d_expert) })
    }

    /// What `layer` is made of, if it has experts that tokens choose among.
    pub fn moe_layer(&self, layer: usize) -> Result<Option<MoeLayerConfig>, ConfigError> {
        let sparse = self.moe.as_ref().filter(|moe| moe.soft.is_none());
        let (LayerFfn::Moe { experts, d_expert, d_shared }, Some(moe)) = (self.layer_ffn(layer)?, sparse) else {
            return Ok(None);
        };
        let out_init_std = self.out_init_std();
        let zero = moe.zero_computation.filter(|zero| zero.gating_residual);
        let previous = (0..layer).rev().filter_map(|layer| moe.experts_at(layer, self.layers).ok()).find(|&e| e > 0);
        let previous_logits = zero.zip(previous).map_or(0, |(zero, experts)| experts + zero.experts());
        Ok(Some(MoeLayerConfig {
            d_expert_each: moe.d_expert_each.clone(),
            zero_computation: moe.zero_computation,
            previous_logits,
            residual: moe.residual,
            d_shared,
            shared_gate: moe.shared_gate,
            activation: self.activation,
            router: moe.router.clone(),
            balance: moe.balance.clone(),
            init_std: self.init_std,
            out_init_std,
            vocab: self.vocab,
            ..MoeLayerConfig::new(self.d_model, experts, moe.top_k, d_expert)
        }))
    }

    /// What `layer` is made of, if all its experts have a part in every token.
    pub fn soft_layer(&self, layer: usize) -> Result<Option<SoftLayerConfig>, ConfigError> {
        let soft = self.moe.as_ref().and_then(|moe| Some((moe.soft?, moe.shared_gate)));
        let (LayerFfn::Moe { experts, d_expert, d_shared }, Some((soft, shared_gate))) = (self.layer_ffn(layer)?, soft)
        else {
            return Ok(None);
        };
        Ok(Some(SoftLayerConfig {
            d_shared,
            shared_gate,
            activation: self.activation,
            init_std: self.init_std,
            out_init_std: self.out_init_std(),
            ..SoftLayerConfig::new(self.d_model, experts, d_expert, soft)
        }))
    }

    /// Standard deviation of the initial projections back into the residual stream.
    pub(crate) fn out_init_std(&self) -> f64 {
        let depth = if self.scaled_residual_init { (2.0 * self.layers as f64).sqrt() } else { 1.0 };
        self.init_std / depth
    }

    /// Whether every value can be built; the first one that cannot is named.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let positive = |key: &str, value: usize| size(key, value, 1, LARGEST_SIZE);
        positive("vocab", self.vocab)?;
        positive("d_model", self.d_model)?;
        size("layers", self.layers, 1, MOST_LAYERS)?;
        positive("heads", self.heads)?;
        positive("context", self.context)?;
        size("d_dense", self.d_dense.unwrap_or(0), 0, LARGEST_SIZE)?;
        positive("kv_heads", self.kv_heads())?;
        size("head_dim", self.head_dim.unwrap_or(0), 0, LARGEST_SIZE)?;
        if self.head_dim.is_none() && !self.d_model.is_multiple_of(self.heads) {
            return Err(ConfigError::new(
                "heads",
                self.heads,
                format!("a divisor of d_model = {}, or head_dim given", self.d_model),
            ));
        }
        if !self.heads.is_multiple_of(self.kv_heads()) {
            return Err(ConfigError::new("kv_heads", self.kv_heads(), format!("a divisor of heads = {}", self.heads)));
        }
        if self.head_dim() == 0 || !self.head_dim().is_multiple_of(2) {
            return Err(ConfigError::new(
                "head_dim",
                self.head_dim(),
                "a positive even number, for the rotary embedding",
            ));
        }
        // As f32, in which the model computes: what rounds to 0 or to infinity there is no number to divide by or to draw with.
        let within = |key: &str, value: f64, least: f64, most: f64| match (least..=most).contains(&value) {
            true => Ok(()),
            false => Err(ConfigError::new(key, value, format!("a number from {least:e} to {most:e}"))),
        };
        within("rope_theta", self.rope_theta, 1e-6, 1e30)?;
        within("norm_eps", self.norm_eps, 1e-30, 1.0)?;
        within("init_std", self.init_std, 1e-30, 1e3)?;
        within("clip_qkv", self.clip_qkv.unwrap_or(1.0), 1e-30, 1e30)?;
        if let Some(moe) = &self.moe {
            moe.validate(self.layers)?;
        }
        // In f64, which does not overflow: the exact count may only be taken of a model that an address space can hold.
        let (d, mut numbers) = (self.d_model as f64, self.vocab as f64 * self.d_model as f64);
        for layer in 0..self.layers {
            numbers += d * (self.qkv_width() as f64 + self.heads as f64 * self.head_dim() as f64);
            numbers += 3.0
                * d
                * match self.layer_ffn(layer)? {
                    LayerFfn::Moe { experts, d_expert, d_shared } => experts as f64 * d_expert as f64 + d_shared as f64,
                    LayerFfn::Dense { d_dense } => d_dense as f64,
                };
        }
        if numbers > MOST_PARAMETERS {
            return Err(ConfigError::new(
                "d_model",
                self.d_model,
                format!("a model of at most 2^48 parameters, not {numbers:.1e}"),
            ));
        }
        for layer in 0..self.layers {
            if let Some(config) = self.moe_layer(layer)? {
                config.validate_in("moe.", &format!("layer {layer}"))?;
            }
        }
        Ok(())
    }

    /// Refuses a valid configuration that should not be trained: a router that is not what its policy's name says, or that would
    /// learn nothing from the task. Models that exist already, a published one with such a router for instance, can be built and
    /// evaluated all the same.
    ///
    /// `context` are the tokens of a training sequence and `batch` the sequences of a micro-batch: soft layers may need several.
    pub fn validate_training(&self, context: usize, batch: usize) -> Result<(), ConfigError> {
        if let Some(soft) = self.moe.as_ref().and_then(|moe| moe.soft) {
            return crate::soft::config::validate_training(&soft, context, batch);
        }
        for layer in 0..self.layers {
            if let Some(config) = self.moe_layer(layer)? {
                config.validate_training_in("moe.", &format!("layer {layer}"))?;
            }
        }
        Ok(())
    }

    /// Parameters by the shapes alone; no tensor is made. The configuration must be valid.
    pub fn parameter_counts(&self) -> Result<ParameterCounts, ConfigError> {
        let (d, head_dim) = (self.d_model, self.head_dim());
        let into = if self.activation.kernel().is_gated() { 3 } else { 2 };
        let qk_norm = match self.qk_norm {
            QkNorm::None => 0,
            QkNorm::Full => (self.heads + self.kv_heads()) * head_dim,
            QkNorm::PerHead => 2 * head_dim,
        };
        let attention = d * self.qkv_width() + self.heads * head_dim * d + qk_norm + 2 * d;
        let (mut total, mut active) = (d, d);
        for layer in 0..self.layers {
            let (all, used) = match (self.layer_ffn(layer)?, self.moe_layer(layer)?, self.soft_layer(layer)?) {
                (_, Some(layer), _) => layer.parameters().into(),
                (_, _, Some(layer)) => (layer.parameters(), layer.parameters()),
                (LayerFfn::Moe { d_expert: d_hidden, .. } | LayerFfn::Dense { d_dense: d_hidden }, ..) => {
                    (into * d * d_hidden, into * d * d_hidden)
                }
            };
            total += attention + all;
            active += attention + used;
        }
        let embedding = self.vocab * d * if self.tied { 1 } else { 2 };
        Ok(ParameterCounts {
            total: total + embedding,
            active: active + embedding,
            total_without_embedding: total,
            active_without_embedding: active,
        })
    }
}

/// OLMoE-1B-7B: 16 layers of 64 experts, 8 per token, weights not normalised, queries and keys normalised whole.
pub fn olmoe_1b_7b() -> ModelConfig {
    ModelConfig {
        vocab: 50_304,
        qk_norm: QkNorm::Full,
        d_dense: None,
        moe: Some(MoeConfig {
            router: RouterConfig { normalize: Normalize::Never, ..RouterConfig::default() },
            ..MoeConfig::new(64, 8, 1024)
        }),
        ..ModelConfig::new(2048, 16, 16, 4096)
    }
}

/// Mixtral 8x7B: 32 layers of 8 experts, 2 per token, weights normalised, 4 query heads per key and value head.
pub fn mixtral_8x7b() -> ModelConfig {
    ModelConfig {
        vocab: 32_000,
        kv_heads: Some(8),
        rope_theta: 1e6,
        d_dense: None,
        moe: Some(MoeConfig {
            balance: BalanceConfig { coefficient: 0.02, z_loss: 0.0, ..BalanceConfig::default() },
            ..MoeConfig::new(8, 2, 14_336)
        }),
        ..ModelConfig::new(4096, 32, 32, 32_768)
    }
}
