//! A decoder-only language model: embedding, L blocks, final norm, output projection.
//!
//! ```text
//! x = embed[ids]
//! each block:  x = x + attention(norm(x));  x = x + ffn(norm(x))       ffn: MoE layer, soft layer or one dense network
//! logits = norm(x) W_head                                              W_head untied, or the transposed embedding
//! ```
//!
//! Training takes the loss without ever holding the logits. Decoding with a cache gives the same bits as a forward pass
//! over the whole sequence, because no row of any operation depends on the rows computed with it.
//!
//! Legend: T tokens (batch major), D model width, V vocabulary.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use mixtura_ops::{Numerics, PackCell, embedding, linear, linear_cross_entropy, linear_tied};
use mixtura_routing::soft::config::SoftConfig;

use crate::attention::Attention;
use crate::build::Builder;
use crate::checkpoint::Rooms;
use crate::config::{LayerFfn, ModelConfig};
use crate::context::{ForwardContext, SelectionCounts};
use crate::error::{ConfigError, ForwardError};
use crate::ffn::{Experts, ExpertsShape};
use crate::init::Init;
use crate::moe::{MoeLayer, MoeOutput};
use crate::norm::RmsNorm;
use crate::parameters::NamedParameters;
use crate::role::{Role, Roles};
use crate::router::LayerRouting;
use crate::soft::{SoftLayer, SoftPast};

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
    cell: PackCell,
}

/// The output projection.
#[derive(Module, Debug)]
pub struct Head {
    /// `[D, V]`.
    pub weight: Param<Tensor<2>>,
    #[module(skip)]
    cell: PackCell,
}

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

/// What decoding new tokens gives.
#[derive(Debug, Clone)]
pub struct DecodeOutput {
    /// Logits, `[T, V]` of all new tokens or `[1, V]` of the last.
    pub logits: Tensor<2>,
    /// By MoE layer, in order.
    pub routing: Vec<LayerRouting>,
}

/// Keys and values of one sequence, layer by layer, and what soft layers remember of it.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<mixtura_ops::KvCache>,
    soft: Vec<SoftPast>,
    /// The soft layers' kind and the model's width; `None` without any.
    soft_kind: Option<(SoftConfig, usize)>,
    tokens: usize,
    capacity: usize,
}

impl KvCache {
    /// Tokens held.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Most tokens it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets everything after the first `tokens` tokens.
    pub fn truncate(&mut self, tokens: usize) {
        self.tokens = self.tokens.min(tokens);
        self.layers.iter_mut().for_each(|layer| layer.truncate(tokens));
        if let Some((config, d)) = self.soft_kind {
            self.soft.iter_mut().for_each(|past| SoftLayer::truncate(&config, past, tokens, d));
        }
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
            norm: RmsNorm::new(d, eps, &builder.at("norm")),
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
        let mut x_td = embedding(self.embed.weight.val(), ids);
        let mut routing = Vec::new();
        for (layer, block) in self.layers.iter().enumerate() {
            x_td = if context.checkpoint_activations && x_td.is_autodiff() && x_td.dims()[0] > 0 {
                block.forward_checkpointed(x_td, layer, &context, &self.rooms, &mut routing)?
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
        let routers = self.layers.iter().enumerate().filter_map(|(layer, block)| match &block.ffn {
            Feedforward::Moe(moe) => Some((layer, &moe.router)),
            Feedforward::Mlp(_) | Feedforward::Soft(_) => None,
        });
        let mut routing = Vec::new();
        let Some((last, router)) = routers.last() else { return Ok(routing) };
        let mut x_td = embedding(self.embed.weight.val(), ids);
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

    /// An empty cache for up to `capacity` tokens (at most the context).
    pub fn cache(&self, capacity: usize) -> KvCache {
        let capacity = capacity.min(self.config.context);
        let layers = self.layers.iter().map(|block| mixtura_ops::KvCache::new(&block.attention.spec(1, 1)));
        let soft_kind = self.config.moe.as_ref().and_then(|moe| moe.soft).map(|soft| (soft, self.config.d_model));
        let soft = vec![SoftPast::default(); self.layers.len()];
        KvCache { layers: layers.collect(), soft, soft_kind, tokens: 0, capacity }
    }

    /// Appends `ids` to the sequence in `cache` and gives the logits of all of them. Needs a model without autodiff.
    pub fn decode(
        &self,
        ids: &[u32],
        cache: &mut KvCache,
        context: &ForwardContext,
    ) -> Result<DecodeOutput, ForwardError> {
        let DecoderOutput { hidden_td, routing } = self.decode_hidden(ids, cache, context)?;
        Ok(DecodeOutput { logits: self.project(hidden_td, context.numerics), routing })
    }

    /// As [`decode`](Self::decode), projecting the last token only.
    pub fn decode_last(
        &self,
        ids: &[u32],
        cache: &mut KvCache,
        context: &ForwardContext,
    ) -> Result<DecodeOutput, ForwardError> {
        let DecoderOutput { hidden_td, routing } = self.decode_hidden(ids, cache, context)?;
        let [tokens, _] = hidden_td.dims();
        let last_td = hidden_td.narrow(0, tokens.saturating_sub(1), tokens.min(1));
        Ok(DecodeOutput { logits: self.project(last_td, context.numerics), routing })
    }

    fn decode_hidden(
        &self,
        ids: &[u32],
        cache: &mut KvCache,
        context: &ForwardContext,
    ) -> Result<DecoderOutput, ForwardError> {
        self.check(ids, 1, ids.len())?;
        if cache.layers.len() != self.layers.len() {
            let layers = |n| format!("{n} layers");
            return Err(ForwardError::Cache { found: layers(cache.layers.len()), expected: layers(self.layers.len()) });
        }
        let leaking = |(layer, block): (usize, &Block)| match &block.ffn {
            Feedforward::Soft(soft) => soft.config().leak().map(|_| (layer, soft.config().kind())),
            Feedforward::Mlp(_) | Feedforward::Moe(_) => None,
        };
        if let Some((layer, kind)) = self.layers.iter().enumerate().find_map(leaking) {
            return Err(ForwardError::Future { layer, kind });
        }
        let found = cache.tokens + ids.len();
        if found > cache.capacity {
            return Err(ForwardError::TooLong { found, context: cache.capacity });
        }
        let ids: Arc<[u32]> = ids.into();
        let context = ForwardContext { ids: Some(ids.clone()), kept: None, ..context.clone() };
        let mut x_td = embedding(self.embed.weight.val(), ids);
        let mut routing = Vec::new();
        let pasts = cache.layers.iter_mut().zip(&mut cache.soft);
        for (layer, (block, (cache, past))) in self.layers.iter().zip(pasts).enumerate() {
            let normed_td = block.attention_norm.forward(x_td.clone(), context.numerics);
            x_td = x_td + block.attention.decode(normed_td, cache, context.numerics);
            x_td = block.feed(x_td, layer, &context, Some(past), &mut routing)?;
        }
        cache.tokens = found;
        Ok(DecoderOutput { hidden_td: self.norm.forward(x_td, context.numerics), routing })
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

    fn check(&self, ids: &[u32], batch: usize, seq: usize) -> Result<(), ForwardError> {
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

impl Block {
    fn new(config: &ModelConfig, layer: usize, builder: &Builder) -> Result<Self, ConfigError> {
        let ModelConfig { d_model, norm_eps, activation, init_std, .. } = *config;
        let out_std = config.out_init_std();
        let ffn = match (config.layer_ffn(layer)?, config.moe_layer(layer)?, config.soft_layer(layer)?) {
            (_, Some(layer), _) => Feedforward::Moe(MoeLayer::build(&layer, &builder.at("moe"))?),
            (_, _, Some(layer)) => Feedforward::Soft(SoftLayer::build(&layer, &builder.at("soft"))),
            (LayerFfn::Moe { d_expert: d_hidden, .. } | LayerFfn::Dense { d_dense: d_hidden }, ..) => {
                let shape = ExpertsShape { experts: 1, d_model, d_hidden, activation, std: (init_std, out_std) };
                Feedforward::Mlp(Experts::new(shape, Role::Dense, &builder.at("mlp")))
            }
        };
        Ok(Self {
            attention_norm: RmsNorm::new(d_model, norm_eps, &builder.at("attention_norm")),
            attention: Attention::new(config, out_std, &builder.at("attention")),
            ffn_norm: RmsNorm::new(d_model, norm_eps, &builder.at("ffn_norm")),
            ffn,
            roles: builder.roles(),
        })
    }

    /// The roles of the layer's parameters. Its feed-forward part may have been another model's, and says its own.
    fn roles(&self) -> Roles {
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
    fn attend(&self, x_td: Tensor<2>, context: &ForwardContext) -> Tensor<2> {
        let seq = context.sequence;
        let batch = x_td.dims()[0] / seq.max(1);
        let normed_td = self.attention_norm.forward(x_td.clone(), context.numerics);
        x_td + self.attention.forward(normed_td, batch, seq, context.numerics)
    }

    /// The second half of a layer, residual included. `past` is what decoding remembers; without one, `x_td` holds whole
    /// sequences.
    fn feed(
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
            norm: RmsNorm::new(1, 1.0, &builder),
            head: None,
            config: self.config.clone(),
            rooms: Rooms::default(),
            roles: Roles::default(),
        }
    }

    fn roles(&self) -> Roles {
        let layers = self.layers.iter().enumerate();
        layers.fold(self.roles.clone(), |roles, (i, block)| roles.with(&format!("layers.{i}"), &block.roles()))
    }

    fn clear_packs(&self) {
        self.embed.cell.clear();
        self.head.iter().for_each(|head| head.cell.clear());
        for block in &self.layers {
            block.attention.clear_packs();
            match &block.ffn {
                Feedforward::Mlp(network) => network.clear_packs(),
                Feedforward::Moe(moe) => moe.clear_packs(),
                Feedforward::Soft(soft) => soft.clear_packs(),
            }
        }
    }
}
