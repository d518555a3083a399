//! `[model.moe.router]` and `[model.moe.balance]` as they were written: a key that was left out is `None`, so that it can take
//! the value of a recipe and not one that contradicts the policy beside it.

use super::{
    Activation, BalanceConfig, BalanceLoss, BalanceScope, DropOrder, HashTable, Noise, Normalize, Policy, ReluControl,
    RouterConfig, Scorer,
};
use serde::Deserialize;

/// `[model.moe.router]` as written. The keys are those of [`RouterConfig`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields of RouterConfig, which documents them")]
pub struct GivenRouter {
    pub scorer: Option<Scorer>,
    pub activation: Option<Activation>,
    pub policy: Option<Policy>,
    pub normalize: Option<Normalize>,
    pub weight_scale: Option<f64>,
    pub noise: Option<Noise>,
    pub capacity_factor: Option<f64>,
    pub eval_capacity_factor: Option<f64>,
    pub capacity_min: Option<usize>,
    pub capacity_multiple: Option<usize>,
    pub drop_order: Option<DropOrder>,
    pub hash_table: Option<HashTable>,
}

impl GivenRouter {
    /// What was written over what the recipe says. The recipe's policy is replaced by a given one, whose numbers may differ;
    /// that its kind does not is the caller's business.
    pub fn over(self, recipe: RouterConfig) -> RouterConfig {
        RouterConfig {
            scorer: self.scorer.unwrap_or(recipe.scorer),
            activation: self.activation.unwrap_or(recipe.activation),
            policy: self.policy.unwrap_or(recipe.policy),
            normalize: self.normalize.unwrap_or(recipe.normalize),
            weight_scale: self.weight_scale.unwrap_or(recipe.weight_scale),
            noise: self.noise.unwrap_or(recipe.noise),
            capacity_factor: self.capacity_factor.unwrap_or(recipe.capacity_factor),
            eval_capacity_factor: self.eval_capacity_factor.unwrap_or(recipe.eval_capacity_factor),
            capacity_min: self.capacity_min.unwrap_or(recipe.capacity_min),
            capacity_multiple: self.capacity_multiple.unwrap_or(recipe.capacity_multiple),
            drop_order: self.drop_order.unwrap_or(recipe.drop_order),
            hash_table: self.hash_table.unwrap_or(recipe.hash_table),
        }
    }
}

impl From<GivenRouter> for RouterConfig {
    /// Over the recipe of the named policy, or of top-k, with at least two choices.
    fn from(given: GivenRouter) -> Self {
        let recipe = RouterConfig::of(given.policy.clone().unwrap_or_default(), 2);
        given.over(recipe)
    }
}

/// `[model.moe.balance]` as written. The keys are those of [`BalanceConfig`].
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields of BalanceConfig, which documents them")]
pub struct GivenBalance {
    pub loss: Option<BalanceLoss>,
    pub coefficient: Option<f64>,
    pub scope: Option<BalanceScope>,
    pub z_loss: Option<f64>,
    pub entropy: Option<f64>,
    pub bias_update: Option<f64>,
    pub controller: Option<ReluControl>,
}

impl GivenBalance {
    /// What was written over what the recipe says.
    ///
    /// Coefficient, scope and controller belong to the recipe's loss: beside another one they are those of
    /// [`BalanceConfig::default`]. A coefficient where the recipe has no loss asks for the usual one, and takes the place of a
    /// controller that would move it.
    pub fn over(self, recipe: BalanceConfig) -> BalanceConfig {
        let usual = BalanceConfig::default();
        let wants_one = recipe.loss == BalanceLoss::None && self.coefficient.is_some_and(|c| c != 0.0);
        let loss = self.loss.unwrap_or(if wants_one { usual.loss } else { recipe.loss });
        let own = if loss == recipe.loss { &recipe } else { &usual };
        BalanceConfig {
            loss,
            coefficient: self.coefficient.unwrap_or(own.coefficient),
            scope: self.scope.unwrap_or(own.scope),
            z_loss: self.z_loss.unwrap_or(recipe.z_loss),
            entropy: self.entropy.unwrap_or(recipe.entropy),
            bias_update: self.bias_update.unwrap_or(recipe.bias_update),
            controller: self.controller.or(own.controller.filter(|_| self.coefficient.is_none())),
        }
    }
}

impl From<GivenBalance> for BalanceConfig {
    fn from(given: GivenBalance) -> Self {
        given.over(Self::default())
    }
}
