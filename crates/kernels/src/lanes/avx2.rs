//! [`Lanes`] as two ymm registers. Values are only made and used inside functions that `per_isa!` compiles with AVX2 and FMA and calls after the run-time check,
//! which is what every SAFETY sentence below rests on.
#![allow(unsafe_code)]

use super::portable::SQRT_HALF_BITS;
use super::{LANES, Lanes, Real};
use std::arch::x86_64::*;

/// Two ymm registers: lanes 0..8 and 8..16.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(__m256, __m256);

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
    fn store_bf16(self, target: &mut [u16; LANES]) {
        // SAFETY: runs under avx2 and fma (module comment); the target is 32 bytes.
        unsafe {
            let both = _mm256_packus_epi32(rounded8(self.0), rounded8(self.1));
            // Packing goes by halves of registers: lanes 0..4, 8..12, 4..8, 12..16.
            _mm256_storeu_si256(target.as_mut_ptr().cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(both));
        }
    }
    #[inline(always)]
    fn load_bf16(source: &[u16; LANES]) -> Avx2 {
        // SAFETY: runs under avx2 and fma (module comment); the source is 32 bytes.
        unsafe {
            let widen = |halves| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)));
            let at = source.as_ptr().cast::<__m128i>();
            Avx2(widen(_mm_loadu_si128(at)), widen(_mm_loadu_si128(at.add(1))))
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

/// The nearest bf16 of each lane, as a 32-bit number.
#[inline(always)]
unsafe fn rounded8(x: __m256) -> __m256i {
    // SAFETY: called under avx2.
    unsafe {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan))
    }
}

/// Lanes i and i+4, then i+2, then i+1.
#[inline(always)]
pub(super) unsafe fn sum8(x: __m256) -> f32 {
    // SAFETY: called under avx2 or wider.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

#[inline(always)]
pub(super) unsafe fn max8(x: __m256) -> f32 {
    // SAFETY: called under avx2 or wider.
    unsafe {
        let four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}
