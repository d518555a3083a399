//! Filling panels: jobs of a few panels each, blocks of 16 x 16 words in them.
#![allow(unsafe_code)]

use super::Columns;
use super::source::Lines;
use crate::isa::Isa;
use crate::kernel::{IntoOperand, Operand, PANEL, PanelLines, PanelRows, Stored, lanes_of};
use crate::parallel::{SharedSlice, for_each_job};
use std::ops::Range;

/// What is packed.
pub(super) struct Shape {
    pub(super) experts: usize,
    pub(super) k: usize,
    pub(super) n: usize,
    pub(super) columns: Columns,
    pub(super) k_padded: usize,
    pub(super) panels: usize,
}

/// Panels that one job packs side by side, at most. A row visit then reads a KiB or two where one panel's part is a cache line or
/// two: at rows of 16 KiB every visit is another page.
const STRIP: usize = 16;

/// Panels per job: as many as a strip has, but four jobs for every thread where there are so many panels.
pub(super) fn strip_of(panels: usize) -> usize {
    (panels / (4 * rayon::current_num_threads())).clamp(1, STRIP)
}

/// All panels of all experts; `source` gives an expert's matrix.
pub(super) fn fill<'a, X, T>(isa: Isa, shape: &Shape, out: &mut [T], source: impl Fn(usize) -> Lines<'a, X> + Sync)
where
    X: IntoOperand<T> + 'a,
    T: Operand + Stored,
{
    let (isa, panel_size) = (lanes_of(isa), shape.k_padded * PANEL);
    if panel_size == 0 {
        return;
    }
    let strip = strip_of(shape.experts * shape.panels);
    let strips = shape.panels.div_ceil(strip);
    let out = SharedSlice::new(out);
    for_each_job(shape.experts * strips, |job| {
        let (expert, first) = (job / strips, job % strips * strip);
        let panels = first..(first + strip).min(shape.panels);
        // SAFETY: this job is the only one that touches these panels of this expert.
        let strip_out =
            unsafe { out.slice((expert * shape.panels + panels.start) * panel_size, panels.len() * panel_size) };
        let source = source(expert);
        match shape.columns {
            Columns::Plain => {
                let columns = panels.start * PANEL..shape.n.min(panels.end * PANEL);
                fill_columns(isa, strip_out, panel_size, 0, PANEL, columns, shape.k, source);
            }
            Columns::GateUp => {
                let (f, half) = (shape.n / 2, PANEL / 2);
                let gate = panels.start * half..f.min(panels.end * half);
                let up = f + gate.start..f + gate.end;
                fill_columns(isa, strip_out, panel_size, 0, half, gate, shape.k, source);
                fill_columns(isa, strip_out, panel_size, half, half, up, shape.k, source);
            }
        }
    });
}

/// Columns `to..to + width` of consecutive panels of `panel_size` elements from `columns` of the source, `width` to a panel; what is
/// missing in the last one is zero.
pub(super) fn fill_columns<X: IntoOperand<T>, T: Operand + Stored>(
    isa: Isa,
    panels: &mut [T],
    panel_size: usize,
    to: usize,
    width: usize,
    columns: Range<usize>,
    k: usize,
    source: Lines<X>,
) {
    let columns_of = |panel: usize| columns.start + panel * width..columns.end.min(columns.start + (panel + 1) * width);
    let mut sources: [&[X]; PANEL] = [&[]; PANEL];
    if let Lines::Rows { data, stride } = source {
        // All panels of a group of rows before the next rows.
        let group_size = PANEL * PANEL;
        for first in (0..panel_size / PANEL).step_by(PANEL) {
            let rows = k.saturating_sub(first).min(PANEL);
            for (panel, out) in panels.chunks_exact_mut(panel_size).enumerate() {
                let columns = columns_of(panel);
                for (row, line) in sources[..rows].iter_mut().enumerate() {
                    *line = &data[(first + row) * stride..][columns.clone()];
                }
                let end = (first * PANEL + group_size).min(panel_size);
                let out = bytemuck::cast_slice_mut(&mut out[first * PANEL..end]);
                X::panel_rows(isa, PanelRows { rows: &sources[..rows], out, to, width });
            }
        }
        return;
    }
    for (panel, out) in panels.chunks_exact_mut(panel_size).enumerate() {
        let columns = columns_of(panel);
        let lines = &mut sources[..columns.len()];
        match source {
            Lines::Columns { data, stride } => {
                for (line, column) in lines.iter_mut().zip(columns) {
                    *line = &data[column * stride..][..k];
                }
            }
            Lines::List(list) => lines.copy_from_slice(&list[columns]),
            Lines::Rows { .. } => unreachable!("done above"),
            Lines::Scattered { data, row_stride, col_stride } => {
                for row in 0..panel_size / PANEL {
                    for col in 0..width {
                        let known = row < k && col < columns.len();
                        let at = row * row_stride + (columns.start + col) * col_stride;
                        let number = if known { data[at].operand() } else { T::from_f32(0.0) };
                        out[T::panel_index(row, to + col)] = number;
                    }
                }
                continue;
            }
        }
        X::panel_lines(isa, PanelLines { lines, out: bytemuck::cast_slice_mut(out), to, width });
    }
}
