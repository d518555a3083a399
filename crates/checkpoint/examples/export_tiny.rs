//! Writes one tiny model of every Hugging Face family, with our logits beside it, for `fixtures/hf/check_export.py` to load in
//! transformers:
//!
//! ```text
//! cargo run --release -p mixtura-checkpoint --example export_tiny -- /tmp/exported
//! python fixtures/hf/check_export.py /tmp/exported
//! ```

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use mixtura_checkpoint::{Family, SaveOptions, StoredType, TensorOut, TokenIds, save_model, write_safetensors};
use mixtura_nn::{Decoder, ForwardContext, ModelConfig, MoeConfig, NamedParameters, QkNorm};
use mixtura_ops::{Numerics, Precision};
use mixtura_routing::{Normalize, RouterConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = PathBuf::from(std::env::args().nth(1).ok_or("usage: export_tiny DIRECTORY")?);
    let base = ModelConfig { vocab: 200, kv_heads: Some(2), init_std: 0.1, ..ModelConfig::new(64, 3, 4, 128) };
    let raw = RouterConfig { normalize: Normalize::Never, ..RouterConfig::default() };
    let olmoe = ModelConfig {
        qk_norm: QkNorm::Full,
        moe: Some(MoeConfig { router: raw, ..MoeConfig::new(8, 3, 48) }),
        ..base.clone()
    };
    let mixtral = ModelConfig { rope_theta: 1e6, moe: Some(MoeConfig::new(4, 2, 40)), ..base.clone() };
    let tied = ModelConfig { tied: true, head_dim: Some(24), ..mixtral.clone() };
    let llama = ModelConfig { d_dense: Some(96), ..base };
    for (name, config, max_shard_bytes) in [
        ("olmoe", olmoe, usize::MAX),
        ("mixtral", mixtral.clone(), usize::MAX),
        ("mixtral-sharded", mixtral, 100_000),
        ("mixtral-tied", tied, usize::MAX),
        ("llama", llama, usize::MAX),
    ] {
        export(&root.join(name), &config, max_shard_bytes)?;
    }
    Ok(())
}

fn export(dir: &Path, config: &ModelConfig, max_shard_bytes: usize) -> Result<(), Box<dyn std::error::Error>> {
    let mut decoder = Decoder::new(config, 11, &Device::default())?;
    // Norms that differ from one, so that a missing or swapped one shows.
    decoder.for_each_parameter_mut(|index, info, values| {
        if info.name.contains("norm") {
            values.iter_mut().enumerate().for_each(|(i, v)| *v = 1.0 + 0.3 * ((i * 7 + index) as f32).sin());
        }
    });
    let family = Family::of(config);
    let ids = TokenIds { bos: Some(1), eos: vec![2, 3], pad: Some(0) };
    let options = SaveOptions { stored: StoredType::F32, max_shard_bytes, ids, files: vec![] };
    save_model(dir, &decoder, family, &options)?;

    let (batch, seq) = (2, 40);
    let ids: Vec<u32> = (0..batch * seq).map(|i| (i * i * 31 + 7 * i) as u32 % config.vocab as u32).collect();
    let context = ForwardContext::evaluation(Numerics::new(Precision::F32));
    let (logits, _) = decoder.logits(&ids, batch, seq, &context)?;
    let logits = mixtura_ops::into_vec(logits);
    let ids: Vec<f32> = ids.iter().map(|&id| id as f32).collect();
    let tensors = vec![
        TensorOut::borrowed("ids", &[batch, seq], &ids),
        TensorOut::borrowed("logits", &[batch, seq, config.vocab], &logits),
    ];
    write_safetensors(&dir.join("expected.safetensors"), tensors, &Default::default())?;
    println!("{}: {family}", dir.display());
    Ok(())
}
