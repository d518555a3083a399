//! `[model.moe]` as written, and how a recipe fills in what was left out.
//!
//! The recipe is that of `recipe = "NAME"`, or else of `router.policy`, or else of top-k. A given key always wins; two names that
//! contradict each other are refused.

use mixtura_routing::catalogue::explain;
use mixtura_routing::residual::Residual;
use mixtura_routing::soft::config::SoftConfig;
use mixtura_routing::zero_cost::ZeroComputation;
use mixtura_routing::{GivenBalance, GivenRouter, Policy, Recipe, RouterConfig};
use serde::Deserialize;

use super::{MoeConfig, MoeLayers, PerLayer};

/// The keys of [`MoeConfig`], and `recipe`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct GivenMoe {
    recipe: Option<String>,
    experts: usize,
    top_k: Option<usize>,
    #[serde(default)]
    d_expert: PerLayer,
    #[serde(default)]
    d_expert_each: Vec<usize>,
    shared_experts: Option<usize>,
    d_shared: Option<usize>,
    #[serde(default)]
    shared_gate: bool,
    residual: Option<Residual>,
    zero_computation: Option<ZeroComputation>,
    #[serde(default)]
    layers: MoeLayers,
    every: Option<usize>,
    #[serde(default)]
    router: GivenRouter,
    #[serde(default)]
    balance: GivenBalance,
    soft: Option<SoftConfig>,
}

impl TryFrom<GivenMoe> for MoeConfig {
    type Error = String;

    fn try_from(given: GivenMoe) -> Result<Self, String> {
        let recipe = match (&given.recipe, &given.router.policy) {
            (Some(name), policy) => named(name, policy.as_ref())?,
            (None, policy) => Recipe::of(policy.clone().unwrap_or_default()),
        };
        let soft = match (recipe.soft, given.soft) {
            (Some(recipe), Some(given)) if recipe.kind() != given.kind() => {
                let (recipe, given) = (recipe.kind(), given.kind());
                return Err(format!(
                    "soft.kind is \"{given}\" but the recipe's is \"{recipe}\": leave one of them out"
                ));
            }
            (recipe, given) => given.or(recipe),
        };
        // The policies' numbers of choices; a soft layer chooses nothing.
        let top_k = given.top_k.unwrap_or(if soft.is_some() { 0 } else { recipe.top_k.unwrap_or(0) });
        let (d_expert, d_expert_each) = match recipe.relative_widths {
            Some(widths) if given.d_expert_each.is_empty() => {
                (PerLayer::default(), widths_between(widths, &given.d_expert, given.experts)?)
            }
            _ => (given.d_expert, given.d_expert_each),
        };
        let router = recipe.router.unwrap_or_else(|| RouterConfig::of(Policy::TopK, top_k));
        Ok(Self {
            experts: given.experts,
            top_k,
            d_expert,
            d_expert_each,
            shared_experts: given.shared_experts.unwrap_or(recipe.shared_experts),
            d_shared: given.d_shared,
            shared_gate: given.shared_gate,
            residual: given.residual.or(recipe.residual),
            zero_computation: given.zero_computation.or(recipe.zero_computation),
            layers: given.layers,
            every: given.every,
            router: given.router.over(router.for_choices(top_k)),
            balance: given.balance.over(recipe.balance.unwrap_or_default()),
            soft,
        })
    }
}

/// The recipe called `name`. Another `policy` beside it takes its router's place where the router is only a part of what the name
/// means, and is refused where it is all of it.
fn named(name: &str, policy: Option<&Policy>) -> Result<Recipe, String> {
    let recipe = Recipe::named(name).ok_or_else(|| match explain::find(name) {
        Err(error) => format!("recipe: {error}"),
        Ok(entry) => format!("recipe: \"{name}\" is written \"{}\"", entry.name),
    })?;
    match (&recipe.router, policy) {
        (Some(router), Some(policy)) if router.policy.name() != policy.name() => match recipe.is_more_than_a_router() {
            true => Ok(Recipe { router: Recipe::of(policy.clone()).router, ..recipe }),
            false => {
                let (own, other) = (router.policy.name(), policy.name());
                Err(format!(
                    "recipe = \"{name}\" is policy \"{own}\" but router.policy is \"{other}\": leave one of them out"
                ))
            }
        },
        (None, Some(_)) => Err(format!(
            "recipe = \"{name}\" is a soft layer, which selects nothing: leave router.policy or the recipe out"
        )),
        _ => Ok(recipe),
    }
}

/// Hidden widths from the first to the last share of `d_expert`, in equal steps.
fn widths_between([first, last]: [f64; 2], d_expert: &PerLayer, experts: usize) -> Result<Vec<usize>, String> {
    let PerLayer::Same(mean) = *d_expert else {
        return Err(
            "this recipe makes experts of different widths from one d_expert: give one number, or d_expert_each".into(),
        );
    };
    if mean == 0 || experts > super::LARGEST_SIZE || mean > super::LARGEST_SIZE {
        return Err(format!(
            "d_expert = {mean} and experts = {experts}: this recipe needs the mean width of its experts, or d_expert_each"
        ));
    }
    let width = |e: usize| {
        let share = if experts > 1 { e as f64 / (experts - 1) as f64 } else { 0.5 };
        ((first + (last - first) * share) * mean as f64).round().max(1.0) as usize
    };
    Ok((0..experts).map(width).collect())
}
