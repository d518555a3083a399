//! Pebble: Mixtral's router behind queries and keys that are normalised head by head.

#[cfg(feature = "model")]
use mixtura_nn::{ModelConfig, QkNorm};
use serde_json::{Map, Value, json};

#[cfg(feature = "model")]
use crate::express::{self, need};
use crate::families::HfFamily;
use crate::hf_config::{Defaults, HfConfig, HfMoe, write_router};
use crate::hf_keys::{Keys, Parsed};
use crate::hf_tensors::{self, ExpertNames, QkNorms};
use crate::layout::ParameterLayout;

pub(crate) static PEBBLE: HfFamily = HfFamily {
    model_type: "pebble",
    architecture: "PebbleForCausalLM",
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
    keys.refuse_clip_qkv()?;
    keys.refuse_a_short_window()?;
    keys.refuse_all_but(&[json!(0)], "num_shared_pebbles", "shared experts are not read")?;
    let moe = HfMoe {
        experts: keys.size("num_pebbles")?,
        top_k: keys.size("num_experts_per_tok")?,
        normalize: keys.flag("norm_topk_prob")?.unwrap_or(true),
        aux_coefficient: keys.number("router_aux_loss_coef")?.unwrap_or(0.001),
        jitter: 0.0,
    };
    HfConfig::read(&PEBBLE, keys, Defaults { rope_theta: 1e6, norm_eps: 1e-6 }, Some(moe))
}

fn write(config: &HfConfig, keys: &mut Map<String, Value>) {
    let moe = config.experts();
    write_router(moe, keys);
    keys.insert("num_pebbles".into(), json!(moe.experts));
    keys.insert("norm_topk_prob".into(), json!(moe.normalize));
}

const EXPERTS: ExpertNames = ExpertNames {
    router: &["pebbles.router.weight"],
    gate: "pebbles.{e}.gate.weight",
    up: "pebbles.{e}.up.weight",
    down: "pebbles.{e}.down.weight",
    stacked: None,
};

fn layout(config: &HfConfig) -> Vec<ParameterLayout> {
    hf_tensors::decoder(config, QkNorms::PerHead, |layer| hf_tensors::experts(config, layer, &EXPERTS))
}

#[cfg(feature = "model")]
fn express(config: &ModelConfig) -> Result<HfConfig, String> {
    express::swiglu(config)?;
    express::qk_norm(config, QkNorm::PerHead)?;
    need(config.clip_qkv.is_none(), "clip_qkv has no place")?;
    let (d_expert, moe) = express::experts(config)?;
    Ok(express::decoder(&PEBBLE, config, d_expert, Some(moe)))
}

#[cfg(feature = "model")]
fn model(config: &HfConfig) -> ModelConfig {
    ModelConfig { qk_norm: QkNorm::PerHead, ..express::model(config) }
}
