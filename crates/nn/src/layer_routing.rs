//! What one layer's router decided: rows, weights, statistics and losses.
//!
//! Legend: T tokens, E experts, N rows (token, choice pairs).

use std::sync::Arc;

use burn::tensor::Tensor;
use mixtura_routing::{Assignment, Routed, RoutingStats};

/// Everything one routing step produced.
#[derive(Debug, Clone)]
pub struct LayerRouting {
    /// Index of the layer in its model, 0 for a layer used alone.
    pub layer: usize,
    /// Router logits before noise, `[T, E]`; with two levels `[T, E + groups]`, the groups' last.
    pub logits_te: Tensor<2>,
    /// Combine weight of each row, `[N]`, differentiable.
    pub weight_n: Tensor<1>,
    /// Choices, assignment, probabilities and statistics.
    pub routed: Arc<Routed<f32>>,
    /// The auxiliary losses.
    pub losses: LayerLosses,
}

/// Auxiliary losses of one layer.
#[derive(Debug, Clone)]
pub struct LayerLosses {
    /// The balance loss, without its coefficient.
    pub balance: f64,
    /// The z-loss, without its coefficient.
    pub z: f64,
    /// The router's entropy, without its coefficient; 0 when that is 0.
    pub entropy: f64,
    /// The sum of all three with their coefficients, `[1]`, differentiable.
    pub total: Tensor<1>,
}

impl LayerRouting {
    /// Which rows each expert computes.
    pub fn assignment(&self) -> &Assignment {
        &self.routed.assignment
    }

    /// The experts of a token in choice order, and their combine weights.
    pub fn choices(&self, token: usize) -> (&[u32], &[f32]) {
        let offsets = &self.routed.choices.token_offsets;
        let own = offsets[token] as usize..offsets[token + 1] as usize;
        (&self.routed.choices.experts[own.clone()], &self.routed.weight_of_pair[own])
    }

    /// Load, balance and confidence.
    pub fn stats(&self) -> &RoutingStats {
        &self.routed.stats
    }
}
