//! RMSNorm: `y = x r gamma` with `r = 1 / sqrt(mean(x^2) + eps)`, and its backward.
//!
//! Rows are `cols` values that start `row_stride` apart, so the same code norms a whole `[T, D]` and the columns of one head inside a
//! wider row. A row's result depends on that row only. `dgamma` is summed over blocks of [`GAMMA_BLOCK_ROWS`] rows and the blocks are
//! added in order, so threads do not change it. Sums over a row use 64 fixed accumulators and one tree.
//!
//! Memory bound: forward reads x once and writes y once; backward reads x and dy once each and writes dx.

use crate::isa::Isa;
use crate::lanes::{LANES, Lanes, per_isa};
use rayon::prelude::*;

/// Rows whose share of dgamma is summed as one block.
pub const GAMMA_BLOCK_ROWS: usize = 256;

/// Elements one task should have to be worth its scheduling.
const TASK_ELEMENTS: usize = 1 << 14;

/// Norms `rows` rows of `cols` values, `row_stride` apart in both `x` and `y`; values between the rows are left alone.
///
/// # Panics
/// If a slice is too short, or `gamma` has not `cols` values.
pub fn rms_norm_forward(
    isa: Isa,
    x: &[f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    gamma: &[f32],
    eps: f32,
    y: &mut [f32],
) {
    check("rms_norm_forward", rows, cols, row_stride, &[gamma.len()], &[x.len(), y.len()]);
    if rows == 0 {
        return;
    }
    let rows_per_task = TASK_ELEMENTS.div_ceil(cols).min(rows);
    let used = (rows - 1) * row_stride + cols;
    if rows_per_task == rows {
        return forward_rows(isa, x, cols, row_stride, gamma, eps, &mut y[..used]);
    }
    let step = rows_per_task * row_stride;
    y[..used].par_chunks_mut(step).enumerate().for_each(|(task, y)| {
        forward_rows(isa, &x[task * step..], cols, row_stride, gamma, eps, y);
    });
}

/// Gradients of [`rms_norm_forward`]: overwrites `dx` (same stride) and `dgamma`.
///
/// # Panics
/// If a slice is too short, or `gamma` or `dgamma` has not `cols` values.
pub fn rms_norm_backward(
    isa: Isa,
    dy: &[f32],
    x: &[f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    gamma: &[f32],
    eps: f32,
    dx: &mut [f32],
    dgamma: &mut [f32],
) {
    let (gammas, lengths) = ([gamma.len(), dgamma.len()], [dy.len(), x.len(), dx.len()]);
    check("rms_norm_backward", rows, cols, row_stride, &gammas, &lengths);
    dgamma.fill(0.0);
    if rows == 0 {
        return;
    }
    let used = (rows - 1) * row_stride + cols;
    let step = GAMMA_BLOCK_ROWS * row_stride;
    let blocks = rows.div_ceil(GAMMA_BLOCK_ROWS);
    let mut partial = vec![0.0_f32; blocks * cols];
    dx[..used].par_chunks_mut(step).zip(partial.par_chunks_mut(cols)).enumerate().for_each(|(block, (dx, partial))| {
        let start = block * step;
        backward_rows(isa, &dy[start..], &x[start..], cols, row_stride, gamma, eps, dx, partial);
    });
    for partial in partial.chunks_exact(cols) {
        for (sum, &p) in dgamma.iter_mut().zip(partial) {
            *sum += p;
        }
    }
}

/// Of gamma and its gradient, and of everything that has rows.
fn check(name: &str, rows: usize, cols: usize, row_stride: usize, gammas: &[usize], lengths: &[usize]) {
    assert!(cols > 0 && row_stride >= cols, "{name}: {cols} columns in rows {row_stride} apart");
    for &length in gammas {
        assert_eq!(length, cols, "{name}: gamma or its gradient has {length} values, x has {cols} columns");
    }
    let used = if rows == 0 { 0 } else { (rows - 1) * row_stride + cols };
    for &length in lengths {
        assert!(
            length >= used,
            "{name}: [{rows}, {cols}] rows {row_stride} apart need {used} values, a slice has {length}"
        );
    }
}

per_isa! {
    fn forward_rows = forward_rows_body(x: &[f32], cols: usize, row_stride: usize, gamma: &[f32], eps: f32, y: &mut [f32]);
    fn backward_rows = backward_rows_body(dy: &[f32], x: &[f32], cols: usize, row_stride: usize, gamma: &[f32], eps: f32, dx: &mut [f32], dgamma: &mut [f32]);
}

/// What a row is summed over. A trait and not a closure: a closure is compiled without the instruction set of the function that calls
/// it, and then every lane operation in it is a call.
pub(crate) trait Term<L: Lanes> {
    /// `sum` plus the group of n <= 16 elements that starts at i.
    fn add_to(&self, sum: L, i: usize, n: usize) -> L;
}

/// `x_i`.
pub(crate) struct Values<'a>(pub &'a [f32]);

/// `x_i^2`.
pub(crate) struct Squares<'a>(pub &'a [f32]);

/// `a_i b_i`.
pub(crate) struct Products<'a>(pub &'a [f32], pub &'a [f32]);

/// `(a_i b_i) c_i`.
struct TripleProducts<'a>(&'a [f32], &'a [f32], &'a [f32]);

impl<L: Lanes> Term<L> for Values<'_> {
    #[inline(always)]
    fn add_to(&self, sum: L, i: usize, n: usize) -> L {
        sum.add(load_n::<L>(self.0, i, n))
    }
}

impl<L: Lanes> Term<L> for Squares<'_> {
    #[inline(always)]
    fn add_to(&self, sum: L, i: usize, n: usize) -> L {
        let x = load_n::<L>(self.0, i, n);
        x.mul_add(x, sum)
    }
}

impl<L: Lanes> Term<L> for Products<'_> {
    #[inline(always)]
    fn add_to(&self, sum: L, i: usize, n: usize) -> L {
        load_n::<L>(self.0, i, n).mul_add(load_n::<L>(self.1, i, n), sum)
    }
}

impl<L: Lanes> Term<L> for TripleProducts<'_> {
    #[inline(always)]
    fn add_to(&self, sum: L, i: usize, n: usize) -> L {
        load_n::<L>(self.0, i, n).mul(load_n::<L>(self.1, i, n)).mul_add(load_n::<L>(self.2, i, n), sum)
    }
}

/// Fixed order of a row's sums: 16-lane groups go round robin to four accumulators, `(s0 + s1) + (s2 + s3)`, then the lane tree.
#[inline(always)]
pub(crate) fn row_sum<L: Lanes>(cols: usize, term: &impl Term<L>) -> f32 {
    let mut sums = [L::splat(0.0); 4];
    let mut i = 0;
    while i + 4 * LANES <= cols {
        sums[0] = term.add_to(sums[0], i, LANES);
        sums[1] = term.add_to(sums[1], i + LANES, LANES);
        sums[2] = term.add_to(sums[2], i + 2 * LANES, LANES);
        sums[3] = term.add_to(sums[3], i + 3 * LANES, LANES);
        i += 4 * LANES;
    }
    let mut next = 0;
    while i < cols {
        let n = LANES.min(cols - i);
        sums[next] = term.add_to(sums[next], i, n);
        next += 1;
        i += LANES;
    }
    sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum_across()
}

/// Sixteen values from `i` on, or the last `n < 16` with zeros behind.
#[inline(always)]
pub(crate) fn load_n<L: Lanes>(x: &[f32], i: usize, n: usize) -> L {
    if n == LANES { L::load(&x[i..i + LANES]) } else { L::load_first(&x[i..i + n], 0.0) }
}

#[inline(always)]
pub(crate) fn store_n<L: Lanes>(value: L, x: &mut [f32], i: usize, n: usize) {
    if n == LANES { value.store(&mut x[i..i + LANES]) } else { value.store_first(&mut x[i..i + n]) }
}

/// `1 / sqrt(mean(x^2) + eps)` of one row.
#[inline(always)]
pub(crate) fn inverse_rms_body<L: Lanes>(x: &[f32], eps: f32) -> f32 {
    let squares = row_sum::<L>(x.len(), &Squares(x));
    1.0 / (squares / x.len() as f32 + eps).sqrt()
}

#[inline(always)]
fn forward_rows_body<L: Lanes>(x: &[f32], cols: usize, row_stride: usize, gamma: &[f32], eps: f32, y: &mut [f32]) {
    for (row, y) in y.chunks_mut(row_stride).enumerate() {
        let x = &x[row * row_stride..][..cols];
        let y = &mut y[..cols];
        let r = L::splat(inverse_rms_body::<L>(x, eps));
        for i in (0..cols).step_by(LANES) {
            let n = LANES.min(cols - i);
            let normed = load_n::<L>(x, i, n).mul(r);
            store_n(normed.mul(load_n::<L>(gamma, i, n)), y, i, n);
        }
    }
}

#[inline(always)]
fn backward_rows_body<L: Lanes>(
    dy: &[f32],
    x: &[f32],
    cols: usize,
    row_stride: usize,
    gamma: &[f32],
    eps: f32,
    dx: &mut [f32],
    dgamma: &mut [f32],
) {
    for (row, dx) in dx.chunks_mut(row_stride).enumerate() {
        let start = row * row_stride;
        backward_row::<L>(&dy[start..start + cols], &x[start..start + cols], gamma, eps, &mut dx[..cols], dgamma);
    }
}

/// One row: `dx = r (g - x r^2 mean(g x))` with `g = dy gamma`; adds `dy x r` to `dgamma`.
#[inline(always)]
fn backward_row<L: Lanes>(dy: &[f32], x: &[f32], gamma: &[f32], eps: f32, dx: &mut [f32], dgamma: &mut [f32]) {
    let row = BackwardRow::<L>::new(dy, x, gamma, eps);
    for i in (0..x.len()).step_by(LANES) {
        let n = LANES.min(x.len() - i);
        store_n(row.dx(load_n(dy, i, n), x, gamma, dgamma, i, n), dx, i, n);
    }
}

/// [`backward_row`] with dy in `dx`.
#[inline(always)]
pub(crate) fn backward_row_in_place<L: Lanes>(x: &[f32], gamma: &[f32], eps: f32, dx: &mut [f32], dgamma: &mut [f32]) {
    let row = BackwardRow::<L>::new(dx, x, gamma, eps);
    for i in (0..x.len()).step_by(LANES) {
        let n = LANES.min(x.len() - i);
        store_n(row.dx(load_n(dx, i, n), x, gamma, dgamma, i, n), dx, i, n);
    }
}

/// What all elements of a row share in the backward pass.
struct BackwardRow<L> {
    r: L,
    /// r^2 mean(g x).
    pull: L,
}

impl<L: Lanes> BackwardRow<L> {
    #[inline(always)]
    fn new(dy: &[f32], x: &[f32], gamma: &[f32], eps: f32) -> BackwardRow<L> {
        let r = inverse_rms_body::<L>(x, eps);
        let dot = row_sum::<L>(x.len(), &TripleProducts(dy, gamma, x));
        BackwardRow { r: L::splat(r), pull: L::splat(dot / x.len() as f32 * r * r) }
    }

    /// dx of up to sixteen elements from i on; their share of dgamma is added.
    #[inline(always)]
    fn dx(&self, dy: L, x: &[f32], gamma: &[f32], dgamma: &mut [f32], i: usize, n: usize) -> L {
        let x = load_n::<L>(x, i, n);
        let g = dy.mul(load_n::<L>(gamma, i, n));
        store_n(x.mul(self.r).mul_add(dy, load_n::<L>(dgamma, i, n)), dgamma, i, n);
        x.neg_mul_add(self.pull, g).mul(self.r)
    }
}

/// [`rms_norm_forward`] in f64, one row after the other: what the fast path must agree with up to rounding.
pub fn rms_norm_forward_reference(
    x: &[f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    gamma: &[f32],
    eps: f32,
    y: &mut [f32],
) {
    check("rms_norm_forward_reference", rows, cols, row_stride, &[gamma.len()], &[x.len(), y.len()]);
    for row in 0..rows {
        let x = &x[row * row_stride..][..cols];
        let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / cols as f64;
        let r = 1.0 / (mean + f64::from(eps)).sqrt();
        for i in 0..cols {
            y[row * row_stride + i] = (f64::from(x[i]) * r * f64::from(gamma[i])) as f32;
        }
    }
}

/// [`rms_norm_backward`] in f64.
pub fn rms_norm_backward_reference(
    dy: &[f32],
    x: &[f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    gamma: &[f32],
    eps: f32,
    dx: &mut [f32],
    dgamma: &mut [f32],
) {
    let (gammas, lengths) = ([gamma.len(), dgamma.len()], [dy.len(), x.len(), dx.len()]);
    check("rms_norm_backward_reference", rows, cols, row_stride, &gammas, &lengths);
    let mut sums = vec![0.0_f64; cols];
    for row in 0..rows {
        let start = row * row_stride;
        let x: Vec<f64> = x[start..start + cols].iter().map(|&x| f64::from(x)).collect();
        let dy: Vec<f64> = dy[start..start + cols].iter().map(|&x| f64::from(x)).collect();
        let r = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / cols as f64 + f64::from(eps)).sqrt();
        let dot: f64 = (0..cols).map(|i| dy[i] * f64::from(gamma[i]) * x[i]).sum();
        for i in 0..cols {
            dx[start + i] = (r * (dy[i] * f64::from(gamma[i]) - x[i] * r * r * dot / cols as f64)) as f32;
            sums[i] += dy[i] * x[i] * r;
        }
    }
    for (out, sum) in dgamma.iter_mut().zip(sums) {
        *out = sum as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_same_bits, numbers, pools};

    /// y, dx, dgamma over rows that start `stride` apart.
    fn run(isa: Isa, rows: usize, cols: usize, stride: usize) -> [Vec<f32>; 3] {
        let (x, dy, gamma) = (numbers(1, rows * stride), numbers(2, rows * stride), numbers(3, cols));
        let (mut y, mut dx, mut dgamma) = (vec![7.0; rows * stride], vec![7.0; rows * stride], vec![7.0; cols]);
        rms_norm_forward(isa, &x, rows, cols, stride, &gamma, 1e-5, &mut y);
        rms_norm_backward(isa, &dy, &x, rows, cols, stride, &gamma, 1e-5, &mut dx, &mut dgamma);
        [y, dx, dgamma]
    }

    const SHAPES: [(usize, usize, usize); 7] =
        [(0, 5, 5), (1, 1, 1), (3, 16, 16), (7, 40, 64), (300, 33, 33), (600, 64, 200), (20, 1000, 1000)];

    #[test]
    fn forward_and_backward_agree_with_f64() {
        for (rows, cols, stride) in SHAPES {
            let [y, dx, dgamma] = run(Isa::current(), rows, cols, stride);
            let (x, dy, gamma) = (numbers(1, rows * stride), numbers(2, rows * stride), numbers(3, cols));
            let (mut want_y, mut want_dx, mut want_dgamma) = (vec![7.0; y.len()], vec![7.0; y.len()], vec![7.0; cols]);
            rms_norm_forward_reference(&x, rows, cols, stride, &gamma, 1e-5, &mut want_y);
            rms_norm_backward_reference(&dy, &x, rows, cols, stride, &gamma, 1e-5, &mut want_dx, &mut want_dgamma);
            for (what, ours, want) in [("y", &y, &want_y), ("dx", &dx, &want_dx), ("dgamma", &dgamma, &want_dgamma)] {
                for (i, (a, b)) in ours.iter().zip(want).enumerate() {
                    assert!((a - b).abs() < 2e-5 * (1.0 + b.abs()), "[{rows}, {cols}] {what} {i}: {a} against {b}");
                }
            }
        }
    }

    #[test]
    fn isa_and_threads_change_no_bit() {
        for (rows, cols, stride) in SHAPES {
            let want = run(Isa::Scalar, rows, cols, stride);
            for isa in Isa::available() {
                for got in pools(|| run(isa, rows, cols, stride)) {
                    for (got, want) in got.iter().zip(&want) {
                        assert_same_bits(&format!("{isa} [{rows}, {cols}]"), got, want);
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_see_its_neighbours() {
        let [all, ..] = run(Isa::current(), 600, 64, 64);
        let (x, gamma) = (numbers(1, 600 * 64), numbers(3, 64));
        let mut alone = vec![0.0; 64];
        rms_norm_forward(Isa::current(), &x[333 * 64..], 1, 64, 64, &gamma, 1e-5, &mut alone);
        assert_same_bits("row 333", &alone, &all[333 * 64..334 * 64]);
    }

    #[test]
    fn the_gradient_in_f64_agrees_with_finite_differences() {
        let (rows, cols) = (3, 6);
        let (mut x, dy, mut gamma) = (numbers(1, rows * cols), numbers(2, rows * cols), numbers(3, cols));
        let (mut dx, mut dgamma) = (vec![0.0; rows * cols], vec![0.0; cols]);
        rms_norm_backward_reference(&dy, &x, rows, cols, cols, &gamma, 1e-5, &mut dx, &mut dgamma);
        // The loss dy . y, in f64 throughout.
        let loss = |x: &[f32], gamma: &[f32]| -> f64 {
            (0..rows)
                .map(|row| {
                    let x: Vec<f64> = x[row * cols..(row + 1) * cols].iter().map(|&x| f64::from(x)).collect();
                    let r = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / cols as f64 + 1e-5).sqrt();
                    (0..cols).map(|i| x[i] * r * f64::from(gamma[i]) * f64::from(dy[row * cols + i])).sum::<f64>()
                })
                .sum()
        };
        let h = 1.0 / 4096.0;
        for i in 0..rows * cols + cols {
            let is_x = i < rows * cols;
            let at = |x: &mut [f32], gamma: &mut [f32], step: f32| {
                let value = if is_x { &mut x[i] } else { &mut gamma[i - rows * cols] };
                let old = std::mem::replace(value, *value + step);
                let moved = f64::from(*value);
                let loss = loss(x, gamma);
                *(if is_x { &mut x[i] } else { &mut gamma[i - rows * cols] }) = old;
                (moved, loss)
            };
            let (up, down) = (at(&mut x, &mut gamma, h), at(&mut x, &mut gamma, -h));
            let slope = (up.1 - down.1) / (up.0 - down.0);
            let ours = f64::from(if is_x { dx[i] } else { dgamma[i - rows * cols] });
            assert!((ours - slope).abs() < 1e-5 * (1.0 + slope.abs()), "{i}: {ours} against {slope}");
        }
    }
}
