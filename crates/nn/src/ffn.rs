//! Feed-forward networks: `down(act(gate) * up)`, as E experts behind a dispatch plan or as one network for all tokens.
//!
//! Legend: T tokens, D model width, E experts, F hidden width, N rows (token, choice pairs).
//! The dense network is the expert op with one expert that every token visits with weight 1.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use mixtura_ops::{Activation, DispatchPlan, Numerics, PackCell, WeightedRows, expert_ffn, expert_rows};
use serde::{Deserialize, Serialize};

use crate::build::Builder;
use crate::error::ConfigError;
use crate::init::Init;
use crate::role::Role;

/// Activation between the two matrices of a feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FfnActivation {
    /// `silu(gate) * up`, two matrices in.
    #[default]
    Swiglu,
    /// Gaussian error linear unit, one matrix in.
    Gelu,
    /// Rectifier, one matrix in.
    Relu,
}

impl FfnActivation {
    /// The kernels' name for it.
    pub fn kernel(self) -> Activation {
        match self {
            Self::Swiglu => Activation::SwiGlu,
            Self::Gelu => Activation::Gelu,
            Self::Relu => Activation::Relu,
        }
    }
}

/// What [`Experts`] are made of, for use outside an MoE layer.
///
/// ```
/// use std::sync::Arc;
/// use burn::tensor::{Device, Distribution, Tensor};
/// use mixtura_nn::ExpertsConfig;
/// use mixtura_ops::DispatchPlan;
/// let device = Device::default();
/// let experts = ExpertsConfig::new(2, 8, 16).init(&device).unwrap();
/// // Tokens 0 and 2 go to expert 0, tokens 1 and 2 to expert 1: rows by expert, then the rows of each token.
/// let plan = Arc::new(DispatchPlan::new(3, vec![0, 2, 4], vec![0, 2, 1, 2], vec![0, 1, 2, 4], vec![0, 2, 1, 3]));
/// let weight_n = Tensor::<1>::from_floats([1.0, 0.3, 1.0, 0.7], &device);
/// let x_td = Tensor::<2>::random([3, 8], Distribution::Normal(0.0, 1.0), &device);
/// assert_eq!(experts.forward(x_td, weight_n, &plan, Default::default()).dims(), [3, 8]);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsConfig {
    /// Networks E.
    pub experts: usize,
    /// Width D of the tokens.
    pub d_model: usize,
    /// Hidden width F.
    pub d_hidden: usize,
    /// Activation between the two matrices.
    pub activation: FfnActivation,
    /// Standard deviation of the initial way in.
    pub init_std: f64,
    /// Standard deviation of the initial way out.
    pub out_init_std: f64,
    /// What the weights are drawn from. Modules of one shape with the same seed start equal.
    pub seed: u64,
}

impl ExpertsConfig {
    /// SwiGLU networks, everything else at its default.
    pub fn new(experts: usize, d_model: usize, d_hidden: usize) -> Self {
        Self {
            experts,
            d_model,
            d_hidden,
            activation: FfnActivation::Swiglu,
            init_std: 0.02,
            out_init_std: 0.02,
            seed: 0,
        }
    }

    /// The networks, with parameters on `device`.
    ///
    /// # Errors
    /// If a size is 0.
    pub fn init(&self, device: &Device) -> Result<Experts, ConfigError> {
        let Self { experts, d_model, d_hidden, activation, init_std, out_init_std, seed } = *self;
        for (key, value) in [("experts", experts), ("d_model", d_model), ("d_hidden", d_hidden)] {
            if value == 0 {
                return Err(ConfigError::new(key, 0, "at least 1"));
            }
        }
        let shape = ExpertsShape { experts, d_model, d_hidden, activation, std: (init_std, out_init_std) };
        Ok(Experts::new(shape, Role::Expert, &Builder::new(seed, device)))
    }
}

/// E feed-forward networks of the same shape.
#[derive(Module, Debug)]
pub struct Experts {
    /// `[E, D, 2F]`, columns 0..F the gate and F..2F the up projection; `[E, D, F]` without a gate.
    pub gate_up: Param<Tensor<3>>,
    /// `[E, F, D]`.
    pub down: Param<Tensor<3>>,
    #[module(skip)]
    activation: FfnActivation,
    #[module(skip)]
    cell: PackCell,
}

/// Shape and initial scale of [`Experts`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ExpertsShape {
    pub experts: usize,
    pub d_model: usize,
    pub d_hidden: usize,
    pub activation: FfnActivation,
    /// Standard deviation of the way in and of the way out.
    pub std: (f64, f64),
}

impl Experts {
    /// `role` is [`Role::Expert`] where tokens choose or mix, [`Role::Dense`] where every token comes.
    pub(crate) fn new(shape: ExpertsShape, role: Role, builder: &Builder) -> Self {
        let ExpertsShape { experts, d_model, d_hidden, activation, std } = shape;
        let into = d_hidden * if activation.kernel().is_gated() { 2 } else { 1 };
        Self {
            gate_up: builder.parameter("gate_up", role, [experts, d_model, into], Init::TruncatedNormal(std.0)),
            down: builder.parameter("down", role, [experts, d_hidden, d_model], Init::TruncatedNormal(std.1)),
            activation,
            cell: PackCell::new(),
        }
    }

    /// `y_t = sum over the rows n of token t of weight_n * expert_e(n)(x_t)`, choices added in their order.
    ///
    /// # Shapes
    /// `[T, D]` and `[N]` give `[T, D]`.
    pub fn forward(
        &self,
        x_td: Tensor<2>,
        weight_n: Tensor<1>,
        plan: &Arc<DispatchPlan>,
        numerics: Numerics,
    ) -> Tensor<2> {
        let activation = self.activation.kernel();
        expert_ffn(x_td, self.gate_up.val(), self.down.val(), weight_n, plan, activation, &self.cell, numerics)
    }

    /// The middle of [`forward`](Self::forward), for rows that were gathered and will be combined elsewhere: expert e has the rows
    /// `row_offsets[e]..row_offsets[e + 1]` of `x_nd`.
    ///
    /// # Shapes
    /// `[N, D]` and `[N]` give `[N, D]`.
    pub fn forward_rows(
        &self,
        x_nd: Tensor<2>,
        weight_n: Tensor<1>,
        row_offsets: &Arc<[u32]>,
        numerics: Numerics,
    ) -> WeightedRows {
        let (gate_up, down, activation) = (self.gate_up.val(), self.down.val(), self.activation.kernel());
        expert_rows(x_nd, gate_up, down, weight_n, row_offsets, activation, &self.cell, numerics)
    }

    pub(crate) fn activation(&self) -> FfnActivation {
        self.activation
    }

    /// One network for every token, with weight 1: E must be 1.
    pub fn forward_dense(&self, x_td: Tensor<2>, numerics: Numerics) -> Tensor<2> {
        let [tokens, _] = x_td.dims();
        let weight_n = ones(tokens, &x_td);
        self.forward(x_td, weight_n, &Arc::new(every_token_once(tokens)), numerics)
    }

    /// Holds the room for the networks' activations.
    pub(crate) fn cell(&self) -> &PackCell {
        &self.cell
    }

    pub(crate) fn for_each_cell(&self, f: &mut dyn FnMut(&PackCell)) {
        f(&self.cell);
    }
}

/// `[n]` ones, to meet `like` in an operation.
pub(crate) fn ones(n: usize, like: &Tensor<2>) -> Tensor<1> {
    Tensor::ones([n], (&like.device(), like.dtype()))
}

/// One expert that every token visits.
pub(crate) fn every_token_once(tokens: usize) -> DispatchPlan {
    let all = tokens as u32;
    DispatchPlan::new(tokens, vec![0, all], (0..all).collect(), (0..=all).collect(), (0..all).collect())
}
