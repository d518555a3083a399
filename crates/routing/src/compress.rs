//! Between dense and sparse models: combine-weight normalisation for upcycling, pruning scores, merging of experts,
//! aggregation of two checkpoints.
//!
//! Merging without aligning hidden units first averages unrelated units and destroys the function; [`align`] finds the
//! permutation. Identical experts under a dense softmax gate merge without loss if their gates are added (log-sum-exp).

use crate::policy::base;
use crate::select::order_descending;

/// Divides by the sum; a row of zeros stays.
pub fn normalise_row(row: &mut [f64]) {
    let total: f64 = row.iter().sum();
    if total != 0.0 {
        row.iter_mut().for_each(|w| *w /= total);
    }
}

/// Euclidean norm of every gate row, `[E, d]`.
pub fn row_norms(gate_ed: &[f64], width: usize) -> Vec<f64> {
    gate_ed.chunks_exact(width.max(1)).map(|row| row.iter().map(|v| v * v).sum::<f64>().sqrt()).collect()
}

/// Gate rows minus their mean: a vector common to all rows changes no probability but changes norms.
pub fn centred_rows(gate_ed: &[f64], width: usize) -> Vec<f64> {
    let experts = (gate_ed.len() / width.max(1)).max(1);
    let mean: Vec<f64> =
        (0..width).map(|d| gate_ed.iter().skip(d).step_by(width).sum::<f64>() / experts as f64).collect();
    gate_ed.iter().enumerate().map(|(i, v)| v - mean[i % width]).collect()
}

/// The `m` experts with the largest score, in index order; ties to the lower index.
pub fn keep(score_e: &[f64], m: usize) -> Vec<u32> {
    let mut kept = order_descending(score_e);
    kept.truncate(m);
    kept.sort_unstable();
    kept
}

/// Gate weight times output norm, averaged over the rows each expert computed (REAP); 0 for an unused expert.
pub fn gated_output_norm(expert_of_row: &[u32], weight_n: &[f64], norm_n: &[f64], experts: usize) -> Vec<f64> {
    let (mut sum, mut count) = (vec![0.0; experts], vec![0.0; experts]);
    for ((&e, w), n) in expert_of_row.iter().zip(weight_n).zip(norm_n) {
        sum[e as usize] += w * n;
        count[e as usize] += 1.0;
    }
    sum.iter().zip(count).map(|(s, c)| if c > 0.0 { s / c } else { 0.0 }).collect()
}

/// For every hidden unit (row) of `a`, the unit of `b` that matches it best overall; exact assignment on inner products.
pub fn align(a_hd: &[f64], b_hd: &[f64], width: usize) -> Vec<u32> {
    let rows = a_hd.len() / width.max(1);
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(p, q)| p * q).sum::<f64>();
    let affinity: Vec<f64> =
        a_hd.chunks_exact(width).flat_map(|x| b_hd.chunks_exact(width).map(move |y| dot(x, y))).collect();
    base::assign(&affinity, rows)
}

/// Rows of `m` in the given order.
pub fn permute_rows(m: &[f64], width: usize, order: &[u32]) -> Vec<f64> {
    order.iter().flat_map(|&i| m[i as usize * width..(i as usize + 1) * width].iter().copied()).collect()
}

/// `share a + (1 - share) b`.
pub fn average(a: &[f64], b: &[f64], share: f64) -> Vec<f64> {
    a.iter().zip(b).map(|(x, y)| share * x + (1.0 - share) * y).collect()
}
