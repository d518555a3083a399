//! One token at a time, batch 1: bound by the bytes of the weights that the token touches.

use burn::tensor::Device;
use mixtura_nn::{Decoder, ForwardContext, ModelConfig, MoeConfig};
use mixtura_ops::Numerics;

use super::{Bench, Row};

const SHAPE: &str = "d1024 L4 h16 E16 k2 f1024 V8192 b1 s128";
const CONTEXT: usize = 1024;
const PROMPT: usize = 128;

/// One row.
pub fn rows(bench: &Bench, numerics: Numerics) -> Vec<Row> {
    let moe = MoeConfig::new(16, 2, 1024);
    let config = ModelConfig { vocab: 8192, moe: Some(moe), ..ModelConfig::new(1024, 4, 16, CONTEXT) };
    let model = Decoder::new(&config, 0, &Device::default()).expect("the shape is a constant");
    let context = ForwardContext::evaluation(numerics);
    let mut cache = model.cache(CONTEXT);
    let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| i * 61 % 8192).collect();
    model.decode_last(&prompt, &mut cache, &context).expect("the prompt fits");
    let mut id = 0;
    let seconds = bench.median(|| {
        // Different tokens visit different experts, as in real text.
        id = (id * 31 + 7) % 8192;
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
        shape: SHAPE.into(),
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
