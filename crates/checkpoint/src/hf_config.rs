//! What the `config.json` of a Hugging Face family says, in terms that all families share.
//!
//! Both spellings are read, the older one (that every reader knows) is written. [`HfConfig::parse`] is a pure function on
//! bytes; what a family reads beyond these keys, its defaults and what it refuses are in its file in `families/`.
//!
//! | older spelling (written) | transformers 5 (read too) |
//! | --- | --- |
//! | `rope_theta`, `rope_scaling` | `rope_parameters.{rope_theta, rope_type}` |
//! | `torch_dtype` | `dtype` |
//! | `num_experts`, `num_local_experts`: the family's own | either |

use serde_json::{Map, Value, json};

use crate::error::FormatError;
use crate::families::HfFamily;
use crate::family::Family;
use crate::hf_keys::{Keys, Parsed, pretty};
use crate::token_ids::TokenIds;
use crate::write::StoredType;

/// The part of a `config.json` that decides the numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct HfConfig {
    /// Whose keys and tensors these are.
    pub family: &'static HfFamily,
    /// `vocab_size`.
    pub vocab: usize,
    /// `hidden_size`.
    pub hidden: usize,
    /// `intermediate_size`: of one expert, or of the dense network.
    pub intermediate: usize,
    /// `num_hidden_layers`.
    pub layers: usize,
    /// `num_attention_heads`.
    pub heads: usize,
    /// `num_key_value_heads`; as many as `heads` when absent.
    pub kv_heads: usize,
    /// `head_dim`; `hidden / heads` when absent or null.
    pub head_dim: Option<usize>,
    /// `max_position_embeddings`.
    pub context: usize,
    /// `rope_theta`.
    pub rope_theta: f64,
    /// `rms_norm_eps`.
    pub norm_eps: f64,
    /// `clip_qkv`: bound on queries, keys and values, where the family has one.
    pub clip_qkv: Option<f64>,
    /// `tie_word_embeddings`.
    pub tied: bool,
    /// The experts; none for a dense family.
    pub moe: Option<HfMoe>,
    /// Our own full configuration under the key `mixtura`, where we wrote the file.
    pub native: Option<Value>,
}

/// The experts in a `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct HfMoe {
    /// `num_experts` or `num_local_experts`.
    pub experts: usize,
    /// `num_experts_per_tok`.
    pub top_k: usize,
    /// `norm_topk_prob`, or what a family without the key does.
    pub normalize: bool,
    /// `router_aux_loss_coef`.
    pub aux_coefficient: f64,
    /// `router_jitter_noise`, in training only.
    pub jitter: f64,
}

/// What a family's code takes where `config.json` says nothing.
pub(crate) struct Defaults {
    pub rope_theta: f64,
    pub norm_eps: f64,
}

impl HfConfig {
    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden / self.heads)
    }

    /// Reads a `config.json`. For `model_type: "mixtura"` only [`native_config`] has anything to read.
    pub fn parse(bytes: &[u8]) -> Parsed<Self> {
        let keys = Keys::parse(bytes)?;
        let found = keys.text("model_type")?;
        match Family::from_model_type(&found) {
            Some(Family::Hf(family)) => (family.read)(&keys),
            Some(Family::Mixtura) | None => Err(unknown(found)),
        }
    }

    /// The keys that every decoder of these families has.
    pub(crate) fn read(family: &'static HfFamily, keys: &Keys, default: Defaults, moe: Option<HfMoe>) -> Parsed<Self> {
        let heads = keys.size("num_attention_heads")?;
        let layers = keys.size("num_hidden_layers")?;
        // The largest published models have some 50 000 experts in all; a table of more pieces than this is a corrupt file.
        if layers.saturating_mul(moe.as_ref().map_or(1, |m| m.experts)) > 1 << 20 {
            let found = format!("{layers}");
            let expected = "layers times experts of at most 2^20".into();
            return Err(FormatError::BadValue { key: "num_hidden_layers".into(), found, expected });
        }
        Ok(Self {
            family,
            vocab: keys.size("vocab_size")?,
            hidden: keys.size("hidden_size")?,
            intermediate: keys.size("intermediate_size")?,
            layers,
            heads,
            kv_heads: keys.optional_size("num_key_value_heads")?.unwrap_or(heads),
            head_dim: keys.optional_size("head_dim")?,
            context: keys.size("max_position_embeddings")?,
            rope_theta: keys.plain_rope_theta()?.unwrap_or(default.rope_theta),
            norm_eps: keys.number("rms_norm_eps")?.unwrap_or(default.norm_eps),
            clip_qkv: None,
            tied: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            moe,
            native: keys.get("mixtura").cloned(),
        })
    }

    /// The experts of a family whose every model has them.
    pub(crate) fn experts(&self) -> &HfMoe {
        self.moe.as_ref().unwrap_or_else(|| panic!("{:?} has experts, and this configuration has none", self.family))
    }

    /// The file in the older spelling, which transformers 4 and 5 and the readers derived from them all understand.
    pub fn to_json(&self, stored: StoredType, ids: &TokenIds) -> Vec<u8> {
        let mut map = json!({
            "architectures": [self.family.architecture],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": ids.bos,
            "eos_token_id": ids.eos_json(),
            "pad_token_id": ids.pad,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.context,
            "model_type": self.family.model_type,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.norm_eps,
            "rope_scaling": null,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
            "torch_dtype": stored.torch_name(),
            "use_cache": true,
            "vocab_size": self.vocab,
        });
        let map = map.as_object_mut().expect("the literal above is an object");
        if let Some(head_dim) = self.head_dim {
            map.insert("head_dim".into(), json!(head_dim));
        }
        (self.family.write)(self, map);
        if let Some(native) = &self.native {
            map.insert("mixtura".into(), native.clone());
        }
        pretty(&Value::Object(map.clone()))
    }
}

/// The keys by which most families with experts say how their router works.
pub(crate) fn write_router(moe: &HfMoe, keys: &mut Map<String, Value>) {
    keys.insert("num_experts_per_tok".into(), json!(moe.top_k));
    keys.insert("output_router_logits".into(), json!(false));
    keys.insert("router_aux_loss_coef".into(), json!(moe.aux_coefficient));
}

fn unknown(found: String) -> FormatError {
    let known: Vec<_> = Family::all().map(Family::model_type).collect();
    FormatError::UnknownFamily { found, known: known.join(", ") }
}

/// The family that a `config.json` names, and our own configuration where it carries one.
pub fn native_config(bytes: &[u8]) -> Parsed<(Family, Option<Value>)> {
    let keys = Keys::parse(bytes)?;
    let found = keys.text("model_type")?;
    let family = Family::from_model_type(&found).ok_or_else(|| unknown(found))?;
    Ok((family, keys.get("mixtura").cloned()))
}

/// `config.json` of the layout that no other program reads.
pub fn mixtura_json(native: Value, stored: StoredType, ids: &TokenIds) -> Vec<u8> {
    pretty(&json!({
        "architectures": [Family::Mixtura.architecture()],
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos_json(),
        "pad_token_id": ids.pad,
        "model_type": Family::Mixtura.model_type(),
        "torch_dtype": stored.torch_name(),
        "mixtura": native,
    }))
}
