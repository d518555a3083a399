//! Running mixtures of a sequence's past, the slots of block-causal Soft MoE.
//!
//! Per slot: the largest logit so far, the sum of exponentials relative to it, and the tokens weighted by them. The slots of
//! block b are the quotient after the tokens of blocks 0..b. Adding a block costs 2 B M D; nothing depends on how long the
//! past is.
//!
//! Legend: B tokens of a block, T tokens of a sequence, M slots, D width.

use burn::tensor::Tensor;
use mixtura_ops::{host_function_2, with_slice};
use rayon::prelude::*;

use super::mixing::{axpy, dot};

/// The past of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Running {
    d: usize,
    /// Largest logit, `[M]`.
    top: Vec<f32>,
    /// Sum of `exp(logit - top)`, `[M]`.
    total: Vec<f32>,
    /// Sum of `exp(logit - top) x`, `[M, D]`.
    vector: Vec<f32>,
}

impl Running {
    pub fn new(slots: usize, d: usize) -> Self {
        Self { d, top: vec![f32::NEG_INFINITY; slots], total: vec![0.0; slots], vector: vec![0.0; slots * d] }
    }

    /// Adds one block: x `[B, D]`, logits `[B, M]`.
    pub fn add(&mut self, x: &[f32], logits: &[f32]) {
        let (m, d) = (self.top.len(), self.d);
        for (s, vector) in self.vector.chunks_exact_mut(d).enumerate() {
            let column = || logits.iter().skip(s).step_by(m);
            let top = column().copied().fold(self.top[s], f32::max);
            // exp(-inf) = 0 for the first block.
            let shrink = (self.top[s] - top).exp();
            self.total[s] *= shrink;
            vector.iter_mut().for_each(|v| *v *= shrink);
            for (x, &z) in x.chunks_exact(d).zip(column()) {
                let weight = (z - top).exp();
                self.total[s] += weight;
                axpy(vector, weight, x);
            }
            self.top[s] = top;
        }
    }

    /// The mixtures, `[M, D]`.
    pub fn slots(&self) -> Vec<f32> {
        let rows = self.vector.chunks_exact(self.d).zip(&self.total);
        rows.flat_map(|(row, total)| row.iter().map(move |v| v / total)).collect()
    }
}

/// The slots of every block but the first of each sequence.
///
/// # Shapes
/// `x_td` `[batch seq, D]` and `logits_tm` `[batch seq, M]` give `[batch (blocks - 1) M, D]`.
pub(crate) fn past_slots(x_td: Tensor<2>, logits_tm: Tensor<2>, seq: usize, block: usize) -> Tensor<2> {
    let ([tokens, d], [_, m]) = (x_td.dims(), logits_tm.dims());
    let blocks = seq.div_ceil(block);
    let (x, logits) = (x_td.clone().inner(), logits_tm.clone().inner());
    let forward = |x: &[f32], logits: &[f32]| -> Vec<Past> {
        let sequences = x.par_chunks(seq * d).zip(logits.par_chunks(seq * m));
        sequences.map(|(x, logits)| Past::of(x, logits, d, m, block)).collect()
    };
    let pasts = with_slice(&x, |x| with_slice(&logits, |logits| forward(x, logits)));
    let value = pasts.iter().flat_map(|past| past.slots.iter().copied()).collect();
    let rows = tokens / seq * (blocks - 1) * m;
    host_function_2(x_td, logits_tm, value, [rows, d], move |dslots| {
        with_slice(&x, |x| {
            with_slice(&logits, |logits| {
                let sequences = x.par_chunks(seq * d).zip(logits.par_chunks(seq * m)).zip(&pasts);
                let gradients: Vec<_> = sequences
                    .zip(dslots.par_chunks((blocks - 1) * m * d))
                    .map(|(((x, logits), past), dslots)| past.backward(x, logits, dslots, d, m, block))
                    .collect();
                let (dx, dlogits): (Vec<_>, Vec<_>) = gradients.into_iter().unzip();
                (dx.concat(), dlogits.concat())
            })
        })
    })
}

/// What one sequence's slots were computed from.
struct Past {
    /// The slots of blocks 1, 2, ..., `[blocks - 1, M, D]`.
    slots: Vec<f32>,
    /// `top` and `total` of the running mixture before blocks 1, 2, ..., `[blocks - 1, M]`.
    top: Vec<f32>,
    total: Vec<f32>,
}

impl Past {
    fn of(x: &[f32], logits: &[f32], d: usize, m: usize, block: usize) -> Self {
        let mut past = Self { slots: Vec::new(), top: Vec::new(), total: Vec::new() };
        let mut running = Running::new(m, d);
        let later = x.len().div_ceil(block * d) - 1;
        for (x, logits) in x.chunks(block * d).zip(logits.chunks(block * m)).take(later) {
            running.add(x, logits);
            past.slots.extend(running.slots());
            past.top.extend_from_slice(&running.top);
            past.total.extend_from_slice(&running.total);
        }
        past
    }

    /// From the last block to the first, `g` collects what all later slots want of a token, relative to the largest logit
    /// up to its own block: `g_j = dslots_{j+1} / total_{j+1} + exp(top_{j+1} - top_{j+2}) g_{j+1}`, every factor at most 1.
    fn backward(
        &self,
        x: &[f32],
        logits: &[f32],
        dslots: &[f32],
        d: usize,
        m: usize,
        block: usize,
    ) -> (Vec<f32>, Vec<f32>) {
        let (mut dx, mut dlogits) = (vec![0.0; x.len()], vec![0.0; logits.len()]);
        let (mut g, mut h) = (vec![0.0f32; m * d], vec![0.0f32; m]);
        for j in (0..self.top.len() / m).rev() {
            for s in 0..m {
                let at = j * m + s;
                let (dslot, slot) = (&dslots[at * d..(at + 1) * d], &self.slots[at * d..(at + 1) * d]);
                let shrink = self.top.get(at + m).map_or(0.0, |later| (self.top[at] - later).exp());
                let g = &mut g[s * d..(s + 1) * d];
                g.iter_mut().zip(dslot).for_each(|(g, dslot)| *g = shrink * *g + dslot / self.total[at]);
                h[s] = shrink * h[s] - dot(dslot, slot) / self.total[at];
            }
            for t in j * block..(j + 1) * block {
                let (x, dx) = (&x[t * d..(t + 1) * d], &mut dx[t * d..(t + 1) * d]);
                for s in 0..m {
                    let weight = (logits[t * m + s] - self.top[j * m + s]).exp();
                    let g = &g[s * d..(s + 1) * d];
                    axpy(dx, weight, g);
                    dlogits[t * m + s] = weight * (dot(x, g) + h[s]);
                }
            }
        }
        (dx, dlogits)
    }
}
