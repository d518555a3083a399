//! Bringing rows of f32 into the form the panel kernels read: copied or rounded, or transposed.

use super::Operand;
use super::words::{BLOCK, IntoOperand, Transpose};
use crate::bf16;
use crate::isa::Isa;
use crate::lanes::{Lanes, per_isa};
use std::ops::Range;

/// The row stride of an operand buffer of `k` columns: whole cache lines, and an odd number of them, so that rows do not fall into
/// the same cache sets.
pub(crate) fn padded_stride<T: Operand>(k: usize) -> usize {
    let line = 64 / size_of::<T>();
    (k.div_ceil(line) | 1) * line
}

per_isa! {
    /// Rounds to bf16, nearest even.
    pub(crate) fn to_bf16 = to_bf16_body(source: &[f32], out: &mut [u16]);
}

#[inline(always)]
#[allow(clippy::extra_unused_type_parameters)] // `per_isa!` names the lane type of every body
fn to_bf16_body<L: Lanes>(source: &[f32], out: &mut [u16]) {
    assert_eq!(source.len(), out.len());
    for (x, y) in source.iter().zip(out) {
        *y = bf16::from_f32(*x);
    }
}

per_isa! {
    /// The same values in f32.
    pub(crate) fn to_f32 = to_f32_body(source: &[u16], out: &mut [f32]);
}

#[inline(always)]
#[allow(clippy::extra_unused_type_parameters)] // `per_isa!` names the lane type of every body
fn to_f32_body<L: Lanes>(source: &[u16], out: &mut [f32]) {
    assert_eq!(source.len(), out.len());
    for (x, y) in source.iter().zip(out) {
        *y = bf16::to_f32(*x);
    }
}

/// Rows `rows` and columns `ks` of the row-major matrix `a` (`lda` columns) into `out`: `width` elements per row (zeros after `ks`),
/// rows `stride` apart.
pub(crate) fn convert_rows<T: Operand>(
    isa: Isa,
    a: &[f32],
    lda: usize,
    rows: Range<usize>,
    ks: Range<usize>,
    out: &mut [T],
    stride: usize,
    width: usize,
) {
    for (line, row) in out.chunks_mut(stride).zip(rows) {
        T::convert(isa, &a[row * lda + ks.start..row * lda + ks.end], &mut line[..ks.len()]);
        line[ks.len()..width].fill(T::from_f32(0.0));
    }
}

/// The transpose of rows `rows`, columns `columns`: line c of `out` holds column `columns.start + c` of each row, then zeros up to
/// `width`; lines are `stride` apart.
pub(crate) fn transpose_rows<'a, S: IntoOperand<T> + 'a, T: Operand>(
    isa: Isa,
    row: impl Fn(usize) -> &'a [S],
    rows: Range<usize>,
    columns: Range<usize>,
    out: &mut [T],
    stride: usize,
    width: usize,
) {
    let numbers_per_word = size_of::<u32>() / size_of::<T>();
    let out: &mut [u32] = bytemuck::cast_slice_mut(out);
    let mut sources: [&[S]; 2 * BLOCK] = [&[]; 2 * BLOCK];
    let step = BLOCK * numbers_per_word;
    for first in (0..width).step_by(step) {
        let count = step.min(rows.len() - first);
        for (at, source) in sources[..count].iter_mut().enumerate() {
            *source = &row(rows.start + first + at)[columns.clone()];
        }
        let (rows, stride, at) = (&sources[..count], stride / numbers_per_word, first / numbers_per_word);
        S::transpose(isa, Transpose { rows, out, stride, at });
    }
}
