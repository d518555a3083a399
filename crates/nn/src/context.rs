//! What a forward pass is told besides its input.

use std::sync::Arc;

use mixtura_ops::Numerics;
use mixtura_routing::{Routed, StepContext};

use crate::layer_routing::LayerRouting;

/// Where in a run a forward pass happens and how it computes. Plain data; the same value gives the same bits.
#[derive(Debug, Clone, PartialEq)]
pub struct ForwardContext {
    /// The run's seed, for routing noise.
    pub seed: u64,
    /// Optimizer step, for routing noise.
    pub step: u64,
    /// Whether routing noise and the training capacity apply. Gradients are a matter of the device, not of this flag.
    pub training: bool,
    /// Index of the first token in the step's global batch: micro-batches and ranks draw as one process would.
    pub first_token: u64,
    /// Tokens per sequence, for balance losses per sequence; 0 takes all tokens as one. A decoder fills it in.
    pub sequence: usize,
    /// What the step selects beyond this pass, for balance losses over more than a micro-batch.
    pub beyond: Option<Beyond>,
    /// The token ids, for hash layers. A decoder fills them in.
    pub ids: Option<Arc<[u32]>>,
    /// Replaces the configured coefficient of the balance loss, for controllers that move it (ReLU routing).
    pub balance_coefficient: Option<f64>,
    /// Whether a decoder keeps only the input and the routing of each layer for the backward pass, and computes the rest again
    /// when it comes there. Changes no bit of losses, gradients or routing.
    pub recompute_activations: bool,
    /// What the layer's router decided before, to be used in place of deciding again: how a layer is computed a second time.
    pub kept: Option<Arc<Routed<f32>>>,
    /// Precision and instruction set.
    pub numerics: Numerics,
}

impl ForwardContext {
    /// A training step.
    pub fn training(seed: u64, step: u64, numerics: Numerics) -> Self {
        Self {
            seed,
            step,
            training: true,
            first_token: 0,
            sequence: 0,
            beyond: None,
            ids: None,
            balance_coefficient: None,
            recompute_activations: false,
            kept: None,
            numerics,
        }
    }

    /// Evaluation: no noise, no capacity limit unless the router's evaluation capacity asks for one.
    pub fn evaluation(numerics: Numerics) -> Self {
        Self { training: false, ..Self::training(0, 0, numerics) }
    }

    /// The same place, seen from the router of `layer`.
    pub fn router(&self, layer: usize) -> StepContext {
        StepContext {
            seed: self.seed,
            step: self.step,
            layer: layer as u32,
            training: self.training,
            first_token: self.first_token,
        }
    }
}

/// Selections of a step that a balance loss counts besides those of its own pass.
#[derive(Debug, Clone, PartialEq)]
pub enum Beyond {
    /// All of the step, this pass included: they were counted before, by [`Decoder::route`](crate::Decoder::route).
    Step(Arc<SelectionCounts>),
    /// Those of the micro-batches before this one.
    Earlier(Arc<SelectionCounts>),
}

impl Beyond {
    /// Selections per token of each expert of `layer`, with those of this pass; `None` if nothing is known of that layer.
    pub(crate) fn fractions(&self, layer: usize, routed: &Routed<f32>) -> Option<Vec<f64>> {
        let (known, own) = match self {
            Self::Step(counts) => (counts, false),
            Self::Earlier(counts) => (counts, true),
        };
        let counts = known.by_layer.get(layer).filter(|counts| counts.len() == routed.shape.experts)?;
        let tokens = known.tokens + if own { routed.shape.tokens as u64 } else { 0 };
        let share =
            |(&known, &now): (&u64, &u32)| (known + if own { u64::from(now) } else { 0 }) as f64 / tokens as f64;
        Some(counts.iter().zip(&routed.assignment.demand).map(share).collect())
    }
}

/// How often each expert of each layer was selected, before capacity: what a balance loss over a whole step is made of, and
/// what the bias of loss-free balancing is updated with.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SelectionCounts {
    /// Tokens counted.
    pub tokens: u64,
    /// Selections by layer index, then expert; empty for dense layers.
    pub by_layer: Vec<Vec<u64>>,
}

impl SelectionCounts {
    /// Adds one forward pass.
    pub fn add(&mut self, routing: &[LayerRouting]) {
        self.tokens += routing.first().map_or(0, |layer| layer.routed.shape.tokens as u64);
        for layer in routing {
            let demand = &layer.routed.assignment.demand;
            if self.by_layer.len() <= layer.layer {
                self.by_layer.resize(layer.layer + 1, Vec::new());
            }
            let counts = &mut self.by_layer[layer.layer];
            counts.resize(demand.len(), 0);
            counts.iter_mut().zip(demand).for_each(|(sum, &count)| *sum += u64::from(count));
        }
    }
}
