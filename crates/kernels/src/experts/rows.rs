//! The expert pass in its three parts, for rows that travel between them: gather rows, run the experts on rows, combine rows.
//!
//! Put together they are [`super::expert_ffn_forward`] and [`super::expert_ffn_backward`], bit for bit: the middle is the same code on rows
//! that are their own tokens. The weight of a row stays out of its answer (the combine multiplies and adds in one rounding) and comes in on
//! the way back, where the gradient that arrives is that of the *weighted* row.
#![allow(unsafe_code)]

use super::backward::{Gradients, backward};
use super::combine::combine;
use super::forward::forward;
use super::{Dispatch, ExpertSaved, ExpertTransposes, ExpertWeights};
use crate::gemm::check_offsets;
use crate::isa::Isa;
use crate::kernel::lanes_of;
use crate::parallel::{SharedSlice, for_each_job};

/// Rows copied per job: 64 rows of 512 f32 are 128 KiB.
const ROWS_PER_JOB: usize = 64;

/// `out_nd[n] = x_td[token_of_row[n]]`.
pub fn gather_rows(x_td: &[f32], d: usize, token_of_row: &[u32], out_nd: &mut [f32]) {
    let rows = token_of_row.len();
    assert_eq!(out_nd.len(), rows * d, "gather_rows: {} elements for {rows} rows of width {d}", out_nd.len());
    let out = SharedSlice::new(out_nd);
    for_each_job(rows.div_ceil(ROWS_PER_JOB), |job| {
        let rows = job * ROWS_PER_JOB..((job + 1) * ROWS_PER_JOB).min(rows);
        // SAFETY: these rows belong to this job alone.
        let out = unsafe { out.slice(rows.start * d, rows.len() * d) };
        for (&token, line) in token_of_row[rows].iter().zip(out.chunks_exact_mut(d.max(1))) {
            line.copy_from_slice(&x_td[token as usize * d..][..d]);
        }
    });
}

/// `out_t` = the sum over the token's rows, in choice order, of `weight_n[row] * rows_nd[row]`, or of the rows without `weight_n`.
pub fn combine_rows(
    isa: Isa,
    rows_nd: &[f32],
    d: usize,
    dispatch: &Dispatch,
    weight_n: Option<&[f32]>,
    out_td: &mut [f32],
) {
    dispatch.check("combine_rows", dispatch.row_offsets.len().saturating_sub(1));
    let rows = dispatch.rows();
    assert!(
        rows_nd.len() == rows * d
            && out_td.len() == dispatch.tokens * d
            && weight_n.is_none_or(|weight_n| weight_n.len() == rows),
        "combine_rows: rows have {} elements, out {}, weights {:?}; T {}, D {d}, N {rows} expected",
        rows_nd.len(),
        out_td.len(),
        weight_n.map(<[f32]>::len),
        dispatch.tokens
    );
    combine(lanes_of(isa), rows_nd, d, dispatch, weight_n, out_td);
}

/// What the experts answer to rows sorted by expert, `rows_nd[n] = expert(x_nd[n])`; expert e has rows
/// `row_offsets[e]..row_offsets[e + 1]`. With `saved`, the pre-activations are kept for [`expert_rows_backward`].
pub fn expert_rows_forward(
    isa: Isa,
    x_nd: &[f32],
    weights: &ExpertWeights,
    row_offsets: &[u32],
    rows_nd: &mut [f32],
    saved: Option<&mut ExpertSaved>,
) {
    let rows = check_offsets("expert_rows_forward", row_offsets, weights.experts());
    assert!(
        [x_nd.len(), rows_nd.len()] == [rows * weights.d; 2],
        "expert_rows_forward: x has {} elements, out {}; N {rows}, D {} expected",
        x_nd.len(),
        rows_nd.len(),
        weights.d
    );
    let own: Vec<u32> = (0..rows as u32).collect();
    forward(isa, x_nd, weights, &on_rows(row_offsets, &own), rows_nd, saved);
}

/// Gradients of [`expert_rows_forward`], all overwritten, for `dy_nd` the gradient of the weighted rows `weight_n * rows_nd`; that of the
/// weights is among them. `weights` are the transposes of those of the forward pass.
pub fn expert_rows_backward(
    isa: Isa,
    dy_nd: &[f32],
    x_nd: &[f32],
    weights: &ExpertTransposes,
    row_offsets: &[u32],
    weight_n: &[f32],
    saved: &ExpertSaved,
    dx_nd: &mut [f32],
    dgate_up_edf: &mut [f32],
    ddown_efd: &mut [f32],
    dweight_n: &mut [f32],
) {
    let ExpertTransposes { d, f, activation, .. } = *weights;
    let (experts, columns) = (weights.experts(), activation.first_columns(f));
    let rows = check_offsets("expert_rows_backward", row_offsets, experts);
    assert!(
        [dy_nd.len(), x_nd.len(), dx_nd.len()] == [rows * d; 3]
            && [weight_n.len(), dweight_n.len()] == [rows; 2]
            && dgate_up_edf.len() == experts * d * columns
            && ddown_efd.len() == experts * f * d,
        "expert_rows_backward: dy {}, x {}, dx {}, weights {}, dweights {}, dgate_up {}, ddown {} elements do not fit D {d}, N {rows}, \
         E {experts}, F {f}",
        dy_nd.len(),
        x_nd.len(),
        dx_nd.len(),
        weight_n.len(),
        dweight_n.len(),
        dgate_up_edf.len(),
        ddown_efd.len()
    );
    let own: Vec<u32> = (0..rows as u32).collect();
    let gradients = Gradients { dx_nd, dgate_up_edf, ddown_efd, dweight_n };
    backward(isa, dy_nd, x_nd, weights, &on_rows(row_offsets, &own), weight_n, saved, gradients);
}

/// Rows that are their own tokens. The way back from rows to tokens is not asked for.
fn on_rows<'a>(row_offsets: &'a [u32], own: &'a [u32]) -> Dispatch<'a> {
    Dispatch { tokens: own.len(), row_offsets, token_of_row: own, token_offsets: &[], row_of_choice: &[] }
}
