//! Whether two configurations are of the same model.

use mixtura_nn::{LayerFfn, ModelConfig};
use mixtura_routing::Noise;
use serde_json::{Value, json};

use crate::hf_config::HfConfig;

/// The first key of a family's file that contradicts our own configuration in the same file: (key, ours, the file's). The
/// balance coefficient and the jitter concern training alone and may differ.
pub(crate) fn first_disagreement(ours: &ModelConfig, file: &HfConfig) -> Option<(&'static str, String, String)> {
    let ours = match (file.family.express)(ours) {
        Ok(ours) => ours,
        Err(reason) => return Some(("model_type", reason, file.family.model_type.to_string())),
    };
    let routing = |c: &HfConfig| c.moe.as_ref().map(|m| (m.experts, m.top_k, m.normalize));
    let keys = |c: &HfConfig| {
        [
            ("vocab_size", json!(c.vocab)),
            ("hidden_size", json!(c.hidden)),
            ("intermediate_size", json!(c.intermediate)),
            ("num_hidden_layers", json!(c.layers)),
            ("num_attention_heads", json!(c.heads)),
            ("num_key_value_heads", json!(c.kv_heads)),
            ("head_dim", json!(c.head_dim())),
            ("max_position_embeddings", json!(c.context)),
            ("rope_theta", json!(c.rope_theta)),
            ("rms_norm_eps", json!(c.norm_eps)),
            ("clip_qkv", json!(c.clip_qkv)),
            ("tie_word_embeddings", json!(c.tied)),
            ("num_experts, num_experts_per_tok, norm_topk_prob", json!(routing(c))),
        ]
    };
    let pairs = keys(&ours).into_iter().zip(keys(file));
    pairs.filter(|(a, b)| a.1 != b.1).map(|((key, a), (_, b))| (key, a.to_string(), b.to_string())).next()
}

/// The first thing in which two models differ that decides shapes or logits: (key, first, second).
pub(crate) fn first_difference(a: &ModelConfig, b: &ModelConfig) -> Option<(String, String, String)> {
    let (Value::Object(a), Value::Object(b)) = (architecture(a), architecture(b)) else { return None };
    let differing = a.iter().find(|(key, value)| b.get(*key) != Some(*value));
    differing.map(|(key, value)| (key.clone(), value.to_string(), b.get(key).cloned().unwrap_or_default().to_string()))
}

/// Every default resolved, nothing that only concerns training.
fn architecture(config: &ModelConfig) -> Value {
    let layers: Vec<String> = (0..config.layers)
        .map(|layer| match config.layer_ffn(layer) {
            Ok(LayerFfn::Dense { d_dense }) => format!("dense {d_dense}"),
            Ok(LayerFfn::Moe { experts, d_expert, d_shared }) => {
                format!("{experts} experts of {d_expert}, shared {d_shared}")
            }
            Err(e) => e.to_string(),
        })
        .collect();
    let mut value = json!({
        "vocab": config.vocab,
        "d_model": config.d_model,
        "layers": config.layers,
        "heads": config.heads,
        "kv_heads": config.kv_heads(),
        "head_dim": config.head_dim(),
        "rope_theta": config.rope_theta,
        "norm_eps": config.norm_eps,
        "qk_norm": config.qk_norm,
        "clip_qkv": config.clip_qkv,
        "tied": config.tied,
        "activation": config.activation,
        "feed-forward of each layer": layers,
    });
    if let Some(moe) = &config.moe {
        let router = &moe.router;
        value["moe.top_k"] = json!(moe.top_k);
        value["moe.shared_gate"] = json!(moe.shared_gate);
        value["moe.soft"] = json!(moe.soft);
        value["moe.router.scorer"] = json!(router.scorer);
        value["moe.router.activation"] = json!(router.activation);
        value["moe.router.policy"] = json!(router.policy);
        value["moe.router.normalize"] = json!(router.normalize);
        value["moe.router.weight_scale"] = json!(router.weight_scale);
        value["moe.router.noise is learned"] = json!(matches!(router.noise, Noise::Softplus { .. }));
        value["moe.router.hash_table"] = json!(router.hash_table);
        value["moe.d_expert_each"] = json!(moe.d_expert_each);
        value["moe.residual"] = json!(moe.residual);
        value["moe.zero_computation"] = json!(moe.zero_computation);
        value["moe.balance.bias_update is on"] = json!(moe.balance.bias_update > 0.0);
    }
    value
}
