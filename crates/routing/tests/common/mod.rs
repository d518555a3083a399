//! Random numbers from the crate's own counter-based generator and the gradient check that the test files share.
#![allow(dead_code)]

use mixtura_routing::catalogue::explain::{Explanation, all};
use mixtura_routing::zero_cost::ZeroComputation;
use mixtura_routing::{DropOrder, Purpose, RouterConfig, StepContext, Stream};

/// Every way to decide who gets a slot.
pub const ORDERS: [DropOrder; 8] = [
    DropOrder::TokenMajor,
    DropOrder::ChoiceMajor,
    DropOrder::Random,
    DropOrder::Score,
    DropOrder::BatchPriority,
    DropOrder::BatchPrioritySum,
    DropOrder::Similarity,
    DropOrder::SimilarityRedirect,
];

/// A stream of draws for one trial.
pub fn draws(seed: u64) -> Stream {
    StepContext::training(seed, 0, 0).stream(Purpose::LogitNoise).unwrap()
}

/// `n` numbers uniform on [-spread, spread].
pub fn numbers(seed: u64, n: usize, spread: f64) -> Vec<f64> {
    let draws = draws(seed);
    (0..n).map(|i| (2.0 * draws.uniform(i, 0) - 1.0) * spread).collect()
}

/// Compares `gradient` with central differences of `value` around `at`.
pub fn check_gradient(what: &str, at: &[f64], gradient: &[f64], value: impl Fn(&[f64]) -> f64) {
    const H: f64 = 1e-5;
    assert_eq!(at.len(), gradient.len(), "{what}: one derivative per coordinate");
    for i in 0..at.len() {
        let mut point = at.to_vec();
        point[i] += H;
        let above = value(&point);
        point[i] -= 2.0 * H;
        let numeric = (above - value(&point)) / (2.0 * H);
        let tolerance = 1e-6 * numeric.abs().max(1e-2);
        assert!((numeric - gradient[i]).abs() < tolerance, "{what}[{i}]: numeric {numeric}, analytic {}", gradient[i]);
    }
}

/// A recipe of the manual for a given number of experts.
pub struct Recipe {
    pub name: &'static str,
    pub config: RouterConfig,
    pub k: usize,
    /// Logits per token: E, and one more per group with two levels of gates.
    pub width: usize,
    /// Which of the experts have no network.
    pub zero: Option<ZeroComputation>,
}

impl Recipe {
    /// The recipe with a capacity that binds, wherever it takes its capacity from; `None` for an order that it does not have.
    pub fn with_capacity(&self, factor: f64, drop_order: DropOrder) -> Option<(RouterConfig, Option<ZeroComputation>)> {
        let config = RouterConfig { capacity_min: 1, drop_order, ..self.config.clone() };
        match self.zero {
            None => Some((RouterConfig { capacity_factor: factor, ..config }, None)),
            Some(zero) => {
                let zero = ZeroComputation { gamma: factor, ..zero };
                zero.validate(zero.networks(self.width), &config).ok().map(|()| (config, Some(zero)))
            }
        }
    }
}

/// Every recipe of the manual that selects, groups, k and experts without a network fitted to `experts`. Through the file form,
/// so that a policy this file has never heard of comes along.
pub fn recipes(experts: usize) -> Vec<Recipe> {
    let fit = |entry: Explanation| {
        let (name, recipe) = (entry.name, entry.recipe);
        let mut value = serde_json::to_value(recipe.router?).unwrap();
        let mut width = experts;
        for policy in ["group_limited", "hierarchical"] {
            if let Some(table) = value["policy"].get_mut(policy) {
                table["groups"] = (experts / 2).into();
                table["keep"] = 2.into();
                width += if policy == "hierarchical" { experts / 2 } else { 0 };
            }
        }
        let config: RouterConfig = serde_json::from_value(value).unwrap();
        let zero = recipe.zero_computation.map(|zero| ZeroComputation { constant: 1, ..zero });
        let k = [2, 1, 4].into_iter().find(|&k| config.validate(experts, k).is_ok());
        let k = k.unwrap_or_else(|| panic!("{name}: {:?}", config.validate(experts, 2)));
        Some(Recipe { name, k, config, width, zero })
    };
    all().into_iter().filter_map(fit).collect()
}
