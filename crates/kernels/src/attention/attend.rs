//! Attention of a block of query rows (tokens of one head, or the heads of one token that share a kv head) against packed keys: what
//! both the forward pass and decoding run.
//!
//! For each block of 128 keys, for each tile of 8 query rows (4 with AVX2): scores, online softmax, values. A block of up to 64 rows
//! passes over a key block before the next, so keys and values come from L2 once per 64 rows: at P = 64 a key block and its values are
//! 64 KiB.

use super::KEY_BLOCK;
use super::pack::{PANEL, Sizes};
use super::tile::{fma_tile, load_tile, store_tile};
use crate::lanes::{LANES, Lanes, per_isa};
use crate::norm::store_n;
use crate::parallel::SharedSlice;
use crate::vmath;
use std::f32::consts::LOG2_E;

/// Query rows of one job.
pub(super) const ROW_BLOCK: usize = 64;

/// Query rows that read one kv head, and the keys and values they may look at.
pub(super) struct Queries<'a> {
    /// Row i starts at `i / 16 * q_stride + i % 16 * q_row`.
    pub q_rows: &'a [f32],
    pub q_stride: usize,
    pub q_row: usize,
    /// How many rows, at most [`ROW_BLOCK`].
    pub count: usize,
    /// Row i sees keys `0..=position + i * advance`.
    pub position: usize,
    /// 1 where rows are tokens of one head, 0 where they are heads of one token.
    pub advance: usize,
    /// Keys and values from key 0 on, as many blocks as the rows see.
    pub blocks: &'a [KeyBlock<'a>],
    /// Panel i of a block has the kv head's keys at `k_at + i * k_stride`.
    pub k_at: usize,
    pub k_stride: usize,
    /// Its values at `v_at + i * v_stride`.
    pub v_at: usize,
    pub v_stride: usize,
}

/// [`KEY_BLOCK`] keys and their values, panel by panel; the last block of a sequence may end after any panel.
#[derive(Clone, Copy)]
pub(super) struct KeyBlock<'a> {
    /// Keys across.
    pub k_across: &'a [f32],
    /// Values in rows.
    pub v_rows: &'a [f32],
}

/// Where a block's output goes.
pub(super) struct RowsOut<'a> {
    /// Row i starts at `at + i * stride`.
    pub out: &'a SharedSlice<'a, f32>,
    pub at: usize,
    pub stride: usize,
    /// log2 of the sum of 2^score: row i at `log_sum_exp_at + i * log_sum_exp_stride`.
    pub log_sum_exp: Option<&'a SharedSlice<'a, f32>>,
    pub log_sum_exp_at: usize,
    pub log_sum_exp_stride: usize,
}

/// Running state of the rows of a block.
pub(super) struct RowState {
    most: [f32; ROW_BLOCK],
    sums: [f32; ROW_BLOCK * LANES],
    scores: [f32; MAX_TILE_ROWS * KEY_BLOCK],
    /// [row][Q]: values summed so far.
    acc: Vec<f32>,
}

impl RowState {
    pub(super) fn new(size: Sizes) -> RowState {
        RowState {
            most: [0.0; ROW_BLOCK],
            sums: [0.0; ROW_BLOCK * LANES],
            scores: [0.0; MAX_TILE_ROWS * KEY_BLOCK],
            acc: vec![0.0; ROW_BLOCK * size.q],
        }
    }
}

/// Query rows whose scores are in flight together.
const MAX_TILE_ROWS: usize = 8;

per_isa! {
    /// Attention of a block of rows. No other job writes the same rows of the same head.
    pub(super) fn attend = attend_body(queries: &Queries<'_>, size: Sizes, state: &mut RowState, out: &RowsOut<'_>);
}

#[inline(always)]
fn attend_body<L: Lanes>(queries: &Queries<'_>, size: Sizes, state: &mut RowState, out: &RowsOut<'_>) {
    let q = queries;
    assert!(q.count > 0);
    let last = q.count - 1;
    let keys = q.position + last * q.advance + 1;
    assert!(q.count <= ROW_BLOCK && state.acc.len() >= ROW_BLOCK * size.q);
    assert!(last < PANEL || q.q_stride >= (PANEL - 1) * q.q_row + size.p);
    assert!(q.q_rows.len() >= last / PANEL * q.q_stride + last % PANEL * q.q_row + size.p);
    assert!(q.blocks.len() >= keys.div_ceil(KEY_BLOCK));
    state.most.fill(f32::NEG_INFINITY);
    state.sums.fill(0.0);
    state.acc[..q.count * size.q].fill(0.0);
    for (block, first_key) in q.blocks.iter().zip((0..keys).step_by(KEY_BLOCK)) {
        let panels = (keys - first_key).min(KEY_BLOCK).div_ceil(PANEL);
        let (keys, values) = (&block.k_across[q.k_at..], &block.v_rows[q.v_at..]);
        assert!(keys.len() >= (panels - 1) * q.k_stride + size.across);
        assert!(values.len() >= (panels - 1) * q.v_stride + size.rows);
        let block = Keys { first: first_key, keys: keys.as_ptr(), values: values.as_ptr() };
        let mut row = 0;
        while row < q.count {
            let left = (q.count - row).min(PANEL - row % PANEL);
            // SAFETY: the asserts above cover every row, and every key and value panel of the block, that `left` rows or fewer read.
            row += unsafe {
                if L::ACCUMULATORS >= 16 && left >= 8 {
                    step::<L, 8, 2>(q, size, state, row, &block)
                } else if left >= 4 {
                    step::<L, 4, 1>(q, size, state, row, &block)
                } else {
                    step::<L, 1, 4>(q, size, state, row, &block)
                }
            };
        }
    }
    for row in 0..q.count {
        let sum = L::load(&state.sums[row * LANES..]).sum_across();
        let inverse = L::splat(1.0 / sum);
        // SAFETY: this job alone has these rows of this head.
        let target = unsafe { out.out.slice(out.at + row * out.stride, size.p) };
        for i in (0..size.p).step_by(LANES) {
            store_n(L::load(&state.acc[row * size.q + i..]).mul(inverse), target, i, LANES.min(size.p - i));
        }
        if let Some(log_sum_exp) = out.log_sum_exp {
            // SAFETY: as above.
            let target = unsafe { log_sum_exp.slice(out.log_sum_exp_at + row * out.log_sum_exp_stride, 1) };
            target[0] = vmath::log(sum).mul_add(LOG2_E, state.most[row]);
        }
    }
}

/// What a kv head has in a block of keys.
struct Keys {
    /// Number of the first key.
    first: usize,
    keys: *const f32,
    values: *const f32,
}

/// One key block for R rows from `row` on; returns R.
///
/// # Safety
/// The rows lie in one panel, and the block's panels up to the last row's position are readable (checked by [`attend_body`]).
#[inline(always)]
unsafe fn step<L: Lanes, const R: usize, const C: usize>(
    q: &Queries<'_>,
    size: Sizes,
    state: &mut RowState,
    row: usize,
    block: &Keys,
) -> usize {
    let seen = |r: usize| (q.position + (row + r) * q.advance + 1).saturating_sub(block.first).min(KEY_BLOCK);
    let most_seen = seen(R - 1);
    if most_seen == 0 {
        return R;
    }
    let rows = q.q_rows[row / PANEL * q.q_stride + row % PANEL * q.q_row..].as_ptr();
    let keys = block.keys;
    let scores = state.scores.as_mut_ptr();
    let panels = most_seen.div_ceil(PANEL);
    let mut panel = 0;
    // SAFETY: R rows of q and `panels` panels of keys are readable; R * KEY_BLOCK scores are ours.
    unsafe {
        while panel + C <= panels {
            let mut tile = [[L::splat(0.0); C]; R];
            fma_tile(&mut tile, rows, q.q_row, 1, keys.add(panel * q.k_stride), PANEL, q.k_stride, size.p);
            store_tile(&tile, scores.add(panel * PANEL), KEY_BLOCK);
            panel += C;
        }
        while panel < panels {
            let mut tile = [[L::splat(0.0); 1]; R];
            fma_tile(&mut tile, rows, q.q_row, 1, keys.add(panel * q.k_stride), PANEL, 0, size.p);
            store_tile(&tile, scores.add(panel * PANEL), KEY_BLOCK);
            panel += 1;
        }
    }
    for r in 0..R {
        if seen(r) > 0 {
            let shrink = softmax_step::<L>(
                &mut state.scores[r * KEY_BLOCK..(r + 1) * KEY_BLOCK],
                seen(r),
                row + r,
                &mut state.most,
                &mut state.sums,
            );
            if shrink != 1.0 {
                scale::<L>(&mut state.acc[(row + r) * size.q..(row + r + 1) * size.q], shrink);
            }
        }
    }
    let values = block.values;
    let (scores, acc) = (state.scores.as_ptr(), state.acc[row * size.q..].as_mut_ptr());
    // SAFETY: R rows of acc and scores are ours; the values of every key that a row sees are readable.
    unsafe {
        add_values::<L, R>(scores, 0..seen(0), values, q.v_stride, size, acc);
        for r in 1..R {
            add_values::<L, 1>(
                scores.add(r * KEY_BLOCK),
                seen(0)..seen(r),
                values,
                q.v_stride,
                size,
                acc.add(r * size.q),
            );
        }
    }
    R
}

/// Turns the first `seen` scores of a row into 2^(score - maximum), updates maximum and sums, and returns what the row's earlier
/// values shrink by.
#[inline(always)]
fn softmax_step<L: Lanes>(scores: &mut [f32], seen: usize, row: usize, most: &mut [f32], sums: &mut [f32]) -> f32 {
    if !seen.is_multiple_of(LANES) {
        scores[seen..seen.next_multiple_of(LANES)].fill(f32::NEG_INFINITY);
    }
    let scores = &mut scores[..seen.next_multiple_of(LANES)];
    let mut largest = L::splat(f32::NEG_INFINITY);
    for s in scores.chunks_exact(LANES) {
        largest = L::load(s).max(largest);
    }
    let largest = largest.max_across();
    let old = most[row];
    let new = if largest > old { largest } else { old };
    most[row] = new;
    // The two usual cases without an exp2; it would give the same bits (and before the first block, any factor of zeros would do).
    let shrink = if new == old || old == f32::NEG_INFINITY { 1.0 } else { vmath::exp2(old - new) };
    let sums = &mut sums[row * LANES..(row + 1) * LANES];
    let mut sum = L::load(sums).mul(L::splat(shrink));
    let shift = L::splat(new);
    for s in scores.chunks_exact_mut(LANES) {
        let e = vmath::exp2(L::load(s).sub(shift));
        sum = sum.add(e);
        e.store(s);
    }
    sum.store(sums);
    shrink
}

#[inline(always)]
fn scale<L: Lanes>(row: &mut [f32], factor: f32) {
    for x in row.chunks_exact_mut(LANES) {
        L::load(x).mul(L::splat(factor)).store(x);
    }
}

/// Adds `probability * value` over `keys` of the block to R rows of acc, keys ascending.
///
/// # Safety
/// Rows of probabilities (KEY_BLOCK apart), of acc (Q apart), and the value panels that hold `keys` are valid.
#[inline(always)]
unsafe fn add_values<L: Lanes, const R: usize>(
    probabilities: *const f32,
    keys: std::ops::Range<usize>,
    values: *const f32,
    v_stride: usize,
    size: Sizes,
    acc: *mut f32,
) {
    if keys.is_empty() {
        return;
    }
    let mut column = 0;
    // SAFETY: columns stay below Q; the rest by this function's contract.
    unsafe {
        if R == 1 || (R <= 4 && L::ACCUMULATORS >= 16) {
            while column + 4 * LANES <= size.q {
                add_columns::<L, R, 4>(
                    probabilities,
                    keys.clone(),
                    values.add(column),
                    v_stride,
                    size,
                    acc.add(column),
                );
                column += 4 * LANES;
            }
        }
        if L::ACCUMULATORS >= 16 {
            while column + 2 * LANES <= size.q {
                add_columns::<L, R, 2>(
                    probabilities,
                    keys.clone(),
                    values.add(column),
                    v_stride,
                    size,
                    acc.add(column),
                );
                column += 2 * LANES;
            }
        }
        while column < size.q {
            add_columns::<L, R, 1>(probabilities, keys.clone(), values.add(column), v_stride, size, acc.add(column));
            column += LANES;
        }
    }
}

/// The part of [`add_values`] that concerns C registers of columns.
///
/// # Safety
/// As for [`add_values`], for these columns.
#[inline(always)]
unsafe fn add_columns<L: Lanes, const R: usize, const C: usize>(
    probabilities: *const f32,
    keys: std::ops::Range<usize>,
    values: *const f32,
    v_stride: usize,
    size: Sizes,
    acc: *mut f32,
) {
    // SAFETY: by this function's contract; a step never leaves the panel it starts in.
    unsafe {
        let mut tile = load_tile::<L, R, C>(acc, size.q);
        let mut key = keys.start;
        while key < keys.end {
            let depth = (PANEL - key % PANEL).min(keys.end - key);
            let from = values.add(key / PANEL * v_stride + key % PANEL * size.q);
            fma_tile(&mut tile, probabilities.add(key), KEY_BLOCK, 1, from, size.q, LANES, depth);
            key += depth;
        }
        store_tile(&tile, acc, size.q);
    }
}
