//! Time of one layer, forward and backward: every soft kind beside a dense network and top-2 experts of the same hidden width.
//!
//! `cargo run --release -p mixtura-nn --example soft_speed`. Eight experts of width 512 on 8 sequences of 512 tokens of width 256,
//! bf16; the best of three runs after one to warm up.

use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use mixtura_nn::{Emit, ForwardContext, MoeLayer, MoeLayerConfig, SoftConfig, SoftLayer, SoftLayerConfig};
use mixtura_ops::{Numerics, Precision};
use mixtura_routing::soft::merge::FirstSegment;
use mixtura_routing::soft::soft_moe::Mixing;

const BATCH: usize = 8;
const SEQ: usize = 512;
const D: usize = 256;
const E: usize = 8;
const F: usize = 512;

fn main() {
    let device = Device::default().autodiff();
    let context = ForwardContext::training(1, 0, Numerics::new(Precision::Bf16));
    let lory = |segment| SoftConfig::Lory { segment, first_segment: FirstSegment::Uniform, allow_future: false };
    let kinds = [
        SoftConfig::BlockCausal { block: 16, slots_per_expert: 2 },
        SoftConfig::BlockCausal { block: 64, slots_per_expert: 2 },
        lory(64),
        lory(256),
        SoftConfig::Smear { allow_future: true },
        SoftConfig::MixtureOfTokens { group: 8, temperature: 1.0, emit: Emit::Merge },
        SoftConfig::SoftMoe { slots_per_expert: 8, mixing: Mixing::Soft, allow_future: true },
    ];
    for (name, experts, top_k) in [("dense", 1, 1), ("top-2 of 8", E, 2)] {
        let layer = MoeLayer::new(&MoeLayerConfig::new(D, experts, top_k, F), 1, &device).expect("a valid layer");
        report(name, &device, |x_td| layer.forward(x_td, &context).expect("finite logits").y_td);
    }
    for soft in kinds {
        // The shared network of a block-causal layer is as small as can be, so that the soft part is what is timed.
        let config = SoftLayerConfig { d_shared: 1, ..SoftLayerConfig::new(D, E, F, soft) };
        let layer = SoftLayer::new(&config, 1, &device).expect("a valid layer");
        report(&format!("{soft:?}"), &device, |x_td| layer.forward(x_td, BATCH, SEQ, context.numerics));
    }
}

fn report(name: &str, device: &Device, layer: impl Fn(Tensor<2>) -> Tensor<2>) {
    let (mut forward, mut backward) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..4 {
        let x_td = Tensor::<2>::random([BATCH * SEQ, D], Distribution::Normal(0.0, 1.0), device).require_grad();
        let started = Instant::now();
        let y_td = layer(x_td);
        forward = forward.min(started.elapsed().as_secs_f64());
        let started = Instant::now();
        drop(y_td.sum().backward());
        backward = backward.min(started.elapsed().as_secs_f64());
    }
    println!("{:7.1} ms forward {:7.1} ms backward  {name}", 1e3 * forward, 1e3 * backward);
}
