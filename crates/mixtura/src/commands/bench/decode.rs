//! One token at a time, batch 1: bound by the bytes of the weights that the token touches.

use burn::tensor::Device;
use mixtura_nn::{Decoder, ForwardContext, ModelConfig, MoeConfig};
use mixtura_ops::Numerics;

use super::{Bench, Row};

const CONTEXT: usize = 1024;
const PROMPT: usize = 128;

/// One row.
pub fn rows(bench: &Bench, numerics: Numerics) -> Vec<Row> {
    // Heads at least two wide, which rotary embedding needs.
    let (d, f, v) = (bench.size(1024).max(32), bench.size(1024), bench.size(8192).max(PROMPT));
    let moe = MoeConfig::new(16, 2, f);
    let config = ModelConfig { vocab: v, moe: Some(moe), ..ModelConfig::new(d, 4, 16, CONTEXT) };
    let model = Decoder::new(&config, 0, &Device::default()).expect("the shape is a constant");
    let context = ForwardContext::evaluation(numerics);
    let mut cache = model.cache(CONTEXT);
    let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| i * 61 % v as u32).collect();
    model.decode_last(&prompt, &mut cache, &context).expect("the prompt fits");
    let mut id = 0;
    let seconds = bench.median(|| {
        // Different tokens visit different experts, as in real text.
        id = (id * 31 + 7) % v as u32;
        if cache.len() == cache.capacity() {
            cache.truncate(PROMPT);
        }
        model.decode_last(&[id], &mut cache, &context).expect("the cache has room");
    });
    let counts = config.parameter_counts().expect("the shape is valid");
    let head = config.vocab * config.d_model;
    let width = if numerics.precision.is_bf16() { 2.0 } else { 4.0 };
    let bytes = (counts.active_without_embedding + head) as f64 * width;
    let (gbps, ceiling) = (bytes / seconds / 1e9, bench.peaks.read);
    vec![Row {
        name: "decode".into(),
        shape: format!("d{d} L4 h16 E16 k2 f{f} V{v} b1 s{PROMPT}"),
        precision: numerics.precision.to_string(),
        way: numerics.way().to_string(),
        ms: Some(seconds * 1e3),
        gbps: Some(gbps),
        tokens_per_second: Some(1.0 / seconds),
        ceiling: Some(ceiling),
        share: Some(gbps / ceiling),
        ..Row::default()
    }]
}
