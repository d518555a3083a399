//! Forward pass of the experts. With many rows a job is a block of rows of one expert, from gathered x to rows of the second product.
//! With few (a decoding step has one row per choice) that would leave threads without work and weights unread, so each of the two
//! products is cut into columns as well.
#![allow(unsafe_code)]

use super::activation::{Activate, ForwardPanel};
use super::combine::combine;
use super::{Dispatch, ExpertSaved, ExpertWeights, saved_width};
use crate::gemm::{Job, k_blocks, split};
use crate::isa::Isa;
use crate::kernel::{Block, Mode, Operand, PANEL, Rows, Wide, block, lanes_of, mode_for, padded_stride, whole_panel};
use crate::lanes::LANES;
use crate::pack::Operands;
use crate::parallel::{SharedSlice, for_each_job_with, longest_first};
use crate::workspace::Workspace;
use std::ops::Range;

/// Rows of one expert per job.
const ROW_BLOCK: usize = 128;

/// y_t = sum over the token's choices c, in order, of weight(row of c) * expert(x_t); y_td is overwritten.
///
/// With `saved`, the pre-activations are kept for [`super::expert_ffn_backward`].
pub fn expert_ffn_forward(
    isa: Isa,
    x_td: &[f32],
    weights: &ExpertWeights,
    dispatch: &Dispatch,
    weight_n: &[f32],
    y_td: &mut [f32],
    saved: Option<&mut ExpertSaved>,
) {
    let ExpertWeights { d, .. } = *weights;
    dispatch.check("expert_ffn_forward", weights.experts());
    assert!(
        x_td.len() == dispatch.tokens * d && y_td.len() == x_td.len() && weight_n.len() == dispatch.rows(),
        "expert_ffn_forward: x has {} elements, y {}, weights {}; T {}, D {d}, N {} expected",
        x_td.len(),
        y_td.len(),
        weight_n.len(),
        dispatch.tokens,
        dispatch.rows()
    );
    let mut rows_nd = Workspace::take(dispatch.rows() * d);
    forward(isa, x_td, weights, dispatch, &mut rows_nd, saved);
    combine(lanes_of(isa), &rows_nd, d, dispatch, Some(weight_n), y_td);
}

/// What the experts answer, row by row, before any weight.
pub(super) fn forward(
    isa: Isa,
    x_td: &[f32],
    weights: &ExpertWeights,
    dispatch: &Dispatch,
    rows_nd: &mut [f32],
    saved: Option<&mut ExpertSaved>,
) {
    match weights.gate_up.operands() {
        Operands::F32 => {
            rows_forward::<f32>(isa, x_td, weights, dispatch, rows_nd, saved.map(|saved| &mut saved.f32));
        }
        Operands::Bf16 => {
            rows_forward::<u16>(isa, x_td, weights, dispatch, rows_nd, saved.map(|saved| &mut saved.bf16));
        }
        Operands::Wide => {
            assert!(
                saved.is_none(),
                "experts: weights held in bf16 for precision f32 serve no training; pack their f32 values to save for a backward pass"
            );
            rows_forward::<Wide>(isa, x_td, weights, dispatch, rows_nd, None);
        }
    }
}

/// What one thread holds: its block of x, of hidden rows, room for either as the kernels read them, and one panel of pre-activations.
struct Scratch<T: Operand> {
    x: Workspace<T>,
    hidden: Workspace<T>,
    left: Workspace<f32>,
    pre: Workspace<f32>,
}

fn rows_forward<T: Activate>(
    isa: Isa,
    x_td: &[f32],
    weights: &ExpertWeights,
    dispatch: &Dispatch,
    rows_nd: &mut [f32],
    saved: Option<&mut Workspace<T>>,
) {
    let mode = mode_for(isa, weights.precision());
    let ExpertWeights { d, f, ref gate_up, ref down, .. } = *weights;
    let (gate_up_k, down_k) = (gate_up.k_summed::<T>(), down.k_summed::<T>());
    let mut rounded = Workspace::new();
    let x_td = T::convert_all(mode.lanes(), x_td, &mut rounded);
    let jobs = split(dispatch.row_offsets, 1, ROW_BLOCK);
    let threads = rayon::current_num_threads();
    if saved.is_none() && threads > 1 && jobs.len() < 4 * threads {
        return few_rows_forward(mode, x_td, weights, dispatch, rows_nd);
    }
    let jobs = longest_first(jobs, |job| job.rows.len(), Job::cut_rows);
    let (x_stride, hidden_stride) = (padded_stride::<T>(gate_up_k), padded_stride::<T>(f.next_multiple_of(PANEL)));
    let saved_width = saved_width(weights.activation, f);
    let saved: &mut [T] = match saved {
        Some(saved) => {
            *saved = Workspace::take(dispatch.rows() * saved_width);
            saved
        }
        None => &mut [],
    };
    let keep = !saved.is_empty();
    let (saved, rows_nd) = (SharedSlice::new(saved), SharedSlice::new(rows_nd));
    let scratch = || Scratch::<T> {
        x: Workspace::take(ROW_BLOCK * x_stride),
        hidden: Workspace::take(ROW_BLOCK * hidden_stride),
        left: mode.room(ROW_BLOCK, gate_up_k.max(down_k)),
        pre: Workspace::take(ROW_BLOCK * PANEL),
    };
    for_each_job_with(jobs.len(), scratch, |scratch, job| {
        let _tiles = mode.tiles();
        let Job { expert, rows, .. } = jobs[job].clone();
        gather(x_td, d, &dispatch.token_of_row[rows.clone()], &mut scratch.x, x_stride, gate_up_k);
        let x = Rows::new(scratch.x.as_ptr(), x_stride, rows.len());
        // SAFETY: `x` was just gathered, and stays as it is until the hidden rows take the room over.
        let x = unsafe { mode.left(x, gate_up_k, &mut scratch.left) };
        for panel in 0..gate_up.panels() {
            let pre = &mut scratch.pre[..rows.len() * PANEL];
            let (b, k_padded) = (gate_up.expert(expert), gate_up.k_padded());
            // SAFETY: `x` and `pre` are this thread's, ROW_BLOCK (a multiple of 16) rows long.
            unsafe { whole_panel(mode, x, b, gate_up_k, k_padded, panel, pre.as_mut_ptr()) };
            let saved: &mut [T] = if keep {
                // SAFETY: the rows of this job belong to no other job.
                unsafe { saved.slice(rows.start * saved_width, rows.len() * saved_width) }
            } else {
                &mut []
            };
            let activation = weights.activation;
            let hidden = &mut scratch.hidden[..];
            T::forward(
                mode.lanes(),
                ForwardPanel { activation, panel, pre, hidden, hidden_stride, saved, saved_width },
            );
        }
        // The activation wrote whole groups of 16 columns; the steps of K may reach further.
        let written = f.next_multiple_of(LANES);
        for line in scratch.hidden.chunks_mut(hidden_stride).take(rows.len()) {
            line[written..].fill(T::from_f32(0.0));
        }
        let hidden = Rows::new(scratch.hidden.as_ptr(), hidden_stride, rows.len());
        // SAFETY: the hidden rows are complete up to the steps of K.
        let hidden = unsafe { mode.left(hidden, down_k, &mut scratch.left) };
        for ks in k_blocks(down_k) {
            let accumulate = ks.start > 0;
            let a = hidden.at_column(ks.start);
            let (b, k_padded, panels) = (down.expert(expert), down.k_padded(), 0..down.panels());
            let c = rows_nd.pointer(rows.start * d);
            // SAFETY: the output rows belong to this job alone; the hidden rows are this thread's.
            unsafe { block(mode, Block { a, b, k_padded, ks, panels, c, n: d, accumulate }) };
        }
    });
}

/// Both products cut into rows and columns, one after the other; nothing is saved. The hidden rows lie panel by panel in between, so
/// that a job's columns are its own.
fn few_rows_forward<T: Activate>(
    mode: Mode,
    x_td: &[T],
    weights: &ExpertWeights,
    dispatch: &Dispatch,
    rows_nd: &mut [f32],
) {
    let ExpertWeights { d, f, activation, ref gate_up, ref down, .. } = *weights;
    let (gate_up_k, down_k) = (gate_up.k_summed::<T>(), down.k_summed::<T>());
    let x_stride = padded_stride::<T>(gate_up_k);
    let hidden_stride = padded_stride::<T>(down_k.max(f.next_multiple_of(LANES)));
    // Hidden columns per panel of the first product.
    let group = if activation.is_gated() { LANES } else { PANEL };
    let hidden_width = gate_up.panels() * group;
    let mut hidden = Workspace::<T>::take(dispatch.rows() * hidden_width);
    let panel_at = |rows: &Range<usize>, panel: usize| rows.start * hidden_width + panel * rows.len() * group;

    let jobs = split(dispatch.row_offsets, gate_up.panels(), ROW_BLOCK);
    let hidden_out = SharedSlice::new(&mut hidden);
    let scratch = || {
        let room = mode.room(ROW_BLOCK, gate_up_k);
        (Workspace::<T>::take(ROW_BLOCK * x_stride), room, Workspace::<f32>::take(ROW_BLOCK * PANEL))
    };
    for_each_job_with(jobs.len(), scratch, |(x, room, pre), job| {
        let _tiles = mode.tiles();
        let Job { expert, rows, panels } = jobs[job].clone();
        gather(x_td, d, &dispatch.token_of_row[rows.clone()], x, x_stride, gate_up_k);
        let x = Rows::new(x.as_ptr(), x_stride, rows.len());
        // SAFETY: `x` was just gathered.
        let x = unsafe { mode.left(x, gate_up_k, room) };
        for panel in panels {
            let pre = &mut pre[..rows.len() * PANEL];
            let (b, k_padded) = (gate_up.expert(expert), gate_up.k_padded());
            // SAFETY: `x` and `pre` are this thread's, ROW_BLOCK (a multiple of 16) rows long.
            unsafe { whole_panel(mode, x, b, gate_up_k, k_padded, panel, pre.as_mut_ptr()) };
            // SAFETY: this panel of these rows belongs to this job alone.
            let hidden = unsafe { hidden_out.slice(panel_at(&rows, panel), rows.len() * group) };
            // The slice is one panel, so its columns start at 0.
            let (panel, saved) = (0, &mut [][..]);
            let work = ForwardPanel { activation, panel, pre, hidden, hidden_stride: group, saved, saved_width: 0 };
            T::forward(mode.lanes(), work);
        }
    });

    let jobs = split(dispatch.row_offsets, down.panels(), ROW_BLOCK);
    let rows_nd = SharedSlice::new(rows_nd);
    let scratch = || (Workspace::<T>::take(ROW_BLOCK * hidden_stride), mode.room(ROW_BLOCK, down_k));
    for_each_job_with(jobs.len(), scratch, |(lines, room), job| {
        let _tiles = mode.tiles();
        let Job { expert, rows, panels } = jobs[job].clone();
        for (row, line) in lines.chunks_mut(hidden_stride).take(rows.len()).enumerate() {
            for (panel, columns) in line[..f.next_multiple_of(group).min(hidden_stride)].chunks_mut(group).enumerate() {
                columns.copy_from_slice(&hidden[panel_at(&rows, panel) + row * group..][..columns.len()]);
            }
            line[f.next_multiple_of(LANES)..].fill(T::from_f32(0.0));
        }
        let lines = Rows::new(lines.as_ptr(), hidden_stride, rows.len());
        // SAFETY: the lines are complete up to the steps of K.
        let lines = unsafe { mode.left(lines, down_k, room) };
        let first = rows.start * d + panels.start * PANEL;
        for ks in k_blocks(down_k) {
            let (a, b, accumulate) = (lines.at_column(ks.start), down.expert(expert), ks.start > 0);
            let (k_padded, panels, c) = (down.k_padded(), panels.clone(), rows_nd.pointer(first));
            // SAFETY: these rows and columns of the output belong to this job alone; the hidden lines are this thread's.
            unsafe { block(mode, Block { a, b, k_padded, ks, panels, c, n: d, accumulate }) };
        }
    });
}

/// The rows' tokens, `width` elements each (zeros after D).
pub(super) fn gather<T: Operand>(
    x_td: &[T],
    d: usize,
    token_of_row: &[u32],
    out: &mut [T],
    stride: usize,
    width: usize,
) {
    for (&token, line) in token_of_row.iter().zip(out.chunks_mut(stride)) {
        line[..d].copy_from_slice(&x_td[token as usize * d..][..d]);
        line[d..width].fill(T::from_f32(0.0));
    }
}
