//! What the tests of several modules share.

use crate::isa::Isa;
use crate::precision::Precision;

/// Deterministic values in (-1, 1), a few of them zero, sign and size mixed.
pub(crate) fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if state.is_multiple_of(31) { 0.0 } else { ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0 }
        })
        .collect()
}

pub(crate) fn assert_same_bits(what: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{what}: lengths differ");
    for (at, (x, y)) in got.iter().zip(expected).enumerate() {
        assert!(x.to_bits() == y.to_bits(), "{what}: element {at} is {x:e}, expected {y:e}");
    }
}

/// The instruction sets to test: those of the machine, and AMX by emulation where that is possible.
pub(crate) fn isas() -> Vec<Isa> {
    let mut isas = Isa::available();
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if crate::kernel::amx_emulator::install() && !isas.contains(&Isa::Amx) {
        isas.push(Isa::Amx);
    }
    isas
}

/// Every precision.
pub(crate) const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::Bf16, Precision::Bf16Native];

/// The precision whose reference an instruction set must equal: on tiles, `bf16-native` is `bf16`.
pub(crate) fn order_of(isa: Isa, precision: Precision) -> Precision {
    match (isa, precision) {
        (Isa::Amx, Precision::Bf16Native) => Precision::Bf16,
        _ => precision,
    }
}

/// Runs `work` in pools of 1, 2 and 3 threads.
pub(crate) fn pools<R: Send>(work: impl Fn() -> R + Sync) -> Vec<R> {
    [1, 2, 3]
        .into_iter()
        .map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(&work))
        .collect()
}
