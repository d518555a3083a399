//! Every recipe of the manual through the same properties: conservation, three layouts that agree, gradients, evaluation
//! without randomness, padding, and what is refused.

mod common;

use common::{ORDERS, Recipe, check_gradient, numbers, recipes};
use mixtura_routing::catalogue::explain::all;
use mixtura_routing::reference::combine::{combine, combine_dense, combine_padded, weight_gradient};
use mixtura_routing::zero_cost::ZeroComputation;
use mixtura_routing::{
    Activation, DropOrder, Policy, RouteShape, Routed, RouterConfig, RouterInput, RoutingError, SecondChoice,
    StepContext, route,
};

const TOKENS: usize = 12;
const EXPERTS: usize = 8;
const WIDTH: usize = 3;

struct Setting {
    name: &'static str,
    config: RouterConfig,
    k: usize,
    logits: Vec<f64>,
    raw: Vec<f64>,
    x: Vec<f64>,
    bias: Vec<f64>,
    thresholds: Vec<f64>,
    given: Vec<u32>,
    zero: Option<ZeroComputation>,
}

impl Setting {
    fn input<'a>(&'a self, logits: &'a [f64]) -> RouterInput<'a, f64> {
        let input = RouterInput::new(logits)
            .with_raw_noise(&self.raw)
            .with_tokens(&self.x)
            .with_thresholds(&self.thresholds)
            .with_given(&self.given);
        let input = RouterInput { zero_computation: self.zero, ..input };
        if matches!(self.config.policy, Policy::GroupLimited { .. }) { input.with_bias(&self.bias) } else { input }
    }

    fn shape(&self) -> RouteShape {
        RouteShape { tokens: TOKENS, experts: EXPERTS, top_k: self.k }
    }

    fn route_at(&self, logits: &[f64], step: &StepContext) -> Routed<f64> {
        route(&self.input(logits), self.shape(), &self.config, step).unwrap()
    }

    fn route(&self) -> Routed<f64> {
        self.route_at(&self.logits, &StepContext::training(3, 1, 4))
    }
}

/// Every recipe, in every drop order when it drops, at capacities that bind.
fn settings() -> Vec<Setting> {
    let mut settings = Vec::new();
    for (seed, recipe) in (1..).zip(recipes(EXPERTS)) {
        let Recipe { name, k, width, .. } = recipe;
        let scores = TOKENS * width;
        for (capacity_factor, drop_order) in [(0.0, DropOrder::TokenMajor)].into_iter().chain(ORDERS.map(|o| (0.75, o)))
        {
            let Some((config, zero)) = recipe.with_capacity(capacity_factor, drop_order) else { continue };
            settings.push(Setting {
                name,
                zero,
                config,
                k,
                logits: numbers(seed, scores, 2.0),
                raw: numbers(seed + 50, scores, 1.0),
                x: numbers(seed + 60, TOKENS * WIDTH, 1.0),
                bias: numbers(seed + 70, EXPERTS, 0.1),
                thresholds: vec![0.15; EXPERTS],
                given: (0..TOKENS * k).map(|p| ((p * 7) % EXPERTS) as u32).collect(),
            });
        }
    }
    assert!(settings.len() > 200);
    settings
}

fn expert(e: usize, x: &[f64]) -> Vec<f64> {
    x.iter().map(|v| (v * (e as f64 + 0.5)).tanh() + 0.1).collect()
}

#[test]
fn rows_are_conserved_and_fit_their_capacity() {
    for s in settings() {
        let r = s.route();
        r.assignment.check().unwrap();
        assert_eq!(r.assignment.rows() + r.assignment.dropped.len(), r.choices.pairs(), "{}", s.name);
        let owns_capacity =
            matches!(s.config.policy, Policy::ExpertChoice | Policy::ExpertChoiceCapped { .. } | Policy::Batchwise);
        if let Some(capacity) = r.capacity.filter(|_| !owns_capacity) {
            let slots = s.zero.and_then(|zero| zero.slots(TOKENS, EXPERTS, s.k, 1));
            let slots = slots.unwrap_or_else(|| vec![capacity; EXPERTS]);
            assert!(
                r.assignment.load().iter().zip(slots).all(|(&n, slots)| n as usize <= slots),
                "{} {:?}",
                s.name,
                s.config.drop_order
            );
        }
        for t in 0..TOKENS {
            let mut experts = r.choices.of_token(t).to_vec();
            experts.sort_unstable();
            experts.dedup();
            let repeats = r.choices.of_token(t).len() - experts.len();
            assert_eq!(repeats, 0, "{}: token {t} chose an expert twice", s.name);
        }
    }
}

#[test]
fn ragged_padded_and_dense_layers_agree_for_every_router() {
    for s in settings() {
        let r = s.route();
        let ragged = combine(&s.x, WIDTH, &r.assignment, &r.weight_n, expert);
        let padded = combine_padded(&s.x, WIDTH, &r.assignment, &r.weight_n, expert);
        let dense = combine_dense(&s.x, WIDTH, &r.combine_te(), EXPERTS, expert);
        for ((a, b), c) in ragged.iter().zip(&padded).zip(&dense) {
            assert!((a - b).abs() < 1e-12 && (a - c).abs() < 1e-12, "{}", s.name);
        }
    }
}

#[test]
fn layer_gradients_for_the_logits_match_finite_differences_for_every_router() {
    for s in settings() {
        let r = s.route();
        let dy = numbers(5, s.x.len(), 1.0);
        let dweight = weight_gradient(&s.x, &dy, WIDTH, &r.assignment, expert);
        let mut dlogits = vec![0.0; s.logits.len()];
        r.weights_backward(&dweight, &mut dlogits);
        let name = format!("{} {:?}", s.name, s.config.drop_order);
        check_gradient(&name, &s.logits, &dlogits, |logits| {
            let moved = s.route_at(logits, &StepContext::training(3, 1, 4));
            assert_eq!(moved.choices, r.choices, "{name}: the point is too close to a tie");
            let y = combine(&s.x, WIDTH, &moved.assignment, &moved.weight_n, expert);
            y.iter().zip(&dy).map(|(y, d)| y * d).sum()
        });
    }
}

#[test]
fn evaluation_draws_no_randomness_for_any_router() {
    for s in settings() {
        let eval_capacity_factor = if s.zero.is_none() { 0.75 } else { 0.0 };
        let s = Setting { config: RouterConfig { eval_capacity_factor, ..s.config.clone() }, ..s };
        let run = |seed, step| s.route_at(&s.logits, &StepContext { seed, step, ..StepContext::evaluation() });
        assert_eq!(run(1, 1), run(0xDEAD_BEEF, 77), "{}", s.name);
    }
}

#[test]
fn padding_never_takes_part() {
    let mut real = [true; TOKENS];
    real[0] = false;
    real[7] = false;
    for s in settings() {
        let input = s.input(&s.logits).with_padding(&real);
        let r = route(&input, s.shape(), &s.config, &StepContext::training(3, 1, 4)).unwrap();
        r.assignment.check().unwrap();
        assert!(r.assignment.token_of_row.iter().all(|&t| real[t as usize]), "{}", s.name);
    }
}

#[test]
fn expert_choice_and_base_are_perfectly_balanced() {
    for s in settings() {
        let load = s.route().choices.demand(EXPERTS);
        match s.config.policy {
            Policy::ExpertChoice => assert!(load.iter().all(|&n| n as usize == TOKENS * s.k / EXPERTS)),
            Policy::Base => {
                assert!(load.iter().all(|&n| n as usize == TOKENS / EXPERTS || n as usize == TOKENS / EXPERTS + 1))
            }
            Policy::ExpertChoiceCapped { cap } => {
                let r = s.route();
                assert!((0..TOKENS).all(|t| r.choices.of_token(t).len() <= cap));
                // The greedy repair may leave a slot empty; it never adds one.
                assert!(load.iter().all(|&n| n as usize <= TOKENS * s.k / EXPERTS));
            }
            _ => {}
        }
    }
}

#[test]
fn zero_tokens_route_to_nothing() {
    for s in settings() {
        let shape = RouteShape { tokens: 0, ..s.shape() };
        let empty = RouterInput { zero_computation: s.zero, ..RouterInput::new(&[]) }
            .with_raw_noise(&[])
            .with_tokens(&[])
            .with_thresholds(&s.thresholds)
            .with_given(&[]);
        let r = route(&empty, shape, &s.config, &StepContext::training(1, 1, 1)).unwrap();
        assert_eq!((r.assignment.rows(), r.choices.tokens()), (0, 0), "{}", s.name);
    }
}

#[test]
fn one_expert_takes_every_token() {
    for s in settings().iter().filter(|s| s.k == 1 || s.config.validate(1, 1).is_ok()) {
        let logits = numbers(1, TOKENS, 1.0);
        let config = RouterConfig { capacity_factor: 0.0, ..s.config.clone() };
        let given = [0; TOKENS];
        let input = RouterInput::new(&logits).with_raw_noise(&logits).with_tokens(&s.x).with_given(&given);
        let shape = RouteShape { tokens: TOKENS, experts: 1, top_k: 1 };
        if config.validate(1, 1).is_ok() && config.policy != Policy::Relu {
            let r = route(&input, shape, &config, &StepContext::training(1, 1, 1)).unwrap();
            assert_eq!(r.assignment.rows(), TOKENS, "{}", s.name);
        }
    }
}

#[test]
fn the_bias_selects_but_never_weighs() {
    let logits = numbers(4, TOKENS * EXPERTS, 1.0);
    let mut bias = vec![0.0; EXPERTS];
    bias[5] = 10.0;
    let config = RouterConfig { activation: Activation::Sigmoid, ..RouterConfig::default() };
    let shape = RouteShape { tokens: TOKENS, experts: EXPERTS, top_k: 2 };
    let r = route(&RouterInput::new(&logits).with_bias(&bias), shape, &config, &StepContext::evaluation()).unwrap();
    for t in 0..TOKENS {
        assert_eq!(r.choices.of_token(t)[0], 5);
        let [a, b] = r.choices.of_token(t) else { panic!("two choices") };
        let (s, o) = (r.probs_te[t * EXPERTS + *a as usize], r.probs_te[t * EXPERTS + *b as usize]);
        assert!((r.weight_of_pair[2 * t] - s / (s + o)).abs() < 1e-12);
    }
}

#[test]
fn settings_without_meaning_are_refused() {
    let config = |policy| RouterConfig { policy, ..RouterConfig::default() };
    let reason = |config: RouterConfig, k| config.validate(EXPERTS, k).unwrap_err();
    assert_eq!(
        reason(config(Policy::GroupLimited { groups: 3, keep: 1 }), 1),
        RoutingError::Groups { groups: 3, experts: EXPERTS }
    );
    assert!(
        reason(config(Policy::GroupLimited { groups: 4, keep: 1 }), 3)
            .to_string()
            .contains("expected groups that hold top_k = 3")
    );
    assert!(
        reason(config(Policy::GroupLimited { groups: 4, keep: 5 }), 2)
            .to_string()
            .contains("expected 1 to 4, the number of groups")
    );
    assert!(reason(config(Policy::TopP { mass: 1.5 }), 2).to_string().contains("0 < mass <= 1"));
    assert!(reason(config(Policy::Relu), 2).to_string().contains("activation = \"relu\""));
    assert!(reason(config(Policy::ExpertChoiceCapped { cap: 0 }), 2).to_string().contains("at least 1"));
    assert!(
        reason(config(Policy::Gshard { second: SecondChoice::All }), 3)
            .to_string()
            .contains("expected top_k = 2, found top_k = 3")
    );
    assert!(reason(config(Policy::Gshard { second: SecondChoice::Threshold(0.0) }), 2).to_string().contains("> 0"));
    assert!(reason(RouterConfig::noisy_top_k(), 1).to_string().contains("no gradient"));
    let logits = [0.0; 4];
    let shape = RouteShape { tokens: 2, experts: 2, top_k: 1 };
    for policy in [Policy::Hash, Policy::Batchwise] {
        let error = route(&RouterInput::new(&logits), shape, &config(policy), &StepContext::evaluation()).unwrap_err();
        assert!(matches!(error, RoutingError::MissingInput { .. }), "{error}");
    }
    let given = [0, 9];
    let input = RouterInput::new(&logits).with_given(&given);
    let error = route(&input, shape, &config(Policy::Hash), &StepContext::evaluation()).unwrap_err();
    assert_eq!(error.to_string(), "expert 9 was chosen, but there are 2 experts");
}

#[test]
fn policies_read_back_from_their_file_form() {
    for entry in all() {
        if let Some(config) = entry.recipe.router {
            let text = toml::to_string(&config).unwrap();
            assert_eq!(toml::from_str::<RouterConfig>(&text).unwrap(), config, "{text}");
        }
    }
    let text = "policy = { group_limited = { groups = 8, keep = 4 } }\nactivation = \"sigmoid\"";
    let config: RouterConfig = toml::from_str(text).unwrap();
    assert_eq!(config.policy, Policy::GroupLimited { groups: 8, keep: 4 });
    assert!(toml::from_str::<RouterConfig>("policy = { top_p = { mas = 0.5 } }").is_err());
}
