//! Softmax, log-sum-exp and sigmoid of router scores: rows of a few to a few hundred experts, always f32.
//!
//! A row: maximum, `e = exp(x - max)`, sum of e in the fixed order of [`crate::norm`], then e / sum.

use crate::isa::Isa;
use crate::lanes::{LANES, Lanes, per_isa};
use crate::norm::{Products, Term, Values, load_n, row_sum, store_n};
use crate::vmath;
use rayon::prelude::*;

/// Elements one task should have to be worth its scheduling.
const TASK_ELEMENTS: usize = 1 << 14;

/// `y = softmax(x)` over rows of `cols`.
///
/// # Panics
/// If the lengths differ or are no multiple of `cols`.
pub fn softmax_rows(isa: Isa, x: &[f32], cols: usize, y: &mut [f32]) {
    check("softmax_rows", cols, x.len(), y.len());
    let step = TASK_ELEMENTS.div_ceil(cols) * cols;
    y.par_chunks_mut(step).zip(x.par_chunks(step)).for_each(|(y, x)| softmax_slice(isa, x, cols, y));
}

/// `dx = y (dy - sum(y dy))`, with `y` the output of [`softmax_rows`].
///
/// # Panics
/// If the lengths differ or are no multiple of `cols`.
pub fn softmax_rows_backward(isa: Isa, y: &[f32], dy: &[f32], cols: usize, dx: &mut [f32]) {
    check("softmax_rows_backward", cols, y.len(), dx.len());
    check("softmax_rows_backward", cols, dy.len(), dx.len());
    let step = TASK_ELEMENTS.div_ceil(cols) * cols;
    (dx.par_chunks_mut(step), y.par_chunks(step), dy.par_chunks(step))
        .into_par_iter()
        .for_each(|(dx, y, dy)| softmax_backward_slice(isa, y, dy, cols, dx));
}

/// `out[t] = ln(sum(exp(x[t])))`.
///
/// # Panics
/// If `out` has not one value per row of `cols`.
pub fn log_sum_exp_rows(isa: Isa, x: &[f32], cols: usize, out: &mut [f32]) {
    check("log_sum_exp_rows", cols, x.len(), out.len() * cols);
    let rows = TASK_ELEMENTS.div_ceil(cols);
    out.par_chunks_mut(rows).zip(x.par_chunks(rows * cols)).for_each(|(out, x)| log_sum_exp_slice(isa, x, cols, out));
}

/// `y = 1 / (1 + exp(-x))`, element by element.
///
/// # Panics
/// If the lengths differ.
pub fn sigmoid_elements(isa: Isa, x: &[f32], y: &mut [f32]) {
    check("sigmoid_elements", 1, x.len(), y.len());
    y.par_chunks_mut(TASK_ELEMENTS).zip(x.par_chunks(TASK_ELEMENTS)).for_each(|(y, x)| sigmoid_slice(isa, x, y));
}

fn check(name: &str, cols: usize, input: usize, output: usize) {
    assert!(cols > 0 && input.is_multiple_of(cols), "{name}: {input} values are no rows of {cols}");
    assert_eq!(input, output, "{name}: {input} values in, room for {output} out");
}

per_isa! {
    fn softmax_slice = softmax_slice_body(x: &[f32], cols: usize, y: &mut [f32]);
    fn softmax_backward_slice = softmax_backward_slice_body(y: &[f32], dy: &[f32], cols: usize, dx: &mut [f32]);
    fn log_sum_exp_slice = log_sum_exp_slice_body(x: &[f32], cols: usize, out: &mut [f32]);
    fn sigmoid_slice = sigmoid_slice_body(x: &[f32], y: &mut [f32]);
}

/// Largest value of a row.
#[inline(always)]
pub(crate) fn row_max<L: Lanes>(x: &[f32]) -> f32 {
    let mut most = L::splat(f32::NEG_INFINITY);
    for i in (0..x.len()).step_by(LANES) {
        let n = LANES.min(x.len() - i);
        let x = if n == LANES { L::load(&x[i..i + LANES]) } else { L::load_first(&x[i..i + n], f32::NEG_INFINITY) };
        most = x.max(most);
    }
    most.max_across()
}

/// Writes `exp(x - most)` and returns its sum; `row_sum` order.
#[inline(always)]
pub(crate) fn exp_row<L: Lanes>(x: &mut [f32], most: f32) -> f32 {
    let shift = L::splat(most);
    for i in (0..x.len()).step_by(LANES) {
        let n = LANES.min(x.len() - i);
        let e = vmath::exp(load_n::<L>(x, i, n).sub(shift));
        store_n(e, x, i, n);
    }
    row_sum::<L>(x.len(), &Values(x))
}

#[inline(always)]
fn softmax_slice_body<L: Lanes>(x: &[f32], cols: usize, y: &mut [f32]) {
    for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact_mut(cols)) {
        y.copy_from_slice(x);
        let sum = L::splat(exp_row::<L>(y, row_max::<L>(x)));
        for i in (0..cols).step_by(LANES) {
            let n = LANES.min(cols - i);
            store_n(load_n::<L>(y, i, n).div(sum), y, i, n);
        }
    }
}

#[inline(always)]
fn softmax_backward_slice_body<L: Lanes>(y: &[f32], dy: &[f32], cols: usize, dx: &mut [f32]) {
    for ((y, dy), dx) in y.chunks_exact(cols).zip(dy.chunks_exact(cols)).zip(dx.chunks_exact_mut(cols)) {
        let dot = row_sum::<L>(cols, &Products(y, dy));
        let dot = L::splat(dot);
        for i in (0..cols).step_by(LANES) {
            let n = LANES.min(cols - i);
            store_n(load_n::<L>(y, i, n).mul(load_n::<L>(dy, i, n).sub(dot)), dx, i, n);
        }
    }
}

/// `exp(x_i - shift)`.
struct Exponentials<'a, L> {
    x: &'a [f32],
    shift: L,
}

impl<L: Lanes> Term<L> for Exponentials<'_, L> {
    #[inline(always)]
    fn add_to(&self, sum: L, i: usize, n: usize) -> L {
        let x = &self.x[i..i + n];
        let x = if n == LANES { L::load(x) } else { L::load_first(x, f32::NEG_INFINITY) };
        sum.add(vmath::exp(x.sub(self.shift)))
    }
}

#[inline(always)]
fn log_sum_exp_slice_body<L: Lanes>(x: &[f32], cols: usize, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(cols).zip(out) {
        let most = row_max::<L>(x);
        let sum = row_sum::<L>(cols, &Exponentials { x, shift: L::splat(most) });
        *out = most + vmath::log(sum);
    }
}

#[inline(always)]
fn sigmoid_slice_body<L: Lanes>(x: &[f32], y: &mut [f32]) {
    let whole = x.len() / LANES * LANES;
    for i in (0..whole).step_by(LANES) {
        vmath::sigmoid(L::load(&x[i..i + LANES])).store(&mut y[i..i + LANES]);
    }
    for i in whole..x.len() {
        y[i] = vmath::sigmoid(x[i]);
    }
}

/// [`softmax_rows`] in f64.
pub fn softmax_rows_reference(x: &[f32], cols: usize, y: &mut [f32]) {
    check("softmax_rows_reference", cols, x.len(), y.len());
    for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact_mut(cols)) {
        let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let e: Vec<f64> = x.iter().map(|&x| (f64::from(x) - f64::from(most)).exp()).collect();
        let sum: f64 = e.iter().sum();
        for (y, e) in y.iter_mut().zip(e) {
            *y = (e / sum) as f32;
        }
    }
}

/// [`softmax_rows_backward`] in f64.
pub fn softmax_rows_backward_reference(y: &[f32], dy: &[f32], cols: usize, dx: &mut [f32]) {
    check("softmax_rows_backward_reference", cols, y.len(), dx.len());
    for ((y, dy), dx) in y.chunks_exact(cols).zip(dy.chunks_exact(cols)).zip(dx.chunks_exact_mut(cols)) {
        let dot: f64 = y.iter().zip(dy).map(|(&y, &dy)| f64::from(y) * f64::from(dy)).sum();
        for i in 0..cols {
            dx[i] = (f64::from(y[i]) * (f64::from(dy[i]) - dot)) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_same_bits, numbers, pools};

    /// y, dx, log-sum-exp, sigmoid.
    fn run(isa: Isa, rows: usize, cols: usize) -> [Vec<f32>; 4] {
        let x: Vec<f32> = numbers(1, rows * cols).iter().map(|x| 8.0 * x).collect();
        let dy = numbers(2, rows * cols);
        let [mut y, mut dx, mut s] = [0; 3].map(|_| vec![7.0; rows * cols]);
        let mut lse = vec![7.0; rows];
        softmax_rows(isa, &x, cols, &mut y);
        softmax_rows_backward(isa, &y, &dy, cols, &mut dx);
        log_sum_exp_rows(isa, &x, cols, &mut lse);
        sigmoid_elements(isa, &x, &mut s);
        [y, dx, lse, s]
    }

    const SHAPES: [(usize, usize); 5] = [(1, 1), (3, 8), (70, 64), (5, 100), (2100, 17)];

    #[test]
    fn values_agree_with_f64() {
        for (rows, cols) in SHAPES {
            let [y, dx, lse, s] = run(Isa::current(), rows, cols);
            let x: Vec<f32> = numbers(1, rows * cols).iter().map(|x| 8.0 * x).collect();
            let (mut want_y, mut want_dx) = (vec![0.0; y.len()], vec![0.0; y.len()]);
            softmax_rows_reference(&x, cols, &mut want_y);
            softmax_rows_backward_reference(&y, &numbers(2, rows * cols), cols, &mut want_dx);
            for (a, b) in y.iter().zip(&want_y).chain(dx.iter().zip(&want_dx)) {
                assert!((a - b).abs() < 1e-6, "{a} against {b}");
            }
            for (x, lse) in x.chunks_exact(cols).zip(&lse) {
                let want = x.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
                assert!((f64::from(*lse) - want).abs() < 2e-6 * (1.0 + want.abs()), "{lse} against {want}");
            }
            for (x, s) in x.iter().zip(&s) {
                assert!((f64::from(*s) - 1.0 / (1.0 + f64::from(-x).exp())).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn isa_and_threads_change_no_bit() {
        for (rows, cols) in SHAPES {
            let want = run(Isa::Scalar, rows, cols);
            for isa in Isa::available() {
                for got in pools(|| run(isa, rows, cols)) {
                    for (got, want) in got.iter().zip(&want) {
                        assert_same_bits(&format!("{isa} [{rows}, {cols}]"), got, want);
                    }
                }
            }
        }
    }

    #[test]
    fn backward_agrees_with_finite_differences_in_f64() {
        let (x, dy) = (numbers(1, 9), numbers(2, 9));
        let softmax = |x: &[f64]| -> Vec<f64> {
            let sum: f64 = x.iter().map(|x| x.exp()).sum();
            x.iter().map(|x| x.exp() / sum).collect()
        };
        let mut wide: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let (mut y, mut dx) = (vec![0.0; 9], vec![0.0; 9]);
        softmax_rows(Isa::current(), &x, 9, &mut y);
        softmax_rows_backward(Isa::current(), &y, &dy, 9, &mut dx);
        for i in 0..9 {
            let mut loss = |step: f64| -> f64 {
                wide[i] += step;
                let loss = softmax(&wide).iter().zip(&dy).map(|(y, &dy)| y * f64::from(dy)).sum();
                wide[i] -= step;
                loss
            };
            let slope = (loss(1e-6) - loss(-1e-6)) / 2e-6;
            assert!((f64::from(dx[i]) - slope).abs() < 1e-6, "{i}: {} against {slope}", dx[i]);
        }
    }
}
