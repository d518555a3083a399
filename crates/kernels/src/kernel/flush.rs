//! Denormals flushed for the length of a call, as the AMX tile unit always does.
#![allow(unsafe_code)]

use std::arch::asm;

/// MXCSR bits: flush results to zero, read denormal operands as zero.
const FLUSH: u32 = 1 << 15 | 1 << 6;

/// Runs `work`, which must compute through pointers only, with denormal operands and results treated as zero, and restores MXCSR.
///
/// Rust assumes the default MXCSR around code it compiles. What keeps this honest: `work` is a panel kernel, an opaque call whose inputs
/// are loaded after, and whose results are stored before, the memory barriers that the two `asm!` blocks are.
#[inline]
pub(super) fn with_denormals_flushed(work: impl FnOnce()) {
    let mut before = 0u32;
    // SAFETY: stores MXCSR to a local.
    unsafe { asm!("stmxcsr [{}]", in(reg) &mut before, options(nostack)) };
    let flushed = before | FLUSH;
    // SAFETY: only sets FTZ and DAZ, which no instruction faults on; restored below.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &flushed, options(nostack)) };
    work();
    // SAFETY: restores what was there.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &before, options(nostack)) };
}
