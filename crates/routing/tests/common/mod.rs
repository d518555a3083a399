//! Random numbers from the crate's own counter-based generator and the gradient check that the test files share.
#![allow(dead_code)]

use mixtura_routing::{Purpose, StepContext, Stream};

/// A stream of draws for one trial.
pub fn draws(seed: u64) -> Stream {
    StepContext::training(seed, 0, 0).stream(Purpose::LogitNoise).unwrap()
}

/// `n` numbers uniform on [-spread, spread].
pub fn numbers(seed: u64, n: usize, spread: f64) -> Vec<f64> {
    let draws = draws(seed);
    (0..n).map(|i| (2.0 * draws.uniform(i, 0) - 1.0) * spread).collect()
}

/// Compares `gradient` with central differences of `value` around `at`.
pub fn check_gradient(what: &str, at: &[f64], gradient: &[f64], value: impl Fn(&[f64]) -> f64) {
    const H: f64 = 1e-5;
    assert_eq!(at.len(), gradient.len(), "{what}: one derivative per coordinate");
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
