//! The bf16 panel kernel on AMX tiles, through inline assembly (the intrinsics are not stable).
//!
//! A tile of A is 16 rows x 32 k, read in place with the row stride; a tile of B is 16 pairs of k x 16 columns, half of a panel's
//! width, read with the panel's stride of 128 bytes. Two tiles of A times two of B on four accumulators: 4 tile loads per 4 products,
//! 8 cycles against 16 each. B streams from L2, A and C stay put.
#![allow(unsafe_code)]

use super::{PANEL, Panel, Rows};
use std::arch::asm;

/// Rows of a tile.
const TILE_ROWS: usize = 16;
/// k per tile product.
const TILE_K: usize = 32;
/// Bytes of a panel row: 32 pairs of bf16.
const B_STRIDE: usize = 4 * PANEL;

/// The 64-byte operand of `ldtilecfg`, palette 1.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// All eight tiles full: 16 rows of 64 bytes.
static FULL_TILES: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Tiles configured on this thread; released on drop, so that the thread's state is small again when it sleeps.
pub(crate) struct Tiles(());

impl Tiles {
    /// # Safety
    /// The machine has AMX and this process the permission to use it.
    pub(crate) unsafe fn configure() -> Tiles {
        // SAFETY: the operand is 64 valid bytes; the caller vouches for the instruction.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &FULL_TILES, options(nostack, readonly)) };
        Tiles(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: tiles were configured on this thread, so the instruction exists.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// # Safety
/// As [`super::Operand::panel`], on a machine with AMX and with [`Tiles`] configured on this thread; A is readable up to the next
/// multiple of 16 rows.
pub(super) unsafe fn panel_bf16(panel: Panel<u16>) {
    let Panel { a: Rows { start: a, stride: lda, rows, .. }, b, k, c, ldc, accumulate, .. } = panel;
    let steps = k / TILE_K;
    let mut first = 0;
    while first < rows {
        // SAFETY: rows first.. lie inside what the caller lent.
        let (a, c) = unsafe { (a.add(first * lda), c.add(first * ldc)) };
        let left = rows - first;
        // SAFETY: the blocks below stay inside the caller's rows of C; of A they read whole tiles, as promised. A block with a ragged
        // end goes through a buffer of whole tiles.
        unsafe {
            if left >= 2 * TILE_ROWS {
                block_32(a, lda, b, steps, c, ldc, accumulate);
                first += 2 * TILE_ROWS;
            } else if left == TILE_ROWS {
                block_16(a, lda, b, steps, c, ldc, accumulate);
                first += TILE_ROWS;
            } else {
                ragged(a, lda, left, b, steps, c, ldc, accumulate);
                first += left;
            }
        }
    }
}

/// Fewer than 32 rows, no whole number of tiles.
///
/// # Safety
/// As [`panel_bf16`].
unsafe fn ragged(
    a: *const u16,
    lda: usize,
    rows: usize,
    b: *const u16,
    steps: usize,
    c: *mut f32,
    ldc: usize,
    accumulate: bool,
) {
    #[repr(align(64))]
    struct Staged([f32; 2 * TILE_ROWS * PANEL]);
    let mut staged = Staged([0.0; 2 * TILE_ROWS * PANEL]);
    let staging = staged.0.as_mut_ptr();
    // SAFETY: `rows` rows of C are the caller's, the staging buffer holds 32.
    unsafe {
        if accumulate {
            for row in 0..rows {
                std::ptr::copy_nonoverlapping(c.add(row * ldc), staging.add(row * PANEL), PANEL);
            }
        }
        if rows > TILE_ROWS {
            block_32(a, lda, b, steps, staging, PANEL, accumulate);
        } else {
            block_16(a, lda, b, steps, staging, PANEL, accumulate);
        }
        for row in 0..rows {
            std::ptr::copy_nonoverlapping(staging.add(row * PANEL), c.add(row * ldc), PANEL);
        }
    }
}

/// C`[32, 32]` (= or +=) A`[32, 32 steps]` B.
///
/// # Safety
/// As [`panel_bf16`], all 32 rows of A and C the caller's.
unsafe fn block_32(a: *const u16, lda: usize, b: *const u16, steps: usize, c: *mut f32, ldc: usize, accumulate: bool) {
    let (lda, ldc) = (2 * lda, 4 * ldc);
    // SAFETY: tiles are configured; every tile read or written lies inside the caller's rows. Tile registers hold nothing of the
    // compiler's.
    unsafe {
        let (a1, c1) = (a.byte_add(TILE_ROWS * lda), c.byte_add(TILE_ROWS * ldc));
        if accumulate {
            asm!(
                "tileloadd tmm0, [{c0} + {ldc}*1]", "tileloadd tmm1, [{c0} + {ldc}*1 + 64]",
                "tileloadd tmm2, [{c1} + {ldc}*1]", "tileloadd tmm3, [{c1} + {ldc}*1 + 64]",
                c0 = in(reg) c, c1 = in(reg) c1, ldc = in(reg) ldc, options(nostack, readonly),
            );
        } else {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
        }
        if steps > 0 {
            asm!(
                "2:",
                "tileloadd tmm4, [{a0} + {lda}*1]",
                "tileloadd tmm6, [{b} + {ldb}*1]",
                "tileloadd tmm5, [{a1} + {lda}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {ldb}*1 + 64]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a0}, 64",
                "add {a1}, 64",
                "add {b}, 2048",
                "dec {steps}",
                "jnz 2b",
                a0 = inout(reg) a => _, a1 = inout(reg) a1 => _, b = inout(reg) b => _, steps = inout(reg) steps => _,
                lda = in(reg) lda, ldb = in(reg) B_STRIDE, options(nostack, readonly),
            );
        }
        asm!(
            "tilestored [{c0} + {ldc}*1], tmm0", "tilestored [{c0} + {ldc}*1 + 64], tmm1",
            "tilestored [{c1} + {ldc}*1], tmm2", "tilestored [{c1} + {ldc}*1 + 64], tmm3",
            c0 = in(reg) c, c1 = in(reg) c1, ldc = in(reg) ldc, options(nostack),
        );
    }
}

/// C`[16, 32]` (= or +=) A`[16, 32 steps]` B.
///
/// # Safety
/// As [`panel_bf16`], all 16 rows of A and C the caller's.
unsafe fn block_16(a: *const u16, lda: usize, b: *const u16, steps: usize, c: *mut f32, ldc: usize, accumulate: bool) {
    let (lda, ldc) = (2 * lda, 4 * ldc);
    // SAFETY: as in `block_32`.
    unsafe {
        if accumulate {
            asm!(
                "tileloadd tmm0, [{c} + {ldc}*1]", "tileloadd tmm1, [{c} + {ldc}*1 + 64]",
                c = in(reg) c, ldc = in(reg) ldc, options(nostack, readonly),
            );
        } else {
            asm!("tilezero tmm0", "tilezero tmm1", options(nostack, nomem));
        }
        if steps > 0 {
            asm!(
                "2:",
                "tileloadd tmm4, [{a} + {lda}*1]",
                "tileloadd tmm6, [{b} + {ldb}*1]",
                "tileloadd tmm7, [{b} + {ldb}*1 + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a}, 64",
                "add {b}, 2048",
                "dec {steps}",
                "jnz 2b",
                a = inout(reg) a => _, b = inout(reg) b => _, steps = inout(reg) steps => _,
                lda = in(reg) lda, ldb = in(reg) B_STRIDE, options(nostack, readonly),
            );
        }
        asm!(
            "tilestored [{c} + {ldc}*1], tmm0", "tilestored [{c} + {ldc}*1 + 64], tmm1",
            c = in(reg) c, ldc = in(reg) ldc, options(nostack),
        );
    }
}

/// `rounds` times four independent tile products from registers, for the roofline.
///
/// # Safety
/// The machine has AMX and this process the permission to use it.
pub(crate) unsafe fn rounds(rounds: usize) {
    // SAFETY: as the caller vouches.
    let _tiles = unsafe { Tiles::configure() };
    // SAFETY: touches tile registers only; `rounds + 1` is not zero.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
            "2:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "dec {rounds}",
            "jnz 2b",
            rounds = inout(reg) rounds + 1 => _, options(nostack, nomem),
        );
    }
}
