//! Every loss against central differences in f64, for the layer's inputs, the gate and the noise weights, away from ties.
//!
//! | loss | test |
//! | --- | --- |
//! | switch (micro, per sequence, with global counts), importance, load, both, z, ReMoE's L_reg | `losses_of_the_layer_...` |
//! | batchwise thresholds | `the_threshold_loss_...` |
//! | HMoE penalty and entropy, MoE++ balance, device balance | `losses_for_experts_that_differ_...` |
//! | MoS distillation | `distillation_...` |

mod common;

use common::{check_gradient, numbers};
use mixtura_routing::activation::softmax_rows;
use mixtura_routing::losses::heterogeneous::{
    mean_entropy, mean_entropy_backward, normalised_widths, parameter_penalty, parameter_penalty_backward,
};
use mixtura_routing::losses::{device_loss, device_loss_backward, selection_fractions, switch_loss};
use mixtura_routing::policy::{batchwise, top_p};
use mixtura_routing::residual::{distillation, distillation_backward};
use mixtura_routing::scorers::linear_logits;
use mixtura_routing::select::top_k;
use mixtura_routing::zero_cost;
use mixtura_routing::{
    Activation, Auxiliary, AuxiliaryOptions, BalanceConfig, BalanceLoss, BalanceScope, Choices, Noise, Normalize,
    Policy, RouteShape, RouterConfig, RouterInput, StepContext, auxiliary, route,
};

const T: usize = 8;
const D: usize = 3;
const E: usize = 5;

/// x `[T, d]`, gate `[d, E]`, noise weights `[d, E]` in one vector: the point of every check.
fn point(seed: u64) -> Vec<f64> {
    numbers(seed, T * D + 2 * D * E, 1.2)
}

fn split(v: &[f64]) -> (&[f64], &[f64], &[f64]) {
    let (x, rest) = v.split_at(T * D);
    let (gate, noise) = rest.split_at(D * E);
    (x, gate, noise)
}

/// The chain rule through `logits = x W`, `raw = x Wn`, to the point.
fn through_the_scorer(v: &[f64], dlogits: &[f64], draw: Option<&[f64]>) -> Vec<f64> {
    let (x, gate, noise) = split(v);
    let mut gradient = vec![0.0; v.len()];
    let zero = vec![0.0; dlogits.len()];
    for (weights, at, d) in [(gate, T * D, dlogits), (noise, T * D + D * E, draw.unwrap_or(&zero))] {
        for t in 0..T {
            for i in 0..D {
                for e in 0..E {
                    gradient[t * D + i] += d[t * E + e] * weights[i * E + e];
                    gradient[at + i * E + e] += d[t * E + e] * x[t * D + i];
                }
            }
        }
    }
    gradient
}

struct Case {
    router: RouterConfig,
    balance: BalanceConfig,
    k: usize,
    global: Option<Vec<f64>>,
    biased: bool,
}

impl Case {
    fn run(&self, v: &[f64]) -> (Auxiliary<f64>, Choices) {
        let (x, gate, noise) = split(v);
        let (logits, raw) = (linear_logits(x, gate, D), linear_logits(x, noise, D));
        let eps = numbers(99, T * E, 2.0);
        let bias = numbers(98, E, 0.3);
        let mut input = RouterInput::new(&logits).with_raw_noise(&raw).with_noise(&eps);
        if self.biased {
            input = input.with_bias(&bias);
        }
        let shape = RouteShape { tokens: T, experts: E, top_k: self.k };
        let routed = route(&input, shape, &self.router, &StepContext::training(1, 1, 1)).unwrap();
        let of_four = AuxiliaryOptions { sequence: 4, ..AuxiliaryOptions::default() };
        let options = AuxiliaryOptions { global_fraction_e: self.global.as_deref(), ..of_four };
        (auxiliary(&input, &routed, &self.balance, options).unwrap(), routed.choices)
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let relu = RouterConfig { policy: Policy::Relu, normalize: Normalize::Never, ..RouterConfig::default() };
    for activation in [
        Activation::Softmax,
        Activation::SoftmaxSelected,
        Activation::Sigmoid,
        Activation::SqrtSoftplus,
        Activation::Relu,
    ] {
        for (noise, normalize) in [
            (Noise::None, Normalize::Never),
            (Noise::None, Normalize::BeforeDrop),
            (Noise::Softplus { floor: 0.01 }, Normalize::BeforeDrop),
            (Noise::Normal { scale: 1.0 }, Normalize::Never),
        ] {
            for (k, capacity_factor) in [(1, 0.0), (2, 0.0), (3, 0.6)] {
                let base = if activation == Activation::Relu { relu.clone() } else { RouterConfig::default() };
                let normalize = if activation == Activation::Relu { Normalize::Never } else { normalize };
                let router =
                    RouterConfig { activation, noise, normalize, capacity_factor, capacity_min: 1, ..base.clone() };
                for loss in
                    [BalanceLoss::Switch, BalanceLoss::Importance, BalanceLoss::Load, BalanceLoss::ImportanceLoad]
                {
                    for scope in [BalanceScope::Micro, BalanceScope::Sequence, BalanceScope::Global] {
                        if loss != BalanceLoss::Switch && scope != BalanceScope::Micro {
                            continue;
                        }
                        let balance =
                            BalanceConfig { loss, coefficient: 0.7, scope, z_loss: 0.0, ..BalanceConfig::default() };
                        let global = (scope == BalanceScope::Global).then(|| vec![0.1, 0.5, 0.2, 0.9, 0.3]);
                        let biased = activation == Activation::Sigmoid && scope == BalanceScope::Sequence;
                        cases.push(Case { router: router.clone(), balance, k, global, biased });
                    }
                }
                let balance = BalanceConfig { loss: BalanceLoss::None, z_loss: 0.9, ..BalanceConfig::default() };
                cases.push(Case { router: router.clone(), balance, k, global: None, biased: false });
            }
        }
    }
    assert!(cases.len() > 400);
    cases
}

#[test]
fn losses_of_the_layer_have_exact_gradients_for_inputs_gate_and_noise_weights() {
    let mut moved_noise = 0;
    for (i, case) in cases().into_iter().enumerate() {
        let v = point(100 + i as u64 % 3);
        let (here, choices) = case.run(&v);
        let gradient = through_the_scorer(&v, &here.dlogits_te, here.draw_noise_te.as_deref());
        let name = format!("{:?} {:?} {:?} k={}", case.balance.loss, case.balance.scope, case.router, case.k);
        check_gradient(&name, &v, &gradient, |v| {
            let (value, found) = case.run(v);
            assert_eq!(found, choices, "{name}: too close to a tie");
            value.total
        });
        let noise_part = &gradient[T * D + D * E..];
        moved_noise += usize::from(noise_part.iter().any(|g| g.abs() > 1e-6));
    }
    assert!(moved_noise > 30, "the noise weights take part: {moved_noise}");
}

#[test]
fn losses_have_their_defining_values() {
    for case in cases() {
        let v = point(100);
        let (x, gate, _) = split(&v);
        let logits = linear_logits(x, gate, D);
        let (found, choices) = case.run(&v);
        if case.balance.loss == BalanceLoss::None {
            let lse = |row: &[f64]| row.iter().map(|z| z.exp()).sum::<f64>().ln();
            let z = logits.chunks(E).map(|row| lse(row).powi(2)).sum::<f64>() / T as f64;
            assert!((found.total - 0.9 * z).abs() < 1e-12);
        } else if case.balance.loss == BalanceLoss::Switch {
            // (E/k) sum f P over 8 tokens, over the given f, or over two sequences of 4.
            let part = |first: usize, n: usize| {
                let (mut f, mut p) = (vec![0.0; E], vec![0.0; E]);
                for t in first..first + n {
                    let z = &logits[t * E..(t + 1) * E];
                    let gates: Vec<f64> = z
                        .iter()
                        .map(|&z| match case.router.activation {
                            Activation::Sigmoid => 1.0 / (1.0 + (-z).exp()),
                            Activation::SqrtSoftplus => (1.0 + z.exp()).ln().sqrt(),
                            Activation::Relu => z.max(0.0),
                            _ => z.exp(),
                        })
                        .collect();
                    let total = if case.router.activation == Activation::Relu { 1.0 } else { gates.iter().sum() };
                    let chosen = if case.biased { top_k(z, E, case.k) } else { choices.of_token(t).to_vec() };
                    for e in 0..E {
                        p[e] += gates[e] / total / n as f64;
                        f[e] += if chosen.contains(&(e as u32)) { 1.0 / n as f64 } else { 0.0 };
                    }
                }
                switch_loss(case.global.as_ref().unwrap_or(&f), &p, case.k)
            };
            let expected = match case.balance.scope {
                BalanceScope::Sequence => (part(0, 4) + part(4, 4)) / 2.0,
                _ => part(0, T),
            };
            assert!((found.balance - expected).abs() < 1e-12, "{:?}: {} {expected}", case.router, found.balance);
        }
    }
}

#[test]
fn padding_and_an_empty_sequence_do_not_dilute_the_sequence_loss() {
    let logits = numbers(5, T * E, 2.0);
    let real = [true, true, true, false, false, false, false, false];
    let balance = BalanceConfig { coefficient: 1.0, scope: BalanceScope::Sequence, ..BalanceConfig::default() };
    let value = |tokens: usize, real: Option<&[bool]>, sequence: usize| {
        let input = RouterInput { real_t: real, ..RouterInput::new(&logits[..tokens * E]) };
        let shape = RouteShape { tokens, experts: E, top_k: 2 };
        let routed = route(&input, shape, &RouterConfig::default(), &StepContext::evaluation()).unwrap();
        auxiliary(&input, &routed, &balance, AuxiliaryOptions { sequence, ..Default::default() }).unwrap()
    };
    let (padded, alone) = (value(T, Some(&real), 4), value(3, None, 3));
    assert!((padded.balance - alone.balance).abs() < 1e-12 && (padded.z - alone.z).abs() < 1e-12);
    assert_eq!(padded.dlogits_te[3 * E..], [0.0; 5 * E], "padding gets no gradient");
    let nothing = value(T, Some(&[false; T]), 4);
    assert_eq!((nothing.balance, nothing.z, nothing.total), (0.0, 0.0, 0.0));
}

#[test]
fn the_threshold_loss_has_exact_gradients_for_thresholds_only() {
    for trial in 0..20 {
        let mut probs = vec![0.0; T * E];
        softmax_rows(&numbers(200 + trial, T * E, 2.0), E, &mut probs, &mut [0.0; T]);
        let thresholds: Vec<f64> = numbers(300 + trial, E, 0.1).iter().map(|t| t + 0.2).collect();
        let batch = numbers(400 + trial, T * E, 1.0).iter().map(|v| f64::from(u8::from(*v > 0.2))).collect::<Vec<_>>();
        let run = |th: &[f64]| {
            let above = batchwise::mask(&batchwise::above_thresholds(&probs, th), E);
            batchwise::threshold_loss(&probs, th, &batch, &above)
        };
        check_gradient("thresholds", &thresholds, &run(&thresholds).1, |th| run(th).0);
    }
}

/// Losses of `fraction_e` and the router's probabilities: value and gradient for x and gate through the softmax.
fn check_probability_loss(
    what: &str,
    value: impl Fn(&[f64], &[f64]) -> f64,
    backward: impl Fn(&[f64], &[f64]) -> Vec<f64>,
) {
    for (seed, policy) in [(1, None), (2, Some(0.6)), (3, None), (4, Some(0.8))] {
        let v = point(500 + seed);
        let run = |v: &[f64]| {
            let (x, gate, _) = split(v);
            let mut probs = vec![0.0; T * E];
            softmax_rows(&linear_logits(x, gate, D), E, &mut probs, &mut [0.0; T]);
            let choices = match policy {
                None => Choices::rectangular(T, 2, top_k(&probs, E, 2)),
                Some(mass) => top_p::select(&probs, E, mass),
            };
            (selection_fractions(&choices, E, T), probs)
        };
        let (fraction, probs) = run(&v);
        let gradient = through_the_scorer(&v, &backward(&fraction, &probs), None);
        check_gradient(what, &v, &gradient, |v| {
            let (found, probs) = run(v);
            assert_eq!(found, fraction, "{what}: too close to a tie");
            value(&fraction, &probs)
        });
    }
}

fn mean_of(probs: &[f64]) -> Vec<f64> {
    (0..E).map(|e| probs.iter().skip(e).step_by(E).sum::<f64>() / T as f64).collect()
}

#[test]
fn losses_for_experts_that_differ_have_exact_gradients() {
    let widths = [9.0, 11.0, 13.0, 15.0, 17.0];
    let even = normalised_widths(&widths);
    for h in [&widths[..], &even] {
        check_probability_loss(
            "HMoE parameter penalty",
            |f, p| parameter_penalty(f, &mean_of(p), h),
            |f, p| parameter_penalty_backward(f, h, p),
        );
    }
    check_probability_loss("HMoE entropy", |_, p| mean_entropy(p, E), |_, p| mean_entropy_backward(p, E));
    check_probability_loss(
        "MoE++ balance",
        |f, p| zero_cost::balance_loss(f, &mean_of(p), 3, 0.75),
        |f, p| zero_cost::balance_loss_backward(f, p, 3, 0.75),
    );
    let devices = [vec![0, 1], vec![2], vec![3, 4]];
    check_probability_loss(
        "device balance",
        |f, p| device_loss(f, &mean_of(p), 2, &devices),
        |f, p| device_loss_backward(f, p, 2, &devices),
    );
}

#[test]
fn the_entropy_term_lowers_entropy_when_it_is_minimised_and_the_printed_sign_raises_it() {
    let mut logits = numbers(7, T * E, 1.0);
    let probs = |z: &[f64]| {
        let mut p = vec![0.0; T * E];
        softmax_rows(z, E, &mut p, &mut [0.0; T]);
        p
    };
    let before = mean_entropy(&probs(&logits), E);
    let step = mean_entropy_backward(&probs(&logits), E);
    // One descent step on -sum P ln P; the sign printed in the paper would step the other way.
    let against: Vec<f64> = logits.iter().zip(&step).map(|(z, g)| z + 0.1 * g).collect();
    logits.iter_mut().zip(&step).for_each(|(z, g)| *z -= 0.1 * g);
    assert!(mean_entropy(&probs(&logits), E) < before && mean_entropy(&probs(&against), E) > before);
    assert_eq!(mean_entropy_backward(&[1.0, 0.0], 2), [0.0, 0.0], "certain rows have no gradient, not NaN");
}

#[test]
fn equal_widths_give_the_classical_loss_times_k_and_the_width() {
    let mut p = vec![0.0; T * E];
    softmax_rows(&numbers(8, T * E, 2.0), E, &mut p, &mut [0.0; T]);
    let f = selection_fractions(&Choices::rectangular(T, 2, top_k(&p, E, 2)), E, T);
    let classical = switch_loss(&f, &mean_of(&p), 2);
    assert!((parameter_penalty(&f, &mean_of(&p), &[7.0; E]) - 7.0 * 2.0 * classical).abs() < 1e-12);
}

#[test]
fn distillation_has_exact_gradients_for_the_student() {
    let (rows, classes) = (4, 6);
    let (student, teacher) = (numbers(31, rows * classes, 2.0), numbers(32, rows * classes, 2.0));
    let labels = [1, 0, 5, 3];
    let (dce, dkl) = distillation_backward(&student, &teacher, &labels, classes);
    check_gradient("cross-entropy", &student, &dce, |s| distillation(s, &teacher, &labels, classes).0);
    check_gradient("divergence", &student, &dkl, |s| distillation(s, &teacher, &labels, classes).1);
    let same = distillation_backward(&teacher, &teacher, &labels, classes).1;
    assert!(same.iter().all(|d| d.abs() < 1e-15), "a student equal to its teacher is at the minimum");
}

#[test]
fn every_loss_of_no_tokens_is_zero() {
    let balance = BalanceConfig { coefficient: 1.0, z_loss: 1.0, ..BalanceConfig::default() };
    for loss in [BalanceLoss::Switch, BalanceLoss::Importance, BalanceLoss::Load, BalanceLoss::ImportanceLoad] {
        for scope in [BalanceScope::Micro, BalanceScope::Sequence, BalanceScope::Global] {
            let input = RouterInput::<f64>::new(&[]).with_raw_noise(&[]);
            let shape = RouteShape { tokens: 0, experts: 3, top_k: 2 };
            let config = RouterConfig::noisy_top_k();
            let routed = route(&input, shape, &config, &StepContext::training(1, 1, 1)).unwrap();
            let balance = BalanceConfig { loss, scope, ..balance.clone() };
            let aux = auxiliary(&input, &routed, &balance, AuxiliaryOptions::default()).unwrap();
            assert_eq!((aux.total, aux.z, aux.dlogits_te.len()), (0.0, 0.0, 0), "{loss:?} {scope:?}");
        }
    }
    assert_eq!(mean_entropy(&[], 3), 0.0);
    assert!(mean_entropy_backward(&[], 3).is_empty());
    assert!(parameter_penalty_backward(&[0.0; 3], &[1.0; 3], &[]).is_empty());
    assert_eq!(distillation(&[], &[], &[], 3), (0.0, 0.0));
}
