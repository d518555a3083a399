//! Times a training step of a small decoder written in plain ops, phase by phase: what the ops and the autodiff graph cost
//! without any model code around them.
//!
//! `cargo run --release -p mixtura-ops --example train_step -- [f32|bf16|bf16-native] [experts] [expert width]`
//!
//! Axes: `t` tokens, `d` width, `e` experts, `f` hidden width, `v` vocabulary, `n` rows.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{Device, Tensor};
use mixtura_ops::{
    Activation, AdamWParams, AttentionSpec, DispatchPlan, Head, Numerics, PackCell, Precision, adamw_step,
    causal_attention, embedding, expert_ffn, grad_norm_squared, linear, linear_cross_entropy, recycle, rms_norm,
    tensor_from_vec,
};

const LAYERS: usize = 4;
const D: usize = 256;
const HEADS: usize = 4;
const VOCABULARY: usize = 4096;
const BATCH: usize = 8;
const SEQ: usize = 256;
const TOP_K: usize = 2;
const STEPS: usize = 12;

/// A weight of any rank, flat, with its optimizer state.
struct Weight {
    value: Tensor<1>,
    shape: Vec<usize>,
    m: Vec<f32>,
    v: Vec<f32>,
}

impl Weight {
    fn new<const R: usize>(shape: [usize; R], scale: f32, device: &Device) -> Self {
        let count = shape.iter().product::<usize>();
        let values =
            (0..count as u32).map(|i| scale * ((i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0));
        let value = tensor_from_vec(values.collect(), [count], device).require_grad();
        Self { value, shape: shape.to_vec(), m: vec![0.0; count], v: vec![0.0; count] }
    }

    fn val<const R: usize>(&self) -> Tensor<R> {
        let shape: [usize; R] = self.shape.clone().try_into().expect("a weight of another rank");
        self.value.clone().reshape(shape)
    }
}

struct Layer {
    weights: [Weight; 6],
    cells: [PackCell; 3],
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let precision: Precision = arguments.next().map_or(Precision::Bf16, |text| text.parse().expect("a precision"));
    let experts: usize = arguments.next().map_or(8, |text| text.parse().expect("a number of experts"));
    let f: usize = arguments.next().map_or(512, |text| text.parse().expect("an expert width"));
    let (numerics, device) = (Numerics::new(precision), Device::default().autodiff());
    let (tokens, spec) = (BATCH * SEQ, AttentionSpec::new(BATCH, SEQ, HEADS, HEADS, D / HEADS));
    let plan = Arc::new(round_robin(tokens, experts));
    let ids: Arc<[u32]> = (0..tokens as u32).map(|i| i.wrapping_mul(2_654_435_761) % VOCABULARY as u32).collect();

    let mut embed = Weight::new([VOCABULARY, D], 0.05, &device);
    let mut head = Weight::new([D, VOCABULARY], 0.05, &device);
    let head_cell = PackCell::new();
    let mut layers: Vec<Layer> = (0..LAYERS)
        .map(|_| Layer {
            weights: [
                Weight::new([D], 1.0, &device),
                Weight::new([D, spec.qkv_width()], 0.05, &device),
                Weight::new([spec.out_width(), D], 0.05, &device),
                Weight::new([D], 1.0, &device),
                Weight::new([experts, D, 2 * f], 0.05, &device),
                Weight::new([experts, f, D], 0.05, &device),
            ],
            cells: Default::default(),
        })
        .collect();

    let mut best = [f64::INFINITY; 4];
    let mut last_loss = 0.0;
    for step in 1..=STEPS as u64 {
        let start = Instant::now();
        let mut x = embedding(embed.val(), ids.clone());
        let weight_n = Tensor::<1>::full([plan.rows()], 1.0 / TOP_K as f32, &device);
        for Layer { weights: [norm_1, qkv, out, norm_2, gate_up, down], cells } in &layers {
            let h = rms_norm(x.clone(), norm_1.val(), 1e-5, numerics);
            let h = linear(h, qkv.val(), &cells[0], numerics);
            let h = causal_attention(h, None, None, &spec, numerics);
            x = linear(h, out.val(), &cells[1], numerics) + x;
            let h = rms_norm(x.clone(), norm_2.val(), 1e-5, numerics);
            let (gate_up, down) = (gate_up.val(), down.val());
            x = expert_ffn(h, gate_up, down, weight_n.clone(), &plan, Activation::SwiGlu, &cells[2], numerics) + x;
        }
        let loss = linear_cross_entropy(x, head.val(), Head::Untied, ids.clone(), &head_cell, numerics);
        last_loss = loss.clone().into_scalar::<f32>();
        let forward = start.elapsed().as_secs_f64();

        let start = Instant::now();
        let mut gradients = loss.backward();
        let backward = start.elapsed().as_secs_f64();

        let start = Instant::now();
        let all = || layers.iter().flat_map(|layer| &layer.weights).chain([&embed, &head]);
        let gradients: Vec<_> = all().map(|w| w.value.grad_remove(&mut gradients).expect("a gradient")).collect();
        let norm = gradients.iter().map(|g| grad_norm_squared(g, numerics)).sum::<f64>().sqrt();
        for layer in &layers {
            layer.cells.iter().for_each(PackCell::clear);
        }
        head_cell.clear();
        let scale = (1.0 / norm).min(1.0) as f32;
        let hyper = AdamWParams::at_step(1e-3, 0.9, 0.95, 1e-8, 0.1, step, scale);
        let weights = layers.iter_mut().flat_map(|layer| &mut layer.weights).chain([&mut embed, &mut head]);
        for (w, gradient) in weights.zip(gradients) {
            let value = std::mem::replace(&mut w.value, Tensor::empty([0], &device));
            w.value = adamw_step(value, &gradient, &mut w.m, &mut w.v, &hyper, numerics);
            recycle(gradient);
        }
        let optimizer = start.elapsed().as_secs_f64();
        for (best, now) in best.iter_mut().zip([forward, backward, optimizer, forward + backward + optimizer]) {
            *best = best.min(now);
        }
    }
    let [forward, backward, optimizer, step] = best.map(|seconds| 1e3 * seconds);
    let per_token =
        LAYERS * (D * spec.qkv_width() + spec.out_width() * D + TOP_K * 3 * D * f + SEQ * D) + D * VOCABULARY;
    let flops = 6.0 * per_token as f64 * tokens as f64;
    println!(
        "{precision} on {}: {LAYERS} layers, D {D}, {experts} experts of {f}, {tokens} tokens: forward {forward:.1} ms, \
         backward {backward:.1} ms, optimizer {optimizer:.1} ms, step {step:.1} ms, {:.0} tokens/s, {:.0} GFLOP/s, loss {last_loss:.3}",
        numerics.isa,
        tokens as f64 / step * 1e3,
        flops / step / 1e6,
    );
}

/// Token `t` goes to experts `t` and `t + 1`, modulo their number.
fn round_robin(tokens: usize, experts: usize) -> DispatchPlan {
    let chosen = |t: usize| (0..TOP_K).map(move |k| (t + k) % experts);
    let (mut row_offsets, mut token_of_row, mut row_of) = (vec![0], Vec::new(), vec![[0u32; TOP_K]; tokens]);
    for e in 0..experts {
        for t in 0..tokens {
            if let Some(k) = chosen(t).position(|expert| expert == e) {
                row_of[t][k] = token_of_row.len() as u32;
                token_of_row.push(t as u32);
            }
        }
        row_offsets.push(token_of_row.len() as u32);
    }
    let token_offsets = (0..=tokens).map(|t| (t * TOP_K) as u32).collect();
    DispatchPlan::new(tokens, row_offsets, token_of_row, token_offsets, row_of.concat())
}
