//! The right operand of a matrix product, packed once and used many times.
//!
//! A packed matrix is cut into panels of 32 columns. Held in f32 a panel is `[K][32]`; in bf16 it is `[K/2][32][2]`, K padded with zeros to
//! a multiple of 32: two consecutive k side by side is what `vdpbf16ps` reads, and sixteen such rows with a stride of 128 bytes are what
//! an AMX tile load reads, so one layout serves every instruction set. Panels start on cache lines.
//!
//! Gated experts interleave: panel p holds gate columns 16p..16p+16, then the up columns of the same numbers, so that the activation
//! finds both halves in one panel.
//!
//! What a pack is held in follows from its precision: f32 or, rounded, bf16. Of weights that a file has in bf16, which only serve forward
//! passes, [`PackedB::from_stored`] makes a pack held in bf16 in every precision: in f32 the products widen them in registers, and the
//! bits are those of a pack of the widened weights.
//!
//! Axes: E experts, K rows of the logical matrix (summed over), N columns.

use crate::aligned::AlignedVec;
use crate::bf16;
use crate::isa::Isa;
use crate::kernel::{Operand, PANEL, Stored};
use crate::precision::Precision;
use fill::{Shape, fill};
use source::Lines;

mod source;
mod fill;
mod ragged;
#[cfg(test)]
mod tests;

pub(crate) use ragged::RaggedPanels;
pub use source::{Elements, MatView, Source};

/// Which logical column stands where in a panel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Columns {
    /// Panel p holds columns 32p..32p+32.
    Plain,
    /// Of N = 2F columns, the first F of them gates: panel p holds gate columns 16p..16p+16 and up columns F+16p..F+16p+16.
    GateUp,
}

/// How products with a pack run: the precision and what the pack is held in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operands {
    /// f32 times f32.
    F32,
    /// bf16 times bf16.
    Bf16,
    /// f32 times bf16.
    Wide,
}

#[derive(Clone, Debug)]
pub(crate) enum Storage {
    F32(AlignedVec<f32>),
    Bf16(AlignedVec<u16>),
}

impl Storage {
    fn empty(in_bf16: bool) -> Storage {
        if in_bf16 { Storage::Bf16(AlignedVec::new()) } else { Storage::F32(AlignedVec::new()) }
    }

    /// Room for `len` elements of unspecified value: the memory of the smallest pack in `spare` that holds them without being more
    /// than twice as large (a larger one is kept for what needs it), or fresh memory.
    fn taken_from(spare: &mut Vec<PackedB>, in_bf16: bool, len: usize) -> Storage {
        let capacity = |pack: &PackedB| match (&pack.storage, in_bf16) {
            (Storage::F32(data), false) => Some(data.bytes() / size_of::<f32>()),
            (Storage::Bf16(data), true) => Some(data.bytes() / size_of::<u16>()),
            _ => None,
        };
        let fits = |pack: &PackedB| capacity(pack).filter(|held| (len..=2 * len).contains(held));
        let best = (0..spare.len()).filter_map(|at| Some((fits(&spare[at])?, at))).min();
        let mut storage = match best {
            Some((_, at)) => spare.swap_remove(at).storage,
            None => Storage::empty(in_bf16),
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

    /// Packs `experts` matrices `[k, n]` as a file holds them. Numbers that are bf16 already are taken as they are, and held as they are in
    /// every precision; f32s are held in f32 in precision f32, and rounded in the others. The products have the bits of those with
    /// [`pack`](PackedB::pack) of the same numbers in f32.
    ///
    /// What is held in bf16 in precision f32 serves forward passes only.
    ///
    /// # Panics
    /// If the slices do not have the lengths, or there are not as many, as [`Source`] asks for.
    ///
    /// ```
    /// use mixtura_kernels::gemm::{Accum, matmul};
    /// use mixtura_kernels::isa::Isa;
    /// use mixtura_kernels::pack::{Columns, Elements, PackedB, Source};
    /// use mixtura_kernels::precision::Precision;
    /// // A file with two tensors `[out, in]` in bf16: rows (1, 2) and (-1, 0.5), row (3, 4).
    /// let (first, second) = ([0x3f80u16, 0x4000, 0xbf80, 0x3f00], [0x4040u16, 0x4080]);
    /// let columns: Vec<&[u16]> = first.chunks(2).chain(second.chunks(2)).collect();
    /// let source = Source::ByColumn(Elements::Bf16(&columns));
    /// let packed = PackedB::from_stored(Isa::current(), Precision::F32, 1, 2, 3, Columns::Plain, source);
    /// let mut c = [0.0; 3];
    /// matmul(Isa::current(), &[10.0, 1.0], 1, &packed, &mut c, Accum::Replace);
    /// assert_eq!(c, [12.0, -9.5, 34.0]);
    /// ```
    pub fn from_stored(
        isa: Isa,
        precision: Precision,
        experts: usize,
        k: usize,
        n: usize,
        columns: Columns,
        source: Source,
    ) -> PackedB {
        assert!(
            columns == Columns::Plain || n.is_multiple_of(2),
            "PackedB::from_stored: {n} columns are no gates and ups"
        );
        source.assert_is(experts, k, n);
        let in_bf16 = precision.is_bf16() || matches!(source.elements(), Elements::Bf16(_));
        let mut packed = PackedB::unfilled(&mut Vec::new(), precision, in_bf16, experts, k, n, columns);
        let shape = packed.shape();
        match (&mut packed.storage, source.elements()) {
            (Storage::F32(data), Elements::F32(slices)) => {
                fill(isa, &shape, data, |expert| Lines::of_pieces(source, slices, n, expert));
            }
            (Storage::Bf16(data), Elements::F32(slices)) => {
                fill(isa, &shape, data, |expert| Lines::of_pieces(source, slices, n, expert));
            }
            (Storage::Bf16(data), Elements::Bf16(slices)) => {
                fill(isa, &shape, data, |expert| Lines::of_pieces(source, slices, n, expert));
            }
            (Storage::F32(_), Elements::Bf16(_)) => unreachable!("bf16 is held in bf16"),
        }
        packed
    }

    /// Packs new values of the same shape into the memory already held.
    ///
    /// # Panics
    /// If the pack is held in bf16 in precision f32: it would round them.
    pub fn repack(&mut self, isa: Isa, source: MatView) {
        source.assert_holds(self.experts, self.k, self.n);
        assert!(self.operands() != Operands::Wide, "PackedB::repack: a pack held in bf16 for f32 takes no f32s");
        let shape = self.shape();
        match &mut self.storage {
            Storage::F32(data) => fill(isa, &shape, data, |expert| Lines::of(source, expert)),
            Storage::Bf16(data) => fill(isa, &shape, data, |expert| Lines::of(source, expert)),
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
        let mut packed = PackedB::unfilled(spare, precision, precision.is_bf16(), experts, k, n, columns);
        packed.repack(isa, source);
        packed
    }

    /// A pack of unspecified values.
    fn unfilled(
        spare: &mut Vec<PackedB>,
        precision: Precision,
        in_bf16: bool,
        experts: usize,
        k: usize,
        n: usize,
        columns: Columns,
    ) -> PackedB {
        let mut packed = PackedB { precision, experts, k, n, columns, storage: Storage::empty(in_bf16) };
        let shape = packed.shape();
        packed.storage = Storage::taken_from(spare, in_bf16, experts * shape.panels * shape.k_padded * PANEL);
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

    /// Whether the numbers are held in bf16, as they are in the bf16 precisions and where [`from_stored`](PackedB::from_stored) found them
    /// in bf16.
    pub fn holds_bf16(&self) -> bool {
        matches!(self.storage, Storage::Bf16(_))
    }

    /// Column `n` of one expert's matrix, K numbers as they are held: what a token's row of an embedding is to an output projection that
    /// shares its weights.
    ///
    /// # Panics
    /// If there is no such column, or `out` does not have K elements.
    pub fn column(&self, expert: usize, n: usize, out: &mut [f32]) {
        assert!(
            expert < self.experts && n < self.n && out.len() == self.k,
            "PackedB::column: column {n} of expert {expert} into {} elements; E {}, K {}, N {}",
            out.len(),
            self.experts,
            self.k,
            self.n
        );
        let (panel, column) = match self.columns {
            Columns::Plain => (n / PANEL, n % PANEL),
            Columns::GateUp => {
                let (half, up) = (PANEL / 2, n / (self.n / 2));
                let n = n % (self.n / 2);
                (n / half, n % half + up * half)
            }
        };
        let size = self.k_padded() * PANEL;
        let panel = panel * size..(panel + 1) * size;
        match &self.storage {
            Storage::F32(_) => {
                let panel = &self.expert::<f32>(expert)[panel];
                out.iter_mut().enumerate().for_each(|(k, x)| *x = panel[f32::panel_index(k, column)]);
            }
            Storage::Bf16(_) => {
                let panel = &self.expert::<u16>(expert)[panel];
                out.iter_mut().enumerate().for_each(|(k, x)| *x = bf16::to_f32(panel[u16::panel_index(k, column)]));
            }
        }
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

    /// How products with this pack run.
    pub(crate) fn operands(&self) -> Operands {
        match (self.precision.is_bf16(), self.holds_bf16()) {
            (true, _) => Operands::Bf16,
            (false, true) => Operands::Wide,
            (false, false) => Operands::F32,
        }
    }

    /// K as stored.
    pub(crate) fn k_padded(&self) -> usize {
        if self.holds_bf16() { self.k.next_multiple_of(u16::K_STEP) } else { self.k }
    }

    /// K as a product with operands of type `T` sums over it.
    pub(crate) fn k_summed<T: Operand>(&self) -> usize {
        self.k.next_multiple_of(T::K_STEP)
    }

    /// The panels of one expert: `panels()` times `k_padded() * 32` elements.
    pub(crate) fn expert<B: Stored>(&self, expert: usize) -> &[B] {
        let size = self.panels() * self.k_padded() * PANEL;
        &B::of(&self.storage)[expert * size..(expert + 1) * size]
    }
}
