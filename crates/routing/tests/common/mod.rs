//! Deterministic matrices and the gradient check that several test files share.

/// `n` numbers uniform on [-spread, spread].
pub fn numbers(seed: u64, n: usize, spread: f64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0
    };
    (0..n).map(|_| next() * spread).collect()
}

/// Compares `gradient` with central differences of `value` around `at`.
#[allow(dead_code)]
pub fn check_gradient(what: &str, at: &[f64], gradient: &[f64], value: impl Fn(&[f64]) -> f64) {
    const H: f64 = 1e-5;
    for i in 0..at.len() {
        let mut point = at.to_vec();
        point[i] += H;
        let above = value(&point);
        point[i] -= 2.0 * H;
        let numeric = (above - value(&point)) / (2.0 * H);
        let tolerance = 1e-6 * numeric.abs().max(1e-2);
        assert!((numeric - gradient[i]).abs() < tolerance, "{what}[{i}]: numeric {numeric}, analytic {}", gradient[i]);
    }
}
