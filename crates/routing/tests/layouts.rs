//! Ragged rows = padded slots = dense one-hot mixture, to 1e-12 in f64: every recipe of the manual, in every drop order at
//! capacities that bind, under every normalisation, with learned noise and a gated shared expert; values, and derivatives for
//! the inputs, the gate, the noise weights, the experts and the shared expert. And: evaluation draws nothing, for all of them.
//!
//! The layer is written once for any number type. On dual numbers it yields exact directional derivatives with selections
//! constant; these are compared between layouts, with central differences, and with the hand-written gradient of the weights.

mod common;

use common::{ORDERS, numbers, recipes};
use mixtura_routing::reference::combine::{combine, combine_dense, combine_padded, weight_gradient};
use mixtura_routing::reference::dual_numbers::Dual;
use mixtura_routing::residual::shared_gate;
use mixtura_routing::route::input_jitter;
use mixtura_routing::scorers::linear_logits;
use mixtura_routing::zero_cost::ZeroComputation;
use mixtura_routing::{
    DropOrder, Noise, Normalize, Policy, Real, RouteShape, Routed, RouterConfig, RouterInput, StepContext, route,
};

const T: usize = 10;
const D: usize = 3;
const E: usize = 8;

/// Blocks of the parameter vector: x, gate, noise weights, experts, shared expert, shared gate.
const BLOCKS: [&str; 6] = ["inputs", "gate", "noise weights", "experts", "shared expert", "shared gate"];

const NORMALISATIONS: [Normalize; 3] = [Normalize::Never, Normalize::BeforeDrop, Normalize::AfterDrop];

struct Setting {
    name: String,
    config: RouterConfig,
    k: usize,
    /// Logits per token.
    width: usize,
    zero: Option<ZeroComputation>,
    point: Vec<f64>,
}

/// Every recipe once dropless and in every drop order, times every normalisation.
fn settings() -> Vec<Setting> {
    let mut settings = Vec::new();
    for (seed, recipe) in (1..).zip(recipes(E)) {
        for (capacity_factor, drop_order) in [(0.0, DropOrder::TokenMajor)].into_iter().chain(ORDERS.map(|o| (0.75, o)))
        {
            let Some((config, zero)) = recipe.with_capacity(capacity_factor, drop_order) else { continue };
            for normalize in NORMALISATIONS {
                let config = RouterConfig { normalize, ..config.clone() };
                // A policy whose weights are sums of their own refuses to have them divided.
                if config.validate(E, recipe.k).is_ok() {
                    settings.push(Setting {
                        name: format!("{} {drop_order:?} {capacity_factor} {normalize:?}", recipe.name),
                        config,
                        k: recipe.k,
                        width: recipe.width,
                        zero,
                        point: numbers(seed, sizes(recipe.width).iter().sum(), 1.0),
                    });
                }
            }
        }
    }
    assert!(settings.len() > 500, "{}", settings.len());
    settings
}

/// Sizes of the blocks.
fn sizes(width: usize) -> [usize; 6] {
    [T * D, D * width, D * width, E * D * D, D * D, D]
}

impl Setting {
    /// Where a block lies in the parameter vector.
    fn range(&self, which: usize) -> std::ops::Range<usize> {
        let sizes = sizes(self.width);
        let start: usize = sizes[..which].iter().sum();
        start..start + sizes[which]
    }

    fn route<S: Real>(&self, v: &[S], step: &StepContext) -> Routed<S> {
        let x = &v[self.range(0)];
        let (logits, raw) = (linear_logits(x, &v[self.range(1)], D), linear_logits(x, &v[self.range(2)], D));
        let constants = |seed, spread: f64| numbers(seed, E, spread).into_iter().map(S::of).collect::<Vec<_>>();
        let (bias, thresholds) = (constants(70, 0.1), vec![S::of(0.12); E]);
        let given: Vec<u32> = (0..T * self.k).map(|p| ((p * 7) % E) as u32).collect();
        let input = RouterInput::new(&logits)
            .with_raw_noise(&raw)
            .with_tokens(x)
            .with_thresholds(&thresholds)
            .with_given(&given);
        let limited = matches!(self.config.policy, Policy::GroupLimited { .. });
        let input = if limited { input.with_bias(&bias) } else { input };
        let input = RouterInput { zero_computation: self.zero, ..input };
        let shape = RouteShape { tokens: T, experts: E, top_k: self.k };
        route(&input, shape, &self.config, step).unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    /// The layer's output in the three layouts.
    fn layouts<S: Real>(&self, v: &[S], step: &StepContext) -> [Vec<S>; 3] {
        let routed = self.route(v, step);
        let x = &v[self.range(0)];
        let expert = |e: usize, x: &[S]| mlp(&v[self.range(3)][e * D * D..(e + 1) * D * D], x);
        let gate = shared_gate(x, &v[self.range(5)]);
        let shared: Vec<S> = x.chunks_exact(D).flat_map(|x| mlp(&v[self.range(4)], x)).collect();
        let routed_part = [
            combine(x, D, &routed.assignment, &routed.weight_n, expert),
            combine_padded(x, D, &routed.assignment, &routed.weight_n, expert),
            combine_dense(x, D, &routed.combine_te(), E, expert),
        ];
        routed_part.map(|y| y.iter().enumerate().map(|(i, &y)| y + gate[i / D] * shared[i]).collect())
    }
}

/// A smooth expert with parameters `[d, d]`.
fn mlp<S: Real>(parameters: &[S], x: &[S]) -> Vec<S> {
    linear_logits(x, parameters, D).into_iter().map(|v| v * v + v).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

const STEPS: [StepContext; 2] = [StepContext::training(3, 1, 4), StepContext::evaluation()];

#[test]
fn the_three_layouts_agree_for_every_router() {
    let mut dropped = 0;
    for s in settings() {
        for step in STEPS {
            let [ragged, padded, dense] = s.layouts(&s.point, &step);
            for ((a, b), c) in ragged.iter().zip(&padded).zip(&dense) {
                assert!((a - b).abs() < 1e-12 && (a - c).abs() < 1e-12, "{}: {a} {b} {c}", s.name);
            }
        }
        dropped += usize::from(!s.route(&s.point, &STEPS[0]).assignment.dropped.is_empty());
    }
    assert!(dropped > 300, "capacity binds in {dropped} settings");
}

#[test]
fn the_three_layouts_have_equal_and_exact_derivatives_for_every_router() {
    const H: f64 = 1e-5;
    let dy = numbers(5, T * D, 1.0);
    let step = STEPS[0];
    for s in settings() {
        let routed = s.route(&s.point, &step);
        for (which, what) in BLOCKS.iter().enumerate() {
            let range = s.range(which);
            let mut direction = vec![0.0; s.point.len()];
            direction[range.clone()].copy_from_slice(&numbers(40 + which as u64, range.len(), 1.0));
            let dual: Vec<Dual> =
                s.point.iter().zip(&direction).map(|(&value, &derivative)| Dual { value, derivative }).collect();
            let slope = |y: &[Dual]| y.iter().zip(&dy).map(|(y, d)| y.derivative * d).sum::<f64>();
            let [ragged, padded, dense] = s.layouts(&dual, &step).map(|y| slope(&y));
            let close = |a: f64, b: f64| (a - b).abs() < 1e-12 * (1.0 + a.abs());
            assert!(close(ragged, padded) && close(ragged, dense), "{} {what}: {ragged} {padded} {dense}", s.name);

            let along = |h: f64| {
                let moved: Vec<f64> = s.point.iter().zip(&direction).map(|(v, d)| v + h * d).collect();
                assert_eq!(s.route(&moved, &step).choices, routed.choices, "{} {what}: too close to a tie", s.name);
                dot(&s.layouts(&moved, &step)[0], &dy)
            };
            let numeric = (along(H) - along(-H)) / (2.0 * H);
            assert!((ragged - numeric).abs() < 1e-6 * numeric.abs().max(1e-1), "{} {what}: {ragged} {numeric}", s.name);
        }
    }
}

#[test]
fn the_hand_written_gradient_of_gate_and_noise_is_the_exact_one_for_every_router() {
    let dy = numbers(5, T * D, 1.0);
    let step = STEPS[0];
    for s in settings() {
        let routed = s.route(&s.point, &step);
        let x = &s.point[s.range(0)];
        let expert = |e: usize, x: &[f64]| mlp(&s.point[s.range(3)][e * D * D..(e + 1) * D * D], x);
        let dweight = weight_gradient(x, &dy, D, &routed.assignment, expert);
        let (mut dlogits, mut draw) = (vec![0.0; T * s.width], vec![0.0; T * s.width]);
        routed.weights_backward(&dweight, &mut dlogits);
        routed.noise_backward(&linear_logits(x, &s.point[s.range(2)], D), &dlogits, &mut draw);
        for (which, gradient) in [(1, &dlogits), (2, &draw)] {
            let (what, range) = (BLOCKS[which], s.range(which));
            let direction = numbers(60 + which as u64, range.len(), 1.0);
            let mut dual: Vec<Dual> = s.point.iter().map(|&v| Dual::constant(v)).collect();
            dual[range].iter_mut().zip(&direction).for_each(|(v, &d)| v.derivative = d);
            let exact: f64 = s.layouts(&dual, &step)[0].iter().zip(&dy).map(|(y, d)| y.derivative * d).sum();
            // The logits move by x times the direction.
            let found = dot(gradient, &linear_logits(x, &direction, D));
            assert!((found - exact).abs() < 1e-10 * (1.0 + exact.abs()), "{} {what}: {found} {exact}", s.name);
        }
    }
}

#[test]
fn evaluation_draws_no_randomness_for_any_router_noise_and_drop_order() {
    let noises =
        [Noise::None, Noise::Softplus { floor: 0.01 }, Noise::Normal { scale: 1.0 }, Noise::Jitter { eps: 0.1 }];
    let mut trained_differently = 0;
    for s in settings() {
        for noise in noises {
            // Experts without a network have no capacity in evaluation.
            let eval_capacity_factor = if s.zero.is_none() { 0.75 } else { 0.0 };
            let config = RouterConfig { noise, eval_capacity_factor, ..s.config.clone() };
            let Setting { ref name, k, width, zero, ref point, .. } = s;
            let s = Setting { name: name.clone(), config, k, width, zero, point: point.clone() };
            let run = |seed, step, layer, training| {
                let context = StepContext { seed, step, layer, training, first_token: seed % 1000 };
                let mut v = s.point.clone();
                // Jitter is applied by the layer, to the router's copy of the tokens.
                if let Noise::Jitter { eps } = noise {
                    input_jitter(&mut v[..T * D], D, eps, &context);
                }
                s.route(&v, &context)
            };
            assert_eq!(run(1, 1, 1, false), run(0xDEAD_BEEF, 77, 1, false), "{} {noise:?}", s.name);
            assert_eq!(run(1, 1, 1, false), run(1, 1, 2, false), "{} {noise:?}", s.name);
            trained_differently += usize::from(run(1, 1, 1, true) != run(2, 1, 1, true));
        }
    }
    // The same settings do draw in training, so the equality above is not that of routers without randomness.
    assert!(trained_differently > 1500, "{trained_differently}");
}
