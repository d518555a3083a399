//! The panel kernels in plain Rust: the specification of the order of every sum, and the path of machines without AVX2.
#![allow(unsafe_code)]

use super::{PANEL, Panel, Rows, Wide};
use crate::bf16;

/// C`[rows, 32]` (= or +=) A B in f32: per output one FMA chain, k ascending.
///
/// # Safety
/// As [`super::Operand::panel`].
pub(super) unsafe fn panel_f32(panel: Panel<f32>) {
    let Panel { a: Rows { start: a, stride: lda, rows, .. }, b, k, c, ldc, accumulate, .. } = panel;
    for row in 0..rows {
        // SAFETY: the caller lends `rows` rows of A and C and `k` rows of B.
        let (a_row, b, c_row) = unsafe {
            (
                std::slice::from_raw_parts(a.add(row * lda), k),
                std::slice::from_raw_parts(b, k * PANEL),
                std::slice::from_raw_parts_mut(c.add(row * ldc), PANEL),
            )
        };
        if !accumulate {
            c_row.fill(0.0);
        }
        for (x, b_row) in a_row.iter().zip(b.chunks_exact(PANEL)) {
            for (sum, w) in c_row.iter_mut().zip(b_row) {
                *sum = x.mul_add(*w, *sum);
            }
        }
    }
}

/// C`[rows, 32]` (= or +=) A B in f32, B held in bf16: the chain of [`panel_f32`] with the same numbers.
///
/// # Safety
/// As [`super::Operand::panel`].
pub(super) unsafe fn panel_wide(panel: Panel<Wide>) {
    let Panel { a: Rows { start: a, stride: lda, rows, .. }, b, k, c, ldc, accumulate, .. } = panel;
    for row in 0..rows {
        // SAFETY: the caller lends `rows` rows of A and C and `k` rows of B, whole pairs of them.
        let (a_row, b, c_row) = unsafe {
            (
                std::slice::from_raw_parts(a.add(row * lda), k),
                std::slice::from_raw_parts(b, k.next_multiple_of(2) * PANEL),
                std::slice::from_raw_parts_mut(c.add(row * ldc), PANEL),
            )
        };
        if !accumulate {
            c_row.fill(0.0);
        }
        for (x, pair_row) in a_row.chunks(2).zip(b.chunks_exact(2 * PANEL)) {
            for (sum, w) in c_row.iter_mut().zip(pair_row.chunks_exact(2)) {
                for (Wide(x), w) in x.iter().zip(w) {
                    *sum = x.mul_add(bf16::to_f32(*w), *sum);
                }
            }
        }
    }
}

/// C`[rows, 32]` (= or +=) A B in bf16, in the order of `TDPBF16PS`, k a multiple of 32.
///
/// # Safety
/// As [`super::Operand::panel`].
pub(super) unsafe fn panel_steps(panel: Panel<u16>) {
    let Panel { a: Rows { start: a, stride: lda, rows, .. }, b, k, c, ldc, accumulate, .. } = panel;
    for row in 0..rows {
        // SAFETY: the caller lends `rows` rows of A and C and `k` rows of B.
        let (a_row, b, c_row) = unsafe {
            (
                std::slice::from_raw_parts(a.add(row * lda), k),
                std::slice::from_raw_parts(b, k * PANEL),
                std::slice::from_raw_parts_mut(c.add(row * ldc), PANEL),
            )
        };
        if !accumulate {
            c_row.fill(0.0);
        }
        for (a_step, b_step) in a_row.chunks_exact(32).zip(b.chunks_exact(32 * PANEL)) {
            for (column, sum) in c_row.iter_mut().enumerate() {
                let (mut even, mut odd) = (0f32, 0f32);
                for pair in 0..16 {
                    let at = pair * 2 * PANEL + 2 * column;
                    even = fma_flushed(bf16::to_f32(a_step[2 * pair]), bf16::to_f32(b_step[at]), even);
                    odd = fma_flushed(bf16::to_f32(a_step[2 * pair + 1]), bf16::to_f32(b_step[at + 1]), odd);
                }
                *sum = flush(flush(*sum) + flush(even + odd));
            }
        }
    }
}

/// C`[rows, 32]` (= or +=) A B in bf16, in the order of `vdpbf16ps`: per output one FMA chain, of each pair of k the odd one first.
///
/// # Safety
/// As [`super::Operand::panel`].
pub(super) unsafe fn panel_pairs(panel: Panel<u16>) {
    let Panel { a: Rows { start: a, stride: lda, rows, .. }, b, k, c, ldc, accumulate, .. } = panel;
    for row in 0..rows {
        // SAFETY: the caller lends `rows` rows of A and C and `k` rows of B.
        let (a_row, b, c_row) = unsafe {
            (
                std::slice::from_raw_parts(a.add(row * lda), k),
                std::slice::from_raw_parts(b, k * PANEL),
                std::slice::from_raw_parts_mut(c.add(row * ldc), PANEL),
            )
        };
        if !accumulate {
            c_row.fill(0.0);
        }
        for (x, b) in a_row.chunks_exact(2).zip(b.chunks_exact(2 * PANEL)) {
            for (sum, w) in c_row.iter_mut().zip(b.chunks_exact(2)) {
                *sum = fma_flushed(bf16::to_f32(x[1]), bf16::to_f32(w[1]), *sum);
                *sum = fma_flushed(bf16::to_f32(x[0]), bf16::to_f32(w[0]), *sum);
            }
        }
    }
}

/// x * y + z as the hardware computes it with denormal operands read as zero and denormal results flushed to zero.
#[inline]
pub(crate) fn fma_flushed(x: f32, y: f32, z: f32) -> f32 {
    let (x, y, z) = (flush(x), flush(y), flush(z));
    let sum = x.mul_add(y, z);
    if sum.abs() == f32::MIN_POSITIVE {
        // A result a hair under the smallest normal number rounds up to it as a denormal, yet the hardware, which rounds to 24 bits
        // first, sees it below and flushes. The sum in f64 tells the two apart.
        let wide = f64::from(x) * f64::from(y) + f64::from(z);
        let half_step = f64::from(f32::MIN_POSITIVE) * (1.0 - 2f64.powi(-25));
        if wide.abs() < half_step {
            return 0f32.copysign(sum);
        }
    }
    flush(sum)
}

/// Zero of the same sign for a denormal, anything else as it is.
#[inline]
pub(crate) fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0f32.copysign(x) } else { x }
}
