//! Softmax, log-sum-exp and sigmoid of router scores: rows of a few to a few hundred experts, always f32.
//!
//! A row: maximum, `e = exp(x - max)`, sum of e in the fixed order of [`crate::norm`], then e / sum.

use crate::isa::Isa;
use crate::lanes::{LANES, Lanes, per_isa};
use crate::norm::{load_n, row_sum, store_n};
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
    assert!(cols > 0 && input % cols == 0, "{name}: {input} values are no rows of {cols}");
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
    row_sum::<L>(x.len(), |sum, i, n| sum.add(load_n::<L>(x, i, n)))
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
        let dot = row_sum::<L>(cols, |sum, i, n| load_n::<L>(y, i, n).mul_add(load_n::<L>(dy, i, n), sum));
        let dot = L::splat(dot);
        for i in (0..cols).step_by(LANES) {
            let n = LANES.min(cols - i);
            store_n(load_n::<L>(y, i, n).mul(load_n::<L>(dy, i, n).sub(dot)), dx, i, n);
        }
    }
}

#[inline(always)]
fn log_sum_exp_slice_body<L: Lanes>(x: &[f32], cols: usize, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(cols).zip(out) {
        let most = row_max::<L>(x);
        let shift = L::splat(most);
        let sum = row_sum::<L>(cols, |sum, i, n| {
            let x = if n == LANES { L::load(&x[i..i + LANES]) } else { L::load_first(&x[i..i + n], f32::NEG_INFINITY) };
            sum.add(vmath::exp(x.sub(shift)))
        });
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
