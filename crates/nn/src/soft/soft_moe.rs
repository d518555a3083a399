//! Soft MoE (Puigcerver et al. 2023): experts see mixtures of tokens, tokens get mixtures of what experts answer.
//!
//! ```text
//! logits_tm = scale <x_t / |x_t|, phi_m / |phi_m|>
//! slots_md  = softmax over TOKENS (logits)^T x        each slot a convex mixture of the raw tokens of its sequence
//! y_td      = softmax over SLOTS (logits) experts(slots)
//! ```
//!
//! Nothing is selected, dropped or balanced, and everything is differentiable. Every token of a sequence influences every
//! other: not causal, so this layer is for encoders; a [`Decoder`](crate::Decoder) takes it only with `allow_future`.
//!
//! Legend: B sequences, T tokens of one, D width, M slots in all, expert by expert.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use mixtura_ops::{DispatchPlan, Numerics, PackCell, Precision, linear, rms_norm};
use mixtura_routing::soft::soft_moe::{Mixing, NORM_EPSILON, slot_of_token};

use super::mixing::{Groups, mix, softmax_members, softmax_rows, unmix};
use crate::build::Builder;
use crate::error::ConfigError;
use crate::ffn::{Experts, ExpertsShape, FfnActivation, ones};
use crate::init::Init;
use crate::parameters::NamedParameters;
use crate::role::{Role, Roles};

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
    #[module(skip)]
    roles: Roles,
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
        Self::of(shape, slots_per_expert, mixing, builder)
    }

    pub(crate) fn of(shape: ExpertsShape, slots_per_expert: usize, mixing: Mixing, builder: &Builder) -> Self {
        let init = Init::TruncatedNormal(shape.std.0);
        Self {
            phi: builder.parameter("phi", Role::Mixture, [shape.d_model, shape.experts * slots_per_expert], init),
            scale: builder.parameter("scale", Role::Mixture, [1], Init::Ones),
            experts: Experts::new(shape, Role::Expert, &builder.at("experts")),
            slots_per_expert,
            mixing,
            roles: builder.roles(),
        }
    }

    /// Each of the `B` sequences on its own.
    ///
    /// # Shapes
    /// `[B, T, D]` gives `[B, T, D]`.
    pub fn forward(&self, x_btd: Tensor<3>, numerics: Numerics) -> SoftMoeOutput {
        let [batch, tokens, d] = x_btd.dims();
        let [_, slots] = self.phi.dims();
        let x_td = x_btd.reshape([batch * tokens, d]);
        let sequences = Arc::new(Groups::runs(batch, tokens, tokens, 0));
        let logits_tm = slot_logits(x_td.clone(), self.phi.val(), self.scale.val(), numerics);
        let (dispatch_tm, combine_tm) = self.mixtures(logits_tm, tokens, &sequences);
        let slots_bmd = mix(x_td, dispatch_tm.clone(), &sequences);
        let weight_n = ones(batch * slots, &slots_bmd);
        let plan = Arc::new(slots_by_expert(batch, slots, self.slots_per_expert));
        let answers_bmd = self.experts.forward(slots_bmd, weight_n, &plan, numerics);
        let y_td = unmix(combine_tm.clone(), answers_bmd, &sequences);
        SoftMoeOutput {
            y_btd: y_td.reshape([batch, tokens, d]),
            dispatch_btm: dispatch_tm.reshape([batch, tokens, slots]),
            combine_btm: combine_tm.reshape([batch, tokens, slots]),
        }
    }

    /// Dispatch and combine for sequences of `tokens` tokens, `[B T, M]` both.
    fn mixtures(&self, logits_tm: Tensor<2>, tokens: usize, sequences: &Arc<Groups>) -> (Tensor<2>, Tensor<2>) {
        let [all, slots] = logits_tm.dims();
        let even = |n: usize| logits_tm.zeros_like().add_scalar(1.0 / n.max(1) as f32);
        let over_tokens = || softmax_members(logits_tm.clone(), sequences);
        let over_slots = || softmax_rows(logits_tm.clone());
        match self.mixing {
            Mixing::Soft => (over_tokens(), over_slots()),
            Mixing::Uniform => (even(tokens), even(slots)),
            Mixing::UniformDispatch => (even(tokens), over_slots()),
            Mixing::UniformCombine => (over_tokens(), even(slots)),
            Mixing::Identity => {
                let mut own = vec![0.0; all * slots];
                (0..all).for_each(|t| own[t * slots + slot_of_token(t % tokens, slots)] = 1.0);
                let own = mixtura_ops::tensor_like(own, [all, slots], &logits_tm);
                (own.clone(), own)
            }
        }
    }
}

/// `scale <x / |x|, phi / |phi|>`, in f32.
///
/// # Shapes
/// `[T, D]` and `[D, M]` give `[T, M]`.
pub(crate) fn slot_logits(x_td: Tensor<2>, phi_dm: Tensor<2>, scale: Tensor<1>, numerics: Numerics) -> Tensor<2> {
    let [_, d] = x_td.dims();
    let numerics = Numerics { precision: Precision::F32, ..numerics };
    let ones = ones(d, &x_td);
    // RMSNorm makes each row's length sqrt(D).
    let unit = |rows| rms_norm(rows, ones.clone(), (NORM_EPSILON / d as f64) as f32, numerics);
    let directions_dm = unit(phi_dm.transpose()).transpose().div_scalar(d as f32) * scale.unsqueeze();
    linear(unit(x_td), directions_dm, &PackCell::new(), numerics)
}

/// Slot `m` of every sequence is a row of expert `m / per_expert`; rows sorted by (expert, sequence, slot).
pub(crate) fn slots_by_expert(batch: usize, slots: usize, per_expert: usize) -> DispatchPlan {
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

    fn for_each_cell(&self, f: &mut dyn FnMut(&PackCell)) {
        self.experts.for_each_cell(f);
    }

    fn roles(&self) -> Roles {
        self.roles.clone()
    }
}
