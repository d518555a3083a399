//! The forward pass: packs every sequence, then attends block by block of query rows.
//!
//! With at least two sequences per thread, a sequence is one job from packing to output, and its panels never leave that core's cache
//! (about 400 KiB at 128 tokens of 4 heads of 64). With fewer, packing and attending are two rounds of smaller jobs over all threads.

use super::attend::{KeyBlock, Queries, ROW_BLOCK, RowState, RowsOut, attend};
use super::pack::{PANEL, Packing, PanelOut, PanelRows, Sizes, pack_panel};
use super::rope::RopeTable;
use super::{AttentionSaved, AttentionSpec, Hands, KEY_BLOCK, one_job_per_sequence};
use crate::isa::Isa;
use crate::parallel::{SharedSlice, for_each_job};
use crate::scratch::Scratch;

/// Attention over whole sequences from position 0; overwrites `out` `[T, H P]`.
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
    let out = SharedSlice::new(out);
    let log_sum_exp = saved.map(|saved| {
        saved.log_sum_exp.resize(spec.tokens() * spec.heads, 0.0);
        SharedSlice::new(&mut saved.log_sum_exp)
    });
    let rope = &RopeTable::get(spec.rope_theta, spec.head_dim, spec.seq);
    let pass = Pass {
        isa,
        packing: Packing { spec, rope, q_norm, k_norm },
        qkv,
        out: &out,
        log_sum_exp: log_sum_exp.as_ref(),
    };
    if one_job_per_sequence(spec) {
        for_each_job(spec.batch, |batch| pass.sequences(batch, 1, Hands::One));
    } else {
        pass.sequences(0, spec.batch, Hands::All);
    }
}

/// One call of the forward pass.
struct Pass<'a> {
    isa: Isa,
    packing: Packing<'a>,
    qkv: &'a [f32],
    out: &'a SharedSlice<'a, f32>,
    log_sum_exp: Option<&'a SharedSlice<'a, f32>>,
}

impl Pass<'_> {
    /// The forward pass of sequences `first..first + count`.
    fn sequences(&self, first: usize, count: usize, hands: Hands) {
        let (isa, spec, width) = (self.isa, self.packing.spec, self.packing.spec.qkv_width());
        let (size, panels) = (Sizes::new(spec.head_dim), spec.seq.div_ceil(PANEL));
        let (q_panel, k_panel, v_panel) =
            (spec.heads * size.rows, spec.kv_heads * size.across, spec.kv_heads * size.rows);
        let mut q = Scratch::take(count * panels * q_panel);
        let mut k = Scratch::take(count * panels * k_panel);
        let mut v = Scratch::take(count * panels * v_panel);
        let (q_out, k_out, v_out) = (SharedSlice::new(&mut q), SharedSlice::new(&mut k), SharedSlice::new(&mut v));
        hands.for_each(count * panels, |panel| {
            let (batch, position) = (first + panel / panels, panel % panels * PANEL);
            let (from, to) = (batch * spec.seq + position, batch * spec.seq + (position + PANEL).min(spec.seq));
            // SAFETY: this job alone has panel number `panel`.
            let mut out = unsafe {
                PanelOut {
                    q_rows: q_out.slice(panel * q_panel, q_panel),
                    k_across: k_out.slice(panel * k_panel, k_panel),
                    v_rows: v_out.slice(panel * v_panel, v_panel),
                    ..PanelOut::default()
                }
            };
            pack_panel(
                isa,
                &self.packing,
                PanelRows { qkv: &self.qkv[from * width..to * width], position, lane: 0 },
                &mut out,
            );
        });
        let block_panels = KEY_BLOCK / PANEL;
        let blocks: Vec<KeyBlock> = (0..count)
            .flat_map(|local| {
                let (k, v) = (&k[local * panels * k_panel..], &v[local * panels * v_panel..]);
                let keys = k[..panels * k_panel].chunks(block_panels * k_panel);
                let values = v[..panels * v_panel].chunks(block_panels * v_panel);
                keys.zip(values).map(|(k_across, v_rows)| KeyBlock { k_across, v_rows })
            })
            .collect();
        let key_blocks = panels.div_ceil(block_panels);
        let row_blocks = spec.seq.div_ceil(ROW_BLOCK);
        let heads = count * spec.heads;
        hands.for_each(heads * row_blocks, |job| {
            // Late rows see the most keys: they go first, so that no thread is left alone with a long one.
            let (block, local, head) = (row_blocks - 1 - job / heads, job % heads / spec.heads, job % spec.heads);
            let (first_row, kv_head) = (block * ROW_BLOCK, head / spec.group());
            let first_token = (first + local) * spec.seq + first_row;
            let queries = Queries {
                q_rows: &q[(local * panels + first_row / PANEL) * q_panel + head * size.rows..],
                q_stride: q_panel,
                q_row: size.q,
                count: ROW_BLOCK.min(spec.seq - first_row),
                position: first_row,
                advance: 1,
                blocks: &blocks[local * key_blocks..(local + 1) * key_blocks],
                k_at: kv_head * size.across,
                k_stride: k_panel,
                v_at: kv_head * size.rows,
                v_stride: v_panel,
            };
            let out = RowsOut {
                out: self.out,
                at: first_token * spec.out_width() + head * size.p,
                stride: spec.out_width(),
                log_sum_exp: self.log_sum_exp,
                log_sum_exp_at: first_token * spec.heads + head,
                log_sum_exp_stride: spec.heads,
            };
            attend(isa, &queries, size, &mut RowState::new(size), &out);
        });
    }
}
