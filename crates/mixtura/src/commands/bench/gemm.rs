//! Dense products `[m, k] x [k, n]`, B packed once.

use mixtura_kernels::gemm::{Accum, matmul};
use mixtura_kernels::pack::{MatView, PackedB};
use mixtura_ops::Numerics;

use super::{Bench, Row};

/// m, n, k.
const SHAPES: [[usize; 3]; 3] = [[2048, 2048, 2048], [512, 2048, 512], [64, 2048, 512]];

/// One row per shape.
pub fn rows(bench: &Bench, numerics: Numerics) -> Vec<Row> {
    let row = |full: [usize; 3]| {
        let [m, n, k] = full.map(|size| bench.size(size));
        let a: Vec<f32> = (0..m * k).map(|i| value(i, 1)).collect();
        let b: Vec<f32> = (0..k * n).map(|i| value(i, 2)).collect();
        let packed = PackedB::pack(numerics.isa, numerics.precision, 1, k, n, MatView::row_major(&b, k, n));
        let mut c = vec![0.0; m * n];
        let seconds = bench.median(|| matmul(numerics.isa, &a, m, &packed, &mut c, Accum::Replace));
        // As the peers' script writes them.
        let shape = if m == n && n == k { format!("{m}^3") } else { format!("{m}x{n}x{k}") };
        bench.arithmetic("gemm", &shape, numerics, seconds, 2.0 * (m * n * k) as f64)
    };
    SHAPES.into_iter().map(row).collect()
}

/// A number in [-1, 1) from its index.
fn value(index: usize, seed: u64) -> f32 {
    let z = (index as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(seed << 32);
    let z = (z ^ (z >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (z >> 40) as f32 / (1u32 << 23) as f32 - 1.0
}
