//! A whole sparse layer in plain loops, three times: ragged rows, padded capacity slots, dense one-hot einsum.
//!
//! The ragged form is what the kernels compute; the other two exist because papers are written in them and because three
//! independent computations of one number are a proof. `x_td` in, `y_td` out, residual outside. The gradients of section 0.10.

use crate::assignment::Assignment;
use crate::real::Real;

/// Experts that multiply by a number: expert e maps x to `scale[e] x`.
pub fn scaling_experts<S: Real>(scale_e: &[S]) -> impl Fn(usize, &[S]) -> Vec<S> {
    move |e, x| x.iter().map(|&v| scale_e[e] * v).collect()
}

/// `y_t = sum over kept choices of w * expert(x_t)`, choices in order.
pub fn combine<S: Real>(
    x_td: &[S],
    width: usize,
    assignment: &Assignment,
    weight_n: &[S],
    expert: impl Fn(usize, &[S]) -> Vec<S>,
) -> Vec<S> {
    let expert_of_row = assignment.expert_of_row();
    let mut y_td = vec![S::ZERO; x_td.len()];
    for t in 0..assignment.tokens {
        let token = t * width..(t + 1) * width;
        for &row in assignment.rows_of_token(t) {
            let out = expert(expert_of_row[row as usize] as usize, &x_td[token.clone()]);
            for (y, o) in y_td[token.clone()].iter_mut().zip(out) {
                *y += weight_n[row as usize] * o;
            }
        }
    }
    y_td
}

/// The same through a zero-padded buffer [E, C, d]: every slot is computed, empty ones from zeros.
pub fn combine_padded<S: Real>(
    x_td: &[S],
    width: usize,
    assignment: &Assignment,
    weight_n: &[S],
    expert: impl Fn(usize, &[S]) -> Vec<S>,
) -> Vec<S> {
    let capacity = assignment.load().into_iter().max().unwrap_or(0) as usize;
    let mut slots = vec![S::ZERO; assignment.experts * capacity * width];
    let slot_of = |e: usize, row: usize| e * capacity + row - assignment.row_offsets[e] as usize;
    for e in 0..assignment.experts {
        for row in assignment.rows_of_expert(e) {
            let t = assignment.token_of_row[row] as usize;
            let slot = slot_of(e, row);
            slots[slot * width..(slot + 1) * width].copy_from_slice(&x_td[t * width..(t + 1) * width]);
        }
    }
    let outputs: Vec<S> =
        slots.chunks(width.max(1)).enumerate().flat_map(|(slot, x)| expert(slot / capacity.max(1), x)).collect();
    let mut y_td = vec![S::ZERO; x_td.len()];
    for e in 0..assignment.experts {
        for row in assignment.rows_of_expert(e) {
            let (t, slot) = (assignment.token_of_row[row] as usize, slot_of(e, row));
            for d in 0..width {
                y_td[t * width + d] += weight_n[row] * outputs[slot * width + d];
            }
        }
    }
    y_td
}

/// The same as a dense mixture: every expert on every token, times the `[T, E]` combine matrix.
pub fn combine_dense<S: Real>(
    x_td: &[S],
    width: usize,
    combine_te: &[S],
    experts: usize,
    expert: impl Fn(usize, &[S]) -> Vec<S>,
) -> Vec<S> {
    let mut y_td = Vec::with_capacity(x_td.len());
    for (x, weights) in x_td.chunks(width.max(1)).zip(combine_te.chunks(experts)) {
        let mut y = vec![S::ZERO; width];
        for (e, &w) in weights.iter().enumerate() {
            for (y, o) in y.iter_mut().zip(expert(e, x)) {
                *y += w * o;
            }
        }
        y_td.extend(y);
    }
    y_td
}

/// Gradient of every row's weight: `<dy_t, expert(x_t)>`.
pub fn weight_gradient<S: Real>(
    x_td: &[S],
    dy_td: &[S],
    width: usize,
    assignment: &Assignment,
    expert: impl Fn(usize, &[S]) -> Vec<S>,
) -> Vec<S> {
    let mut dweight = Vec::with_capacity(assignment.rows());
    for e in 0..assignment.experts {
        for row in assignment.rows_of_expert(e) {
            let t = assignment.token_of_row[row] as usize;
            let out = expert(e, &x_td[t * width..(t + 1) * width]);
            dweight.push(dy_td[t * width..(t + 1) * width].iter().zip(out).map(|(&d, o)| d * o).sum());
        }
    }
    dweight
}
