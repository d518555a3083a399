//! Causal attention with rotary positions, grouped key/value heads and optional QK-norm: forward, backward, and decode from a cache.
//!
//! Axes: B sequences of S tokens (T = B S), H query heads, G key/value heads, P head width; query head h reads kv head h / (H / G).
//!
//! ```text
//! q, k, v = columns of qkv [T, (H + 2G) P]        q, k normed (RMSNorm), then rotated (pairs i, i + P/2)
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
mod forward;
mod backward;
mod reference;
#[cfg(test)]
mod tests;

pub use reference::{attention_backward_reference, attention_forward_reference};

use crate::isa::Isa;
use crate::norm::GAMMA_BLOCK_ROWS;
use crate::parallel::{SharedSlice, for_each_job, for_each_job_with};
use crate::scratch::Scratch;
use backward::{Gradients, Part, Sequence, Workspace, gradients};
use forward::{Queries, ROW_BLOCK, RowState, attend};
use pack::{PANEL, PanelOut, Place, Sizes, pack_dout_row, pack_row, unpack_gradient_row};
use rope::RopeTable;
use std::ops::Range;

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
}

impl AttentionSpec {
    /// Scores scaled by `P^-1/2`, theta 10000, no QK-norm (epsilon 1e-5 if one is set).
    pub fn new(batch: usize, seq: usize, heads: usize, kv_heads: usize, head_dim: usize) -> AttentionSpec {
        let scale = (1.0 / (head_dim as f64).sqrt()) as f32;
        AttentionSpec { batch, seq, heads, kv_heads, head_dim, rope_theta: 1e4, scale, qk_norm: None, norm_eps: 1e-5 }
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
            self.kv_heads > 0 && self.heads % self.kv_heads == 0,
            "{name}: {} query heads cannot share {} kv heads",
            self.heads,
            self.kv_heads
        );
        assert!(
            self.head_dim > 0 && self.head_dim % 2 == 0,
            "{name}: rotary heads need an even width, not {}",
            self.head_dim
        );
        let lengths = (q_norm.map(<[f32]>::len), k_norm.map(<[f32]>::len));
        let expected = match self.qk_norm {
            None => (None, None),
            Some(QkNorm::FullProjection) => (Some(self.heads * self.head_dim), Some(self.kv_heads * self.head_dim)),
            Some(QkNorm::PerHead) => (Some(self.head_dim), Some(self.head_dim)),
        };
        assert_eq!(lengths, expected, "{name}: lengths of the QK-norm gammas for {:?}", self.qk_norm);
    }

    fn check_rows(&self, name: &str, what: &str, len: usize, width: usize) {
        assert_eq!(len, self.tokens() * width, "{name}: {what} of {len} values is not [{}, {width}]", self.tokens());
    }
}

/// What the forward pass keeps for the backward pass.
#[derive(Clone, Debug, Default)]
pub struct AttentionSaved {
    /// log2 of the sum of 2^score, [T, H]; scores carry the factor log2(e).
    log_sum_exp: Vec<f32>,
}

/// Keys and values of one sequence, one layer.
#[derive(Clone, Debug)]
pub struct KvCache {
    kv_heads: usize,
    head_dim: usize,
    len: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KvCache {
    /// An empty cache for the heads of `spec`.
    pub fn new(spec: &AttentionSpec) -> KvCache {
        KvCache { kv_heads: spec.kv_heads, head_dim: spec.head_dim, len: 0, keys: Vec::new(), values: Vec::new() }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets every token; keeps the memory.
    pub fn clear(&mut self) {
        self.truncate(0);
    }

    /// Forgets the tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Bytes in use.
    pub fn bytes(&self) -> usize {
        (self.keys.len() + self.values.len()) * size_of::<f32>()
    }
}

/// Attention over whole sequences from position 0; overwrites `out` [T, H P].
///
/// # Panics
/// If a slice does not have the shape `spec` asks for.
pub fn attention_forward(
    isa: Isa,
    spec: &AttentionSpec,
    qkv: &[f32],
    q_norm: Option<&[f32]>,
    k_norm: Option<&[f32]>,
    out: &mut [f32],
    saved: Option<&mut AttentionSaved>,
) {
    const NAME: &str = "attention_forward";
    spec.check(NAME, q_norm, k_norm);
    spec.check_rows(NAME, "qkv", qkv.len(), spec.qkv_width());
    spec.check_rows(NAME, "out", out.len(), spec.out_width());
    let (size, panels) = (Sizes::new(spec.head_dim), spec.seq.div_ceil(PANEL));
    let (q_panel, k_panel, v_panel) = (spec.heads * size.rows, spec.kv_heads * size.across, spec.kv_heads * size.rows);
    let mut q = Scratch::take(spec.batch * panels * q_panel);
    let mut k = Scratch::take(spec.batch * panels * k_panel);
    let mut v = Scratch::take(spec.batch * panels * v_panel);
    let packing =
        Packing { isa, spec, rope: &RopeTable::get(spec.rope_theta, spec.head_dim, spec.seq), q_norm, k_norm };
    let (q_out, k_out, v_out) = (SharedSlice::new(&mut q), SharedSlice::new(&mut k), SharedSlice::new(&mut v));
    for_each_job(spec.batch * panels, |panel| {
        // SAFETY: this job alone has panel number `panel`.
        let mut out = unsafe {
            PanelOut {
                q_rows: q_out.slice(panel * q_panel, q_panel),
                k_across: k_out.slice(panel * k_panel, k_panel),
                v_rows: v_out.slice(panel * v_panel, v_panel),
                ..PanelOut::default()
            }
        };
        packing.pack_panel(qkv, panel / panels, panel % panels, &mut out);
    });
    let log_sum_exp = saved.map(|saved| {
        saved.log_sum_exp.resize(spec.tokens() * spec.heads, 0.0);
        SharedSlice::new(&mut saved.log_sum_exp)
    });
    let output = Output { spec, out: &SharedSlice::new(out), log_sum_exp: log_sum_exp.as_ref() };
    let row_blocks = spec.seq.div_ceil(ROW_BLOCK);
    let heads = spec.batch * spec.heads;
    for_each_job_with(
        heads * row_blocks,
        || RowState::new(size),
        |state, job| {
            // Late rows see the most keys: they go first, so that no thread is left alone with a long one.
            let (block, batch, head) = (row_blocks - 1 - job / heads, job % heads / spec.heads, job % spec.heads);
            let first_row = block * ROW_BLOCK;
            let kv_head = head / spec.group();
            let queries = Queries {
                q_rows: &q[(batch * panels + first_row / PANEL) * q_panel + head * size.rows..],
                q_stride: q_panel,
                count: ROW_BLOCK.min(spec.seq - first_row),
                position: first_row,
                k_across: &k[batch * panels * k_panel + kv_head * size.across..],
                k_stride: k_panel,
                v_rows: &v[batch * panels * v_panel + kv_head * size.rows..],
                v_stride: v_panel,
            };
            attend(isa, &queries, size, state);
            output.write(batch * spec.seq + first_row, head, queries.count, size, state);
        },
    );
}

/// Attention of `spec.seq` new tokens per sequence, which follow the tokens in that sequence's cache and are added to it; overwrites
/// `out` [B S, H P]. The same bits as [`attention_forward`] over the whole sequences.
///
/// # Panics
/// If a slice does not have the shape `spec` asks for, or there is not one cache per sequence.
pub fn attention_decode(
    isa: Isa,
    spec: &AttentionSpec,
    qkv: &[f32],
    q_norm: Option<&[f32]>,
    k_norm: Option<&[f32]>,
    caches: &mut [KvCache],
    out: &mut [f32],
) {
    const NAME: &str = "attention_decode";
    spec.check(NAME, q_norm, k_norm);
    spec.check_rows(NAME, "qkv", qkv.len(), spec.qkv_width());
    spec.check_rows(NAME, "out", out.len(), spec.out_width());
    assert_eq!(caches.len(), spec.batch, "{NAME}: {} caches for {} sequences", caches.len(), spec.batch);
    for cache in caches.iter() {
        let (kv_heads, head_dim) = (cache.kv_heads, cache.head_dim);
        assert!(
            kv_heads == spec.kv_heads && head_dim == spec.head_dim,
            "{NAME}: a cache of {kv_heads} heads of {head_dim}, the layer has {} of {}",
            spec.kv_heads,
            spec.head_dim
        );
    }
    if spec.tokens() == 0 {
        return;
    }
    let (size, panels) = (Sizes::new(spec.head_dim), spec.seq.div_ceil(PANEL));
    let (q_panel, k_panel, v_panel) = (spec.heads * size.rows, spec.kv_heads * size.across, spec.kv_heads * size.rows);
    let longest = caches.iter().map(|cache| cache.len).max().unwrap_or(0) + spec.seq;
    let packing = Packing { isa, spec, rope: &RopeTable::get(spec.rope_theta, spec.head_dim, longest), q_norm, k_norm };
    // A few tokens are not worth waking threads for.
    let work = spec.tokens() * spec.heads * spec.head_dim * longest;
    let for_each = |jobs: usize, job: &(dyn Fn(usize) + Sync)| {
        if work < SERIAL_DECODE_WORK { (0..jobs).for_each(job) } else { for_each_job(jobs, job) }
    };
    let mut q = Scratch::take(spec.batch * panels * q_panel);
    let q_out = SharedSlice::new(&mut q);
    let starts: Vec<usize> = caches.iter().map(|cache| cache.len).collect();
    let stores: Vec<(SharedSlice<f32>, SharedSlice<f32>)> = caches
        .iter_mut()
        .map(|cache| {
            cache.len += spec.seq;
            let panels = cache.len.div_ceil(PANEL);
            cache.keys.resize(cache.keys.len().max(panels * k_panel), 0.0);
            cache.values.resize(cache.values.len().max(panels * v_panel), 0.0);
            (SharedSlice::new(&mut cache.keys), SharedSlice::new(&mut cache.values))
        })
        .collect();
    // One cache panel more than query panels, because the new tokens may start in the middle of one.
    for_each(spec.batch * (panels + 1), &|job| {
        let (batch, panel) = (job / (panels + 1), job % (panels + 1));
        if panel < panels {
            // SAFETY: this job alone has this panel of queries.
            let q_rows = unsafe { q_out.slice((batch * panels + panel) * q_panel, q_panel) };
            let rows = panel * PANEL..((panel + 1) * PANEL).min(spec.seq);
            packing.pack_rows(
                qkv,
                batch,
                starts[batch],
                rows,
                panel * PANEL,
                &mut PanelOut { q_rows, ..PanelOut::default() },
            );
        }
        let cache_panel = starts[batch] / PANEL + panel;
        let positions =
            (cache_panel * PANEL).max(starts[batch])..((cache_panel + 1) * PANEL).min(starts[batch] + spec.seq);
        if !positions.is_empty() {
            let (keys, values) = &stores[batch];
            // SAFETY: this job alone has this panel of this sequence's cache.
            let (k_across, v_rows) =
                unsafe { (keys.slice(cache_panel * k_panel, k_panel), values.slice(cache_panel * v_panel, v_panel)) };
            let rows = positions.start - starts[batch]..positions.end - starts[batch];
            let origin = (cache_panel * PANEL) as isize - starts[batch] as isize;
            packing.pack_rows_from(
                qkv,
                batch,
                starts[batch],
                rows,
                origin,
                &mut PanelOut { k_across, v_rows, ..PanelOut::default() },
            );
        }
    });
    drop(stores);
    let caches = &*caches;
    let output = Output { spec, out: &SharedSlice::new(out), log_sum_exp: None };
    let row_blocks = spec.seq.div_ceil(ROW_BLOCK);
    let heads = spec.batch * spec.heads;
    for_each(heads * row_blocks, &|job| {
        let (block, batch, head) = (row_blocks - 1 - job / heads, job % heads / spec.heads, job % spec.heads);
        let (first_row, kv_head) = (block * ROW_BLOCK, head / spec.group());
        let queries = Queries {
            q_rows: &q[(batch * panels + first_row / PANEL) * q_panel + head * size.rows..],
            q_stride: q_panel,
            count: ROW_BLOCK.min(spec.seq - first_row),
            position: starts[batch] + first_row,
            k_across: &caches[batch].keys[kv_head * size.across..],
            k_stride: k_panel,
            v_rows: &caches[batch].values[kv_head * size.rows..],
            v_stride: v_panel,
        };
        let mut state = RowState::new(size);
        attend(isa, &queries, size, &mut state);
        output.write(batch * spec.seq + first_row, head, queries.count, size, &state);
    });
}

/// Below this many multiply-adds (about 20 microseconds) decoding stays on the calling thread.
const SERIAL_DECODE_WORK: usize = 1 << 20;

/// Gradients of [`attention_forward`]: overwrites `dqkv` [T, (H + 2G) P] and, with QK-norm, the gradients of both gammas.
///
/// # Panics
/// If a slice does not have the shape `spec` asks for.
pub fn attention_backward(
    isa: Isa,
    spec: &AttentionSpec,
    dout: &[f32],
    out: &[f32],
    qkv: &[f32],
    q_norm: Option<&[f32]>,
    k_norm: Option<&[f32]>,
    saved: &AttentionSaved,
    dqkv: &mut [f32],
    dq_norm: Option<&mut [f32]>,
    dk_norm: Option<&mut [f32]>,
) {
    const NAME: &str = "attention_backward";
    spec.check(NAME, q_norm, k_norm);
    spec.check(NAME, dq_norm.as_deref(), dk_norm.as_deref());
    spec.check_rows(NAME, "qkv", qkv.len(), spec.qkv_width());
    spec.check_rows(NAME, "dqkv", dqkv.len(), spec.qkv_width());
    spec.check_rows(NAME, "out", out.len(), spec.out_width());
    spec.check_rows(NAME, "dout", dout.len(), spec.out_width());
    spec.check_rows(NAME, "saved", saved.log_sum_exp.len(), spec.heads);
    let (size, panels) = (Sizes::new(spec.head_dim), spec.seq.div_ceil(PANEL));
    let (q_panel, k_panel, k_across_panel) =
        (spec.heads * size.rows, spec.kv_heads * size.rows, spec.kv_heads * size.across);
    let all_panels = spec.batch * panels;
    let [mut q, mut dout_rows, mut dq] = [0; 3].map(|_| Scratch::take(all_panels * q_panel));
    let [mut k_rows, mut dk, mut dv] = [0; 3].map(|_| Scratch::take(all_panels * k_panel));
    let [mut k_across, mut v_across] = [0; 2].map(|_| Scratch::take(all_panels * k_across_panel));
    let mut delta = Scratch::take(spec.tokens() * spec.heads);

    let packing =
        Packing { isa, spec, rope: &RopeTable::get(spec.rope_theta, spec.head_dim, spec.seq), q_norm, k_norm };
    {
        let (q, dout_rows, k_rows) =
            (SharedSlice::new(&mut q), SharedSlice::new(&mut dout_rows), SharedSlice::new(&mut k_rows));
        let (k_across, v_across) = (SharedSlice::new(&mut k_across), SharedSlice::new(&mut v_across));
        let delta = SharedSlice::new(&mut delta);
        for_each_job(all_panels, |panel| {
            // SAFETY: this job alone has panel number `panel`, and its tokens' rows of delta.
            unsafe {
                let mut out_panel = PanelOut {
                    q_rows: q.slice(panel * q_panel, q_panel),
                    k_rows: k_rows.slice(panel * k_panel, k_panel),
                    k_across: k_across.slice(panel * k_across_panel, k_across_panel),
                    v_across: v_across.slice(panel * k_across_panel, k_across_panel),
                    ..PanelOut::default()
                };
                packing.pack_panel(qkv, panel / panels, panel % panels, &mut out_panel);
                let dout_panel = dout_rows.slice(panel * q_panel, q_panel);
                for (lane, t) in tokens_of_panel(spec, panel / panels, panel % panels).enumerate() {
                    let row = t * spec.out_width()..(t + 1) * spec.out_width();
                    let delta = delta.slice(t * spec.heads, spec.heads);
                    pack_dout_row(isa, spec, lane, &dout[row.clone()], &out[row], dout_panel, delta);
                }
            }
        });
    }
    {
        let (dq, dk, dv) = (&SharedSlice::new(&mut dq), &SharedSlice::new(&mut dk), &SharedSlice::new(&mut dv));
        let parts = gradient_parts(spec, rayon::current_num_threads());
        for_each_job_with(
            spec.batch * parts.len(),
            || Workspace::new(size),
            |work, job| {
                let (part, batch) = (&parts[job / spec.batch], job % spec.batch);
                let rows = batch * spec.seq * spec.heads..(batch + 1) * spec.seq * spec.heads;
                let sequence = Sequence {
                    seq: spec.seq,
                    heads: spec.heads,
                    kv_heads: spec.kv_heads,
                    q_rows: &q[batch * panels * q_panel..],
                    dout_rows: &dout_rows[batch * panels * q_panel..],
                    k_across: &k_across[batch * panels * k_across_panel..],
                    k_rows: &k_rows[batch * panels * k_panel..],
                    v_across: &v_across[batch * panels * k_across_panel..],
                    log_sum_exp: &saved.log_sum_exp[rows.clone()],
                    delta: &delta[rows],
                };
                let out =
                    Gradients { dq, dk, dv, q_start: batch * panels * q_panel, k_start: batch * panels * k_panel };
                gradients(isa, &sequence, size, part, &out, work);
            },
        );
    }
    unpack(&packing, qkv, &dq, &dk, &dv, dqkv, dq_norm, dk_norm);
}

/// The jobs of one sequence's backward pass: one per kv head, or more and smaller ones where the threads would outnumber them.
fn gradient_parts(spec: &AttentionSpec, threads: usize) -> Vec<Part> {
    let mut parts = Vec::new();
    for kv_head in 0..spec.kv_heads {
        let heads = kv_head * spec.group()..(kv_head + 1) * spec.group();
        let whole = Part { kv_head, heads, rows: 0..spec.seq, keys: 0..spec.seq, wants_dq: true, wants_dkv: true };
        if spec.batch * spec.kv_heads >= threads {
            parts.push(whole);
            continue;
        }
        for from in (0..spec.seq).step_by(SPLIT_TOKENS) {
            let tokens = from..(from + SPLIT_TOKENS).min(spec.seq);
            parts.push(Part { keys: tokens.clone(), heads: whole.heads.clone(), wants_dq: false, ..whole.clone() });
            for head in whole.heads.clone() {
                parts.push(Part { heads: head..head + 1, rows: tokens.clone(), wants_dkv: false, ..whole.clone() });
            }
        }
    }
    parts
}

/// Rows or keys of a job where the backward pass is split; a multiple of the blocks inside.
const SPLIT_TOKENS: usize = 128;

/// Tokens of one panel of one sequence, as rows of [T, ..].
fn tokens_of_panel(spec: &AttentionSpec, batch: usize, panel: usize) -> Range<usize> {
    batch * spec.seq + panel * PANEL..batch * spec.seq + ((panel + 1) * PANEL).min(spec.seq)
}

/// What packing a row needs besides the row.
struct Packing<'a> {
    isa: Isa,
    spec: &'a AttentionSpec,
    rope: &'a RopeTable,
    q_norm: Option<&'a [f32]>,
    k_norm: Option<&'a [f32]>,
}

impl Packing<'_> {
    /// Packs the tokens of one panel of a sequence that starts at position 0.
    fn pack_panel(&self, qkv: &[f32], batch: usize, panel: usize, out: &mut PanelOut<'_>) {
        let rows = panel * PANEL..((panel + 1) * PANEL).min(self.spec.seq);
        self.pack_rows(qkv, batch, 0, rows, panel * PANEL, out);
    }

    /// Packs `rows` (numbered within the sequence's part of qkv; row 0 has position `start`), row `origin + i` into lane i.
    fn pack_rows(
        &self,
        qkv: &[f32],
        batch: usize,
        start: usize,
        rows: Range<usize>,
        origin: usize,
        out: &mut PanelOut<'_>,
    ) {
        self.pack_rows_from(qkv, batch, start, rows, origin as isize, out);
    }

    /// Like [`Packing::pack_rows`]; the panel may have begun before row 0.
    fn pack_rows_from(
        &self,
        qkv: &[f32],
        batch: usize,
        start: usize,
        rows: Range<usize>,
        origin: isize,
        out: &mut PanelOut<'_>,
    ) {
        let width = self.spec.qkv_width();
        for row in rows {
            let t = batch * self.spec.seq + row;
            let place = Place { position: start + row, lane: (row as isize - origin) as usize };
            pack_row(
                self.isa,
                self.spec,
                self.rope,
                place,
                &qkv[t * width..(t + 1) * width],
                self.q_norm,
                self.k_norm,
                out,
            );
        }
    }
}

/// Where the rows of a block go.
struct Output<'a, 'b> {
    spec: &'a AttentionSpec,
    out: &'a SharedSlice<'b, f32>,
    log_sum_exp: Option<&'a SharedSlice<'b, f32>>,
}

impl Output<'_, '_> {
    fn write(&self, first_token: usize, head: usize, count: usize, size: Sizes, state: &RowState) {
        for row in 0..count {
            let t = first_token + row;
            // SAFETY: one job alone has the rows of this head.
            let out = unsafe { self.out.slice(t * self.spec.out_width() + head * size.p, size.p) };
            out.copy_from_slice(&state.acc[row * size.q..][..size.p]);
            if let Some(log_sum_exp) = self.log_sum_exp {
                // SAFETY: as above.
                unsafe { log_sum_exp.slice(t * self.spec.heads + head, 1)[0] = state.log_sum_exp[row] };
            }
        }
    }
}

/// Takes packed gradients back through rotation and norm. Jobs are blocks of 256 rows of [T, ..], so that the gammas' gradients have
/// one order of summation; without a norm, of 32.
fn unpack(
    packing: &Packing<'_>,
    qkv: &[f32],
    dq: &[f32],
    dk: &[f32],
    dv: &[f32],
    dqkv: &mut [f32],
    dq_norm: Option<&mut [f32]>,
    dk_norm: Option<&mut [f32]>,
) {
    let spec = packing.spec;
    let (size, panels, width) = (Sizes::new(spec.head_dim), spec.seq.div_ceil(PANEL), spec.qkv_width());
    let block_rows = if spec.qk_norm.is_some() { GAMMA_BLOCK_ROWS } else { 32 };
    let blocks = spec.tokens().div_ceil(block_rows);
    let lengths = (dq_norm.as_ref().map_or(0, |d| d.len()), dk_norm.as_ref().map_or(0, |d| d.len()));
    let (mut q_partial, mut k_partial) = (vec![0.0_f32; blocks * lengths.0], vec![0.0_f32; blocks * lengths.1]);
    {
        let (q_partial, k_partial) = (SharedSlice::new(&mut q_partial), SharedSlice::new(&mut k_partial));
        let dqkv = SharedSlice::new(dqkv);
        for_each_job(blocks, |block| {
            // SAFETY: this job alone has block number `block` of the partial sums.
            let (dq_norm, dk_norm) = unsafe {
                (q_partial.slice(block * lengths.0, lengths.0), k_partial.slice(block * lengths.1, lengths.1))
            };
            for t in block * block_rows..((block + 1) * block_rows).min(spec.tokens()) {
                let (batch, position) = (t / spec.seq, t % spec.seq);
                let panel = batch * panels + position / PANEL;
                let place = Place { position, lane: position % PANEL };
                let at = |heads: usize| panel * heads * size.rows..(panel + 1) * heads * size.rows;
                let (q_at, k_at) = (at(spec.heads), at(spec.kv_heads));
                // SAFETY: this job alone has this row.
                let row = unsafe { dqkv.slice(t * width, width) };
                unpack_gradient_row(
                    packing.isa,
                    spec,
                    packing.rope,
                    place,
                    &dq[q_at],
                    &dk[k_at.clone()],
                    &dv[k_at],
                    &qkv[t * width..(t + 1) * width],
                    packing.q_norm,
                    packing.k_norm,
                    row,
                    dq_norm,
                    dk_norm,
                );
            }
        });
    }
    for (dgamma, partial) in [(dq_norm, &q_partial), (dk_norm, &k_partial)] {
        let Some(dgamma) = dgamma else { continue };
        dgamma.fill(0.0);
        for partial in partial.chunks_exact(dgamma.len()) {
            for (sum, &p) in dgamma.iter_mut().zip(partial) {
                *sum += p;
            }
        }
    }
}
