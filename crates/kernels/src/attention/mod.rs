//! Causal attention with rotary positions, grouped key/value heads and optional QK-norm: forward, backward, and decode from a cache.
//!
//! Axes: B sequences of S tokens (T = B S), H query heads, G key/value heads, P head width; query head h reads kv head h / (H / G).
//!
//! ```text
//! q, k, v = columns of qkv [T, (H + 2G) P]        q, k normed (RMSNorm), all clamped to [-clip, clip], q, k rotated (pairs i, i + P/2)
//! out     = softmax(scale q k^T, keys <= query) v
//! ```
//!
//! Flash style: keys come in blocks of [`KEY_BLOCK`], ascending, with a running maximum and sum per query row; nothing of size S x S
//! is ever kept, only the log-sum-exp of each (row, head) for the backward pass.
//!
//! One order of operations, whatever the tile, thread or instruction set (and the same for forward and decode):
//! - a score is one chain of FMAs over P; q carries `scale * log2(e)`, so probabilities are powers of two;
//! - a block's maximum updates the row's; its sum goes to 16 lane sums (key j to lane j mod 16), its values to one chain of FMAs per
//!   output element, keys ascending;
//! - masked keys are skipped, not added as zeros.
//!
//! Always f32, in every [`crate::precision::Precision`].
#![allow(unsafe_code)]

mod rope;
mod pack;
mod tile;
mod attend;
mod forward;
mod cache;
mod decode;
mod gradient;
mod backward;
mod reference;
#[cfg(test)]
mod tests;

pub use backward::attention_backward;
pub use cache::KvCache;
pub use decode::{attention_decode, attention_decode_ragged};
pub use forward::attention_forward;
pub use reference::{attention_backward_reference, attention_forward_reference};

use crate::parallel::for_each_job;

/// Keys per block of the online softmax.
pub const KEY_BLOCK: usize = 128;

/// RMSNorm of queries and keys before the rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// Over all heads at once (OLMoE): gammas of H P and G P values.
    FullProjection,
    /// Over each head alone (Qwen3): two gammas of P values, shared by the heads.
    PerHead,
}

/// Shape and constants of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// B, sequences.
    pub batch: usize,
    /// S, tokens per sequence (new tokens per sequence when decoding).
    pub seq: usize,
    /// H, query heads.
    pub heads: usize,
    /// G, key/value heads; divides H.
    pub kv_heads: usize,
    /// P, width of a head; even.
    pub head_dim: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Factor on the scores.
    pub scale: f32,
    /// Norm of queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// Epsilon of that norm.
    pub norm_eps: f32,
    /// Bound on the absolute value of normed queries and keys and of values, before the rotation (OLMoE's `clip_qkv`); above it the
    /// gradient is zero.
    pub clip: Option<f32>,
}

impl AttentionSpec {
    /// Scores scaled by `P^-1/2`, theta 10000, no QK-norm (epsilon 1e-5 if one is set), nothing clamped.
    pub fn new(batch: usize, seq: usize, heads: usize, kv_heads: usize, head_dim: usize) -> AttentionSpec {
        let scale = (1.0 / (head_dim as f64).sqrt()) as f32;
        let (rope_theta, norm_eps) = (1e4, 1e-5);
        AttentionSpec { batch, seq, heads, kv_heads, head_dim, rope_theta, scale, qk_norm: None, norm_eps, clip: None }
    }

    /// T = B S.
    pub fn tokens(&self) -> usize {
        self.batch * self.seq
    }

    /// Columns of qkv, (H + 2G) P.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Columns of the output, H P.
    pub fn out_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Query heads per kv head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn check(&self, name: &str, q_norm: Option<&[f32]>, k_norm: Option<&[f32]>) {
        assert!(
            self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads),
            "{name}: {} query heads cannot share {} kv heads",
            self.heads,
            self.kv_heads
        );
        assert!(
            self.head_dim > 0 && self.head_dim.is_multiple_of(2),
            "{name}: rotary heads need an even width, not {}",
            self.head_dim
        );
        assert!(self.clip.is_none_or(|clip| clip > 0.0), "{name}: values cannot be clamped to {:?}", self.clip);
        let lengths = (q_norm.map(<[f32]>::len), k_norm.map(<[f32]>::len));
        let expected = match self.qk_norm {
            None => (None, None),
            Some(QkNorm::FullProjection) => (Some(self.heads * self.head_dim), Some(self.kv_heads * self.head_dim)),
            Some(QkNorm::PerHead) => (Some(self.head_dim), Some(self.head_dim)),
        };
        assert_eq!(lengths, expected, "{name}: lengths of the QK-norm gammas for {:?}", self.qk_norm);
    }

    /// What the backward pass and its twin ask for; the lengths are those of qkv, its gradient, out, its gradient and the saved sums.
    fn check_backward(
        &self,
        name: &str,
        [q_norm, k_norm, dq_norm, dk_norm]: [Option<&[f32]>; 4],
        [qkv, dqkv, out, dout, saved]: [usize; 5],
    ) {
        self.check(name, q_norm, k_norm);
        self.check(name, dq_norm, dk_norm);
        self.check_rows(name, "qkv", qkv, self.qkv_width());
        self.check_rows(name, "dqkv", dqkv, self.qkv_width());
        self.check_rows(name, "out", out, self.out_width());
        self.check_rows(name, "dout", dout, self.out_width());
        self.check_rows(name, "saved", saved, self.heads);
    }

    fn check_rows(&self, name: &str, what: &str, len: usize, width: usize) {
        assert_eq!(len, self.tokens() * width, "{name}: {what} of {len} values is not [{}, {width}]", self.tokens());
    }
}

/// What the forward pass keeps for the backward pass.
#[derive(Clone, Debug, Default)]
pub struct AttentionSaved {
    /// log2 of the sum of 2^score, `[T, H]`; scores carry the factor log2(e).
    log_sum_exp: Vec<f32>,
}

/// Who runs the jobs of a call: all threads, or, where whole sequences are jobs already, the thread that has the sequence.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hands {
    All,
    One,
}

impl Hands {
    fn for_each(self, jobs: usize, work: impl Fn(usize) + Sync) {
        match self {
            Hands::All => for_each_job(jobs, work),
            Hands::One => (0..jobs).for_each(work),
        }
    }
}

/// Whether each sequence should be one job: with enough of them, its packed panels stay in one core's cache.
fn one_job_per_sequence(spec: &AttentionSpec) -> bool {
    spec.batch >= 2 * rayon::current_num_threads()
}
