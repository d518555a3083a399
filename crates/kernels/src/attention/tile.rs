//! The one inner loop of attention: a register tile of FMA chains.

use crate::lanes::Lanes;

/// `acc[r][c] += a[r] b[c]` over `depth` steps: R values of a broadcast, C registers of b loaded, per step.
///
/// At step k, row r of a is at `a + r a_row + k a_step` and register c of b at `b + k b_step + c b_col`. Every element of `acc` is one
/// chain of FMAs in the order of k, whatever R and C.
///
/// # Safety
/// Those addresses are valid to read (one f32 of a, 16 of b) for all r < R, c < C, k < depth.
#[inline(always)]
pub(super) unsafe fn fma_tile<L: Lanes, const R: usize, const C: usize>(
    acc: &mut [[L; C]; R],
    a: *const f32,
    a_row: usize,
    a_step: usize,
    b: *const f32,
    b_step: usize,
    b_col: usize,
    depth: usize,
) {
    for k in 0..depth {
        let mut columns = [L::splat(0.0); C];
        for c in 0..C {
            // SAFETY: in bounds by this function's contract.
            columns[c] = unsafe { L::load_ptr(b.add(k * b_step + c * b_col)) };
        }
        for r in 0..R {
            // SAFETY: in bounds by this function's contract.
            let row = L::splat(unsafe { *a.add(r * a_row + k * a_step) });
            for c in 0..C {
                acc[r][c] = row.mul_add(columns[c], acc[r][c]);
            }
        }
    }
}

/// Reads an R x C tile of registers, rows `stride` apart.
///
/// # Safety
/// `source + r stride` is valid to read 16 C values for all r < R.
#[inline(always)]
pub(super) unsafe fn load_tile<L: Lanes, const R: usize, const C: usize>(
    source: *const f32,
    stride: usize,
) -> [[L; C]; R] {
    let mut tile = [[L::splat(0.0); C]; R];
    for r in 0..R {
        for c in 0..C {
            // SAFETY: in bounds by this function's contract.
            tile[r][c] = unsafe { L::load_ptr(source.add(r * stride + c * crate::lanes::LANES)) };
        }
    }
    tile
}

/// Writes an R x C tile of registers, rows `stride` apart.
///
/// # Safety
/// `target + r stride` is valid to write 16 C values for all r < R.
#[inline(always)]
pub(super) unsafe fn store_tile<L: Lanes, const R: usize, const C: usize>(
    tile: &[[L; C]; R],
    target: *mut f32,
    stride: usize,
) {
    for r in 0..R {
        for c in 0..C {
            // SAFETY: in bounds by this function's contract.
            unsafe { tile[r][c].store_ptr(target.add(r * stride + c * crate::lanes::LANES)) };
        }
    }
}
