//! Outside data never panics: it gets a typed error with its evidence, or the value that is defined for it. Every recipe and
//! every drop order meets NaN, infinities, k > E, no tokens, one expert, wrong lengths, capacity 0, broken saved choices.

mod common;

use common::{ORDERS, draws, numbers, recipes};
use mixtura_routing::reference::golden::{GoldenError, GoldenFile, Status};
use mixtura_routing::zero_cost::ZeroComputation;
use mixtura_routing::{
    AuxiliaryOptions, BalanceConfig, BalanceLoss, BalanceScope, Choices, Noise, Policy, RouteShape, RouterConfig,
    RouterInput, RoutingError, StepContext, auxiliary, route, route_choices,
};

const T: usize = 6;
const E: usize = 8;

/// Everything a router may look at.
#[derive(Clone)]
struct Inputs {
    logits: Vec<f64>,
    raw: Vec<f64>,
    eps: Vec<f64>,
    bias: Vec<f64>,
    x: Vec<f64>,
    thresholds: Vec<f64>,
    given: Vec<u32>,
    real: Vec<bool>,
    zero: Option<ZeroComputation>,
}

impl Inputs {
    fn good(tokens: usize, experts: usize, k: usize, width: usize, zero: Option<ZeroComputation>) -> Self {
        Self {
            logits: numbers(1, tokens * width, 2.0),
            raw: numbers(2, tokens * width, 1.0),
            eps: numbers(3, tokens * width, 1.0),
            bias: numbers(4, experts, 0.1),
            x: numbers(5, tokens * 3, 1.0),
            thresholds: vec![0.1; experts],
            given: (0..tokens * k).map(|p| (p % experts) as u32).collect(),
            real: vec![true; tokens],
            zero,
        }
    }

    fn view(&self) -> RouterInput<'_, f64> {
        RouterInput { zero_computation: self.zero, ..RouterInput::new(&self.logits) }
            .with_raw_noise(&self.raw)
            .with_noise(&self.eps)
            .with_bias(&self.bias)
            .with_tokens(&self.x)
            .with_thresholds(&self.thresholds)
            .with_given(&self.given)
            .with_padding(&self.real)
    }
}

/// Every recipe with k, logits per token and experts without a network, in every drop order.
fn routers(experts: usize) -> Vec<(RouterConfig, usize, usize, Option<ZeroComputation>)> {
    let mut routers = Vec::new();
    for recipe in recipes(experts) {
        for (config, zero) in ORDERS.into_iter().filter_map(|order| recipe.with_capacity(0.75, order)) {
            routers.push((config, recipe.k, recipe.width, zero));
        }
    }
    routers
}

const STEPS: [StepContext; 2] = [StepContext::training(1, 1, 1), StepContext::evaluation()];

#[test]
fn scores_that_are_not_finite_are_refused_with_their_place() {
    for (config, k, width, zero) in routers(E) {
        let shape = RouteShape { tokens: T, experts: E, top_k: k };
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for which in 0..6 {
                let mut inputs = Inputs::good(T, E, k, width, zero);
                match which {
                    0 => inputs.logits[2 * width + 5] = bad,
                    1 => inputs.raw[2 * width + 5] = bad,
                    2 => inputs.eps[2 * width + 5] = bad,
                    3 => inputs.bias[5] = bad,
                    4 => inputs.thresholds[5] = bad,
                    _ => inputs.x[2 * 3 + 1] = bad,
                }
                for step in STEPS {
                    match route(&inputs.view(), shape, &config, &step) {
                        Err(RoutingError::NonFinite { token, expert, value, .. }) => {
                            let place = if which < 3 {
                                (2, 5)
                            } else if which < 5 {
                                (0, 5)
                            } else {
                                (2, 0)
                            };
                            assert_eq!((token, expert), place, "{which}");
                            assert!(value == bad || value.is_nan() == bad.is_nan());
                        }
                        other => panic!("{config:?} input {which}: {other:?}"),
                    }
                }
            }
        }
    }
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    for (config, k, width, zero) in routers(E) {
        let shape = RouteShape { tokens: T, experts: E, top_k: k };
        for which in 0..8 {
            let mut inputs = Inputs::good(T, E, k, width, zero);
            match which {
                0 => drop(inputs.logits.pop()),
                1 => inputs.raw.push(0.0),
                2 => inputs.eps.clear(),
                3 => inputs.bias.push(0.0),
                4 => drop(inputs.thresholds.pop()),
                5 => drop(inputs.x.pop()),
                6 => drop(inputs.given.pop()),
                _ => inputs.real.push(true),
            }
            let error = route(&inputs.view(), shape, &config, &STEPS[0]).unwrap_err();
            assert!(matches!(error, RoutingError::Length { .. }), "input {which}: {error}");
        }
        let mut inputs = Inputs::good(T, E, k, width, zero);
        inputs.given[0] = E as u32;
        let error = route(&inputs.view(), shape, &config, &STEPS[0]).unwrap_err();
        assert_eq!(error, RoutingError::NoSuchExpert { expert: E as u32, experts: E });
    }
}

#[test]
fn extreme_but_finite_scores_route() {
    for (config, k, width, zero) in routers(E) {
        let shape = RouteShape { tokens: T, experts: E, top_k: k };
        for scale in [0.0, 1e-300, 1e4, 1e15] {
            let mut inputs = Inputs::good(T, E, k, width, zero);
            inputs.logits.iter_mut().for_each(|z| *z *= scale);
            for step in STEPS {
                let routed = route(&inputs.view(), shape, &config, &step).unwrap();
                routed.assignment.check().unwrap();
                assert!(routed.weight_n.iter().all(|w| w.is_finite()), "{config:?} scale {scale}");
                let stats = [routed.stats.load_cv, routed.stats.token_entropy, routed.stats.logit_rms, routed.stats.z];
                assert!(stats.iter().all(|s| s.is_finite()), "{config:?} scale {scale}: {stats:?}");
            }
        }
    }
}

#[test]
fn choices_and_experts_that_do_not_go_together_are_refused() {
    for (config, k, width, zero) in routers(E) {
        for (experts, top_k) in [(E, 0), (E, E + 1), (1, 2), (0, 0), (0, 1), (3, usize::MAX)] {
            let inputs = Inputs::good(0, experts.max(1), 1, width, zero);
            let error =
                route(&inputs.view(), RouteShape { tokens: 0, experts, top_k }, &config, &STEPS[0]).unwrap_err();
            assert!(
                matches!(error, RoutingError::TopK { .. } | RoutingError::NoExperts),
                "E={experts} k={top_k}: {error}"
            );
            assert!(error.to_string().contains(&experts.to_string()), "{error}");
        }
        // A huge number of tokens is refused before anything is allocated.
        let inputs = Inputs::good(T, E, k, width, zero);
        for tokens in [usize::MAX, usize::MAX / E, 1 << 40] {
            let error = route(&inputs.view(), RouteShape { tokens, experts: E, top_k: k }, &config, &STEPS[0]);
            assert!(matches!(error, Err(RoutingError::TooLarge { .. })), "T={tokens}");
        }
    }
    for groups in [0, 3, 5, 16] {
        let config = RouterConfig { policy: Policy::GroupLimited { groups, keep: 1 }, ..RouterConfig::default() };
        assert_eq!(config.validate(E, 1), Err(RoutingError::Groups { groups, experts: E }));
    }
}

#[test]
fn zero_tokens_route_to_nothing_and_lose_nothing() {
    for (config, k, width, zero) in routers(E) {
        let shape = RouteShape { tokens: 0, experts: E, top_k: k };
        let inputs = Inputs::good(0, E, k, width, zero);
        for step in STEPS {
            let routed = route(&inputs.view(), shape, &config, &step).unwrap();
            assert_eq!((routed.assignment.rows(), routed.choices.tokens(), routed.stats), (0, 0, Default::default()));
            routed.weights_backward(&[], &mut []);
            for loss in [BalanceLoss::Switch, BalanceLoss::ImportanceLoad] {
                for scope in [BalanceScope::Micro, BalanceScope::Sequence] {
                    let balance = BalanceConfig { loss, scope, coefficient: 1.0, ..BalanceConfig::default() };
                    let aux = auxiliary(&inputs.view(), &routed, &balance, AuxiliaryOptions::default()).unwrap();
                    assert_eq!(aux.total, 0.0);
                }
            }
        }
    }
}

#[test]
fn padding_everywhere_is_like_no_tokens() {
    for (config, k, width, zero) in routers(E) {
        let shape = RouteShape { tokens: T, experts: E, top_k: k };
        let inputs = Inputs { real: vec![false; T], ..Inputs::good(T, E, k, width, zero) };
        for step in STEPS {
            let routed = route(&inputs.view(), shape, &config, &step).unwrap();
            assert_eq!(routed.assignment.rows(), 0, "{config:?}");
            assert_eq!(routed.stats, Default::default());
            let balance = BalanceConfig { coefficient: 1.0, ..BalanceConfig::default() };
            let aux = auxiliary(&inputs.view(), &routed, &balance, AuxiliaryOptions::default()).unwrap();
            assert!(aux.total == 0.0 && aux.dlogits_te.iter().all(|d| *d == 0.0), "{config:?}");
        }
    }
}

#[test]
fn one_expert_has_probability_one_loss_one_and_no_gradient() {
    for (config, ..) in routers(E).into_iter().filter(|(c, ..)| c.validate(1, 1).is_ok()) {
        let config = RouterConfig { capacity_factor: 0.0, ..config };
        let inputs = Inputs { thresholds: vec![-1.0], ..Inputs::good(T, 1, 1, 1, None) };
        let shape = RouteShape { tokens: T, experts: 1, top_k: 1 };
        for step in STEPS {
            let routed = route(&inputs.view(), shape, &config, &step).unwrap();
            if config.activation.is_softmax() {
                assert_eq!(routed.probs_te, [1.0; T], "{config:?}");
                assert_eq!(routed.assignment.rows(), T, "{config:?}");
                let balance = BalanceConfig { coefficient: 1.0, z_loss: 0.0, ..BalanceConfig::default() };
                let aux = auxiliary(&inputs.view(), &routed, &balance, AuxiliaryOptions::default()).unwrap();
                assert!((aux.balance - 1.0).abs() < 1e-12 && aux.dlogits_te.iter().all(|d| *d == 0.0), "{config:?}");
                let mut dlogits = [0.0; T];
                routed.weights_backward(&[1.0; T], &mut dlogits);
                assert!(dlogits.iter().all(|d| d.abs() < 1e-15), "{config:?}");
            }
        }
    }
}

#[test]
fn capacity_zero_is_refused_and_a_capacity_of_any_size_works() {
    for (config, k, width, zero) in routers(E) {
        let shape = RouteShape { tokens: T, experts: E, top_k: k };
        let inputs = Inputs::good(T, E, k, width, zero);
        let with = |capacity| RouterInput { capacity: Some(capacity), ..inputs.view() };
        let error = route(&with(0), shape, &config, &STEPS[0]).unwrap_err();
        assert!(matches!(error, RoutingError::ZeroCapacity { .. }), "{error}");
        for capacity in [1, 5, 1 << 20, usize::MAX] {
            route(&with(capacity), shape, &config, &STEPS[0]).unwrap().assignment.check().unwrap();
        }
        for factor in [f64::NAN, f64::INFINITY, -0.5, 1e9] {
            let config = RouterConfig { capacity_factor: factor, ..config.clone() };
            let error = route(&inputs.view(), shape, &config, &STEPS[0]).unwrap_err();
            assert!(matches!(error, RoutingError::Config { key: "capacity_factor", .. }), "{factor}: {error}");
        }
    }
}

#[test]
fn saved_choices_that_do_not_fit_are_refused() {
    let logits = numbers(1, 2 * 3, 1.0);
    let shape = RouteShape { tokens: 2, experts: 3, top_k: 2 };
    let run = |token_offsets: Vec<u32>, experts: Vec<u32>, slots: Option<Vec<u32>>| {
        let choices = Choices { token_offsets, experts };
        route_choices(&RouterInput::new(&logits), shape, &RouterConfig::default(), choices, slots).map(drop)
    };
    assert_eq!(run(vec![0, 2, 4], vec![0, 1, 2, 0], None), Ok(()));
    assert_eq!(run(vec![0, 0, 3], vec![0, 1, 2], Some(vec![0, 1, 2])), Ok(()), "lists of any length");
    for offsets in
        [vec![], vec![0], vec![0, 9, 4], vec![1, 2, 4], vec![0, 2, 3], vec![0, 2, u32::MAX], vec![0, 1, 2, 4]]
    {
        let error = run(offsets.clone(), vec![0, 1, 2, 0], None).unwrap_err();
        assert!(matches!(error, RoutingError::Config { .. } | RoutingError::Length { .. }), "{offsets:?}: {error}");
    }
    assert_eq!(run(vec![0, 2, 4], vec![0, 1, 3, 0], None), Err(RoutingError::NoSuchExpert { expert: 3, experts: 3 }));
    assert_eq!(run(vec![0, 2, 4], vec![0, 1, 2, 2], None), Err(RoutingError::RepeatedExpert { token: 1, expert: 2 }));
    assert!(matches!(run(vec![0, 2, 4], vec![0, 1, 2, 0], Some(vec![0])), Err(RoutingError::Length { .. })));
    let none = RouteShape { tokens: 0, experts: 0, top_k: 0 };
    let choices = Choices::rectangular(0, 0, vec![]);
    let error = route_choices(&RouterInput::<f64>::new(&[]), none, &RouterConfig::default(), choices, None);
    assert_eq!(error.unwrap_err(), RoutingError::NoExperts);
}

#[test]
fn refusals_of_settings_read_as_expectations() {
    let with = |config: RouterConfig| config.validate(E, 2).unwrap_err().to_string();
    let base = RouterConfig::default();
    let messages = [
        with(RouterConfig { weight_scale: 0.0, ..base.clone() }),
        with(RouterConfig { capacity_multiple: 0, ..base.clone() }),
        with(RouterConfig { noise: Noise::Jitter { eps: 1.0 }, ..base.clone() }),
        with(RouterConfig { policy: Policy::Switch, ..base.clone() }),
        with(RouterConfig { policy: Policy::TopP { mass: 0.0 }, ..base.clone() }),
        with(RouterConfig { policy: Policy::Relu, ..base.clone() }),
        with(RouterConfig { policy: Policy::GroupLimited { groups: 4, keep: 5 }, ..base.clone() }),
        with(RouterConfig { policy: Policy::ExpertChoiceCapped { cap: 0 }, ..base }),
    ];
    for message in messages {
        assert!(message.starts_with("router setting "), "{message}");
        assert_eq!(message.matches("expected").count(), 1, "{message}");
    }
}

/// Every field of every case of the published file, left out in turn; every id misspelt; every kind of value where a number
/// should be.
#[test]
fn golden_files_with_a_missing_field_or_an_unknown_id_say_so() {
    use serde_json::{Value, json};
    let root: Value = serde_json::from_str(include_str!("../../../fixtures/golden.json")).unwrap();
    let cases = root["cases"].as_array().unwrap();
    let fixture = cases.iter().find(|c| c["id"] == "F1").unwrap();
    let mut left_out = 0;
    for case in cases {
        let id = case["id"].as_str().unwrap();
        for part in ["inputs", "expected"] {
            for key in case[part].as_object().unwrap().keys() {
                let mut changed = case.clone();
                changed[part].as_object_mut().unwrap().remove(key);
                // A case may take what it lacks from F1.
                let cases = if id == "F1" { vec![changed] } else { vec![changed, fixture.clone()] };
                let report = GoldenFile::parse(&json!({ "cases": cases }).to_string()).unwrap().check_case(id).unwrap();
                let found = &report.cases[0];
                if found.status == Status::Skipped
                    || (part == "inputs" && fixture["inputs"].get(key).is_some() && id != "F1")
                {
                    continue;
                }
                assert_eq!(found.status, Status::Failed, "{id} without {part}.{key}");
                assert!(found.message.contains(key), "{id} without {part}.{key}: {}", found.message);
                left_out += 1;
            }
        }
        let mut renamed = case.clone();
        renamed["id"] = json!(format!("{id}x"));
        let report = GoldenFile::parse(&json!({"cases": [renamed]}).to_string()).unwrap().check();
        assert_eq!(report.cases[0].message, format!("unknown case id; nearest known id is {id}"));
        for part in ["id", "inputs", "expected", "tol"] {
            let mut changed = case.clone();
            changed.as_object_mut().unwrap().remove(part);
            let error = GoldenFile::parse(&json!({"cases": [changed]}).to_string()).unwrap_err();
            assert!(
                matches!(&error, GoldenError::Missing { field, .. } if field == part),
                "{id} without {part}: {error}"
            );
        }
    }
    assert!(left_out > 250, "{left_out}");
}

#[test]
fn no_prefix_and_no_flipped_byte_of_a_golden_file_panics() {
    let text = include_str!("../../../fixtures/golden.json");
    let stream = draws(1);
    for i in 0..200 {
        let cut = stream.bits(i, 0)[0] as usize % text.len();
        assert!(GoldenFile::parse(&text[..cut]).is_err());
        let mut bytes = text.as_bytes().to_vec();
        bytes[cut] = (stream.bits(i, 1)[0] % 128) as u8;
        if let Ok(text) = String::from_utf8(bytes)
            && let Ok(file) = GoldenFile::parse(&text)
        {
            let ids: Vec<String> = file.ids().filter(|id| *id != "D7.causality").map(String::from).collect();
            ids.iter().for_each(|id| drop(file.check_case(id).unwrap()));
        }
    }
}
