//! What holds for every routing, on random inputs: conservation, slots, weight sums, ties, evaluation without randomness,
//! three layouts that agree, and bad input that is refused.

mod common;

use common::numbers;
use mixtura_routing::reference::combine::{combine, combine_dense, combine_padded};
use mixtura_routing::{
    Activation, DropOrder, Noise, Normalize, Policy, RouteShape, Routed, RouterConfig, RouterInput, RoutingError,
    StepContext, route,
};
use proptest::prelude::*;

fn configs() -> impl Strategy<Value = RouterConfig> {
    let activation = prop::sample::select(vec![Activation::Softmax, Activation::SoftmaxSelected, Activation::Sigmoid]);
    let normalize = prop::sample::select(vec![Normalize::Never, Normalize::BeforeDrop, Normalize::AfterDrop]);
    let order = prop::sample::select(vec![DropOrder::TokenMajor, DropOrder::ChoiceMajor]);
    let factor = prop::sample::select(vec![0.0, 0.5, 1.0, 1.25, 2.0]);
    (activation, normalize, order, factor).prop_map(|(activation, normalize, drop_order, capacity_factor)| {
        RouterConfig { activation, normalize, drop_order, capacity_factor, capacity_min: 1, ..RouterConfig::default() }
    })
}

fn routed(logits: &[f64], shape: RouteShape, config: &RouterConfig) -> Routed<f64> {
    route(&RouterInput::new(logits), shape, config, &StepContext::training(1, 2, 3)).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn pairs_are_conserved_and_no_expert_exceeds_its_capacity(
        config in configs(), tokens in 0usize..40, experts in 1usize..12, k in 1usize..12, seed: u64,
    ) {
        let shape = RouteShape { tokens, experts, top_k: k.min(experts) };
        let logits = numbers(seed, tokens * experts, 3.0);
        let r = routed(&logits, shape, &config);
        r.assignment.check().unwrap();
        prop_assert_eq!(r.assignment.rows() + r.assignment.dropped.len(), tokens * shape.top_k);
        if let Some(capacity) = r.capacity {
            prop_assert!(r.assignment.load().iter().all(|&n| n as usize <= capacity));
        }
        let dropped = r.assignment.dropped.len() as f64 / (tokens * shape.top_k).max(1) as f64;
        prop_assert!((r.stats.dropped - dropped).abs() < 1e-12);
    }

    #[test]
    fn normalised_rows_sum_to_one_and_raw_rows_to_at_most_one(
        config in configs(), tokens in 1usize..30, experts in 1usize..10, k in 1usize..10, seed: u64,
    ) {
        let shape = RouteShape { tokens, experts, top_k: k.min(experts) };
        let logits = numbers(seed, tokens * experts, 3.0);
        let r = routed(&logits, shape, &config);
        for (t, row) in r.combine_te().chunks(experts).enumerate() {
            let sum: f64 = row.iter().sum();
            let kept = r.assignment.rows_of_token(t).len();
            let one = config.normalize == Normalize::AfterDrop && kept > 0
                || config.normalize == Normalize::BeforeDrop && kept == shape.top_k;
            if one {
                prop_assert!((sum - 1.0).abs() < 1e-12, "row {} sums to {}", t, sum);
            } else if config.activation != Activation::Sigmoid {
                prop_assert!(sum <= 1.0 + 1e-12);
            }
        }
    }

    #[test]
    fn ragged_padded_and_dense_layers_agree(
        config in configs(), tokens in 1usize..30, experts in 1usize..10, k in 1usize..10, seed: u64,
    ) {
        let shape = RouteShape { tokens, experts, top_k: k.min(experts) };
        let logits = numbers(seed, tokens * experts, 3.0);
        let x = numbers(seed ^ 77, tokens * 3, 1.0);
        let expert = |e: usize, x: &[f64]| x.iter().map(|v| (v * (e as f64 + 0.5)).tanh()).collect::<Vec<_>>();
        let r = routed(&logits, shape, &config);
        let ragged = combine(&x, 3, &r.assignment, &r.weight_n, expert);
        let padded = combine_padded(&x, 3, &r.assignment, &r.weight_n, expert);
        let dense = combine_dense(&x, 3, &r.combine_te(), experts, expert);
        for ((a, b), c) in ragged.iter().zip(&padded).zip(&dense) {
            prop_assert!((a - b).abs() < 1e-12 && (a - c).abs() < 1e-12);
        }
    }

    #[test]
    fn dropless_routing_is_equivariant_in_tokens_and_experts(
        tokens in 1usize..20, experts in 2usize..9, k in 1usize..9, seed: u64,
    ) {
        let shape = RouteShape { tokens, experts, top_k: k.min(experts) };
        let logits = numbers(seed, tokens * experts, 3.0);
        let config = RouterConfig::default();
        let combine = routed(&logits, shape, &config).combine_te();
        let reversed_tokens: Vec<f64> = logits.chunks(experts).rev().flatten().copied().collect();
        let back: Vec<f64> = routed(&reversed_tokens, shape, &config).combine_te().chunks(experts).rev().flatten().copied().collect();
        prop_assert_eq!(&combine, &back);
        let reversed_experts: Vec<f64> = logits.iter().rev().copied().collect();
        let back: Vec<f64> = routed(&reversed_experts, shape, &config).combine_te().into_iter().rev().collect();
        prop_assert!(combine.iter().zip(&back).all(|(a, b)| (a - b).abs() < 1e-12));
    }

    #[test]
    fn evaluation_draws_no_randomness(noise in 0usize..3, tokens in 1usize..20, seed_a: u64, seed_b: u64) {
        let noise = [Noise::Softplus { floor: 0.01 }, Noise::Normal { scale: 1.0 }, Noise::Jitter { eps: 0.1 }][noise];
        let config = RouterConfig { noise, capacity_factor: 1.0, ..RouterConfig::default() };
        let shape = RouteShape { tokens, experts: 5, top_k: 2 };
        let (logits, raw) = (numbers(3, tokens * 5, 1.0), numbers(4, tokens * 5, 1.0));
        let input = RouterInput::new(&logits).with_raw_noise(&raw);
        let run = |seed| route(&input, shape, &config, &StepContext { seed, ..StepContext::evaluation() }).unwrap();
        prop_assert_eq!(run(seed_a), run(seed_b));
    }

    #[test]
    fn f32_and_f64_choose_the_same_experts(tokens in 1usize..30, experts in 1usize..20, k in 1usize..20, seed: u64) {
        let shape = RouteShape { tokens, experts, top_k: k.min(experts) };
        // Multiples of 2^-10 are exact in both precisions.
        let logits: Vec<f64> = numbers(seed, tokens * experts, 3.0).iter().map(|z| (z * 1024.0).round() / 1024.0).collect();
        let single: Vec<f32> = logits.iter().map(|&z| z as f32).collect();
        let double = routed(&logits, shape, &RouterConfig::default());
        let step = StepContext::training(1, 2, 3);
        let single = route(&RouterInput::new(&single), shape, &RouterConfig::default(), &step).unwrap();
        prop_assert_eq!(&double.assignment, &single.assignment);
        prop_assert!(double.weight_n.iter().zip(&single.weight_n).all(|(a, &b)| (a - f64::from(b)).abs() < 1e-6));
    }
}

#[test]
fn padding_chooses_nothing_and_counts_nowhere() {
    let logits = numbers(5, 6 * 4, 2.0);
    let real = [true, false, true, true, false, true];
    let shape = RouteShape { tokens: 6, experts: 4, top_k: 2 };
    let input = RouterInput::new(&logits).with_padding(&real);
    let padded = route(&input, shape, &RouterConfig::default(), &StepContext::evaluation()).unwrap();
    let kept: Vec<f64> = logits.chunks(4).zip(real).filter(|(_, r)| *r).flat_map(|(row, _)| row).copied().collect();
    let alone = routed(&kept, RouteShape { tokens: 4, ..shape }, &RouterConfig::default());
    assert_eq!(padded.assignment.demand, alone.assignment.demand);
    assert_eq!(padded.stats, alone.stats);
    assert!(padded.assignment.rows_of_token(1).is_empty());
}

#[test]
fn zero_tokens_and_one_expert_have_defined_results() {
    let none = routed(&[], RouteShape { tokens: 0, experts: 3, top_k: 2 }, &RouterConfig::default());
    assert_eq!(none.assignment.row_offsets, [0, 0, 0, 0]);
    assert_eq!(none.stats, Default::default());
    let one = routed(&[5.0, -5.0], RouteShape { tokens: 2, experts: 1, top_k: 1 }, &RouterConfig::default());
    assert_eq!(one.weight_n, [1.0, 1.0]);
    assert_eq!(one.probs_te, [1.0, 1.0]);
    assert_eq!((one.stats.load_cv, one.stats.max_over_mean), (0.0, 1.0));
}

fn refused(logits: &[f64], shape: RouteShape, config: &RouterConfig) -> RoutingError {
    route(&RouterInput::new(logits), shape, config, &StepContext::training(0, 0, 0)).unwrap_err()
}

#[test]
fn bad_input_is_refused_with_its_evidence() {
    let shape = RouteShape { tokens: 2, experts: 2, top_k: 1 };
    let plain = RouterConfig::default();
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let error = refused(&[0.0, 1.0, bad, 0.0], shape, &plain);
        assert!(matches!(error, RoutingError::NonFinite { token: 1, expert: 0, .. }), "{error}");
    }
    let error = refused(&[0.0; 4], RouteShape { top_k: 3, ..shape }, &plain);
    assert_eq!(error.to_string(), "top_k = 3 is not possible with 2 experts: expected 1..=2");
    assert!(matches!(refused(&[0.0; 4], RouteShape { top_k: 0, ..shape }, &plain), RoutingError::TopK { .. }));
    assert_eq!(refused(&[], RouteShape { tokens: 0, experts: 0, top_k: 0 }, &plain), RoutingError::NoExperts);
    let error = refused(&[0.0; 3], shape, &plain);
    assert_eq!(error.to_string(), "router logits has 3 values, expected 4 (T=2 E=2 k=1)");
    let huge = RouteShape { tokens: usize::MAX, experts: 2, top_k: 2 };
    assert!(matches!(refused(&[], huge, &plain), RoutingError::TooLarge { .. }));
    let noisy = RouterConfig { noise: Noise::Softplus { floor: 0.0 }, ..plain.clone() };
    assert!(matches!(refused(&[0.0; 4], shape, &noisy), RoutingError::MissingInput { .. }));
    let switch = RouterConfig { policy: Policy::Switch, ..plain.clone() };
    assert!(matches!(refused(&[0.0; 4], RouteShape { top_k: 2, ..shape }, &switch), RoutingError::Config { .. }));
    for factor in [f64::NAN, -1.0, 1e300] {
        let config = RouterConfig { capacity_factor: factor, ..plain.clone() };
        assert!(matches!(refused(&[0.0; 4], shape, &config), RoutingError::Config { .. }), "{factor}");
    }
    let input = RouterInput { capacity: Some(0), ..RouterInput::new(&[0.0; 4]) };
    let error = route(&input, shape, &plain, &StepContext::evaluation()).unwrap_err();
    assert!(error.to_string().starts_with("capacity rounds to 0"));
}

#[test]
fn a_config_file_reads_back_and_refuses_unknown_keys() {
    let text = "policy = \"top_k\"\nnormalize = \"after_drop\"\nnoise = { softplus = { floor = 0.01 } }\ncapacity_factor = 1.25\n";
    let config: RouterConfig = toml::from_str(text).unwrap();
    assert_eq!(config.normalize, Normalize::AfterDrop);
    assert_eq!(config.noise, Noise::Softplus { floor: 0.01 });
    let again: RouterConfig = toml::from_str(&toml::to_string(&config).unwrap()).unwrap();
    assert_eq!(config, again);
    assert!(toml::from_str::<RouterConfig>("topk = 4").unwrap_err().to_string().contains("topk"));
    assert!(
        toml::from_str::<RouterConfig>("normalize = \"sometimes\"").unwrap_err().to_string().contains("after_drop")
    );
    assert!(toml::from_str::<RouterConfig>("noise = { jitter = { epsilon = 0.1 } }").is_err());
}
