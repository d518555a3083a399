//! Peak memory and time of training steps with and without recomputed activations.
//!
//! `cargo run --release -p mixtura-nn --example recompute_memory -- off 12` runs 3 steps of a model of 12 layers; `on` recomputes.
//! Each needs a process of its own, since the peak of a process never falls. Reads `/proc/self/status`, so Linux only.

use std::time::Instant;

use burn::tensor::Device;
use mixtura_nn::{Decoder, ForwardContext, ModelConfig, MoeConfig, NamedParameters};
use mixtura_ops::{Numerics, Precision, recycle, with_slice};

const BATCH: usize = 8;
const SEQ: usize = 512;
const STEPS: usize = 3;

fn main() {
    let mut args = std::env::args().skip(1);
    let recompute_activations = args.next().as_deref() == Some("on");
    let layers = args.next().map_or(12, |layers| layers.parse().expect("a number of layers"));
    let config =
        ModelConfig { vocab: 4096, moe: Some(MoeConfig::new(8, 2, 512)), ..ModelConfig::new(256, layers, 4, SEQ) };
    let mut model = Decoder::new(&config, 1, &Device::default().autodiff()).expect("a valid configuration");
    let ids: Vec<u32> = (0..(BATCH * SEQ) as u32).map(|i| i.wrapping_mul(2_654_435_761) >> 20).collect();
    let mut seconds = f64::INFINITY;
    let mut loss = 0.0;
    for step in 0..STEPS {
        let started = Instant::now();
        let context = ForwardContext::training(1, step as u64, Numerics::new(Precision::Bf16));
        let context = ForwardContext { recompute_activations, ..context };
        let out = model.loss(&ids, &ids, BATCH, SEQ, &context).expect("a step");
        let gradients = model.take_gradients(&mut out.total.backward());
        loss = with_slice(&out.ce, |ce| ce[0]);
        drop(out);
        model.for_each_parameter_mut(|i, _, values| {
            if let Some(gradient) = &gradients[i] {
                with_slice(gradient, |g| values.iter_mut().zip(g).for_each(|(w, g)| *w -= 0.1 * g));
            }
        });
        gradients.into_iter().flatten().for_each(recycle);
        seconds = seconds.min(started.elapsed().as_secs_f64());
    }
    let parameters = config.parameter_counts().expect("a valid configuration").total;
    println!(
        "recomputing {}: {layers} layers, {parameters} parameters, {} tokens: peak {} MiB, best step {seconds:.2} s, loss {loss}",
        if recompute_activations { "on" } else { "off" },
        BATCH * SEQ,
        peak_mib().map_or("?".into(), |mib| mib.to_string()),
    );
}

fn peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib / 1024)
}
