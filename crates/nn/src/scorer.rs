//! From tokens to router logits: linear, cosine (X-MoE), two-layer MLP (MoE++), fuzzy membership, or none (hash layers).
//! Always f32; each row depends on its token alone.
//!
//! | scorer | logits | `weight` | `second` |
//! | --- | --- | --- | --- |
//! | linear | `x W` | `[D, E]` | - |
//! | cosine | `cos(x P, e_i) / tau` | P `[D, M]`, M = max(E/2, 2) | e `[E, M]` |
//! | mlp | `tanh(x W1) W2` | W1 `[D, 8E]` | W2 `[8E, E]` |
//! | fuzzy | `-ln(d_i^2 + 1e-9)`, d_i the distance to prototype i, so that softmax gives the memberships for m = 2 | - | c `[E, D]` |
//! | none | 0 | - | - |

use std::sync::Arc;

use burn::module::Param;
use burn::tensor::Tensor;
use mixtura_ops::{Numerics, PackCell, host_function, host_function_2, linear, rms_norm, tensor_like, with_slice};
use mixtura_routing::{Policy, RouterConfig, Scorer};

use crate::build::Builder;
use crate::error::ConfigError;
use crate::ffn::ones;
use crate::init::Init;
use crate::role::Role;

/// X-MoE's first temperature for the larger of its models.
const FIRST_TEMPERATURE: f32 = 0.07;

/// Keeps the squared distance to a prototype away from 0.
const FUZZY_FLOOR: f32 = 1e-9;

/// Which logits a router computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Logits {
    Linear,
    Cosine,
    Mlp,
    Fuzzy,
    /// All zero: the experts follow from the token ids.
    None,
}

/// A scorer's parameters before they become fields of the router.
pub(crate) struct ScorerParameters {
    pub weight: Option<Param<Tensor<2>>>,
    pub second: Option<Param<Tensor<2>>>,
    pub log_temperature: Option<Param<Tensor<1>>>,
}

impl Logits {
    /// The scorer that a configuration asks for.
    pub fn of(config: &RouterConfig) -> Result<Self, ConfigError> {
        Ok(match (&config.policy, config.scorer) {
            (Policy::Hash, _) => Self::None,
            (_, Scorer::Linear) => Self::Linear,
            (_, Scorer::Cosine) => Self::Cosine,
            (_, Scorer::Mlp) => Self::Mlp,
            (_, Scorer::Fuzzy) => Self::Fuzzy,
            (_, other) => {
                let expected = "\"linear\", \"cosine\", \"mlp\" or \"fuzzy\"";
                return Err(ConfigError::new("router.scorer", format!("{other:?}"), expected));
            }
        })
    }

    /// Shapes of `weight` and `second` for tokens of width `d` and `experts` experts.
    pub fn shapes(self, d: usize, experts: usize) -> [Option<[usize; 2]>; 2] {
        let inner = (experts / 2).max(2);
        match self {
            Self::Linear => [Some([d, experts]), None],
            Self::Cosine => [Some([d, inner]), Some([experts, inner])],
            Self::Mlp => [Some([d, 8 * experts]), Some([8 * experts, experts])],
            Self::Fuzzy => [None, Some([experts, d])],
            Self::None => [None, None],
        }
    }

    /// How many numbers it learns.
    pub fn parameters(self, d: usize, experts: usize) -> usize {
        let matrices: usize = self.shapes(d, experts).iter().flatten().map(|[rows, columns]| rows * columns).sum();
        matrices + usize::from(self == Self::Cosine)
    }

    /// `init` is for a linear scorer's weight; the others need directions that differ.
    pub fn build(self, d: usize, experts: usize, init: Init, init_std: f64, builder: &Builder) -> ScorerParameters {
        let [weight, second] = self.shapes(d, experts);
        let wide = Init::TruncatedNormal(if self == Self::Fuzzy { 1.0 } else { init_std.max(0.02) });
        let first = if self == Self::Linear { init } else { wide };
        let temperature =
            || builder.parameter("log_temperature", Role::Router, [1], Init::Constant(FIRST_TEMPERATURE.ln()));
        ScorerParameters {
            weight: weight.map(|shape| builder.parameter("weight", Role::Router, shape, first)),
            second: second.map(|shape| builder.parameter("second", Role::Router, shape, wide)),
            log_temperature: (self == Self::Cosine).then(temperature),
        }
    }

    /// # Shapes
    /// `[T, D]` gives `[T, E]`.
    pub fn forward(
        self,
        x_td: Tensor<2>,
        experts: usize,
        weight: Option<(Tensor<2>, &PackCell)>,
        second: Option<(Tensor<2>, &PackCell)>,
        log_temperature: Option<Tensor<1>>,
        numerics: Numerics,
    ) -> Tensor<2> {
        match (self, weight, second, log_temperature) {
            (Self::Linear, Some((w, cell)), ..) => linear(x_td, w, cell, numerics),
            (Self::Cosine, Some((project, cell)), Some((embeddings, _)), Some(log_temperature)) => {
                let h_tm = linear(x_td, project, cell, numerics);
                cosine(h_tm, embeddings, numerics) * log_temperature.neg().exp().unsqueeze()
            }
            (Self::Mlp, Some((w1, first)), Some((w2, last)), _) => {
                linear(tanh(linear(x_td, w1, first, numerics)), w2, last, numerics)
            }
            (Self::Fuzzy, _, Some((prototypes, _)), _) => fuzzy(x_td, prototypes),
            _ => {
                let [tokens, _] = x_td.dims();
                tensor_like(vec![0.0; tokens * experts], [tokens, experts], &x_td)
            }
        }
    }
}

/// Cosines of the rows of both: RMSNorm makes each row's length sqrt(M).
fn cosine(h_tm: Tensor<2>, embeddings_em: Tensor<2>, numerics: Numerics) -> Tensor<2> {
    let [_, m] = h_tm.dims();
    let ones = ones(m, &h_tm);
    let unit = |rows: Tensor<2>| rms_norm(rows, ones.clone(), 1e-12, numerics);
    let directions_me = unit(embeddings_em).transpose().div_scalar(m as f32);
    // The directions are new at every call, so nothing packed is worth keeping.
    linear(unit(h_tm), directions_me, &PackCell::new(), numerics)
}

/// Element by element on the host: a vectorised tanh may round its tail elements differently.
fn tanh(x: Tensor<2>) -> Tensor<2> {
    let shape = x.dims();
    let value: Vec<f32> = with_slice(&x, |x| x.iter().map(|v| v.tanh()).collect());
    let kept: Arc<[f32]> = value.as_slice().into();
    host_function(x, value, shape, move |dy| dy.iter().zip(kept.iter()).map(|(d, t)| d * (1.0 - t * t)).collect())
}

/// `-ln(|x_t - c_e|^2 + floor)`.
fn fuzzy(x_td: Tensor<2>, prototypes_ed: Tensor<2>) -> Tensor<2> {
    let ([tokens, d], [experts, _]) = (x_td.dims(), prototypes_ed.dims());
    let x: Arc<[f32]> = with_slice(&x_td, |x| x.into());
    let c: Arc<[f32]> = with_slice(&prototypes_ed, |c| c.into());
    let squared = |x: &[f32], c: &[f32]| x.iter().zip(c).map(|(x, c)| (x - c) * (x - c)).sum::<f32>() + FUZZY_FLOOR;
    let distance_te: Vec<f32> = x.chunks_exact(d).flat_map(|x| c.chunks_exact(d).map(move |c| squared(x, c))).collect();
    let value = distance_te.iter().map(|d2| -d2.ln()).collect();
    host_function_2(x_td, prototypes_ed, value, [tokens, experts], move |dy| {
        let (mut dx, mut dc) = (vec![0.0; x.len()], vec![0.0; c.len()]);
        for (t, (x, dx)) in x.chunks_exact(d).zip(dx.chunks_exact_mut(d)).enumerate() {
            for (e, (c, dc)) in c.chunks_exact(d).zip(dc.chunks_exact_mut(d)).enumerate() {
                let slope = -2.0 * dy[t * experts + e] / distance_te[t * experts + e];
                for i in 0..d {
                    dx[i] += slope * (x[i] - c[i]);
                    dc[i] -= slope * (x[i] - c[i]);
                }
            }
        }
        (dx, dc)
    })
}
