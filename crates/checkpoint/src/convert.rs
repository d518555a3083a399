//! Between a family's `config.json` and our [`ModelConfig`], and whether a family can express a model at all.
//!
//! "Can express" means: another program that reads the files computes the same logits. What only concerns training (noise,
//! capacity, balance losses) is kept under our own key and does not matter here; anything with parameters of its own does.

use mixtura_nn::{FfnActivation, LayerFfn, ModelConfig, MoeConfig, QkNorm};
use mixtura_routing::{Activation, BalanceConfig, BalanceLoss, Noise, Normalize, Policy, RouterConfig, Scorer};
use serde_json::{Value, json};

use crate::family::Family;
use crate::hf_config::{HfConfig, HfMoe};

impl Family {
    /// The Hugging Face family that computes the same logits from this model's weights, or [`Family::Mixtura`].
    pub fn of(config: &ModelConfig) -> Self {
        let expresses = |family: &Self| *family == Self::Mixtura || hf_config(config, *family).is_ok();
        Self::ALL.into_iter().find(expresses).unwrap_or(Self::Mixtura)
    }
}

/// A model's configuration in a family's terms, or the first thing that the family lacks.
pub(crate) fn hf_config(config: &ModelConfig, family: Family) -> Result<HfConfig, String> {
    let need = |holds: bool, reason: &str| if holds { Ok(()) } else { Err(reason.to_string()) };
    config.validate().map_err(|e| e.to_string())?;
    need(family != Family::Mixtura, "it is not a Hugging Face family")?;
    need(config.activation == FfnActivation::Swiglu, "activation must be swiglu")?;
    let plain_width = config.head_dim() * config.heads == config.d_model;
    let norm = if family == Family::Olmoe { QkNorm::Full } else { QkNorm::None };
    need(config.qk_norm == norm, &format!("qk_norm must be {norm:?}"))?;
    need(family != Family::Olmoe || plain_width, "head_dim must be d_model / heads")?;
    need(family == Family::Olmoe || config.clip_qkv.is_none(), "clip_qkv has no place")?;
    let ffn = config.layer_ffn(0).map_err(|e| e.to_string())?;
    for layer in 1..config.layers {
        need(config.layer_ffn(layer).as_ref() == Ok(&ffn), "every layer must have the same feed-forward part")?;
    }
    let (intermediate, moe) = match (ffn, &config.moe, family) {
        (LayerFfn::Dense { d_dense }, _, Family::Llama) => (d_dense, None),
        (LayerFfn::Moe { experts, d_expert, d_shared }, Some(moe), Family::Olmoe | Family::Mixtral) => {
            need(d_shared == 0, "shared experts have no place")?;
            (d_expert, Some(hf_moe(moe, experts, family)?))
        }
        (LayerFfn::Dense { .. }, ..) => return Err("layers must have experts".into()),
        (LayerFfn::Moe { .. }, ..) => return Err("layers must be dense".into()),
    };
    Ok(HfConfig {
        family,
        vocab: config.vocab,
        hidden: config.d_model,
        intermediate,
        layers: config.layers,
        heads: config.heads,
        kv_heads: config.kv_heads(),
        head_dim: (!plain_width).then(|| config.head_dim()),
        context: config.context,
        rope_theta: config.rope_theta,
        norm_eps: config.norm_eps,
        clip_qkv: config.clip_qkv,
        tied: config.tied,
        moe,
        native: None,
    })
}

fn hf_moe(moe: &MoeConfig, experts: usize, family: Family) -> Result<HfMoe, String> {
    let router = &moe.router;
    let need = |holds: bool, reason: &str| if holds { Ok(()) } else { Err(reason.to_string()) };
    need(moe.soft.is_none(), "soft layers have no place")?;
    need(router.scorer == Scorer::Linear, "router.scorer must be linear")?;
    // A softmax over the selected logits is the one over all, divided by the sum of the selected.
    let selected = router.activation == Activation::SoftmaxSelected;
    need(selected || router.activation == Activation::Softmax, "router.activation must be softmax")?;
    let top_1 = router.policy == Policy::Switch && router.normalize == Normalize::Never && !selected;
    need(router.policy == Policy::TopK || top_1, "router.policy must be top_k")?;
    need(router.weight_scale == 1.0, "router.weight_scale must be 1")?;
    need(router.eval_capacity_factor == 0.0, "router.eval_capacity_factor must be 0 (no drops)")?;
    need(!matches!(router.noise, Noise::Softplus { .. }), "learned noise has parameters of its own")?;
    need(moe.d_expert_each.is_empty(), "experts must be equally wide")?;
    need(moe.zero_computation.is_none(), "experts without a network have no place")?;
    need(moe.residual.is_none(), "a residual network has no place")?;
    need(moe.balance.bias_update == 0.0, "the bias of loss-free balancing has no place")?;
    let normalize = selected || router.normalize != Normalize::Never;
    need(normalize || family != Family::Mixtral, "router.normalize must be true")?;
    Ok(HfMoe {
        experts,
        top_k: moe.top_k,
        normalize,
        aux_coefficient: if moe.balance.loss == BalanceLoss::Switch { moe.balance.coefficient } else { 0.0 },
        jitter: match (router.noise, family) {
            (Noise::Jitter { eps }, Family::Mixtral) => eps,
            _ => 0.0,
        },
    })
}

/// Our configuration of a family's model.
///
/// `router_aux_loss_coef` becomes the coefficient as it is. The losses differ: Hugging Face's is k where ours is 1 at perfect
/// balance, and it averages over all layers' tokens before it multiplies. Jitter there shakes what the experts see too, here
/// only what the router sees. Neither changes a logit.
pub(crate) fn model_config(hf: &HfConfig) -> ModelConfig {
    let moe = hf.moe.as_ref().map(|moe| MoeConfig {
        router: RouterConfig {
            normalize: if moe.normalize { Normalize::BeforeDrop } else { Normalize::Never },
            noise: if moe.jitter > 0.0 { Noise::Jitter { eps: moe.jitter } } else { Noise::None },
            ..RouterConfig::default()
        },
        balance: BalanceConfig { coefficient: moe.aux_coefficient, z_loss: 0.0, ..BalanceConfig::default() },
        ..MoeConfig::new(moe.experts, moe.top_k, hf.intermediate)
    });
    ModelConfig {
        vocab: hf.vocab,
        kv_heads: Some(hf.kv_heads),
        head_dim: hf.head_dim,
        rope_theta: hf.rope_theta,
        norm_eps: hf.norm_eps,
        clip_qkv: hf.clip_qkv,
        qk_norm: if hf.family == Family::Olmoe { QkNorm::Full } else { QkNorm::None },
        tied: hf.tied,
        d_dense: hf.moe.is_none().then_some(hf.intermediate),
        moe,
        ..ModelConfig::new(hf.hidden, hf.layers, hf.heads, hf.context)
    }
}

/// The first key of a family's file that contradicts our own configuration in the same file: (key, ours, the file's). The
/// balance coefficient and the jitter concern training alone and may differ.
pub(crate) fn first_disagreement(ours: &ModelConfig, file: &HfConfig) -> Option<(&'static str, String, String)> {
    let ours = match hf_config(ours, file.family) {
        Ok(ours) => ours,
        Err(reason) => return Some(("model_type", reason, file.family.to_string())),
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
