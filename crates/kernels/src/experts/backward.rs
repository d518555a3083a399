//! Backward pass of the experts.
//!
//! Per block of rows of one expert, in one thread: gather dy, dh = dy W_down^T panel by panel, activation backward, dx rows = dpre W^T;
//! the rounded dy and dpre are left as panels and the weighted hidden rows as they are. Then, per block of each weight gradient:
//! dW_gate_up = X^T dpre and dW_down = (weight * hidden)^T dy, written straight into the gradient arrays; then dx per token.
#![allow(unsafe_code)]

use super::activation::{ActivateBackward, BackwardPanel};
use super::combine::combine;
use super::forward::gather;
use super::{Dispatch, ExpertSaved, ExpertTransposes, SavedAs, saved_width};
use crate::gemm::{Accum, k_blocks, tn_product};
use crate::isa::Isa;
use crate::kernel::{
    Block, IntoOperand, Operand, PANEL, Rows, block, mode_for, padded_stride, transpose_rows, whole_panel,
};
use crate::lanes::LANES;
use crate::pack::{Operands, RaggedPanels};
use crate::parallel::{SharedSlice, for_each_job_with, longest_first};
use crate::workspace::Workspace;
use std::ops::Range;

/// Rows of one expert per job; jobs start at multiples of 32 rows from the expert's first, where bf16 sums over rows step.
const ROW_BLOCK: usize = 128;

/// Gradients of [`super::expert_ffn_forward`], all overwritten; an expert without rows gets zeros.
///
/// `weights` are the transposes of the forward pass's weights, `saved` its pre-activations with the same `dispatch`.
pub fn expert_ffn_backward(
    isa: Isa,
    dy_td: &[f32],
    x_td: &[f32],
    weights: &ExpertTransposes,
    dispatch: &Dispatch,
    weight_n: &[f32],
    saved: &ExpertSaved,
    dx_td: &mut [f32],
    dgate_up_edf: &mut [f32],
    ddown_efd: &mut [f32],
    dweight_n: &mut [f32],
) {
    let ExpertTransposes { d, f, activation, .. } = *weights;
    let (experts, columns) = (weights.experts(), activation.first_columns(f));
    dispatch.check("expert_ffn_backward", experts);
    assert!(
        [dy_td.len(), x_td.len(), dx_td.len()] == [dispatch.tokens * d; 3]
            && [weight_n.len(), dweight_n.len()] == [dispatch.rows(); 2]
            && dgate_up_edf.len() == experts * d * columns
            && ddown_efd.len() == experts * f * d,
        "expert_ffn_backward: dy {}, x {}, dx {}, weights {}, dweights {}, dgate_up {}, ddown {} elements do not fit T {}, D {d}, N {}, \
         E {experts}, F {f}",
        dy_td.len(),
        x_td.len(),
        dx_td.len(),
        weight_n.len(),
        dweight_n.len(),
        dgate_up_edf.len(),
        ddown_efd.len(),
        dispatch.tokens,
        dispatch.rows()
    );
    let mut dx_nd = Workspace::<f32>::take(dispatch.rows() * d);
    let gradients = Gradients { dx_nd: &mut dx_nd, dgate_up_edf, ddown_efd, dweight_n };
    backward(isa, dy_td, x_td, weights, dispatch, weight_n, saved, gradients);
    combine(mode_for(isa, weights.precision()).lanes(), &dx_nd, d, dispatch, None, dx_td);
}

/// What a backward pass over rows gives, all overwritten.
pub(super) struct Gradients<'a> {
    /// Of the gathered input, `[N, D]`: what each row adds to its token.
    pub(super) dx_nd: &'a mut [f32],
    pub(super) dgate_up_edf: &'a mut [f32],
    pub(super) ddown_efd: &'a mut [f32],
    pub(super) dweight_n: &'a mut [f32],
}

/// From dy to the gradients of rows and weights.
pub(super) fn backward(
    isa: Isa,
    dy_td: &[f32],
    x_td: &[f32],
    weights: &ExpertTransposes,
    dispatch: &Dispatch,
    weight_n: &[f32],
    saved: &ExpertSaved,
    gradients: Gradients,
) {
    match (weights.gate_up_t.operands(), weights.down_t.operands()) {
        (Operands::F32, Operands::F32) => {
            rows_backward::<f32>(isa, dy_td, x_td, weights, dispatch, weight_n, saved, gradients);
        }
        (Operands::Bf16, Operands::Bf16) => {
            rows_backward::<u16>(isa, dy_td, x_td, weights, dispatch, weight_n, saved, gradients);
        }
        kinds => panic!("experts: a backward pass takes both transposes as f32 or both as bf16, not {kinds:?}"),
    }
}

/// What one thread holds while it takes a block of rows from dy to dx.
struct Scratch<T: Operand> {
    dy: Workspace<T>,
    dh: Workspace<f32>,
    dpre: Workspace<T>,
    /// Room for dy, then dpre, as the kernels read them.
    left: Workspace<f32>,
    dweight_lanes: Workspace<f32>,
}

fn rows_backward<T: ActivateBackward + SavedAs + IntoOperand<T>>(
    isa: Isa,
    dy_td: &[f32],
    x_td: &[f32],
    weights: &ExpertTransposes,
    dispatch: &Dispatch,
    weight_n: &[f32],
    saved: &ExpertSaved,
    gradients: Gradients,
) {
    let mode = mode_for(isa, weights.precision());
    let ExpertTransposes { d, f, activation, .. } = *weights;
    let (rows, columns, saved_width) = (dispatch.rows(), activation.first_columns(f), saved_width(activation, f));
    let (mut rounded_x, mut rounded_dy) = (Workspace::new(), Workspace::new());
    let x_td = T::convert_all(mode.lanes(), x_td, &mut rounded_x);
    let dy_td = T::convert_all(mode.lanes(), dy_td, &mut rounded_dy);
    let saved: &[T] = T::part(saved);
    assert_eq!(saved.len(), rows * saved_width, "expert_ffn_backward: saved is not of a forward pass of {rows} rows");
    let (gate_up_t, down_t) = (&weights.gate_up_t, &weights.down_t);

    let hidden_stride = f.next_multiple_of(PANEL);
    let mut scaled_hidden = Workspace::<T>::take(rows * hidden_stride);
    let dpre_panels = RaggedPanels::<T>::new(dispatch.row_offsets, columns);
    let dy_panels = RaggedPanels::<T>::new(dispatch.row_offsets, d);
    {
        let (scaled_hidden, dx_nd) = (SharedSlice::new(&mut scaled_hidden), SharedSlice::new(gradients.dx_nd));
        let dweight_n = SharedSlice::new(gradients.dweight_n);
        let (dy_stride, dpre_stride) =
            (padded_stride::<T>(down_t.k_padded()), padded_stride::<T>(gate_up_t.k_padded()));
        let jobs = row_jobs(dispatch.row_offsets);
        let scratch = || Scratch::<T> {
            dy: Workspace::take(ROW_BLOCK * dy_stride),
            dh: Workspace::take(ROW_BLOCK * PANEL),
            dpre: Workspace::take(ROW_BLOCK * dpre_stride),
            left: mode.room(ROW_BLOCK, down_t.k_padded().max(gate_up_t.k_padded())),
            dweight_lanes: Workspace::take(ROW_BLOCK * LANES),
        };
        for_each_job_with(jobs.len(), scratch, |scratch, job| {
            let _tiles = mode.tiles();
            let (expert, rows) = jobs[job].clone();
            let first_row = rows.start - dispatch.row_offsets[expert] as usize;
            gather(dy_td, d, &dispatch.token_of_row[rows.clone()], &mut scratch.dy, dy_stride, down_t.k_padded());
            // SAFETY: these rows of the expert belong to this job alone, in the panels as in the row-major outputs.
            let (scaled_hidden, dweight_n) = unsafe {
                dy_panels.store_rows(mode.lanes(), expert, first_row, rows.len(), d, &scratch.dy, dy_stride);
                (
                    scaled_hidden.slice(rows.start * hidden_stride, rows.len() * hidden_stride),
                    dweight_n.slice(rows.start, rows.len()),
                )
            };
            scratch.dweight_lanes.fill(0.0);
            let dy = Rows::new(scratch.dy.as_ptr(), dy_stride, rows.len());
            // SAFETY: dy was just gathered, and stays as it is until dpre takes the room over.
            let dy = unsafe { mode.left(dy, down_t.k_padded(), &mut scratch.left) };
            let k_dh = down_t.k_padded();
            for panel in 0..down_t.panels() {
                let dh = &mut scratch.dh[..rows.len() * PANEL];
                // SAFETY: `dy` and `dh` are this thread's, ROW_BLOCK (a multiple of 16) rows long.
                unsafe { whole_panel(mode, dy, down_t.expert(expert), k_dh, k_dh, panel, dh.as_mut_ptr()) };
                let work = BackwardPanel {
                    activation,
                    panel,
                    f,
                    dh,
                    weight: &weight_n[rows.clone()],
                    saved: &saved[rows.start * saved_width..rows.end * saved_width],
                    saved_width,
                    scaled_hidden,
                    hidden_stride,
                    dpre: &mut scratch.dpre,
                    dpre_stride,
                    dweight_lanes: &mut scratch.dweight_lanes,
                };
                T::backward(mode.lanes(), work);
            }
            for (dweight, lanes) in dweight_n.iter_mut().zip(scratch.dweight_lanes.chunks_exact(LANES)) {
                *dweight = sum_lanes(lanes);
            }
            for line in scratch.dpre.chunks_mut(dpre_stride).take(rows.len()) {
                line[columns..gate_up_t.k_padded()].fill(T::from_f32(0.0));
            }
            // SAFETY: as above.
            unsafe {
                dpre_panels.store_rows(mode.lanes(), expert, first_row, rows.len(), columns, &scratch.dpre, dpre_stride)
            };
            let dpre = Rows::new(scratch.dpre.as_ptr(), dpre_stride, rows.len());
            // SAFETY: dpre is complete up to the steps of K.
            let dpre = unsafe { mode.left(dpre, gate_up_t.k_padded(), &mut scratch.left) };
            for ks in k_blocks(gate_up_t.k_padded()) {
                let (a, b, accumulate) = (dpre.at_column(ks.start), gate_up_t.expert(expert), ks.start > 0);
                let (k_padded, panels, c) =
                    (gate_up_t.k_padded(), 0..gate_up_t.panels(), dx_nd.pointer(rows.start * d));
                // SAFETY: the output rows belong to this job alone; dpre is this thread's.
                unsafe { block(mode, Block { a, b, k_padded, ks, panels, c, n: d, accumulate }) };
            }
        });
    }

    let gather_x = |rows: Range<usize>, columns: Range<usize>, out: &mut [T], stride: usize, width: usize| {
        let row = |row: usize| &x_td[dispatch.token_of_row[row] as usize * d..][..d];
        transpose_rows(mode.lanes(), row, rows, columns, out, stride, width);
    };
    tn_product(mode, &gather_x, &dpre_panels, dispatch.row_offsets, d, columns, gradients.dgate_up_edf, Accum::Replace);
    let gather_hidden = |rows: Range<usize>, columns: Range<usize>, out: &mut [T], stride: usize, width: usize| {
        let row = |row: usize| &scaled_hidden[row * hidden_stride..][..hidden_stride];
        transpose_rows(mode.lanes(), row, rows, columns, out, stride, width);
    };
    tn_product(mode, &gather_hidden, &dy_panels, dispatch.row_offsets, f, d, gradients.ddown_efd, Accum::Replace);
}

/// Blocks of at most ROW_BLOCK rows that start at multiples of 32 from the expert's first row, in the order to take them.
fn row_jobs(row_offsets: &[u32]) -> Vec<(usize, Range<usize>)> {
    type Block = (usize, Range<usize>);
    let mut jobs: Vec<Block> = Vec::new();
    for (expert, offsets) in row_offsets.windows(2).enumerate() {
        let (first, end) = (offsets[0] as usize, offsets[1] as usize);
        let parts = (end - first).div_ceil(ROW_BLOCK);
        if parts > 0 {
            let size = (end - first).div_ceil(parts).next_multiple_of(32);
            jobs.extend((first..end).step_by(size).map(|start| (expert, start..(start + size).min(end))));
        }
    }
    let cut = |(expert, rows): Block| {
        let size = rows.len().div_ceil(4).next_multiple_of(32);
        let end = rows.end;
        rows.step_by(size).map(move |start| (expert, start..(start + size).min(end)))
    };
    longest_first(jobs, |(_, rows)| rows.len(), cut)
}

/// The fixed tree of `Lanes::sum_across`.
pub(super) fn sum_lanes(lanes: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    sums.copy_from_slice(lanes);
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}
