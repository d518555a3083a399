//! Block-causal Soft MoE (a design of this project): the slots of a block are Soft MoE mixtures of all tokens of earlier blocks.
//!
//! ```text
//! logits_tm = scale <x_t / |x_t|, phi_m / |phi_m|>                   f32, as in Soft MoE
//! slots of block b = softmax over the tokens of blocks < b (logits)^T x      kept as a running softmax
//! y_t = softmax over SLOTS (logits_t) experts(slots of t's block)    0 in block 0
//! ```
//!
//! Strictly causal, independent of other sequences, everything differentiable. The experts run once per block on M slots, so M
//! near the block's length costs what a dense layer costs.
//!
//! Legend: T tokens, D width, M slots in all, expert by expert.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use mixtura_ops::{Numerics, PackCell, tensor_like, with_slice};

use super::mixing::{Groups, softmax_rows, unmix};
use super::running::{Running, past_slots};
use super::soft_moe::{slot_logits, slots_by_expert};
use crate::build::Builder;
use crate::ffn::{Experts, ExpertsShape, ones};
use crate::init::Init;
use crate::role::Role;

/// A block-causal Soft MoE layer.
#[derive(Module, Debug)]
pub struct BlockCausalLayer {
    /// One direction per slot, `[D, M]`.
    pub phi: Param<Tensor<2>>,
    /// Sharpness of the mixtures, `[1]`.
    pub scale: Param<Tensor<1>>,
    /// The networks behind the slots.
    pub experts: Experts,
    block: usize,
    slots_per_expert: usize,
}

impl BlockCausalLayer {
    pub(crate) fn new(shape: ExpertsShape, block: usize, slots_per_expert: usize, builder: &Builder) -> Self {
        let init = Init::TruncatedNormal(shape.std.0);
        Self {
            phi: builder.parameter("phi", Role::Mixture, [shape.d_model, shape.experts * slots_per_expert], init),
            scale: builder.parameter("scale", Role::Mixture, [1], Init::Ones),
            experts: Experts::new(shape, Role::Expert, &builder.at("experts")),
            block,
            slots_per_expert,
        }
    }

    /// `batch` sequences of `seq` tokens, at least one of each.
    ///
    /// # Shapes
    /// `[T, D]` gives `[T, D]`.
    pub(crate) fn forward(&self, x_td: Tensor<2>, batch: usize, seq: usize, numerics: Numerics) -> Tensor<2> {
        let later = Arc::new(Groups::runs(batch, seq, self.block, 1));
        if later.len() == 0 {
            return x_td.zeros_like();
        }
        let logits_tm = self.logits(x_td.clone(), numerics);
        let slots_bmd = past_slots(x_td, logits_tm.clone(), seq, self.block);
        unmix(softmax_rows(logits_tm), self.answers(slots_bmd, numerics), &later)
    }

    fn logits(&self, x_td: Tensor<2>, numerics: Numerics) -> Tensor<2> {
        slot_logits(x_td, self.phi.val(), self.scale.val(), numerics)
    }

    /// What the experts make of the slots of some blocks, `[blocks M, D]` both.
    fn answers(&self, slots_bmd: Tensor<2>, numerics: Numerics) -> Tensor<2> {
        let ([rows, _], [_, slots]) = (slots_bmd.dims(), self.phi.dims());
        let weight_n = ones(rows, &slots_bmd);
        let plan = Arc::new(slots_by_expert(rows / slots, slots, self.slots_per_expert));
        self.experts.forward(slots_bmd, weight_n, &plan, numerics)
    }

    /// New tokens of one sequence, whose earlier ones `past` holds and which join it. Slots change at block boundaries only.
    pub(crate) fn decode(&self, x_td: Tensor<2>, past: &mut BlockPast, numerics: Numerics) -> Tensor<2> {
        let [tokens, d] = x_td.dims();
        let mut parts = Vec::new();
        let mut done = 0;
        while done < tokens {
            let at = past.inputs.len() / d;
            let take = (self.block - at % self.block).min(tokens - done);
            let part_td = x_td.clone().narrow(0, done, take);
            parts.push(if at < self.block {
                part_td.zeros_like()
            } else {
                let answers_md = self.answers_for(at / self.block, past, &x_td, numerics);
                let probs_tm = softmax_rows(self.logits(part_td.clone(), numerics));
                unmix(probs_tm, answers_md, &Arc::new(Groups::runs(1, take, take, 0)))
            });
            with_slice(&part_td, |part| past.inputs.extend_from_slice(part));
            done += take;
        }
        Tensor::cat(parts, 0)
    }

    /// What block `block` reads, made when its first token comes.
    fn answers_for(&self, block: usize, past: &mut BlockPast, like: &Tensor<2>, numerics: Numerics) -> Tensor<2> {
        let ([_, d], [_, slots]) = (like.dims(), self.phi.dims());
        let state = past.state.take().filter(|state| state.blocks <= block);
        let mut state =
            state.unwrap_or_else(|| BlockState { blocks: 0, running: Running::new(slots, d), answers: None });
        while state.blocks < block {
            let rows = state.blocks * self.block * d..(state.blocks + 1) * self.block * d;
            let x_td = tensor_like(past.inputs[rows].to_vec(), [self.block, d], like);
            let logits_tm = self.logits(x_td.clone(), numerics);
            with_slice(&x_td, |x| with_slice(&logits_tm, |logits| state.running.add(x, logits)));
            state.blocks += 1;
            state.answers = None;
        }
        let make = || self.answers(tensor_like(state.running.slots(), [slots, d], like), numerics);
        let answers_md = state.answers.take().unwrap_or_else(make);
        state.answers = Some(answers_md.clone());
        past.state = Some(state);
        answers_md
    }

    pub(crate) fn for_each_cell(&self, f: &mut dyn FnMut(&PackCell)) {
        self.experts.for_each_cell(f);
    }
}

/// One sequence under decoding: its inputs to the layer, and what follows from the completed blocks.
#[derive(Debug, Clone, Default)]
pub(crate) struct BlockPast {
    inputs: Vec<f32>,
    state: Option<BlockState>,
}

#[derive(Debug, Clone)]
struct BlockState {
    /// Blocks in `running`.
    blocks: usize,
    running: Running,
    /// What the experts make of the slots after these blocks, `[M, D]`.
    answers: Option<Tensor<2>>,
}

impl BlockPast {
    /// Running sums cannot be taken back: if a summed block loses tokens, they are summed again from the inputs.
    pub fn truncate(&mut self, tokens: usize, d: usize, block: usize) {
        self.inputs.truncate(tokens * d);
        self.state.take_if(|state| state.blocks * block > tokens);
    }
}
