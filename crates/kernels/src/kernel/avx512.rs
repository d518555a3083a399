//! The panel kernels on AVX-512: register tiles of up to 14 rows x 32 columns.
//!
//! Per k the f32 tile loads two vectors of B and broadcasts one A per row: 28 FMAs against 16 loads, so the two FMA pipes decide, not
//! the two load ports. Rows are cut into tiles of nearly equal height, because a tile of 8 rows or more already fills the pipes and a
//! tile of 1 does not.
#![allow(unsafe_code)]

use super::PANEL;
use std::arch::x86_64::*;

/// 14 rows x 2 vectors of accumulators, 2 of B, 1 of A: 31 of 32 registers.
const TILE_ROWS: usize = 14;
/// In the AMX order each output has an even and an odd chain: 6 rows x 2 vectors x 2 chains, 2 of B, 2 of A.
const EXACT_TILE_ROWS: usize = 6;
/// With so few rows memory is slower than the products.
const FEW_ROWS: usize = 4;
/// Bytes that few rows fetch ahead: what a core reads during two trips to memory.
const AHEAD: usize = 4096;

/// Calls `tile::<ROWS>` for tiles of nearly equal height that cover `rows`.
macro_rules! cover_rows {
    ($rows:expr, $most:expr, $a:ident, $lda:ident, $b:ident, $k:ident, $c:ident, $ldc:ident, $next:ident,
     |$a_tile:ident, $c_tile:ident, $next_tile:ident| $tile:ident $args:tt, $($height:literal)+) => {{
        let (rows, tiles) = ($rows, $rows.div_ceil($most));
        let mut first = 0;
        for tile in 0..tiles {
            let end = rows * (tile + 1) / tiles;
            // Later tiles have nothing left to fetch: pointing them at B itself costs next to nothing.
            let $next_tile = if tile < 2 { $next.wrapping_add(tile * PANEL / 2 * $k) } else { $b };
            // SAFETY: row `first` lies inside the rows the caller lent.
            let ($a_tile, $c_tile) = unsafe { ($a.add(first * $lda), $c.add(first * $ldc)) };
            match end - first {
                // SAFETY: the tile's rows lie inside what the caller lent; the features are the caller's.
                $($height => unsafe { $tile::<$height> $args },)+
                height => unreachable!("a tile of {height} rows"),
            }
            first = end;
        }
    }};
}

/// # Safety
/// As [`super::Operand::panel`], on a machine with AVX-512.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn panel_f32(
    a: *const f32,
    lda: usize,
    rows: usize,
    b: *const f32,
    k: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
    next: *const f32,
) {
    cover_rows!(rows, TILE_ROWS, a, lda, b, k, c, ldc, next, |a, c, next|
        tile_f32(a, lda, b, k, c, ldc, accumulate, next),
        1 2 3 4 5 6 7 8 9 10 11 12 13 14);
}

#[target_feature(enable = "avx512f")]
unsafe fn tile_f32<const ROWS: usize>(
    a: *const f32,
    lda: usize,
    b: *const f32,
    k: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
    next: *const f32,
) {
    // SAFETY: the caller lends ROWS rows of A and C and k rows of B.
    unsafe {
        let mut sums = load_sums::<ROWS>(c, ldc, accumulate);
        let mut b = b;
        for k in 0..k {
            let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
            prefetch::<ROWS, _>(b, next, k);
            for row in 0..ROWS {
                let x = _mm512_set1_ps(*a.add(row * lda + k));
                sums[row] = [_mm512_fmadd_ps(x, b0, sums[row][0]), _mm512_fmadd_ps(x, b1, sums[row][1])];
            }
            b = b.add(PANEL);
        }
        store_sums(&sums, c, ldc);
    }
}

/// What iteration `iteration` of a tile fetches while it reads two cache lines at `b`.
///
/// Many rows reuse a panel, so it is the next one that is fetched, into L2: one line here, the first two tiles together all of it. Few
/// rows read each line once, at the speed of memory: the lines that lie ahead in the same stream, into L1.
#[inline(always)]
fn prefetch<const ROWS: usize, T>(b: *const T, next: *const T, iteration: usize) {
    let (b, next) = (b.cast::<i8>(), next.cast::<i8>());
    // SAFETY: a prefetch of any address is harmless.
    unsafe {
        if ROWS <= FEW_ROWS {
            _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(AHEAD));
            _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(AHEAD + 64));
        } else {
            _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(64 * iteration));
        }
    }
}

/// The machine's own order: `vdpbf16ps` adds the odd, then the even product of each pair.
///
/// # Safety
/// As [`super::Operand::panel`], on a machine with AVX-512-BF16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) unsafe fn panel_bf16_native(
    a: *const u16,
    lda: usize,
    rows: usize,
    b: *const u16,
    k: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
    next: *const u16,
) {
    cover_rows!(rows, TILE_ROWS, a, lda, b, k, c, ldc, next, |a, c, next|
        tile_native(a, lda, b, k, c, ldc, accumulate, next),
        1 2 3 4 5 6 7 8 9 10 11 12 13 14);
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tile_native<const ROWS: usize>(
    a: *const u16,
    lda: usize,
    b: *const u16,
    k: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
    next: *const u16,
) {
    // SAFETY: the caller lends ROWS rows of A and C and k rows of B; k is even, so pairs are whole.
    unsafe {
        let mut sums = load_sums::<ROWS>(c, ldc, accumulate);
        let mut b = b;
        for pair in 0..k / 2 {
            let (b0, b1) = (pairs(b), pairs(b.add(32)));
            prefetch::<ROWS, _>(b, next, pair);
            for row in 0..ROWS {
                let x = broadcast_pair(a.add(row * lda + 2 * pair));
                sums[row] = [_mm512_dpbf16_ps(sums[row][0], x, b0), _mm512_dpbf16_ps(sums[row][1], x, b1)];
            }
            b = b.add(2 * PANEL);
        }
        store_sums(&sums, c, ldc);
    }
}

/// Sixteen pairs of bf16.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
unsafe fn pairs(at: *const u16) -> __m512bh {
    // SAFETY: the caller lends 32 elements.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(at.cast())) }
}

/// One pair of bf16 in every lane.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
unsafe fn broadcast_pair(at: *const u16) -> __m512bh {
    // SAFETY: the caller lends 2 elements; pairs start at even elements of an allocation aligned to more than 4 bytes.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(at.cast::<i32>().read_unaligned())) }
}

/// The AMX order with `vdpbf16ps`: an A with every other element zero leaves one FMA per lane and instruction, with denormals
/// flushed as the tile unit flushes them; hence half the native rate. It is A that is cut in halves, not B, so that a word of weights is
/// loaded once: one row would be bound by the masked loads. (Infinite operands give NaN here and infinity there.)
///
/// # Safety
/// As [`super::Operand::panel`], on a machine with AVX-512-BF16, called with denormals flushed in MXCSR.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn panel_bf16_exact(
    a: *const u16,
    lda: usize,
    rows: usize,
    b: *const u16,
    k: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
    next: *const u16,
) {
    cover_rows!(rows, EXACT_TILE_ROWS, a, lda, b, k, c, ldc, next, |a, c, next|
        tile_exact(a, lda, b, k, c, ldc, accumulate, next),
        1 2 3 4 5 6);
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn tile_exact<const ROWS: usize>(
    a: *const u16,
    lda: usize,
    b: *const u16,
    k: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
    next: *const u16,
) {
    const EVEN: __mmask32 = 0x5555_5555;
    const ODD: __mmask32 = 0xaaaa_aaaa;
    // SAFETY: the caller lends ROWS rows of A and C and k rows of B; k is a multiple of 32.
    unsafe {
        let mut sums = load_sums::<ROWS>(c, ldc, accumulate);
        let mut b = b;
        for step in 0..k / 32 {
            // [row][vector][even, odd]
            let mut chains = [[[_mm512_setzero_ps(); 2]; 2]; ROWS];
            for pair in 0..16 {
                prefetch::<ROWS, _>(b, next, 16 * step + pair);
                let b_pair = [pairs(b), pairs(b.add(32))];
                for row in 0..ROWS {
                    let at = a.add(row * lda + 32 * step + 2 * pair).cast::<i32>();
                    let x = _mm512_set1_epi32(at.read_unaligned());
                    for (parity, mask) in [EVEN, ODD].into_iter().enumerate() {
                        let half = std::mem::transmute::<__m512i, __m512bh>(_mm512_maskz_mov_epi16(mask, x));
                        for vector in 0..2 {
                            let chain = &mut chains[row][vector][parity];
                            *chain = _mm512_dpbf16_ps(*chain, half, b_pair[vector]);
                        }
                    }
                }
                b = b.add(2 * PANEL);
            }
            add_chains(&mut sums, &chains);
        }
        store_sums(&sums, c, ldc);
    }
}

/// A tile's sums so far: those in C, or zeros.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load_sums<const ROWS: usize>(c: *const f32, ldc: usize, accumulate: bool) -> [[__m512; 2]; ROWS] {
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    if accumulate {
        for row in 0..ROWS {
            // SAFETY: the caller lends ROWS rows of C.
            sums[row] = unsafe { [_mm512_loadu_ps(c.add(row * ldc)), _mm512_loadu_ps(c.add(row * ldc + 16))] };
        }
    }
    sums
}

/// Writes a tile's sums.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store_sums<const ROWS: usize>(sums: &[[__m512; 2]; ROWS], c: *mut f32, ldc: usize) {
    for row in 0..ROWS {
        for vector in 0..2 {
            // SAFETY: the caller lends ROWS rows of C.
            unsafe {
                let at = c.add(row * ldc + 16 * vector);
                _mm512_storeu_ps(at, sums[row][vector]);
            }
        }
    }
}

/// C = C + (even + odd) for a step of 32 k.
#[target_feature(enable = "avx512f")]
#[inline]
fn add_chains<const ROWS: usize>(sums: &mut [[__m512; 2]; ROWS], chains: &[[[__m512; 2]; 2]; ROWS]) {
    for row in 0..ROWS {
        for vector in 0..2 {
            let both = _mm512_add_ps(chains[row][vector][0], chains[row][vector][1]);
            sums[row][vector] = _mm512_add_ps(sums[row][vector], both);
        }
    }
}

/// The AMX order with plain FMAs on widened halves, for AVX-512 without `vdpbf16ps`.
///
/// # Safety
/// As [`super::Operand::panel`], on a machine with AVX-512, called with denormals flushed in MXCSR.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn panel_bf16_fma(
    a: *const u16,
    lda: usize,
    rows: usize,
    b: *const u16,
    k: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
    next: *const u16,
) {
    cover_rows!(rows, EXACT_TILE_ROWS, a, lda, b, k, c, ldc, next, |a, c, next|
        tile_fma(a, lda, b, k, c, ldc, accumulate, next),
        1 2 3 4 5 6);
}

#[target_feature(enable = "avx512f")]
unsafe fn tile_fma<const ROWS: usize>(
    a: *const u16,
    lda: usize,
    b: *const u16,
    k: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
    next: *const u16,
) {
    // SAFETY: the caller lends ROWS rows of A and C and k rows of B; k is a multiple of 32.
    unsafe {
        let mut sums = load_sums::<ROWS>(c, ldc, accumulate);
        let mut b = b;
        for step in 0..k / 32 {
            let mut chains = [[[_mm512_setzero_ps(); 2]; 2]; ROWS];
            for pair in 0..16 {
                prefetch::<ROWS, _>(b, next, 16 * step + pair);
                let (b0, b1) = (widen(_mm512_loadu_si512(b.cast())), widen(_mm512_loadu_si512(b.add(32).cast())));
                for row in 0..ROWS {
                    let x = widen(_mm512_set1_epi32(
                        a.add(row * lda + 32 * step + 2 * pair).cast::<i32>().read_unaligned(),
                    ));
                    for parity in 0..2 {
                        chains[row][0][parity] = _mm512_fmadd_ps(x[parity], b0[parity], chains[row][0][parity]);
                        chains[row][1][parity] = _mm512_fmadd_ps(x[parity], b1[parity], chains[row][1][parity]);
                    }
                }
                b = b.add(2 * PANEL);
            }
            add_chains(&mut sums, &chains);
        }
        store_sums(&sums, c, ldc);
    }
}

/// The even and the odd bf16 of each pair as f32.
#[target_feature(enable = "avx512f")]
#[inline]
fn widen(pairs: __m512i) -> [__m512; 2] {
    let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
    [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), _mm512_castsi512_ps(odd)]
}
