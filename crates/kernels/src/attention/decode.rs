//! Decoding: new tokens attend to a cache of packed keys and values and are added to it.
//!
//! The cache holds the panels that the forward pass packs, and the same inner function reads them, so position by position, in runs or
//! all at once the bits are those of [`super::attention_forward`].

use super::attend::{Queries, ROW_BLOCK, RowState, RowsOut, attend};
use super::pack::{PANEL, Packing, PanelOut, PanelRows, Sizes, pack_panel};
use super::rope::RopeTable;
use super::{AttentionSpec, Hands, KvCache};
use crate::isa::Isa;
use crate::parallel::SharedSlice;
use crate::scratch::Scratch;

/// Below this many multiply-adds (about 20 microseconds) decoding stays on the calling thread.
const SERIAL_WORK: usize = 1 << 20;

/// Attention of `spec.seq` new tokens per sequence, which follow the tokens in that sequence's cache and are added to it; overwrites
/// `out` `[B S, H P]`. The same bits as [`super::attention_forward`] over the whole sequences.
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
        assert!(
            cache.kv_heads == spec.kv_heads && cache.head_dim == spec.head_dim,
            "{NAME}: a cache of {} heads of {}, the layer has {} of {}",
            cache.kv_heads,
            cache.head_dim,
            spec.kv_heads,
            spec.head_dim
        );
    }
    if spec.tokens() == 0 {
        return;
    }
    let (size, panels, width) = (Sizes::new(spec.head_dim), spec.seq.div_ceil(PANEL), spec.qkv_width());
    let (q_panel, k_panel, v_panel) = (spec.heads * size.rows, spec.kv_heads * size.across, spec.kv_heads * size.rows);
    let starts: Vec<usize> = caches.iter().map(|cache| cache.len).collect();
    let longest = starts.iter().max().map_or(0, |start| start + spec.seq);
    let packing = Packing { spec, rope: &RopeTable::get(spec.rope_theta, spec.head_dim, longest), q_norm, k_norm };
    let hands =
        if spec.tokens() * spec.heads * spec.head_dim * longest < SERIAL_WORK { Hands::One } else { Hands::All };

    let mut q = Scratch::take(spec.batch * panels * q_panel);
    let q_out = SharedSlice::new(&mut q);
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
    // Queries are packed from the first new token on, keys where the cache stands; so the cache may have one panel more.
    hands.for_each(spec.batch * (panels + 1), |job| {
        let (batch, panel) = (job / (panels + 1), job % (panels + 1));
        let start = starts[batch];
        let rows = |from: usize, to: usize| &qkv[(batch * spec.seq + from) * width..(batch * spec.seq + to) * width];
        if panel < panels {
            let from = panel * PANEL;
            // SAFETY: this job alone has this panel of queries.
            let q_rows = unsafe { q_out.slice((batch * panels + panel) * q_panel, q_panel) };
            let new = PanelRows { qkv: rows(from, (from + PANEL).min(spec.seq)), position: start + from, lane: 0 };
            pack_panel(isa, &packing, new, &mut PanelOut { q_rows, ..PanelOut::default() });
        }
        let cache_panel = start / PANEL + panel;
        let (from, to) = ((cache_panel * PANEL).max(start), ((cache_panel + 1) * PANEL).min(start + spec.seq));
        if from < to {
            let (keys, values) = &stores[batch];
            // SAFETY: this job alone has this panel of this sequence's cache.
            let (k_across, v_rows) =
                unsafe { (keys.slice(cache_panel * k_panel, k_panel), values.slice(cache_panel * v_panel, v_panel)) };
            let new = PanelRows { qkv: rows(from - start, to - start), position: from, lane: from % PANEL };
            pack_panel(isa, &packing, new, &mut PanelOut { k_across, v_rows, ..PanelOut::default() });
        }
    });
    drop(stores);

    let (caches, out) = (&*caches, SharedSlice::new(out));
    let attend_rows = |batch: usize, kv_head: usize, head: usize, first_row: usize, rows: Rows| {
        let queries = Queries {
            q_rows: &q[(batch * panels + first_row / PANEL) * q_panel + head * size.rows..],
            q_stride: rows.q_stride,
            q_row: rows.q_row,
            count: rows.count,
            position: starts[batch] + first_row,
            advance: rows.advance,
            k_across: &caches[batch].keys[kv_head * size.across..],
            k_stride: k_panel,
            v_rows: &caches[batch].values[kv_head * size.rows..],
            v_stride: v_panel,
        };
        let at = (batch * spec.seq + first_row) * spec.out_width() + head * size.p;
        let out = RowsOut {
            out: &out,
            at,
            stride: rows.out_stride,
            log_sum_exp: None,
            log_sum_exp_at: 0,
            log_sum_exp_stride: 0,
        };
        attend(isa, &queries, size, &mut RowState::new(size), &out);
    };
    if spec.seq == 1 {
        // The heads that share a kv head go together, so that keys and values are read once; in parts only where threads would idle.
        let (groups, group) = (spec.batch * spec.kv_heads, spec.group());
        let parts = rayon::current_num_threads().div_ceil(groups).clamp(group.div_ceil(ROW_BLOCK), group);
        let heads_per_part = group.div_ceil(parts);
        hands.for_each(groups * parts, |job| {
            let (batch, kv_head, part) = (job / parts / spec.kv_heads, job / parts % spec.kv_heads, job % parts);
            let heads = part * heads_per_part..((part + 1) * heads_per_part).min(group);
            if !heads.is_empty() {
                let (count, q_stride) = (heads.len(), PANEL * size.rows);
                let rows = Rows { count, q_stride, q_row: size.rows, advance: 0, out_stride: size.p };
                attend_rows(batch, kv_head, kv_head * group + heads.start, 0, rows);
            }
        });
        return;
    }
    let row_blocks = spec.seq.div_ceil(ROW_BLOCK);
    let heads = spec.batch * spec.heads;
    hands.for_each(heads * row_blocks, |job| {
        let (block, batch, head) = (row_blocks - 1 - job / heads, job % heads / spec.heads, job % spec.heads);
        let (first_row, kv_head) = (block * ROW_BLOCK, head / spec.group());
        let count = ROW_BLOCK.min(spec.seq - first_row);
        let rows = Rows { count, q_stride: q_panel, q_row: size.q, advance: 1, out_stride: spec.out_width() };
        attend_rows(batch, kv_head, head, first_row, rows);
    });
}

/// How the rows of a job lie; the fields are those of [`Queries`] and [`RowsOut`].
struct Rows {
    count: usize,
    q_stride: usize,
    q_row: usize,
    advance: usize,
    out_stride: usize,
}
