//! Every hand-written gradient against central differences in f64, at random points away from ties.

use mixtura_routing::losses::{AuxiliaryOptions, auxiliary};
use mixtura_routing::{
    Activation, BalanceConfig, BalanceLoss, BalanceScope, Noise, Normalize, RouteShape, Routed, RouterConfig,
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
        }
    }

    fn input<'a>(&'a self, logits: &'a [f64], raw: &'a [f64]) -> RouterInput<'a, f64> {
        RouterInput::new(logits).with_raw_noise(raw).with_noise(&self.eps)
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
