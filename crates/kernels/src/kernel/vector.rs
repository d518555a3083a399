//! One vector register as the tile kernels use it: eight lanes on AVX2, sixteen on AVX-512.
//!
//! [`crate::lanes`] always has sixteen lanes, on AVX2 as a pair of registers; a register tile has to count registers one by one.
//! Values are only made and used inside functions compiled for the instruction set and called after the run-time check, which is what
//! every SAFETY sentence below rests on.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

/// A register of f32, and the ways to fill one from operands.
pub(super) trait Vector: Copy {
    /// f32 per register.
    const LANES: usize;
    /// Rows of a tile that is two registers wide: two accumulators per row, two registers of B and one of A.
    const TILE_ROWS: usize;
    /// Rows of the largest tile in the exact order of bf16: half of `TILE_ROWS` holds both chains, more goes over B twice; see `tile`.
    const STEP_ROWS: usize;
    /// With so few rows memory is slower than the products: B is read at its speed, each line once.
    const FEW_ROWS: usize;
    /// k of B that one pass over the rows goes through, so that what it reads stays in L1; see `tile`.
    const CHUNK: usize;

    /// Zeros.
    unsafe fn zero() -> Self;
    /// `LANES` values from `at`.
    unsafe fn load(at: *const f32) -> Self;
    /// Writes `LANES` values to `at`.
    unsafe fn store(self, at: *mut f32);
    /// The value at `at` in every lane.
    unsafe fn broadcast(at: *const f32) -> Self;
    /// The first bf16 of each of `LANES` pairs, as f32.
    unsafe fn even(at: *const u16) -> Self;
    /// The second bf16 of each of `LANES` pairs, as f32.
    unsafe fn odd(at: *const u16) -> Self;
    /// `self * b + c`, rounded once.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// `self + b`.
    unsafe fn add(self, b: Self) -> Self;
}

impl Vector for __m256 {
    const LANES: usize = 8;
    /// 12 accumulators + 2 + 1 of 16 registers; two pipes with a latency of 4 (Zen) or 5 need 8 or 10 chains.
    const TILE_ROWS: usize = 6;
    const STEP_ROWS: usize = 3;
    /// As many as have a tile of a whole panel's width.
    const FEW_ROWS: usize = 3;
    const CHUNK: usize = 256;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: runs under avx2 and fma (module comment).
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(at: *const f32) -> __m256 {
        // SAFETY: as above; the caller lends 8 values.
        unsafe { _mm256_loadu_ps(at) }
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: as above; the caller lends 8 values.
        unsafe { _mm256_storeu_ps(at, self) }
    }
    #[inline(always)]
    unsafe fn broadcast(at: *const f32) -> __m256 {
        // SAFETY: as above; the caller lends the value.
        unsafe { _mm256_broadcast_ss(&*at) }
    }
    #[inline(always)]
    unsafe fn even(at: *const u16) -> __m256 {
        // SAFETY: as above; the caller lends 8 pairs.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(at.cast()))) }
    }
    #[inline(always)]
    unsafe fn odd(at: *const u16) -> __m256 {
        // SAFETY: as above; the caller lends 8 pairs.
        unsafe {
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(at.cast()), high))
        }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: __m256, c: __m256) -> __m256 {
        // SAFETY: runs under avx2 and fma (module comment).
        unsafe { _mm256_fmadd_ps(self, b, c) }
    }
    #[inline(always)]
    unsafe fn add(self, b: __m256) -> __m256 {
        // SAFETY: runs under avx2 and fma (module comment).
        unsafe { _mm256_add_ps(self, b) }
    }
}

impl Vector for __m512 {
    const LANES: usize = 16;
    /// 28 accumulators + 2 + 1 of 32 registers; per k 28 FMAs against 16 loads, so the two FMA pipes decide and not the load ports.
    const TILE_ROWS: usize = 14;
    const STEP_ROWS: usize = 14;
    const FEW_ROWS: usize = 4;
    /// A panel of 1024 k is half of a 1 MiB L2 at most, and 14 rows reuse it: no need to cut it for L1.
    const CHUNK: usize = usize::MAX;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: runs under avx512f (module comment).
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn load(at: *const f32) -> __m512 {
        // SAFETY: as above; the caller lends 16 values.
        unsafe { _mm512_loadu_ps(at) }
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: as above; the caller lends 16 values.
        unsafe { _mm512_storeu_ps(at, self) }
    }
    #[inline(always)]
    unsafe fn broadcast(at: *const f32) -> __m512 {
        // SAFETY: as above; the caller lends the value.
        unsafe { _mm512_set1_ps(*at) }
    }
    #[inline(always)]
    unsafe fn even(at: *const u16) -> __m512 {
        // SAFETY: as above; the caller lends 16 pairs.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(at.cast()))) }
    }
    #[inline(always)]
    unsafe fn odd(at: *const u16) -> __m512 {
        // SAFETY: as above; the caller lends 16 pairs.
        unsafe {
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(at.cast()), high))
        }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: __m512, c: __m512) -> __m512 {
        // SAFETY: runs under avx512f (module comment).
        unsafe { _mm512_fmadd_ps(self, b, c) }
    }
    #[inline(always)]
    unsafe fn add(self, b: __m512) -> __m512 {
        // SAFETY: runs under avx512f (module comment).
        unsafe { _mm512_add_ps(self, b) }
    }
}
