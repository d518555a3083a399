//! Causal self-attention with rotary positions and grouped key and value heads.
//!
//! ```text
//! qkv = x W_qkv          columns: H query heads, then G key heads, then G value heads, each P wide
//! q, k normalised (optional); q, k, v clamped (optional); q, k rotated by position; out = softmax(q k^T / sqrt(P)) v W_out
//! ```
//!
//! Legend: T tokens (batch major), D model width, H query heads, G key and value heads, P head width.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use mixtura_ops::{AttentionSpec, KvCache, Numerics, PackCell, attention_decode_ragged, causal_attention, linear};
use serde::{Deserialize, Serialize};

use crate::build::Builder;
use crate::error::ConfigError;
use crate::init::Init;
use crate::role::Role;

/// RMSNorm of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// No normalisation.
    #[default]
    None,
    /// Over the whole projection, before it is cut into heads (OLMoE).
    Full,
    /// Over each head (Qwen3).
    PerHead,
}

/// What an [`Attention`] layer is made of.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use mixtura_nn::AttentionConfig;
/// let device = Device::default();
/// // Four query heads share two key and value heads.
/// let attention = AttentionConfig { kv_heads: 2, ..AttentionConfig::new(16, 4) }.init(&device).unwrap();
/// let x_td = Tensor::<2>::random([2 * 5, 16], Distribution::Normal(0.0, 1.0), &device);
/// assert_eq!(attention.forward(x_td, 2, 5, Default::default()).dims(), [10, 16]);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionConfig {
    /// Width D of the tokens.
    pub d_model: usize,
    /// Query heads H.
    pub heads: usize,
    /// Key and value heads G, a divisor of H.
    pub kv_heads: usize,
    /// Width P of a head, even for the rotation.
    pub head_dim: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// RMSNorm of queries and keys before the rotation.
    pub qk_norm: QkNorm,
    /// Added to the mean square inside that norm.
    pub norm_eps: f64,
    /// Bound on the absolute value of queries, keys and values, after the norm and before the rotation; `None` for none.
    pub clip_qkv: Option<f64>,
    /// Standard deviation of the initial query, key and value projection.
    pub init_std: f64,
    /// Standard deviation of the initial projection back to the tokens' width.
    pub out_init_std: f64,
    /// What the weights are drawn from. Modules of one shape with the same seed start equal. A decoder draws from its own.
    pub seed: u64,
}

impl AttentionConfig {
    /// `heads` heads of width `d_model / heads`, each with its own keys and values, everything else at its default.
    pub fn new(d_model: usize, heads: usize) -> Self {
        Self {
            d_model,
            heads,
            kv_heads: heads,
            head_dim: d_model.checked_div(heads).unwrap_or(0),
            rope_theta: 10_000.0,
            qk_norm: QkNorm::None,
            norm_eps: 1e-5,
            clip_qkv: None,
            init_std: 0.02,
            out_init_std: 0.02,
            seed: 0,
        }
    }

    /// The layer, with parameters on `device`.
    ///
    /// # Errors
    /// If a size is 0, the heads cannot share the keys evenly, or a head has an odd width.
    pub fn init(&self, device: &Device) -> Result<Attention, ConfigError> {
        let Self { d_model, heads, kv_heads, head_dim, .. } = *self;
        for (key, value) in [("d_model", d_model), ("heads", heads), ("kv_heads", kv_heads)] {
            if value == 0 {
                return Err(ConfigError::new(key, 0, "at least 1"));
            }
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(ConfigError::new("kv_heads", kv_heads, format!("a divisor of heads = {heads}")));
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(ConfigError::new("head_dim", head_dim, "a positive even number, for the rotary embedding"));
        }
        Ok(Attention::new(self, &Builder::new(self.seed, device)))
    }
}

/// Self-attention of one layer.
#[derive(Module, Debug)]
pub struct Attention {
    /// `[D, (H + 2G) P]`.
    pub qkv: Param<Tensor<2>>,
    /// `[H P, D]`.
    pub out: Param<Tensor<2>>,
    /// Scale of the queries' norm: [H P] over the whole projection, `[P]` per head.
    pub q_norm: Option<Param<Tensor<1>>>,
    /// Scale of the keys' norm: [G P] or `[P]`.
    pub k_norm: Option<Param<Tensor<1>>>,
    #[module(skip)]
    config: AttentionConfig,
    #[module(skip)]
    pub(crate) qkv_cell: PackCell,
    #[module(skip)]
    pub(crate) out_cell: PackCell,
}

impl Attention {
    /// Attention whose configuration has been checked.
    pub(crate) fn new(config: &AttentionConfig, builder: &Builder) -> Self {
        let AttentionConfig { d_model, heads, kv_heads, head_dim, init_std, out_init_std, .. } = *config;
        let norm = |name: &str, heads: usize| match config.qk_norm {
            QkNorm::None => None,
            QkNorm::Full => Some(builder.parameter(name, Role::Norm, [heads * head_dim], Init::Ones)),
            QkNorm::PerHead => Some(builder.parameter(name, Role::Norm, [head_dim], Init::Ones)),
        };
        let matrix =
            |name: &str, shape, std| builder.parameter(name, Role::Attention, shape, Init::TruncatedNormal(std));
        Self {
            qkv: matrix("qkv", [d_model, (heads + 2 * kv_heads) * head_dim], init_std),
            out: matrix("out", [heads * head_dim, d_model], out_init_std),
            q_norm: norm("q_norm", heads),
            k_norm: norm("k_norm", kv_heads),
            config: config.clone(),
            qkv_cell: PackCell::new(),
            out_cell: PackCell::new(),
        }
    }

    /// Every sequence attends to itself; `T = batch * seq`.
    ///
    /// # Shapes
    /// `[T, D]` gives `[T, D]`.
    pub fn forward(&self, x_td: Tensor<2>, batch: usize, seq: usize, numerics: Numerics) -> Tensor<2> {
        let qkv = linear(x_td, self.qkv.val(), &self.qkv_cell, numerics);
        let (q_norm, k_norm) = (self.q_norm.as_ref().map(Param::val), self.k_norm.as_ref().map(Param::val));
        let mixed = causal_attention(qkv, q_norm, k_norm, &self.spec(batch, seq), numerics);
        linear(mixed, self.out.val(), &self.out_cell, numerics)
    }

    /// The kernels' description of `batch` sequences of `seq` tokens.
    pub(crate) fn spec(&self, batch: usize, seq: usize) -> AttentionSpec {
        let AttentionConfig { heads, kv_heads, head_dim, rope_theta, qk_norm, norm_eps, clip_qkv, .. } = self.config;
        AttentionSpec {
            rope_theta,
            qk_norm: match qk_norm {
                QkNorm::None => None,
                QkNorm::Full => Some(mixtura_ops::QkNorm::FullProjection),
                QkNorm::PerHead => Some(mixtura_ops::QkNorm::PerHead),
            },
            norm_eps: norm_eps as f32,
            clip: clip_qkv.map(|clip| clip as f32),
            ..AttentionSpec::new(batch, seq, heads, kv_heads, head_dim)
        }
    }

    /// `new[s]` new tokens of sequence `s`, which also attend to everything in its cache and are added to it.
    ///
    /// # Shapes
    /// `[T, D]` gives `[T, D]`, the same bits as [`forward`](Self::forward) over the whole sequences.
    pub(crate) fn decode(
        &self,
        x_td: Tensor<2>,
        new: &[usize],
        caches: &mut [&mut KvCache],
        numerics: Numerics,
    ) -> Tensor<2> {
        let qkv = linear(x_td, self.qkv.val(), &self.qkv_cell, numerics);
        let (q_norm, k_norm) = (self.q_norm.as_ref().map(Param::val), self.k_norm.as_ref().map(Param::val));
        let mixed = attention_decode_ragged(qkv, q_norm, k_norm, &self.spec(1, 1), new, caches, numerics);
        linear(mixed, self.out.val(), &self.out_cell, numerics)
    }

    pub(crate) fn for_each_cell(&self, f: &mut dyn FnMut(&PackCell)) {
        f(&self.qkv_cell);
        f(&self.out_cell);
    }
}
