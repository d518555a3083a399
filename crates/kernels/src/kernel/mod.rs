//! The inner products all GEMMs share: a block of rows of A times panels of 32 packed columns of B.
//!
//! A is row-major with any row stride. One call of [`Operand::panel`] computes `rows` x 32 outputs over one range of k; the sums are
//! kept in C between ranges, so cutting K into blocks does not change the order of an output's sum.
//!
//! - f32: one FMA chain per output, k ascending. 14 x 32 register tiles on AVX-512, 3 x 32 on AVX2.
//! - bf16: the order of `TDPBF16PS`. AMX tiles where there are any, masked `vdpbf16ps` on AVX-512-BF16, FMAs elsewhere.
//! - bf16-native: AMX tiles, or plain `vdpbf16ps`; otherwise as bf16.
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
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod flush;
mod convert;
mod words;
pub(crate) use convert::{convert_rows, padded_stride, transpose_rows};
pub(crate) use words::{FromLines, IntoOperand, PanelLines, PanelRows};

/// Columns per panel: two 512-bit vectors of f32, or two AMX tiles.
pub(crate) const PANEL: usize = 32;

/// Longest range of k between two visits of C. Measured: 256 and 512 cost 2 to 6 % where K is 1024 or more; the panel (128 KiB of f32)
/// and a block of 128 rows of A (512 KiB) still share an L2 of 1 MiB.
pub(crate) const K_BLOCK: usize = 1024;

/// How to compute: on which ISA, and whether bf16 sums must follow the AMX order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mode {
    pub(crate) isa: Isa,
    pub(crate) exact: bool,
}

impl Mode {
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
    Mode { isa, exact: precision != Precision::Bf16Native }
}

#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
fn emulated(isa: Isa) -> bool {
    isa == Isa::Amx && amx_emulator::installed()
}

#[cfg(not(all(test, target_arch = "x86_64", target_os = "linux")))]
fn emulated(_isa: Isa) -> bool {
    false
}

/// The element type of packed operands: f32, or bf16 as u16.
pub(crate) trait Operand: Pod + Send + Sync {
    /// K is padded with zeros to a multiple of this.
    const K_STEP: usize;

    fn from_f32(x: f32) -> Self;

    /// Where element (k, column) lies in a panel.
    fn panel_index(k: usize, column: usize) -> usize;

    fn stored(storage: &Storage) -> &[Self];

    /// Rounds `source` into `out`, element by element.
    fn convert(isa: Isa, source: &[f32], out: &mut [Self]);

    /// All of `source` as operands: itself in f32, rounded into `room` in bf16.
    fn convert_all<'a>(isa: Isa, source: &'a [f32], room: &'a mut Workspace<Self>) -> &'a [Self];

    /// Rounds sixteen lanes into the first sixteen (or all, if fewer) elements of `out`.
    fn store_lanes<L: Lanes>(lanes: L, out: &mut [Self]);

    /// The first sixteen (or all, if fewer; the rest 0) elements of `source`.
    fn load_lanes<L: Lanes>(source: &[Self]) -> L;

    /// C`[rows, 32]` (= or +=) A`[rows, k]` B`[k, 32]`.
    ///
    /// # Safety
    /// `a` is readable for `rows` rows of `k` elements at a stride of `lda`, `b` for `k * 32` elements, `c` is readable and writable
    /// for `rows` rows of 32 at a stride of `ldc`; `k` is a multiple of `K_STEP`; the machine has `mode.isa`. With AMX, `a` is
    /// readable up to the next multiple of 16 rows, and [`Mode::tiles`] is held. `next` is where B goes on after this call; it is only
    /// prefetched, so it may point anywhere.
    unsafe fn panel(
        mode: Mode,
        a: *const Self,
        lda: usize,
        rows: usize,
        b: *const Self,
        k: usize,
        c: *mut f32,
        ldc: usize,
        accumulate: bool,
        next: *const Self,
    );
}

impl Operand for f32 {
    const K_STEP: usize = 1;

    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }

    #[inline(always)]
    fn panel_index(k: usize, column: usize) -> usize {
        k * PANEL + column
    }

    fn stored(storage: &Storage) -> &[f32] {
        match storage {
            Storage::F32(data) => data,
            Storage::Bf16(_) => panic!("operand packed for bf16 used in f32"),
        }
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

    unsafe fn panel(
        mode: Mode,
        a: *const f32,
        lda: usize,
        rows: usize,
        b: *const f32,
        k: usize,
        c: *mut f32,
        ldc: usize,
        accumulate: bool,
        next: *const f32,
    ) {
        // SAFETY: the caller's promises are those of the callees; `mode_for` checked that the machine has the ISA.
        unsafe {
            match mode.isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => {
                    avx512::panel_f32(a, lda, rows, b, k, c, ldc, accumulate, next)
                }
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => avx2::panel_f32(a, lda, rows, b, k, c, ldc, accumulate),
                _ => scalar::panel_f32(a, lda, rows, b, k, c, ldc, accumulate),
            }
        }
    }
}

impl Operand for u16 {
    const K_STEP: usize = 32;

    #[inline(always)]
    fn from_f32(x: f32) -> u16 {
        bf16::from_f32(x)
    }

    #[inline(always)]
    fn panel_index(k: usize, column: usize) -> usize {
        (k / 2) * 2 * PANEL + 2 * column + k % 2
    }

    fn stored(storage: &Storage) -> &[u16] {
        match storage {
            Storage::Bf16(data) => data,
            Storage::F32(_) => panic!("operand packed for f32 used in bf16"),
        }
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
        let mut wide = [0f32; LANES];
        lanes.store(&mut wide);
        let mut narrow = [0u16; LANES];
        for lane in 0..LANES {
            narrow[lane] = bf16::from_f32(wide[lane]);
        }
        let len = out.len().min(LANES);
        out[..len].copy_from_slice(&narrow[..len]);
    }

    #[inline(always)]
    fn load_lanes<L: Lanes>(source: &[u16]) -> L {
        let mut wide = [0f32; LANES];
        for lane in 0..source.len().min(LANES) {
            wide[lane] = bf16::to_f32(source[lane]);
        }
        L::load(&wide)
    }

    unsafe fn panel(
        mode: Mode,
        a: *const u16,
        lda: usize,
        rows: usize,
        b: *const u16,
        k: usize,
        c: *mut f32,
        ldc: usize,
        accumulate: bool,
        next: *const u16,
    ) {
        // SAFETY: the caller's promises are those of the callees; `mode_for` checked that the machine has the ISA.
        unsafe {
            match (mode.isa, mode.exact) {
                #[cfg(target_arch = "x86_64")]
                (Isa::Amx, _) => amx::panel_bf16(a, lda, rows, b, k, c, ldc, accumulate),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512Bf16, false) => avx512::panel_bf16_native(a, lda, rows, b, k, c, ldc, accumulate, next),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512Bf16, true) => flush::with_denormals_flushed(|| {
                    avx512::panel_bf16_exact(a, lda, rows, b, k, c, ldc, accumulate, next)
                }),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx512, _) => flush::with_denormals_flushed(|| {
                    avx512::panel_bf16_fma(a, lda, rows, b, k, c, ldc, accumulate, next)
                }),
                #[cfg(target_arch = "x86_64")]
                (Isa::Avx2, _) => {
                    flush::with_denormals_flushed(|| avx2::panel_bf16(a, lda, rows, b, k, c, ldc, accumulate))
                }
                _ => scalar::panel_bf16(a, lda, rows, b, k, c, ldc, accumulate),
            }
        }
    }
}

/// A block of rows of the left operand: row r starts at `start + r * stride`.
#[derive(Clone, Copy)]
pub(crate) struct Rows<T> {
    pub(crate) start: *const T,
    pub(crate) stride: usize,
    pub(crate) rows: usize,
}

impl<T> Rows<T> {
    /// The same rows without their first `column` columns.
    pub(crate) fn at_column(self, column: usize) -> Rows<T> {
        Rows { start: self.start.wrapping_add(column), ..self }
    }
}

/// C`[rows, 32]` = A`[rows, K]` times one panel of B, C packed without gaps.
///
/// # Safety
/// `a` is readable for its rows of `k_padded` elements (with AMX: up to the next multiple of 16 rows); `c` is writable for
/// `a.rows * 32` elements.
pub(crate) unsafe fn whole_panel<T: Operand>(
    mode: Mode,
    a: Rows<T>,
    b: &[T],
    k_padded: usize,
    panel: usize,
    c: *mut f32,
) {
    if k_padded == 0 {
        // SAFETY: lent by the caller.
        unsafe { std::slice::from_raw_parts_mut(c, a.rows * PANEL) }.fill(0.0);
    }
    for start in (0..k_padded).step_by(K_BLOCK) {
        let k = K_BLOCK.min(k_padded - start);
        let b = b[(panel * k_padded + start) * PANEL..][..k * PANEL].as_ptr();
        let next = b.wrapping_add(k * PANEL);
        // SAFETY: lent by the caller; B's range was bounds-checked.
        unsafe { T::panel(mode, a.at_column(start).start, a.stride, a.rows, b, k, c, PANEL, start > 0, next) };
    }
}

/// C`[rows, 32 * panels]` (= or +=) A`[rows, ks]` B`[ks, panels]`, the last panel cut at `n` columns.
///
/// `b` holds the panels of one matrix, `k_padded * 32` elements each; `a` covers only the k of `ks`.
///
/// # Safety
/// `a.start` is readable for `a.rows` rows of `ks.len()` elements (with AMX: up to the next multiple of 16 rows); `c` is readable and
/// writable for `a.rows` rows at a stride of `ldc`, each from panel `panels.start`'s first column to column `min(32 * panels.end, n)`,
/// where `c` points at column `32 * panels.start`.
pub(crate) unsafe fn block<T: Operand>(
    mode: Mode,
    a: Rows<T>,
    b: &[T],
    k_padded: usize,
    ks: Range<usize>,
    panels: Range<usize>,
    n: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
) {
    for (at, panel) in panels.enumerate() {
        let first = panel * PANEL;
        let width = PANEL.min(n - first);
        let b_panel = b[panel * k_padded * PANEL + ks.start * PANEL..][..ks.len() * PANEL].as_ptr();
        // SAFETY: panel `at` starts inside the columns the caller lent.
        let c_panel = unsafe { c.add(at * PANEL) };
        let next = b_panel.wrapping_add(k_padded * PANEL);
        if width == PANEL {
            // SAFETY: lent by the caller; B's range was bounds-checked above.
            unsafe { T::panel(mode, a.start, a.stride, a.rows, b_panel, ks.len(), c_panel, ldc, accumulate, next) };
            continue;
        }
        // SAFETY: `staged` has a full panel per row; rows and widths stay inside what the caller lent.
        unsafe { narrow_panel(mode, a, b_panel, ks.len(), width, c_panel, ldc, accumulate) };
    }
}

/// The last panel of a matrix whose N is no multiple of 32: through a staging buffer, so that the kernels always see 32 columns.
///
/// # Safety
/// As [`block`], for one panel of `width` columns.
unsafe fn narrow_panel<T: Operand>(
    mode: Mode,
    a: Rows<T>,
    b: *const T,
    k: usize,
    width: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
) {
    /// A multiple of AMX's 16 rows; 16 KiB of stack.
    const STAGED_ROWS: usize = 112;
    let mut staged = [0f32; STAGED_ROWS * PANEL];
    for first in (0..a.rows).step_by(STAGED_ROWS) {
        let rows = STAGED_ROWS.min(a.rows - first);
        // SAFETY: rows first..first+rows and `width` columns are inside what the caller lent.
        unsafe {
            if accumulate {
                for row in 0..rows {
                    std::ptr::copy_nonoverlapping(
                        c.add((first + row) * ldc),
                        staged.as_mut_ptr().add(row * PANEL),
                        width,
                    );
                }
            }
            let a_start = a.start.add(first * a.stride);
            T::panel(mode, a_start, a.stride, rows, b, k, staged.as_mut_ptr(), PANEL, accumulate, b);
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
