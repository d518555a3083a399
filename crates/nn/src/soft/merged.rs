//! Experts merged in parameter space: SMEAR (one merged expert per sequence) and Lory (one per segment).
//!
//! ```text
//! w_s = softmax(mean(x over segment s) W_router)            f32
//! theta_s = sum over experts of w'_se theta_e               SMEAR: w' = w;  Lory: w'_s = w_(s-1), w'_0 uniform
//! y_t = expert with parameters theta_s(t) (x_t)
//! ```
//!
//! Merging is one matrix product per weight; the S merged experts then run as S experts of the expert op, each on the tokens
//! of its segment. The merged weights of a step are kept for its backward pass: S experts' worth of memory.
//!
//! A language model uses Lory with a uniform first segment, which is strictly causal. The paper decides once per prompt in
//! inference; here every pass, generation included, merges segment by segment, so that what was trained and evaluated is what
//! generates.
//!
//! Legend: T tokens, D width, E experts, F hidden width, S segments of all sequences.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor, TensorData};
use mixtura_ops::{DispatchPlan, Numerics, PackCell, Precision, expert_ffn, linear, tensor_like};
use mixtura_routing::soft::merge::FirstSegment;

use super::mixing::{Groups, mix, softmax_rows};
use crate::build::Builder;
use crate::ffn::{Experts, ExpertsShape, every_token_once, ones};
use crate::init::Init;
use crate::role::Role;

/// A layer whose experts are averaged before they run.
#[derive(Module, Debug)]
pub struct MergedLayer {
    /// From a segment's mean to merge logits, `[D, E]`.
    pub router: Param<Tensor<2>>,
    /// What is averaged.
    pub experts: Experts,
    #[module(skip)]
    rule: MergeRule,
    #[module(skip)]
    router_cell: PackCell,
    #[module(skip)]
    gate_up_cell: PackCell,
    #[module(skip)]
    down_cell: PackCell,
}

/// Which tokens decide about a merged expert.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum MergeRule {
    /// All of the sequence.
    Sequence,
    /// Those of the segment before.
    Segments { length: usize, first: FirstSegment },
}

/// Experts after merging, one per segment.
#[derive(Debug, Clone)]
struct MergedExperts {
    gate_up_sdf: Tensor<3>,
    down_sfd: Tensor<3>,
    cell: PackCell,
}

impl MergedLayer {
    pub(crate) fn new(shape: ExpertsShape, rule: MergeRule, builder: &Builder) -> Self {
        let init = Init::TruncatedNormal(shape.std.0);
        Self {
            router: builder.parameter("router", Role::Router, [shape.d_model, shape.experts], init),
            experts: Experts::new(shape, Role::Expert, &builder.at("experts")),
            rule,
            router_cell: PackCell::new(),
            gate_up_cell: PackCell::new(),
            down_cell: PackCell::new(),
        }
    }

    /// `batch` sequences of `seq` tokens, at least one of each.
    ///
    /// # Shapes
    /// `[T, D]` gives `[T, D]`.
    pub(crate) fn forward(&self, x_td: Tensor<2>, batch: usize, seq: usize, numerics: Numerics) -> Tensor<2> {
        let (length, first) = match self.rule {
            MergeRule::Sequence => (seq, None),
            MergeRule::Segments { length, first } => (length, Some(first)),
        };
        let segments = Arc::new(Groups::runs(batch, seq, length, 0));
        let own_se = self.segment_weights(x_td.clone(), &segments, numerics);
        let merge_se = match first {
            None => own_se,
            Some(first) => shifted(own_se, seq.div_ceil(length), first),
        };
        let merged = self.merge(merge_se, numerics);
        self.apply(x_td, &merged, &tokens_by_segment(&segments), numerics)
    }

    /// `softmax(mean(x) W)` of each segment, `[S, E]`.
    fn segment_weights(&self, x_td: Tensor<2>, segments: &Arc<Groups>, numerics: Numerics) -> Tensor<2> {
        let [tokens, _] = x_td.dims();
        let mut even = vec![0.0; tokens];
        for s in 0..segments.len() {
            let members = segments.of(s);
            members.iter().for_each(|&t| even[t as usize] = 1.0 / members.len() as f32);
        }
        let even_t1 = tensor_like(even, [tokens, 1], &x_td);
        let mean_sd = mix(x_td, even_t1, segments);
        softmax_rows(linear(mean_sd, self.router.val(), &self.router_cell, exact(numerics)))
    }

    /// `sum over e of w_se theta_e` for both weights, in f32.
    fn merge(&self, merge_se: Tensor<2>, numerics: Numerics) -> MergedExperts {
        let [s, _] = merge_se.dims();
        let merged = |weight: Tensor<3>, cell: &PackCell| {
            let [e, rows, columns] = weight.dims();
            let flat = weight.reshape([e, rows * columns]);
            linear(merge_se.clone(), flat, cell, exact(numerics)).reshape([s, rows, columns])
        };
        MergedExperts {
            gate_up_sdf: merged(self.experts.gate_up.val(), &self.gate_up_cell),
            down_sfd: merged(self.experts.down.val(), &self.down_cell),
            cell: PackCell::new(),
        }
    }

    fn apply(
        &self,
        x_td: Tensor<2>,
        merged: &MergedExperts,
        plan: &Arc<DispatchPlan>,
        numerics: Numerics,
    ) -> Tensor<2> {
        let [tokens, _] = x_td.dims();
        let weight_n = ones(tokens, &x_td);
        let activation = self.experts.activation().kernel();
        let MergedExperts { gate_up_sdf, down_sfd, cell } = merged.clone();
        expert_ffn(x_td, gate_up_sdf, down_sfd, weight_n, plan, activation, &cell, numerics)
    }

    /// New tokens of one sequence, whose earlier ones `past` holds and which join it.
    pub(crate) fn decode(&self, x_td: Tensor<2>, past: &mut MergedPast, numerics: Numerics) -> Tensor<2> {
        let MergeRule::Segments { length, first: FirstSegment::Uniform } = self.rule else {
            unreachable!("decoding asks SoftLayer first whether the layer is causal")
        };
        let [tokens, d] = x_td.dims();
        let mut parts = Vec::new();
        let mut done = 0;
        while done < tokens {
            let at = past.inputs.len() / d;
            let take = (length - at % length).min(tokens - done);
            let part_td = x_td.clone().narrow(0, done, take);
            let merged = self.merged_for(at / length, length, past, &x_td, numerics);
            parts.push(self.apply(part_td.clone(), &merged, &Arc::new(every_token_once(take)), numerics));
            mixtura_ops::with_slice(&part_td, |part| past.inputs.extend_from_slice(part));
            done += take;
        }
        Tensor::cat(parts, 0)
    }

    /// The merged expert of a segment, made when its first token comes.
    fn merged_for(
        &self,
        segment: usize,
        length: usize,
        past: &mut MergedPast,
        like: &Tensor<2>,
        numerics: Numerics,
    ) -> MergedExperts {
        if let Some((held, merged)) = &past.merged
            && *held == segment
        {
            return merged.clone();
        }
        let ([_, d], [_, experts]) = (like.dims(), self.router.dims());
        let weights_se = if segment == 0 {
            tensor_like(vec![1.0 / experts as f32; experts], [1, experts], like)
        } else {
            let before = past.inputs[(segment - 1) * length * d..segment * length * d].to_vec();
            let whole = Arc::new(Groups::runs(1, length, length, 0));
            self.segment_weights(tensor_like(before, [length, d], like), &whole, numerics)
        };
        let merged = self.merge(weights_se, numerics);
        past.merged = Some((segment, merged.clone()));
        merged
    }

    pub(crate) fn for_each_cell(&self, f: &mut dyn FnMut(&PackCell)) {
        self.experts.for_each_cell(f);
        [&self.router_cell, &self.gate_up_cell, &self.down_cell].into_iter().for_each(f);
    }
}

/// One sequence under decoding: its inputs to the layer, from which a segment's mean is taken when the next one begins, and
/// the merged expert of one segment.
#[derive(Debug, Clone, Default)]
pub(crate) struct MergedPast {
    inputs: Vec<f32>,
    merged: Option<(usize, MergedExperts)>,
}

impl MergedPast {
    /// A segment's merged expert depends on earlier segments only, so it stays right for the tokens that are left of it; one of a
    /// segment that is gone altogether is not asked for until its predecessor is complete again, perhaps with other tokens.
    pub fn truncate(&mut self, tokens: usize, d: usize, length: usize) {
        self.inputs.truncate(tokens * d);
        self.merged.take_if(|(segment, _)| *segment * length > tokens);
    }
}

fn exact(numerics: Numerics) -> Numerics {
    Numerics { precision: Precision::F32, ..numerics }
}

/// Each of `per_sequence` segments gets the weights of the one before it, the first what `first` says.
fn shifted(own_se: Tensor<2>, per_sequence: usize, first: FirstSegment) -> Tensor<2> {
    let ([segments, experts], device) = (own_se.dims(), own_se.device());
    let is_first = |s: usize| s.is_multiple_of(per_sequence);
    let before: Vec<i64> = (0..segments).map(|s| if is_first(s) { s } else { s - 1 } as i64).collect();
    let before = Tensor::<1, Int>::from_data(TensorData::new(before, [segments]), &device);
    let later = (0..segments).map(|s| if is_first(s) { 0.0 } else { 1.0 }).collect();
    let later_s1 = tensor_like(later, [segments, 1], &own_se);
    let first_se = match first {
        FirstSegment::Uniform => own_se.full_like(1.0 / experts as f32),
        FirstSegment::OwnMean => own_se.clone().detach(),
    };
    let first_s1 = later_s1.clone().neg().add_scalar(1.0);
    own_se.select(0, before) * later_s1 + first_se * first_s1
}

/// Segments as experts: each token visits its own with weight 1.
fn tokens_by_segment(segments: &Groups) -> Arc<DispatchPlan> {
    let row_offsets = std::iter::once(0).chain((0..segments.len()).scan(0, |end, s| {
        *end += segments.of(s).len() as u32;
        Some(*end)
    }));
    let row_offsets: Vec<u32> = row_offsets.collect();
    let tokens = row_offsets.last().copied().unwrap_or(0);
    // Segments follow one another as the tokens do, so rows are tokens.
    let all = || (0..tokens).collect();
    Arc::new(DispatchPlan::new(tokens as usize, row_offsets, all(), (0..=tokens).collect(), all()))
}
