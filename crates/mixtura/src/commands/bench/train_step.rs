//! A whole training step of the Hugging Face shape, on random tokens.

use burn::tensor::Device;
use mixtura_nn::{Decoder, ForwardContext, ModelConfig, MoeConfig, NamedParameters, QkNorm};
use mixtura_ops::Numerics;
use mixtura_routing::{Normalize, RouterConfig};
use mixtura_train::config::OptimizerConfig;
use mixtura_train::cost::training_flops_per_token;
use mixtura_train::optimizer::{Accumulated, AdamW};

use super::{Bench, Row};

const SEQUENCE: usize = 128;

/// One row.
pub fn rows(bench: &Bench, numerics: Numerics) -> Vec<Row> {
    let (d, f, batch) = (bench.size(256).max(8), bench.size(512), bench.size(16));
    let moe = MoeConfig {
        router: RouterConfig { normalize: Normalize::Never, ..RouterConfig::default() },
        ..MoeConfig::new(16, 2, f)
    };
    let shape = ModelConfig::new(d, 4, 4, SEQUENCE);
    let config = ModelConfig { vocab: 512, qk_norm: QkNorm::Full, moe: Some(moe), ..shape };
    let mut model = Decoder::new(&config, 0, &Device::default().autodiff()).expect("the shape is a constant");
    let mut optimizer = AdamW::new(&OptimizerConfig::default(), numerics.isa, &model.parameter_infos());
    let tokens = batch * SEQUENCE;
    let mut step = 0u64;
    let seconds = bench.median(|| {
        let ids: Vec<u32> = (0..tokens as u64)
            .map(|i| ((i + step).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u32 % 510 + 2)
            .collect();
        let targets: Vec<u32> = ids.iter().skip(1).chain(&ids[..1]).copied().collect();
        let context = ForwardContext::training(0, step, numerics);
        let out = model.loss(&ids, &targets, batch, SEQUENCE, &context).expect("random tokens can be routed");
        let mut gradients = Accumulated::default();
        gradients.add(model.take_gradients(&mut out.total.backward()));
        drop(out.routing);
        let norm = gradients.norm(numerics.isa);
        optimizer.step(&mut model, &gradients, norm, 1e-3);
        step += 1;
    });
    let shape = format!("d{d} L4 h4 E16 k2 f{f} V512 b{batch} s{SEQUENCE}");
    let flops = training_flops_per_token(&config, SEQUENCE) * tokens as f64;
    let row = bench.arithmetic("train_step", &shape, numerics, seconds, flops);
    vec![Row { tokens_per_second: Some(tokens as f64 / seconds), ..row }]
}
