//! Soft MoE (Puigcerver et al. 2023): experts see mixtures of tokens, tokens get mixtures of what experts answer.
//!
//! ```text
//! logits_tm = scale <x_t / |x_t|, phi_m / |phi_m|>
//! slots_md  = softmax over TOKENS (logits)^T x        each slot a convex mixture of the raw tokens of its sequence
//! y_td      = softmax over SLOTS (logits) experts(slots)
//! ```
//!
//! Nothing is selected, dropped or balanced, and everything is differentiable. Every token of a sequence influences every
//! other: not causal, so this layer is for encoders and never part of a [`Decoder`](crate::Decoder).
//!
//! Legend: B sequences, T tokens of one, D width, M slots in all, expert by expert.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::activation::softmax;
use burn::tensor::{Device, Tensor};
use mixtura_ops::{DispatchPlan, Numerics, PackCell, Precision, linear, rms_norm};
use mixtura_routing::soft::soft_moe::{Mixing, NORM_EPSILON, slot_of_token};

use crate::build::Builder;
use crate::config::FfnActivation;
use crate::error::ConfigError;
use crate::ffn::{Experts, ExpertsShape};
use crate::init::Init;
use crate::parameters::NamedParameters;

/// What a Soft MoE layer is made of.
#[derive(Debug, Clone, PartialEq)]
pub struct SoftMoeConfig {
    /// Width D of the tokens.
    pub d_model: usize,
    /// Experts.
    pub experts: usize,
    /// Slots of each expert; 1 is the paper's advice, and as many slots as tokens cost what a dense layer costs.
    pub slots_per_expert: usize,
    /// Hidden width of an expert.
    pub d_expert: usize,
    /// Activation of the experts.
    pub activation: FfnActivation,
    /// Which of the two mixtures is learned; anything but `Soft` is an ablation of the paper.
    pub mixing: Mixing,
    /// Standard deviation of the initial weights.
    pub init_std: f64,
}

impl SoftMoeConfig {
    /// SwiGLU experts with one slot each.
    pub fn new(d_model: usize, experts: usize, d_expert: usize) -> Self {
        Self {
            d_model,
            experts,
            slots_per_expert: 1,
            d_expert,
            activation: FfnActivation::Swiglu,
            mixing: Mixing::Soft,
            init_std: 0.02,
        }
    }

    /// Whether every value can be built.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let sizes = [
            ("d_model", self.d_model),
            ("experts", self.experts),
            ("slots_per_expert", self.slots_per_expert),
            ("d_expert", self.d_expert),
        ];
        match sizes.iter().find(|(_, size)| *size == 0) {
            Some((key, _)) => Err(ConfigError::new(*key, 0, "at least 1")),
            None => Ok(()),
        }
    }
}

/// A Soft MoE layer.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use mixtura_nn::{SoftMoeConfig, SoftMoeLayer};
/// let device = Device::default();
/// let layer = SoftMoeLayer::new(&SoftMoeConfig::new(8, 4, 16), 7, &device).unwrap();
/// let x_btd = Tensor::<3>::random([2, 5, 8], Distribution::Normal(0.0, 1.0), &device);
/// let out = layer.forward(x_btd, Default::default());
/// assert_eq!((out.y_btd.dims(), out.combine_btm.dims()), ([2, 5, 8], [2, 5, 4]));
/// ```
#[derive(Module, Debug)]
pub struct SoftMoeLayer {
    /// One direction per slot, `[D, M]`.
    pub phi: Param<Tensor<2>>,
    /// Sharpness of the mixtures, `[1]`.
    pub scale: Param<Tensor<1>>,
    /// The networks behind the slots.
    pub experts: Experts,
    slots_per_expert: usize,
    #[module(skip)]
    mixing: Mixing,
}

/// What a Soft MoE layer answers.
#[derive(Debug, Clone)]
pub struct SoftMoeOutput {
    /// The layer's output, `[B, T, D]`.
    pub y_btd: Tensor<3>,
    /// How much of each token each slot is made of; sums to 1 over tokens. `[B, T, M]`.
    pub dispatch_btm: Tensor<3>,
    /// How much of each slot's answer each token gets; sums to 1 over slots. `[B, T, M]`.
    pub combine_btm: Tensor<3>,
}

impl SoftMoeLayer {
    /// A layer whose weights are drawn from `seed`.
    pub fn new(config: &SoftMoeConfig, seed: u64, device: &Device) -> Result<Self, ConfigError> {
        config.validate()?;
        Ok(Self::build(config, &Builder::new(seed, device)))
    }

    fn build(config: &SoftMoeConfig, builder: &Builder) -> Self {
        let SoftMoeConfig { d_model, experts, slots_per_expert, d_expert, activation, mixing, init_std } = *config;
        let shape = ExpertsShape { experts, d_model, d_hidden: d_expert, activation, std: (init_std, init_std) };
        Self {
            phi: builder.parameter("phi", [d_model, experts * slots_per_expert], Init::TruncatedNormal(init_std)),
            scale: builder.parameter("scale", [1], Init::Ones),
            experts: Experts::new(shape, &builder.at("experts")),
            slots_per_expert,
            mixing,
        }
    }

    /// Each of the `B` sequences on its own.
    ///
    /// # Shapes
    /// `[B, T, D]` gives `[B, T, D]`.
    pub fn forward(&self, x_btd: Tensor<3>, numerics: Numerics) -> SoftMoeOutput {
        let [batch, tokens, d] = x_btd.dims();
        let [_, slots] = self.phi.dims();
        let logits_btm = self.logits(x_btd.clone(), numerics);
        let (dispatch_btm, combine_btm) = self.mixtures(logits_btm);
        let slots_bmd = dispatch_btm.clone().swap_dims(1, 2).matmul(x_btd);
        let rows = batch * slots;
        let weight_n = Tensor::ones([rows], &slots_bmd.device());
        let plan = Arc::new(slots_by_expert(batch, slots, self.slots_per_expert));
        let answers = self.experts.forward(slots_bmd.reshape([rows, d]), weight_n, &plan, numerics);
        let y_btd = combine_btm.clone().matmul(answers.reshape([batch, slots, d]));
        debug_assert_eq!(y_btd.dims(), [batch, tokens, d]);
        SoftMoeOutput { y_btd, dispatch_btm, combine_btm }
    }

    /// `scale <x / |x|, phi / |phi|>`, in f32.
    fn logits(&self, x_btd: Tensor<3>, numerics: Numerics) -> Tensor<3> {
        let [batch, tokens, d] = x_btd.dims();
        let [_, slots] = self.phi.dims();
        let numerics = Numerics { precision: Precision::F32, ..numerics };
        let ones = Tensor::<1>::ones([d], &x_btd.device());
        // RMSNorm makes each row's length sqrt(D).
        let unit = |rows| rms_norm(rows, ones.clone(), (NORM_EPSILON / d as f64) as f32, numerics);
        let phi_dm = unit(self.phi.val().transpose()).transpose().div_scalar(d as f32) * self.scale.val().unsqueeze();
        let x = unit(x_btd.reshape([batch * tokens, d]));
        linear(x, phi_dm, &PackCell::new(), numerics).reshape([batch, tokens, slots])
    }

    /// Dispatch and combine, `[B, T, M]` both.
    fn mixtures(&self, logits_btm: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        let [_, tokens, slots] = logits_btm.dims();
        let even = |n: usize| logits_btm.zeros_like().add_scalar(1.0 / n.max(1) as f32);
        let over_tokens = || softmax(logits_btm.clone(), 1);
        let over_slots = || softmax(logits_btm.clone(), 2);
        match self.mixing {
            Mixing::Soft => (over_tokens(), over_slots()),
            Mixing::Uniform => (even(tokens), even(slots)),
            Mixing::UniformDispatch => (even(tokens), over_slots()),
            Mixing::UniformCombine => (over_tokens(), even(slots)),
            Mixing::Identity => {
                let mut own = vec![0.0; tokens * slots];
                (0..tokens).for_each(|t| own[t * slots + slot_of_token(t, slots)] = 1.0);
                let own = mixtura_ops::tensor_from_vec(own, [1, tokens, slots], &logits_btm.device());
                let own = logits_btm.zeros_like() + own;
                (own.clone(), own)
            }
        }
    }
}

/// Slot `m` of every sequence is a row of expert `m / per_expert`; rows sorted by (expert, sequence, slot).
fn slots_by_expert(batch: usize, slots: usize, per_expert: usize) -> DispatchPlan {
    let rows = batch * slots;
    let experts = slots / per_expert;
    let mut token_of_row = Vec::with_capacity(rows);
    let mut row_of_token = vec![0; rows];
    for expert in 0..experts {
        for sequence in 0..batch {
            for slot in expert * per_expert..(expert + 1) * per_expert {
                let token = sequence * slots + slot;
                row_of_token[token] = token_of_row.len() as u32;
                token_of_row.push(token as u32);
            }
        }
    }
    let row_offsets = (0..=experts).map(|expert| (expert * per_expert * batch) as u32).collect();
    DispatchPlan::new(rows, row_offsets, token_of_row, (0..=rows as u32).collect(), row_of_token)
}

impl NamedParameters for SoftMoeLayer {
    fn hollow(&self) -> Self {
        let device = self.phi.lazy_device();
        Self::build(&SoftMoeConfig::new(1, 1, 1), &Builder::new(0, &device))
    }

    fn clear_packs(&self) {
        self.experts.clear_packs();
    }
}
