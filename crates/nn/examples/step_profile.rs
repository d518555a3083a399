//! Where one training step goes: forward, backward, optimizer, and each operation of a block on its own.
//!
//! The shape is that of the project's training benchmark, `d256 L4 h4 E16 k2 f512 V512 b16 s128`. Run with
//! `cargo run --release -p mixtura-nn --example step_profile -- bf16-native`.

use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use mixtura_nn::{Decoder, ForwardContext, ModelConfig, MoeConfig, MoeLayer, MoeLayerConfig, NamedParameters};
use mixtura_ops::{
    AdamWParams, AttentionSpec, Head, Numerics, PackCell, Precision, causal_attention, embedding, linear,
    linear_cross_entropy, rms_norm, with_slice,
};

const BATCH: usize = 16;
const SEQ: usize = 128;
const TOKENS: usize = BATCH * SEQ;
const D: usize = 256;
const VOCAB: usize = 512;
const REPEATS: usize = 9;

fn main() {
    let precision: Precision =
        std::env::args().nth(1).map_or(Ok(Precision::F32), |text| text.parse()).expect("precision");
    let numerics = Numerics::new(precision);
    println!(
        "{precision} on {:?}, {} threads, median of {REPEATS}",
        numerics.isa,
        std::thread::available_parallelism().map_or(1, usize::from)
    );
    whole_step(numerics);
    println!("\none layer's operations, forward and backward, ms:");
    operations(numerics);
}

fn whole_step(numerics: Numerics) {
    let config = ModelConfig {
        vocab: VOCAB,
        d_dense: None,
        moe: Some(MoeConfig::new(16, 2, 512)),
        ..ModelConfig::new(D, 4, 4, SEQ)
    };
    let mut model = Decoder::new(&config, 1, &Device::default().autodiff()).expect("a valid shape");
    let mut moments: Vec<[Vec<f32>; 2]> =
        model.parameter_infos().iter().map(|info| [vec![0.0; info.len()], vec![0.0; info.len()]]).collect();
    let tokens: Vec<u32> = (0..TOKENS as u32).map(|i| i.wrapping_mul(2_654_435_761) % VOCAB as u32).collect();
    let mut times = vec![Vec::new(); 4];
    for step in 0..REPEATS as u64 + 2 {
        let start = Instant::now();
        let out =
            model.loss(&tokens, &tokens, BATCH, SEQ, &ForwardContext::training(1, step, numerics)).expect("a loss");
        let forward = Instant::now();
        let mut graph = out.total.backward();
        let backward = Instant::now();
        let gradients = model.take_gradients(&mut graph);
        drop((out, graph));
        let params = AdamWParams::at_step(1e-3, 0.9, 0.95, 1e-8, 0.1, step + 1, 1.0);
        model.for_each_parameter_mut(|i, _, values| {
            let (Some(gradient), [m, v]) = (&gradients[i], &mut moments[i]) else { return };
            with_slice(gradient, |g| mixtura_kernels::adamw::adamw_step(numerics.isa, &params, values, g, m, v));
        });
        let end = Instant::now();
        if step >= 2 {
            let parts = [end - start, forward - start, backward - forward, end - backward];
            times.iter_mut().zip(parts).for_each(|(all, part)| all.push(part.as_secs_f64()));
        }
    }
    let ms: Vec<f64> = times.into_iter().map(median).collect();
    println!(
        "training step {:.1} ms ({:.0} tokens/s): forward {:.1}, backward {:.1}, optimizer {:.1}",
        ms[0],
        TOKENS as f64 / ms[0] * 1e3,
        ms[1],
        ms[2],
        ms[3]
    );
}

fn operations(numerics: Numerics) {
    let device = Device::default().autodiff();
    let random = |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 0.5), &device).require_grad();
    let tokens: Vec<u32> = (0..TOKENS as u32).map(|i| i.wrapping_mul(2_654_435_761) % VOCAB as u32).collect();
    let (x_td, cell) = (random([TOKENS, D]), PackCell::new());

    let table = random([VOCAB, D]);
    time("embedding", || embedding(table.clone(), tokens.as_slice().into()));
    let gamma = Tensor::<1>::ones([D], &device).require_grad();
    time("rms_norm", || rms_norm(x_td.clone(), gamma.clone(), 1e-5, numerics));
    let w_qkv = random([D, 3 * D]);
    time("linear qkv", || linear(x_td.clone(), w_qkv.clone(), &cell, numerics));
    let qkv = random([TOKENS, 3 * D]);
    let spec = AttentionSpec::new(BATCH, SEQ, 4, 4, D / 4);
    time("attention", || causal_attention(qkv.clone(), None, None, &spec, numerics));
    let (w_out, cell) = (random([D, D]), PackCell::new());
    time("linear out", || linear(x_td.clone(), w_out.clone(), &cell, numerics));
    time("residual add", || x_td.clone() + qkv.clone().narrow(1, 0, D));
    let layer = MoeLayer::new(&MoeLayerConfig::new(D, 16, 2, 512), 1, &device).expect("a valid layer");
    let context = ForwardContext::training(1, 1, numerics);
    time("moe layer", || layer.forward(x_td.clone(), &context).expect("an output").y_td);
    time("  of it: router", || {
        let (routing, _) = layer.router.forward(x_td.clone(), 0, &context).expect("a routing");
        routing.weight_n.unsqueeze_dim(0) * routing.losses.total.unsqueeze_dim(1)
    });
    let (routing, plan) = layer.router.forward(x_td.clone().detach(), 0, &context).expect("a routing");
    let weight_n = routing.weight_n.detach().require_grad();
    time("  of it: experts", || layer.experts.forward(x_td.clone(), weight_n.clone(), &plan, numerics));
    let (w_head, cell) = (random([D, VOCAB]), PackCell::new());
    time("linear cross-entropy", || {
        let loss =
            linear_cross_entropy(x_td.clone(), w_head.clone(), Head::Untied, tokens.as_slice().into(), &cell, numerics);
        loss.unsqueeze_dim(1)
    });
}

/// Prints the forward time of `op`, and its backward time from a gradient of ones.
fn time(name: &str, op: impl Fn() -> Tensor<2>) {
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    for repeat in 0..REPEATS + 2 {
        let start = Instant::now();
        let y = op();
        let middle = Instant::now();
        let gradients = y.backward();
        let end = Instant::now();
        drop(gradients);
        if repeat >= 2 {
            forward.push((middle - start).as_secs_f64());
            backward.push((end - middle).as_secs_f64());
        }
    }
    println!("  {name:<22} {:7.2} {:7.2}", median(forward), median(backward));
}

/// Milliseconds.
fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2] * 1e3
}
