//! Prints the time from scores to a sorted assignment, and of the whole routing call, at T4096 E64 k8 (OLMoE's layer).
//!
//! `cargo run --release -p mixtura-routing --example route_speed`

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
