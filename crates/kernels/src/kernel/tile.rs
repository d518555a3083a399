//! The panel kernels that multiply with FMAs, for every vector width: register tiles of `TILE_ROWS` rows by two registers.
//!
//! | order | one step of a tile | products per two loads of B |
//! | --- | --- | --- |
//! | f32 | one k: two vectors of B, one broadcast of A per row | 2 `TILE_ROWS` FMAs |
//! | f32, B in bf16 | one pair: the even k, then the odd one, each half widened in registers | the same, and 2 widenings |
//! | bf16, native | one pair: the odd k, then the even one, each half widened in registers (a shift or a mask) | the same, and 2 widenings |
//! | bf16, exact | 16 pairs: an even and an odd chain from zero, then C + (even + odd) | the same, and 2 additions per 32 k |
//!
//! A comes as f32 in all four (`Rows::wide`): widened once for all panels, it costs the inner loop nothing. In the exact order a tile
//! of `STEP_ROWS` rows holds both chains if they fit into the accumulators. If not, it goes over the 16 pairs twice, first for the even
//! chains, then for the odd ones: that widens B half as often, which counts on AVX-512, where widening takes the pipes of the FMAs, but
//! stores the even sums in between, and on Zen 3 each 12 vector stores hold up the FMAs for 22 cycles.
//!
//! Rows are cut into tiles of nearly equal height, because a tile of two thirds of `TILE_ROWS` already fills the pipes and a tile of 1
//! does not. On AVX2 a tile is half a panel wide, and the rows go by in chunks of k whose B stays in L1.
#![allow(unsafe_code)]

use super::vector::Vector;
use super::{Operand, PANEL, Panel};
use std::arch::asm;
use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};

/// Bytes that few rows fetch ahead: what a core reads during two trips to memory.
const AHEAD: usize = 4096;

/// Pairs of k per step of the exact order.
const STEP: usize = 16;

/// A register tile: a few rows of C, two vectors wide, or four.
#[derive(Clone, Copy)]
pub(super) struct Tile<A, B> {
    /// Row r of A starts at `a + r * lda`.
    pub(super) a: *const A,
    pub(super) lda: usize,
    /// The tile's first column of B; k or pairs of k are a panel's width apart.
    pub(super) b: *const B,
    pub(super) k: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
    /// What many rows fetch meanwhile, one line per line of B.
    pub(super) next: *const i8,
}

/// What a tile computes, on vectors of type `V`.
pub(super) trait Product<V: Vector> {
    /// Operands of A, as the kernel reads them.
    type A;
    /// Operands of B, as they are packed.
    type B;
    /// Rows of the largest tile.
    const TILE_ROWS: usize;

    /// # Safety
    /// ROWS rows of A and C (W vectors wide) and k rows of B are readable, C writable; runs under the features of `V`.
    unsafe fn tile<const ROWS: usize, const W: usize>(tile: Tile<Self::A, Self::B>);
}

/// f32: one FMA chain per output, k ascending.
pub(super) struct Chain;
/// f32 with B in bf16, which widens without rounding: the chain of f32.
pub(super) struct WideChain;
/// bf16 in the machine's order: one FMA chain per output, the odd k of each pair first, as `vdpbf16ps` does it.
pub(super) struct Pairs;
/// bf16 in the order of `TDPBF16PS`.
pub(super) struct Steps;

/// All tiles of a panel.
///
/// # Safety
/// As [`super::Operand::panel`], `a.wide` set; runs under the features of `V`.
#[inline(always)]
pub(super) unsafe fn panel<V, P, T>(panel: Panel<T>, a: *const P::A, lda: usize)
where
    V: Vector,
    P: Product<V>,
    T: Operand<B = P::B>,
{
    let Panel { a: rows, b, k, c, ldc, accumulate, next } = panel;
    // Half the rows, twice the width: few rows need their chains side by side, and read each line of B but once.
    let wide = 4 * V::LANES <= PANEL && 2 * rows.rows <= P::TILE_ROWS;
    let (rows, width) = (rows.rows, if wide { 4 * V::LANES } else { 2 * V::LANES });
    let tiles = rows.div_ceil(P::TILE_ROWS);
    // Bytes of a panel per k.
    let line = PANEL * size_of::<P::B>();
    for first_k in (0..k).step_by(V::CHUNK.min(k.max(1))) {
        let chunk = V::CHUNK.min(k - first_k);
        for column in (0..PANEL).step_by(width) {
            let mut first = 0;
            for tile in 0..tiles {
                let end = rows * (tile + 1) / tiles;
                // The first two tiles (of few rows: the one tile on its two visits) each fetch half of the same part of the next panel;
                // later ones have nothing left to fetch, and pointing them at B itself costs next to nothing.
                let visit = column / width * tiles + tile;
                let next = match visit {
                    0 | 1 => next.cast::<i8>().wrapping_add(first_k * line + visit * chunk * line / 2),
                    _ => b.cast::<i8>().wrapping_add(first_k * line),
                };
                // SAFETY: row `first`, column `column` and k `first_k` lie inside what the caller lent.
                let tile = unsafe {
                    Tile {
                        a: a.add(first * lda + first_k),
                        lda,
                        b: b.byte_add(first_k * line + column * 4),
                        k: chunk,
                        c: c.add(first * ldc + column),
                        ldc,
                        accumulate: accumulate || first_k > 0,
                        next,
                    }
                };
                // SAFETY: the tile's rows lie inside what the caller lent; the features are the caller's.
                unsafe { tile_of_rows::<V, P>(end - first, wide, tile) };
                first = end;
            }
        }
    }
}

#[inline(always)]
unsafe fn tile_of_rows<V: Vector, P: Product<V>>(rows: usize, wide: bool, tile: Tile<P::A, P::B>) {
    // SAFETY: as the caller promises. What no panel of this vector width asks for compiles to nothing.
    unsafe {
        match rows {
            1 if V::LANES == 8 && wide => P::tile::<1, 4>(tile),
            2 if V::LANES == 8 && wide => P::tile::<2, 4>(tile),
            3 if V::LANES == 8 && wide => P::tile::<3, 4>(tile),
            1 => P::tile::<1, 2>(tile),
            2 => P::tile::<2, 2>(tile),
            3 => P::tile::<3, 2>(tile),
            4 if P::TILE_ROWS >= 4 => P::tile::<4, 2>(tile),
            5 if P::TILE_ROWS >= 5 => P::tile::<5, 2>(tile),
            6 if P::TILE_ROWS >= 6 => P::tile::<6, 2>(tile),
            7 if P::TILE_ROWS >= 7 => P::tile::<7, 2>(tile),
            8 if P::TILE_ROWS >= 8 => P::tile::<8, 2>(tile),
            9 if P::TILE_ROWS >= 9 => P::tile::<9, 2>(tile),
            10 if P::TILE_ROWS >= 10 => P::tile::<10, 2>(tile),
            11 if P::TILE_ROWS >= 11 => P::tile::<11, 2>(tile),
            12 if P::TILE_ROWS >= 12 => P::tile::<12, 2>(tile),
            13 if P::TILE_ROWS >= 13 => P::tile::<13, 2>(tile),
            14 if P::TILE_ROWS >= 14 => P::tile::<14, 2>(tile),
            height => unreachable!("a tile of {height} rows"),
        }
    }
}

impl<V: Vector> Product<V> for Chain {
    type A = f32;
    type B = f32;
    const TILE_ROWS: usize = V::TILE_ROWS;

    #[inline(always)]
    unsafe fn tile<const ROWS: usize, const W: usize>(tile: Tile<f32, f32>) {
        let Tile { a, lda, mut b, k, .. } = tile;
        // SAFETY: the caller lends ROWS rows of A and C and k rows of B.
        unsafe {
            let mut sums = tile.load_sums::<V, ROWS, W>();
            for k in 0..k {
                prefetch::<V, ROWS, W, _>(b, tile.next, k);
                multiply(&mut sums, a.add(k), lda, b, V::load);
                b = b.add(PANEL);
            }
            tile.store_sums(&sums);
        }
    }
}

impl<V: Vector> Product<V> for WideChain {
    type A = f32;
    type B = u16;
    const TILE_ROWS: usize = V::TILE_ROWS;

    #[inline(always)]
    unsafe fn tile<const ROWS: usize, const W: usize>(tile: Tile<f32, u16>) {
        let Tile { a, lda, mut b, k, .. } = tile;
        // SAFETY: the caller lends ROWS rows of A and C and k rows of B, of an odd k the whole last pair.
        unsafe {
            let mut sums = tile.load_sums::<V, ROWS, W>();
            for pair in 0..k / 2 {
                prefetch::<V, ROWS, W, _>(b, tile.next, pair);
                multiply(&mut sums, a.add(2 * pair), lda, b, V::even);
                read_again();
                multiply(&mut sums, a.add(2 * pair + 1), lda, b, V::odd);
                b = b.add(2 * PANEL);
            }
            // A zero more would turn a sum of -0 into +0.
            if k % 2 == 1 {
                multiply(&mut sums, a.add(k - 1), lda, b, V::even);
            }
            tile.store_sums(&sums);
        }
    }
}

impl<V: Vector> Product<V> for Pairs {
    type A = f32;
    type B = u16;
    const TILE_ROWS: usize = V::TILE_ROWS;

    #[inline(always)]
    unsafe fn tile<const ROWS: usize, const W: usize>(tile: Tile<f32, u16>) {
        let Tile { a, lda, mut b, k, .. } = tile;
        // SAFETY: the caller lends ROWS rows of A and C and k rows of B; k is even, so pairs are whole.
        unsafe {
            let mut sums = tile.load_sums::<V, ROWS, W>();
            for pair in 0..k / 2 {
                prefetch::<V, ROWS, W, _>(b, tile.next, pair);
                multiply(&mut sums, a.add(2 * pair + 1), lda, b, V::odd);
                read_again();
                multiply(&mut sums, a.add(2 * pair), lda, b, V::even);
                b = b.add(2 * PANEL);
            }
            tile.store_sums(&sums);
        }
    }
}

impl<V: Vector> Product<V> for Steps {
    type A = f32;
    type B = u16;
    const TILE_ROWS: usize = V::STEP_ROWS;

    #[inline(always)]
    unsafe fn tile<const ROWS: usize, const W: usize>(tile: Tile<f32, u16>) {
        let Tile { a, lda, mut b, k, .. } = tile;
        // SAFETY: the caller lends ROWS rows of A and C and k rows of B; k is a multiple of 32.
        unsafe {
            for step in 0..k / (2 * STEP) {
                let a = a.add(2 * STEP * step);
                let (mut even, mut odd) = ([[V::zero(); W]; ROWS], [[V::zero(); W]; ROWS]);
                let both = 2 * ROWS * W <= 2 * V::TILE_ROWS;
                for pair in 0..STEP {
                    let b = b.add(pair * 2 * PANEL);
                    prefetch::<V, ROWS, W, _>(b, tile.next, STEP * step + pair);
                    multiply(&mut even, a.add(2 * pair), lda, b, V::even);
                    if both {
                        read_again();
                        multiply(&mut odd, a.add(2 * pair + 1), lda, b, V::odd);
                    }
                }
                for pair in 0..if both { 0 } else { STEP } {
                    multiply(&mut odd, a.add(2 * pair + 1), lda, b.add(pair * 2 * PANEL), V::odd);
                }
                for row in 0..ROWS {
                    for vector in 0..W {
                        let c = tile.c.add(row * tile.ldc + vector * V::LANES);
                        let sum = if tile.accumulate || step > 0 { V::load(c) } else { V::zero() };
                        sum.add(even[row][vector].add(odd[row][vector])).store(c);
                    }
                }
                b = b.add(STEP * 2 * PANEL);
            }
        }
    }
}

/// One k: every row's A times the W vectors that `read` reads from a line of B, added to the row's sums. The shorter side of the tile
/// is held in registers, of the longer side one at a time.
///
/// # Safety
/// `a` is readable at ROWS multiples of `lda`, `b` as `read` needs it, W times; runs under the features of `V`.
#[inline(always)]
unsafe fn multiply<V: Vector, B, const ROWS: usize, const W: usize>(
    sums: &mut [[V; W]; ROWS],
    a: *const f32,
    lda: usize,
    b: *const B,
    read: unsafe fn(*const B) -> V,
) {
    // SAFETY: lent by the caller; a vector of B takes `LANES` words.
    unsafe {
        let (x, w) =
            (|row: usize| V::broadcast(a.add(row * lda)), |vector: usize| read(b.byte_add(4 * V::LANES * vector)));
        if ROWS < W {
            let mut rows = [V::zero(); ROWS];
            for row in 0..ROWS {
                rows[row] = x(row);
            }
            for vector in 0..W {
                let w = w(vector);
                for row in 0..ROWS {
                    sums[row][vector] = rows[row].mul_add(w, sums[row][vector]);
                }
            }
        } else {
            let mut line = [V::zero(); W];
            for vector in 0..W {
                line[vector] = w(vector);
            }
            for row in 0..ROWS {
                let x = x(row);
                for vector in 0..W {
                    sums[row][vector] = x.mul_add(line[vector], sums[row][vector]);
                }
            }
        }
    }
}

/// Makes the compiler read B again for the other half of its pairs: holding on to the words would take the registers of sums.
#[inline(always)]
fn read_again() {
    // SAFETY: no instruction at all.
    unsafe { asm!("", options(nostack, preserves_flags)) };
}

impl<A, B> Tile<A, B> {
    /// The sums so far: those in C, or zeros.
    #[inline(always)]
    pub(super) unsafe fn load_sums<V: Vector, const ROWS: usize, const W: usize>(&self) -> [[V; W]; ROWS] {
        // SAFETY: the caller lends ROWS rows of C.
        unsafe {
            let mut sums = [[V::zero(); W]; ROWS];
            if self.accumulate {
                for row in 0..ROWS {
                    for vector in 0..W {
                        sums[row][vector] = V::load(self.c.add(row * self.ldc + vector * V::LANES));
                    }
                }
            }
            sums
        }
    }

    #[inline(always)]
    pub(super) unsafe fn store_sums<V: Vector, const ROWS: usize, const W: usize>(&self, sums: &[[V; W]; ROWS]) {
        for row in 0..ROWS {
            for vector in 0..W {
                // SAFETY: the caller lends ROWS rows of C.
                unsafe { sums[row][vector].store(self.c.add(row * self.ldc + vector * V::LANES)) };
            }
        }
    }
}

/// What iteration `iteration` of a tile fetches while it reads a line (or two) at `b`.
///
/// Many rows reuse a panel, so it is the next one that is fetched, into L2: one line here, the first two tiles together all of it. Few
/// rows read each line once, at the speed of memory: the lines that lie ahead in the same stream, into L1, as many as the tile reads
/// (fetching one of two cost Zen 3 a third of the rate of up to three rows).
#[inline(always)]
pub(super) fn prefetch<V: Vector, const ROWS: usize, const W: usize, B>(
    b: *const B,
    next: *const i8,
    iteration: usize,
) {
    let b = b.cast::<i8>();
    // SAFETY: a prefetch of any address is harmless.
    unsafe {
        if ROWS <= V::FEW_ROWS {
            _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(AHEAD));
            if W * V::LANES == PANEL {
                _mm_prefetch::<_MM_HINT_T0>(b.wrapping_add(AHEAD + 64));
            }
        } else {
            _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(64 * iteration));
        }
    }
}
