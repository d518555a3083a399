//! The panel kernels on AVX2 with FMA: 3 x 32 register tiles in f32, 2 x 16 with an even and an odd chain in bf16.
#![allow(unsafe_code)]

use super::PANEL;
use std::arch::x86_64::*;

/// # Safety
/// As [`super::Operand::panel`], on a machine with AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn panel_f32(
    a: *const f32,
    lda: usize,
    rows: usize,
    b: *const f32,
    k: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
) {
    for first in (0..rows).step_by(3) {
        // SAFETY: the tile's rows lie inside what the caller lent.
        unsafe {
            let (a, c) = (a.add(first * lda), c.add(first * ldc));
            match rows - first {
                1 => tile_f32::<1>(a, lda, b, k, c, ldc, accumulate),
                2 => tile_f32::<2>(a, lda, b, k, c, ldc, accumulate),
                _ => tile_f32::<3>(a, lda, b, k, c, ldc, accumulate),
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn tile_f32<const ROWS: usize>(
    a: *const f32,
    lda: usize,
    b: *const f32,
    k: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
) {
    // SAFETY: the caller lends ROWS rows of A and C and k rows of B.
    unsafe {
        let mut sums = [[_mm256_setzero_ps(); 4]; ROWS];
        if accumulate {
            for row in 0..ROWS {
                for part in 0..4 {
                    sums[row][part] = _mm256_loadu_ps(c.add(row * ldc + 8 * part));
                }
            }
        }
        for k in 0..k {
            let b = b.add(k * PANEL);
            let mut x = [_mm256_setzero_ps(); ROWS];
            for row in 0..ROWS {
                x[row] = _mm256_broadcast_ss(&*a.add(row * lda + k));
            }
            for part in 0..4 {
                let w = _mm256_loadu_ps(b.add(8 * part));
                for row in 0..ROWS {
                    sums[row][part] = _mm256_fmadd_ps(x[row], w, sums[row][part]);
                }
            }
        }
        for row in 0..ROWS {
            for part in 0..4 {
                _mm256_storeu_ps(c.add(row * ldc + 8 * part), sums[row][part]);
            }
        }
    }
}

/// The AMX order with plain FMAs on widened halves.
///
/// # Safety
/// As [`super::Operand::panel`], on a machine with AVX2 and FMA, called with denormals flushed in MXCSR.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn panel_bf16(
    a: *const u16,
    lda: usize,
    rows: usize,
    b: *const u16,
    k: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
) {
    for half in 0..2 {
        for first in (0..rows).step_by(2) {
            // SAFETY: the tile's rows and 16 columns lie inside what the caller lent.
            unsafe {
                let (a, b, c) = (a.add(first * lda), b.add(half * PANEL), c.add(first * ldc + half * PANEL / 2));
                match rows - first {
                    1 => tile_bf16::<1>(a, lda, b, k, c, ldc, accumulate),
                    _ => tile_bf16::<2>(a, lda, b, k, c, ldc, accumulate),
                }
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
unsafe fn tile_bf16<const ROWS: usize>(
    a: *const u16,
    lda: usize,
    b: *const u16,
    k: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
) {
    // SAFETY: the caller lends ROWS rows of A, 16 columns of C and of B; k is a multiple of 32.
    unsafe {
        for step in 0..k / 32 {
            // [row][vector][even, odd]
            let mut chains = [[[_mm256_setzero_ps(); 2]; 2]; ROWS];
            for pair in 0..16 {
                let b = b.add((16 * step + pair) * 2 * PANEL);
                let w = [widen(_mm256_loadu_si256(b.cast())), widen(_mm256_loadu_si256(b.add(16).cast()))];
                for row in 0..ROWS {
                    let x = a.add(row * lda + 32 * step + 2 * pair).cast::<i32>().read_unaligned();
                    let x = widen(_mm256_set1_epi32(x));
                    for vector in 0..2 {
                        for parity in 0..2 {
                            let chain = &mut chains[row][vector][parity];
                            *chain = _mm256_fmadd_ps(x[parity], w[vector][parity], *chain);
                        }
                    }
                }
            }
            for row in 0..ROWS {
                for vector in 0..2 {
                    let at = c.add(row * ldc + 8 * vector);
                    let start = if accumulate || step > 0 { _mm256_loadu_ps(at) } else { _mm256_setzero_ps() };
                    let sum = _mm256_add_ps(chains[row][vector][0], chains[row][vector][1]);
                    _mm256_storeu_ps(at, _mm256_add_ps(start, sum));
                }
            }
        }
    }
}

/// The even and the odd bf16 of each pair as f32.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn widen(pairs: __m256i) -> [__m256; 2] {
    let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32));
    [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), _mm256_castsi256_ps(odd)]
}
