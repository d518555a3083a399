//! Feed-forward networks: `down(act(gate) * up)`, as E experts behind a dispatch plan or as one network for all tokens.
//!
//! Legend: T tokens, D model width, E experts, F hidden width, N rows (token, choice pairs).
//! The dense network is the expert op with one expert that every token visits with weight 1.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use mixtura_ops::{DispatchPlan, Numerics, PackCell, WeightedRows, expert_ffn, expert_rows};

use crate::build::Builder;
use crate::config::FfnActivation;
use crate::init::Init;
use crate::role::Role;

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

    pub(crate) fn clear_packs(&self) {
        self.cell.clear();
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
