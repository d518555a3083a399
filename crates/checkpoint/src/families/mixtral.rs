//! Mixtral: weights of the selected experts always normalised, no norm on queries and keys.
//!
//! | | |
//! | --- | --- |
//! | read | `num_local_experts`, `num_experts_per_tok`, `router_aux_loss_coef` (0.001), `router_jitter_noise` (0), `rope_theta` (1e6), `rms_norm_eps` (1e-5) |
//! | tensors | `block_sparse_moe.gate`, `block_sparse_moe.experts.E.{w1, w3, w2}` (gate, up, down); those of transformers 5 are read too |
//! | cannot express | weights that do not add up to 1, clamped projections, experts in some layers only |
//! | refused | what `read` begins with |

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

pub(crate) static MIXTRAL: HfFamily = HfFamily {
    model_type: "mixtral",
    architecture: "MixtralForCausalLM",
    read,
    write,
    layout,
    #[cfg(feature = "model")]
    express,
    #[cfg(feature = "model")]
    model: express::model,
};

fn read(keys: &Keys) -> Parsed<HfConfig> {
    keys.refuse_other_activations()?;
    keys.refuse_biases()?;
    keys.refuse_quantised_weights()?;
    keys.refuse_a_partial_rotation()?;
    keys.refuse_clip_qkv()?;
    keys.refuse_a_short_window()?;
    let moe = HfMoe {
        experts: keys.experts()?,
        top_k: keys.size("num_experts_per_tok")?,
        // There is no key for it.
        normalize: true,
        aux_coefficient: keys.number("router_aux_loss_coef")?.unwrap_or(0.001),
        jitter: keys.number("router_jitter_noise")?.unwrap_or(0.0),
    };
    HfConfig::read(&MIXTRAL, keys, Defaults { rope_theta: 1e6, norm_eps: 1e-5 }, Some(moe))
}

fn write(config: &HfConfig, keys: &mut Map<String, Value>) {
    let moe = config.experts();
    write_router(moe, keys);
    keys.insert("num_local_experts".into(), json!(moe.experts));
    keys.insert("router_jitter_noise".into(), json!(moe.jitter));
    keys.insert("sliding_window".into(), Value::Null);
}

/// The published names are written. transformers 5 has the names of younger families when it does not restore these.
const EXPERTS: ExpertNames = ExpertNames {
    router: &["block_sparse_moe.gate.weight", "mlp.gate.weight"],
    gate: "block_sparse_moe.experts.{e}.w1.weight",
    up: "block_sparse_moe.experts.{e}.w3.weight",
    down: "block_sparse_moe.experts.{e}.w2.weight",
    stacked: Some(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
};

fn layout(config: &HfConfig) -> Vec<ParameterLayout> {
    hf_tensors::decoder(config, QkNorms::None, |layer| hf_tensors::experts(config, layer, &EXPERTS))
}

#[cfg(feature = "model")]
fn express(config: &ModelConfig) -> Result<HfConfig, String> {
    express::swiglu(config)?;
    express::qk_norm(config, QkNorm::None)?;
    need(config.clip_qkv.is_none(), "clip_qkv has no place")?;
    let (d_expert, moe) = express::experts(config)?;
    need(moe.normalize, "router.normalize must be true")?;
    let moe = HfMoe { jitter: express::jitter(config), ..moe };
    Ok(express::decoder(&MIXTRAL, config, d_expert, Some(moe)))
}
