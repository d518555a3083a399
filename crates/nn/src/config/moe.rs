//! `[model.moe]`: which layers have experts, how many, how wide, and what decides among them.

mod given;

use mixtura_routing::residual::Residual;
use mixtura_routing::soft::config::SoftConfig;
use mixtura_routing::zero_cost::ZeroComputation;
use mixtura_routing::{BalanceConfig, Policy, RouterConfig};
use serde::{Deserialize, Serialize};

use super::size::{LARGEST_SIZE, size};
use crate::error::ConfigError;
use crate::soft::config as soft_config;

/// The experts of a model: `[model.moe]`.
///
/// In a file, `recipe = "mixtral"` or another name of `mixtura route explain` stands for the keys of that policy or system, and
/// `router.policy` for those of the policy. Keys that are given come first; what is written back has every key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "given::GivenMoe")]
pub struct MoeConfig {
    /// Experts E of a layer.
    pub experts: usize,
    /// Experts K that a token visits; left out with soft layers, where every expert has a part in every token.
    #[serde(skip_serializing_if = "is_zero")]
    pub top_k: usize,
    /// Hidden width F of an expert: one number, or one per layer (what dense layers hold there is not used).
    #[serde(skip_serializing_if = "PerLayer::is_absent")]
    pub d_expert: PerLayer,
    /// Hidden width of every expert instead, where they differ (HMoE); the same in every layer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub d_expert_each: Vec<usize>,
    /// Experts that every token visits besides its routed ones; they act as one of `shared_experts * d_shared`.
    pub shared_experts: usize,
    /// Hidden width of one shared expert; that of the layer's routed experts when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub d_shared: Option<usize>,
    /// Multiplies the shared experts' output by sigmoid(w x), as Qwen2-MoE does.
    pub shared_gate: bool,
    /// Residual-MoE: `"coefficient"` mixes experts and shared experts by a learned softmax, `"sum"` adds them. There is at
    /// least one shared expert then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub residual: Option<Residual>,
    /// `[model.moe.zero_computation]`: experts without a network besides the E (MoE++).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_computation: Option<ZeroComputation>,
    /// Which layers have experts: `"all"`, `{ every = 2 }`, or a list of experts per layer where 0 is dense.
    pub layers: MoeLayers,
    /// Short form of `layers = { every = n }`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<usize>,
    /// `[model.moe.router]`.
    pub router: RouterConfig,
    /// `[model.moe.balance]`.
    pub balance: BalanceConfig,
    /// `[model.moe.soft]`: soft layers in place of sparse ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub soft: Option<SoftConfig>,
}

/// Which layers have experts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum MoeLayers {
    /// A word; `"all"` is the only one.
    Named(AllLayers),
    /// Every n-th layer: n-1, 2n-1, ...
    Every(EveryLayer),
    /// Experts of each layer, 0 for a dense one.
    Counts(Vec<usize>),
}

impl MoeLayers {
    /// `"all"`.
    pub const ALL: Self = Self::Named(AllLayers::All);
}

impl Default for MoeLayers {
    fn default() -> Self {
        Self::ALL
    }
}

/// `{ every = n }`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EveryLayer {
    /// The period n.
    pub every: usize,
}

/// The word `"all"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AllLayers {
    /// Every layer has experts.
    All,
}

/// One number for all layers, or one for each.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PerLayer {
    /// The same everywhere.
    Same(usize),
    /// By layer.
    Each(Vec<usize>),
}

impl Default for PerLayer {
    /// Nothing given.
    fn default() -> Self {
        Self::Same(0)
    }
}

impl From<usize> for PerLayer {
    fn from(value: usize) -> Self {
        Self::Same(value)
    }
}

impl PerLayer {
    fn is_absent(&self) -> bool {
        *self == Self::default()
    }

    /// The number of `layer`.
    pub fn at(&self, layer: usize) -> Option<usize> {
        match self {
            Self::Same(value) => Some(*value),
            Self::Each(values) => values.get(layer).copied(),
        }
    }
}

fn is_zero(value: &usize) -> bool {
    *value == 0
}

impl MoeConfig {
    /// `experts` experts of hidden width `d_expert` in every layer, `top_k` per token, everything else at its default: the recipe
    /// of [`Policy::TopK`].
    pub fn new(experts: usize, top_k: usize, d_expert: usize) -> Self {
        Self {
            experts,
            top_k,
            d_expert: PerLayer::Same(d_expert),
            d_expert_each: Vec::new(),
            residual: None,
            zero_computation: None,
            shared_experts: 0,
            d_shared: None,
            shared_gate: false,
            layers: MoeLayers::ALL,
            every: None,
            router: RouterConfig::of(Policy::TopK, top_k),
            balance: BalanceConfig::default(),
            soft: None,
        }
    }

    /// Soft layers of `experts` experts of hidden width `d_expert`.
    pub fn soft(experts: usize, d_expert: usize, soft: SoftConfig) -> Self {
        Self { soft: Some(soft), ..Self::new(experts, 0, d_expert) }
    }
}

impl MoeConfig {
    /// Experts of `layer` out of `layers`, 0 when it is dense.
    pub(super) fn experts_at(&self, layer: usize, layers: usize) -> Result<usize, ConfigError> {
        let period = match (&self.layers, self.every) {
            (MoeLayers::Named(AllLayers::All), period) => period.unwrap_or(1),
            (MoeLayers::Every(period), None) => period.every,
            (MoeLayers::Counts(counts), None) => {
                return counts.get(layer).filter(|_| counts.len() == layers).copied().ok_or_else(|| {
                    ConfigError::new(
                        "moe.layers",
                        format!("{counts:?}"),
                        format!("one number for each of {layers} layers"),
                    )
                });
            }
            (_, Some(every)) => return Err(ConfigError::new("moe.every", every, "absent when moe.layers is given")),
        };
        if period == 0 {
            return Err(ConfigError::new("moe.layers.every", 0, "at least 1"));
        }
        Ok(if (layer + 1).is_multiple_of(period) { self.experts } else { 0 })
    }

    pub(super) fn validate(&self, layers: usize) -> Result<(), ConfigError> {
        if self.experts == 0 {
            return Err(ConfigError::new("moe.experts", 0, "at least 1; a dense model leaves [model.moe] out"));
        }
        let widths = match &self.d_expert {
            PerLayer::Same(width) => std::slice::from_ref(width),
            PerLayer::Each(widths) => widths,
        };
        let counts = match &self.layers {
            MoeLayers::Counts(counts) => counts.as_slice(),
            _ => std::slice::from_ref(&self.experts),
        };
        widths.iter().chain(&self.d_expert_each).try_for_each(|&width| size("moe.d_expert", width, 0, LARGEST_SIZE))?;
        counts.iter().try_for_each(|&count| size("moe.experts", count, 0, LARGEST_SIZE))?;
        size("moe.shared_experts", self.shared_experts, 0, LARGEST_SIZE)?;
        size("moe.d_shared", self.d_shared.unwrap_or(0), 0, LARGEST_SIZE)?;
        if let PerLayer::Each(widths) = &self.d_expert
            && widths.len() != layers
        {
            let expected = format!("one width, or one for each of {layers} layers");
            return Err(ConfigError::new("moe.d_expert", format!("{widths:?}"), expected));
        }
        if !self.d_expert_each.is_empty() && !self.d_expert.is_absent() {
            let found = format!("{:?}", self.d_expert);
            return Err(ConfigError::new("moe.d_expert", found, "absent when moe.d_expert_each is given"));
        }
        if self.shared_gate && self.shared_experts() == 0 {
            return Err(ConfigError::new("moe.shared_gate", true, "false, since moe.shared_experts = 0"));
        }
        if self.shared_experts() > 0 && self.d_shared == Some(0) {
            return Err(ConfigError::new("moe.d_shared", 0, "at least 1"));
        }
        self.validate_soft()?;
        let mut some = false;
        for layer in 0..layers {
            some |= self.experts_at(layer, layers)? > 0;
        }
        if !some {
            return Err(ConfigError::new(
                "moe.layers",
                format!("{:?}", self.layers),
                "at least one layer with experts; a dense model leaves [model.moe] out",
            ));
        }
        Ok(())
    }

    /// Shared experts; a residual layer has at least one.
    pub(super) fn shared_experts(&self) -> usize {
        self.shared_experts.max(usize::from(self.residual.is_some()))
    }

    /// A soft layer must be causal, and what only a sparse one reads must be left out.
    fn validate_soft(&self) -> Result<(), ConfigError> {
        let Some(soft) = &self.soft else { return Ok(()) };
        let expected = "absent with [model.moe.soft]: a soft layer selects nothing and has nothing to balance";
        if self.top_k != 0 {
            return Err(ConfigError::new("moe.top_k", self.top_k, expected));
        }
        if self.router != RouterConfig::default() {
            return Err(ConfigError::new("moe.router", "given", expected));
        }
        if self.balance != BalanceConfig::default() {
            return Err(ConfigError::new("moe.balance", "given", expected));
        }
        for (key, given) in [
            ("moe.d_expert_each", !self.d_expert_each.is_empty()),
            ("moe.residual", self.residual.is_some()),
            ("moe.zero_computation", self.zero_computation.is_some()),
        ] {
            if given {
                return Err(ConfigError::new(key, "given", expected));
            }
        }
        soft_config::validate(soft, self.shared_experts > 0)
    }
}
