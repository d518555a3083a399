//! Decoding: new tokens attend to a cache of packed keys and values and are added to it.
//!
//! The cache holds the panels that the forward pass packs, and the same inner function reads them, so position by position, in runs or
//! all at once, alone or beside other sequences, the bits are those of [`super::attention_forward`].

use super::attend::{KeyBlock, Queries, ROW_BLOCK, RowState, RowsOut, attend};
use super::pack::{PANEL, Packing, PanelOut, PanelRows, Sizes, pack_panel};
use super::rope::RopeTable;
use super::{AttentionSpec, Hands, KEY_BLOCK, KvCache};
use crate::isa::Isa;
use crate::parallel::SharedSlice;
use crate::scratch::Scratch;
use std::cmp::Reverse;
use std::ops::Range;

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
    let mut caches: Vec<&mut KvCache> = caches.iter_mut().collect();
    attention_decode_ragged(isa, spec, qkv, q_norm, k_norm, &vec![spec.seq; spec.batch], &mut caches, out);
}

/// [`attention_decode`] of sequences with different numbers of new tokens: `new[i]`, which may be 0, of the sequence of `caches[i]`. Rows of
/// `qkv` and `out` are the new tokens of the first sequence, then of the second, ...; `batch` and `seq` of `spec` count for nothing.
///
/// # Panics
/// If a slice does not have the shape asked for, or a cache is not of such a layer.
///
/// ```
/// use mixtura_kernels::attention::{AttentionSpec, KvCache, attention_decode_ragged};
/// use mixtura_kernels::isa::Isa;
/// let spec = AttentionSpec::new(1, 1, 1, 1, 2);
/// let (mut long, mut short) = (KvCache::new(&spec), KvCache::new(&spec));
/// // Two tokens of one sequence, one of another; the first token of each sees but itself.
/// let qkv = [[1.0, 0.0, 1.0, 0.0, 5.0, 7.0], [1.0, 0.0, 1.0, 0.0, 6.0, 8.0], [0.0, 1.0, 0.0, 1.0, 9.0, 9.0]].concat();
/// let mut out = [0.0; 6];
/// attention_decode_ragged(Isa::current(), &spec, &qkv, None, None, &[2, 1], &mut [&mut long, &mut short], &mut out);
/// assert_eq!((&out[..2], &out[4..]), (&[5.0, 7.0][..], &[9.0, 9.0][..]));
/// assert_eq!((long.len(), short.len()), (2, 1));
/// ```
pub fn attention_decode_ragged(
    isa: Isa,
    spec: &AttentionSpec,
    qkv: &[f32],
    q_norm: Option<&[f32]>,
    k_norm: Option<&[f32]>,
    new: &[usize],
    caches: &mut [&mut KvCache],
    out: &mut [f32],
) {
    const NAME: &str = "attention_decode_ragged";
    spec.check(NAME, q_norm, k_norm);
    let (rows, width, out_width) = (new.iter().sum::<usize>(), spec.qkv_width(), spec.out_width());
    assert!(
        new.len() == caches.len() && qkv.len() == rows * width && out.len() == rows * out_width,
        "{NAME}: {} values of qkv and {} of out with {} caches for new tokens {new:?}; [{rows}, {width}], [{rows}, {out_width}] expected",
        qkv.len(),
        out.len(),
        caches.len()
    );
    caches.iter().for_each(|cache| cache.check(NAME, spec));
    if rows == 0 {
        return;
    }
    let sequences = sequences(new, caches);
    let longest = sequences.iter().map(|sequence| sequence.start + sequence.new).max().unwrap_or(0);
    let packing = Packing { spec, rope: &RopeTable::get(spec.rope_theta, spec.head_dim, longest), q_norm, k_norm };
    let seen: usize = sequences.iter().map(|sequence| sequence.new * (sequence.start + sequence.new)).sum();
    let hands = if seen * spec.heads * spec.head_dim < SERIAL_WORK { Hands::One } else { Hands::All };
    let q = pack(isa, &packing, qkv, &sequences, caches, hands);

    let size = Sizes::new(spec.head_dim);
    let (q_panel, out) = (spec.heads * size.rows, SharedSlice::new(out));
    let blocks: Vec<Vec<KeyBlock>> = caches.iter().map(|cache| cache.blocks()).collect();
    let jobs = jobs(spec, &sequences);
    hands.for_each(jobs.len(), |job| {
        let Job { sequence, kv_head, ref heads, ref rows, .. } = jobs[job];
        let Sequence { row, start, panel, .. } = sequences[sequence];
        // Rows are the tokens of one head, or the heads of one token.
        let of_one_head = heads.len() == 1;
        let queries = Queries {
            q_rows: &q[(panel + rows.start / PANEL) * q_panel + heads.start * size.rows..],
            q_stride: if of_one_head { q_panel } else { PANEL * size.rows },
            q_row: if of_one_head { size.q } else { size.rows },
            count: heads.len() * rows.len(),
            position: start + rows.start,
            advance: if of_one_head { 1 } else { 0 },
            blocks: &blocks[sequence],
            k_at: kv_head * size.across,
            k_stride: spec.kv_heads * size.across,
            v_at: kv_head * size.rows,
            v_stride: spec.kv_heads * size.rows,
        };
        let out = RowsOut {
            out: &out,
            at: (row + rows.start) * out_width + heads.start * size.p,
            stride: if of_one_head { out_width } else { size.p },
            log_sum_exp: None,
            log_sum_exp_at: 0,
            log_sum_exp_stride: 0,
        };
        attend(isa, &queries, size, &mut RowState::new(size), &out);
    });
}

/// The new tokens of one sequence.
struct Sequence {
    /// The first of its rows of qkv and out.
    row: usize,
    /// How many.
    new: usize,
    /// Tokens held before.
    start: usize,
    /// The first of its panels of queries.
    panel: usize,
}

fn sequences(new: &[usize], caches: &[&mut KvCache]) -> Vec<Sequence> {
    let (mut row, mut panel) = (0, 0);
    let place = |(&new, cache): (&usize, &&mut KvCache)| {
        let sequence = Sequence { row, new, start: cache.len(), panel };
        (row, panel) = (row + new, panel + new.div_ceil(PANEL));
        sequence
    };
    new.iter().zip(caches).map(place).collect()
}

/// Packs the new keys and values into the caches, and the queries, from each sequence's first new token on, into panels of their own.
fn pack(
    isa: Isa,
    packing: &Packing,
    qkv: &[f32],
    sequences: &[Sequence],
    caches: &mut [&mut KvCache],
    hands: Hands,
) -> Scratch {
    let spec = packing.spec;
    let (size, width) = (Sizes::new(spec.head_dim), spec.qkv_width());
    let (q_panel, k_panel, v_panel) = (spec.heads * size.rows, spec.kv_heads * size.across, spec.kv_heads * size.rows);
    let panels = sequences.iter().map(|sequence| sequence.new.div_ceil(PANEL)).sum::<usize>();
    let mut q = Scratch::take(panels * q_panel);
    let q_out = SharedSlice::new(&mut q);
    let pages: Vec<Vec<SharedSlice<f32>>> = caches
        .iter_mut()
        .zip(sequences)
        .map(|(cache, sequence)| cache.grow(sequence.new).iter_mut().map(|page| SharedSlice::new(page)).collect())
        .collect();
    // Keys are packed from where the cache stands on, so a sequence may have one panel more of them than of queries.
    let panels_of = |sequence: &Sequence| if sequence.new > 0 { sequence.new.div_ceil(PANEL) + 1 } else { 0 };
    let jobs: Vec<(usize, usize)> = (0..sequences.len())
        .flat_map(|sequence| (0..panels_of(&sequences[sequence])).map(move |panel| (sequence, panel)))
        .collect();
    hands.for_each(jobs.len(), |job| {
        let (at, panel) = jobs[job];
        let Sequence { row, new, start, panel: first_panel } = sequences[at];
        let rows = |from: usize, to: usize| &qkv[(row + from) * width..(row + to) * width];
        let from = panel * PANEL;
        if from < new {
            // SAFETY: this job alone has this panel of queries.
            let q_rows = unsafe { q_out.slice((first_panel + panel) * q_panel, q_panel) };
            let new = PanelRows { qkv: rows(from, (from + PANEL).min(new)), position: start + from, lane: 0 };
            pack_panel(isa, packing, new, &mut PanelOut { q_rows, ..PanelOut::default() });
        }
        let cache_panel = start / PANEL + panel;
        let (from, to) = ((cache_panel * PANEL).max(start), ((cache_panel + 1) * PANEL).min(start + new));
        if from < to {
            let page_panels = KEY_BLOCK / PANEL;
            let page = &pages[at][cache_panel / page_panels - start / KEY_BLOCK];
            let in_page = cache_panel % page_panels;
            // SAFETY: this job alone has this panel of this sequence's cache, its keys as its values.
            let (k_across, v_rows) = unsafe {
                (page.slice(in_page * k_panel, k_panel), page.slice(page_panels * k_panel + in_page * v_panel, v_panel))
            };
            let new = PanelRows { qkv: rows(from - start, to - start), position: from, lane: from % PANEL };
            pack_panel(isa, packing, new, &mut PanelOut { k_across, v_rows, ..PanelOut::default() });
        }
    });
    drop(pages);
    q
}

/// Query rows that one thread takes through all of their keys: tokens of one head, or the heads of one token that share a kv head.
struct Job {
    sequence: usize,
    kv_head: usize,
    heads: Range<usize>,
    /// Among the sequence's new tokens.
    rows: Range<usize>,
    /// Query rows times keys.
    cost: usize,
}

/// The longest first, so that no thread is left alone with one.
fn jobs(spec: &AttentionSpec, sequences: &[Sequence]) -> Vec<Job> {
    let group = spec.group();
    // A new token alone has the heads that share a kv head go together, so that keys and values are read once; in parts only where threads
    // would idle.
    let groups = spec.kv_heads * sequences.iter().filter(|sequence| sequence.new > 0).count();
    let parts = rayon::current_num_threads().div_ceil(groups).clamp(group.div_ceil(ROW_BLOCK), group);
    let (one_token, many_tokens) = (group.div_ceil(parts), 1);
    let mut jobs = Vec::new();
    for (sequence, &Sequence { new, start, .. }) in sequences.iter().enumerate() {
        let together = if new == 1 { one_token } else { many_tokens };
        for first_row in (0..new).step_by(ROW_BLOCK) {
            let rows = first_row..(first_row + ROW_BLOCK).min(new);
            for kv_head in 0..spec.kv_heads {
                for first_head in (kv_head * group..(kv_head + 1) * group).step_by(together) {
                    let heads = first_head..(first_head + together).min((kv_head + 1) * group);
                    let cost = heads.len() * rows.len() * (start + rows.end);
                    jobs.push(Job { sequence, kv_head, heads, rows: rows.clone(), cost });
                }
            }
        }
    }
    jobs.sort_by_key(|job| Reverse(job.cost));
    jobs
}
