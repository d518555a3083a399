//! What the machine can do at most, measured: arithmetic from registers, and reading memory. Every share of the roofline that a
//! benchmark prints is against a figure measured in the same run.
//!
//! All threads of the rayon pool work at once; figures are GFLOP/s or GB/s of the whole pool, the best of several short runs.
#![allow(unsafe_code)]

use crate::aligned::AlignedVec;
use crate::isa::Isa;
use crate::lanes::{Lanes, assert_available, per_isa};
use crate::precision::Precision;
use std::time::Instant;

/// The arithmetic peak of the unit that runs matrix products of this precision: FMA for f32, `vdpbf16ps` or AMX tiles for bf16 where
/// there are any. Precision `bf16` on AVX-512-BF16 uses half of each `vdpbf16ps`; its share is still given of the whole.
pub fn compute_peak(isa: Isa, precision: Precision) -> f64 {
    assert_available(isa);
    match (precision.is_bf16(), isa) {
        #[cfg(target_arch = "x86_64")]
        (true, Isa::Amx) => amx_peak(),
        #[cfg(target_arch = "x86_64")]
        (true, Isa::Avx512Bf16) => bf16_peak(),
        _ => fma_peak(isa),
    }
}

/// f32 FMAs from registers.
pub fn fma_peak(isa: Isa) -> f64 {
    const ROUNDS: usize = 200_000;
    let per_round = 2 * 16 * FMA_CHAINS;
    best_rate(per_round * ROUNDS, || fma_rounds(isa, ROUNDS))
}

/// Chains in flight: AVX-512 has 2 pipes of latency 4 (AMD, Intel); AVX2 values are register pairs, so 6 fill its 16 registers.
const FMA_CHAINS: usize = 12;

per_isa! {
    fn fma_rounds = fma_rounds_body(rounds: usize) -> f32;
}

#[inline(always)]
fn fma_rounds_body<L: Lanes>(rounds: usize) -> f32 {
    let (scale, shift) = (L::splat(std::hint::black_box(0.999)), L::splat(std::hint::black_box(0.001)));
    let mut chains = [shift; FMA_CHAINS];
    for _ in 0..rounds {
        for chain in &mut chains {
            *chain = chain.mul_add(scale, shift);
        }
    }
    chains.into_iter().fold(L::splat(0.0), |sum, chain| sum.add(chain)).sum_across()
}

#[cfg(target_arch = "x86_64")]
fn bf16_peak() -> f64 {
    const ROUNDS: usize = 200_000;
    // SAFETY: the caller checked that the machine has AVX-512-BF16.
    best_rate(2 * 2 * 16 * 16 * ROUNDS, || unsafe { bf16_rounds(ROUNDS) })
}

/// Sixteen independent `vdpbf16ps` per round.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16_rounds(rounds: usize) -> f32 {
    use std::arch::x86_64::*;
    let ones = std::hint::black_box(0x3c00_3c00_i32);
    // SAFETY: both types are 64 bytes of plain data.
    let x: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi32(ones)) };
    let mut chains = [_mm512_setzero_ps(); 16];
    for _ in 0..rounds {
        for chain in &mut chains {
            *chain = _mm512_dpbf16_ps(*chain, x, x);
        }
    }
    _mm512_reduce_add_ps(chains.into_iter().fold(_mm512_setzero_ps(), |sum, chain| _mm512_add_ps(sum, chain)))
}

#[cfg(target_arch = "x86_64")]
fn amx_peak() -> f64 {
    const ROUNDS: usize = 20_000;
    best_rate(4 * 2 * 16 * 16 * 32 * ROUNDS, || {
        // SAFETY: the caller checked that the machine has AMX.
        unsafe { crate::kernel::amx_rounds(ROUNDS) };
        0.0
    })
}

/// GB/s of reading memory: each thread sums its own 64 MiB.
pub fn read_bandwidth() -> f64 {
    const FLOATS: usize = 16 << 20;
    let data: Vec<AlignedVec<f32>> = rayon::broadcast(|_| {
        let mut own = AlignedVec::zeroed(FLOATS);
        own.fill(1.0);
        own
    });
    let isa = Isa::current().min(Isa::Avx512Bf16);
    let bytes = 4 * FLOATS;
    best_of(5, || {
        rayon::broadcast(|context| std::hint::black_box(sum(isa, &data[context.index()])));
    })
    .recip()
        * (bytes * data.len()) as f64
        / 1e9
}

per_isa! {
    fn sum = sum_body(data: &[f32]) -> f32;
}

#[inline(always)]
fn sum_body<L: Lanes>(data: &[f32]) -> f32 {
    let mut sums = [L::splat(0.0); 8];
    for chunk in data.chunks_exact(128) {
        for (at, sum) in sums.iter_mut().enumerate() {
            *sum = sum.add(L::load(&chunk[16 * at..]));
        }
    }
    sums.into_iter().fold(L::splat(0.0), |sum, x| sum.add(x)).sum_across()
}

/// GFLOP/s when every thread of the pool runs `work` of `flops` operations.
fn best_rate(flops: usize, work: impl Fn() -> f32 + Sync) -> f64 {
    let seconds = best_of(5, || {
        rayon::broadcast(|_| std::hint::black_box(work()));
    });
    (flops * rayon::current_num_threads()) as f64 / seconds / 1e9
}

fn best_of(runs: usize, mut work: impl FnMut()) -> f64 {
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_is_a_positive_number() {
        for isa in Isa::available() {
            for precision in [Precision::F32, Precision::Bf16] {
                let peak = compute_peak(isa, precision);
                assert!(peak.is_finite() && peak > 0.01, "{isa} {precision}: {peak}");
            }
        }
        assert!(read_bandwidth() > 0.01);
    }
}
