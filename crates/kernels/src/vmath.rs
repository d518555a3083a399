//! Elementary functions, lane by lane, of nothing but IEEE operations: the same bits on every instruction set, no libm.
//!
//! Each function is generic over [`Real`], so the scalar form (`exp(1.0_f32)`) and the sixteen-lane form are one source.
//!
//! | function | largest error found (f32 ulps against f64) | range |
//! | --- | --- | --- |
//! | [`exp2`], [`exp`] | 1.1 | results below 2^-125.5 become +0, above f32::MAX infinity |
//! | [`log`] | 1.0 | positive normal numbers; 0 and below give -infinity |
//! | [`sigmoid`], [`silu`] | 2.5 | all |
//! | [`erfc`] | 6 | relative, until erfc(x) leaves the normal range |
//! | [`gelu`] | 6 | where abs(result) > 1e-30 |

#![allow(clippy::excessive_precision)] // the coefficients are written as the fit printed them

use crate::lanes::Real;

/// Added and taken away again, it rounds to the nearest integer and leaves that integer in the low bits.
const ROUND_SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23

/// Evaluates `c[0] + c[1] x + ...` by Horner's rule, one FMA per coefficient.
#[inline(always)]
fn polynomial<R: Real, const N: usize>(x: R, c: [f32; N]) -> R {
    let mut sum = R::splat(c[N - 1]);
    for i in (0..N - 1).rev() {
        sum = sum.mul_add(x, R::splat(c[i]));
    }
    sum
}

/// `2^x`. NaN stays NaN.
#[inline(always)]
pub fn exp2<R: Real>(x: R) -> R {
    // (2^r - 1) / r on [-1/2, 1/2], minimax, error 2e-9.
    const C: [f32; 6] =
        [std::f32::consts::LN_2, 2.402_265_1e-1, 5.550_327_5e-2, 9.618_004e-3, 1.340_040_4e-3, 1.547_644_6e-4];
    let x = R::splat(-126.0).max(R::splat(128.0).min(x));
    let shifted = x.add(R::splat(ROUND_SHIFT));
    let r = x.sub(shifted.sub(R::splat(ROUND_SHIFT)));
    let p = polynomial(r, C).mul_add(r, R::splat(1.0));
    p.add(p).mul(shifted.half_pow2_of_shifted())
}

/// `e^x`. NaN stays NaN.
#[inline(always)]
pub fn exp<R: Real>(x: R) -> R {
    // (e^r - 1 - r) / r^2 on [-ln2/2, ln2/2], minimax, error 3e-9.
    const C: [f32; 5] = [0.5, 1.666_651_8e-1, 4.166_620_6e-2, 8.368_953e-3, 1.395_060_2e-3];
    // ln 2 in two parts; the first has 15 significant bits, so n * LN2_HIGH is exact.
    const LN2_HIGH: f32 = 0.693_145_75;
    const LN2_LOW: f32 = 1.428_606_8e-6;
    let x = R::splat(-87.336_54).max(R::splat(89.0).min(x));
    let shifted = x.mul_add(R::splat(std::f32::consts::LOG2_E), R::splat(ROUND_SHIFT));
    let n = shifted.sub(R::splat(ROUND_SHIFT));
    let r = n.neg_mul_add(R::splat(LN2_LOW), n.neg_mul_add(R::splat(LN2_HIGH), x));
    let p = polynomial(r, C).mul_add(r.mul(r), r).add(R::splat(1.0));
    let scaled = p.mul(shifted.half_pow2_of_shifted());
    scaled.add(scaled)
}

/// Natural logarithm of positive normal numbers; -infinity for 0 and below; infinity and NaN are not looked for.
#[inline(always)]
pub fn log<R: Real>(x: R) -> R {
    // (ln(1+f) - f + f^2/2) / f^3 on [sqrt(1/2) - 1, sqrt(2) - 1], minimax, error 7e-10.
    const C: [f32; 9] = [
        3.333_331e-1,
        -2.499_998_7e-1,
        2.000_223_1e-1,
        -1.666_925_7e-1,
        1.421_855_5e-1,
        -1.238_415_5e-1,
        1.187_358_6e-1,
        -1.179_131_05e-1,
        6.915_806e-2,
    ];
    const LN2_HIGH: f32 = 0.693_145_75;
    const LN2_LOW: f32 = 1.428_606_8e-6;
    let (m, e) = x.split_exponent();
    let f = m.sub(R::splat(1.0));
    let f2 = f.mul(f);
    // e LN2_HIGH is exact, so the sum below rounds once; the corrections are small beside it.
    let tail = f2.mul_add(f.mul(polynomial(f, C)), e.mul(R::splat(LN2_LOW)));
    let tail = f2.mul_add(R::splat(-0.5), tail);
    let y = e.mul(R::splat(LN2_HIGH)).add(f.add(tail));
    R::select_lt(R::splat(0.0), x, y, R::splat(f32::NEG_INFINITY))
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid<R: Real>(x: R) -> R {
    R::splat(1.0).div(R::splat(1.0).add(exp(R::splat(0.0).sub(x))))
}

/// `x sigmoid(x)`.
#[inline(always)]
pub fn silu<R: Real>(x: R) -> R {
    x.div(R::splat(1.0).add(exp(R::splat(0.0).sub(x))))
}

/// [`silu`] and its derivative `s (1 + x (1 - s))`, s = sigmoid(x).
#[inline(always)]
pub fn silu_and_derivative<R: Real>(x: R) -> (R, R) {
    let s = sigmoid(x);
    let y = x.mul(s);
    (y, y.neg_mul_add(s, s.add(y)))
}

/// `1 - erf(x)`, accurate to a relative error also where it is tiny.
#[inline(always)]
pub fn erfc<R: Real>(x: R) -> R {
    let (square, rest) = exact_square(x);
    let (upper, _) = scaled_erfc(x.abs(), square, rest);
    R::select_lt(x, R::splat(0.0), R::splat(2.0).sub(upper), upper)
}

/// x^2 as a rounded product and what rounding took from it.
#[inline(always)]
fn exact_square<R: Real>(x: R) -> (R, R) {
    let square = x.mul(x);
    let rest = x.mul_add(x, R::splat(0.0).sub(square));
    (square, R::select_lt(square, R::splat(1e30), rest, R::splat(0.0))) // no inf - inf
}

/// erfc(z) and exp(-z^2) for z >= 0, given z^2 = square + rest more exactly than z.
#[inline(always)]
fn scaled_erfc<R: Real>(z: R, square: R, rest: R) -> (R, R) {
    // erfc(z) exp(z^2) / t as a polynomial in t = 1 / (1 + z/2), minimax, relative error 2e-8.
    const C: [f32; 10] = [
        2.820_671_8e-1,
        2.828_003_2e-1,
        2.391_504_9e-1,
        2.230_348_6e-1,
        -9.068_091e-2,
        4.064_063_4e-1,
        -6.514_627e-1,
        4.145_586_5e-1,
        -1.169_741_7e-1,
        1.109_993_9e-2,
    ];
    let t = R::splat(1.0).div(z.mul_add(R::splat(0.5), R::splat(1.0)));
    let gauss = exp(R::splat(0.0).sub(square));
    let gauss = gauss.neg_mul_add(rest, gauss);
    (t.mul(polynomial(t, C)).mul(gauss), gauss)
}

/// The exact GELU, `x Phi(x)` with Phi the normal distribution function.
#[inline(always)]
pub fn gelu<R: Real>(x: R) -> R {
    gelu_and_derivative(x).0
}

/// [`gelu`] and its derivative `Phi(x) + x phi(x)`.
#[inline(always)]
pub fn gelu_and_derivative<R: Real>(x: R) -> (R, R) {
    const INV_SQRT_2PI: f32 = 0.398_942_3;
    let z = x.abs().mul(R::splat(std::f32::consts::FRAC_1_SQRT_2));
    let (square, rest) = exact_square(x);
    let half = R::splat(0.5);
    let (upper, gauss) = scaled_erfc(z, square.mul(half), rest.mul(half));
    let half = upper.mul(half);
    let cdf = R::select_lt(x, R::splat(0.0), half, R::splat(1.0).sub(half));
    (x.mul(cdf), x.mul(gauss).mul_add(R::splat(INV_SQRT_2PI), cdf))
}

/// Natural logarithm in f64 of a positive normal number, of plain IEEE operations (libm's last bit differs between machines).
pub fn log_f64(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) as i64 & 0x7ff) - 1022;
    let mut m = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | (1022 << 52)); // [1/2, 1)
    if m < std::f64::consts::FRAC_1_SQRT_2 {
        m += m;
        exponent -= 1;
    }
    // ln m = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ...), |s| <= 0.1716: 13 terms leave 1e-21.
    let s = (m - 1.0) / (m + 1.0);
    let s2 = s * s;
    let mut sum = 0.0;
    for k in (0..13).rev() {
        sum = sum * s2 + 1.0 / f64::from(2 * k + 1);
    }
    exponent as f64 * std::f64::consts::LN_2 + 2.0 * s * sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::Isa;
    use crate::lanes::{LANES, Lanes, per_isa};
    use crate::testing::numbers;

    /// Largest error in ulps of the true value over `points` values of x in `low..=high`.
    fn worst_ulps(low: f64, high: f64, points: usize, ours: impl Fn(f32) -> f32, truth: impl Fn(f64) -> f64) -> f64 {
        let mut worst = 0.0_f64;
        for i in 0..=points {
            let x = (low + (high - low) * i as f64 / points as f64) as f32;
            let want = truth(f64::from(x));
            let ulp = f64::from((want as f32).abs().max(f32::MIN_POSITIVE)) * 2.0_f64.powi(-23);
            // ulp above is between 1 and 2 true ulps; use the exact one.
            let ulp = ulp.log2().floor().exp2().max(f64::from(f32::MIN_POSITIVE) * 2.0_f64.powi(-23));
            let error = (f64::from(ours(x)) - want).abs() / ulp;
            assert!(error.is_finite(), "x = {x}: {} against {want}", ours(x));
            worst = worst.max(error);
        }
        worst
    }

    fn sigmoid_f64(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    /// erfc by its continued fraction (z >= 2) or the series of erf (z < 2).
    fn erfc_f64(x: f64) -> f64 {
        let z = x.abs();
        let upper = if z < 2.0 {
            let (mut term, mut sum) = (z, z);
            for n in 1..200 {
                term *= -z * z / n as f64;
                sum += term / (2 * n + 1) as f64;
            }
            1.0 - sum * std::f64::consts::FRAC_2_SQRT_PI
        } else {
            let mut fraction = 0.0;
            for k in (1..200).rev() {
                fraction = 0.5 * k as f64 / (z + fraction);
            }
            (-z * z).exp() / (z + fraction) * std::f64::consts::FRAC_2_SQRT_PI / 2.0
        };
        if x < 0.0 { 2.0 - upper } else { upper }
    }

    #[test]
    fn each_function_keeps_the_error_its_table_promises() {
        let n = 200_000;
        let cases: [(&str, f64, f64); 7] = [
            ("exp2", worst_ulps(-125.0, 127.9, n, exp2::<f32>, f64::exp2), 1.1),
            ("exp", worst_ulps(-86.0, 88.5, n, exp::<f32>, f64::exp), 1.1),
            (
                "log",
                worst_ulps(0.0001, 40.0, n, log::<f32>, f64::ln).max(worst_ulps(0.9, 1.1, n, log::<f32>, f64::ln)),
                1.0,
            ),
            ("sigmoid", worst_ulps(-80.0, 80.0, n, sigmoid::<f32>, sigmoid_f64), 2.5),
            ("silu", worst_ulps(-80.0, 80.0, n, silu::<f32>, |x| x * sigmoid_f64(x)), 2.5),
            ("erfc", worst_ulps(-9.0, 9.0, n, erfc::<f32>, erfc_f64), 6.0),
            (
                "gelu",
                worst_ulps(-11.0, 11.0, n, gelu::<f32>, |x| 0.5 * x * erfc_f64(-x * std::f64::consts::FRAC_1_SQRT_2)),
                6.0,
            ),
        ];
        let mut failed = false;
        for (name, worst, bound) in cases {
            println!("{name}: {worst:.2} ulp, the table says {bound}");
            failed |= worst > bound;
        }
        assert!(!failed, "an error above is larger than the table's");
    }

    #[test]
    fn derivatives_agree_with_central_differences_in_f64() {
        for i in -60..=60 {
            let x = f64::from(i) * 0.125;
            let h = 1e-5;
            let slope = |f: &dyn Fn(f64) -> f64| (f(x + h) - f(x - h)) / (2.0 * h);
            let silu_slope = slope(&|x| x * sigmoid_f64(x));
            let gelu_slope = slope(&|x| 0.5 * x * erfc_f64(-x * std::f64::consts::FRAC_1_SQRT_2));
            assert!((f64::from(silu_and_derivative(x as f32).1) - silu_slope).abs() < 1e-6, "silu'({x})");
            assert!((f64::from(gelu_and_derivative(x as f32).1) - gelu_slope).abs() < 1e-6, "gelu'({x})");
        }
    }

    #[inline(always)]
    fn all_functions_body<L: Lanes>(x: &[f32], out: &mut [f32]) {
        let x = L::load(x);
        let (silu_again, silu_slope) = silu_and_derivative(x);
        let (gelu, gelu_slope) = gelu_and_derivative(x);
        let all = [exp(x), exp2(x), log(x), sigmoid(x), silu(x), silu_again, silu_slope, erfc(x), gelu, gelu_slope];
        for (out, y) in out.chunks_exact_mut(LANES).zip(all) {
            y.store(out);
        }
    }

    per_isa! {
        fn all_functions = all_functions_body(x: &[f32], out: &mut [f32]);
    }

    #[test]
    fn one_value_and_sixteen_lanes_of_every_isa_have_the_same_bits() {
        let mut x: Vec<f32> = numbers(1, 4096).iter().enumerate().map(|(i, x)| x * [1.0, 30.0, 200.0][i % 3]).collect();
        x[..8].copy_from_slice(&[0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, 1e-40, f32::MAX, -87.4, 128.0]);
        for x in x.chunks_exact(LANES) {
            let mut want = Vec::new();
            let slopes = |f: fn(f32) -> (f32, f32), second: bool| {
                x.iter().map(|&x| if second { f(x).1 } else { f(x).0 }).collect::<Vec<f32>>()
            };
            for f in [exp, exp2, log, sigmoid, silu] {
                want.extend(x.iter().map(|&x| f(x)));
            }
            want.extend([slopes(silu_and_derivative, false), slopes(silu_and_derivative, true)].concat());
            want.extend(x.iter().map(|&x| erfc(x)));
            want.extend([slopes(gelu_and_derivative, false), slopes(gelu_and_derivative, true)].concat());
            for isa in Isa::available() {
                let mut got = vec![0.0; 10 * LANES];
                all_functions(isa, x, &mut got);
                for (i, (a, b)) in got.iter().zip(&want).enumerate() {
                    let same = a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
                    assert!(same, "{isa}: function {} of {} is {a:e}, {b:e} as a scalar", i / LANES, x[i % LANES]);
                }
            }
        }
    }

    #[test]
    fn the_edges_are_exact() {
        assert_eq!(exp(0.0_f32).to_bits(), 1.0_f32.to_bits());
        assert_eq!(exp2(0.0_f32).to_bits(), 1.0_f32.to_bits());
        assert_eq!(exp2(f32::NEG_INFINITY).to_bits(), 0);
        assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp2(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan() && exp2(f32::NAN).is_nan());
        assert_eq!(sigmoid(-1000.0_f32), 0.0);
        assert_eq!(log(1.0_f32).to_bits(), 0);
        assert_eq!(log(0.0_f32), f32::NEG_INFINITY);
        assert_eq!(log_f64(1.0), 0.0);
        for x in [1e-300, 0.3, 0.9999, 1.5, 7.0, 1e200] {
            assert!((log_f64(x) - x.ln()).abs() <= 2e-16 * x.ln().abs().max(1.0), "log_f64({x})");
        }
    }
}
