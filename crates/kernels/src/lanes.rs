//! Lane arithmetic: one trait, four widths of hardware, the same IEEE operation in every lane.
//!
//! [`Real`] is the arithmetic of one value, or of sixteen at once; [`Lanes`] adds loads and stores of sixteen. A kernel body is written
//! once, generic over [`Lanes`] and `#[inline(always)]`; the macro `per_isa!` compiles it for AVX-512 ([`Avx512`]), AVX2 ([`Avx2`], two
//! registers per value) and baseline ([`Portable`], an array). Every method is one correctly rounded operation per lane, so the three
//! give the same bits. Reductions across lanes follow one fixed tree.
#![allow(unsafe_code)]

use crate::isa::Isa;
use std::sync::OnceLock;

/// Lanes in a [`Lanes`] value, on every instruction set.
pub const LANES: usize = 16;

/// Arithmetic of f32, on one value (`f32`) or lane by lane.
pub trait Real: Copy {
    /// The same value in every lane.
    fn splat(x: f32) -> Self;
    /// `self + b`.
    fn add(self, b: Self) -> Self;
    /// `self - b`.
    fn sub(self, b: Self) -> Self;
    /// `self * b`.
    fn mul(self, b: Self) -> Self;
    /// `self / b`.
    fn div(self, b: Self) -> Self;
    /// `self * b + c`, rounded once.
    fn mul_add(self, b: Self, c: Self) -> Self;
    /// `c - self * b`, rounded once.
    fn neg_mul_add(self, b: Self, c: Self) -> Self;
    /// `if self > b { self } else { b }`: the second operand if either is NaN.
    fn max(self, b: Self) -> Self;
    /// `if self < b { self } else { b }`: the second operand if either is NaN.
    fn min(self, b: Self) -> Self;
    /// Correctly rounded square root.
    fn sqrt(self) -> Self;
    /// The value without its sign.
    fn abs(self) -> Self;
    /// `if a < b { x } else { y }`.
    fn select_lt(a: Self, b: Self, x: Self, y: Self) -> Self;
    /// For `self = 1.5 * 2^23 + n`, n in -126..=128: 2^(n-1), and +0 for n = -126.
    fn half_pow2_of_shifted(self) -> Self;
    /// For a positive normal `self`: `(m, e)` with `self = m 2^e` and m in [sqrt(1/2), sqrt(2)).
    fn split_exponent(self) -> (Self, Self);
}

/// Sixteen lanes of [`Real`].
pub trait Lanes: Real + Send + Sync {
    /// How many accumulators (of 16 lanes) a register-blocked loop may keep: 24 of 32 zmm, or 6 pairs of 16 ymm.
    const ACCUMULATORS: usize;
    /// Reads 16 values.
    ///
    /// # Safety
    /// `source` is valid for reading 16 `f32`; no alignment is needed.
    unsafe fn load_ptr(source: *const f32) -> Self;
    /// Writes 16 values.
    ///
    /// # Safety
    /// `target` is valid for writing 16 `f32`; no alignment is needed.
    unsafe fn store_ptr(self, target: *mut f32);
    /// Sum over the lanes: halves added, 16 to 8 to 4 to 2 to 1 (lane i takes lane i + width/2).
    fn sum_across(self) -> f32;
    /// Largest lane.
    fn max_across(self) -> f32;

    /// Rows become columns: lane i of value j is lane j of value i.
    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        let mut all = [[0.0; LANES]; LANES];
        for (row, all) in rows.into_iter().zip(&mut all) {
            row.store(all);
        }
        let mut columns = [Self::splat(0.0); LANES];
        for i in 0..LANES {
            let mut column = [0.0; LANES];
            for j in 0..LANES {
                column[j] = all[j][i];
            }
            columns[i] = Self::load(&column);
        }
        columns
    }

    /// The first 16 values of `source`.
    #[inline(always)]
    fn load(source: &[f32]) -> Self {
        assert!(source.len() >= LANES);
        // SAFETY: the slice holds at least 16 values.
        unsafe { Self::load_ptr(source.as_ptr()) }
    }

    /// All of `source` (at most 16 values), the other lanes holding `fill`.
    #[inline(always)]
    fn load_first(source: &[f32], fill: f32) -> Self {
        let mut padded = [fill; LANES];
        padded[..source.len()].copy_from_slice(source);
        Self::load(&padded)
    }

    /// Writes the first 16 values of `target`.
    #[inline(always)]
    fn store(self, target: &mut [f32]) {
        assert!(target.len() >= LANES);
        // SAFETY: the slice holds at least 16 values.
        unsafe { self.store_ptr(target.as_mut_ptr()) }
    }

    /// Fills `target` (at most 16 values) with the first lanes.
    #[inline(always)]
    fn store_first(self, target: &mut [f32]) {
        let mut all = [0.0; LANES];
        self.store(&mut all);
        target.copy_from_slice(&all[..target.len()]);
    }
}

impl Real for f32 {
    #[inline(always)]
    fn splat(x: f32) -> f32 {
        x
    }
    #[inline(always)]
    fn add(self, b: f32) -> f32 {
        self + b
    }
    #[inline(always)]
    fn sub(self, b: f32) -> f32 {
        self - b
    }
    #[inline(always)]
    fn mul(self, b: f32) -> f32 {
        self * b
    }
    #[inline(always)]
    fn div(self, b: f32) -> f32 {
        self / b
    }
    #[inline(always)]
    fn mul_add(self, b: f32, c: f32) -> f32 {
        f32::mul_add(self, b, c)
    }
    #[inline(always)]
    fn neg_mul_add(self, b: f32, c: f32) -> f32 {
        f32::mul_add(-self, b, c)
    }
    #[inline(always)]
    fn max(self, b: f32) -> f32 {
        if self > b { self } else { b }
    }
    #[inline(always)]
    fn min(self, b: f32) -> f32 {
        if self < b { self } else { b }
    }
    #[inline(always)]
    fn sqrt(self) -> f32 {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn abs(self) -> f32 {
        f32::abs(self)
    }
    #[inline(always)]
    fn select_lt(a: f32, b: f32, x: f32, y: f32) -> f32 {
        if a < b { x } else { y }
    }
    #[inline(always)]
    fn half_pow2_of_shifted(self) -> f32 {
        f32::from_bits((self.to_bits() << 23).wrapping_add(126 << 23))
    }
    #[inline(always)]
    fn split_exponent(self) -> (f32, f32) {
        let exponent = (self.to_bits().wrapping_sub(SQRT_HALF_BITS) as i32) >> 23;
        (f32::from_bits(self.to_bits().wrapping_sub((exponent << 23) as u32)), exponent as f32)
    }
}

/// Bits of the f32 nearest to sqrt(1/2).
const SQRT_HALF_BITS: u32 = 0x3f35_04f3;

/// Sixteen lanes as an array: what the baseline build runs on, and the specification of the other two.
#[derive(Clone, Copy, Debug)]
pub struct Portable([f32; LANES]);

#[inline(always)]
fn map2(a: Portable, b: Portable, f: impl Fn(f32, f32) -> f32) -> Portable {
    let mut out = [0.0; LANES];
    for i in 0..LANES {
        out[i] = f(a.0[i], b.0[i]);
    }
    Portable(out)
}

impl Real for Portable {
    #[inline(always)]
    fn splat(x: f32) -> Portable {
        Portable([x; LANES])
    }
    #[inline(always)]
    fn add(self, b: Portable) -> Portable {
        map2(self, b, |x, y| x + y)
    }
    #[inline(always)]
    fn sub(self, b: Portable) -> Portable {
        map2(self, b, |x, y| x - y)
    }
    #[inline(always)]
    fn mul(self, b: Portable) -> Portable {
        map2(self, b, |x, y| x * y)
    }
    #[inline(always)]
    fn div(self, b: Portable) -> Portable {
        map2(self, b, |x, y| x / y)
    }
    #[inline(always)]
    fn mul_add(self, b: Portable, c: Portable) -> Portable {
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = f32::mul_add(self.0[i], b.0[i], c.0[i]);
        }
        Portable(out)
    }
    #[inline(always)]
    fn neg_mul_add(self, b: Portable, c: Portable) -> Portable {
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = f32::mul_add(-self.0[i], b.0[i], c.0[i]);
        }
        Portable(out)
    }
    #[inline(always)]
    fn max(self, b: Portable) -> Portable {
        map2(self, b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    fn min(self, b: Portable) -> Portable {
        map2(self, b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    fn sqrt(self) -> Portable {
        map2(self, self, |x, _| x.sqrt())
    }
    #[inline(always)]
    fn abs(self) -> Portable {
        map2(self, self, |x, _| x.abs())
    }
    #[inline(always)]
    fn select_lt(a: Portable, b: Portable, x: Portable, y: Portable) -> Portable {
        let mut out = [0.0; LANES];
        for i in 0..LANES {
            out[i] = if a.0[i] < b.0[i] { x.0[i] } else { y.0[i] };
        }
        Portable(out)
    }
    #[inline(always)]
    fn half_pow2_of_shifted(self) -> Portable {
        map2(self, self, |x, _| Real::half_pow2_of_shifted(x))
    }
    #[inline(always)]
    fn split_exponent(self) -> (Portable, Portable) {
        (map2(self, self, |x, _| x.split_exponent().0), map2(self, self, |x, _| x.split_exponent().1))
    }
}

impl Lanes for Portable {
    const ACCUMULATORS: usize = 8;
    #[inline(always)]
    unsafe fn load_ptr(source: *const f32) -> Portable {
        // SAFETY: the caller vouches for 16 readable values.
        Portable(unsafe { source.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store_ptr(self, target: *mut f32) {
        // SAFETY: the caller vouches for 16 writable values.
        unsafe { target.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    fn sum_across(self) -> f32 {
        let mut sums = self.0;
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                sums[i] += sums[i + width];
            }
            width /= 2;
        }
        sums[0]
    }
    #[inline(always)]
    fn max_across(self) -> f32 {
        self.0.iter().fold(f32::NEG_INFINITY, |most, &x| if x > most { x } else { most })
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The two hardware implementations. Their values are only made and used inside functions that `per_isa!` compiles with the
    //! features named here and calls after the run-time check, which is what every SAFETY sentence below rests on.
    use super::{Lanes, Real, SQRT_HALF_BITS};
    use std::arch::x86_64::*;

    /// One zmm register.
    #[derive(Clone, Copy, Debug)]
    pub struct Avx512(__m512);

    /// Two ymm registers: lanes 0..8 and 8..16.
    #[derive(Clone, Copy, Debug)]
    pub struct Avx2(__m256, __m256);

    impl Real for Avx512 {
        #[inline(always)]
        fn splat(x: f32) -> Avx512 {
            // SAFETY: runs under avx512f (module comment).
            Avx512(unsafe { _mm512_set1_ps(x) })
        }
        #[inline(always)]
        fn add(self, b: Avx512) -> Avx512 {
            // SAFETY: runs under avx512f (module comment).
            Avx512(unsafe { _mm512_add_ps(self.0, b.0) })
        }
        #[inline(always)]
        fn sub(self, b: Avx512) -> Avx512 {
            // SAFETY: runs under avx512f (module comment).
            Avx512(unsafe { _mm512_sub_ps(self.0, b.0) })
        }
        #[inline(always)]
        fn mul(self, b: Avx512) -> Avx512 {
            // SAFETY: runs under avx512f (module comment).
            Avx512(unsafe { _mm512_mul_ps(self.0, b.0) })
        }
        #[inline(always)]
        fn div(self, b: Avx512) -> Avx512 {
            // SAFETY: runs under avx512f (module comment).
            Avx512(unsafe { _mm512_div_ps(self.0, b.0) })
        }
        #[inline(always)]
        fn mul_add(self, b: Avx512, c: Avx512) -> Avx512 {
            // SAFETY: runs under avx512f (module comment).
            Avx512(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
        }
        #[inline(always)]
        fn neg_mul_add(self, b: Avx512, c: Avx512) -> Avx512 {
            // SAFETY: runs under avx512f (module comment).
            Avx512(unsafe { _mm512_fnmadd_ps(self.0, b.0, c.0) })
        }
        #[inline(always)]
        fn max(self, b: Avx512) -> Avx512 {
            // SAFETY: runs under avx512f (module comment).
            Avx512(unsafe { _mm512_max_ps(self.0, b.0) })
        }
        #[inline(always)]
        fn min(self, b: Avx512) -> Avx512 {
            // SAFETY: runs under avx512f (module comment).
            Avx512(unsafe { _mm512_min_ps(self.0, b.0) })
        }
        #[inline(always)]
        fn sqrt(self) -> Avx512 {
            // SAFETY: runs under avx512f (module comment).
            Avx512(unsafe { _mm512_sqrt_ps(self.0) })
        }
        #[inline(always)]
        fn abs(self) -> Avx512 {
            // SAFETY: runs under avx512f (module comment).
            Avx512(unsafe { _mm512_abs_ps(self.0) })
        }
        #[inline(always)]
        fn select_lt(a: Avx512, b: Avx512, x: Avx512, y: Avx512) -> Avx512 {
            // SAFETY: runs under avx512f (module comment).
            Avx512(unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a.0, b.0), y.0, x.0) })
        }
        #[inline(always)]
        fn half_pow2_of_shifted(self) -> Avx512 {
            // SAFETY: runs under avx512f (module comment).
            unsafe {
                let shifted = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
                Avx512(_mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(126 << 23))))
            }
        }
        #[inline(always)]
        fn split_exponent(self) -> (Avx512, Avx512) {
            // SAFETY: runs under avx512f (module comment).
            unsafe {
                let bits = _mm512_castps_si512(self.0);
                let exponent =
                    _mm512_srai_epi32::<23>(_mm512_sub_epi32(bits, _mm512_set1_epi32(SQRT_HALF_BITS as i32)));
                let mantissa = _mm512_sub_epi32(bits, _mm512_slli_epi32::<23>(exponent));
                (Avx512(_mm512_castsi512_ps(mantissa)), Avx512(_mm512_cvtepi32_ps(exponent)))
            }
        }
    }

    impl Lanes for Avx512 {
        const ACCUMULATORS: usize = 24;
        #[inline(always)]
        unsafe fn load_ptr(source: *const f32) -> Avx512 {
            // SAFETY: avx512f as above; the caller vouches for 16 readable values.
            Avx512(unsafe { _mm512_loadu_ps(source) })
        }
        #[inline(always)]
        unsafe fn store_ptr(self, target: *mut f32) {
            // SAFETY: avx512f as above; the caller vouches for 16 writable values.
            unsafe { _mm512_storeu_ps(target, self.0) }
        }
        #[inline(always)]
        fn sum_across(self) -> f32 {
            // SAFETY: runs under avx512f and avx512dq (module comment).
            unsafe { sum8(_mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0))) }
        }
        #[inline(always)]
        fn max_across(self) -> f32 {
            // SAFETY: runs under avx512f and avx512dq (module comment).
            unsafe { max8(_mm256_max_ps(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0))) }
        }
        #[inline(always)]
        fn transpose(rows: [Avx512; 16]) -> [Avx512; 16] {
            // SAFETY: runs under avx512f (module comment).
            unsafe { transpose16(rows) }
        }
        #[inline(always)]
        fn load_first(source: &[f32], fill: f32) -> Avx512 {
            let mask = ((1u32 << source.len().min(16)) - 1) as u16;
            // SAFETY: runs under avx512f; masked-off lanes are not read, the others lie inside the slice.
            Avx512(unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, source.as_ptr()) })
        }
        #[inline(always)]
        fn store_first(self, target: &mut [f32]) {
            let mask = ((1u32 << target.len().min(16)) - 1) as u16;
            // SAFETY: runs under avx512f; masked-off lanes are not written, the others lie inside the slice.
            unsafe { _mm512_mask_storeu_ps(target.as_mut_ptr(), mask, self.0) }
        }
    }

    /// Interleaves neighbours (1), pairs (2), then quarters of registers (4, 8).
    #[inline(always)]
    unsafe fn transpose16(rows: [Avx512; 16]) -> [Avx512; 16] {
        // SAFETY: called under avx512f.
        unsafe {
            let mut a = rows;
            for i in (0..16).step_by(4) {
                let (r0, r1, r2, r3) = (rows[i].0, rows[i + 1].0, rows[i + 2].0, rows[i + 3].0);
                let (low01, high01) = (_mm512_unpacklo_ps(r0, r1), _mm512_unpackhi_ps(r0, r1));
                let (low23, high23) = (_mm512_unpacklo_ps(r2, r3), _mm512_unpackhi_ps(r2, r3));
                a[i] = Avx512(_mm512_shuffle_ps::<0b01_00_01_00>(low01, low23));
                a[i + 1] = Avx512(_mm512_shuffle_ps::<0b11_10_11_10>(low01, low23));
                a[i + 2] = Avx512(_mm512_shuffle_ps::<0b01_00_01_00>(high01, high23));
                a[i + 3] = Avx512(_mm512_shuffle_ps::<0b11_10_11_10>(high01, high23));
            }
            // a[4 g + c], quarter q: column 4 q + c of rows 4 g .. 4 g + 4.
            let mut out = rows;
            for c in 0..4 {
                let (g0, g1, g2, g3) = (a[c].0, a[4 + c].0, a[8 + c].0, a[12 + c].0);
                let (even01, odd01) =
                    (_mm512_shuffle_f32x4::<0b10_00_10_00>(g0, g1), _mm512_shuffle_f32x4::<0b11_01_11_01>(g0, g1));
                let (even23, odd23) =
                    (_mm512_shuffle_f32x4::<0b10_00_10_00>(g2, g3), _mm512_shuffle_f32x4::<0b11_01_11_01>(g2, g3));
                out[c] = Avx512(_mm512_shuffle_f32x4::<0b10_00_10_00>(even01, even23));
                out[8 + c] = Avx512(_mm512_shuffle_f32x4::<0b11_01_11_01>(even01, even23));
                out[4 + c] = Avx512(_mm512_shuffle_f32x4::<0b10_00_10_00>(odd01, odd23));
                out[12 + c] = Avx512(_mm512_shuffle_f32x4::<0b11_01_11_01>(odd01, odd23));
            }
            out
        }
    }

    /// Lanes i and i+4, then i+2, then i+1.
    #[inline(always)]
    unsafe fn sum8(x: __m256) -> f32 {
        // SAFETY: called under avx2 or wider.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    unsafe fn max8(x: __m256) -> f32 {
        // SAFETY: called under avx2 or wider.
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    impl Real for Avx2 {
        #[inline(always)]
        fn splat(x: f32) -> Avx2 {
            // SAFETY: runs under avx2 and fma (module comment).
            unsafe { Avx2(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        }
        #[inline(always)]
        fn add(self, b: Avx2) -> Avx2 {
            // SAFETY: runs under avx2 and fma (module comment).
            unsafe { Avx2(_mm256_add_ps(self.0, b.0), _mm256_add_ps(self.1, b.1)) }
        }
        #[inline(always)]
        fn sub(self, b: Avx2) -> Avx2 {
            // SAFETY: runs under avx2 and fma (module comment).
            unsafe { Avx2(_mm256_sub_ps(self.0, b.0), _mm256_sub_ps(self.1, b.1)) }
        }
        #[inline(always)]
        fn mul(self, b: Avx2) -> Avx2 {
            // SAFETY: runs under avx2 and fma (module comment).
            unsafe { Avx2(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)) }
        }
        #[inline(always)]
        fn div(self, b: Avx2) -> Avx2 {
            // SAFETY: runs under avx2 and fma (module comment).
            unsafe { Avx2(_mm256_div_ps(self.0, b.0), _mm256_div_ps(self.1, b.1)) }
        }
        #[inline(always)]
        fn mul_add(self, b: Avx2, c: Avx2) -> Avx2 {
            // SAFETY: runs under avx2 and fma (module comment).
            unsafe { Avx2(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1)) }
        }
        #[inline(always)]
        fn neg_mul_add(self, b: Avx2, c: Avx2) -> Avx2 {
            // SAFETY: runs under avx2 and fma (module comment).
            unsafe { Avx2(_mm256_fnmadd_ps(self.0, b.0, c.0), _mm256_fnmadd_ps(self.1, b.1, c.1)) }
        }
        #[inline(always)]
        fn max(self, b: Avx2) -> Avx2 {
            // SAFETY: runs under avx2 and fma (module comment).
            unsafe { Avx2(_mm256_max_ps(self.0, b.0), _mm256_max_ps(self.1, b.1)) }
        }
        #[inline(always)]
        fn min(self, b: Avx2) -> Avx2 {
            // SAFETY: runs under avx2 and fma (module comment).
            unsafe { Avx2(_mm256_min_ps(self.0, b.0), _mm256_min_ps(self.1, b.1)) }
        }
        #[inline(always)]
        fn sqrt(self) -> Avx2 {
            // SAFETY: runs under avx2 and fma (module comment).
            unsafe { Avx2(_mm256_sqrt_ps(self.0), _mm256_sqrt_ps(self.1)) }
        }
        #[inline(always)]
        fn abs(self) -> Avx2 {
            // SAFETY: runs under avx2 and fma (module comment).
            unsafe {
                let sign = _mm256_set1_ps(-0.0);
                Avx2(_mm256_andnot_ps(sign, self.0), _mm256_andnot_ps(sign, self.1))
            }
        }
        #[inline(always)]
        fn select_lt(a: Avx2, b: Avx2, x: Avx2, y: Avx2) -> Avx2 {
            // SAFETY: runs under avx2 and fma (module comment).
            unsafe {
                let low = _mm256_cmp_ps::<_CMP_LT_OQ>(a.0, b.0);
                let high = _mm256_cmp_ps::<_CMP_LT_OQ>(a.1, b.1);
                Avx2(_mm256_blendv_ps(y.0, x.0, low), _mm256_blendv_ps(y.1, x.1, high))
            }
        }
        #[inline(always)]
        fn half_pow2_of_shifted(self) -> Avx2 {
            // SAFETY: runs under avx2 and fma (module comment).
            unsafe {
                let bias = _mm256_set1_epi32(126 << 23);
                let low = _mm256_add_epi32(_mm256_slli_epi32::<23>(_mm256_castps_si256(self.0)), bias);
                let high = _mm256_add_epi32(_mm256_slli_epi32::<23>(_mm256_castps_si256(self.1)), bias);
                Avx2(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high))
            }
        }
        #[inline(always)]
        fn split_exponent(self) -> (Avx2, Avx2) {
            // SAFETY: runs under avx2 and fma (module comment).
            unsafe {
                let (m0, e0) = split8(self.0);
                let (m1, e1) = split8(self.1);
                (Avx2(m0, m1), Avx2(e0, e1))
            }
        }
    }

    #[inline(always)]
    unsafe fn split8(x: __m256) -> (__m256, __m256) {
        // SAFETY: called under avx2.
        unsafe {
            let bits = _mm256_castps_si256(x);
            let exponent = _mm256_srai_epi32::<23>(_mm256_sub_epi32(bits, _mm256_set1_epi32(SQRT_HALF_BITS as i32)));
            let mantissa = _mm256_sub_epi32(bits, _mm256_slli_epi32::<23>(exponent));
            (_mm256_castsi256_ps(mantissa), _mm256_cvtepi32_ps(exponent))
        }
    }

    impl Lanes for Avx2 {
        const ACCUMULATORS: usize = 6;
        #[inline(always)]
        unsafe fn load_ptr(source: *const f32) -> Avx2 {
            // SAFETY: avx2 as above; the caller vouches for 16 readable values.
            unsafe { Avx2(_mm256_loadu_ps(source), _mm256_loadu_ps(source.add(8))) }
        }
        #[inline(always)]
        unsafe fn store_ptr(self, target: *mut f32) {
            // SAFETY: avx2 as above; the caller vouches for 16 writable values.
            unsafe {
                _mm256_storeu_ps(target, self.0);
                _mm256_storeu_ps(target.add(8), self.1);
            }
        }
        #[inline(always)]
        fn sum_across(self) -> f32 {
            // SAFETY: runs under avx2 and fma (module comment).
            unsafe { sum8(_mm256_add_ps(self.0, self.1)) }
        }
        #[inline(always)]
        fn max_across(self) -> f32 {
            // SAFETY: runs under avx2 and fma (module comment).
            unsafe { max8(_mm256_max_ps(self.0, self.1)) }
        }
    }
}

/// Panics if this machine cannot run `isa`: [`Isa`] is a plain value, so the features must be checked before code compiled for them runs.
#[inline]
pub fn assert_available(isa: Isa) {
    static BEST: OnceLock<Isa> = OnceLock::new();
    let best = *BEST.get_or_init(|| Isa::available().into_iter().max().unwrap_or(Isa::Scalar));
    assert!(isa <= best, "kernels: {isa} asked for, but this machine goes up to {best}");
}

/// Compiles one lane-generic body for each instruction set and calls the right one.
///
/// `per_isa! { fn name = body(x: &[f32], y: &mut [f32]) -> f32; }` defines `fn name(isa: Isa, x: &[f32], y: &mut [f32]) -> f32`,
/// where `body` is `#[inline(always)] fn body<L: Lanes>(x: &[f32], y: &mut [f32]) -> f32`.
macro_rules! per_isa {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident = $body:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?;)+) => {$(
        $(#[$meta])*
        #[allow(unsafe_code)]
        $vis fn $name(isa: $crate::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    $body::<$crate::lanes::Avx512>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    $body::<$crate::lanes::Avx2>($($arg),*)
                }
                $crate::lanes::assert_available(isa);
                if isa.has_avx512() {
                    // SAFETY: the line above checked that this machine has the AVX-512 features.
                    return unsafe { avx512($($arg),*) };
                }
                if isa.has_avx2() {
                    // SAFETY: the check above covers AVX2 and FMA.
                    return unsafe { avx2($($arg),*) };
                }
            }
            let _ = isa;
            $body::<$crate::lanes::Portable>($($arg),*)
        }
    )+};
}
pub(crate) use per_isa;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::numbers;

    /// Transposed square, sum, largest, and partial loads and stores.
    #[inline(always)]
    fn moves_body<L: Lanes>(x: &[f32], out: &mut [f32]) {
        let mut rows = [L::splat(0.0); LANES];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = L::load(&x[i * LANES..]);
        }
        for (i, column) in L::transpose(rows).into_iter().enumerate() {
            column.store(&mut out[i * LANES..]);
        }
        let rest = &mut out[LANES * LANES..];
        rest[0] = rows[3].sum_across();
        rest[1] = rows[3].max_across();
        for n in 0..=LANES {
            L::load_first(&x[..n], 2.0).store(&mut rest[2 + 2 * n * LANES..]);
            rows[5].store_first(&mut rest[2 + (2 * n + 1) * LANES..][..n]);
        }
    }

    per_isa! {
        fn moves = moves_body(x: &[f32], out: &mut [f32]);
    }

    #[test]
    fn moves_and_reductions_are_the_same_on_every_isa() {
        let x = numbers(1, LANES * LANES);
        let len = LANES * LANES + 2 + 2 * (LANES + 1) * LANES;
        let mut want = vec![9.0; len];
        moves(Isa::Scalar, &x, &mut want);
        for i in 0..LANES * LANES {
            assert_eq!(want[i], x[i % LANES * LANES + i / LANES]);
        }
        for isa in Isa::available() {
            let mut got = vec![9.0; len];
            moves(isa, &x, &mut got);
            assert_eq!(got, want, "{isa}");
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn an_isa_this_machine_lacks_is_refused() {
        if !Isa::available().contains(&Isa::Amx) {
            assert!(std::panic::catch_unwind(|| assert_available(Isa::Amx)).is_err());
        }
    }
}
