//! Recipes and what is refused in training, against the gradient itself: a configuration that is called untrainable for want of a
//! gradient has none, and every other one has some.

mod common;

use common::numbers;
use mixtura_routing::zero_cost::ZeroComputation;
use mixtura_routing::{
    Activation, BalanceConfig, BalanceLoss, GivenBalance, Normalize, Policy, Recipe, RouteShape, RouterConfig,
    RouterInput, StepContext, route,
};

const T: usize = 24;
const E: usize = 8;

/// The policy of that name with groups that eight experts have.
fn policy(name: &str) -> Policy {
    match Policy::named(name).unwrap() {
        Policy::GroupLimited { .. } => Policy::GroupLimited { groups: 4, keep: 2 },
        Policy::Hierarchical { .. } => Policy::Hierarchical { groups: 4, keep: 2 },
        other => other,
    }
}

/// The largest derivative of a random objective of the weights.
fn steepest(config: &RouterConfig, top_k: usize, zero_computation: Option<ZeroComputation>) -> f64 {
    let logits = numbers(3, T * config.logits_per_token(E), 2.0);
    let raw = numbers(4, logits.len(), 1.0);
    let x = numbers(5, T * 3, 1.0);
    let given: Vec<u32> = (0..T * top_k).map(|p| (p % E) as u32).collect();
    let input = RouterInput::new(&logits).with_raw_noise(&raw).with_tokens(&x).with_given(&given);
    let input = RouterInput { zero_computation, ..input };
    let shape = RouteShape { tokens: T, experts: E, top_k };
    let routed = route(&input, shape, config, &StepContext::training(1, 1, 1)).unwrap();
    let mut dlogits = vec![0.0; logits.len()];
    routed.weights_backward(&numbers(6, routed.assignment.rows(), 1.0), &mut dlogits);
    dlogits.iter().fold(0.0, |most, d| most.max(d.abs()))
}

#[test]
fn what_is_refused_for_want_of_a_gradient_has_none_and_what_is_accepted_has_one() {
    let (mut learning, mut constant) = (0, 0);
    let zeros = [None, Some(ZeroComputation { constant: 1, renorm_after_zero: true, ..ZeroComputation::default() })];
    let mut own: Vec<Policy> = Policy::NAMES.iter().map(|name| policy(name)).collect();
    own.extend([Policy::TopP { mass: 0.1 }, Policy::ExpertChoiceCapped { cap: 1 }, Policy::SparseMixer { eps: 0.0 }]);
    for policy in own {
        for activation in [
            Activation::Softmax,
            Activation::SoftmaxSelected,
            Activation::Sigmoid,
            Activation::SqrtSoftplus,
            Activation::Relu,
        ] {
            for normalize in [Normalize::Never, Normalize::BeforeDrop, Normalize::AfterDrop] {
                for (k, zero) in (1..=4).flat_map(|k| zeros.map(|zero| (k, zero))) {
                    let config = RouterConfig { activation, normalize, ..RouterConfig::of(policy.clone(), k) };
                    let config = RouterConfig { capacity_factor: 0.0, ..config };
                    let possible = zero.is_none_or(|zero| zero.validate(E - 3, &config).is_ok());
                    if config.validate(E, k).is_err() || !possible {
                        continue;
                    }
                    let steepest = steepest(&config, k, zero);
                    match config.validate_training(E, k, zero.as_ref()) {
                        Err(error) if error.to_string().contains("no gradient") => {
                            assert!(steepest < 1e-12, "{error}, but {config:?} k={k} has {steepest}");
                            constant += 1;
                        }
                        Err(_) => {} // It is not what its policy is named after.
                        Ok(()) if policy == Policy::Hash => assert_eq!(steepest, 0.0, "hash layers have no gate"),
                        Ok(()) => {
                            assert!(steepest > 1e-6, "{config:?} k={k} {zero:?} has no gradient and is accepted");
                            learning += 1;
                        }
                    }
                }
            }
        }
    }
    assert!(learning > 200 && constant > 40, "{learning} learn, {constant} are constant");
}

#[test]
fn a_recipe_is_its_policys_and_with_one_choice_its_weights_are_raw() {
    for name in Policy::NAMES {
        let recipe = Recipe::named(name).unwrap();
        let config = recipe.router.unwrap();
        assert_eq!(config.policy.name(), *name);
        assert_eq!(config, RouterConfig::of(config.policy.clone(), recipe.top_k.unwrap_or(2)));
        // The name alone, and the name as a table where it has numbers.
        let alone: RouterConfig = toml::from_str(&format!("policy = \"{name}\"")).unwrap();
        assert_eq!(alone, RouterConfig::of(config.policy.clone(), 2));
    }
    for k in [1, 2] {
        let expected = if k == 1 { Normalize::Never } else { Normalize::BeforeDrop };
        assert_eq!(RouterConfig::of(Policy::TopK, k).normalize, expected);
        assert_eq!(RouterConfig::of(policy("group_limited"), k).normalize, expected);
    }
    let read = |text: &str| toml::from_str::<RouterConfig>(text).map(|config| config.policy);
    assert_eq!(read("policy = { group_limited = { groups = 4 } }"), Ok(Policy::GroupLimited { groups: 4, keep: 4 }));
    let table: toml::Value = toml::from_str("switch = 1\ntop_p = {}").unwrap();
    assert!(table.try_into::<Policy>().unwrap_err().to_string().contains("2 entries"));
    assert!(read("policy = \"hmoe\"").unwrap_err().to_string().contains("recipe = \"hmoe\""));
    assert!(read("noise = { normal = {} }").is_ok() && read("noise = \"jitter\"").is_ok());
}

#[test]
fn a_balance_takes_from_its_recipe_what_belongs_to_the_recipes_loss() {
    let over = |text: &str, recipe: &str| -> BalanceConfig {
        toml::from_str::<GivenBalance>(text).unwrap().over(Recipe::named(recipe).unwrap().balance.unwrap())
    };
    let usual = BalanceConfig::default();
    assert_eq!(over("", "noisy_top_k").coefficient, 0.1);
    assert_eq!(over("loss = \"switch\"", "noisy_top_k").coefficient, usual.coefficient);
    assert_eq!(over("loss = \"switch\"", "noisy_top_k").z_loss, 0.0);
    assert_eq!(over("coefficient = 0.3", "base").loss, BalanceLoss::Switch);
    assert_eq!(over("coefficient = 0.0", "base").loss, BalanceLoss::None);
    assert!(over("", "relu").controller.is_some() && over("coefficient = 0.3", "relu").controller.is_none());
    assert_eq!(over("", "group_limited").scope, mixtura_routing::BalanceScope::Sequence);
}
