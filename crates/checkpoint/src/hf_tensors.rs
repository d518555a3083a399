//! The parts of which a family's table of tensors is made: what all decoders have, dense networks, routers and experts.
//!
//! A name of a tensor in a layer is given from behind `model.layers.N.`; in the names of experts, `{e}` is the expert's number.
//!
//! Legend: D width, E experts, F hidden width, V vocabulary, H query heads, G key-value heads, P head width.

use crate::hf_config::HfConfig;
use crate::layout::{ParameterLayout, Piece, Place};

/// One layer, whose tensors have a name here and another there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layer(usize);

impl Layer {
    pub fn ours(self, tail: &str) -> String {
        format!("layers.{}.{tail}", self.0)
    }

    pub fn theirs(self, tail: &str) -> String {
        format!("model.layers.{}.{tail}", self.0)
    }

    fn norm(self, ours: &str, theirs: &str, width: usize) -> ParameterLayout {
        ParameterLayout::plain(&self.ours(ours), &[width], self.theirs(theirs))
    }
}

/// The norms on queries and keys before the rotation: `self_attn.q_norm` and `k_norm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum QkNorms {
    None,
    /// Over all heads together: H P and G P weights.
    Full,
    /// Over each head, all with the same P weights.
    #[cfg_attr(
        not(all(test, feature = "model")),
        expect(dead_code, reason = "the family of docs/add_a_family.md is the first to have it")
    )]
    PerHead,
}

/// Embedding, attention and norms of every layer with its feed-forward part, the last norm, and the output unless it is tied.
pub(crate) fn decoder(
    config: &HfConfig,
    qk_norms: QkNorms,
    feed_forward: impl Fn(Layer) -> Vec<ParameterLayout>,
) -> Vec<ParameterLayout> {
    let d = config.hidden;
    let mut table =
        vec![ParameterLayout::plain("embed.weight", &[config.vocab, d], "model.embed_tokens.weight".into())];
    for layer in (0..config.layers).map(Layer) {
        table.push(layer.norm("attention_norm.weight", "input_layernorm.weight", d));
        table.extend(attention(config, qk_norms, layer));
        table.push(layer.norm("ffn_norm.weight", "post_attention_layernorm.weight", d));
        table.extend(feed_forward(layer));
    }
    table.push(ParameterLayout::plain("norm.weight", &[d], "model.norm.weight".into()));
    if !config.tied {
        table.push(ParameterLayout::linear("head.weight", d, &[("lm_head.weight".into(), config.vocab)]));
    }
    table
}

/// `[D, (H + 2 G) P]` here; there one matrix each for queries, keys and values.
fn attention(config: &HfConfig, qk_norms: QkNorms, layer: Layer) -> Vec<ParameterLayout> {
    let (d, head_dim) = (config.hidden, config.head_dim());
    let (q, kv) = (config.heads * head_dim, config.kv_heads * head_dim);
    let qkv = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
    let qkv = qkv.map(|(name, width)| (layer.theirs(&format!("self_attn.{name}.weight")), width));
    let mut table = vec![ParameterLayout::linear(&layer.ours("attention.qkv"), d, &qkv)];
    let norms = match qk_norms {
        QkNorms::None => None,
        QkNorms::Full => Some((q, kv)),
        QkNorms::PerHead => Some((head_dim, head_dim)),
    };
    if let Some((q, k)) = norms {
        table.push(layer.norm("attention.q_norm", "self_attn.q_norm.weight", q));
        table.push(layer.norm("attention.k_norm", "self_attn.k_norm.weight", k));
    }
    let out = [(layer.theirs("self_attn.o_proj.weight"), d)];
    table.push(ParameterLayout::linear(&layer.ours("attention.out"), q, &out));
    table
}

/// Where a dense network lies in a layer.
pub(crate) struct DenseNames {
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
}

/// The feed-forward part of a layer without experts.
pub(crate) fn dense(config: &HfConfig, layer: Layer, names: &DenseNames) -> Vec<ParameterLayout> {
    let (d, f) = (config.hidden, config.intermediate);
    let each = |_, name: &str| layer.theirs(name);
    vec![
        per_expert(&layer.ours("mlp.gate_up"), 1, d, f, &[names.gate, names.up], each, None),
        per_expert(&layer.ours("mlp.down"), 1, f, d, &[names.down], each, None),
    ]
}

/// Where the router and the experts of a layer lie.
pub(crate) struct ExpertNames {
    /// Written under the first name, read from any.
    pub router: &'static [&'static str],
    /// One tensor for each expert, which is what is written; `{e}` is its number.
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
    /// `[E, 2 F, D]` (gate rows, then up rows) and `[E, D, F]`: read where the tensors above are absent.
    pub stacked: Option<[&'static str; 2]>,
}

/// Router and experts of a layer.
pub(crate) fn experts(config: &HfConfig, layer: Layer, names: &ExpertNames) -> Vec<ParameterLayout> {
    let (d, f, e) = (config.hidden, config.intermediate, config.experts().experts);
    let [first, others @ ..] = names.router else { panic!("a router has a name") };
    let mut router = ParameterLayout::linear(&layer.ours("moe.router.weight"), d, &[(layer.theirs(first), e)]);
    let places = &mut router.pieces[0].places;
    let shape = places[0].shape.clone();
    places.extend(others.iter().map(|name| Place { name: layer.theirs(name), shape: shape.clone(), first: 0 }));
    let each = |expert: usize, name: &str| layer.theirs(&name.replace("{e}", &expert.to_string()));
    let [gate_up, down] = names.stacked.map_or([None, None], |pair| pair.map(|name| Some(layer.theirs(name))));
    let into = [names.gate, names.up];
    vec![
        router,
        per_expert(&layer.ours("moe.experts.gate_up"), e, d, f, &into, each, gate_up),
        per_expert(&layer.ours("moe.experts.down"), e, f, d, &[names.down], each, down),
    ]
}

/// `[E, in, parts * out]` here; there `[out, in]` for each expert and part, or all of them in one `[E, parts * out, in]`.
fn per_expert(
    name: &str,
    experts: usize,
    inputs: usize,
    outputs: usize,
    parts: &[&str],
    stored: impl Fn(usize, &str) -> String,
    stacked: Option<String>,
) -> ParameterLayout {
    let total = parts.len() * outputs;
    let mut pieces = Vec::with_capacity(experts * parts.len());
    for e in 0..experts {
        for (p, part) in parts.iter().enumerate() {
            let mut places = vec![Place { name: stored(e, part), shape: vec![outputs, inputs], first: 0 }];
            if let Some(stacked) = &stacked {
                let first = (e * total + p * outputs) * inputs;
                places.push(Place { name: stacked.clone(), shape: vec![experts, total, inputs], first });
            }
            let first = e * inputs * total + p * outputs;
            pieces.push(Piece { places, first, stride: total, rows: inputs, cols: outputs, transposed: true });
        }
    }
    ParameterLayout { name: name.into(), shape: vec![experts, inputs, total], pieces }
}
