//! Logits to probabilities, row by row: softmax with its log-sum-exp, sigmoid, and what the gradients need.
//!
//! Sums run over eight lanes and one fixed tree whatever the compiler does with them, so a row's bits depend on that row alone.

use crate::real::Real;

/// Softmax of every row of `logits_te`; writes `probs_te` and the row's log-sum-exp.
pub fn softmax_rows<S: Real>(logits_te: &[S], experts: usize, probs_te: &mut [S], lse_t: &mut [S]) {
    for ((row, probs), lse) in logits_te.chunks_exact(experts).zip(probs_te.chunks_exact_mut(experts)).zip(lse_t) {
        *lse = softmax(row, probs);
    }
}

/// Softmax of one row into `probs`; returns the log-sum-exp. Entries of minus infinity get probability 0.
#[inline]
pub fn softmax<S: Real>(row: &[S], probs: &mut [S]) -> S {
    let top = row.iter().fold(S::NEG_INFINITY, |best, &z| best.larger(z));
    for (p, &z) in probs.iter_mut().zip(row) {
        *p = (z - top).exp();
    }
    let total = sum(probs);
    let scale = S::ONE / total;
    for p in probs.iter_mut() {
        *p *= scale;
    }
    top + total.ln()
}

/// Divides by the sum; a row of zeros stays.
pub fn normalise_row(row: &mut [f64]) {
    let total: f64 = row.iter().sum();
    if total != 0.0 {
        row.iter_mut().for_each(|w| *w /= total);
    }
}

/// Sigmoid of every entry.
pub fn sigmoid_all<S: Real>(logits: &[S], out: &mut [S]) {
    for (o, &z) in out.iter_mut().zip(logits) {
        *o = sigmoid(z);
    }
}

/// `1 / (1 + e^-z)` without overflow on either side.
#[inline]
pub fn sigmoid<S: Real>(z: S) -> S {
    if z < S::ZERO {
        let e = z.exp();
        e / (S::ONE + e)
    } else {
        S::ONE / (S::ONE + (-z).exp())
    }
}

/// `ln(1 + e^z)` without overflow.
pub fn softplus<S: Real>(z: S) -> S {
    let magnitude = if z < S::ZERO { z } else { -z };
    z.larger(S::ZERO) + magnitude.exp().ln_1p()
}

/// Log-sum-exp of one row.
pub fn log_sum_exp<S: Real>(row: &[S]) -> S {
    let top = row.iter().fold(S::NEG_INFINITY, |best, &z| best.larger(z));
    if top == S::NEG_INFINITY {
        return top;
    }
    top + row.iter().map(|&z| (z - top).exp()).sum::<S>().ln()
}

/// Softmax backward on one row: `dz = p (dp - <dp, p>)`, added to `dlogits`.
pub fn softmax_backward<S: Real>(probs: &[S], dprobs: &[S], dlogits: &mut [S]) {
    let inner: S = probs.iter().zip(dprobs).map(|(&p, &d)| p * d).sum();
    for ((dz, &p), &d) in dlogits.iter_mut().zip(probs).zip(dprobs) {
        *dz += p * (d - inner);
    }
}

/// Sum over eight lanes, then a fixed tree, then the tail in order.
#[inline]
pub fn sum<S: Real>(values: &[S]) -> S {
    let mut lanes = [S::ZERO; 8];
    let chunks = values.chunks_exact(8);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane += v;
        }
    }
    let [a, b, c, d, e, f, g, h] = lanes;
    let mut total = ((a + e) + (c + g)) + ((b + f) + (d + h));
    for &v in tail {
        total += v;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extreme_logits_stay_finite() {
        let mut p = [0.0f64; 3];
        let lse = softmax(&[1e4, -1e4, 1e4], &mut p);
        assert_eq!(p, [0.5, 0.0, 0.5]);
        assert!((lse - (1e4 + 2f64.ln())).abs() < 1e-9);
        assert_eq!(sigmoid(-1e4f64), 0.0);
        assert_eq!(sigmoid(1e4f64), 1.0);
        assert_eq!(softplus(-1e4f64), 0.0);
        assert_eq!(softplus(1e4f64), 1e4);
    }

    #[test]
    fn f32_and_f64_softmax_agree() {
        let row: Vec<f64> = (0..67).map(|i| ((i * 37 % 19) as f64) * 0.31 - 3.0).collect();
        let row32: Vec<f32> = row.iter().map(|&z| z as f32).collect();
        let (mut p, mut p32) = (vec![0.0; 67], vec![0.0f32; 67]);
        let (lse, lse32) = (softmax(&row, &mut p), softmax(&row32, &mut p32));
        assert!((lse - f64::from(lse32)).abs() < 1e-5);
        assert!(p.iter().zip(&p32).all(|(a, &b)| (a - f64::from(b)).abs() < 1e-6));
    }
}
