//! Matrix products: dense, grouped by expert, and transposed for weight gradients.
//!
//! - [`matmul`], [`grouped_matmul`]: C = A B with B packed. A block of rows of A is copied (f32) or rounded (bf16) into a padded buffer
//!   that stays in L2 while the panels of B pass by. In precision f32 B may be held in bf16 ([`PackedB::from_stored`]).
//! - [`matmul_tn`], [`grouped_matmul_tn`]: C = A^T B, the sum over rows: B is packed into panels, A transposed block by block, then the
//!   same kernels run with rows as the summed axis. Each expert's sum starts at its own first row.
//!
//! Work is split over (expert, row block, column block). The order of each output's sum is that of [`matmul_reference`] whatever the
//! split, the ISA and the thread count (precision `bf16-native` excepted, see there).
//!
//! Axes: N rows (of all experts together), M output rows, K summed axis, E experts.
#![allow(unsafe_code)]

use crate::isa::Isa;
use crate::kernel::{
    Block, IntoOperand, K_BLOCK, Mode, Operand, PANEL, Rows, Stored, Wide, block, convert_rows, mode_for,
    padded_stride, transpose_rows,
};
use crate::pack::{MatView, Operands, PackedB, RaggedPanels};
use crate::parallel::{SharedSlice, for_each_job_with, longest_first};
use crate::precision::Precision;
use crate::workspace::Workspace;
use std::ops::Range;

mod reference;
pub use reference::{grouped_matmul_reference, grouped_matmul_tn_reference, matmul_reference, matmul_tn_reference};

/// What happens to the output's old content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accum {
    /// The output is overwritten.
    Replace,
    /// Each output's sum starts from the value already there.
    Add,
}

/// Rows of A per job: the block (128 x 1024 f32 = 512 KiB) takes half of a 1 MiB L2.
pub(crate) const ROW_BLOCK: usize = 128;

/// c_mn = a_mk B, B packed from one `[K, N]` matrix.
pub fn matmul(isa: Isa, a_mk: &[f32], m: usize, b: &PackedB, c_mn: &mut [f32], accum: Accum) {
    assert_eq!(b.experts(), 1, "matmul: B holds {} matrices, use grouped_matmul", b.experts());
    grouped_matmul(isa, a_mk, &[0, m as u32], b, c_mn, accum);
}

/// Rows `row_offsets[e]..row_offsets[e + 1]` of c = the same rows of a times expert e's matrix.
pub fn grouped_matmul(isa: Isa, a_nk: &[f32], row_offsets: &[u32], b: &PackedB, c: &mut [f32], accum: Accum) {
    let rows = check_offsets("grouped_matmul", row_offsets, b.experts());
    let (k, n) = (b.k(), b.n());
    assert!(
        a_nk.len() == rows * k && c.len() == rows * n,
        "grouped_matmul: a has {} elements, c {}; [{rows}, {k}] times [{k}, {n}] needs {} and {}",
        a_nk.len(),
        c.len(),
        rows * k,
        rows * n
    );
    assert!(!b.is_gate_up(), "grouped_matmul: B was packed for gated experts");
    match b.operands() {
        Operands::F32 => grouped::<f32>(isa, a_nk, row_offsets, b, c, accum),
        Operands::Bf16 => grouped::<u16>(isa, a_nk, row_offsets, b, c, accum),
        Operands::Wide => grouped::<Wide>(isa, a_nk, row_offsets, b, c, accum),
    }
}

/// c_mn = a_tm^T b_tn: the weight gradient of a linear layer, summed over its T rows in order.
pub fn matmul_tn(
    isa: Isa,
    precision: Precision,
    a_tm: &[f32],
    b_tn: &[f32],
    t: usize,
    m: usize,
    n: usize,
    c_mn: &mut [f32],
    accum: Accum,
) {
    grouped_matmul_tn(isa, precision, a_tm, b_tn, &[0, t as u32], m, n, c_mn, accum);
}

/// For each expert, c_emn`[e]` = a^T b over its rows. An expert without rows gets zeros (with [`Accum::Add`]: keeps what is there).
pub fn grouped_matmul_tn(
    isa: Isa,
    precision: Precision,
    a_nm: &[f32],
    b_nn: &[f32],
    row_offsets: &[u32],
    m: usize,
    n: usize,
    c_emn: &mut [f32],
    accum: Accum,
) {
    let experts = row_offsets.len().saturating_sub(1);
    let rows = check_offsets("grouped_matmul_tn", row_offsets, experts);
    assert!(
        a_nm.len() == rows * m && b_nn.len() == rows * n && c_emn.len() == experts * m * n,
        "grouped_matmul_tn: a has {} elements, b {}, c {}; {rows} rows, [{experts}, {m}, {n}] needs {}, {} and {}",
        a_nm.len(),
        b_nn.len(),
        c_emn.len(),
        rows * m,
        rows * n,
        experts * m * n
    );
    if precision.is_bf16() {
        grouped_tn::<u16>(isa, precision, a_nm, b_nn, row_offsets, m, n, c_emn, accum);
    } else {
        grouped_tn::<f32>(isa, precision, a_nm, b_nn, row_offsets, m, n, c_emn, accum);
    }
}

/// Row offsets must rise from 0; returns their last.
pub(crate) fn check_offsets(who: &str, row_offsets: &[u32], experts: usize) -> usize {
    assert!(
        row_offsets.len() == experts + 1 && row_offsets[0] == 0 && row_offsets.is_sorted(),
        "{who}: {experts} experts need {} rising row offsets from 0, got {row_offsets:?}",
        experts + 1
    );
    row_offsets[experts] as usize
}

/// Part of a grouped product that one thread computes on its own.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) expert: usize,
    pub(crate) rows: Range<usize>,
    pub(crate) panels: Range<usize>,
}

/// Cuts every expert's rows into even blocks of at most `row_block`, and the columns too if that leaves threads without work.
pub(crate) fn split(row_offsets: &[u32], panels: usize, row_block: usize) -> Vec<Job> {
    let mut jobs = Vec::new();
    let blocks: usize = row_offsets.windows(2).map(|o| ((o[1] - o[0]) as usize).div_ceil(row_block)).sum();
    let wanted = 4 * rayon::current_num_threads();
    let column_parts = if blocks == 0 { 1 } else { wanted.div_ceil(blocks).clamp(1, panels.max(1)) };
    for (expert, offsets) in row_offsets.windows(2).enumerate() {
        for rows in even_blocks(offsets[0] as usize..offsets[1] as usize, row_block) {
            for panels in even_blocks(0..panels, panels.div_ceil(column_parts).max(1)) {
                jobs.push(Job { expert, rows: rows.clone(), panels });
            }
        }
    }
    jobs
}

impl Job {
    /// The same rows in four column blocks: a block of A is made ready four times, B is still read once.
    pub(crate) fn cut_columns(self) -> impl Iterator<Item = Job> {
        let Job { expert, rows, panels } = self;
        let most = panels.len().div_ceil(4).max(1);
        even_blocks(panels, most).map(move |panels| Job { expert, rows: rows.clone(), panels })
    }

    /// The same columns in up to four row blocks of 32 or more, for jobs that take rows through several products.
    pub(crate) fn cut_rows(self) -> impl Iterator<Item = Job> {
        let Job { expert, rows, panels } = self;
        let most = rows.len().div_ceil(4).max(32);
        even_blocks(rows, most).map(move |rows| Job { expert, rows, panels: panels.clone() })
    }
}

/// Cuts a range into the fewest parts of at most `most`, of nearly equal size.
pub(crate) fn even_blocks(range: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    let parts = range.len().div_ceil(most);
    let len = range.len();
    (0..parts).map(move |part| range.start + len * part / parts..range.start + len * (part + 1) / parts)
}

fn grouped<T: Operand>(isa: Isa, a_nk: &[f32], row_offsets: &[u32], b: &PackedB, c: &mut [f32], accum: Accum) {
    let mode = mode_for(isa, b.precision());
    let (k, n, k_summed, k_padded) = (b.k(), b.n(), b.k_summed::<T>(), b.k_padded());
    if n == 0 {
        return;
    }
    let jobs = longest_first(split(row_offsets, b.panels(), ROW_BLOCK), |job| job.rows.len(), Job::cut_columns);
    let c = SharedSlice::new(c);
    if k == 0 {
        if accum == Accum::Replace {
            // SAFETY: no other thread holds a part.
            unsafe { c.slice(0, row_offsets[row_offsets.len() - 1] as usize * n) }.fill(0.0);
        }
        return;
    }
    let stride = padded_stride::<T>(K_BLOCK.min(k_summed));
    let scratch = || (Workspace::<T>::take(ROW_BLOCK * stride), mode.room(ROW_BLOCK, K_BLOCK.min(k_summed)));
    for_each_job_with(jobs.len(), scratch, |(packed, room), job| {
        let _tiles = mode.tiles();
        let Job { expert, rows, panels } = jobs[job].clone();
        let first_column = panels.start * PANEL;
        for ks in k_blocks(k_summed) {
            convert_rows(mode.lanes(), a_nk, k, rows.clone(), ks.start..ks.end.min(k), packed, stride, ks.len());
            let a = Rows::new(packed.as_ptr(), stride, rows.len());
            let accumulate = accum == Accum::Add || ks.start > 0;
            // SAFETY: the rows and panels of this job belong to no other job; `packed` holds ROW_BLOCK (a multiple of 16) rows.
            unsafe {
                let a = mode.left(a, ks.len(), room);
                let c = c.pointer(rows.start * n + first_column);
                let (b, panels) = (b.expert(expert), panels.clone());
                block(mode, Block { a, b, k_padded, ks, panels, c, n, accumulate });
            }
        }
    });
}

/// Blocks of the summed axis, multiples of every K_STEP but the last.
pub(crate) fn k_blocks(k_summed: usize) -> impl Iterator<Item = Range<usize>> {
    (0..k_summed).step_by(K_BLOCK).map(move |start| start..(start + K_BLOCK).min(k_summed))
}

fn grouped_tn<T: Operand<B = T> + Stored>(
    isa: Isa,
    precision: Precision,
    a_nm: &[f32],
    b_nn: &[f32],
    row_offsets: &[u32],
    m: usize,
    n: usize,
    c_emn: &mut [f32],
    accum: Accum,
) where
    f32: IntoOperand<T>,
{
    let mode = mode_for(isa, precision);
    let panels = RaggedPanels::<T>::pack(isa, row_offsets, n, MatView::row_major(b_nn, 0, n));
    let gather = |rows: Range<usize>, columns: Range<usize>, out: &mut [T], stride: usize, width: usize| {
        transpose_rows(mode.lanes(), |row| &a_nm[row * m..(row + 1) * m], rows, columns, out, stride, width);
    };
    tn_product(mode, &gather, &panels, row_offsets, m, n, c_emn, accum);
}

/// Per expert c`[M, N]` = A^T B, where `transposed(rows, columns, out, stride, width)` writes A^T of those rows and columns to `out`:
/// one line of `width` (rows, then zeros) per column, `stride` apart.
pub(crate) fn tn_product<T: Operand<B = T>>(
    mode: Mode,
    transposed: &(impl Fn(Range<usize>, Range<usize>, &mut [T], usize, usize) + Sync),
    b: &RaggedPanels<T>,
    row_offsets: &[u32],
    m: usize,
    n: usize,
    c_emn: &mut [f32],
    accum: Accum,
) {
    if m * n == 0 {
        return;
    }
    let experts = row_offsets.len() - 1;
    // Here the block of "rows" is a block of M, the same for every expert.
    let m_offsets: Vec<u32> = (0..=experts).map(|expert| (expert * m) as u32).collect();
    let jobs = split(&m_offsets, b.panels(), ROW_BLOCK);
    let jobs = longest_first(jobs, |job| job.rows.len() * b.k_padded(job.expert), Job::cut_columns);
    let longest = (0..experts).map(|expert| b.k_padded(expert)).max().unwrap_or(0).min(K_BLOCK);
    let stride = padded_stride::<T>(longest);
    let c = SharedSlice::new(c_emn);
    let scratch = || (Workspace::<T>::take(ROW_BLOCK * stride), mode.room(ROW_BLOCK, longest));
    for_each_job_with(jobs.len(), scratch, |(packed, room), job| {
        let _tiles = mode.tiles();
        let Job { expert, rows: c_rows, panels } = jobs[job].clone();
        let columns = c_rows.start - expert * m..c_rows.end - expert * m;
        let rows = row_offsets[expert] as usize..row_offsets[expert + 1] as usize;
        let first = panels.start * PANEL;
        let width = n.min(panels.end * PANEL) - first;
        if rows.is_empty() && accum == Accum::Replace {
            for row in c_rows.clone() {
                // SAFETY: these rows and columns belong to this job alone.
                unsafe { c.slice(row * n + first, width) }.fill(0.0);
            }
        }
        let k_padded = b.k_padded(expert);
        for ks in k_blocks(k_padded) {
            let block_rows = rows.start + ks.start..(rows.start + ks.end).min(rows.end);
            transposed(block_rows, columns.clone(), packed, stride, ks.len());
            let a = Rows::new(packed.as_ptr(), stride, c_rows.len());
            let accumulate = accum == Accum::Add || ks.start > 0;
            // SAFETY: the rows and panels of this job belong to no other job; `packed` holds ROW_BLOCK (a multiple of 16) lines.
            unsafe {
                let a = mode.left(a, ks.len(), room);
                let c = c.pointer(c_rows.start * n + first);
                let (b, panels) = (b.expert(expert), panels.clone());
                block(mode, Block { a, b, k_padded, ks, panels, c, n, accumulate });
            }
        }
    });
}

#[cfg(test)]
mod tests;
