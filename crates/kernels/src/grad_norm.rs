//! Squared 2-norm of a gradient: blocks of 4096 elements, f64 sums, blocks added in order.
//!
//! f64 because squares of f32 are exact in it and neither overflow nor vanish. Memory bound (4 bytes per element).

use crate::isa::Isa;
use crate::lanes::per_isa;
use rayon::prelude::*;

/// Elements per block; a block's sum has 16 accumulators, so the order is fixed.
pub const NORM_BLOCK: usize = 4096;

/// Accumulators of a block.
const SUMS: usize = 32;

/// Sum of the squares of `grad`, the same bits for every number of threads and every instruction set.
pub fn grad_norm_squared(isa: Isa, grad: &[f32]) -> f64 {
    if grad.len() <= 16 * NORM_BLOCK {
        return grad.chunks(NORM_BLOCK).map(|block| block_sum(isa, block)).sum();
    }
    let sums: Vec<f64> = grad.par_chunks(NORM_BLOCK).with_min_len(8).map(|block| block_sum(isa, block)).collect();
    sums.iter().sum()
}

per_isa! {
    fn block_sum = block_sum_body(block: &[f32]) -> f64;
}

#[inline(always)]
#[allow(clippy::extra_unused_type_parameters)] // `per_isa!` names the lane type of every body
fn block_sum_body<L>(block: &[f32]) -> f64 {
    let mut sums = [0.0_f64; SUMS];
    let groups = block.chunks_exact(SUMS);
    let rest = groups.remainder();
    for group in groups {
        for i in 0..SUMS {
            let g = f64::from(group[i]);
            sums[i] += g * g;
        }
    }
    for (sum, &g) in sums.iter_mut().zip(rest) {
        *sum += f64::from(g) * f64::from(g);
    }
    let mut width = SUMS / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

/// [`grad_norm_squared`] on one thread of baseline code; the same bits.
pub fn grad_norm_squared_reference(grad: &[f32]) -> f64 {
    grad.chunks(NORM_BLOCK).map(block_sum_body::<()>).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{numbers, pools};

    #[test]
    fn isa_and_threads_change_no_bit() {
        for len in [0, 1, 31, NORM_BLOCK, NORM_BLOCK + 33, 40 * NORM_BLOCK + 5] {
            let grad = numbers(1, len);
            let want = grad_norm_squared_reference(&grad);
            let plain: f64 = grad.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
            assert!((want - plain).abs() <= 1e-12 * plain);
            for isa in Isa::available() {
                for got in pools(|| grad_norm_squared(isa, &grad)) {
                    assert_eq!(got.to_bits(), want.to_bits(), "{isa}, {len} values");
                }
            }
        }
    }

    #[test]
    fn squares_beyond_f32_are_counted() {
        assert_eq!(
            grad_norm_squared(Isa::current(), &[1e30, 1e-30]),
            f64::from(1e30_f32).powi(2) + f64::from(1e-30_f32).powi(2)
        );
    }
}
