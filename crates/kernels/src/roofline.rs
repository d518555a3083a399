//! What the machine can do at most, measured: arithmetic from registers, and reading memory. Every share of the roofline that a
//! benchmark prints is against a figure measured in the same run.
//!
//! All threads of the rayon pool work at once; figures are GFLOP/s or GB/s of the whole pool, the best of several short runs.
#![allow(unsafe_code)]

use crate::aligned::AlignedVec;
#[cfg(target_arch = "x86_64")]
use crate::bf16;
use crate::isa::Isa;
#[cfg(target_arch = "x86_64")]
use crate::kernel::scalar::fma_flushed;
use crate::lanes::{Lanes, assert_available, per_isa};
use crate::precision::Precision;
use std::time::Instant;

/// The arithmetic peak of the instructions that compute products of this precision on `isa`: FMA for f32, for bf16 those of the way that
/// the instruction set stands for. Precision `bf16` by `vdpbf16ps` uses half of each; its share is still given of the whole.
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
    let per_round = 2 * 16 * fma_chains(isa);
    best_rate(per_round * ROUNDS, || fma_rounds(isa, ROUNDS))
}

/// Chains in flight: two pipes of latency 4 or 5 need 8 to 10. On AVX2 a value is two registers, so 6 values make the 12 chains that fit.
const fn fma_chains(isa: Isa) -> usize {
    match isa {
        Isa::Scalar => 8,
        Isa::Avx2 => 6,
        _ => 12,
    }
}

per_isa! {
    fn fma_rounds = fma_rounds_body(rounds: usize) -> f32;
}

#[inline(always)]
fn fma_rounds_body<L: Lanes>(rounds: usize) -> f32 {
    let (scale, shift) = (L::splat(std::hint::black_box(0.999)), L::splat(std::hint::black_box(0.001)));
    // As `fma_chains` says.
    let count = L::ACCUMULATORS.min(12);
    let mut chains = [shift; 12];
    for _ in 0..rounds {
        for chain in &mut chains[..count] {
            *chain = chain.mul_add(scale, shift);
        }
    }
    chains.into_iter().take(count).fold(L::splat(0.0), |sum, chain| sum.add(chain)).sum_across()
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

/// Operations per second of `vdpbf16ps` over those of FMAs, on this thread: each the best of short turns taken alternately, so that what
/// else the machine does weighs on both.
#[cfg(target_arch = "x86_64")]
pub(crate) fn dot_over_fma() -> f64 {
    const ROUNDS: usize = 10_000;
    assert_available(Isa::Avx512Bf16);
    let (mut dot, mut fma) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..10 {
        // SAFETY: checked above.
        dot = dot.min(best_of(1, || _ = std::hint::black_box(unsafe { bf16_rounds(ROUNDS) })));
        fma = fma.min(best_of(1, || _ = std::hint::black_box(fma_rounds(Isa::Avx512, ROUNDS))));
    }
    let (dot, fma) = (2.0 * 2.0 * 16.0 * 16.0 / dot, 2.0 * 16.0 * fma_chains(Isa::Avx512) as f64 / fma);
    dot / fma
}

/// Whether `vdpbf16ps` gives the bits of two FMAs, the odd product first, denormals flushed: what every other way of `bf16-native`
/// computes. The manuals say so; 64 Ki sums of every size and sign are tried.
#[cfg(target_arch = "x86_64")]
pub(crate) fn dot_is_two_fmas() -> bool {
    assert_available(Isa::Avx512Bf16);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as u32
    };
    (0..4096).all(|round| {
        // One round of two keeps exponents near 1, so that sums cancel and round; the others take any finite bits.
        let mut number = || match (random(), round % 2) {
            (bits, 0) => bits & 0x80ff_80ff | 0x3f00_3f00,
            (bits, _) if bits & 0x7f80_0000 == 0x7f80_0000 => bits & 0xbfff_ffff,
            (bits, _) => bits,
        };
        let (x, y, sums): ([u32; 16], [u32; 16], [u32; 16]) =
            (std::array::from_fn(|_| number()), std::array::from_fn(|_| number()), std::array::from_fn(|_| number()));
        let halves = |word: u32| [bf16::to_f32(word as u16), bf16::to_f32((word >> 16) as u16)];
        // A low half may be an infinity or a NaN, of which only the kind is promised.
        let expected = std::array::from_fn::<f32, 16, _>(|i| {
            let ([x0, x1], [y0, y1]) = (halves(x[i]), halves(y[i]));
            fma_flushed(x0, y0, fma_flushed(x1, y1, f32::from_bits(sums[i])))
        });
        // SAFETY: checked above.
        let got = unsafe { dot(x, y, sums.map(f32::from_bits)) };
        got.iter().zip(&expected).all(|(x, y)| x.to_bits() == y.to_bits() || !(x.is_finite() || y.is_finite()))
    })
}

/// One `vdpbf16ps`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot(x: [u32; 16], y: [u32; 16], sums: [f32; 16]) -> [f32; 16] {
    use std::arch::x86_64::*;
    // SAFETY: all of these types are 64 bytes of plain data.
    unsafe {
        let [x, y] = [x, y].map(|pairs| std::mem::transmute::<[u32; 16], __m512bh>(pairs));
        std::mem::transmute::<__m512, [f32; 16]>(_mm512_dpbf16_ps(_mm512_loadu_ps(sums.as_ptr()), x, y))
    }
}

/// Never asked: this architecture has no `vdpbf16ps`.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn dot_over_fma() -> f64 {
    0.0
}

/// Never asked: this architecture has no `vdpbf16ps`.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn dot_is_two_fmas() -> bool {
    false
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

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn vdpbf16ps_is_two_fmas_where_there_is_one() {
        if Isa::available().contains(&Isa::Avx512Bf16) {
            assert!(dot_is_two_fmas());
        }
    }
}
