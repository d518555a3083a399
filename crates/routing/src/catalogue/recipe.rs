//! What a name means: the keys of `[model.moe]` that a paper decides, for every policy and every published system.
//!
//! A config file that names a policy (`policy = "switch"`) or a system (`recipe = "moe_plus_plus"`) and leaves other keys out gets
//! the values from here; they are those that [`crate::catalogue::explain`] shows. A balance is part of a recipe only where the paper has one
//! of its own, and then it is the paper's whole: what it lacks (z-loss, entropy) is 0. Everywhere else the usual balance stays.

use crate::config::{
    Activation, BalanceConfig, BalanceLoss, BalanceScope, DropOrder, MESH_THRESHOLD, Noise, Normalize, Policy,
    ReluControl, RouterConfig, SYSTEMS, SecondChoice, ZeroComputation,
};
use crate::residual::Residual;
use crate::soft::config::SoftConfig;
use serde::Serialize;

/// Values of the keys of `[model.moe]`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recipe {
    /// Choices per token; `None` where the source leaves them open, and for soft layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// Experts that every token visits besides.
    #[serde(skip_serializing_if = "is_zero")]
    pub shared_experts: usize,
    /// How the shared expert joins the others, if not by addition.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub residual: Option<Residual>,
    /// Experts are not equally wide: the widths of the first and of the last, relative to `d_expert`, the others in equal steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relative_widths: Option<[f64; 2]>,
    /// Experts without a network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_computation: Option<ZeroComputation>,
    /// `[model.moe.router]`; `None` for soft layers, which select nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub router: Option<RouterConfig>,
    /// `[model.moe.balance]`; `None` for soft layers, which have nothing to balance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balance: Option<BalanceConfig>,
    /// A soft layer instead of a router.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub soft: Option<SoftConfig>,
}

fn is_zero(value: &usize) -> bool {
    *value == 0
}

impl Recipe {
    /// The recipe of a policy with these numbers, for its paper's number of choices, or for two where that is open.
    ///
    /// ```
    /// use mixtura_routing::Policy;
    /// use mixtura_routing::catalogue::recipe::Recipe;
    /// let switch = Recipe::of(Policy::Switch);
    /// assert_eq!((switch.top_k, switch.balance.unwrap().coefficient), (Some(1), 0.01));
    /// ```
    pub fn of(policy: Policy) -> Self {
        let top_k = match &policy {
            Policy::TopK => None,
            // The target share of gates is k/E in ReMoE; hash and S-BASE layers take one expert.
            Policy::Switch | Policy::SampledTop1 | Policy::Base | Policy::Relu | Policy::Hash | Policy::Sinkhorn => {
                Some(1)
            }
            Policy::Gshard { .. } | Policy::SampledSecond | Policy::SparseMixer { .. } => Some(2),
            // Expert choice: capacity factor 2. Top-p: only the balance loss reads k.
            Policy::ExpertChoice | Policy::ExpertChoiceCapped { .. } | Policy::TopP { .. } => Some(2),
            Policy::NoisyTopK | Policy::Batchwise | Policy::Hierarchical { .. } => Some(4),
            Policy::GroupLimited { .. } => Some(8),
        };
        let balance = balance_of(&policy);
        let router = RouterConfig::of(policy, top_k.unwrap_or(2));
        Self { top_k, balance: Some(balance), ..Self::routing(router) }
    }

    /// The recipe of a policy or system by its name in the manual.
    pub fn named(name: &str) -> Option<Self> {
        if let Some(policy) = Policy::named(name) {
            return Some(Self::of(policy));
        }
        let plain = RouterConfig::default();
        let raw = RouterConfig { normalize: Normalize::Never, ..plain.clone() };
        let full = |router: RouterConfig, drop_order| RouterConfig { capacity_factor: 1.25, drop_order, ..router };
        let choices = |k: usize, router: RouterConfig| Self { top_k: Some(k), ..Self::routing(router) };
        Some(match name {
            "st_moe" => Self::of(Policy::Gshard { second: SecondChoice::Threshold(MESH_THRESHOLD) }),
            "mixtral" => choices(2, RouterConfig { activation: Activation::SoftmaxSelected, ..plain }),
            "olmoe" => choices(8, raw),
            "deepseek_moe" => Self { shared_experts: 2, ..choices(6, raw) },
            "v_moe" => {
                let noise = Noise::Normal { scale: 1.0 };
                let balance = own_balance(BalanceLoss::ImportanceLoad, 0.005);
                let router = RouterConfig { noise, ..full(raw, DropOrder::BatchPriority) };
                Self { balance: Some(balance), ..choices(2, router) }
            }
            "tutel" => choices(2, full(plain, DropOrder::ChoiceMajor)),
            "rts" => choices(1, full(raw, DropOrder::Random)),
            "sats" => choices(2, full(raw, DropOrder::Similarity)),
            "moe_plus_plus" => {
                let zero = ZeroComputation::default();
                let balance = own_balance(BalanceLoss::Switch, zero.beta);
                Self { zero_computation: Some(zero), balance: Some(balance), ..choices(2, raw) }
            }
            "hmoe" => {
                let balance = BalanceConfig { entropy: 0.03, ..own_balance(BalanceLoss::ParameterPenalty, 0.1) };
                // The paper's best: 9, 11, ..., 23 for eight experts, sixteenths of their mean.
                let widths = [9.0 / 16.0, 23.0 / 16.0];
                let policy = Policy::named("top_p").unwrap_or_default();
                Self { relative_widths: Some(widths), balance: Some(balance), ..Self::of(policy) }
            }
            "residual_moe" => Self { residual: Some(Residual::Coefficient), ..Self::of(Policy::Switch) },
            "block_causal_soft" => Self { shared_experts: 1, ..Self::soft(SoftConfig::of("block_causal")?) },
            kind => Self::soft(SoftConfig::of(kind).filter(|_| SYSTEMS.contains(&kind))?),
        })
    }

    /// Every name that [`named`](Self::named) knows.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Policy::NAMES.iter().copied().chain(SYSTEMS)
    }

    /// Whether the router is only a part of what the name means, so that another policy may take its place.
    pub fn is_more_than_a_router(&self) -> bool {
        self.shared_experts > 0
            || self.residual.is_some()
            || self.relative_widths.is_some()
            || self.zero_computation.is_some()
    }

    fn routing(router: RouterConfig) -> Self {
        Self {
            top_k: None,
            shared_experts: 0,
            residual: None,
            relative_widths: None,
            zero_computation: None,
            router: Some(router),
            balance: Some(BalanceConfig::default()),
            soft: None,
        }
    }

    fn soft(soft: SoftConfig) -> Self {
        Self { router: None, balance: None, soft: Some(soft), ..Self::routing(RouterConfig::default()) }
    }
}

/// A loss with nothing beside it.
fn own_balance(loss: BalanceLoss, coefficient: f64) -> BalanceConfig {
    BalanceConfig { loss, coefficient, z_loss: 0.0, ..BalanceConfig::default() }
}

fn balance_of(policy: &Policy) -> BalanceConfig {
    match policy {
        // Shazeer et al. 2017, both coefficients 0.1.
        Policy::NoisyTopK | Policy::Hierarchical { .. } => own_balance(BalanceLoss::ImportanceLoad, 0.1),
        // DeepSeek-V3 section 4.2: the bias keeps the balance, a sequence loss of 1e-4 guards against extremes.
        Policy::GroupLimited { .. } => {
            BalanceConfig { scope: BalanceScope::Sequence, bias_update: 1e-3, ..own_balance(BalanceLoss::Switch, 1e-4) }
        }
        Policy::Relu => BalanceConfig {
            controller: Some(ReluControl::default()),
            ..own_balance(BalanceLoss::Switch, BalanceConfig::default().coefficient)
        },
        // Even by construction in training, or without a router that a loss could move.
        Policy::ExpertChoice
        | Policy::ExpertChoiceCapped { .. }
        | Policy::Batchwise
        | Policy::Base
        | Policy::Sinkhorn
        | Policy::Hash => own_balance(BalanceLoss::None, 0.0),
        Policy::TopK
        | Policy::Switch
        | Policy::Gshard { .. }
        | Policy::SampledTop1
        | Policy::SampledSecond
        | Policy::TopP { .. }
        | Policy::SparseMixer { .. } => BalanceConfig::default(),
    }
}
