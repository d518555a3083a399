//! What must hold in frequency or over many steps: random token selection, sampled second choices, the load estimator, the
//! loss-free bias, the ReLU controller.

mod common;

use common::numbers;
use mixtura_routing::activation::softmax;
use mixtura_routing::losses::{LoadEstimate, bias_update, relu_controller};
use mixtura_routing::stats::RoutingStats;
use mixtura_routing::{
    Activation, DropOrder, Normalize, Policy, Purpose, RouteShape, RouterConfig, RouterInput, StepContext, route,
};

#[test]
fn random_token_selection_keeps_each_token_equally_often() {
    // Ten tokens all want expert 0, which has three slots.
    let logits: Vec<f64> = (0..10).flat_map(|_| [1.0, 0.0]).collect();
    let shape = RouteShape { tokens: 10, experts: 2, top_k: 1 };
    let config = RouterConfig { drop_order: DropOrder::Random, ..RouterConfig::default() };
    let input = RouterInput { capacity: Some(3), ..RouterInput::new(&logits) };
    let mut kept = [0.0f64; 10];
    for seed in 0..1000 {
        let routed = route(&input, shape, &config, &StepContext::training(seed, 0, 0)).unwrap();
        routed.assignment.token_of_row.iter().for_each(|&t| kept[t as usize] += 1.0);
    }
    let sigma = (1000.0f64 * 0.3 * 0.7).sqrt();
    assert!(kept.iter().all(|k| (k - 300.0).abs() < 4.0 * sigma), "{kept:?}");
}

#[test]
fn sampled_second_choices_follow_the_softmax_over_the_others() {
    let logits = [2.0, 0.5, 1.0, -0.5];
    let shape = RouteShape { tokens: 1, experts: 4, top_k: 2 };
    let config = RouterConfig { policy: Policy::SampledSecond, ..RouterConfig::default() };
    let mut counts = [0.0f64; 4];
    for seed in 0..4000 {
        let routed = route(&RouterInput::new(&logits), shape, &config, &StepContext::training(seed, 0, 0)).unwrap();
        assert_eq!(routed.choices.experts[0], 0);
        counts[routed.choices.experts[1] as usize] += 1.0 / 4000.0;
    }
    let mut expected = [0.0f64; 3];
    softmax(&logits[1..], &mut expected);
    for (found, p) in counts[1..].iter().zip(expected) {
        assert!((found - p).abs() < 4.0 * (p * (1.0 - p) / 4000.0f64).sqrt(), "{counts:?}");
    }
}

#[test]
fn the_load_estimate_is_the_frequency_of_selection_under_fresh_noise() {
    let (experts, k, draws) = (5, 2, 20_000);
    let clean = numbers(3, experts, 1.0);
    let sd: Vec<f64> = numbers(4, experts, 0.3).iter().map(|v| v + 0.5).collect();
    let step = StepContext::training(1, 0, 0);
    let stream = step.stream(Purpose::LogitNoise).unwrap();
    let noisy: Vec<f64> = (0..experts).map(|e| clean[e] + sd[e] * stream.normal(0, e)).collect();
    let estimate = LoadEstimate::new(&clean, &noisy, &sd, experts, k).unwrap();
    for e in 0..experts {
        // Redraw expert e's noise only; it is selected if it beats the k-th of the others.
        let mut others: Vec<f64> = (0..experts).filter(|i| *i != e).map(|i| noisy[i]).collect();
        others.sort_by(|a, b| b.total_cmp(a));
        let wins = (1..=draws).filter(|&t| clean[e] + sd[e] * stream.normal(t, e) > others[k - 1]).count();
        let (found, p) = (wins as f64 / f64::from(draws as u32), estimate.probability_te[e]);
        assert!((found - p).abs() < 4.0 * (p * (1.0 - p) / draws as f64).sqrt() + 1e-4, "expert {e}: {found} {p}");
    }
}

/// A fixed skewed sigmoid router, logits N(0, 1) + linspace(-1, 1), balanced by the bias alone.
#[test]
fn the_loss_free_bias_balances_a_skewed_router() {
    let (tokens, experts) = (4096, 16);
    let step = StepContext::training(5, 0, 0);
    let stream = step.stream(Purpose::LogitNoise).unwrap();
    let skew = |e: usize| -1.0 + 2.0 * e as f64 / (experts - 1) as f64;
    let logits: Vec<f32> =
        (0..tokens * experts).map(|i| (stream.normal(i / experts, i % experts) + skew(i % experts)) as f32).collect();
    let config = RouterConfig { activation: Activation::Sigmoid, ..RouterConfig::default() };
    let shape = RouteShape { tokens, experts, top_k: 2 };
    let mut bias = vec![0.0f32; experts];
    let (mut worst_late, mut first_even) = (0.0f64, None);
    for update in 0..1200 {
        let routed = route(&RouterInput::new(&logits).with_bias(&bias), shape, &config, &step).unwrap();
        let worst = routed.stats.max_over_mean;
        if update == 0 {
            assert!(worst > 2.5, "the router starts unbalanced: {worst}");
        }
        first_even = first_even.or((worst <= 1.1).then_some(update));
        if update >= 400 {
            worst_late = worst_late.max(worst);
        }
        let load: Vec<f64> = routed.assignment.demand.iter().map(|&c| f64::from(c)).collect();
        bias_update(&mut bias, &load, 0.001);
    }
    assert!(first_even.is_some_and(|n| n <= 400), "max/mean load first at most 1.1 after {first_even:?} updates");
    assert!(worst_late <= 1.15, "largest max/mean load after 400 updates: {worst_late}");
}

#[test]
fn the_relu_controller_steers_sparsity_to_its_target() {
    // Gates relu(z - lambda * 1e7): a stand-in for training, in which the penalty lowers every logit.
    let z = numbers(9, 2048, 2.0);
    let mut lambda = 1e-8;
    let mut sparsity = 0.0;
    for _ in 0..200 {
        sparsity = z.iter().filter(|v| **v - lambda * 1e7 <= 0.0).count() as f64 / z.len() as f64;
        lambda = relu_controller(lambda, 1.2, sparsity, 8, 2);
        assert!(lambda.is_finite() && lambda > 0.0);
    }
    assert!((sparsity - 0.75).abs() < 0.1, "{sparsity}");
    assert_eq!(relu_controller(1e-8, 1.2, 0.75, 8, 2), 1e-8, "unchanged at the target");
}

#[test]
fn with_k_equal_to_e_the_layer_is_the_dense_mixture() {
    let logits = numbers(6, 5 * 3, 2.0);
    let x = numbers(7, 5 * 2, 1.0);
    let shape = RouteShape { tokens: 5, experts: 3, top_k: 3 };
    let config = RouterConfig { activation: Activation::SoftmaxSelected, ..RouterConfig::default() };
    let routed = route(&RouterInput::new(&logits), shape, &config, &StepContext::evaluation()).unwrap();
    let expert = |e: usize, x: &[f64]| x.iter().map(|v| v.powi(e as i32 + 1)).collect::<Vec<_>>();
    let y = mixtura_routing::reference::combine::combine(&x, 2, &routed.assignment, &routed.weight_n, expert);
    let dense = mixtura_routing::reference::combine::combine_dense(&x, 2, &routed.probs_te, 3, expert);
    assert!(y.iter().zip(&dense).all(|(a, b)| (a - b).abs() < 1e-12));
}

#[test]
fn adding_a_constant_changes_the_z_loss_but_not_a_softmax_router() {
    let logits = numbers(8, 6 * 4, 1.0);
    let moved: Vec<f64> = logits.iter().map(|z| z + 3.0).collect();
    let shape = RouteShape { tokens: 6, experts: 4, top_k: 2 };
    for (activation, invariant) in [(Activation::Softmax, true), (Activation::Sigmoid, false)] {
        let config = RouterConfig { activation, normalize: Normalize::Never, ..RouterConfig::default() };
        let run =
            |logits: &[f64]| route(&RouterInput::new(logits), shape, &config, &StepContext::evaluation()).unwrap();
        let (a, b) = (run(&logits), run(&moved));
        assert_eq!(a.assignment, b.assignment);
        assert_eq!(a.weight_n.iter().zip(&b.weight_n).all(|(a, b)| (a - b).abs() < 1e-12), invariant);
        assert!((a.stats.z - b.stats.z).abs() > 1.0);
    }
}

#[test]
fn load_statistics_have_their_known_values() {
    let even = RoutingStats::from_load(&[4, 4, 4, 4]);
    assert_eq!((even.load_cv, even.max_over_mean, even.dead, even.entropy), (0.0, 1.0, 0.0, 1.0));
    let one = RoutingStats::from_load(&[8, 0, 0, 0]);
    assert_eq!((one.load_cv, one.max_over_mean, one.dead, one.entropy), (3f64.sqrt(), 4.0, 0.75, 0.0));
}
