//! Prints the time from scores to a sorted assignment, of the whole routing call, and of every recipe, at T4096 E64 (OLMoE's
//! layer: k = 8, d = 2048, expert width 1024, so 412 GFLOP forward; 3 % of that is 12 ms at 1 TFLOP/s).
//!
//! `cargo run --release -p mixtura-routing --example route_speed`

use mixtura_routing::catalogue::explain;
use mixtura_routing::select::top_k;
use mixtura_routing::{
    Assignment, AuxiliaryOptions, BalanceConfig, Choices, RouteShape, RouterConfig, RouterInput, StepContext,
    auxiliary, route,
};
use std::hint::black_box;
use std::time::Instant;

fn main() {
    let shape = RouteShape { tokens: 4096, experts: 64, top_k: 8 };
    let mut state = 1u32;
    let mut draw = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 * 4.0 - 2.0
    };
    let logits: Vec<f32> = (0..shape.tokens * shape.experts).map(|_| draw()).collect();
    let input = RouterInput::new(&logits);
    let config = RouterConfig::default();
    let step = StepContext::evaluation();
    println!("T4096 E64 k8, f32, one thread; fastest and median of 51");
    measure("scores to sorted assignment", || {
        let chosen = top_k(black_box(&logits), shape.experts, shape.top_k);
        black_box(Assignment::dropless(&Choices::rectangular(shape.tokens, shape.top_k, chosen), shape.experts));
    });
    measure("route: softmax, top-k, sort, weights, statistics", || {
        black_box(route(black_box(&input), shape, &config, &step).unwrap());
    });
    let routed = route(&input, shape, &config, &step).unwrap();
    let dweight = vec![1.0f32; routed.assignment.rows()];
    let mut dlogits = vec![0.0f32; logits.len()];
    measure("weights backward", || routed.weights_backward(black_box(&dweight), &mut dlogits));
    let balance = BalanceConfig::default();
    measure("balance and z-loss with gradient", || {
        black_box(auxiliary(black_box(&input), &routed, &balance, AuxiliaryOptions::default()).unwrap());
    });
    every_recipe(&logits, shape);
}

/// One training call of each recipe, with as many choices as it allows: fastest of three.
fn every_recipe(logits: &[f32], shape: RouteShape) {
    let x_td: Vec<f32> = logits[..shape.tokens * 16].to_vec();
    let thresholds = vec![0.02; shape.experts];
    println!("\nevery recipe in training, x of width 16 where the tokens are needed; fastest of three");
    for entry in explain::all() {
        let Some(config) = entry.recipe.router else { continue };
        // Two-level gates take other logits; their cost is that of top-k over groups and inside them.
        let Some(k) = [8, 2, 1]
            .into_iter()
            .filter(|_| entry.name != "hierarchical")
            .find(|&k| config.validate(shape.experts, k).is_ok())
        else {
            continue;
        };
        let given: Vec<u32> = (0..shape.tokens * k).map(|p| (p % shape.experts) as u32).collect();
        let input = RouterInput::new(logits).with_raw_noise(logits).with_tokens(&x_td);
        let input = input.with_thresholds(&thresholds).with_given(&given);
        let input = RouterInput { zero_computation: entry.recipe.zero_computation, ..input };
        let shape = RouteShape { top_k: k, ..shape };
        let mut best = f64::INFINITY;
        for _ in 0..3 {
            let start = Instant::now();
            black_box(route(black_box(&input), shape, &config, &StepContext::training(1, 1, 1)).unwrap());
            best = best.min(start.elapsed().as_secs_f64() * 1e3);
        }
        println!("{:24} k={k} {best:10.3} ms   {}", entry.name, entry.cost);
    }
}

fn measure(what: &str, mut run: impl FnMut()) {
    let mut times: Vec<f64> = (0..51)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!("{what:50} {:7.3} {:7.3} ms", times[0], times[25]);
}
