//! Lane arithmetic: one trait, four widths of hardware, the same IEEE operation in every lane.
//!
//! [`Real`] is the arithmetic of one value, or of sixteen at once; [`Lanes`] adds loads and stores of sixteen. A kernel body is written
//! once, generic over [`Lanes`] and `#[inline(always)]`; the macro `per_isa!` compiles it for AVX-512 ([`Avx512`]), AVX2 ([`Avx2`], two
//! registers per value) and baseline ([`Portable`], an array). Every method is one correctly rounded operation per lane, so the three
//! give the same bits. Reductions across lanes follow one fixed tree.
#![allow(unsafe_code)]

use crate::bf16;
use crate::isa::Isa;
use std::sync::OnceLock;

mod portable;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
pub use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub use avx512::Avx512;
pub use portable::Portable;

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

    /// Rounds to bf16 as [`bf16::from_f32`] does.
    #[inline(always)]
    fn store_bf16(self, target: &mut [u16; LANES]) {
        let mut wide = [0.0; LANES];
        self.store(&mut wide);
        for (x, y) in wide.into_iter().zip(target) {
            *y = bf16::from_f32(x);
        }
    }

    /// Sixteen bf16.
    #[inline(always)]
    fn load_bf16(source: &[u16; LANES]) -> Self {
        Self::load(&source.map(bf16::to_f32))
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

    #[inline(always)]
    fn through_bf16_body<L: Lanes>(x: &[f32], halves: &mut [u16], back: &mut [f32]) {
        let halves = halves.first_chunk_mut::<LANES>().expect("16 lanes");
        L::load(x).store_bf16(halves);
        L::load_bf16(halves).store(back);
    }

    per_isa! {
        fn through_bf16 = through_bf16_body(x: &[f32], halves: &mut [u16], back: &mut [f32]);
    }

    #[test]
    fn lanes_round_to_bf16_as_single_values_do() {
        let mut x = numbers(2, 64 * LANES);
        let special =
            [0x7f80_0000, 0xff80_0000, 0x7f80_0001, 0xffff_ffff, 0x7f7f_ffff, 0x3f80_8000, 0x3f81_8000, 1, 0x8000_0000];
        x.extend(special.map(f32::from_bits));
        x.resize(65 * LANES, -1e-40);
        for isa in Isa::available() {
            for x in x.chunks_exact(LANES) {
                let (mut halves, mut back) = ([0; LANES], [0.0; LANES]);
                through_bf16(isa, x, &mut halves, &mut back);
                for lane in 0..LANES {
                    assert_eq!(halves[lane], bf16::from_f32(x[lane]), "{isa}: {:x}", x[lane].to_bits());
                    assert_eq!(back[lane].to_bits(), bf16::to_f32(halves[lane]).to_bits());
                }
            }
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
