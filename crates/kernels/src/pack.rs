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
use std::ops::Range;

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

impl Storage {
    /// Room for `len` elements of unspecified value: the memory of the smallest pack in `spare` that holds them without being more
    /// than twice as large (a larger one is kept for what needs it), or fresh memory.
    fn taken_from(spare: &mut Vec<PackedB>, precision: Precision, len: usize) -> Storage {
        let capacity = |pack: &PackedB| match (&pack.storage, precision.is_bf16()) {
            (Storage::F32(data), false) => Some(data.bytes() / size_of::<f32>()),
            (Storage::Bf16(data), true) => Some(data.bytes() / size_of::<u16>()),
            _ => None,
        };
        let fits = |pack: &PackedB| capacity(pack).filter(|held| (len..=2 * len).contains(held));
        let best = (0..spare.len()).filter_map(|at| Some((fits(&spare[at])?, at))).min();
        let mut storage = match best {
            Some((_, at)) => spare.swap_remove(at).storage,
            None if precision.is_bf16() => Storage::Bf16(AlignedVec::new()),
            None => Storage::F32(AlignedVec::new()),
        };
        match &mut storage {
            Storage::F32(data) => data.resize_for_overwrite(len),
            Storage::Bf16(data) => data.resize_for_overwrite(len),
        }
        storage
    }
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
        PackedB::pack_into(&mut Vec::new(), isa, precision, experts, k, n, source)
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
        PackedB::pack_gate_up_into(&mut Vec::new(), isa, precision, experts, k, f, source)
    }

    /// [`pack`](PackedB::pack) into the memory of one of the packs in `spare`, if one is of about the size; it is taken out.
    pub fn pack_into(
        spare: &mut Vec<PackedB>,
        isa: Isa,
        precision: Precision,
        experts: usize,
        k: usize,
        n: usize,
        source: MatView,
    ) -> PackedB {
        PackedB::pack_columns(spare, isa, precision, experts, k, n, source, Columns::Plain)
    }

    /// [`pack_gate_up`](PackedB::pack_gate_up), likewise.
    pub fn pack_gate_up_into(
        spare: &mut Vec<PackedB>,
        isa: Isa,
        precision: Precision,
        experts: usize,
        k: usize,
        f: usize,
        source: MatView,
    ) -> PackedB {
        PackedB::pack_columns(spare, isa, precision, experts, k, 2 * f, source, Columns::GateUp)
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
        spare: &mut Vec<PackedB>,
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
        packed.storage = Storage::taken_from(spare, precision, experts * shape.panels * shape.k_padded * PANEL);
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

/// Panels that one job packs side by side, at most. A row visit then reads a KiB or two where one panel's part is a cache line or
/// two: at rows of 16 KiB every visit is another page.
const STRIP: usize = 16;

/// Panels per job: as many as a strip has, but four jobs for every thread where there are so many panels.
fn strip_of(panels: usize) -> usize {
    (panels / (4 * rayon::current_num_threads())).clamp(1, STRIP)
}

fn fill<T: Operand + FromLines>(isa: Isa, shape: &Shape, out: &mut [T], source: MatView)
where
    f32: IntoOperand<T>,
{
    let panel_size = shape.k_padded * PANEL;
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
        let source = MatView { data: &source.data[expert * source.expert_stride..], ..source };
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
fn fill_columns<T: Operand + FromLines>(
    isa: Isa,
    panels: &mut [T],
    panel_size: usize,
    to: usize,
    width: usize,
    columns: Range<usize>,
    k: usize,
    source: MatView,
) where
    f32: IntoOperand<T>,
{
    let data = source.data;
    let columns_of = |panel: usize| columns.start + panel * width..columns.end.min(columns.start + (panel + 1) * width);
    let mut sources: [&[f32]; PANEL] = [&[]; PANEL];
    if source.col_stride == 1 {
        // All panels of a group of rows before the next rows.
        let group_size = PANEL * PANEL;
        for first in (0..panel_size / PANEL).step_by(PANEL) {
            let rows = k.saturating_sub(first).min(PANEL);
            for (panel, out) in panels.chunks_exact_mut(panel_size).enumerate() {
                let columns = columns_of(panel);
                for (row, line) in sources[..rows].iter_mut().enumerate() {
                    *line = &data[(first + row) * source.row_stride..][columns.clone()];
                }
                let end = (first * PANEL + group_size).min(panel_size);
                let out = bytemuck::cast_slice_mut(&mut out[first * PANEL..end]);
                f32::panel_rows(isa, PanelRows { rows: &sources[..rows], out, to, width });
            }
        }
        return;
    }
    for (panel, out) in panels.chunks_exact_mut(panel_size).enumerate() {
        let columns = columns_of(panel);
        if source.row_stride == 1 {
            let lines = &mut sources[..columns.len()];
            for (line, column) in lines.iter_mut().zip(columns) {
                *line = &data[column * source.col_stride..][..k];
            }
            T::panel_lines(isa, PanelLines { lines, out: bytemuck::cast_slice_mut(out), to, width });
        } else {
            for row in 0..panel_size / PANEL {
                for col in 0..width {
                    let known = row < k && col < columns.len();
                    let at = row * source.row_stride + (columns.start + col) * source.col_stride;
                    out[T::panel_index(row, to + col)] = T::from_f32(if known { data[at] } else { 0.0 });
                }
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
            let source = MatView { data: &source.data[row_offsets[expert] * source.row_stride..], ..source };
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
