//! The products of backward attention: probabilities are made again from the log-sum-exp, a block of 32 rows x 64 keys at a time.
//!
//! ```text
//! p  = 2^(q k^T - log_sum_exp)             dv += p^T dout        (chain over query heads of the group, then query rows, ascending)
//! ds = p (dout v^T - sum(dout out))        dk += ds^T q          (same chain)
//!                                          dq += ds k            (chain over keys, ascending)
//! ```
//!
//! One job per (sequence, kv head) makes all three with five products per block. Where that gives fewer jobs than threads, dq and
//! (dk, dv) become jobs of their own, by blocks of rows and of keys: seven products, the same chains, the same bits.

use super::pack::{PANEL, Sizes};
use super::tile::{fma_tile, load_tile, store_tile};
use crate::lanes::{LANES, Lanes, per_isa};
use crate::parallel::SharedSlice;
use crate::vmath;
use std::ops::Range;

/// Keys of a block.
pub(super) const KEYS: usize = 64;
/// Query rows of a block.
pub(super) const ROWS: usize = 32;

/// Packed panels of one sequence; the slices start at its first panel.
pub(super) struct Sequence<'a> {
    pub seq: usize,
    pub heads: usize,
    pub kv_heads: usize,
    /// Queries in rows, H heads.
    pub q_rows: &'a [f32],
    /// dout in rows, H heads.
    pub dout_rows: &'a [f32],
    /// Keys across, G heads.
    pub k_across: &'a [f32],
    /// Keys in rows, G heads.
    pub k_rows: &'a [f32],
    /// Values across, G heads.
    pub v_across: &'a [f32],
    /// `[S, H]`.
    pub log_sum_exp: &'a [f32],
    /// `[S, H]`.
    pub delta: &'a [f32],
}

/// Which part of the gradient a job makes.
#[derive(Clone)]
pub(super) struct Part {
    pub kv_head: usize,
    /// Query heads.
    pub heads: Range<usize>,
    /// Query rows; starts on a multiple of [`ROWS`].
    pub rows: Range<usize>,
    /// Keys; starts on a multiple of [`KEYS`].
    pub keys: Range<usize>,
    pub wants_dq: bool,
    pub wants_dkv: bool,
}

/// Where the gradients go: packed in rows, from the sequence's first panel on. No two jobs write one (panel, head).
pub(super) struct Gradients<'a, 'b> {
    pub dq: &'a SharedSlice<'b, f32>,
    pub dk: &'a SharedSlice<'b, f32>,
    pub dv: &'a SharedSlice<'b, f32>,
    /// Start of the sequence in dq.
    pub q_start: usize,
    /// Start of the sequence in dk and dv.
    pub k_start: usize,
}

/// Working memory of one job.
pub(super) struct Workspace {
    /// Scores, then probabilities, `[ROWS, KEYS]`.
    p: Vec<f32>,
    /// dout v^T, then ds, `[ROWS, KEYS]`.
    ds: Vec<f32>,
    /// `[KEYS, Q]`.
    dk: Vec<f32>,
    /// `[KEYS, Q]`.
    dv: Vec<f32>,
}

impl Workspace {
    pub(super) fn new(size: Sizes) -> Workspace {
        let block = vec![0.0; ROWS * KEYS];
        Workspace { p: block.clone(), ds: block, dk: vec![0.0; KEYS * size.q], dv: vec![0.0; KEYS * size.q] }
    }
}

per_isa! {
    /// Makes the gradients of one part.
    pub(super) fn gradients = gradients_body(s: &Sequence<'_>, size: Sizes, part: &Part, out: &Gradients<'_, '_>, work: &mut Workspace);
}

#[inline(always)]
fn gradients_body<L: Lanes>(s: &Sequence<'_>, size: Sizes, part: &Part, out: &Gradients<'_, '_>, work: &mut Workspace) {
    let panels = s.seq.div_ceil(PANEL);
    assert!(part.rows.end <= s.seq && part.keys.end <= s.seq && part.heads.end <= s.heads && part.kv_head < s.kv_heads);
    assert!(part.rows.start.is_multiple_of(ROWS) && part.keys.start.is_multiple_of(KEYS));
    assert!(s.q_rows.len() >= panels * s.heads * size.rows && s.dout_rows.len() >= panels * s.heads * size.rows);
    assert!(
        s.k_across.len() >= panels * s.kv_heads * size.across && s.v_across.len() >= panels * s.kv_heads * size.across
    );
    assert!(s.k_rows.len() >= panels * s.kv_heads * size.rows);
    assert!(work.p.len() == ROWS * KEYS && work.ds.len() == ROWS * KEYS);
    assert!(work.dk.len() == KEYS * size.q && work.dv.len() == KEYS * size.q);
    for keys_from in part.keys.clone().step_by(KEYS) {
        let keys = keys_from..(keys_from + KEYS).min(part.keys.end);
        work.dk.fill(0.0);
        work.dv.fill(0.0);
        for head in part.heads.clone() {
            let first = part.rows.start.max(keys_from / ROWS * ROWS);
            for rows_from in (first..part.rows.end).step_by(ROWS) {
                let rows = rows_from..(rows_from + ROWS).min(part.rows.end);
                let block = Block { s, size, head, kv_head: part.kv_head, rows, keys: keys.clone() };
                // SAFETY: the asserts above cover every panel of the sequence and the whole of the workspace.
                unsafe {
                    block.probabilities::<L>(work);
                    if part.wants_dq {
                        block.add_dq::<L>(work, out, keys_from == 0);
                    }
                    if part.wants_dkv {
                        block.add_over_rows::<L>(&work.p, s.dout_rows, &mut work.dv);
                        block.add_over_rows::<L>(&work.ds, s.q_rows, &mut work.dk);
                    }
                }
            }
        }
        if part.wants_dkv {
            for key in keys.clone() {
                let at = out.k_start + (key / PANEL * s.kv_heads + part.kv_head) * size.rows + key % PANEL * size.q;
                let from = (key - keys_from) * size.q..(key - keys_from + 1) * size.q;
                // SAFETY: this job alone writes this kv head's panels that hold `keys`.
                let (dk, dv) = unsafe { (out.dk.slice(at, size.q), out.dv.slice(at, size.q)) };
                dk.copy_from_slice(&work.dk[from.clone()]);
                dv.copy_from_slice(&work.dv[from]);
            }
        }
    }
}

/// Up to ROWS query rows of one head against up to KEYS keys.
struct Block<'a, 'b> {
    s: &'a Sequence<'b>,
    size: Sizes,
    head: usize,
    kv_head: usize,
    rows: Range<usize>,
    keys: Range<usize>,
}

impl Block<'_, '_> {
    /// Offset of a query row in panels of H heads.
    #[inline(always)]
    fn q_at(&self, row: usize) -> usize {
        (row / PANEL * self.s.heads + self.head) * self.size.rows + row % PANEL * self.size.q
    }

    /// Keys of the block that `row` sees.
    #[inline(always)]
    fn seen(&self, row: usize) -> usize {
        (row + 1).saturating_sub(self.keys.start).min(self.keys.len())
    }

    /// Fills `work.p` and `work.ds`: every key up to the panel in which the last row of a tile sees its last; zero where masked.
    ///
    /// # Safety
    /// The panels of the block's rows and keys are readable, and the workspace has its size (checked by [`gradients_body`]).
    #[inline(always)]
    unsafe fn probabilities<L: Lanes>(&self, work: &mut Workspace) {
        let mut row = self.rows.start;
        while row < self.rows.end {
            let left = self.rows.end - row;
            // SAFETY: by this function's contract; tiles of 8, 4 and 1 rows from a multiple of 8 on never straddle panels.
            row += unsafe {
                if L::ACCUMULATORS >= 16 && left >= 8 {
                    self.probabilities_of::<L, 8, 2>(work, row)
                } else if left >= 4 {
                    self.probabilities_of::<L, 4, 1>(work, row)
                } else {
                    self.probabilities_of::<L, 1, 1>(work, row)
                }
            };
        }
    }

    /// # Safety
    /// As for [`Block::probabilities`].
    #[inline(always)]
    unsafe fn probabilities_of<L: Lanes, const R: usize, const C: usize>(
        &self,
        work: &mut Workspace,
        row: usize,
    ) -> usize {
        let (size, stride) = (self.size, self.s.kv_heads * self.size.across);
        let panels = self.seen(row + R - 1).div_ceil(PANEL);
        let key_at = (self.keys.start / PANEL * self.s.kv_heads + self.kv_head) * size.across;
        let local = row - self.rows.start;
        for (a, b, target) in
            [(self.s.q_rows, self.s.k_across, &mut work.p), (self.s.dout_rows, self.s.v_across, &mut work.ds)]
        {
            let (a, b) = (a[self.q_at(row)..].as_ptr(), b[key_at.min(b.len())..].as_ptr());
            let target = target[local * KEYS..].as_mut_ptr();
            let mut panel = 0;
            // SAFETY: R rows of a and `panels` panels of b are readable, R rows of the target are ours.
            unsafe {
                while panel + C <= panels {
                    let mut tile = [[L::splat(0.0); C]; R];
                    fma_tile(&mut tile, a, size.q, 1, b.add(panel * stride), PANEL, stride, size.p);
                    store_tile(&tile, target.add(panel * PANEL), KEYS);
                    panel += C;
                }
                while panel < panels {
                    let mut tile = [[L::splat(0.0); 1]; R];
                    fma_tile(&mut tile, a, size.q, 1, b.add(panel * stride), PANEL, 0, size.p);
                    store_tile(&tile, target.add(panel * PANEL), KEYS);
                    panel += 1;
                }
            }
        }
        for r in 0..R {
            let at = (row + r) * self.s.heads + self.head;
            let (shift, delta) = (L::splat(self.s.log_sum_exp[at]), L::splat(self.s.delta[at]));
            let from = (local + r) * KEYS..(local + r) * KEYS + panels * PANEL;
            let seen = self.seen(row + r);
            let groups = work.p[from.clone()].chunks_exact_mut(LANES).zip(work.ds[from].chunks_exact_mut(LANES));
            for (i, (p, ds)) in groups.enumerate() {
                let mut probability = vmath::exp2(L::load(p).sub(shift));
                let mut dscore = probability.mul(L::load(ds).sub(delta));
                if (i + 1) * LANES > seen {
                    let (key, limit, zero) =
                        (L::load(&LANE_NUMBERS), L::splat(seen as f32 - (i * LANES) as f32), L::splat(0.0));
                    probability = L::select_lt(key, limit, probability, zero);
                    dscore = L::select_lt(key, limit, dscore, zero);
                }
                probability.store(p);
                dscore.store(ds);
            }
        }
        R
    }

    /// dq of the block's rows; starts from zero if `first`.
    ///
    /// # Safety
    /// As for [`Block::probabilities`]; this job alone writes these rows of dq.
    #[inline(always)]
    unsafe fn add_dq<L: Lanes>(&self, work: &Workspace, out: &Gradients<'_, '_>, first: bool) {
        let mut row = self.rows.start;
        while row < self.rows.end {
            let left = self.rows.end - row;
            let tile = if L::ACCUMULATORS >= 16 && left >= 8 {
                8
            } else if left >= 4 {
                4
            } else {
                1
            };
            // SAFETY: this job alone writes these rows of dq; they lie in one panel, Q apart.
            let dq = unsafe { out.dq.slice(out.q_start + self.q_at(row), tile * self.size.q) };
            if first {
                dq.fill(0.0);
            }
            let ds = work.ds[(row - self.rows.start) * KEYS..].as_ptr();
            let keys = (self.keys.start / PANEL * self.s.kv_heads + self.kv_head) * self.size.rows;
            let product = Product {
                a: ds,
                a_row: KEYS,
                a_step: 1,
                steps: 0..self.seen(row + tile - 1),
                b: self.s.k_rows[keys..].as_ptr(),
                b_panel: self.s.kv_heads * self.size.rows,
                size: self.size,
            };
            // SAFETY: ds holds `tile` rows, the key panels of the block are readable, dq is `tile` rows of Q.
            unsafe {
                match tile {
                    8 => product.add::<L, 8>(dq.as_mut_ptr()),
                    4 => product.add::<L, 4>(dq.as_mut_ptr()),
                    _ => product.add::<L, 1>(dq.as_mut_ptr()),
                }
            }
            row += tile;
        }
    }

    /// `target[key] += sum over the block's rows of weights[row][key] rows[row]`.
    ///
    /// # Safety
    /// As for [`Block::probabilities`].
    #[inline(always)]
    unsafe fn add_over_rows<L: Lanes>(&self, weights: &[f32], rows: &[f32], target: &mut [f32]) {
        let tile = if L::ACCUMULATORS >= 16 { 8 } else { 4 };
        for key in (0..self.keys.len()).step_by(tile) {
            let first = (self.keys.start + key).max(self.rows.start);
            if first >= self.rows.end {
                break;
            }
            let panel = self.rows.start / PANEL;
            let product = Product {
                a: weights[key..].as_ptr(),
                a_row: 1,
                a_step: KEYS,
                steps: first - self.rows.start..self.rows.len(),
                b: rows[(panel * self.s.heads + self.head) * self.size.rows..].as_ptr(),
                b_panel: self.s.heads * self.size.rows,
                size: self.size,
            };
            let target = target[key * self.size.q..].as_mut_ptr();
            // SAFETY: KEYS is a multiple of the tile, so a whole tile of weights and target rows exists; weights of keys past the
            // block are zero or belong to rows of the target that nobody reads.
            unsafe {
                if L::ACCUMULATORS >= 16 {
                    product.add::<L, 8>(target);
                } else {
                    product.add::<L, 4>(target);
                }
            }
        }
    }
}

const LANE_NUMBERS: [f32; LANES] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// `target[r] += sum over steps of a[r, step] b[step]`, with the rows of b in panels of 16.
struct Product {
    a: *const f32,
    a_row: usize,
    a_step: usize,
    steps: Range<usize>,
    b: *const f32,
    b_panel: usize,
    size: Sizes,
}

impl Product {
    /// # Safety
    /// a, b and R rows of Q values at `target` are valid for all steps.
    #[inline(always)]
    unsafe fn add<L: Lanes, const R: usize>(&self, target: *mut f32) {
        let mut column = 0;
        // SAFETY: columns stay below Q; the rest by this function's contract.
        unsafe {
            if L::ACCUMULATORS >= 16 {
                while column + 2 * LANES <= self.size.q {
                    self.add_columns::<L, R, 2>(target.add(column), column);
                    column += 2 * LANES;
                }
            }
            while column < self.size.q {
                self.add_columns::<L, R, 1>(target.add(column), column);
                column += LANES;
            }
        }
    }

    /// # Safety
    /// As for [`Product::add`].
    #[inline(always)]
    unsafe fn add_columns<L: Lanes, const R: usize, const C: usize>(&self, target: *mut f32, column: usize) {
        // SAFETY: by this function's contract; a run of steps never leaves the panel it starts in.
        unsafe {
            let mut tile = load_tile::<L, R, C>(target, self.size.q);
            let mut step = self.steps.start;
            while step < self.steps.end {
                let depth = (PANEL - step % PANEL).min(self.steps.end - step);
                let b = self.b.add(step / PANEL * self.b_panel + step % PANEL * self.size.q + column);
                fma_tile(
                    &mut tile,
                    self.a.add(step * self.a_step),
                    self.a_row,
                    self.a_step,
                    b,
                    self.size.q,
                    LANES,
                    depth,
                );
                step += depth;
            }
            store_tile(&tile, target, self.size.q);
        }
    }
}
