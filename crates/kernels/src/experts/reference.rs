//! The slow twins of the expert pass: one row at a time, plain loops, the same order of every sum; bit for bit what the kernels give in
//! every precision.
//!
//! Forward, row n of token t: pre = x_t W_gate_up; hidden = act(pre); out = hidden W_down; y_t = fma over the choices in order.
//! Backward: the saved pre-activations are rounded to bf16 in the bf16 precisions. dh = dy_t W_down^T; dweight = hidden . dh, summed in
//! 16 lanes by f mod 16, then by halves; dpre from weight * dh; dx rows = dpre W_gate_up^T, added in choice order;
//! dW_gate_up = X^T dpre; dW_down = (weight * hidden)^T dy. Every product follows [`crate::gemm::matmul_reference`].

use super::activation::{hidden, hidden_backward};
use super::backward::sum_lanes;
use super::{Activation, Dispatch};
use crate::bf16;
use crate::gemm::{Accum, grouped_matmul_reference, grouped_matmul_tn_reference};
use crate::lanes::LANES;
use crate::pack::MatView;
use crate::precision::Precision;

/// y_td, and the pre-activations `[N, 2F]` (ungated `[N, F]`) as the backward pass wants them.
pub fn expert_ffn_forward_reference(
    precision: Precision,
    x_td: &[f32],
    d: usize,
    f: usize,
    activation: Activation,
    gate_up_edf: &[f32],
    down_efd: &[f32],
    dispatch: &Dispatch,
    weight_n: &[f32],
    y_td: &mut [f32],
) -> Vec<f32> {
    let (rows, columns) = (dispatch.rows(), activation.first_columns(f));
    let x_nd = gathered(x_td, d, dispatch);
    let mut pre = vec![0.0; rows * columns];
    let first = MatView::row_major(gate_up_edf, d, columns);
    grouped_matmul_reference(precision, &x_nd, dispatch.row_offsets, first, d, columns, &mut pre, Accum::Replace);
    let mut hidden_nf = vec![0.0; rows * f];
    for row in 0..rows {
        for column in 0..f {
            let (gate, up) = gate_and_up(&pre[row * columns..], f, column, activation);
            hidden_nf[row * f + column] = hidden(activation, gate, up);
        }
    }
    let mut out = vec![0.0; rows * d];
    let second = MatView::row_major(down_efd, f, d);
    grouped_matmul_reference(precision, &hidden_nf, dispatch.row_offsets, second, f, d, &mut out, Accum::Replace);
    for token in 0..dispatch.tokens {
        for column in 0..d {
            y_td[token * d + column] =
                choices(dispatch, token).fold(0.0, |sum, row| weight_n[row].mul_add(out[row * d + column], sum));
        }
    }
    if precision.is_bf16() {
        pre.iter_mut().for_each(|x| *x = bf16::round(*x));
    }
    pre
}

/// All gradients, overwritten; `pre` is what [`expert_ffn_forward_reference`] returned.
pub fn expert_ffn_backward_reference(
    precision: Precision,
    dy_td: &[f32],
    x_td: &[f32],
    d: usize,
    f: usize,
    activation: Activation,
    gate_up_edf: &[f32],
    down_efd: &[f32],
    dispatch: &Dispatch,
    weight_n: &[f32],
    pre: &[f32],
    dx_td: &mut [f32],
    dgate_up_edf: &mut [f32],
    ddown_efd: &mut [f32],
    dweight_n: &mut [f32],
) {
    let (rows, columns, offsets) = (dispatch.rows(), activation.first_columns(f), dispatch.row_offsets);
    let (x_nd, dy_nd) = (gathered(x_td, d, dispatch), gathered(dy_td, d, dispatch));
    let mut dh = vec![0.0; rows * f];
    let down_t = MatView::transposed(down_efd, f, d);
    grouped_matmul_reference(precision, &dy_nd, offsets, down_t, d, f, &mut dh, Accum::Replace);
    let mut dpre = vec![0.0; rows * columns];
    let mut scaled_hidden = vec![0.0; rows * f];
    for row in 0..rows {
        let weight = weight_n[row];
        let mut lanes = [0f32; LANES];
        for column in 0..f {
            let dh = dh[row * f + column];
            let (gate, up) = gate_and_up(&pre[row * columns..], f, column, activation);
            let (h, dgate, dup) = hidden_backward(activation, gate, up, weight * dh);
            lanes[column % LANES] = h.mul_add(dh, lanes[column % LANES]);
            scaled_hidden[row * f + column] = weight * h;
            dpre[row * columns + column] = dgate;
            if activation.is_gated() {
                dpre[row * columns + f + column] = dup;
            }
        }
        dweight_n[row] = sum_lanes(&lanes);
    }
    let mut dx_nd = vec![0.0; rows * d];
    let gate_up_t = MatView::transposed(gate_up_edf, d, columns);
    grouped_matmul_reference(precision, &dpre, offsets, gate_up_t, columns, d, &mut dx_nd, Accum::Replace);
    for token in 0..dispatch.tokens {
        for column in 0..d {
            dx_td[token * d + column] = choices(dispatch, token).fold(0.0, |sum, row| sum + dx_nd[row * d + column]);
        }
    }
    grouped_matmul_tn_reference(precision, &x_nd, &dpre, offsets, d, columns, dgate_up_edf, Accum::Replace);
    grouped_matmul_tn_reference(precision, &scaled_hidden, &dy_nd, offsets, f, d, ddown_efd, Accum::Replace);
}

fn gate_and_up(pre: &[f32], f: usize, column: usize, activation: Activation) -> (f32, f32) {
    let gate = pre[column];
    (gate, if activation.is_gated() { pre[f + column] } else { gate })
}

fn gathered(x_td: &[f32], d: usize, dispatch: &Dispatch) -> Vec<f32> {
    dispatch.token_of_row.iter().flat_map(|&token| x_td[token as usize * d..][..d].iter().copied()).collect()
}

fn choices<'a>(dispatch: &Dispatch<'a>, token: usize) -> impl Iterator<Item = usize> + use<'a> {
    let range = dispatch.token_offsets[token] as usize..dispatch.token_offsets[token + 1] as usize;
    dispatch.row_of_choice[range].iter().map(|&row| row as usize)
}
