//! Moving operands about as 32-bit words: an f32, or a pair of bf16 that are neighbours along the summed axis.
//!
//! In words the two precisions have the same layouts: a panel is `[K or K/2][32]` words, a row of A is K or K/2 words. Packing is
//! then building words from rows of numbers and, where the source runs the other way, transposing blocks of 16 x 16 words.
#![allow(unsafe_code)]

use super::{Operand, PANEL};
use crate::bf16;
use crate::isa::Isa;
#[cfg(target_arch = "x86_64")]
use crate::lanes::{Avx2, Avx512};
use crate::lanes::{Lanes, Portable, per_isa};

/// Words per side of a transposed block.
pub(crate) const BLOCK: usize = 16;

type Block = [[u32; BLOCK]; BLOCK];

/// Lanes that know how to transpose a block.
pub(crate) trait Words: Lanes {
    /// `out[i * stride + j] = block[j][i]`.
    ///
    /// # Safety
    /// `out` is writable for 16 runs of 16 words, `stride` apart.
    #[inline(always)]
    unsafe fn transpose_block(block: &Block, out: *mut u32, stride: usize) {
        for i in 0..BLOCK {
            for j in 0..BLOCK {
                // SAFETY: lent by the caller.
                unsafe { out.add(i * stride + j).write(block[j][i]) };
            }
        }
    }
}

impl Words for Portable {}

#[cfg(target_arch = "x86_64")]
impl Words for Avx2 {
    #[inline(always)]
    unsafe fn transpose_block(block: &Block, out: *mut u32, stride: usize) {
        use std::arch::x86_64::*;
        // SAFETY: runs under avx2, as every method of `Avx2`; `block` is 16 x 64 bytes; `out` is lent by the caller.
        unsafe {
            // Quarters of 8 x 8, the two that fill a line of `out` one after the other.
            for (row, column) in [(0, 0), (8, 0), (0, 8), (8, 8)] {
                let mut x = [_mm256_setzero_si256(); 8];
                for i in 0..8 {
                    x[i] = _mm256_loadu_si256(block[row + i].as_ptr().add(column).cast());
                }
                // Words, then double words, within each 128-bit lane; then the lanes.
                let mut y = x;
                for i in (0..8).step_by(2) {
                    y[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
                    y[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
                }
                for i in (0..8).step_by(4) {
                    x[i] = _mm256_unpacklo_epi64(y[i], y[i + 2]);
                    x[i + 1] = _mm256_unpackhi_epi64(y[i], y[i + 2]);
                    x[i + 2] = _mm256_unpacklo_epi64(y[i + 1], y[i + 3]);
                    x[i + 3] = _mm256_unpackhi_epi64(y[i + 1], y[i + 3]);
                }
                for i in 0..4 {
                    let low = _mm256_permute2x128_si256::<0x20>(x[i], x[i + 4]);
                    let high = _mm256_permute2x128_si256::<0x31>(x[i], x[i + 4]);
                    _mm256_storeu_si256(out.add((column + i) * stride + row).cast(), low);
                    _mm256_storeu_si256(out.add((column + i + 4) * stride + row).cast(), high);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Words for Avx512 {
    #[inline(always)]
    unsafe fn transpose_block(block: &Block, out: *mut u32, stride: usize) {
        use std::arch::x86_64::*;
        // SAFETY: runs under avx512f, as every method of `Avx512`; `block` is 16 x 64 bytes; `out` is lent by the caller.
        unsafe {
            let mut x = [_mm512_setzero_si512(); 16];
            for i in 0..16 {
                x[i] = _mm512_loadu_si512(block[i].as_ptr().cast());
            }
            // Words, then double words, within each 128-bit lane; then the lanes.
            let mut y = x;
            for i in (0..16).step_by(2) {
                y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
                y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
            }
            for i in (0..16).step_by(4) {
                x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
                x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
                x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
                x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
            }
            for i in 0..4 {
                y[i] = _mm512_shuffle_i32x4::<0x88>(x[i], x[i + 4]);
                y[i + 4] = _mm512_shuffle_i32x4::<0xdd>(x[i], x[i + 4]);
                y[i + 8] = _mm512_shuffle_i32x4::<0x88>(x[i + 8], x[i + 12]);
                y[i + 12] = _mm512_shuffle_i32x4::<0xdd>(x[i + 8], x[i + 12]);
            }
            for i in 0..8 {
                let low = _mm512_shuffle_i32x4::<0x88>(y[i], y[i + 8]);
                let high = _mm512_shuffle_i32x4::<0xdd>(y[i], y[i + 8]);
                _mm512_storeu_si512(out.add(i * stride).cast(), low);
                _mm512_storeu_si512(out.add((i + 8) * stride).cast(), high);
            }
        }
    }
}

/// How sixteen words are made from source numbers.
pub(crate) trait WordSource: Copy + Sync {
    /// Source rows that go into one row of words: 1, or 2 when pairs run across rows.
    const ROWS: usize;
    type Number: Copy + Sync;

    /// Words from the numbers at the same places of one or two rows; missing numbers count as zero.
    fn across(rows: &[&[Self::Number]], at: usize, out: &mut [u32; BLOCK]);

    /// Words from consecutive numbers of one row, from number `ROWS * at`; missing numbers count as zero.
    fn along(row: &[Self::Number], at: usize, out: &mut [u32; BLOCK]);
}

/// f32 to f32.
#[derive(Clone, Copy)]
pub(crate) struct Plain;
/// f32, rounded to pairs of bf16.
#[derive(Clone, Copy)]
pub(crate) struct Rounded;
/// bf16 to pairs of bf16.
#[derive(Clone, Copy)]
pub(crate) struct Paired;

impl WordSource for Plain {
    const ROWS: usize = 1;
    type Number = f32;

    #[inline(always)]
    fn across(rows: &[&[f32]], at: usize, out: &mut [u32; BLOCK]) {
        Plain::along(rows.first().copied().unwrap_or(&[]), at, out);
    }

    #[inline(always)]
    fn along(row: &[f32], at: usize, out: &mut [u32; BLOCK]) {
        *out = chunk::<f32, BLOCK>(row, at, 0.0).map(f32::to_bits);
    }
}

impl WordSource for Rounded {
    const ROWS: usize = 2;
    type Number = f32;

    #[inline(always)]
    fn across(rows: &[&[f32]], at: usize, out: &mut [u32; BLOCK]) {
        let low = chunk::<f32, BLOCK>(rows.first().copied().unwrap_or(&[]), at, 0.0);
        let high = chunk::<f32, BLOCK>(rows.get(1).copied().unwrap_or(&[]), at, 0.0);
        for i in 0..BLOCK {
            out[i] = bf16::rounded_bits(low[i]) >> 16 | bf16::rounded_bits(high[i]);
        }
    }

    #[inline(always)]
    fn along(row: &[f32], at: usize, out: &mut [u32; BLOCK]) {
        let numbers = chunk::<f32, { 2 * BLOCK }>(row, 2 * at, 0.0);
        for i in 0..BLOCK {
            out[i] = bf16::rounded_bits(numbers[2 * i]) >> 16 | bf16::rounded_bits(numbers[2 * i + 1]);
        }
    }
}

impl WordSource for Paired {
    const ROWS: usize = 2;
    type Number = u16;

    #[inline(always)]
    fn across(rows: &[&[u16]], at: usize, out: &mut [u32; BLOCK]) {
        let low = chunk::<u16, BLOCK>(rows.first().copied().unwrap_or(&[]), at, 0);
        let high = chunk::<u16, BLOCK>(rows.get(1).copied().unwrap_or(&[]), at, 0);
        for i in 0..BLOCK {
            out[i] = u32::from(low[i]) | u32::from(high[i]) << 16;
        }
    }

    #[inline(always)]
    fn along(row: &[u16], at: usize, out: &mut [u32; BLOCK]) {
        // A word is its two numbers as they lie in memory.
        *out = bytemuck::cast(chunk::<u16, { 2 * BLOCK }>(row, 2 * at, 0));
    }
}

/// `N` numbers from `at`; `zero` past the end.
#[inline(always)]
fn chunk<X: Copy, const N: usize>(row: &[X], at: usize, zero: X) -> [X; N] {
    match row.get(at..).and_then(|rest| rest.first_chunk::<N>()) {
        Some(whole) => *whole,
        None => {
            let mut part = [zero; N];
            let rest = row.get(at..).unwrap_or(&[]);
            part[..rest.len()].copy_from_slice(rest);
            part
        }
    }
}

/// A block of rows to be transposed: `rows` (up to 16 word rows), all of the same length.
pub(crate) struct Transpose<'a, 'b, X> {
    pub(crate) rows: &'a [&'b [X]],
    /// Line c of `out` (lines `stride` words apart) gets column c: 16 words from word `at`, zeros where rows are missing.
    pub(crate) out: &'a mut [u32],
    pub(crate) stride: usize,
    pub(crate) at: usize,
}

/// Rows of numbers to be laid into columns `to..to + width` of a panel, width 16 or 32.
pub(crate) struct PanelRows<'a, 'b, X> {
    /// Consecutive k; row r of words comes from rows `ROWS * r..`, zeros where rows are missing.
    pub(crate) rows: &'a [&'b [X]],
    /// The panel's words from the first word row on.
    pub(crate) out: &'a mut [u32],
    pub(crate) to: usize,
    pub(crate) width: usize,
}

/// Columns of a panel given as lines of numbers with k running along them.
pub(crate) struct PanelLines<'a, 'b, X> {
    /// Line c is column `to + c` of the panel, missing lines are zero.
    pub(crate) lines: &'a [&'b [X]],
    /// The whole panel.
    pub(crate) out: &'a mut [u32],
    pub(crate) to: usize,
    pub(crate) width: usize,
}

per_isa! {
    fn transpose_plain = transpose_plain_body(work: Transpose<f32>);
    fn transpose_rounded = transpose_rounded_body(work: Transpose<f32>);
    fn transpose_paired = transpose_paired_body(work: Transpose<u16>);
    fn rows_plain = rows_plain_body(work: PanelRows<f32>);
    fn rows_rounded = rows_rounded_body(work: PanelRows<f32>);
    fn rows_paired = rows_paired_body(work: PanelRows<u16>);
    fn lines_plain = lines_plain_body(work: PanelLines<f32>);
    fn lines_rounded = lines_rounded_body(work: PanelLines<f32>);
    fn lines_paired = lines_paired_body(work: PanelLines<u16>);
}

#[inline(always)]
fn transpose_plain_body<L: Words>(work: Transpose<f32>) {
    transpose_body::<L, Plain>(work);
}
#[inline(always)]
fn transpose_rounded_body<L: Words>(work: Transpose<f32>) {
    transpose_body::<L, Rounded>(work);
}
#[inline(always)]
fn transpose_paired_body<L: Words>(work: Transpose<u16>) {
    transpose_body::<L, Paired>(work);
}
#[inline(always)]
fn rows_plain_body<L: Words>(work: PanelRows<f32>) {
    rows_body::<Plain>(work);
}
#[inline(always)]
fn rows_rounded_body<L: Words>(work: PanelRows<f32>) {
    rows_body::<Rounded>(work);
}
#[inline(always)]
fn rows_paired_body<L: Words>(work: PanelRows<u16>) {
    rows_body::<Paired>(work);
}
#[inline(always)]
fn lines_plain_body<L: Words>(work: PanelLines<f32>) {
    lines_body::<L, Plain>(work);
}
#[inline(always)]
fn lines_rounded_body<L: Words>(work: PanelLines<f32>) {
    lines_body::<L, Rounded>(work);
}
#[inline(always)]
fn lines_paired_body<L: Words>(work: PanelLines<u16>) {
    lines_body::<L, Paired>(work);
}

#[inline(always)]
fn transpose_body<L: Words, S: WordSource>(work: Transpose<S::Number>) {
    let Transpose { rows, out, stride, at } = work;
    let columns = rows.first().map_or(0, |row| row.len());
    assert!(at + BLOCK <= stride && (columns == 0 || (columns - 1) * stride + at + BLOCK <= out.len()));
    let mut block: Block = [[0; BLOCK]; BLOCK];
    let mut spare: Block = [[0; BLOCK]; BLOCK];
    for first in (0..columns).step_by(BLOCK) {
        for (words, rows) in block.iter_mut().zip(rows.chunks(S::ROWS)) {
            S::across(rows, first, words);
        }
        if first + BLOCK <= columns {
            // SAFETY: lines first..first+16 hold words at..at+16, by the assertion.
            unsafe { L::transpose_block(&block, out.as_mut_ptr().add(first * stride + at), stride) };
        } else {
            // SAFETY: `spare` is 16 runs of 16 words.
            unsafe { L::transpose_block(&block, spare.as_mut_ptr().cast(), BLOCK) };
            for (line, words) in (first..columns).zip(&spare) {
                out[line * stride + at..][..BLOCK].copy_from_slice(words);
            }
        }
    }
}

#[inline(always)]
fn rows_body<S: WordSource>(work: PanelRows<S::Number>) {
    let PanelRows { rows, out, to, width } = work;
    let mut rows = rows.chunks(S::ROWS);
    for line in out.chunks_exact_mut(PANEL) {
        let rows = rows.next().unwrap_or(&[]);
        for (group, words) in line[to..to + width].chunks_exact_mut(BLOCK).enumerate() {
            let words: &mut [u32; BLOCK] = words.try_into().expect("16 words");
            S::across(rows, group * BLOCK, words);
        }
    }
}

/// Blocks of each line that are fetched before they are needed: sixteen lines at once are more than the machine follows by itself, and a
/// column of 1024 bf16s ends before it would have begun to.
const AHEAD: usize = 4;

/// Fetches a cache line.
#[inline(always)]
fn fetch<X>(at: *const X) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address is harmless.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Fetches a cache line that is going to be overwritten.
#[inline(always)]
fn fetch_to_write<X>(at: *const X) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address is harmless.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_ET0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[inline(always)]
fn lines_body<L: Words, S: WordSource>(work: PanelLines<S::Number>) {
    let PanelLines { lines, out, to, width } = work;
    let word_rows = out.len() / PANEL;
    let mut block: Block = [[0; BLOCK]; BLOCK];
    let mut spare: Block = [[0; BLOCK]; BLOCK];
    for group in (0..width).step_by(BLOCK) {
        let lines = lines.get(group..).unwrap_or(&[]);
        for at in (0..word_rows).step_by(BLOCK) {
            for (column, words) in block.iter_mut().enumerate() {
                let line = lines.get(column).copied().unwrap_or(&[]);
                for piece in (0..S::ROWS * size_of::<S::Number>() * BLOCK).step_by(64) {
                    fetch(line.as_ptr().wrapping_add(S::ROWS * (at + AHEAD * BLOCK)).cast::<u8>().wrapping_add(piece));
                }
                S::along(line, at, words);
            }
            for row in at + BLOCK..at + 2 * BLOCK {
                fetch_to_write(out.as_ptr().wrapping_add(row * PANEL + to + group));
            }
            if at + BLOCK <= word_rows {
                // SAFETY: word rows at..at+16 of the panel hold 16 columns from to + group.
                unsafe { L::transpose_block(&block, out.as_mut_ptr().add(at * PANEL + to + group), PANEL) };
            } else {
                // SAFETY: `spare` is 16 runs of 16 words.
                unsafe { L::transpose_block(&block, spare.as_mut_ptr().cast(), BLOCK) };
                for (row, words) in (at..word_rows).zip(&spare) {
                    out[row * PANEL + to + group..][..BLOCK].copy_from_slice(words);
                }
            }
        }
    }
}

/// Operands of type `T` made from numbers of type `Self`: which of the compiled bodies does it.
pub(crate) trait IntoOperand<T: Operand>: Copy + Send + Sync + Sized {
    fn operand(self) -> T;
    fn transpose(isa: Isa, work: Transpose<Self>);
    fn panel_rows(isa: Isa, work: PanelRows<Self>);
    fn panel_lines(isa: Isa, work: PanelLines<Self>);
}

impl IntoOperand<f32> for f32 {
    fn operand(self) -> f32 {
        self
    }
    fn transpose(isa: Isa, work: Transpose<f32>) {
        transpose_plain(isa, work);
    }
    fn panel_rows(isa: Isa, work: PanelRows<f32>) {
        rows_plain(isa, work);
    }
    fn panel_lines(isa: Isa, work: PanelLines<f32>) {
        lines_plain(isa, work);
    }
}

impl IntoOperand<u16> for f32 {
    fn operand(self) -> u16 {
        bf16::from_f32(self)
    }
    fn transpose(isa: Isa, work: Transpose<f32>) {
        transpose_rounded(isa, work);
    }
    fn panel_rows(isa: Isa, work: PanelRows<f32>) {
        rows_rounded(isa, work);
    }
    fn panel_lines(isa: Isa, work: PanelLines<f32>) {
        lines_rounded(isa, work);
    }
}

impl IntoOperand<u16> for u16 {
    fn operand(self) -> u16 {
        self
    }
    fn transpose(isa: Isa, work: Transpose<u16>) {
        transpose_paired(isa, work);
    }
    fn panel_rows(isa: Isa, work: PanelRows<u16>) {
        rows_paired(isa, work);
    }
    fn panel_lines(isa: Isa, work: PanelLines<u16>) {
        lines_paired(isa, work);
    }
}
