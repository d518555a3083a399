//! Between a family's `config.json` and our [`ModelConfig`]: the parts of which a family's `express` and `model` are made.
//!
//! "Can express" means: another program that reads the files computes the same logits. What only concerns training (noise,
//! capacity, balance losses) is kept under our own key and does not matter here; anything with parameters of its own does.
//! Reasons are half a sentence, which follows "the mixtral layout cannot hold this model:".

use mixtura_nn::{FfnActivation, LayerFfn, ModelConfig, MoeConfig, QkNorm};
use mixtura_routing::{Activation, BalanceConfig, BalanceLoss, Noise, Normalize, Policy, RouterConfig, Scorer};

use crate::families::{FAMILIES, HfFamily};
use crate::family::Family;
use crate::hf_config::{HfConfig, HfMoe};

impl Family {
    /// The Hugging Face family that computes the same logits from this model's weights, or [`Family::Mixtura`].
    pub fn of(config: &ModelConfig) -> Self {
        let first = FAMILIES.iter().find(|family| (family.express)(config).is_ok());
        first.map_or(Self::Mixtura, |family| Self::Hf(family))
    }
}

/// The reason if a condition does not hold.
pub(crate) fn need(holds: bool, reason: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(reason.to_string()) }
}

/// The model is one at all, and its networks are SwiGLU.
pub(crate) fn swiglu(config: &ModelConfig) -> Result<(), String> {
    config.validate().map_err(|e| e.to_string())?;
    need(config.activation == FfnActivation::Swiglu, "activation must be swiglu")
}

/// The norms on queries and keys are this family's.
pub(crate) fn qk_norm(config: &ModelConfig, norm: QkNorm) -> Result<(), String> {
    need(config.qk_norm == norm, &format!("qk_norm must be {norm:?}"))
}

/// Every layer is dense and has this hidden width.
pub(crate) fn dense(config: &ModelConfig) -> Result<usize, String> {
    match same_in_every_layer(config)? {
        LayerFfn::Dense { d_dense } => Ok(d_dense),
        LayerFfn::Moe { .. } => Err("layers must be dense".into()),
    }
}

/// Every layer has the same experts of one hidden width, selected by softmax and top-k, without jitter: their width, and what
/// `config.json` says of them.
pub(crate) fn experts(config: &ModelConfig) -> Result<(usize, HfMoe), String> {
    match (same_in_every_layer(config)?, &config.moe) {
        (LayerFfn::Moe { experts, d_expert, d_shared }, Some(moe)) => {
            need(d_shared == 0, "shared experts have no place")?;
            Ok((d_expert, softmax_top_k(moe, experts)?))
        }
        _ => Err("layers must have experts".into()),
    }
}

fn same_in_every_layer(config: &ModelConfig) -> Result<LayerFfn, String> {
    let ffn = config.layer_ffn(0).map_err(|e| e.to_string())?;
    for layer in 1..config.layers {
        need(config.layer_ffn(layer).as_ref() == Ok(&ffn), "every layer must have the same feed-forward part")?;
    }
    Ok(ffn)
}

fn softmax_top_k(moe: &MoeConfig, experts: usize) -> Result<HfMoe, String> {
    let router = &moe.router;
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
    Ok(HfMoe {
        experts,
        top_k: moe.top_k,
        normalize: selected || router.normalize != Normalize::Never,
        aux_coefficient: if moe.balance.loss == BalanceLoss::Switch { moe.balance.coefficient } else { 0.0 },
        jitter: 0.0,
    })
}

/// The jitter that a family with a key for it writes.
pub(crate) fn jitter(config: &ModelConfig) -> f64 {
    match config.moe.as_ref().map(|moe| moe.router.noise) {
        Some(Noise::Jitter { eps }) => eps,
        _ => 0.0,
    }
}

/// The keys that every decoder has; `intermediate` is the hidden width of an expert, or of the dense network.
pub(crate) fn decoder(
    family: &'static HfFamily,
    config: &ModelConfig,
    intermediate: usize,
    moe: Option<HfMoe>,
) -> HfConfig {
    let plain_width = config.head_dim() * config.heads == config.d_model;
    HfConfig {
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
        clip_qkv: None,
        tied: config.tied,
        moe,
        native: None,
    }
}

/// The model of a file, without norms on queries and keys: experts in every layer, or a dense network.
///
/// `router_aux_loss_coef` becomes the coefficient as it is. The losses differ: Hugging Face's is k where ours is 1 at perfect
/// balance, and it averages over all layers' tokens before it multiplies. Jitter there shakes what the experts see too, here
/// only what the router sees. Neither changes a logit.
pub(crate) fn model(hf: &HfConfig) -> ModelConfig {
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
        tied: hf.tied,
        d_dense: hf.moe.is_none().then_some(hf.intermediate),
        moe,
        ..ModelConfig::new(hf.hidden, hf.layers, hf.heads, hf.context)
    }
}
