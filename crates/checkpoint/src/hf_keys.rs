//! Reading the keys of a `config.json` one by one, and the refusals that families share.
//!
//! A key that would change the numbers and is not implemented is refused by name; keys that only concern training scripts or
//! generation are left alone. Which refusals hold for a family is said in the family's file.

use serde_json::{Map, Value, json};

use crate::error::FormatError;

pub(crate) type Parsed<T> = Result<T, FormatError>;

/// The object that a `config.json` is.
pub(crate) struct Keys(Map<String, Value>);

impl Keys {
    pub fn parse(bytes: &[u8]) -> Parsed<Self> {
        Ok(Self(object(bytes)?))
    }

    /// An absent key and a null one mean the same in these files.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    pub fn text(&self, key: &str) -> Parsed<String> {
        let value = self.get(key).ok_or_else(|| FormatError::MissingKey { key: key.into() })?;
        value.as_str().map(str::to_string).ok_or_else(|| bad(key, value, "a string"))
    }

    pub fn optional_size(&self, key: &str) -> Parsed<Option<usize>> {
        // Larger sizes exist in no model; refused here, no product of four of them overflows further on.
        let limit = if key == "max_position_embeddings" { 1 << 31 } else { 1 << 20 };
        let fits = |v: &Value| v.as_u64().filter(|n| (1..=limit).contains(n)).map(|n| n as usize);
        self.get(key)
            .map(|v| fits(v).ok_or_else(|| bad(key, v, &format!("a whole number from 1 to {limit}"))))
            .transpose()
    }

    pub fn size(&self, key: &str) -> Parsed<usize> {
        self.optional_size(key)?.ok_or_else(|| FormatError::MissingKey { key: key.into() })
    }

    pub fn number(&self, key: &str) -> Parsed<Option<f64>> {
        self.get(key).map(|v| v.as_f64().ok_or_else(|| bad(key, v, "a number"))).transpose()
    }

    pub fn flag(&self, key: &str) -> Parsed<Option<bool>> {
        self.get(key).map(|v| v.as_bool().ok_or_else(|| bad(key, v, "true or false"))).transpose()
    }

    /// `num_experts`, or `num_local_experts`: transformers writes either, whichever the family's own is.
    pub fn experts(&self) -> Parsed<usize> {
        let experts = match self.optional_size("num_experts")? {
            Some(experts) => Some(experts),
            None => self.optional_size("num_local_experts")?,
        };
        experts.ok_or_else(|| FormatError::MissingKey { key: "num_experts or num_local_experts".into() })
    }

    /// `rope_theta` of either spelling; a scaled rotary embedding is refused.
    pub fn plain_rope_theta(&self) -> Parsed<Option<f64>> {
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
        Ok(theta)
    }

    /// Refuses every value of a key but those that change nothing.
    pub fn refuse_all_but(&self, accepted: &[Value], key: &str, reason: &str) -> Parsed<()> {
        match self.get(key) {
            Some(value) if !accepted.contains(value) => Err(unsupported(key, value, reason)),
            _ => Ok(()),
        }
    }

    pub fn refuse_other_activations(&self) -> Parsed<()> {
        let silu = [json!("silu"), json!("swish")];
        self.refuse_all_but(&silu, "hidden_act", "experts are SwiGLU in these families")
    }

    pub fn refuse_biases(&self) -> Parsed<()> {
        self.refuse_all_but(&[json!(false)], "attention_bias", "projections have no bias")?;
        self.refuse_all_but(&[json!(false)], "mlp_bias", "projections have no bias")
    }

    pub fn refuse_quantised_weights(&self) -> Parsed<()> {
        self.refuse_all_but(&[], "quantization_config", "quantised weights are not read; use the original checkpoint")
    }

    pub fn refuse_a_partial_rotation(&self) -> Parsed<()> {
        let whole = [json!(1.0), json!(1)];
        self.refuse_all_but(&whole, "partial_rotary_factor", "the rotation covers the whole head")
    }

    /// For families whose code would pass the key over: we refuse to guess.
    pub fn refuse_clip_qkv(&self) -> Parsed<()> {
        self.refuse_all_but(&[], "clip_qkv", "this family does not clamp queries, keys and values")
    }

    /// A window that covers the whole context never hides a key; 0, null and `use_sliding_window: false` mean none.
    pub fn refuse_a_short_window(&self) -> Parsed<()> {
        if self.flag("use_sliding_window")? == Some(false) {
            return Ok(());
        }
        let Some(value) = self.get("sliding_window") else { return Ok(()) };
        match value.as_u64() {
            Some(0) => Ok(()),
            Some(window) if window >= self.size("max_position_embeddings")? as u64 => Ok(()),
            Some(_) => Err(unsupported(
                "sliding_window",
                value,
                "attention sees the whole context; a window of at least max_position_embeddings is accepted",
            )),
            None => Err(bad("sliding_window", value, "a whole number or null")),
        }
    }
}

pub(crate) fn pretty(value: &Value) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("maps with string keys always serialise");
    bytes.push(b'\n');
    bytes
}

pub(crate) fn object(bytes: &[u8]) -> Parsed<Map<String, Value>> {
    FormatError::parse(bytes)
}

pub(crate) fn bad(key: &str, found: &Value, expected: &str) -> FormatError {
    FormatError::BadValue { key: key.into(), found: short(found), expected: expected.into() }
}

pub(crate) fn unsupported(key: &str, value: &Value, reason: &str) -> FormatError {
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
