//! Branches beside the routed experts, written once for any number type: exact derivatives against finite differences.

mod common;

use common::{check_gradient, numbers};
use mixtura_routing::Real;
use mixtura_routing::reference::dual_numbers::{Dual, gradient};
use mixtura_routing::residual::{coefficients, shared_gate, weighted_shared};
use mixtura_routing::zero_cost::constant_expert;

const T: usize = 4;
const D: usize = 3;

/// x `[T, d]`, residual coefficient `[d, 2]` with bias, shared gate `[d]`, constant expert's mix `[2, d]` and vector `[d]`.
const SIZES: [usize; 6] = [T * D, D * 2, 2, D, 2 * D, D];

fn part<S>(v: &[S], which: usize) -> &[S] {
    let start: usize = SIZES[..which].iter().sum();
    &v[start..start + SIZES[which]]
}

/// Residual-MoE of x and a shared gate, in a weighted sum with the constant expert.
fn layer<S: Real>(v: &[S]) -> Vec<S> {
    let x = part(v, 0);
    let mix = coefficients(x, part(v, 1), part(v, 2), D);
    let gate = shared_gate(x, part(v, 3));
    let constant = x.chunks(D).flat_map(|x| constant_expert(x, part(v, 4), part(v, 5)));
    let at = |i: usize| mix[i / D * 2] * x[i] + mix[i / D * 2 + 1] * gate[i / D] * x[i] * x[i];
    constant.enumerate().map(|(i, c)| weighted_shared(at(i), c, 2)).collect()
}

#[test]
fn residual_shared_and_constant_branches_have_exact_gradients() {
    let point = numbers(61, SIZES.iter().sum(), 1.0);
    let dy = numbers(62, T * D, 1.0);
    let exact = gradient(&point, |v: &[Dual]| layer(v).iter().zip(&dy).map(|(&y, &d)| y * Dual::constant(d)).sum());
    check_gradient("branches", &point, &exact, |v| layer(v).iter().zip(&dy).map(|(y, d)| y * d).sum());
    assert!((0..6).all(|which| part(&exact, which).iter().any(|d| d.abs() > 1e-3)), "every parameter takes part");
}

#[test]
fn the_residual_coefficient_is_a_distribution_and_the_weighted_sum_an_average() {
    let (x, wc) = (numbers(1, T * D, 1.0), numbers(2, D * 2, 1.0));
    let mix = coefficients(&x, &wc, &[0.3, -0.2], D);
    assert!(mix.chunks(2).all(|row| (row[0] + row[1] - 1.0).abs() < 1e-15));
    assert_eq!(weighted_shared(3.0, 6.0, 2), 5.0);
}
