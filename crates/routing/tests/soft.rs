//! Soft routers: exact gradients against finite differences for inputs, gates and experts; equivariance; sums.

mod common;

use common::{check_gradient, numbers};
use mixtura_routing::Real;
use mixtura_routing::policy::hierarchical::route_two_level;
use mixtura_routing::reference::dual_numbers::{Dual, gradient};
use mixtura_routing::scorers::{Hidden, cosine_scores, fuzzy_logits, linear_logits, mlp_logits};
use mixtura_routing::soft::block_causal;
use mixtura_routing::soft::merge::{FirstSegment, merged_forward, segment_weights, shifted_weights};
use mixtura_routing::soft::mixture_of_tokens::group_forward;
use mixtura_routing::soft::soft_moe::{Mixing, NORM_EPSILON, SoftMoe};

const T: usize = 6;
const D: usize = 3;
const E: usize = 4;

/// Parameters of one layer in one vector: x `[T, d]`, gate `[d, E]`, experts `[E, d, d]`.
const SIZE: usize = T * D + D * E + E * D * D;

fn split<S: Copy>(v: &[S]) -> (&[S], &[S], &[S]) {
    let (x, rest) = v.split_at(T * D);
    let (gate, experts) = rest.split_at(D * E);
    (x, gate, experts)
}

fn expert<S: Real>(parameters: &[S], x: &[S]) -> Vec<S> {
    linear_logits(x, parameters, D).into_iter().map(|v| v * v + v).collect()
}

fn of_expert<S: Real>(parameters: &[S], e: usize) -> &[S] {
    &parameters[e * D * D..(e + 1) * D * D]
}

/// Checks d sum(c * y) / d everything for a layer written once for any number type.
macro_rules! check_layer {
    ($name:expr, $layer:expr) => {{
        let point = numbers(11, SIZE, 0.8);
        let c = numbers(12, T * D, 1.0);
        let exact = gradient(&point, |v: &[Dual]| {
            $layer(v).iter().zip(&c).map(|(&y, &c): (&Dual, &f64)| y * Dual::constant(c)).sum()
        });
        check_gradient($name, &point, &exact, |v| $layer(v).iter().zip(&c).map(|(y, c): (&f64, &f64)| y * c).sum());
    }};
}

fn soft_layer<S: Real>(v: &[S]) -> Vec<S> {
    let (x, phi_ds, experts) = split(v);
    let layer = SoftMoe { phi_ds, slots: E, per_expert: 1, scale: S::of(1.7), epsilon: NORM_EPSILON };
    layer.forward(x, D, Mixing::Soft, |e, x| expert(of_expert(experts, e), x)).y_td
}

fn block_layer<S: Real>(v: &[S]) -> Vec<S> {
    let (x, phi_ds, experts) = split(v);
    let layer = SoftMoe { phi_ds, slots: E, per_expert: 1, scale: S::of(1.7), epsilon: NORM_EPSILON };
    block_causal::forward(&layer, x, D, 2, |e, x| expert(of_expert(experts, e), x)).y_td
}

fn tokens_layer<S: Real>(v: &[S]) -> Vec<S> {
    let (x, controller, experts) = split(v);
    group_forward(x, controller, D, S::of(0.7), |e, x| expert(of_expert(experts, e), x)).1
}

fn smear_layer<S: Real>(v: &[S]) -> Vec<S> {
    let (x, router, experts) = split(v);
    let weights = segment_weights(x, router, D, T);
    merged_forward(x, D, T, &weights, experts, E, expert)
}

fn lory_layer<S: Real>(v: &[S]) -> Vec<S> {
    let (x, router, experts) = split(v);
    let used = shifted_weights(&segment_weights(x, router, D, 2), E, FirstSegment::Uniform);
    merged_forward(x, D, 2, &used, experts, E, expert)
}

fn mlp_layer<S: Real>(v: &[S]) -> Vec<S> {
    mlp_logits(&v[..T * D], &v[T * D..T * D + D * E], &v[T * D + D * E..T * D + D * E + E * D], D, Hidden::Tanh)
}

fn cosine_layer<S: Real>(v: &[S]) -> Vec<S> {
    cosine_scores(&v[..T * D], &v[T * D..T * D + D * D], &v[T * D + D * E..T * D + D * E + D * D], D)
}

fn fuzzy_layer<S: Real>(v: &[S]) -> Vec<S> {
    fuzzy_logits(&v[..T * D], &v[T * D..T * D + D * D], D, 2.0)
}

#[test]
fn gradients_for_inputs_gates_and_experts() {
    check_layer!("soft moe", soft_layer);
    check_layer!("block-causal soft moe", block_layer);
    check_layer!("mixture of tokens", tokens_layer);
    check_layer!("smear", smear_layer);
    check_layer!("lory", lory_layer);
    check_layer!("mlp gate", mlp_layer);
    check_layer!("cosine gate", cosine_layer);
    check_layer!("fuzzy gate", fuzzy_layer);
}

#[test]
fn two_level_weights_sum_to_one_and_have_exact_gradients() {
    fn layer<S: Real>(v: &[S]) -> Vec<S> {
        route_two_level(&v[..T * 3], &v[T * 3..T * 3 + T * 6], 3, 2, [2, 2]).weight_of_pair
    }
    let point = numbers(21, T * 9, 1.0);
    let routed = route_two_level(&point[..T * 3], &point[T * 3..], 3, 2, [2, 2]);
    assert!(routed.weight_of_pair.chunks(4).all(|w| (w.iter().sum::<f64>() - 1.0).abs() < 1e-12));
    let c = numbers(22, T * 4, 1.0);
    let exact = gradient(&point, |v: &[Dual]| layer(v).iter().zip(&c).map(|(&w, &c)| w * Dual::constant(c)).sum());
    check_gradient("two-level", &point, &exact, |v| layer(v).iter().zip(&c).map(|(w, c)| w * c).sum());
}

#[test]
fn the_scale_of_soft_moe_has_an_exact_gradient() {
    let v = numbers(31, SIZE, 0.8);
    fn total<S: Real>(v: &[S], scale: S) -> S {
        let (x, phi_ds, experts) = split(v);
        let layer = SoftMoe { phi_ds, slots: E, per_expert: 1, scale, epsilon: NORM_EPSILON };
        layer.forward(x, D, Mixing::Soft, |e, x| expert(of_expert(experts, e), x)).y_td.into_iter().sum()
    }
    let dual: Vec<Dual> = v.iter().map(|&v| Dual::constant(v)).collect();
    let exact = total(&dual, Dual::variable(1.3)).derivative;
    check_gradient("scale", &[1.3], &[exact], |s| total(&v, s[0]));
}

#[test]
fn soft_moe_is_permutation_equivariant_and_its_mixtures_sum_to_one() {
    let v = numbers(41, SIZE, 1.0);
    let (x, phi_ds, experts) = split(&v);
    let layer = SoftMoe { phi_ds, slots: E, per_expert: 2, scale: 1.0, epsilon: NORM_EPSILON };
    let run = |x: &[f64]| layer.forward(x, D, Mixing::Soft, |e, x| expert(of_expert(experts, e), x));
    let out = run(x);
    let reversed: Vec<f64> = x.chunks(D).rev().flatten().copied().collect();
    let back: Vec<f64> = run(&reversed).y_td.chunks(D).rev().flatten().copied().collect();
    assert!(out.y_td.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-12));
    assert!(out.combine_ts.chunks(E).all(|row| (row.iter().sum::<f64>() - 1.0).abs() < 1e-12));
    for s in 0..E {
        let column: f64 = out.dispatch_ts.iter().skip(s).step_by(E).sum();
        assert!((column - 1.0).abs() < 1e-12);
    }
}

#[test]
fn one_block_of_the_block_causal_layer_sees_what_soft_moe_sees() {
    let v = numbers(51, SIZE, 1.0);
    let (x, phi_ds, _) = split(&v);
    let layer = SoftMoe { phi_ds, slots: E, per_expert: 1, scale: 2.0, epsilon: NORM_EPSILON };
    let blocks = block_causal::forward(&layer, x, D, 4, |_, x| x.to_vec());
    let soft = layer.forward(&x[..4 * D], D, Mixing::Soft, |_, x| x.to_vec());
    assert!(blocks.slots_bsd.iter().zip(&soft.slots_sd).all(|(a, b)| (a - b).abs() < 1e-12));
    assert_eq!(blocks.y_td[..4 * D], [0.0; 4 * D]);
}
