//! The bf16 panel kernels of `vdpbf16ps`: register tiles of two vectors, as in `tile`, on operands as they are.
#![allow(unsafe_code)]

use super::tile::{Product, Tile, panel, prefetch};
use super::vector::Vector;
use super::{PANEL, Panel};
use std::arch::x86_64::*;

/// The machine's own order: `vdpbf16ps` adds the odd, then the even product of each pair.
///
/// # Safety
/// As [`super::Operand::panel`], on a machine with AVX-512-BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn panel_native(call: Panel<u16>) {
    // SAFETY: as the caller promises; the features are those of the product.
    unsafe { panel::<__m512, Dot, _>(call, call.a.start, call.a.stride) };
}

/// The AMX order with `vdpbf16ps`: an A with every other element zero leaves one FMA per lane and instruction, with denormals
/// flushed as the tile unit flushes them; hence half the native rate. It is A that is cut in halves, not B, so that a word of weights is
/// loaded once: one row would be bound by the masked loads. (Infinite operands give NaN here and infinity there.)
///
/// # Safety
/// As [`super::Operand::panel`], on a machine with AVX-512-BF16, called with denormals flushed in MXCSR.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn panel_exact(call: Panel<u16>) {
    // SAFETY: as the caller promises; the features are those of the product.
    unsafe { panel::<__m512, MaskedDot, _>(call, call.a.start, call.a.stride) };
}

/// bf16 in the order of `vdpbf16ps`.
struct Dot;

impl Product<__m512> for Dot {
    type A = u16;
    type B = u16;
    const TILE_ROWS: usize = __m512::TILE_ROWS;

    #[inline(always)]
    unsafe fn tile<const ROWS: usize, const W: usize>(tile: Tile<u16, u16>) {
        let Tile { a, lda, mut b, k, next, .. } = tile;
        // SAFETY: the caller lends ROWS rows of A and C and k rows of B; k is even, so pairs are whole.
        unsafe {
            let mut sums = tile.load_sums::<__m512, ROWS, W>();
            for pair in 0..k / 2 {
                prefetch::<__m512, ROWS, W, _>(b, next, pair);
                let w = pairs::<W>(b);
                for row in 0..ROWS {
                    let x = bf16s(broadcast_pair(a.add(row * lda + 2 * pair)));
                    for vector in 0..W {
                        sums[row][vector] = _mm512_dpbf16_ps(sums[row][vector], x, w[vector]);
                    }
                }
                b = b.add(2 * PANEL);
            }
            tile.store_sums(&sums);
        }
    }
}

/// bf16 in the order of `TDPBF16PS`.
struct MaskedDot;

impl Product<__m512> for MaskedDot {
    type A = u16;
    type B = u16;
    /// Each output has an even and an odd chain: 6 rows x 2 vectors x 2 chains, 2 of B, 2 of A.
    const TILE_ROWS: usize = 6;

    #[inline(always)]
    unsafe fn tile<const ROWS: usize, const W: usize>(tile: Tile<u16, u16>) {
        const EVEN: __mmask32 = 0x5555_5555;
        const ODD: __mmask32 = 0xaaaa_aaaa;
        let Tile { a, lda, mut b, k, next, .. } = tile;
        // SAFETY: the caller lends ROWS rows of A and C and k rows of B; k is a multiple of 32.
        unsafe {
            let mut sums = tile.load_sums::<__m512, ROWS, W>();
            for step in 0..k / 32 {
                // [row][vector][even, odd]
                let mut chains = [[[_mm512_setzero_ps(); 2]; W]; ROWS];
                for pair in 0..16 {
                    prefetch::<__m512, ROWS, W, _>(b, next, 16 * step + pair);
                    let w = pairs::<W>(b);
                    for row in 0..ROWS {
                        let x = broadcast_pair(a.add(row * lda + 32 * step + 2 * pair));
                        for (parity, mask) in [EVEN, ODD].into_iter().enumerate() {
                            let half = bf16s(_mm512_maskz_mov_epi16(mask, x));
                            for vector in 0..W {
                                let chain = &mut chains[row][vector][parity];
                                *chain = _mm512_dpbf16_ps(*chain, half, w[vector]);
                            }
                        }
                    }
                    b = b.add(2 * PANEL);
                }
                for row in 0..ROWS {
                    for vector in 0..W {
                        let [even, odd] = chains[row][vector];
                        sums[row][vector] = _mm512_add_ps(sums[row][vector], _mm512_add_ps(even, odd));
                    }
                }
            }
            tile.store_sums(&sums);
        }
    }
}

/// W vectors of sixteen pairs of bf16.
#[inline(always)]
unsafe fn pairs<const W: usize>(at: *const u16) -> [__m512bh; W] {
    // SAFETY: runs under avx512bf16; the caller lends 32 elements for each.
    unsafe {
        let mut w = [bf16s(_mm512_setzero_si512()); W];
        for vector in 0..W {
            w[vector] = bf16s(_mm512_loadu_si512(at.add(32 * vector).cast()));
        }
        w
    }
}

/// One pair of bf16 in every lane.
#[inline(always)]
unsafe fn broadcast_pair(at: *const u16) -> __m512i {
    // SAFETY: runs under avx512f; the caller lends 2 elements.
    unsafe { _mm512_set1_epi32(at.cast::<i32>().read_unaligned()) }
}

#[inline(always)]
fn bf16s(pairs: __m512i) -> __m512bh {
    // SAFETY: both types are 64 bytes of plain data.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(pairs) }
}
