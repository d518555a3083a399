//! Merging experts in parameter space: SMEAR (one merge per sequence) and Lory (one per segment, shifted by one segment).
//!
//! Merge weights are `softmax(mean(x) R)`, R `[d, E]`. Lory's segment k uses segment k-1's weights. Its first segment has no
//! predecessor: with its own mean (the paper, under stop-gradient) the values still leak later tokens of that segment; with
//! uniform weights the layer is strictly causal, which is this project's choice.

use serde::{Deserialize, Serialize};

use super::mix;
use crate::activation::softmax;
use crate::real::Real;
use crate::scorers::linear_logits;

/// What Lory's first segment is merged with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FirstSegment {
    /// Equal weights: causal.
    #[default]
    Uniform,
    /// Its own mean, gradient stopped: the paper; not causal within the segment.
    OwnMean,
}

/// One set of merge weights per segment of `segment` tokens (the last may be shorter); `[segments, E]`.
pub fn segment_weights<S: Real>(x_td: &[S], router_de: &[S], width: usize, segment: usize) -> Vec<S> {
    let experts = router_de.len() / width.max(1);
    let mut weights = Vec::new();
    for chunk in x_td.chunks((segment * width).max(1)) {
        let tokens = chunk.len() / width.max(1);
        let even = S::of(1.0 / tokens.max(1) as f64);
        let logits = linear_logits(&mix((0..tokens).map(|_| even), chunk, width), router_de, width);
        let mut probs = vec![S::ZERO; experts];
        softmax(&logits, &mut probs);
        weights.extend(probs);
    }
    weights
}

/// The weights each segment is computed with: the previous segment's.
pub fn shifted_weights<S: Real>(segment_weights: &[S], experts: usize, first: FirstSegment) -> Vec<S> {
    let mut used = match first {
        FirstSegment::Uniform => vec![S::of(1.0 / experts.max(1) as f64); experts.min(segment_weights.len())],
        // Through f64 and back: the value without its derivative, which is what stop-gradient means.
        FirstSegment::OwnMean => segment_weights.iter().take(experts).map(|w| S::of(w.f64())).collect(),
    };
    used.extend_from_slice(&segment_weights[..segment_weights.len().saturating_sub(experts)]);
    used
}

/// Applies to every segment the expert whose parameters are the weighted sum of all experts' `[E, n]`.
pub fn merged_forward<S: Real>(
    x_td: &[S],
    width: usize,
    segment: usize,
    weights: &[S],
    parameters_en: &[S],
    experts: usize,
    apply: impl Fn(&[S], &[S]) -> Vec<S>,
) -> Vec<S> {
    let each = parameters_en.len() / experts.max(1);
    let segments = x_td.chunks((segment * width).max(1)).zip(weights.chunks_exact(experts.max(1)));
    let mut y = Vec::with_capacity(x_td.len());
    for (chunk, w) in segments {
        let merged = mix(w.iter().copied(), parameters_en, each);
        y.extend(chunk.chunks_exact(width.max(1)).flat_map(|x| apply(&merged, x)));
    }
    y
}
