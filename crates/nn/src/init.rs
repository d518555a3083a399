//! Initial values: a truncated normal drawn by a counter-based generator keyed by (seed, parameter name, matrix, block).
//!
//! A parameter's values depend on its name and on the index of the matrix inside it (the expert), never on the order in
//! which parameters are made, on threads, or on which rank holds which expert. Each block of 4096 values has its own
//! ChaCha8 stream, so blocks are filled in parallel; one uniform per value goes through the inverse normal distribution.

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};
use rayon::prelude::*;

/// Values per ChaCha stream.
const BLOCK: usize = 4096;

/// Distance, in standard deviations, at which the normal is cut (OLMoE's choice).
const CUT: f64 = 3.0;

/// How a parameter gets its first values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// All the same.
    Constant(f32),
    /// Normal with this standard deviation, cut at three of them.
    TruncatedNormal(f64),
    /// A hash layer's table of experts: index modulo this many.
    ModuloTable(usize),
    /// A hash layer's table, drawn from the seed alone: parameters of any name get the same.
    RandomTable(usize),
}

impl Init {
    /// `matrices * len` values of the parameter `name`; matrix `m` has its own streams.
    ///
    /// ```
    /// use mixtura_nn::Init;
    /// let both = Init::TruncatedNormal(0.02).draw(7, "layers.0.moe.experts.down", 2, 5000);
    /// let first = Init::TruncatedNormal(0.02).draw(7, "layers.0.moe.experts.down", 1, 5000);
    /// assert_eq!(both[..5000], first[..]);
    /// ```
    pub fn draw(&self, seed: u64, name: &str, matrices: usize, len: usize) -> Vec<f32> {
        match *self {
            Init::Zeros => vec![0.0; matrices * len],
            Init::Ones => vec![1.0; matrices * len],
            Init::Constant(value) => vec![value; matrices * len],
            Init::ModuloTable(experts) => (0..matrices * len).map(|id| (id % experts.max(1)) as f32).collect(),
            Init::RandomTable(experts) => mixtura_routing::policy::hash::random_table(matrices * len, experts, seed)
                .iter()
                .map(|&e| e as f32)
                .collect(),
            Init::TruncatedNormal(std) => {
                let mut values = vec![0.0; matrices * len];
                if len == 0 {
                    return values;
                }
                let key = stream_key(seed, name);
                values.par_chunks_mut(len).enumerate().for_each(|(matrix, values)| {
                    values.par_chunks_mut(BLOCK).enumerate().for_each(|(block, values)| {
                        let mut rng = ChaCha8Rng::from_seed(key);
                        rng.set_stream(((matrix as u64) << 32) | block as u64);
                        for value in values {
                            *value = (std * truncated_normal(rng.next_u64())) as f32;
                        }
                    });
                });
                values
            }
        }
    }
}

/// 32 bytes from the seed and the name, by two FNV-1a hashes with different offsets.
fn stream_key(seed: u64, name: &str) -> [u8; 32] {
    let fnv = |offset: u64| {
        name.bytes().fold(offset, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
    };
    let words = [seed, fnv(0xcbf2_9ce4_8422_2325), fnv(0x6c62_272e_07bb_0142), name.len() as u64];
    let mut key = [0; 32];
    for (bytes, word) in key.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    key
}

/// Maps 53 uniform bits to a standard normal conditioned on |z| < CUT.
fn truncated_normal(bits: u64) -> f64 {
    /// P(Z < -3).
    const LOW: f64 = 0.001_349_898_031_630_094_6;
    let uniform = ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    inverse_normal(LOW + uniform * (1.0 - 2.0 * LOW)).clamp(-CUT, CUT)
}

/// Inverse of the standard normal distribution function by Acklam's rational approximation, relative error below 1.2e-9.
fn inverse_normal(p: f64) -> f64 {
    const A: [f64; 6] = [
        -3.969683028665376e+01,
        2.209460984245205e+02,
        -2.759285104469687e+02,
        1.38357751867269e+02,
        -3.066479806614716e+01,
        2.506628277459239,
    ];
    const B: [f64; 5] = [
        -5.447609879822406e+01,
        1.615858368580409e+02,
        -1.556989798598866e+02,
        6.680131188771972e+01,
        -1.328068155288572e+01,
    ];
    const C: [f64; 6] = [
        -7.784894002430293e-03,
        -3.223964580411365e-01,
        -2.400758277161838,
        -2.549732539343734,
        4.374664141464968,
        2.938163982698783,
    ];
    const D: [f64; 4] = [7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996, 3.754408661907416];
    let horner = |coefficients: &[f64], x: f64| coefficients.iter().fold(0.0, |sum, c| sum * x + c);
    let tail = |p: f64| {
        let q = (-2.0 * p.ln()).sqrt();
        horner(&C, q) / (horner(&D, q) * q + 1.0)
    };
    if p < 0.02425 {
        tail(p)
    } else if p > 1.0 - 0.02425 {
        -tail(1.0 - p)
    } else {
        let q = p - 0.5;
        let r = q * q;
        horner(&A, r) * q / (horner(&B, r) * r + 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_truncated_normal_has_the_moments_of_a_normal_cut_at_three() {
        let values = Init::TruncatedNormal(1.0).draw(3, "w", 1, 200_000);
        let n = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n - mean * mean;
        assert!(mean.abs() < 0.01, "mean {mean}");
        // 1 - 2 * 3 phi(3) / (1 - 2 P(Z < -3))
        assert!((variance - 0.973_3).abs() < 0.01, "variance {variance}");
        assert!(values.iter().all(|v| v.abs() <= 3.0));
    }

    #[test]
    fn a_draw_depends_on_seed_and_name_and_not_on_the_number_of_matrices() {
        let draw = |seed, name, matrices| Init::TruncatedNormal(0.02).draw(seed, name, matrices, 100);
        assert_eq!(draw(1, "a", 3)[..100], draw(1, "a", 1)[..]);
        assert_ne!(draw(1, "a", 1), draw(2, "a", 1));
        assert_ne!(draw(1, "a", 1), draw(1, "b", 1));
        assert_ne!(draw(1, "a", 2)[..100], draw(1, "a", 2)[100..]);
    }

    #[test]
    fn the_inverse_normal_inverts_known_quantiles() {
        for (p, z) in
            [(0.5, 0.0), (0.975, 1.959_963_984_540_054), (0.01, -2.326_347_874_040_841), (0.841_344_746_068_542_9, 1.0)]
        {
            assert!((inverse_normal(p) - z).abs() < 1e-7, "{p}: {} vs {z}", inverse_normal(p));
        }
    }
}
