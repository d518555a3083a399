//! [`Lanes`] as one zmm register. Values are only made and used inside functions that `per_isa!` compiles with AVX-512 and calls after the run-time check,
//! which is what every SAFETY sentence below rests on.
#![allow(unsafe_code)]

use super::avx2::{max8, sum8};
use super::portable::SQRT_HALF_BITS;
use super::{LANES, Lanes, Real};
use std::arch::x86_64::*;

/// One zmm register.
#[derive(Clone, Copy, Debug)]
pub struct Avx512(__m512);

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
            let exponent = _mm512_srai_epi32::<23>(_mm512_sub_epi32(bits, _mm512_set1_epi32(SQRT_HALF_BITS as i32)));
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
    fn store_bf16(self, target: &mut [u16; LANES]) {
        // SAFETY: runs under avx512f (module comment); the target is 32 bytes.
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
            let halves = _mm512_srli_epi32::<16>(_mm512_mask_blend_epi32(nan, rounded, quiet));
            _mm256_storeu_si256(target.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(halves));
        }
    }
    #[inline(always)]
    fn load_bf16(source: &[u16; LANES]) -> Avx512 {
        // SAFETY: runs under avx512f (module comment); the source is 32 bytes.
        unsafe {
            let halves = _mm256_loadu_si256(source.as_ptr().cast());
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves))))
        }
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
