//! Panels that live for one product: the rows of each expert, packed as the right operand of its weight gradient.
#![allow(unsafe_code)]

use super::fill::{fill_columns, strip_of};
use super::source::{Lines, MatView};
use crate::isa::Isa;
use crate::kernel::{IntoOperand, Operand, PANEL, PanelRows, Stored, lanes_of};
use crate::parallel::{SharedSlice, for_each_job};
use crate::workspace::Workspace;

/// For each expert its own rows `[rows of e, N]` packed into panels, rows being the axis summed over: the right operand of a weight
/// gradient.
pub(crate) struct RaggedPanels<T: Operand> {
    row_offsets: Vec<usize>,
    starts: Vec<usize>,
    panels: usize,
    data: Workspace<T>,
}

impl<T: Operand> RaggedPanels<T> {
    /// Room for the panels, values unspecified; `fill_rows` must be called for every row.
    pub(crate) fn new(row_offsets: &[u32], n: usize) -> RaggedPanels<T> {
        let row_offsets: Vec<usize> = row_offsets.iter().map(|&offset| offset as usize).collect();
        let panels = n.div_ceil(PANEL);
        let mut starts = vec![0];
        for offsets in row_offsets.windows(2) {
            starts.push(
                starts[starts.len() - 1] + (offsets[1] - offsets[0]).next_multiple_of(T::K_STEP) * panels * PANEL,
            );
        }
        let data = Workspace::take(starts[starts.len() - 1]);
        RaggedPanels { row_offsets, starts, panels, data }
    }

    /// Packs row-major rows, read through `source` (its expert stride is not used).
    pub(crate) fn pack(isa: Isa, row_offsets: &[u32], n: usize, source: MatView) -> RaggedPanels<T>
    where
        T: Stored,
        f32: IntoOperand<T>,
    {
        let isa = lanes_of(isa);
        let mut packed = RaggedPanels::<T>::new(row_offsets, n);
        let (panels, experts) = (packed.panels, row_offsets.len() - 1);
        let strip = strip_of(experts * panels);
        let strips = panels.div_ceil(strip);
        let RaggedPanels { row_offsets, starts, data, .. } = &mut packed;
        let out = SharedSlice::new(data);
        for_each_job(experts * strips, |job| {
            let (expert, first) = (job / strips, job % strips * strip);
            let panels = first..(first + strip).min(panels);
            let k = row_offsets[expert + 1] - row_offsets[expert];
            let size = k.next_multiple_of(T::K_STEP) * PANEL;
            if size == 0 {
                return;
            }
            // SAFETY: this job is the only one that touches these panels of this expert.
            let strip_out = unsafe { out.slice(starts[expert] + panels.start * size, panels.len() * size) };
            let columns = panels.start * PANEL..n.min(panels.end * PANEL);
            let source = Lines::at(source, row_offsets[expert] * source.row_stride);
            fill_columns(isa, strip_out, size, 0, PANEL, columns, k, source);
        });
        packed
    }

    /// Writes rows `first..first + rows` of an expert (`first` a multiple of the K step) from `source`, `stride` apart; with the expert's last rows comes
    /// the padding.
    ///
    /// # Safety
    /// No other thread may touch these rows, nor the padding, meanwhile; `&self` is shared so that jobs can fill disjoint rows.
    pub(crate) unsafe fn store_rows(
        &self,
        isa: Isa,
        expert: usize,
        first: usize,
        rows: usize,
        n: usize,
        source: &[T],
        stride: usize,
    ) where
        T: IntoOperand<T>,
    {
        let count = self.row_offsets[expert + 1] - self.row_offsets[expert];
        let k_padded = self.k_padded(expert);
        let end = if first + rows == count { k_padded } else { first + rows };
        assert!(
            first.is_multiple_of(T::K_STEP) && (end - first).is_multiple_of(T::K_STEP),
            "RaggedPanels: rows {first}..{end} split a step"
        );
        let mut sources: [&[T]; PANEL] = [&[]; PANEL];
        for panel in 0..self.panels {
            let width = PANEL.min(n - panel * PANEL);
            let start = self.starts[expert] + panel * k_padded * PANEL;
            for at in (first..end).step_by(PANEL) {
                let (len, known) = (PANEL.min(end - at), PANEL.min((first + rows).saturating_sub(at)));
                for (row, line) in sources[..known].iter_mut().enumerate() {
                    *line = &source[(at - first + row) * stride + panel * PANEL..][..width];
                }
                assert!(start + (at + len) * PANEL <= self.starts[expert + 1]);
                // SAFETY: inside the expert's panels by the assertion; exclusive by the caller's promise.
                let out =
                    unsafe { std::slice::from_raw_parts_mut(self.data.start().add(start + at * PANEL), len * PANEL) };
                let out = bytemuck::cast_slice_mut(out);
                T::panel_rows(isa, PanelRows { rows: &sources[..known], out, to: 0, width: PANEL });
            }
        }
    }

    pub(crate) fn panels(&self) -> usize {
        self.panels
    }

    /// Rows of one expert as stored: padded with zeros.
    pub(crate) fn k_padded(&self, expert: usize) -> usize {
        (self.row_offsets[expert + 1] - self.row_offsets[expert]).next_multiple_of(T::K_STEP)
    }

    /// The panels of one expert.
    pub(crate) fn expert(&self, expert: usize) -> &[T] {
        &self.data[self.starts[expert]..self.starts[expert + 1]]
    }
}
