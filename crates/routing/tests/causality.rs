//! The table of which routers are causal and batch-invariant, by random trials: 200 of each kind, capacity binding.
//!
//! | row of the table | probes |
//! | --- | --- |
//! | token choice dropless, V3 with frozen bias | token_choice_dropless, top_p, group_limited, frozen_bias |
//! | ReLU routing | relu_routing |
//! | Switch top-1 with capacity, by position | switch_top1_capacity_position |
//! | top-2 with capacity, choice-major | top2_capacity_k_major |
//! | top-2 with capacity, token-major | top2_capacity_token_major |
//! | capacity with BPR, RTS or scores | top1_capacity_bpr, top2_capacity_{bpr_sum, random, score, redirect}, top1_capacity_similarity |
//! | Expert Choice, batchwise | expert_choice, expert_choice_capped, batchwise; also base and sinkhorn |
//! | Soft MoE, SMEAR | soft_moe, smear; independent with a group per sequence: soft_moe_group_is_the_sequence |
//! | Lory with its own mean first | lory_own_first |
//! | Lory uniform first, block-causal soft | lory_uniform_first, block_causal_soft |
//! | Mixture of Tokens at one position | mixture_of_tokens |
//!
//! The second flag is for two sequences in one routing group. With a group per sequence every layer is independent by construction.

mod common;

use common::{ORDERS, numbers, recipes};
use mixtura_routing::reference::causality::{Verdict, probes};
use mixtura_routing::{DropOrder, Normalize, Policy, RouteShape, RouterConfig, RouterInput, StepContext, route};

#[test]
fn the_causality_table_holds() {
    let expected = [
        ("token_choice_dropless", true, true),
        ("switch_top1_capacity_position", true, false),
        ("top2_capacity_k_major", false, false),
        ("top2_capacity_token_major", true, false),
        ("top1_capacity_bpr", false, false),
        ("expert_choice", false, false),
        ("soft_moe", false, false),
        ("relu_routing", true, true),
        ("smear", false, false),
        ("lory_own_first", false, false),
        ("lory_uniform_first", true, false),
        ("block_causal_soft", true, false),
        ("top2_capacity_random", false, false),
        ("top2_capacity_score", false, false),
        ("top1_capacity_similarity", false, false),
        ("batchwise", false, false),
        ("base", false, false),
        ("sinkhorn", false, false),
        ("top_p", true, true),
        ("group_limited", true, true),
        ("top2_capacity_bpr_sum", false, false),
        ("top2_capacity_redirect", false, false),
        ("expert_choice_capped", false, false),
        ("frozen_bias", true, true),
        ("mixture_of_tokens", true, false),
        ("soft_moe_group_is_the_sequence", false, true),
        ("hierarchical", true, true),
    ];
    let probes = probes();
    assert_eq!(probes.len(), expected.len());
    for (probe, (name, causal, batch_invariant)) in probes.iter().zip(expected) {
        assert_eq!(probe.name, name);
        assert_eq!(probe.verdict(200), Verdict { causal, batch_invariant }, "{name}");
    }
}

#[test]
fn capacity_binds_in_every_trial_of_the_table() {
    let with_capacity: Vec<_> = probes().into_iter().filter_map(|p| Some((p.name, p.binding(200)?))).collect();
    assert!(with_capacity.len() >= 9, "{with_capacity:?}");
    for (name, binding) in with_capacity {
        // Top-1 leaves room only if the router happens to be perfectly balanced.
        assert!(binding >= if name.contains("top1") { 180 } else { 200 }, "{name}: {binding} of 200");
    }
}

/// [`RouterConfig::leak`] against what happens: the last token's logits change, and the rows of the earlier tokens do or do not.
#[test]
fn a_router_says_that_it_leaks_exactly_if_it_does() {
    const T: usize = 9;
    const E: usize = 6;
    let mut leaks = 0;
    for recipe in recipes(E) {
        for (drop_order, factor) in ORDERS.map(|order| (order, 0.6)).into_iter().chain([(DropOrder::Score, 0.0)]) {
            let Some((config, zero_computation)) = recipe.with_capacity(factor, drop_order) else { continue };
            let eval_capacity_factor = config.capacity_factor;
            let config = RouterConfig { eval_capacity_factor, normalize: Normalize::Never, ..config };
            for step in [StepContext::training(1, 1, 1), StepContext::evaluation()] {
                let earlier = |logits: &[f64], x: &[f64]| {
                    let given: Vec<u32> = (0..T * recipe.k).map(|p| ((p * 5) % E) as u32).collect();
                    let raw = numbers(7, T * recipe.width, 1.0);
                    let thresholds = [0.2; E];
                    let input = RouterInput::new(logits)
                        .with_raw_noise(&raw)
                        .with_tokens(x)
                        .with_thresholds(&thresholds)
                        .with_given(&given);
                    let input = RouterInput { zero_computation, ..input };
                    let shape = RouteShape { tokens: T, experts: E, top_k: recipe.k };
                    let routed = route(&input, shape, &config, &step).unwrap();
                    let combine = routed.combine_te();
                    combine[..(T - 1) * E].to_vec()
                };
                let differs = (0..200).any(|trial| {
                    let (logits, x) = (numbers(trial, T * recipe.width, 2.0), numbers(trial + 500, T * 3, 1.0));
                    let (mut other, mut other_x) = (logits.clone(), x.clone());
                    let last = (T - 1) * recipe.width;
                    other[last..].copy_from_slice(&numbers(trial + 900, recipe.width, 4.0));
                    other_x[(T - 1) * 3..].copy_from_slice(&numbers(trial + 1300, 3, 1.0));
                    earlier(&logits, &x) != earlier(&other, &other_x)
                });
                // The experts of a hash layer are given, so that only its tokens can change who is dropped.
                let given = config.policy == Policy::Hash;
                let said = config.leak(step.training, recipe.k, zero_computation.as_ref()).is_some();
                assert!(
                    said == differs || given && said,
                    "{} {drop_order:?} {factor}: says {said}, does {differs}, {step:?}",
                    recipe.name
                );
                leaks += usize::from(differs);
            }
        }
    }
    assert!(leaks > 100, "{leaks}");
}
