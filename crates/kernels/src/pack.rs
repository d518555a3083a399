//! The right operand of a matrix product, packed once and used many times.
//!
//! A packed matrix is cut into panels of 32 columns. In f32 a panel is `[K][32]`; in bf16 it is `[K/2][32][2]`, K padded with zeros to
//! a multiple of 32: two consecutive k side by side is what `vdpbf16ps` reads, and sixteen such rows with a stride of 128 bytes are what
//! an AMX tile load reads, so one layout serves every instruction set. Panels start on cache lines.
//!
//! Gated experts interleave: panel p holds gate columns 16p..16p+16, then the up columns of the same numbers, so that the activation
//! finds both halves in one panel.
//!
//! Axes: E experts, K rows of the logical matrix (summed over), N columns.
#![allow(unsafe_code)]

use crate::aligned::AlignedVec;
use crate::isa::Isa;
use crate::kernel::{FromLines, IntoOperand, Operand, PANEL, PanelLines, PanelRows, lanes_of};
use crate::parallel::{SharedSlice, for_each_job};
use crate::precision::Precision;
use crate::workspace::Workspace;

/// Where the elements of E logical matrices `[K, N]` lie in memory: element (e, k, n) is
/// `data[e * expert_stride + k * row_stride + n * col_stride]`. A matrix and its transpose are two views of the same memory.
#[derive(Clone, Copy, Debug)]
pub struct MatView<'a> {
    /// All elements of all experts.
    pub data: &'a [f32],
    /// Distance from (k, n) to (k + 1, n).
    pub row_stride: usize,
    /// Distance from (k, n) to (k, n + 1).
    pub col_stride: usize,
    /// Distance from one expert's matrix to the next.
    pub expert_stride: usize,
}

impl<'a> MatView<'a> {
    /// E row-major matrices `[rows, cols]`, one after the other, as they are.
    pub fn row_major(data: &'a [f32], rows: usize, cols: usize) -> MatView<'a> {
        MatView { data, row_stride: cols, col_stride: 1, expert_stride: rows * cols }
    }

    /// E row-major matrices `[rows, cols]`, each read as its transpose `[cols, rows]`.
    pub fn transposed(data: &'a [f32], rows: usize, cols: usize) -> MatView<'a> {
        MatView { data, row_stride: 1, col_stride: cols, expert_stride: rows * cols }
    }

    fn assert_holds(&self, experts: usize, k: usize, n: usize) {
        if experts * k * n > 0 {
            let last = (experts - 1) * self.expert_stride + (k - 1) * self.row_stride + (n - 1) * self.col_stride;
            assert!(
                last < self.data.len(),
                "MatView: [{experts}, {k}, {n}] with strides ({}, {}, {}) needs {} elements, got {}",
                self.expert_stride,
                self.row_stride,
                self.col_stride,
                last + 1,
                self.data.len()
            );
        }
    }
}

/// Which logical column stands where in a panel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Columns {
    /// Panel p holds columns 32p..32p+32.
    Plain,
    /// Panel p holds gate columns 16p..16p+16 and up columns F+16p..F+16p+16.
    GateUp,
}

#[derive(Clone, Debug)]
pub(crate) enum Storage {
    F32(AlignedVec<f32>),
    Bf16(AlignedVec<u16>),
}

/// One matrix per expert, logical `[K, N]`, packed for the GEMM kernels.
#[derive(Clone, Debug)]
pub struct PackedB {
    precision: Precision,
    experts: usize,
    k: usize,
    n: usize,
    columns: Columns,
    storage: Storage,
}

impl PackedB {
    /// Packs `experts` matrices `[k, n]` read through `source`. Dense layers have one expert.
    pub fn pack(isa: Isa, precision: Precision, experts: usize, k: usize, n: usize, source: MatView) -> PackedB {
        PackedB::pack_columns(isa, precision, experts, k, n, source, Columns::Plain)
    }

    /// Packs `experts` matrices `[k, 2f]`, gate columns first, so that each panel holds matching gate and up columns.
    pub fn pack_gate_up(
        isa: Isa,
        precision: Precision,
        experts: usize,
        k: usize,
        f: usize,
        source: MatView,
    ) -> PackedB {
        PackedB::pack_columns(isa, precision, experts, k, 2 * f, source, Columns::GateUp)
    }

    /// Packs new values of the same shape into the memory already held.
    pub fn repack(&mut self, isa: Isa, source: MatView) {
        source.assert_holds(self.experts, self.k, self.n);
        let (isa, shape) = (lanes_of(isa), self.shape());
        match &mut self.storage {
            Storage::F32(data) => fill(isa, &shape, data, source),
            Storage::Bf16(data) => fill(isa, &shape, data, source),
        }
    }

    fn pack_columns(
        isa: Isa,
        precision: Precision,
        experts: usize,
        k: usize,
        n: usize,
        source: MatView,
        columns: Columns,
    ) -> PackedB {
        let mut packed = PackedB { precision, experts, k, n, columns, storage: Storage::F32(AlignedVec::new()) };
        let shape = packed.shape();
        packed.storage = if precision.is_bf16() {
            Storage::Bf16(AlignedVec::zeroed(experts * shape.panels * shape.k_padded * PANEL))
        } else {
            Storage::F32(AlignedVec::zeroed(experts * shape.panels * shape.k_padded * PANEL))
        };
        packed.repack(isa, source);
        packed
    }

    fn shape(&self) -> Shape {
        Shape {
            experts: self.experts,
            k: self.k,
            n: self.n,
            columns: self.columns,
            k_padded: self.k_padded(),
            panels: self.panels(),
        }
    }

    /// Rows of the logical matrix: the axis summed over.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Columns of the logical matrix.
    pub fn n(&self) -> usize {
        self.n
    }

    /// How many matrices are packed.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// The precision the matrices were packed for.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Bytes the packed matrices take.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::F32(data) => data.bytes(),
            Storage::Bf16(data) => data.bytes(),
        }
    }

    /// Whether gate and up columns alternate by sixteen.
    pub(crate) fn is_gate_up(&self) -> bool {
        self.columns == Columns::GateUp
    }

    /// Panels per expert.
    pub(crate) fn panels(&self) -> usize {
        match self.columns {
            Columns::Plain => self.n.div_ceil(PANEL),
            Columns::GateUp => (self.n / 2).div_ceil(PANEL / 2),
        }
    }

    /// K as stored.
    pub(crate) fn k_padded(&self) -> usize {
        if self.precision.is_bf16() { self.k.next_multiple_of(u16::K_STEP) } else { self.k }
    }

    /// The panels of one expert: `panels()` times `k_padded() * 32` elements.
    pub(crate) fn expert<T: Operand>(&self, expert: usize) -> &[T] {
        let size = self.panels() * self.k_padded() * PANEL;
        &T::stored(&self.storage)[expert * size..(expert + 1) * size]
    }
}

struct Shape {
    experts: usize,
    k: usize,
    n: usize,
    columns: Columns,
    k_padded: usize,
    panels: usize,
}

fn fill<T: Operand + FromLines>(isa: Isa, shape: &Shape, out: &mut [T], source: MatView)
where
    f32: IntoOperand<T>,
{
    let panel_size = shape.k_padded * PANEL;
    let out = SharedSlice::new(out);
    for_each_job(shape.experts * shape.panels, |job| {
        let (expert, panel) = (job / shape.panels, job % shape.panels);
        // SAFETY: job `job` is the only one that touches panel `job`.
        let panel_out = unsafe { out.slice(job * panel_size, panel_size) };
        let at = expert * source.expert_stride;
        match shape.columns {
            Columns::Plain => {
                let first = panel * PANEL;
                let cols = PANEL.min(shape.n - first);
                fill_columns(isa, panel_out, 0, PANEL, cols, shape.k, at + first * source.col_stride, source);
            }
            Columns::GateUp => {
                let (f, half) = (shape.n / 2, PANEL / 2);
                let first = panel * half;
                let cols = half.min(f - first);
                fill_columns(isa, panel_out, 0, half, cols, shape.k, at + first * source.col_stride, source);
                fill_columns(isa, panel_out, half, half, cols, shape.k, at + (f + first) * source.col_stride, source);
            }
        }
    });
}

/// Columns `to..to + width` of one panel from `cols` source columns, the rest zero.
fn fill_columns<T: Operand + FromLines>(
    isa: Isa,
    panel: &mut [T],
    to: usize,
    width: usize,
    cols: usize,
    k: usize,
    at: usize,
    source: MatView,
) where
    f32: IntoOperand<T>,
{
    let (data, numbers_per_word) = (source.data, size_of::<u32>() / size_of::<T>());
    let mut sources: [&[f32]; PANEL] = [&[]; PANEL];
    if source.col_stride == 1 {
        let out: &mut [u32] = bytemuck::cast_slice_mut(panel);
        for (group, out) in out.chunks_mut(PANEL * PANEL / numbers_per_word).enumerate() {
            let rows = k.saturating_sub(group * PANEL).min(PANEL);
            for (row, line) in sources[..rows].iter_mut().enumerate() {
                *line = &data[at + (group * PANEL + row) * source.row_stride..][..cols];
            }
            f32::panel_rows(isa, PanelRows { rows: &sources[..rows], out, to, width });
        }
    } else if source.row_stride == 1 {
        for (column, line) in sources[..cols].iter_mut().enumerate() {
            *line = &data[at + column * source.col_stride..][..k];
        }
        T::panel_lines(isa, PanelLines { lines: &sources[..cols], out: bytemuck::cast_slice_mut(panel), to, width });
    } else {
        for row in 0..panel.len() / PANEL {
            for col in 0..width {
                let known = row < k && col < cols;
                let value = if known { data[at + row * source.row_stride + col * source.col_stride] } else { 0.0 };
                panel[T::panel_index(row, to + col)] = T::from_f32(value);
            }
        }
    }
}

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
        T: FromLines,
        f32: IntoOperand<T>,
    {
        let isa = lanes_of(isa);
        let mut packed = RaggedPanels::<T>::new(row_offsets, n);
        let (panels, experts) = (packed.panels, row_offsets.len() - 1);
        let RaggedPanels { row_offsets, starts, data, .. } = &mut packed;
        let out = SharedSlice::new(data);
        for_each_job(experts * panels, |job| {
            let (expert, panel) = (job / panels, job % panels);
            let k = row_offsets[expert + 1] - row_offsets[expert];
            let size = k.next_multiple_of(T::K_STEP) * PANEL;
            // SAFETY: job `job` is the only one that touches this panel of this expert.
            let panel_out = unsafe { out.slice(starts[expert] + panel * size, size) };
            let cols = PANEL.min(n - panel * PANEL);
            let at = row_offsets[expert] * source.row_stride + panel * PANEL * source.col_stride;
            fill_columns(isa, panel_out, 0, PANEL, cols, k, at, source);
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
