//! OLMoE: softmax over all experts, weights normalised or not, a norm over the whole query and key projections.
//!
//! | | |
//! | --- | --- |
//! | read | `num_experts`, `num_experts_per_tok`, `norm_topk_prob` (false), `router_aux_loss_coef` (0.01), `clip_qkv` (none), `rope_theta` (1e4), `rms_norm_eps` (1e-5) |
//! | tensors | `mlp.gate`, `mlp.experts.E.{gate_proj, up_proj, down_proj}`, `self_attn.{q_norm, k_norm}`; stacked experts are read too |
//! | cannot express | heads of another width than `d_model / heads`, experts in some layers only |
//! | refused | what `read` begins with |

#[cfg(feature = "model")]
use mixtura_nn::{ModelConfig, QkNorm};
use serde_json::{Map, Value, json};

#[cfg(feature = "model")]
use crate::express::{self, need};
use crate::families::HfFamily;
use crate::hf_config::{Defaults, HfConfig, HfMoe, write_router};
use crate::hf_keys::{Keys, Parsed, bad};
use crate::hf_tensors::{self, ExpertNames, QkNorms};
use crate::layout::ParameterLayout;

pub(crate) static OLMOE: HfFamily = HfFamily {
    model_type: "olmoe",
    architecture: "OlmoeForCausalLM",
    read,
    write,
    layout,
    #[cfg(feature = "model")]
    express,
    #[cfg(feature = "model")]
    model,
};

fn read(keys: &Keys) -> Parsed<HfConfig> {
    keys.refuse_other_activations()?;
    keys.refuse_biases()?;
    keys.refuse_quantised_weights()?;
    keys.refuse_a_partial_rotation()?;
    keys.refuse_a_short_window()?;
    let moe = HfMoe {
        experts: keys.experts()?,
        top_k: keys.size("num_experts_per_tok")?,
        normalize: keys.flag("norm_topk_prob")?.unwrap_or(false),
        aux_coefficient: keys.number("router_aux_loss_coef")?.unwrap_or(0.01),
        jitter: 0.0,
    };
    let config = HfConfig::read(&OLMOE, keys, Defaults { rope_theta: 1e4, norm_eps: 1e-5 }, Some(moe))?;
    Ok(HfConfig { clip_qkv: clip_qkv(keys)?, ..config })
}

/// The bound on queries, keys and values, after the norm and before the rotation.
fn clip_qkv(keys: &Keys) -> Parsed<Option<f64>> {
    match (keys.number("clip_qkv")?, keys.get("clip_qkv")) {
        (Some(clip), Some(value)) if clip <= 0.0 => Err(bad("clip_qkv", value, "a positive number or null")),
        (clip, _) => Ok(clip),
    }
}

fn write(config: &HfConfig, keys: &mut Map<String, Value>) {
    let moe = config.experts();
    write_router(moe, keys);
    keys.insert("num_experts".into(), json!(moe.experts));
    keys.insert("norm_topk_prob".into(), json!(moe.normalize));
    keys.insert("clip_qkv".into(), json!(config.clip_qkv));
}

const EXPERTS: ExpertNames = ExpertNames {
    router: &["mlp.gate.weight"],
    gate: "mlp.experts.{e}.gate_proj.weight",
    up: "mlp.experts.{e}.up_proj.weight",
    down: "mlp.experts.{e}.down_proj.weight",
    stacked: Some(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
};

fn layout(config: &HfConfig) -> Vec<ParameterLayout> {
    hf_tensors::decoder(config, QkNorms::Full, |layer| hf_tensors::experts(config, layer, &EXPERTS))
}

#[cfg(feature = "model")]
fn express(config: &ModelConfig) -> Result<HfConfig, String> {
    express::swiglu(config)?;
    express::qk_norm(config, QkNorm::Full)?;
    need(config.head_dim() * config.heads == config.d_model, "head_dim must be d_model / heads")?;
    let (d_expert, moe) = express::experts(config)?;
    Ok(HfConfig { clip_qkv: config.clip_qkv, ..express::decoder(&OLMOE, config, d_expert, Some(moe)) })
}

#[cfg(feature = "model")]
fn model(config: &HfConfig) -> ModelConfig {
    ModelConfig { qk_norm: QkNorm::Full, clip_qkv: config.clip_qkv, ..express::model(config) }
}
