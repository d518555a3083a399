//! Llama: the dense model, no experts and no norm on queries and keys.
//!
//! | | |
//! | --- | --- |
//! | read | the keys of every decoder; `rope_theta` (1e4), `rms_norm_eps` (1e-6) |
//! | tensors | `mlp.{gate_proj, up_proj, down_proj}` |
//! | cannot express | experts, clamped projections, layers of different widths |
//! | refused | what `read` begins with |

#[cfg(feature = "model")]
use mixtura_nn::{ModelConfig, QkNorm};

#[cfg(feature = "model")]
use crate::express::{self, need};
use crate::families::HfFamily;
use crate::hf_config::{Defaults, HfConfig};
use crate::hf_keys::{Keys, Parsed};
use crate::hf_tensors::{self, DenseNames, QkNorms};
use crate::layout::ParameterLayout;

pub(crate) static LLAMA: HfFamily = HfFamily {
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    read,
    write: |_, _| {},
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
    HfConfig::read(&LLAMA, keys, Defaults { rope_theta: 1e4, norm_eps: 1e-6 }, None)
}

const DENSE: DenseNames =
    DenseNames { gate: "mlp.gate_proj.weight", up: "mlp.up_proj.weight", down: "mlp.down_proj.weight" };

fn layout(config: &HfConfig) -> Vec<ParameterLayout> {
    hf_tensors::decoder(config, QkNorms::None, |layer| hf_tensors::dense(config, layer, &DENSE))
}

#[cfg(feature = "model")]
fn express(config: &ModelConfig) -> Result<HfConfig, String> {
    express::swiglu(config)?;
    express::qk_norm(config, QkNorm::None)?;
    need(config.clip_qkv.is_none(), "clip_qkv has no place")?;
    let d_dense = express::dense(config)?;
    Ok(express::decoder(&LLAMA, config, d_dense, None))
}
