//! The FMA kernels of `tile`, compiled for each instruction set.
#![allow(unsafe_code)]

use super::tile::{Chain, Pairs, Steps, WideChain, panel};
use super::{Panel, Rows, Wide};
use std::arch::x86_64::{__m256, __m512};

/// # Safety
/// As [`super::Operand::panel`], on a machine with AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2_f32(call: Panel<f32>) {
    let (a, lda) = (call.a.start, call.a.stride);
    // SAFETY: as the caller promises; the features are those of the vector.
    unsafe { panel::<__m256, Chain, _>(call, a, lda) };
}

/// # Safety
/// As [`super::Operand::panel`], on a machine with AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2_wide(call: Panel<Wide>) {
    let (a, lda) = (call.a.start.cast::<f32>(), call.a.stride);
    // SAFETY: as the caller promises; the features are those of the vector.
    unsafe { panel::<__m256, WideChain, _>(call, a, lda) };
}

/// # Safety
/// As [`super::Operand::panel`], on a machine with AVX2 and FMA, called with denormals flushed in MXCSR.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2_pairs(call: Panel<u16>) {
    let (a, lda) = widened(call.a);
    // SAFETY: as the caller promises; the features are those of the vector.
    unsafe { panel::<__m256, Pairs, _>(call, a, lda) };
}

/// # Safety
/// As [`super::Operand::panel`], on a machine with AVX2 and FMA, called with denormals flushed in MXCSR.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2_steps(call: Panel<u16>) {
    let (a, lda) = widened(call.a);
    // SAFETY: as the caller promises; the features are those of the vector.
    unsafe { panel::<__m256, Steps, _>(call, a, lda) };
}

/// # Safety
/// As [`super::Operand::panel`], on a machine with AVX-512.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn avx512_f32(call: Panel<f32>) {
    let (a, lda) = (call.a.start, call.a.stride);
    // SAFETY: as the caller promises; the features are those of the vector.
    unsafe { panel::<__m512, Chain, _>(call, a, lda) };
}

/// # Safety
/// As [`super::Operand::panel`], on a machine with AVX-512.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn avx512_wide(call: Panel<Wide>) {
    let (a, lda) = (call.a.start.cast::<f32>(), call.a.stride);
    // SAFETY: as the caller promises; the features are those of the vector.
    unsafe { panel::<__m512, WideChain, _>(call, a, lda) };
}

/// # Safety
/// As [`super::Operand::panel`], on a machine with AVX-512, called with denormals flushed in MXCSR.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn avx512_pairs(call: Panel<u16>) {
    let (a, lda) = widened(call.a);
    // SAFETY: as the caller promises; the features are those of the vector.
    unsafe { panel::<__m512, Pairs, _>(call, a, lda) };
}

/// # Safety
/// As [`super::Operand::panel`], on a machine with AVX-512, called with denormals flushed in MXCSR.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn avx512_steps(call: Panel<u16>) {
    let (a, lda) = widened(call.a);
    // SAFETY: as the caller promises; the features are those of the vector.
    unsafe { panel::<__m512, Steps, _>(call, a, lda) };
}

/// The left operand in f32, and its stride.
fn widened(rows: Rows<u16>) -> (*const f32, usize) {
    assert!(!rows.wide.is_null(), "the left operand was not widened by `Mode::left`");
    (rows.wide, rows.wide_stride)
}
