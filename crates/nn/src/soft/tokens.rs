//! Mixture of Tokens (Antoniak et al. 2023): tokens at the same position of g sequences form a group, and every expert computes
//! one mixture of the group.
//!
//! ```text
//! w_te = softmax over the GROUP (x_t C / temperature)       sums to 1 over the group's tokens, not over experts
//! y_t  = sum over e of w_te expert_e(sum over t' of the group of w_t'e x_t')
//! ```
//!
//! Causal, but what a sequence gets depends on the sequences beside it: evaluation depends on the batch. A batch of one, which
//! is how text is generated, has w = 1 and runs all experts on every token.
//!
//! Legend: T tokens, D width, E experts, G groups.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use mixtura_ops::{Numerics, PackCell, Precision, linear};
use mixtura_routing::soft::config::Emit;

use super::mixing::{Groups, mix, softmax_members, softmax_rows, unmix};
use super::soft_moe::slots_by_expert;
use crate::build::Builder;
use crate::ffn::{Experts, ExpertsShape, ones};
use crate::init::Init;
use crate::role::Role;

/// A Mixture-of-Tokens layer.
#[derive(Module, Debug)]
pub struct MixtureOfTokensLayer {
    /// The controller, `[D, E]`.
    pub router: Param<Tensor<2>>,
    /// The networks that compute the mixtures.
    pub experts: Experts,
    #[module(skip)]
    rules: Rules,
    #[module(skip)]
    cell: PackCell,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Rules {
    group: usize,
    temperature: f64,
    emit: Emit,
}

impl MixtureOfTokensLayer {
    pub(crate) fn new(shape: ExpertsShape, group: usize, temperature: f64, emit: Emit, builder: &Builder) -> Self {
        let init = Init::TruncatedNormal(shape.std.0);
        Self {
            router: builder.parameter("router", Role::Router, [shape.d_model, shape.experts], init),
            experts: Experts::new(shape, Role::Expert, &builder.at("experts")),
            rules: Rules { group, temperature, emit },
            cell: PackCell::new(),
        }
    }

    /// `batch` sequences of `seq` tokens, grouped in their order.
    ///
    /// # Shapes
    /// `[T, D]` gives `[T, D]`.
    pub(crate) fn forward(&self, x_td: Tensor<2>, batch: usize, seq: usize, numerics: Numerics) -> Tensor<2> {
        let Rules { group, temperature, emit } = self.rules;
        let [_, experts] = self.router.dims();
        let starts = (0..batch).step_by(group).flat_map(|b| (0..seq).map(move |position| (b, position)));
        let of = |(b, position): (usize, usize)| (b..(b + group).min(batch)).map(move |b| b * seq + position);
        let groups = Arc::new(Groups::new(batch * seq, starts.map(of)));

        let exact = Numerics { precision: Precision::F32, ..numerics };
        let logits_te = linear(x_td.clone(), self.router.val(), &self.cell, exact).div_scalar(temperature as f32);
        let merge_te = softmax_members(logits_te.clone(), &groups);
        let mixed_ged = mix(x_td, merge_te.clone(), &groups);
        let plan = Arc::new(slots_by_expert(groups.len(), experts, 1));
        let weight_n = ones(groups.len() * experts, &mixed_ged);
        let answers_ged = self.experts.forward(mixed_ged, weight_n, &plan, numerics);
        let emit_te = match emit {
            Emit::Merge => merge_te,
            Emit::Experts => softmax_rows(logits_te),
        };
        unmix(emit_te, answers_ged, &groups)
    }

    pub(crate) fn for_each_cell(&self, f: &mut dyn FnMut(&PackCell)) {
        self.experts.for_each_cell(f);
        f(&self.cell);
    }
}
