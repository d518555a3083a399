//! Block-causal Soft MoE (a design of this project): the slots of block b are Soft MoE mixtures of all tokens of blocks < b.
//!
//! A running softmax per slot (largest logit, sum, weighted vector) makes each block's slots O(slots d) to update. Tokens of
//! block b combine the slots' results with their own softmax. Block 0 has nothing to look back to and yields 0, so the layer
//! is paired with a dense FFN. Strictly causal, and independent of other sequences.

use super::mix;
use super::soft_moe::SoftMoe;
use crate::activation::softmax;
use crate::real::Real;

/// The layer's output and the slots of every block but the first.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockCausalOutput<S> {
    /// `[T, d]`.
    pub y_td: Vec<S>,
    /// [blocks - 1, slots, d].
    pub slots_bsd: Vec<S>,
}

/// Runs one sequence in blocks of `block` tokens.
pub fn forward<S: Real>(
    layer: &SoftMoe<S>,
    x_td: &[S],
    width: usize,
    block: usize,
    expert: impl Fn(usize, &[S]) -> Vec<S>,
) -> BlockCausalOutput<S> {
    let slots = layer.slots;
    let logits = layer.logits(x_td, width);
    let mut running = Running::new(slots, width);
    let mut out = BlockCausalOutput { y_td: Vec::with_capacity(x_td.len()), slots_bsd: Vec::new() };
    let mut probs = vec![S::ZERO; slots];
    let blocks = x_td.chunks((block * width).max(1)).zip(logits.chunks((block * slots).max(1)));
    for (b, (x, z)) in blocks.enumerate() {
        if b == 0 {
            out.y_td.resize(x.len(), S::ZERO);
        } else {
            let mixed = running.slots();
            let rows = mixed.chunks_exact(width.max(1)).enumerate();
            let results: Vec<S> = rows.flat_map(|(s, row)| expert(s / layer.per_expert.max(1), row)).collect();
            for row in z.chunks_exact(slots.max(1)) {
                softmax(row, &mut probs);
                out.y_td.extend(mix(probs.iter().copied(), &results, width));
            }
            out.slots_bsd.extend(mixed);
        }
        for (x, z) in x.chunks_exact(width.max(1)).zip(z.chunks_exact(slots.max(1))) {
            running.add(x, z);
        }
    }
    out
}

/// Per slot: largest logit so far, sum of exponentials and weighted token sum relative to it.
struct Running<S> {
    width: usize,
    top: Vec<S>,
    total: Vec<S>,
    vector_sd: Vec<S>,
}

impl<S: Real> Running<S> {
    fn new(slots: usize, width: usize) -> Self {
        let zeros = |n| vec![S::ZERO; n];
        Self { width, top: vec![S::NEG_INFINITY; slots], total: zeros(slots), vector_sd: zeros(slots * width) }
    }

    fn add(&mut self, x: &[S], logits: &[S]) {
        for (s, &z) in logits.iter().enumerate() {
            let vector = &mut self.vector_sd[s * self.width..(s + 1) * self.width];
            if z > self.top[s] {
                let shrink = if self.top[s] == S::NEG_INFINITY { S::ZERO } else { (self.top[s] - z).exp() };
                self.total[s] *= shrink;
                vector.iter_mut().for_each(|v| *v *= shrink);
                self.top[s] = z;
            }
            let weight = (z - self.top[s]).exp();
            self.total[s] += weight;
            vector.iter_mut().zip(x).for_each(|(v, &x)| *v += weight * x);
        }
    }

    fn slots(&self) -> Vec<S> {
        self.vector_sd.iter().enumerate().map(|(i, &v)| v / self.total[i / self.width]).collect()
    }
}
