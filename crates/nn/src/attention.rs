//! Causal self-attention with rotary positions and grouped key and value heads.
//!
//! ```text
//! qkv = x W_qkv          columns: H query heads, then G key heads, then G value heads, each P wide
//! q, k normalised (optional); q, k, v clamped (optional); q, k rotated by position; out = softmax(q k^T / sqrt(P)) v W_out
//! ```
//!
//! Legend: T tokens (batch major), D model width, H query heads, G key and value heads, P head width.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use mixtura_ops::{AttentionSpec, KvCache, Numerics, PackCell, attention_decode, causal_attention, linear};

use crate::build::Builder;
use crate::config::{ModelConfig, QkNorm};
use crate::init::Init;
use crate::role::Role;

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
    geometry: Geometry,
    #[module(skip)]
    qkv_cell: PackCell,
    #[module(skip)]
    out_cell: PackCell,
}

/// The numbers of an attention layer that are not learned.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Geometry {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    rope_theta: f64,
    qk_norm: QkNorm,
    norm_eps: f64,
    clip_qkv: Option<f64>,
}

impl Attention {
    /// Attention as `config` describes it; the way back into the residual stream is drawn with `out_std`.
    pub(crate) fn new(config: &ModelConfig, out_std: f64, builder: &Builder) -> Self {
        let (d, heads, kv_heads, head_dim) = (config.d_model, config.heads, config.kv_heads(), config.head_dim());
        let norm = |name: &str, heads: usize| match config.qk_norm {
            QkNorm::None => None,
            QkNorm::Full => Some(builder.parameter(name, Role::Norm, [heads * head_dim], Init::Ones)),
            QkNorm::PerHead => Some(builder.parameter(name, Role::Norm, [head_dim], Init::Ones)),
        };
        Self {
            qkv: builder.parameter(
                "qkv",
                Role::Attention,
                [d, config.qkv_width()],
                Init::TruncatedNormal(config.init_std),
            ),
            out: builder.parameter("out", Role::Attention, [heads * head_dim, d], Init::TruncatedNormal(out_std)),
            q_norm: norm("q_norm", heads),
            k_norm: norm("k_norm", kv_heads),
            geometry: Geometry {
                heads,
                kv_heads,
                head_dim,
                rope_theta: config.rope_theta,
                qk_norm: config.qk_norm,
                norm_eps: config.norm_eps,
                clip_qkv: config.clip_qkv,
            },
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
        let Geometry { heads, kv_heads, head_dim, rope_theta, qk_norm, norm_eps, clip_qkv } = self.geometry;
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

    /// New tokens of one sequence, which also attend to everything in `cache` and are added to it.
    ///
    /// # Shapes
    /// `[T, D]` gives `[T, D]`, the same bits as [`forward`](Self::forward) over the whole sequence.
    pub(crate) fn decode(&self, x_td: Tensor<2>, cache: &mut KvCache, numerics: Numerics) -> Tensor<2> {
        let [tokens, _] = x_td.dims();
        let qkv = linear(x_td, self.qkv.val(), &self.qkv_cell, numerics);
        let (q_norm, k_norm) = (self.q_norm.as_ref().map(Param::val), self.k_norm.as_ref().map(Param::val));
        let cache = std::slice::from_mut(cache);
        let mixed = attention_decode(qkv, q_norm, k_norm, &self.spec(1, tokens), cache, numerics);
        linear(mixed, self.out.val(), &self.out_cell, numerics)
    }

    pub(crate) fn clear_packs(&self) {
        self.qkv_cell.clear();
        self.out_cell.clear();
    }
}
