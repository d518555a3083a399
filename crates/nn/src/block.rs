//! One layer of a decoder: attention and a feed-forward part, each behind its norm and beside the residual stream.
//!
//! Legend: T tokens (batch major), D model width.

use burn::module::Module;
use burn::tensor::Tensor;

use crate::attention::Attention;
use crate::build::Builder;
use crate::config::{LayerFfn, ModelConfig};
use crate::context::ForwardContext;
use crate::error::{ConfigError, ForwardError};
use crate::ffn::{Experts, ExpertsShape};
use crate::layer_routing::LayerRouting;
use crate::moe::{MoeLayer, MoeOutput};
use crate::norm::{RmsNorm, RmsNormConfig};
use crate::parameters::NamedParameters;
use crate::role::{Role, Roles};
use crate::soft::{SoftLayer, SoftPast};

/// One layer: attention and feed-forward, each behind its norm and beside the residual stream.
#[derive(Module, Debug)]
pub struct Block {
    /// Norm before attention.
    pub attention_norm: RmsNorm,
    /// Self-attention.
    pub attention: Attention,
    /// Norm before the feed-forward part.
    pub ffn_norm: RmsNorm,
    /// Feed-forward part; its parameters are named `mlp...`, `moe...` or `soft...`.
    pub ffn: Feedforward,
    #[module(skip)]
    roles: Roles,
}

/// The feed-forward part of a layer.
#[derive(Module, Debug)]
#[expect(clippy::large_enum_variant, reason = "one per layer, never moved in a hot path")]
pub enum Feedforward {
    /// One network for every token.
    Mlp(Experts),
    /// Experts.
    Moe(MoeLayer),
    /// Experts that see mixtures, or are mixed.
    Soft(SoftLayer),
}

impl Block {
    /// Layer `layer` of a model.
    pub(crate) fn new(config: &ModelConfig, layer: usize, builder: &Builder) -> Result<Self, ConfigError> {
        let ModelConfig { d_model, norm_eps, activation, init_std, .. } = *config;
        let out_std = config.out_init_std();
        let norm = RmsNormConfig { eps: norm_eps, ..RmsNormConfig::new(d_model) };
        let ffn = match (config.layer_ffn(layer)?, config.moe_layer(layer)?, config.soft_layer(layer)?) {
            (_, Some(layer), _) => Feedforward::Moe(MoeLayer::build(&layer, &builder.at("moe"))?),
            (_, _, Some(layer)) => Feedforward::Soft(SoftLayer::build(&layer, &builder.at("soft"))),
            (LayerFfn::Moe { d_expert: d_hidden, .. } | LayerFfn::Dense { d_dense: d_hidden }, ..) => {
                let shape = ExpertsShape { experts: 1, d_model, d_hidden, activation, std: (init_std, out_std) };
                Feedforward::Mlp(Experts::new(shape, Role::Dense, &builder.at("mlp")))
            }
        };
        Ok(Self {
            attention_norm: RmsNorm::new(&norm, &builder.at("attention_norm")),
            attention: Attention::new(&config.attention(), &builder.at("attention")),
            ffn_norm: RmsNorm::new(&norm, &builder.at("ffn_norm")),
            ffn,
            roles: builder.roles(),
        })
    }

    /// The roles of the layer's parameters. Its feed-forward part may have been another model's, and says its own.
    pub(crate) fn roles(&self) -> Roles {
        let roles = self.roles.clone();
        match &self.ffn {
            Feedforward::Mlp(_) => roles.with_role("mlp", Role::Dense),
            Feedforward::Moe(moe) => roles.with("moe", &moe.roles()),
            Feedforward::Soft(soft) => roles.with("soft", &soft.roles()),
        }
    }

    /// The whole layer for sequences of `context.sequence` tokens.
    pub(crate) fn forward(
        &self,
        x_td: Tensor<2>,
        layer: usize,
        context: &ForwardContext,
        routing: &mut Vec<LayerRouting>,
    ) -> Result<Tensor<2>, ForwardError> {
        let x_td = self.attend(x_td, context);
        self.feed(x_td, layer, context, None, routing)
    }

    /// The first half of a layer, residual included, for sequences of `context.sequence` tokens.
    pub(crate) fn attend(&self, x_td: Tensor<2>, context: &ForwardContext) -> Tensor<2> {
        let seq = context.sequence;
        let batch = x_td.dims()[0] / seq.max(1);
        let normed_td = self.attention_norm.forward(x_td.clone(), context.numerics);
        x_td + self.attention.forward(normed_td, batch, seq, context.numerics)
    }

    /// The second half of a layer, residual included. `past` is what decoding remembers; without one, `x_td` holds whole
    /// sequences.
    pub(crate) fn feed(
        &self,
        x_td: Tensor<2>,
        layer: usize,
        context: &ForwardContext,
        past: Option<&mut SoftPast>,
        routing: &mut Vec<LayerRouting>,
    ) -> Result<Tensor<2>, ForwardError> {
        let normed_td = self.ffn_norm.forward(x_td.clone(), context.numerics);
        Ok(x_td
            + match &self.ffn {
                Feedforward::Mlp(network) => network.forward_dense(normed_td, context.numerics),
                Feedforward::Moe(moe) => {
                    let previous_te = routing.last().map(|previous| previous.logits_te.clone());
                    let MoeOutput { y_td, routing: own } = moe.forward_layer(normed_td, previous_te, layer, context)?;
                    routing.push(own);
                    y_td
                }
                Feedforward::Soft(soft) => match past {
                    Some(past) => soft.decode(normed_td, past, context.numerics),
                    None => {
                        let batch = normed_td.dims()[0] / context.sequence.max(1);
                        soft.forward(normed_td, batch, context.sequence, context.numerics)
                    }
                },
            })
    }
}
