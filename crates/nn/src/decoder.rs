//! A decoder-only language model: embedding, L blocks, final norm, output projection.
//!
//! ```text
//! x = embed[ids]
//! each block:  x = x + attention(norm(x));  x = x + ffn(norm(x))       ffn: MoE layer, soft layer or one dense network
//! logits = norm(x) W_head                                              W_head untied, or the transposed embedding
//! ```
//!
//! Training takes the loss without ever holding the logits. Decoding is in `decode.rs`.
//!
//! Legend: T tokens (batch major), D model width, V vocabulary.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use mixtura_ops::{Numerics, PackCell, embedding_of, linear, linear_cross_entropy, linear_tied};

use crate::block::{Block, Feedforward};
use crate::build::Builder;
use crate::config::ModelConfig;
use crate::context::{ForwardContext, SelectionCounts};
use crate::error::{ConfigError, ForwardError};
use crate::init::Init;
use crate::layer_routing::LayerRouting;
use crate::norm::{RmsNorm, RmsNormConfig};
use crate::parameters::NamedParameters;
use crate::recompute::Rooms;
use crate::role::{Role, Roles};

/// A decoder-only transformer.
#[derive(Module, Debug)]
pub struct Decoder {
    /// Token embedding.
    pub embed: Embedding,
    /// The layers in order.
    pub layers: Vec<Block>,
    /// Norm before the output projection.
    pub norm: RmsNorm,
    /// Output projection; absent when it is the transposed embedding.
    pub head: Option<Head>,
    #[module(skip)]
    config: ModelConfig,
    #[module(skip)]
    rooms: Rooms,
    /// Those of what is beside the layers.
    #[module(skip)]
    roles: Roles,
}

/// The table of token embeddings.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[V, D]`.
    pub weight: Param<Tensor<2>>,
    /// Packed copy for a tied output projection.
    #[module(skip)]
    pub(crate) cell: PackCell,
}

/// The output projection.
#[derive(Module, Debug)]
pub struct Head {
    /// `[D, V]`.
    pub weight: Param<Tensor<2>>,
    #[module(skip)]
    pub(crate) cell: PackCell,
}

/// The residual stream after the last norm, and how every MoE layer routed.
#[derive(Debug, Clone)]
pub struct DecoderOutput {
    /// Input of the output projection, `[T, D]`.
    pub hidden_td: Tensor<2>,
    /// By MoE layer, in order; dense and soft layers route nothing and have no entry.
    pub routing: Vec<LayerRouting>,
}

/// What training minimises, and its parts.
#[derive(Debug, Clone)]
pub struct LossOutput {
    /// Cross-entropy plus auxiliary losses with their coefficients, `[1]`.
    pub total: Tensor<1>,
    /// Mean cross-entropy over the counted targets, `[1]`.
    pub ce: Tensor<1>,
    /// Auxiliary losses with their coefficients, mean over MoE layers, `[1]`; none without MoE layers.
    pub auxiliary: Option<Tensor<1>>,
    /// Balance loss, mean over MoE layers, without coefficient.
    pub balance: f64,
    /// z-loss, mean over MoE layers, without coefficient.
    pub z: f64,
    /// Entropy of the routers, mean over MoE layers, without coefficient; 0 when that is 0.
    pub entropy: f64,
    /// Targets that count.
    pub counted: usize,
    /// By MoE layer, in order.
    pub routing: Vec<LayerRouting>,
}

impl LossOutput {
    /// The part of this micro-batch in the loss of a step: `ce_share` of the step's counted targets and `token_share` of its
    /// tokens are here. Cross-entropy is a mean over the former, auxiliary losses are means over the latter.
    pub fn weighted(&self, ce_share: f64, token_share: f64) -> Tensor<1> {
        if (ce_share, token_share) == (1.0, 1.0) {
            return self.total.clone();
        }
        let auxiliary = self.auxiliary.clone().map(|auxiliary| auxiliary.mul_scalar(token_share as f32));
        sum_of(auxiliary, self.ce.clone().mul_scalar(ce_share as f32))
    }
}

/// The backward pass meets the operands from the last to the first. With the cross-entropy last, every layer is entered by its
/// output, as it is when it is computed again, and the gradients of its parts add in one order.
fn sum_of(auxiliary: Option<Tensor<1>>, ce: Tensor<1>) -> Tensor<1> {
    match auxiliary {
        None => ce,
        Some(auxiliary) => auxiliary + ce,
    }
}

impl Decoder {
    /// A model whose weights are drawn from `seed` when first read. On an autodiff device it can be trained; whether its routers
    /// can learn is [`ModelConfig::validate_training`]'s to say.
    pub fn new(config: &ModelConfig, seed: u64, device: &Device) -> Result<Self, ConfigError> {
        config.validate()?;
        let builder = Builder::new(seed, device);
        let (d, v, eps) = (config.d_model, config.vocab, config.norm_eps);
        let init = Init::TruncatedNormal(config.init_std);
        let layers = (0..config.layers).map(|i| Block::new(config, i, &Builder::new(seed, device).at("layers").at(i)));
        let by_id = |name, shape| builder.at(name).parameter("weight", Role::Embedding, shape, init);
        Ok(Self {
            embed: Embedding { weight: by_id("embed", [v, d]), cell: PackCell::new() },
            layers: layers.collect::<Result<_, _>>()?,
            norm: RmsNorm::new(&RmsNormConfig { eps, ..RmsNormConfig::new(d) }, &builder.at("norm")),
            head: (!config.tied).then(|| Head { weight: by_id("head", [d, v]), cell: PackCell::new() }),
            config: config.clone(),
            rooms: Rooms::default(),
            roles: builder.roles(),
        })
    }

    /// What the model was made from.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device its parameters live on, without autodiff where they have none.
    pub fn device(&self) -> Device {
        self.embed.weight.lazy_device()
    }

    /// `batch` sequences of `seq` tokens, one after the other in `ids`.
    pub fn forward(
        &self,
        ids: &[u32],
        batch: usize,
        seq: usize,
        context: &ForwardContext,
    ) -> Result<DecoderOutput, ForwardError> {
        self.check(ids, batch, seq)?;
        let ids: Arc<[u32]> = ids.into();
        let context = ForwardContext { sequence: seq, ids: Some(ids.clone()), kept: None, ..context.clone() };
        let mut x_td = embedding_of(self.embed.weight.val(), ids, &self.embed.cell);
        let mut routing = Vec::new();
        for (layer, block) in self.layers.iter().enumerate() {
            x_td = if context.recompute_activations && x_td.is_autodiff() && x_td.dims()[0] > 0 {
                block.forward_recomputed(x_td, layer, &context, &self.rooms, &mut routing)?
            } else {
                block.forward(x_td, layer, &context, &mut routing)?
            };
        }
        Ok(DecoderOutput { hidden_td: self.norm.forward(x_td, context.numerics), routing })
    }

    /// How every MoE layer routes these sequences, and no more than that takes: the experts of the last one and what follows
    /// them are not run. The decisions are those of [`forward`](Self::forward), to the bit.
    pub fn route(
        &self,
        ids: &[u32],
        batch: usize,
        seq: usize,
        context: &ForwardContext,
    ) -> Result<Vec<LayerRouting>, ForwardError> {
        self.check(ids, batch, seq)?;
        let ids: Arc<[u32]> = ids.into();
        let context = ForwardContext { sequence: seq, ids: Some(ids.clone()), kept: None, ..context.clone() };
        let mut routers = self.layers.iter().enumerate().filter_map(|(layer, block)| match &block.ffn {
            Feedforward::Moe(moe) => Some((layer, &moe.router)),
            Feedforward::Mlp(_) | Feedforward::Soft(_) => None,
        });
        let mut routing = Vec::new();
        let Some((last, router)) = routers.next_back() else { return Ok(routing) };
        let mut x_td = embedding_of(self.embed.weight.val(), ids, &self.embed.cell);
        for (layer, block) in self.layers[..last].iter().enumerate() {
            x_td = block.forward(x_td, layer, &context, &mut routing)?;
        }
        let block = &self.layers[last];
        let normed_td = block.ffn_norm.forward(block.attend(x_td, &context), context.numerics);
        let previous_te = routing.last().map(|previous| previous.logits_te.clone());
        let own = router.route(normed_td, previous_te, last, &context);
        routing.push(own.map_err(|source| ForwardError::Routing { layer: last, source })?);
        Ok(routing)
    }

    /// Mean cross-entropy of the next token plus auxiliary losses. A target of `u32::MAX` does not count.
    pub fn loss(
        &self,
        ids: &[u32],
        targets: &[u32],
        batch: usize,
        seq: usize,
        context: &ForwardContext,
    ) -> Result<LossOutput, ForwardError> {
        if targets.len() != ids.len() {
            return Err(ForwardError::BatchShape { found: targets.len(), batch, seq });
        }
        let counted = |&&id: &&u32| id != mixtura_ops::IGNORED;
        let outside = |&id: &u32| id != mixtura_ops::IGNORED && id as usize >= self.config.vocab;
        if let Some(position) = targets.iter().position(outside) {
            return Err(ForwardError::TokenId { id: targets[position], position, vocab: self.config.vocab });
        }
        let DecoderOutput { hidden_td, routing } = self.forward(ids, batch, seq, context)?;
        let (weight, layout, cell) = match &self.head {
            Some(head) => (head.weight.val(), mixtura_ops::Head::Untied, &head.cell),
            None => (self.embed.weight.val(), mixtura_ops::Head::Tied, &self.embed.cell),
        };
        let ce = linear_cross_entropy(hidden_td, weight, layout, targets.into(), cell, context.numerics);
        let layers = routing.len().max(1) as f64;
        let auxiliary = routing.iter().map(|layer| layer.losses.total.clone()).reduce(|sum, next| sum + next);
        let auxiliary = auxiliary.map(|sum| sum.div_scalar(layers));
        Ok(LossOutput {
            total: sum_of(auxiliary.clone(), ce.clone()),
            ce,
            auxiliary,
            balance: routing.iter().map(|layer| layer.losses.balance).sum::<f64>() / layers,
            z: routing.iter().map(|layer| layer.losses.z).sum::<f64>() / layers,
            entropy: routing.iter().map(|layer| layer.losses.entropy).sum::<f64>() / layers,
            counted: targets.iter().filter(counted).count(),
            routing,
        })
    }

    /// Logits of every position, `[T, V]`.
    pub fn logits(
        &self,
        ids: &[u32],
        batch: usize,
        seq: usize,
        context: &ForwardContext,
    ) -> Result<(Tensor<2>, Vec<LayerRouting>), ForwardError> {
        let DecoderOutput { hidden_td, routing } = self.forward(ids, batch, seq, context)?;
        Ok((self.project(hidden_td, context.numerics), routing))
    }

    /// The output projection.
    ///
    /// # Shapes
    /// `[T, D]` gives `[T, V]`.
    pub fn project(&self, hidden_td: Tensor<2>, numerics: Numerics) -> Tensor<2> {
        match &self.head {
            Some(head) => linear(hidden_td, head.weight.val(), &head.cell, numerics),
            None => linear_tied(hidden_td, self.embed.weight.val(), &self.embed.cell, numerics),
        }
    }

    /// After an optimizer step: moves the selection biases of loss-free balancing, where there are any.
    pub fn update_biases(&mut self, counts: &SelectionCounts) {
        for (layer, block) in self.layers.iter_mut().enumerate() {
            if let (Feedforward::Moe(moe), Some(counts)) = (&mut block.ffn, counts.by_layer.get(layer)) {
                moe.router.update_bias(&counts.iter().map(|&count| count as f64).collect::<Vec<_>>());
            }
        }
    }

    /// Before training: makes the tables of balanced hash layers, where there are any, from how often each token id occurs
    /// in the training text, `[V]`. The tables are saved and loaded with the parameters.
    ///
    /// # Panics
    /// If there are not as many counts as token ids.
    pub fn balance_hash_tables(&mut self, frequency_v: &[f64]) {
        for block in &mut self.layers {
            if let Feedforward::Moe(moe) = &mut block.ffn {
                moe.router.balance_table(frequency_v);
            }
        }
    }

    pub(crate) fn check(&self, ids: &[u32], batch: usize, seq: usize) -> Result<(), ForwardError> {
        let ModelConfig { vocab, context, .. } = self.config;
        if batch.checked_mul(seq) != Some(ids.len()) {
            return Err(ForwardError::BatchShape { found: ids.len(), batch, seq });
        }
        if seq > context {
            return Err(ForwardError::TooLong { found: seq, context });
        }
        match ids.iter().position(|&id| id as usize >= vocab) {
            Some(position) => Err(ForwardError::TokenId { id: ids[position], position, vocab }),
            None => Ok(()),
        }
    }
}

impl NamedParameters for Decoder {
    fn hollow(&self) -> Self {
        let device = self.device();
        let builder = Builder::new(0, &device);
        Self {
            embed: Embedding {
                weight: builder.parameter("", Role::Embedding, [1, 1], Init::Zeros),
                cell: PackCell::new(),
            },
            layers: Vec::new(),
            norm: RmsNorm::new(&RmsNormConfig { eps: 1.0, ..RmsNormConfig::new(1) }, &builder),
            head: None,
            config: self.config.clone(),
            rooms: Rooms::default(),
            roles: Roles::default(),
        }
    }

    fn for_each_cell(&self, f: &mut dyn FnMut(&PackCell)) {
        f(&self.embed.cell);
        self.head.iter().for_each(|head| f(&head.cell));
        for block in &self.layers {
            block.attention.for_each_cell(f);
            match &block.ffn {
                Feedforward::Mlp(network) => network.for_each_cell(f),
                Feedforward::Moe(moe) => moe.for_each_cell(f),
                Feedforward::Soft(soft) => soft.for_each_cell(f),
            }
        }
    }

    fn roles(&self) -> Roles {
        let layers = self.layers.iter().enumerate();
        layers.fold(self.roles.clone(), |roles, (i, block)| roles.with(&format!("layers.{i}"), &block.roles()))
    }
}
