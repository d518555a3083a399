//! The k largest scores of a row, in descending order, ties to the lower index.
//!
//! One insertion pass: a value enters the sorted list only if it is strictly larger than the smallest kept one, so an
//! equal score at a higher index never displaces a lower one. After the first few entries hardly any value enters, which
//! makes the pass one comparison per expert. No allocation per row.

use crate::real::Real;

/// Writes the indices of the `out.len()` largest scores of `row`. Scores of minus infinity are chosen last, lowest index first.
#[inline]
pub fn top_k_row<S: Real>(row: &[S], values: &mut [S], out: &mut [u32]) {
    let k = out.len();
    debug_assert!(k >= 1 && k <= row.len() && values.len() == k);
    let mut filled = 0;
    for (i, &v) in row.iter().enumerate() {
        if filled == k {
            // `v <= values[k - 1]`, false for the common case; NaN cannot occur here.
            if v > values[k - 1] {
                insert(values, out, k - 1, v, i as u32);
            }
        } else {
            insert(values, out, filled, v, i as u32);
            filled += 1;
        }
    }
}

/// Moves smaller entries of `[..at]` one place down, from `at`, and puts (v, i) in the gap.
#[inline]
fn insert<S: Real>(values: &mut [S], out: &mut [u32], mut at: usize, v: S, i: u32) {
    while at > 0 && values[at - 1] < v {
        values[at] = values[at - 1];
        out[at] = out[at - 1];
        at -= 1;
    }
    values[at] = v;
    out[at] = i;
}

/// The k best experts of every row of `scores_te`, [T, k] row-major.
pub fn top_k<S: Real>(scores_te: &[S], experts: usize, k: usize) -> Vec<u32> {
    let tokens = scores_te.len() / experts;
    let mut chosen = vec![0; tokens * k];
    let mut values = vec![S::NEG_INFINITY; k];
    for (row, out) in scores_te.chunks_exact(experts).zip(chosen.chunks_exact_mut(k)) {
        top_k_row(row, &mut values, out);
    }
    chosen
}

/// Index of the largest value, ties to the lowest.
pub fn arg_max<S: Real>(row: &[S]) -> usize {
    let mut best = 0;
    for (i, &v) in row.iter().enumerate() {
        if v > row[best] {
            best = i;
        }
    }
    best
}

/// Indices by descending value; equal values keep their order.
pub fn order_descending<S: Real>(values: &[S]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    order.sort_by(|&a, &b| values[b as usize].partial_cmp(&values[a as usize]).unwrap_or(std::cmp::Ordering::Equal));
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_insertion_pass_equals_a_stable_sort(row in prop::collection::vec(-3i32..3, 1..40), k in 1usize..40) {
            let row: Vec<f64> = row.into_iter().map(f64::from).collect();
            let k = k.min(row.len());
            let mut expected = order_descending(&row);
            expected.truncate(k);
            prop_assert_eq!(top_k(&row, row.len(), k), expected);
        }
    }
}
