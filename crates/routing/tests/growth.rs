//! How the time of every policy and drop order grows: linear in tokens and at most E log E in experts, but for the ones whose
//! cost is stated. Coarse on purpose: sixteen times as many may take LIMIT times the expected factor, a quadratic one takes
//! more.

mod common;

use common::{Recipe, numbers, recipes};
use mixtura_routing::catalogue::explain;
use mixtura_routing::zero_cost::ZeroComputation;
use mixtura_routing::{
    DropOrder, Policy, RouteShape, RouterConfig, RouterInput, StepContext, auxiliary, route, select::top_k,
};
use std::hint::black_box;
use std::time::Instant;

/// Of the expected factor, which is at most 37: a quadratic growth is one of 256.
const LIMIT: f64 = 4.5;

/// Fastest of seven runs, in seconds.
fn fastest(mut run: impl FnMut()) -> f64 {
    let mut times = (0..7).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    times.by_ref().fold(f64::INFINITY, f64::min)
}

fn time_of(
    router: &(RouterConfig, Option<ZeroComputation>),
    tokens: usize,
    experts: usize,
    k: usize,
    width: usize,
) -> f64 {
    let (config, zero_computation) = router;
    let logits: Vec<f32> = numbers(3, tokens * width, 2.0).into_iter().map(|z| z as f32).collect();
    let x: Vec<f32> = numbers(4, tokens * 2, 1.0).into_iter().map(|z| z as f32).collect();
    let given: Vec<u32> = (0..tokens * k).map(|p| (p % experts) as u32).collect();
    let shape = RouteShape { tokens, experts, top_k: k };
    let input = RouterInput::new(&logits).with_raw_noise(&logits).with_tokens(&x).with_given(&given);
    let input = RouterInput { zero_computation: *zero_computation, ..input };
    let step = StepContext::training(1, 1, 1);
    let balance = mixtura_routing::BalanceConfig::default();
    fastest(|| {
        let routed = route(black_box(&input), shape, config, &step).unwrap();
        black_box(auxiliary(&input, &routed, &balance, Default::default()).unwrap());
    })
}

/// A slow neighbour may spoil a measurement, so five tries; a quadratic policy fails all of them.
fn check_growth(what: &str, expected: f64, mut ratio: impl FnMut() -> f64) {
    let mut found = Vec::new();
    for _ in 0..5 {
        found.push(ratio());
        if found[found.len() - 1] < LIMIT * expected {
            println!("{what:40} {:6.1} (expected {expected:.1})", found[found.len() - 1]);
            return;
        }
    }
    panic!("{what}: sixteen times as much takes {found:?} times as long, expected {expected:.1}");
}

#[test]
fn no_policy_is_worse_than_tokens_times_experts_log_experts() {
    let orders = [
        DropOrder::TokenMajor,
        DropOrder::ChoiceMajor,
        DropOrder::Random,
        DropOrder::Score,
        DropOrder::BatchPriority,
        DropOrder::BatchPrioritySum,
    ];
    for (small, large) in recipes(8).into_iter().zip(recipes(128)) {
        // Their cost is stated: an assignment problem, and a hundred passes with a repair.
        if matches!(small.config.policy, Policy::Base | Policy::ExpertChoiceCapped { .. }) {
            let cost = explain::find(small.name).unwrap().cost;
            assert!(cost.contains(" s at T4096 E64"), "{}: {cost}", small.name);
            continue;
        }
        for drop_order in orders {
            if drop_order != DropOrder::TokenMajor && small.name != "top_k" {
                continue; // Drop orders do not depend on the policy.
            }
            let name = format!("{} {drop_order:?}", small.name);
            let with = |recipe: &Recipe| recipe.with_capacity(1.0, drop_order).expect("an order that every recipe has");
            let (few, many) = (with(&small), with(&large));
            // A token's cost includes log T where tokens are sorted by priority.
            check_growth(&format!("{name}, tokens"), 16.0 * 13.0 / 9.0, || {
                time_of(&few, 8192, 8, small.k, small.width) / time_of(&few, 512, 8, small.k, small.width)
            });
            check_growth(&format!("{name}, experts"), 16.0 * 7.0 / 3.0, || {
                time_of(&many, 256, 128, large.k, large.width) / time_of(&few, 256, 8, small.k, small.width)
            });
        }
    }
}

#[test]
fn selecting_every_expert_costs_a_sort_and_not_a_square() {
    let rows: Vec<f32> = numbers(5, 64 * 1024, 2.0).into_iter().map(|z| z as f32).collect();
    let wide: Vec<f64> = rows.iter().map(|&z| f64::from(z)).collect();
    check_growth("k = E, f32", 16.0 * 10.0 / 6.0, || {
        // The same number of scores, in rows of 64 and of 1024: 16 times the experts on a 16th of the tokens.
        16.0 * fastest(|| drop(black_box(top_k(black_box(&rows), 1024, 1024))))
            / fastest(|| drop(black_box(top_k(black_box(&rows), 64, 64))))
    });
    check_growth("k = E, f64", 16.0 * 10.0 / 6.0, || {
        16.0 * fastest(|| drop(black_box(top_k(black_box(&wide), 1024, 1024))))
            / fastest(|| drop(black_box(top_k(black_box(&wide), 64, 64))))
    });
}
