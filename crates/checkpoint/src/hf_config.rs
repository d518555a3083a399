//! `config.json` of the Hugging Face families: both spellings are read, the older one (that every reader knows) is written.
//!
//! [`HfConfig::parse`] is a pure function on bytes. Keys that would change the numbers and are not implemented are refused by
//! name; keys that only concern training scripts or generation are left alone.
//!
//! | older spelling (written) | transformers 5 (read too) |
//! | --- | --- |
//! | `rope_theta`, `rope_scaling` | `rope_parameters.{rope_theta, rope_type}` |
//! | `torch_dtype` | `dtype` |
//! | `num_experts` (OLMoE) | `num_local_experts` is accepted as well |

use serde_json::{Map, Value, json};

use crate::error::FormatError;
use crate::family::Family;
use crate::token_ids::TokenIds;
use crate::write::StoredType;

pub(crate) type Parsed<T> = Result<T, FormatError>;

/// The part of a `config.json` that decides the numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct HfConfig {
    /// Which layout the tensors have.
    pub family: Family,
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
    /// `clip_qkv` (OLMoE): bound on queries, keys and values.
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
    /// `norm_topk_prob`; Mixtral always normalises.
    pub normalize: bool,
    /// `router_aux_loss_coef`.
    pub aux_coefficient: f64,
    /// `router_jitter_noise`, in training only.
    pub jitter: f64,
}

impl HfConfig {
    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden / self.heads)
    }

    /// Reads a `config.json`. For `model_type: "mixtura"` only [`native_config`] has anything to read.
    pub fn parse(bytes: &[u8]) -> Parsed<Self> {
        let keys = Keys(object(bytes)?);
        let model_type = keys.text("model_type")?;
        let family = Family::from_model_type(&model_type).filter(|f| *f != Family::Mixtura).ok_or_else(|| {
            FormatError::UnknownFamily { found: model_type, known: "olmoe, mixtral, llama, mixtura".into() }
        })?;
        keys.refuse_what_changes_the_numbers()?;
        let heads = keys.size("num_attention_heads")?;
        let layers = keys.size("num_hidden_layers")?;
        let moe = keys.moe(family)?;
        // The largest published models have some 50 000 experts in all; a table of more pieces than this is a corrupt file.
        if layers.saturating_mul(moe.as_ref().map_or(1, |m| m.experts)) > 1 << 20 {
            let found = format!("{layers}");
            let expected = "layers times experts of at most 2^20".into();
            return Err(FormatError::BadValue { key: "num_hidden_layers".into(), found, expected });
        }
        let context = keys.size("max_position_embeddings")?;
        keys.refuse_a_sliding_window_shorter_than(context)?;
        Ok(Self {
            family,
            vocab: keys.size("vocab_size")?,
            hidden: keys.size("hidden_size")?,
            intermediate: keys.size("intermediate_size")?,
            layers,
            heads,
            kv_heads: keys.optional_size("num_key_value_heads")?.unwrap_or(heads),
            head_dim: keys.optional_size("head_dim")?,
            context,
            rope_theta: keys.rope_theta(family)?,
            norm_eps: keys.number("rms_norm_eps")?.unwrap_or(if family == Family::Llama { 1e-6 } else { 1e-5 }),
            clip_qkv: keys.clip_qkv(family)?,
            tied: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            moe,
            native: keys.get("mixtura").cloned(),
        })
    }

    /// The file in the older spelling, which transformers 4 and 5 and the readers derived from them all understand.
    pub fn to_json(&self, stored: StoredType, ids: &TokenIds) -> Vec<u8> {
        let mut map = json!({
            "architectures": [self.family.architecture()],
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
            "model_type": self.family.model_type(),
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
        let mut put = |key: &str, value: Value| map.insert(key.into(), value);
        if let Some(head_dim) = self.head_dim {
            put("head_dim", json!(head_dim));
        }
        if let Some(moe) = &self.moe {
            put("num_experts_per_tok", json!(moe.top_k));
            put("output_router_logits", json!(false));
            put("router_aux_loss_coef", json!(moe.aux_coefficient));
            if self.family == Family::Mixtral {
                put("num_local_experts", json!(moe.experts));
                put("router_jitter_noise", json!(moe.jitter));
                put("sliding_window", Value::Null);
            } else {
                put("num_experts", json!(moe.experts));
                put("norm_topk_prob", json!(moe.normalize));
                put("clip_qkv", json!(self.clip_qkv));
            }
        }
        if let Some(native) = &self.native {
            put("mixtura", native.clone());
        }
        pretty(&Value::Object(map.clone()))
    }
}

/// The family that a `config.json` names, and our own configuration where it carries one.
pub fn native_config(bytes: &[u8]) -> Parsed<(Family, Option<Value>)> {
    let keys = Keys(object(bytes)?);
    let found = keys.text("model_type")?;
    let family = Family::from_model_type(&found)
        .ok_or_else(|| FormatError::UnknownFamily { found, known: "olmoe, mixtral, llama, mixtura".into() })?;
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

pub(crate) fn pretty(value: &Value) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("maps with string keys always serialise");
    bytes.push(b'\n');
    bytes
}

pub(crate) fn object(bytes: &[u8]) -> Parsed<Map<String, Value>> {
    FormatError::parse(bytes)
}

struct Keys(Map<String, Value>);

impl Keys {
    /// An absent key and a null one mean the same in these files.
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn text(&self, key: &str) -> Parsed<String> {
        let value = self.get(key).ok_or_else(|| FormatError::MissingKey { key: key.into() })?;
        value.as_str().map(str::to_string).ok_or_else(|| bad(key, value, "a string"))
    }

    fn optional_size(&self, key: &str) -> Parsed<Option<usize>> {
        // Larger sizes exist in no model; refused here, no product of four of them overflows further on.
        let limit = if key == "max_position_embeddings" { 1 << 31 } else { 1 << 20 };
        let fits = |v: &Value| v.as_u64().filter(|n| (1..=limit).contains(n)).map(|n| n as usize);
        self.get(key)
            .map(|v| fits(v).ok_or_else(|| bad(key, v, &format!("a whole number from 1 to {limit}"))))
            .transpose()
    }

    fn size(&self, key: &str) -> Parsed<usize> {
        self.optional_size(key)?.ok_or_else(|| FormatError::MissingKey { key: key.into() })
    }

    fn number(&self, key: &str) -> Parsed<Option<f64>> {
        self.get(key).map(|v| v.as_f64().ok_or_else(|| bad(key, v, "a number"))).transpose()
    }

    fn flag(&self, key: &str) -> Parsed<Option<bool>> {
        self.get(key).map(|v| v.as_bool().ok_or_else(|| bad(key, v, "true or false"))).transpose()
    }

    fn moe(&self, family: Family) -> Parsed<Option<HfMoe>> {
        if family == Family::Llama {
            return Ok(None);
        }
        let experts = match self.optional_size("num_experts")? {
            Some(n) => Some(n),
            None => self.optional_size("num_local_experts")?,
        };
        let normalize = match family {
            Family::Mixtral => true,
            _ => self.flag("norm_topk_prob")?.unwrap_or(false),
        };
        let key = || "num_experts or num_local_experts".into();
        Ok(Some(HfMoe {
            experts: experts.ok_or_else(|| FormatError::MissingKey { key: key() })?,
            top_k: self.size("num_experts_per_tok")?,
            normalize,
            aux_coefficient: self.number("router_aux_loss_coef")?.unwrap_or(match family {
                Family::Mixtral => 0.001,
                _ => 0.01,
            }),
            // Only Mixtral's code knows the key.
            jitter: self.number("router_jitter_noise")?.filter(|_| family == Family::Mixtral).unwrap_or(0.0),
        }))
    }

    /// `rope_theta` of either spelling; a scaled rotary embedding is refused.
    fn rope_theta(&self, family: Family) -> Parsed<f64> {
        let mut theta = self.number("rope_theta")?;
        for key in ["rope_scaling", "rope_parameters"] {
            let Some(value) = self.get(key) else { continue };
            let map = value.as_object().ok_or_else(|| bad(key, value, "an object"))?;
            let kind = map.get("rope_type").or_else(|| map.get("type")).and_then(Value::as_str).unwrap_or("default");
            if kind != "default" {
                return Err(unsupported(
                    key,
                    value,
                    "only the plain rotary embedding is implemented (type \"default\")",
                ));
            }
            if let Some(inner) = map.get("rope_theta").filter(|v| !v.is_null()) {
                let key = format!("{key}.rope_theta");
                theta = Some(inner.as_f64().ok_or_else(|| bad(&key, inner, "a number"))?);
            }
        }
        Ok(theta.unwrap_or(if family == Family::Mixtral { 1e6 } else { 1e4 }))
    }

    /// Only OLMoE's code knows the key; elsewhere a reader would pass it over, and we refuse to guess.
    fn clip_qkv(&self, family: Family) -> Parsed<Option<f64>> {
        let (Some(clip), Some(value)) = (self.number("clip_qkv")?, self.get("clip_qkv")) else { return Ok(None) };
        if family != Family::Olmoe {
            return Err(unsupported("clip_qkv", value, "only OLMoE clamps queries, keys and values"));
        }
        match clip > 0.0 {
            true => Ok(Some(clip)),
            false => Err(bad("clip_qkv", value, "a positive number or null")),
        }
    }

    fn refuse_what_changes_the_numbers(&self) -> Parsed<()> {
        let accepted: [(&str, &[Value], &str); 5] = [
            ("hidden_act", &[json!("silu"), json!("swish")], "experts are SwiGLU in these families"),
            ("attention_bias", &[json!(false)], "projections have no bias"),
            ("mlp_bias", &[json!(false)], "projections have no bias"),
            ("quantization_config", &[], "quantised weights are not read; use the original checkpoint"),
            ("partial_rotary_factor", &[json!(1.0), json!(1)], "the rotation covers the whole head"),
        ];
        for (key, values, reason) in accepted {
            if let Some(value) = self.get(key)
                && !values.contains(value)
            {
                return Err(unsupported(key, value, reason));
            }
        }
        Ok(())
    }

    /// A window that covers the whole context never hides a key; 0, null and `use_sliding_window: false` mean none.
    fn refuse_a_sliding_window_shorter_than(&self, context: usize) -> Parsed<()> {
        if self.flag("use_sliding_window")? == Some(false) {
            return Ok(());
        }
        match self.get("sliding_window") {
            Some(value) => match value.as_u64() {
                Some(0) => Ok(()),
                Some(window) if window >= context as u64 => Ok(()),
                Some(_) => Err(unsupported(
                    "sliding_window",
                    value,
                    "attention sees the whole context; a window of at least max_position_embeddings is accepted",
                )),
                None => Err(bad("sliding_window", value, "a whole number or null")),
            },
            None => Ok(()),
        }
    }
}

pub(crate) fn bad(key: &str, found: &Value, expected: &str) -> FormatError {
    FormatError::BadValue { key: key.into(), found: short(found), expected: expected.into() }
}

fn unsupported(key: &str, value: &Value, reason: &str) -> FormatError {
    FormatError::Unsupported { key: key.into(), value: short(value), reason: reason.into() }
}

/// At most 80 characters of a value, for a message.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
