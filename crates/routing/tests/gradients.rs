//! Every hand-written gradient against central differences in f64, at random points away from ties.

use mixtura_routing::losses::heterogeneous::{mean_entropy, normalised_widths, parameter_penalty};
use mixtura_routing::losses::{
    AuxiliaryOptions, LoadEstimate, auxiliary, cv_squared, importance, selection_fractions, switch_loss,
};
use mixtura_routing::policy::hierarchical;
use mixtura_routing::zero_cost::{self, ZeroComputation};
use mixtura_routing::{
    Activation, BalanceConfig, BalanceLoss, BalanceScope, Noise, Normalize, Policy, RouteShape, Routed, RouterConfig,
    RouterInput, StepContext, route,
};

const H: f64 = 1e-5;

fn numbers(seed: u64, n: usize, spread: f64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0
    };
    (0..n).map(|_| next() * spread).collect()
}

/// Compares `gradient` with central differences of `value`.
fn check(what: &str, at: &[f64], gradient: &[f64], value: impl Fn(&[f64]) -> f64) {
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

struct Setting {
    shape: RouteShape,
    config: RouterConfig,
    logits: Vec<f64>,
    raw: Vec<f64>,
    eps: Vec<f64>,
    zero: Option<ZeroComputation>,
}

impl Setting {
    fn new(seed: u64, config: RouterConfig) -> Self {
        let shape = RouteShape { tokens: 7, experts: 5, top_k: 1 + (seed as usize % 3) };
        let n = shape.tokens * shape.experts;
        Self {
            shape,
            config,
            logits: numbers(seed, n, 2.0),
            raw: numbers(seed + 99, n, 1.0),
            eps: numbers(seed + 7, n, 2.0),
            zero: None,
        }
    }

    fn input<'a>(&'a self, logits: &'a [f64], raw: &'a [f64]) -> RouterInput<'a, f64> {
        let input = RouterInput::new(logits).with_raw_noise(raw).with_noise(&self.eps);
        RouterInput { zero_computation: self.zero, ..input }
    }

    fn route(&self, logits: &[f64], raw: &[f64]) -> Routed<f64> {
        route(&self.input(logits, raw), self.shape, &self.config, &StepContext::training(1, 1, 1)).unwrap()
    }
}

fn weights_settings() -> Vec<Setting> {
    let mut settings = Vec::new();
    for seed in 1..7 {
        for activation in [Activation::Softmax, Activation::SoftmaxSelected, Activation::Sigmoid] {
            for normalize in [Normalize::Never, Normalize::BeforeDrop, Normalize::AfterDrop] {
                for (capacity_factor, weight_scale) in [(0.0, 1.0), (0.8, 2.5)] {
                    let config = RouterConfig {
                        activation,
                        normalize,
                        capacity_factor,
                        weight_scale,
                        capacity_min: 1,
                        noise: if seed % 2 == 0 { Noise::Softplus { floor: 0.1 } } else { Noise::None },
                        ..RouterConfig::default()
                    };
                    settings.push(Setting::new(seed, config));
                }
            }
        }
    }
    settings
}

#[test]
fn weights_of_kept_rows() {
    for s in weights_settings() {
        let routed = s.route(&s.logits, &s.raw);
        let dweight = numbers(17, routed.assignment.rows(), 1.0);
        let objective = |r: &Routed<f64>| r.weight_n.iter().zip(&dweight).map(|(w, d)| w * d).sum::<f64>();
        let mut dlogits = vec![0.0; s.logits.len()];
        routed.weights_backward(&dweight, &mut dlogits);
        let name = format!("{:?} {:?} k={}", s.config.activation, s.config.normalize, s.shape.top_k);
        check(&name, &s.logits, &dlogits, |logits| objective(&s.route(logits, &s.raw)));
        if routed.noise.is_some() {
            let mut draw = vec![0.0; s.raw.len()];
            routed.noise_backward(&s.raw, &dlogits, &mut draw);
            check(&format!("noise {name}"), &s.raw, &draw, |raw| objective(&s.route(&s.logits, raw)));
        }
    }
}

#[test]
fn auxiliary_losses() {
    for loss in [
        BalanceLoss::None,
        BalanceLoss::Switch,
        BalanceLoss::Importance,
        BalanceLoss::Load,
        BalanceLoss::ImportanceLoad,
    ] {
        for s in weights_settings() {
            let scope = if s.shape.top_k == 2 { BalanceScope::Sequence } else { BalanceScope::Micro };
            let config = BalanceConfig { loss, coefficient: 0.7, scope, z_loss: 0.3, ..BalanceConfig::default() };
            let run = |logits: &[f64], raw: &[f64]| {
                let routed = s.route(logits, raw);
                auxiliary(
                    &s.input(logits, raw),
                    &routed,
                    &config,
                    AuxiliaryOptions { sequence: 7, ..Default::default() },
                )
                .unwrap()
            };
            let here = run(&s.logits, &s.raw);
            let name = format!("{loss:?} {:?} {:?}", s.config.activation, s.config.normalize);
            check(&name, &s.logits, &here.dlogits_te, |logits| run(logits, &s.raw).total);
            if let Some(draw) = here.draw_noise_te {
                check(&format!("noise {name}"), &s.raw, &draw, |raw| run(&s.logits, raw).total);
            }
        }
    }
}

/// Two levels of three groups of three, with and without noise: weights and every loss, for both levels.
#[test]
fn two_levels() {
    let shape = RouteShape { tokens: 8, experts: 9, top_k: 4 };
    for (seed, noise) in [(1, Noise::None), (2, Noise::Softplus { floor: 0.1 }), (3, Noise::Softplus { floor: 0.0 })] {
        let config = RouterConfig {
            policy: Policy::Hierarchical { groups: 3, keep: 2 },
            activation: Activation::SoftmaxSelected,
            weight_scale: 1.5,
            noise,
            ..RouterConfig::default()
        };
        let n = shape.tokens * config.logits_per_token(shape.experts);
        assert_eq!(n, 8 * 12);
        let s = Setting {
            shape,
            config,
            logits: numbers(seed, n, 2.0),
            raw: numbers(seed + 9, n, 1.0),
            eps: numbers(seed + 7, n, 2.0),
            zero: None,
        };
        let routed = s.route(&s.logits, &s.raw);
        assert!(routed.weight_of_pair.chunks(4).all(|w| (w.iter().sum::<f64>() - 1.5).abs() < 1e-12));
        assert!(routed.probs_te.chunks(9).all(|p| (p.iter().sum::<f64>() - 1.0).abs() < 1e-12));
        let dweight = numbers(17, routed.assignment.rows(), 1.0);
        let objective = |r: &Routed<f64>| r.weight_n.iter().zip(&dweight).map(|(w, d)| w * d).sum::<f64>();
        let mut dlogits = vec![0.0; n];
        routed.weights_backward(&dweight, &mut dlogits);
        check("two-level weights", &s.logits, &dlogits, |logits| objective(&s.route(logits, &s.raw)));
        for loss in [BalanceLoss::Switch, BalanceLoss::Importance, BalanceLoss::Load, BalanceLoss::ImportanceLoad] {
            let config =
                BalanceConfig { loss, coefficient: 0.7, z_loss: 0.3, entropy: 0.2, ..BalanceConfig::default() };
            let run = |logits: &[f64], raw: &[f64]| {
                let routed = s.route(logits, raw);
                auxiliary(&s.input(logits, raw), &routed, &config, AuxiliaryOptions::default()).unwrap()
            };
            let here = run(&s.logits, &s.raw);
            check(&format!("two-level {loss:?}"), &s.logits, &here.dlogits_te, |logits| run(logits, &s.raw).total);
            if let Some(draw) = here.draw_noise_te.filter(|_| routed.noise.is_some()) {
                check(&format!("two-level noise {loss:?}"), &s.raw, &draw, |raw| run(&s.logits, raw).total);
            }
        }
    }
}

/// The two-level load is the golden formula of the flat estimates of its two levels.
#[test]
fn the_load_of_two_levels_is_the_product_of_its_estimates() {
    let shape = RouteShape { tokens: 8, experts: 9, top_k: 4 };
    let policy = Policy::Hierarchical { groups: 3, keep: 2 };
    let noise = Noise::Softplus { floor: 0.1 };
    let config = RouterConfig { policy, activation: Activation::SoftmaxSelected, noise, ..RouterConfig::default() };
    let n = 8 * 12;
    let s = Setting {
        shape,
        config,
        logits: numbers(5, n, 2.0),
        raw: numbers(6, n, 1.0),
        eps: numbers(7, n, 2.0),
        zero: None,
    };
    let routed = s.route(&s.logits, &s.raw);
    let draw = routed.noise.as_ref().unwrap();
    let cut = |values: &[f64], tokens: &[usize], columns: std::ops::Range<usize>| -> Vec<f64> {
        tokens.iter().flat_map(|t| values[t * 12..(t + 1) * 12][columns.clone()].to_vec()).collect()
    };
    let estimate = |tokens: &[usize], columns: std::ops::Range<usize>| {
        let part = |values| cut(values, tokens, columns.clone());
        LoadEstimate::new(&part(&s.logits), &part(&draw.logits_te), &part(&draw.sd_te), 3, 2).unwrap().load_e
    };
    let all: Vec<usize> = (0..8).collect();
    let primary = estimate(&all, 9..12);
    let (mut secondary, mut sizes) = (Vec::new(), Vec::new());
    for i in 0..3 {
        let reached: Vec<usize> =
            all.iter().copied().filter(|&t| routed.choices.of_token(t).iter().any(|e| *e as usize / 3 == i)).collect();
        secondary.extend(estimate(&reached, 3 * i..3 * i + 3));
        sizes.push(reached.len());
    }
    let expected = cv_squared(&hierarchical::load(&primary, &secondary, &sizes, 3));
    let config = BalanceConfig { loss: BalanceLoss::Load, ..BalanceConfig::default() };
    let found = auxiliary(&s.input(&s.logits, &s.raw), &routed, &config, AuxiliaryOptions::default()).unwrap().balance;
    assert!((found - expected).abs() < 1e-12, "{found} vs {expected}");
}

/// Experts without a network, experts of different widths, and the entropy: values against the references, and gradients.
#[test]
fn costs_per_expert_and_entropy() {
    let zero = ZeroComputation { constant: 1, copy: 0, zero: 1, gamma: 0.8, ..ZeroComputation::default() };
    for (zero, renorm) in [(None, false), (Some(zero), false), (Some(zero), true)] {
        for s in weights_settings()
            .into_iter()
            .filter(|s| s.config.capacity_factor == 0.0 && s.config.activation == Activation::Softmax)
        {
            let zero = zero.map(|zero| ZeroComputation { renorm_after_zero: renorm, ..zero });
            let s = Setting { zero, ..s };
            let run = |logits: &[f64], raw: &[f64]| s.route(logits, raw);
            let routed = run(&s.logits, &s.raw);
            let dweight = numbers(17, routed.assignment.rows(), 1.0);
            let objective = |r: &Routed<f64>| r.weight_n.iter().zip(&dweight).map(|(w, d)| w * d).sum::<f64>();
            let mut dlogits = vec![0.0; s.logits.len()];
            routed.weights_backward(&dweight, &mut dlogits);
            let name = format!("{:?} {renorm} k={}", s.config.normalize, s.shape.top_k);
            check(&name, &s.logits, &dlogits, |logits| objective(&run(logits, &s.raw)));

            let width_e = [9.0, 11.0, 13.0, 15.0, 17.0];
            for loss in [BalanceLoss::Switch, BalanceLoss::ParameterPenalty] {
                let balance =
                    BalanceConfig { loss, coefficient: 0.7, z_loss: 0.0, entropy: 0.3, ..BalanceConfig::default() };
                let options = AuxiliaryOptions { width_e: Some(&width_e), ..AuxiliaryOptions::default() };
                let run = |logits: &[f64]| {
                    auxiliary(&s.input(logits, &s.raw), &run(logits, &s.raw), &balance, options).unwrap()
                };
                let here = run(&s.logits);
                check(&format!("{loss:?} {name}"), &s.logits, &here.dlogits_te, |logits| run(logits).total);
                let fraction = selection_fractions(&routed.choices, 5, 7);
                let mean: Vec<f64> = importance(&routed.probs_te, 5).iter().map(|p| p / 7.0).collect();
                let expected = match (loss, zero) {
                    (BalanceLoss::Switch, None) => switch_loss(&fraction, &mean, s.shape.top_k),
                    (BalanceLoss::Switch, Some(zero)) => zero_cost::balance_loss(&fraction, &mean, 3, zero.tau),
                    _ => parameter_penalty(&fraction, &mean, &normalised_widths(&width_e)),
                };
                assert!((here.balance - expected).abs() < 1e-12, "{loss:?}: {} vs {expected}", here.balance);
                assert!((here.entropy - mean_entropy(&routed.probs_te, 5)).abs() < 1e-12);
            }
        }
    }
}

/// Capacities by kind, exact, and the released code's weights.
#[test]
fn experts_without_a_network_have_their_own_capacity_and_weights() {
    let zero = ZeroComputation { constant: 1, copy: 1, zero: 1, tau: 0.75, gamma: 1.1, ..ZeroComputation::default() };
    // 1.1 * 0.75 * 2 * 40 / (0.75 * 4 + 3) = 11, and 14.67.
    assert_eq!(zero.slots(40, 7, 2, 1).unwrap(), [11, 11, 11, 11, 15, 15, 15]);
    assert_eq!(ZeroComputation { gamma: 0.0, ..zero }.slots(40, 7, 2, 1), None);
    let equal = ZeroComputation { tau: 1.0, gamma: 1.25, ..zero };
    assert_eq!(equal.slots(100, 8, 2, 1).unwrap(), [32; 8], "the capacity of equal experts");
    let shape = RouteShape { tokens: 40, experts: 7, top_k: 2 };
    let logits = numbers(3, 40 * 7, 1.5);
    let raw = RouterConfig { normalize: Normalize::Never, capacity_min: 1, ..RouterConfig::default() };
    let run = |zero, step: &StepContext| {
        let input = RouterInput { zero_computation: Some(zero), ..RouterInput::new(&logits) };
        route(&input, shape, &raw, step).unwrap()
    };
    let trained = run(zero, &StepContext::training(1, 1, 1));
    let load = trained.assignment.load();
    assert!(load[..4].iter().all(|n| *n <= 11) && load[4..].iter().all(|n| *n <= 15), "{load:?}");
    assert!(!trained.assignment.dropped.is_empty());
    let evaluated = run(zero, &StepContext::evaluation());
    assert!(evaluated.assignment.dropped.is_empty(), "evaluation drops nothing");
    let renormalised = run(ZeroComputation { renorm_after_zero: true, ..zero }, &StepContext::evaluation());
    let expected = zero_cost::renormalise_after_zero(&evaluated.combine_te(), 7, |e| e == 6);
    for (found, expected) in renormalised.combine_te().iter().zip(expected) {
        assert!((found - expected).abs() < 1e-12);
    }
    let with = |router: RouterConfig| zero.validate(4, &router).unwrap_err().to_string();
    assert!(with(RouterConfig { capacity_factor: 1.0, ..raw.clone() }).contains("gamma sets the capacities"));
    assert!(with(RouterConfig { policy: Policy::Base, ..raw.clone() }).contains("top_k, switch"));
    assert!(zero.validate(0, &raw).is_err());
}

#[test]
fn one_expert_has_balance_loss_one_and_no_gradient() {
    let logits = [0.3, -1.2];
    let shape = RouteShape { tokens: 2, experts: 1, top_k: 1 };
    let input = RouterInput::new(&logits);
    let routed = route(&input, shape, &RouterConfig::switch(), &StepContext::evaluation()).unwrap();
    let config = BalanceConfig { coefficient: 1.0, z_loss: 0.0, ..BalanceConfig::default() };
    let aux = auxiliary(&input, &routed, &config, AuxiliaryOptions::default()).unwrap();
    assert_eq!((aux.balance, aux.dlogits_te), (1.0, vec![0.0, 0.0]));
}
