//! [`Real`] for one f32, and [`Lanes`] as an array: the specification of the hardware implementations.
#![allow(unsafe_code)]

use super::{LANES, Lanes, Real};

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
pub(super) const SQRT_HALF_BITS: u32 = 0x3f35_04f3;

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
