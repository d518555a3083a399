//! The backward pass: packs, makes the gradients of packed queries, keys and values, and takes them back through rotation and norm.
//!
//! Jobs as in the forward pass: whole sequences where there are enough, else three rounds over all threads. The gammas' gradients are
//! summed over blocks of 256 rows of a sequence and the blocks added in order, so neither choice changes a bit.

use super::gradient::{Gradients, Part, Sequence, Workspace, gradients};
use super::pack::{PANEL, Packing, PanelOut, PanelRows, Place, Sizes, pack_dout_row, pack_panel, unpack_gradient_row};
use super::rope::RopeTable;
use super::{AttentionSaved, AttentionSpec, Hands, one_job_per_sequence};
use crate::isa::Isa;
use crate::norm::GAMMA_BLOCK_ROWS;
use crate::parallel::{SharedSlice, for_each_job};
use crate::scratch::Scratch;

/// Gradients of [`super::attention_forward`]: overwrites `dqkv` `[T, (H + 2G) P]` and, with QK-norm, the gradients of both gammas.
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
    let gammas = [q_norm, k_norm, dq_norm.as_deref(), dk_norm.as_deref()];
    let lengths = [qkv.len(), dqkv.len(), out.len(), dout.len(), saved.log_sum_exp.len()];
    spec.check_backward("attention_backward", gammas, lengths);
    let rope = &RopeTable::get(spec.rope_theta, spec.head_dim, spec.seq);
    let gamma_blocks = spec.batch * spec.seq.div_ceil(GAMMA_BLOCK_ROWS);
    let (q_gammas, k_gammas) = (q_norm.map_or(0, <[f32]>::len), k_norm.map_or(0, <[f32]>::len));
    let (mut q_partial, mut k_partial) = (vec![0.0; gamma_blocks * q_gammas], vec![0.0; gamma_blocks * k_gammas]);
    let pass = Pass {
        isa,
        packing: Packing { spec, rope, q_norm, k_norm },
        size: Sizes::new(spec.head_dim),
        panels: spec.seq.div_ceil(PANEL),
        dout,
        out,
        qkv,
        log_sum_exp: &saved.log_sum_exp,
        dqkv: SharedSlice::new(dqkv),
        q_partial: (SharedSlice::new(&mut q_partial), q_gammas),
        k_partial: (SharedSlice::new(&mut k_partial), k_gammas),
    };
    if one_job_per_sequence(spec) {
        for_each_job(spec.batch, |batch| pass.sequences(batch, 1, Hands::One));
    } else {
        pass.sequences(0, spec.batch, Hands::All);
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

/// One call of the backward pass.
struct Pass<'a> {
    isa: Isa,
    packing: Packing<'a>,
    size: Sizes,
    /// Panels per sequence.
    panels: usize,
    dout: &'a [f32],
    out: &'a [f32],
    qkv: &'a [f32],
    log_sum_exp: &'a [f32],
    dqkv: SharedSlice<'a, f32>,
    /// Sums of each block of rows, and how many gammas there are.
    q_partial: (SharedSlice<'a, f32>, usize),
    k_partial: (SharedSlice<'a, f32>, usize),
}

/// Packed panels of some sequences.
struct Panels {
    q: Scratch,
    dout: Scratch,
    k: Scratch,
    k_across: Scratch,
    v_across: Scratch,
    /// [token, H]: sum(dout out).
    delta: Scratch,
}

impl Pass<'_> {
    /// The backward pass of sequences `first..first + count`.
    fn sequences(&self, first: usize, count: usize, hands: Hands) {
        let spec = self.packing.spec;
        let packed = self.pack(first, count, hands);
        let (q_panel, k_panel) = (spec.heads * self.size.rows, spec.kv_heads * self.size.rows);
        let mut dq = Scratch::take(count * self.panels * q_panel);
        let [mut dk, mut dv] = [0; 2].map(|_| Scratch::take(count * self.panels * k_panel));
        {
            let (dq, dk, dv) = (&SharedSlice::new(&mut dq), &SharedSlice::new(&mut dk), &SharedSlice::new(&mut dv));
            let split = hands == Hands::All && count * spec.kv_heads < rayon::current_num_threads();
            let parts = gradient_parts(spec, split);
            hands.for_each(count * parts.len(), |job| {
                let (part, local) = (&parts[job / count], job % count);
                let (q_start, k_start) = (local * self.panels * q_panel, local * self.panels * k_panel);
                let across_start = local * self.panels * spec.kv_heads * self.size.across;
                let rows = spec.seq * spec.heads;
                let sequence = Sequence {
                    seq: spec.seq,
                    heads: spec.heads,
                    kv_heads: spec.kv_heads,
                    q_rows: &packed.q[q_start..],
                    dout_rows: &packed.dout[q_start..],
                    k_across: &packed.k_across[across_start..],
                    k_rows: &packed.k[k_start..],
                    v_across: &packed.v_across[across_start..],
                    log_sum_exp: &self.log_sum_exp[(first + local) * rows..(first + local + 1) * rows],
                    delta: &packed.delta[local * rows..(local + 1) * rows],
                };
                let out = Gradients { dq, dk, dv, q_start, k_start };
                gradients(self.isa, &sequence, self.size, part, &out, &mut Workspace::new(self.size));
            });
        }
        drop(packed);
        self.unpack(first, count, hands, &dq, &dk, &dv);
    }

    fn pack(&self, first: usize, count: usize, hands: Hands) -> Panels {
        let (spec, size) = (self.packing.spec, self.size);
        let (width, out_width) = (spec.qkv_width(), spec.out_width());
        let (q_panel, k_panel, across_panel) =
            (spec.heads * size.rows, spec.kv_heads * size.rows, spec.kv_heads * size.across);
        let all = count * self.panels;
        let mut packed = Panels {
            q: Scratch::take(all * q_panel),
            dout: Scratch::take(all * q_panel),
            k: Scratch::take(all * k_panel),
            k_across: Scratch::take(all * across_panel),
            v_across: Scratch::take(all * across_panel),
            delta: Scratch::take(count * spec.seq * spec.heads),
        };
        let Panels { q, dout, k, k_across, v_across, delta } = &mut packed;
        let (q, dout, k) = (SharedSlice::new(q), SharedSlice::new(dout), SharedSlice::new(k));
        let (k_across, v_across, delta) =
            (SharedSlice::new(k_across), SharedSlice::new(v_across), SharedSlice::new(delta));
        hands.for_each(all, |panel| {
            let (local, position) = (panel / self.panels, panel % self.panels * PANEL);
            let positions = position..(position + PANEL).min(spec.seq);
            let token = |position: usize| (first + local) * spec.seq + position;
            // SAFETY: this job alone has panel number `panel`, and its tokens' rows of delta.
            unsafe {
                let mut out = PanelOut {
                    q_rows: q.slice(panel * q_panel, q_panel),
                    k_rows: k.slice(panel * k_panel, k_panel),
                    k_across: k_across.slice(panel * across_panel, across_panel),
                    v_across: v_across.slice(panel * across_panel, across_panel),
                    ..PanelOut::default()
                };
                let qkv = &self.qkv[token(position) * width..token(positions.end) * width];
                pack_panel(self.isa, &self.packing, PanelRows { qkv, position, lane: 0 }, &mut out);
                let dout_panel = dout.slice(panel * q_panel, q_panel);
                for position in positions {
                    let row = token(position) * out_width..(token(position) + 1) * out_width;
                    let delta = delta.slice((local * spec.seq + position) * spec.heads, spec.heads);
                    pack_dout_row(
                        self.isa,
                        spec,
                        position % PANEL,
                        &self.dout[row.clone()],
                        &self.out[row],
                        dout_panel,
                        delta,
                    );
                }
            }
        });
        packed
    }

    /// Jobs are the blocks of rows that share a partial sum; without a norm, smaller ones.
    fn unpack(&self, first: usize, count: usize, hands: Hands, dq: &[f32], dk: &[f32], dv: &[f32]) {
        let (spec, size, width) = (self.packing.spec, self.size, self.packing.spec.qkv_width());
        let block_rows = if spec.qk_norm.is_some() { GAMMA_BLOCK_ROWS } else { 2 * PANEL };
        let blocks = spec.seq.div_ceil(block_rows);
        hands.for_each(count * blocks, |job| {
            let (local, block) = (job / blocks, job % blocks);
            // Without a norm there are no gammas and the slices are empty.
            let at = |gammas: usize| if gammas == 0 { 0 } else { ((first + local) * blocks + block) * gammas };
            let ((q_sums, q_gammas), (k_sums, k_gammas)) = (&self.q_partial, &self.k_partial);
            // SAFETY: this job alone has this block's partial sums.
            let (dq_norm, dk_norm) =
                unsafe { (q_sums.slice(at(*q_gammas), *q_gammas), k_sums.slice(at(*k_gammas), *k_gammas)) };
            for position in block * block_rows..((block + 1) * block_rows).min(spec.seq) {
                let t = (first + local) * spec.seq + position;
                let panel = local * self.panels + position / PANEL;
                let at = |heads: usize| panel * heads * size.rows..(panel + 1) * heads * size.rows;
                let (q_at, k_at) = (at(spec.heads), at(spec.kv_heads));
                let place = Place { position, lane: position % PANEL };
                // SAFETY: this job alone has this row.
                let dqkv = unsafe { self.dqkv.slice(t * width, width) };
                let (qkv, dk, dv) = (&self.qkv[t * width..(t + 1) * width], &dk[k_at.clone()], &dv[k_at]);
                unpack_gradient_row(self.isa, &self.packing, place, &dq[q_at], dk, dv, qkv, dqkv, dq_norm, dk_norm);
            }
        });
    }
}

/// Rows or keys of a job where one kv head is several jobs; a multiple of the blocks inside.
const SPLIT_TOKENS: usize = 128;

/// The jobs of one sequence: one per kv head, or, split, dq by blocks of rows and (dk, dv) by blocks of keys.
fn gradient_parts(spec: &AttentionSpec, split: bool) -> Vec<Part> {
    let mut parts = Vec::new();
    for kv_head in 0..spec.kv_heads {
        let heads = kv_head * spec.group()..(kv_head + 1) * spec.group();
        let whole = Part { kv_head, heads, rows: 0..spec.seq, keys: 0..spec.seq, wants_dq: true, wants_dkv: true };
        if !split {
            parts.push(whole);
            continue;
        }
        for from in (0..spec.seq).step_by(SPLIT_TOKENS) {
            let tokens = from..(from + SPLIT_TOKENS).min(spec.seq);
            parts.push(Part { keys: tokens.clone(), wants_dq: false, ..whole.clone() });
            for head in whole.heads.clone() {
                parts.push(Part { heads: head..head + 1, rows: tokens.clone(), wants_dkv: false, ..whole.clone() });
            }
        }
    }
    parts
}
