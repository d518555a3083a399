//! The inner products all GEMMs share: a block of rows of A times panels of 32 packed columns of B.
//!
//! A is row-major with any row stride. One call of [`Operand::panel`] computes `rows` x 32 outputs over one range of k; the sums are
//! kept in C between ranges, so cutting K into blocks does not change the order of an output's sum.
//!
//! - f32: one FMA chain per output, k ascending; B in f32, or in bf16 and widened in registers ([`Wide`]).
//! - bf16: the order of `TDPBF16PS`: AMX tiles, or masked `vdpbf16ps`, or FMAs on widened operands.
//! - bf16-native: AMX tiles; or the order of `vdpbf16ps`, by that instruction or by FMAs.
//!
//! The instruction set says which of them runs: [`Isa::Amx`] tiles, [`Isa::Avx512Bf16`] `vdpbf16ps`, the others FMAs; `ways` chooses it.
#![allow(unsafe_code)]

use crate::bf16;
use crate::isa::Isa;
use crate::lanes::{LANES, Lanes, assert_available};
use crate::pack::Storage;
use crate::parallel::{SharedSlice, for_each_job};
use crate::precision::Precision;
use crate::workspace::Workspace;
use bytemuck::Pod;
use std::ops::Range;

pub(crate) mod scalar;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
pub(crate) mod amx_emulator;
#[cfg(target_arch = "x86_64")]
mod avx512bf16;
#[cfg(target_arch = "x86_64")]
mod fma;
#[cfg(target_arch = "x86_64")]
mod tile;
#[cfg(target_arch = "x86_64")]
mod vector;
#[cfg(target_arch = "x86_64")]
mod flush;
mod convert;
mod words;
mod wide;
pub(crate) use convert::{convert_rows, padded_stride, transpose_rows};
pub(crate) use wide::Wide;
pub(crate) use words::{IntoOperand, PanelLines, PanelRows};

/// Columns per panel: two 512-bit vectors of f32, or two AMX tiles.
pub(crate) const PANEL: usize = 32;

/// Longest range of k between two visits of C. Measured: 256 and 512 cost 2 to 6 % where K is 1024 or more; the panel (128 KiB of f32)
/// and a block of 128 rows of A (512 KiB) still share an L2 of 1 MiB.
pub(crate) const K_BLOCK: usize = 1024;

/// How to compute: on which ISA, in which precision.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mode {
    pub(crate) isa: Isa,
    precision: Precision,
}

impl Mode {
    /// Whether the left operand is multiplied as f32, though it is kept in bf16.
    fn widens(self) -> bool {
        self.precision.is_bf16() && matches!(self.isa, Isa::Avx2 | Isa::Avx512)
    }

    /// Room for the left operand of one job, `rows` rows of up to `k` elements, as [`Mode::left`] takes it.
    pub(crate) fn room(self, rows: usize, k: usize) -> Workspace<f32> {
        if self.widens() { Workspace::take(rows * padded_stride::<f32>(k)) } else { Workspace::new() }
    }

    /// The first `k` columns of `rows` as this mode's kernels read them: where they multiply f32s, widened into `room`, once for all
    /// panels of B.
    ///
    /// # Safety
    /// `rows` is readable for its rows of `k` elements. The result lives as long as `rows`, and until `room` is used again.
    pub(crate) unsafe fn left<T: Operand>(self, rows: Rows<T>, k: usize, room: &mut Workspace<f32>) -> Rows<T> {
        if !self.widens() {
            return rows;
        }
        let wide_stride = padded_stride::<f32>(k);
        for (row, line) in room.chunks_mut(wide_stride).take(rows.rows).enumerate() {
            // SAFETY: lent by the caller.
            let source = unsafe { std::slice::from_raw_parts(rows.start.add(row * rows.stride), k) };
            T::widen(self.isa, source, &mut line[..k]);
        }
        Rows { wide: room.as_ptr(), wide_stride, ..rows }
    }

    /// The ISA for everything but matrix products.
    pub(crate) fn lanes(self) -> Isa {
        lanes_of(self.isa)
    }

    /// To be held while panels are computed: where products run on tiles, it configures them for this thread.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn tiles(self) -> Option<amx::Tiles> {
        // SAFETY: a mode with AMX exists only after the check in `mode_for`.
        (self.isa == Isa::Amx).then(|| unsafe { amx::Tiles::configure() })
    }

    /// No tiles on this architecture.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn tiles(self) -> Option<()> {
        None
    }
}

/// The ISA for everything but matrix products: AMX adds nothing there.
pub(crate) fn lanes_of(isa: Isa) -> Isa {
    isa.min(Isa::Avx512Bf16)
}

/// The mode of a precision on an ISA, after a check that this machine has it.
pub(crate) fn mode_for(isa: Isa, precision: Precision) -> Mode {
    if !emulated(isa) {
        assert_available(isa);
    }
    // The tile unit only takes bf16; its order is the exact one.
    let isa = if precision.is_bf16() { isa } else { lanes_of(isa) };
    Mode { isa, precision }
}

#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
fn emulated(isa: Isa) -> bool {
    isa == Isa::Amx && amx_emulator::installed()
}

#[cfg(not(all(test, target_arch = "x86_64", target_os = "linux")))]
fn emulated(_isa: Isa) -> bool {
    false
}

/// The element type of packed panels: f32, or bf16 as u16.
pub(crate) trait Stored: Pod + Send + Sync {
    /// Elements of a column that are neighbours in memory: a panel is read by so many k.
    const SIDE_BY_SIDE: usize;

    /// Where element (k, column) lies in a panel.
    fn panel_index(k: usize, column: usize) -> usize;

    /// All panels of a pack that is made of this type.
    fn of(storage: &Storage) -> &[Self];
}

impl Stored for f32 {
    const SIDE_BY_SIDE: usize = 1;

    #[inline(always)]
    fn panel_index(k: usize, column: usize) -> usize {
        k * PANEL + column
    }

    fn of(storage: &Storage) -> &[f32] {
        match storage {
            Storage::F32(data) => data,
            Storage::Bf16(_) => panic!("a pack held in bf16 is used as one of f32; only forward passes widen it"),
        }
    }
}

impl Stored for u16 {
    const SIDE_BY_SIDE: usize = 2;

    #[inline(always)]
    fn panel_index(k: usize, column: usize) -> usize {
        (k / 2) * 2 * PANEL + 2 * column + k % 2
    }

    fn of(storage: &Storage) -> &[u16] {
        match storage {
            Storage::Bf16(data) => data,
            Storage::F32(_) => panic!("a pack held in f32 is used as one of bf16"),
        }
    }
}

/// The element type of left operands, and with it how they are multiplied: f32, bf16 as u16, or f32 times a B of bf16 ([`Wide`]).
pub(crate) trait Operand: Pod + Send + Sync {
    /// What B is packed in.
    type B: Stored;
    /// A sum over K goes on, with zeros, to a multiple of this.
    const K_STEP: usize;

    fn from_f32(x: f32) -> Self;

    /// Rounds `source` into `out`, element by element.
    fn convert(isa: Isa, source: &[f32], out: &mut [Self]);

    /// All of `source` as operands: itself in f32, rounded into `room` in bf16.
    fn convert_all<'a>(isa: Isa, source: &'a [f32], room: &'a mut Workspace<Self>) -> &'a [Self];

    /// Rounds sixteen lanes into the first sixteen (or all, if fewer) elements of `out`.
    fn store_lanes<L: Lanes>(lanes: L, out: &mut [Self]);

    /// The first sixteen (or all, if fewer; the rest 0) elements of `source`.
    fn load_lanes<L: Lanes>(source: &[Self]) -> L;

    /// As f32, element by element.
    fn widen(isa: Isa, source: &[Self], out: &mut [f32]);

    /// C`[rows, 32]` (= or +=) A`[rows, k]` B`[k, 32]`.
    ///
    /// # Safety
    /// `a` is readable for its rows of `k` elements, `b` for `k * 32` elements (k rounded up to what lies side by side), `c` is readable
    /// and writable for as many rows of 32 at a stride of `ldc`; `k` is a multiple of `K_STEP`; the machine has `mode.isa`; `a` went
    /// through [`Mode::left`]. With AMX, `a` is readable up to the next multiple of 16 rows, and [`Mode::tiles`] is held.
    unsafe fn panel(mode: Mode, panel: Panel<Self>);
}

/// What one call of [`Operand::panel`] works on.
#[derive(Clone, Copy)]
pub(crate) struct Panel<T: Operand> {
    /// Rows of A, from the first k on.
    pub(crate) a: Rows<T>,
    /// The panel of B, from the first k on.
    pub(crate) b: *const T::B,
    pub(crate) k: usize,
    /// Row r of the 32 outputs starts at `c + r * ldc`.
    pub(crate) c: *mut f32,
    pub(crate) ldc: usize,
    /// Whether the sums start from what is in C.
    pub(crate) accumulate: bool,
    /// Where B goes on after this call; it is only prefetched, so it may point anywhere.
    pub(crate) next: *const T::B,
}

impl Operand for f32 {
    type B = f32;
    const K_STEP: usize = 1;

    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }

    fn convert(_isa: Isa, source: &[f32], out: &mut [f32]) {
        out.copy_from_slice(source);
    }

    fn convert_all<'a>(_isa: Isa, source: &'a [f32], _room: &'a mut Workspace<f32>) -> &'a [f32] {
        source
    }

    #[inline(always)]
    fn store_lanes<L: Lanes>(lanes: L, out: &mut [f32]) {
        if out.len() >= LANES { lanes.store(out) } else { lanes.store_first(out) }
    }

    #[inline(always)]
    fn load_lanes<L: Lanes>(source: &[f32]) -> L {
        if source.len() >= LANES { L::load(source) } else { L::load_first(source, 0.0) }
    }

    fn widen(_isa: Isa, source: &[f32], out: &mut [f32]) {
        out.copy_from_slice(source);
    }

    unsafe fn panel(mode: Mode, panel: Panel<f32>) {
        // SAFETY: the caller's promises are those of the callees; `mode_for` checked that the machine has the ISA.
        unsafe {
            match mode.isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => fma::avx512_f32(panel),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => fma::avx2_f32(panel),
                _ => scalar::panel_f32(panel),
            }
        }
    }
}

impl Operand for u16 {
    type B = u16;
    const K_STEP: usize = 32;

    #[inline(always)]
    fn from_f32(x: f32) -> u16 {
        bf16::from_f32(x)
    }

    fn convert(isa: Isa, source: &[f32], out: &mut [u16]) {
        convert::to_bf16(isa, source, out);
    }

    fn convert_all<'a>(isa: Isa, source: &'a [f32], room: &'a mut Workspace<u16>) -> &'a [u16] {
        /// Elements per job.
        const CHUNK: usize = 32 << 10;
        *room = Workspace::take(source.len());
        let out = SharedSlice::new(room);
        for_each_job(source.len().div_ceil(CHUNK), |job| {
            let part = job * CHUNK..((job + 1) * CHUNK).min(source.len());
            // SAFETY: the part of this job alone.
            let out = unsafe { out.slice(part.start, part.len()) };
            convert::to_bf16(isa, &source[part], out);
        });
        room
    }

    #[inline(always)]
    fn store_lanes<L: Lanes>(lanes: L, out: &mut [u16]) {
        match out.first_chunk_mut::<LANES>() {
            Some(whole) => lanes.store_bf16(whole),
            None => {
                let mut narrow = [0u16; LANES];
                lanes.store_bf16(&mut narrow);
                out.copy_from_slice(&narrow[..out.len()]);
            }
        }
    }

    #[inline(always)]
    fn load_lanes<L: Lanes>(source: &[u16]) -> L {
        match source.first_chunk::<LANES>() {
            Some(whole) => L::load_bf16(whole),
            None => {
                let mut padded = [0u16; LANES];
                padded[..source.len()].copy_from_slice(source);
                L::load_bf16(&padded)
            }
        }
    }

    fn widen(isa: Isa, source: &[u16], out: &mut [f32]) {
        convert::to_f32(isa, source, out);
    }

    unsafe fn panel(mode: Mode, panel: Panel<u16>) {
        let native = mode.precision == Precision::Bf16Native;
        // SAFETY: the caller's promises are those of the callees; `mode_for` checked that the machine has the ISA.
        unsafe {
            match (mode.isa, native) {
                #[cfg(target_arch = "x86_64")]
                (Isa::Amx, _) => amx::panel_bf16(panel),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512Bf16, true) => avx512bf16::panel_native(panel),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512Bf16, false) => flush::with_denormals_flushed(|| avx512bf16::panel_exact(panel)),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512, true) => flush::with_denormals_flushed(|| fma::avx512_pairs(panel)),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512, false) => flush::with_denormals_flushed(|| fma::avx512_steps(panel)),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx2, true) => flush::with_denormals_flushed(|| fma::avx2_pairs(panel)),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx2, false) => flush::with_denormals_flushed(|| fma::avx2_steps(panel)),
                (_, true) => scalar::panel_pairs(panel),
                (_, false) => scalar::panel_steps(panel),
            }
        }
    }
}

/// A block of rows of the left operand: row r starts at `start + r * stride`.
#[derive(Clone, Copy)]
pub(crate) struct Rows<T> {
    start: *const T,
    stride: usize,
    rows: usize,
    /// The same rows in f32, where [`Mode::left`] had to widen them: row r starts at `wide + r * wide_stride`.
    wide: *const f32,
    wide_stride: usize,
}

impl<T> Rows<T> {
    pub(crate) fn new(start: *const T, stride: usize, rows: usize) -> Rows<T> {
        Rows { start, stride, rows, wide: std::ptr::null(), wide_stride: 0 }
    }

    /// The same rows without their first `column` columns.
    pub(crate) fn at_column(self, column: usize) -> Rows<T> {
        Rows { start: self.start.wrapping_add(column), wide: self.wide.wrapping_add(column), ..self }
    }

    /// `rows` of them from row `first` on.
    fn part(self, first: usize, rows: usize) -> Rows<T> {
        let start = self.start.wrapping_add(first * self.stride);
        Rows { start, wide: self.wide.wrapping_add(first * self.wide_stride), rows, ..self }
    }
}

/// Where panel `panel` of a matrix with panels of `k_padded` rows goes through `ks`.
fn panel_part<B: Stored>(b: &[B], k_padded: usize, panel: usize, ks: Range<usize>) -> *const B {
    let rows = ks.len().next_multiple_of(B::SIDE_BY_SIDE);
    b[(panel * k_padded + ks.start) * PANEL..][..rows * PANEL].as_ptr()
}

/// C`[rows, 32]` = A`[rows, k]` times one panel of B, whose panels have `k_padded` rows; C packed without gaps.
///
/// # Safety
/// `a` is readable for its rows of `k` elements (with AMX: up to the next multiple of 16 rows); `c` is writable for `a.rows * 32`
/// elements.
pub(crate) unsafe fn whole_panel<T: Operand>(
    mode: Mode,
    a: Rows<T>,
    b: &[T::B],
    k: usize,
    k_padded: usize,
    panel: usize,
    c: *mut f32,
) {
    if k == 0 {
        // SAFETY: lent by the caller.
        unsafe { std::slice::from_raw_parts_mut(c, a.rows * PANEL) }.fill(0.0);
    }
    for start in (0..k).step_by(K_BLOCK) {
        let k = K_BLOCK.min(k - start);
        let b = panel_part(b, k_padded, panel, start..start + k);
        let next = b.wrapping_add(k * PANEL);
        // SAFETY: lent by the caller; B's range was bounds-checked.
        unsafe {
            T::panel(mode, Panel { a: a.at_column(start), b, k, c, ldc: PANEL, accumulate: start > 0, next });
        }
    }
}

/// What one call of [`block`] works on: a block of rows, a range of k, a range of panels.
pub(crate) struct Block<'a, T: Operand> {
    /// Rows of A, from the first k of `ks` on.
    pub(crate) a: Rows<T>,
    /// All panels of one matrix, `k_padded * 32` elements each.
    pub(crate) b: &'a [T::B],
    pub(crate) k_padded: usize,
    pub(crate) ks: Range<usize>,
    pub(crate) panels: Range<usize>,
    /// The first row of C, at column `32 * panels.start`.
    pub(crate) c: *mut f32,
    /// Columns of C, and the distance of its rows; the last panel is cut there.
    pub(crate) n: usize,
    /// Whether the sums start from what is in C.
    pub(crate) accumulate: bool,
}

/// C`[rows, 32 * panels]` (= or +=) A`[rows, ks]` B`[ks, panels]`.
///
/// # Safety
/// `a` is readable for its rows of `ks.len()` elements (with AMX: up to the next multiple of 16 rows); `c` is readable and writable for as
/// many rows, each from panel `panels.start`'s first column to column `min(32 * panels.end, n)`.
pub(crate) unsafe fn block<T: Operand>(mode: Mode, block: Block<T>) {
    let Block { a, b, k_padded, ks, panels, c, n, accumulate } = block;
    for (at, panel) in panels.enumerate() {
        let width = PANEL.min(n - panel * PANEL);
        let b_panel = panel_part(b, k_padded, panel, ks.clone());
        // SAFETY: panel `at` starts inside the columns the caller lent.
        let c_panel = unsafe { c.add(at * PANEL) };
        let next = b_panel.wrapping_add(k_padded * PANEL);
        let panel = Panel { a, b: b_panel, k: ks.len(), c: c_panel, ldc: n, accumulate, next };
        if width == PANEL {
            // SAFETY: lent by the caller; B's range was bounds-checked above.
            unsafe { T::panel(mode, panel) };
        } else {
            // SAFETY: `staged` has a full panel per row; rows and widths stay inside what the caller lent.
            unsafe { narrow_panel(mode, panel, width) };
        }
    }
}

/// The last panel of a matrix whose N is no multiple of 32: through a staging buffer, so that the kernels always see 32 columns.
///
/// # Safety
/// As [`block`], for one panel of `width` columns.
unsafe fn narrow_panel<T: Operand>(mode: Mode, panel: Panel<T>, width: usize) {
    /// A multiple of AMX's 16 rows; 16 KiB of stack.
    const STAGED_ROWS: usize = 112;
    let Panel { a, c, ldc, accumulate, .. } = panel;
    let mut staged = [0f32; STAGED_ROWS * PANEL];
    for first in (0..a.rows).step_by(STAGED_ROWS) {
        let rows = STAGED_ROWS.min(a.rows - first);
        // SAFETY: rows first..first+rows and `width` columns are inside what the caller lent.
        unsafe {
            if accumulate {
                for row in 0..rows {
                    let (c, staged) = (c.add((first + row) * ldc), staged.as_mut_ptr().add(row * PANEL));
                    std::ptr::copy_nonoverlapping(c, staged, width);
                }
            }
            T::panel(
                mode,
                Panel { a: a.part(first, rows), c: staged.as_mut_ptr(), ldc: PANEL, next: panel.b, ..panel },
            );
            for row in 0..rows {
                std::ptr::copy_nonoverlapping(staged.as_ptr().add(row * PANEL), c.add((first + row) * ldc), width);
            }
        }
    }
}

/// Keeps the tile unit busy from registers.
///
/// # Safety
/// The machine has AMX and this process the permission to use it.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn amx_rounds(rounds: usize) {
    // SAFETY: as the caller vouches.
    unsafe { amx::rounds(rounds) }
}
