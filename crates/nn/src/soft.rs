//! Soft layers: no token is sent anywhere; experts see mixtures of tokens, or tokens see mixtures of experts.
//!
//! | `kind` | what an expert computes | causal | independent of other sequences |
//! | --- | --- | --- | --- |
//! | `soft_moe` | slots: mixtures of a sequence's tokens | no | yes |
//! | `smear` | nothing itself: one average of all experts per sequence runs | no | yes |
//! | `lory` | as `smear`, per segment, decided by the segment before | with a uniform first segment | yes |
//! | `mixture_of_tokens` | one mixture of the tokens at one position of g sequences | yes | no |
//! | `block_causal` | slots: mixtures of all tokens of earlier blocks | yes | yes |
//!
//! [`SoftLayer`] is any of them with the shared network beside it, and what a [`Decoder`](crate::Decoder) has in place of an MoE
//! layer. There is nothing to balance: no losses, and no entry among a model's `routing`.
//!
//! Legend: T tokens (batch major), D model width.

pub mod config;
pub mod soft_moe;
pub mod merged;
pub mod tokens;
pub mod blocks;
mod running;
mod mixing;

use burn::module::{Module, Param};
use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, Tensor};
use mixtura_ops::{Numerics, PackCell, Precision, linear};
use mixtura_routing::soft::config::SoftConfig;
use mixtura_routing::soft::merge::FirstSegment;

use crate::build::Builder;
use crate::error::ConfigError;
use crate::ffn::{Experts, ExpertsShape};
use crate::init::Init;
use crate::parameters::NamedParameters;
use crate::role::{Role, Roles};
use blocks::{BlockCausalLayer, BlockPast};
use config::SoftLayerConfig;
use merged::{MergeRule, MergedLayer, MergedPast};
use soft_moe::SoftMoeLayer;
use tokens::MixtureOfTokensLayer;

/// A soft layer and the network that every token visits besides.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use mixtura_nn::{SoftConfig, SoftLayer, SoftLayerConfig};
/// let device = Device::default();
/// let soft = SoftConfig::BlockCausal { block: 4, slots_per_expert: 1 };
/// let layer = SoftLayer::new(&SoftLayerConfig { d_shared: 16, ..SoftLayerConfig::new(8, 4, 16, soft) }, 7, &device).unwrap();
/// let x_td = Tensor::<2>::random([2 * 10, 8], Distribution::Normal(0.0, 1.0), &device);
/// assert_eq!(layer.forward(x_td, 2, 10, Default::default()).dims(), [20, 8]);
/// ```
#[derive(Module, Debug)]
pub struct SoftLayer {
    /// The soft part; its parameters are named after the variant: `soft.blocks.phi`.
    pub mixer: SoftMixer,
    /// The network that every token visits.
    pub shared: Option<Experts>,
    /// Gate of the shared network, `[D, 1]`.
    pub shared_gate: Option<Param<Tensor<2>>>,
    #[module(skip)]
    config: SoftConfig,
    #[module(skip)]
    shared_gate_cell: PackCell,
    #[module(skip)]
    roles: Roles,
}

/// The soft part of a [`SoftLayer`].
#[derive(Module, Debug)]
pub enum SoftMixer {
    /// Soft MoE.
    Slots(SoftMoeLayer),
    /// SMEAR and Lory.
    Merged(MergedLayer),
    /// Mixture of Tokens.
    Tokens(MixtureOfTokensLayer),
    /// Block-causal Soft MoE.
    Blocks(BlockCausalLayer),
}

/// What decoding remembers of one sequence in one layer; nothing for layers that need no past.
#[derive(Debug, Clone, Default)]
pub(crate) struct SoftPast {
    merged: MergedPast,
    blocks: BlockPast,
}

impl SoftLayer {
    /// A layer whose weights are drawn from `seed`.
    ///
    /// # Errors
    /// If a size is 0, or a block-causal layer has no shared network.
    pub fn new(config: &SoftLayerConfig, seed: u64, device: &Device) -> Result<Self, ConfigError> {
        for (key, value) in [("d_model", config.d_model), ("experts", config.experts), ("d_expert", config.d_expert)] {
            if value == 0 {
                return Err(ConfigError::new(key, 0, "at least 1"));
            }
        }
        config::validate(&config.soft.with_future(), config.d_shared > 0)?;
        Ok(Self::build(config, &Builder::new(seed, device)))
    }

    pub(crate) fn build(config: &SoftLayerConfig, builder: &Builder) -> Self {
        let SoftLayerConfig { d_model, experts, d_expert, d_shared, activation, init_std, out_init_std, .. } = *config;
        let network = |experts, d_hidden| {
            let std = (init_std, out_init_std);
            ExpertsShape { experts, d_model, d_hidden, activation, std }
        };
        let shape = network(experts, d_expert);
        let merged = |rule| SoftMixer::Merged(MergedLayer::new(shape, rule, &builder.at("merged")));
        let mixer = match config.soft {
            SoftConfig::SoftMoe { slots_per_expert, mixing, .. } => {
                SoftMixer::Slots(SoftMoeLayer::of(shape, slots_per_expert, mixing, &builder.at("slots")))
            }
            SoftConfig::Smear { .. } => merged(MergeRule::Sequence),
            SoftConfig::Lory { segment, first_segment, .. } => {
                merged(MergeRule::Segments { length: segment, first: first_segment })
            }
            SoftConfig::MixtureOfTokens { group, temperature, emit } => {
                SoftMixer::Tokens(MixtureOfTokensLayer::new(shape, group, temperature, emit, &builder.at("tokens")))
            }
            SoftConfig::BlockCausal { block, slots_per_expert } => {
                SoftMixer::Blocks(BlockCausalLayer::new(shape, block, slots_per_expert, &builder.at("blocks")))
            }
        };
        let gate = || builder.parameter("shared_gate", Role::Gate, [d_model, 1], Init::TruncatedNormal(init_std));
        Self {
            mixer,
            shared: (d_shared > 0).then(|| Experts::new(network(1, d_shared), Role::Dense, &builder.at("shared"))),
            shared_gate: (config.shared_gate && d_shared > 0).then(gate),
            config: config.soft,
            shared_gate_cell: PackCell::new(),
            roles: builder.roles(),
        }
    }

    /// Which soft layer it is.
    pub fn config(&self) -> &SoftConfig {
        &self.config
    }

    /// `batch` sequences of `seq` tokens.
    ///
    /// # Shapes
    /// `[T, D]` gives `[T, D]`, `T = batch seq`.
    ///
    /// # Panics
    /// If `x_td` has another number of rows.
    pub fn forward(&self, x_td: Tensor<2>, batch: usize, seq: usize, numerics: Numerics) -> Tensor<2> {
        let [tokens, d] = x_td.dims();
        assert_eq!(tokens, batch * seq, "SoftLayer: {tokens} rows for {batch} sequences of {seq} tokens");
        if tokens == 0 {
            return x_td;
        }
        let x = x_td.clone();
        let y_td = match &self.mixer {
            SoftMixer::Slots(layer) => layer.forward(x.reshape([batch, seq, d]), numerics).y_btd.reshape([tokens, d]),
            SoftMixer::Merged(layer) => layer.forward(x, batch, seq, numerics),
            SoftMixer::Tokens(layer) => layer.forward(x, batch, seq, numerics),
            SoftMixer::Blocks(layer) => layer.forward(x, batch, seq, numerics),
        };
        self.with_shared(y_td, x_td, numerics)
    }

    /// New tokens of one sequence, whose earlier ones `past` has seen: the same bits as [`forward`](Self::forward) over the
    /// whole sequence. The layer must be causal.
    pub(crate) fn decode(&self, x_td: Tensor<2>, past: &mut SoftPast, numerics: Numerics) -> Tensor<2> {
        let [tokens, _] = x_td.dims();
        if tokens == 0 {
            return x_td;
        }
        let x = x_td.clone();
        let y_td = match &self.mixer {
            SoftMixer::Slots(_) => unreachable!("decoding asks first whether the layer is causal"),
            SoftMixer::Merged(layer) => layer.decode(x, &mut past.merged, numerics),
            SoftMixer::Tokens(layer) => layer.forward(x, 1, tokens, numerics),
            SoftMixer::Blocks(layer) => layer.decode(x, &mut past.blocks, numerics),
        };
        self.with_shared(y_td, x_td, numerics)
    }

    /// Makes `past` forget all but the first `tokens` tokens of width `d`.
    pub(crate) fn truncate(config: &SoftConfig, past: &mut SoftPast, tokens: usize, d: usize) {
        match *config {
            SoftConfig::Lory { segment, .. } => past.merged.truncate(tokens, d, segment),
            SoftConfig::BlockCausal { block, .. } => past.blocks.truncate(tokens, d, block),
            SoftConfig::SoftMoe { .. } | SoftConfig::Smear { .. } | SoftConfig::MixtureOfTokens { .. } => {}
        }
    }

    /// The networks of the layer, the shared one last.
    pub(crate) fn networks(&self) -> Vec<&Experts> {
        let experts = match &self.mixer {
            SoftMixer::Slots(layer) => &layer.experts,
            SoftMixer::Merged(layer) => &layer.experts,
            SoftMixer::Tokens(layer) => &layer.experts,
            SoftMixer::Blocks(layer) => &layer.experts,
        };
        std::iter::once(experts).chain(&self.shared).collect()
    }

    fn with_shared(&self, y_td: Tensor<2>, x_td: Tensor<2>, numerics: Numerics) -> Tensor<2> {
        let Some(shared) = &self.shared else { return y_td };
        let shared_td = shared.forward_dense(x_td.clone(), numerics);
        let Some(gate) = &self.shared_gate else { return y_td + shared_td };
        let exact = Numerics { precision: Precision::F32, ..numerics };
        y_td + shared_td * sigmoid(linear(x_td, gate.val(), &self.shared_gate_cell, exact))
    }
}

impl NamedParameters for SoftLayer {
    fn hollow(&self) -> Self {
        let device = match &self.mixer {
            SoftMixer::Slots(layer) => layer.phi.lazy_device(),
            SoftMixer::Merged(layer) => layer.router.lazy_device(),
            SoftMixer::Tokens(layer) => layer.router.lazy_device(),
            SoftMixer::Blocks(layer) => layer.phi.lazy_device(),
        };
        let smallest = SoftLayerConfig::new(
            1,
            1,
            1,
            SoftConfig::Lory { segment: 1, first_segment: FirstSegment::Uniform, allow_future: false },
        );
        Self::build(&smallest, &Builder::new(0, &device))
    }

    fn for_each_cell(&self, f: &mut dyn FnMut(&PackCell)) {
        match &self.mixer {
            SoftMixer::Slots(layer) => layer.for_each_cell(f),
            SoftMixer::Merged(layer) => layer.for_each_cell(f),
            SoftMixer::Tokens(layer) => layer.for_each_cell(f),
            SoftMixer::Blocks(layer) => layer.for_each_cell(f),
        }
        self.shared.iter().for_each(|shared| shared.for_each_cell(f));
        f(&self.shared_gate_cell);
    }

    fn roles(&self) -> Roles {
        self.roles.clone()
    }
}
