//! The properties every router must have, each on 200 random trials from the crate's own counter-based generator, and where
//! each property of section R of the specification is proved:
//!
//! | R | property | test |
//! | --- | --- | --- |
//! | 1 | capacity = ragged = dense layout, values and derivatives | `layouts.rs` (every router), `properties.rs` (random shapes) |
//! | 2 | pairs conserved, no slot twice, slot < C, counts match the statistics | `pairs_and_slots_are_conserved_...`, `no_slot_is_given_twice_...` |
//! | 3 | sums of weights | `weights_of_every_router_sum_...` |
//! | 4 | equivariance in tokens: token choice, Soft MoE, Expert Choice | `permuting_tokens_permutes_the_output`; `soft.rs` |
//! | 5 | relabelling experts leaves y unchanged | `relabelling_experts_changes_nothing` |
//! | 6 | finite differences of losses and of y | `losses.rs`, `layouts.rs`, `gradients.rs`, `soft.rs` |
//! | 7 | the Switch loss stays above its infimum, reached by the witness | `theory.rs` |
//! | 8, 9 | what a constant added to all logits changes | `adding_a_constant_to_all_logits_...` |
//! | 10 | causality and batch invariance | `causality.rs` |
//! | 11 | evaluation draws nothing | `layouts.rs` |
//! | 12 | k = E is the dense mixture | `with_k_equal_to_e_the_layer_is_the_dense_mixture` |
//! | 13 | upcycling, pruning nothing, merging equals | `compress.rs`; no crate upcycles, so step 0 of an upcycled model has no test |
//! | 14 | expert parallelism | not routing: the same rows whatever rank computes them |
//! | 15 | EM never lowers the likelihood | classical mixtures, not part of this crate |
//! | 16 | Expert Choice and BASE are exactly even | `expert_choice_and_base_are_exactly_even` |
//! | 17 | the loss-free bias balances | `statistics.rs` |
//! | 18 | ReMoE's controller reaches its sparsity in training | `the_relu_controller_reaches_its_sparsity_while_a_model_trains` |
//! | 19, 20 | frequencies of random selection and of sampled seconds | `statistics.rs` |

mod common;

use common::{ORDERS, draws, numbers, recipes};
use mixtura_routing::assignment::NO_SLOT;
use mixtura_routing::capacity::slots_by_position;
use mixtura_routing::losses::relu_controller;
use mixtura_routing::policy::gshard::Queue;
use mixtura_routing::policy::{priority, similarity};
use mixtura_routing::reference::combine::{combine, combine_dense};
use mixtura_routing::scorers::linear_logits;
use mixtura_routing::soft::soft_moe::{Mixing, NORM_EPSILON, SoftMoe};
use mixtura_routing::stats::RoutingStats;
use mixtura_routing::zero_cost::ZeroComputation;
use mixtura_routing::{
    Activation, AuxiliaryOptions, BalanceConfig, BalanceScope, Choices, DropOrder, Normalize, Policy, RouteShape,
    Routed, RouterConfig, RouterInput, StepContext, auxiliary, route,
};

const TRIALS: u64 = 200;
const D: usize = 3;

/// A number in `from..=to`, draw `which` of a trial.
fn pick(trial: u64, which: usize, from: usize, to: usize) -> usize {
    from + draws(trial).bits(which, 77)[0] as usize % (to - from + 1)
}

/// A recipe on random tokens: everything a policy may ask for is there.
struct Trial {
    shape: RouteShape,
    config: RouterConfig,
    logits: Vec<f64>,
    x: Vec<f64>,
    zero: Option<ZeroComputation>,
    step: StepContext,
}

impl Trial {
    fn route(&self) -> Routed<f64> {
        let RouteShape { tokens, experts, top_k } = self.shape;
        let raw = numbers(1, self.logits.len(), 1.0);
        let thresholds = vec![0.5 / experts as f64; experts];
        let given: Vec<u32> = (0..tokens * top_k).map(|p| ((p * 5) % experts) as u32).collect();
        let input = RouterInput::new(&self.logits)
            .with_raw_noise(&raw)
            .with_tokens(&self.x)
            .with_thresholds(&thresholds)
            .with_given(&given);
        let input = RouterInput { zero_computation: self.zero, ..input };
        route(&input, self.shape, &self.config, &self.step).unwrap_or_else(|e| panic!("{:?}: {e}", self.config))
    }
}

/// `TRIALS` random sizes, logits, orders and normalisations for every recipe.
fn trials_of_every_router(mut check: impl FnMut(&str, &Trial, &Routed<f64>)) {
    for trial in 0..TRIALS {
        let (tokens, experts) = (pick(trial, 0, 1, 24), [4, 6, 8, 12][pick(trial, 1, 0, 3)]);
        for recipe in recipes(experts) {
            let (order, factor) = (ORDERS[pick(trial, 2, 0, 7)], [0.0, 0.4, 0.75, 1.25][pick(trial, 3, 0, 3)]);
            let Some((config, zero)) = recipe.with_capacity(factor, order) else { continue };
            let normalize = [Normalize::Never, Normalize::BeforeDrop, Normalize::AfterDrop][pick(trial, 4, 0, 2)];
            let config = RouterConfig { normalize, ..config };
            let wanted = pick(trial, 5, 1, 3);
            let k = [wanted, recipe.k].into_iter().find(|&k| config.validate(experts, k).is_ok());
            // A policy whose weights are sums of their own refuses to have them divided.
            let Some(k) = k else { continue };
            let t = Trial {
                shape: RouteShape { tokens, experts, top_k: k },
                config,
                logits: numbers(trial + 1000, tokens * recipe.width, 3.0),
                x: numbers(trial + 2000, tokens * D, 1.0),
                zero,
                step: StepContext::training(trial, 1, 1),
            };
            check(recipe.name, &t, &t.route());
        }
    }
}

/// Whose choices are counted by experts, so that capacity does not apply.
fn owns_capacity(policy: &Policy) -> bool {
    matches!(policy, Policy::ExpertChoice | Policy::ExpertChoiceCapped { .. } | Policy::Batchwise)
}

#[test]
fn pairs_and_slots_are_conserved_and_counts_match_the_statistics() {
    let mut dropped = 0;
    trials_of_every_router(|name, t, r| {
        r.assignment.check().unwrap();
        r.choices.check(t.shape.experts).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(r.assignment.rows() + r.assignment.dropped.len(), r.choices.pairs(), "{name}");
        if !t.config.policy.is_ragged() && !owns_capacity(&t.config.policy) {
            assert_eq!(r.choices.pairs(), t.shape.tokens * t.shape.top_k, "{name}: kept + dropped = T k");
        }
        if let Some(capacity) = r.capacity.filter(|_| !owns_capacity(&t.config.policy)) {
            let RouteShape { tokens, experts, top_k } = t.shape;
            let slots = t.zero.and_then(|zero| zero.slots(tokens, experts, top_k, 1));
            let slots = slots.unwrap_or_else(|| vec![capacity; experts]);
            assert!(r.assignment.load().iter().zip(slots).all(|(&n, slots)| n as usize <= slots), "{name}");
        }
        dropped += r.assignment.dropped.len();
        // The statistics again, from the dense matrix of what was chosen.
        let experts = t.shape.experts;
        let mut demand = vec![0u32; experts];
        (0..t.shape.tokens).for_each(|i| r.choices.of_token(i).iter().for_each(|&e| demand[e as usize] += 1));
        assert_eq!(r.assignment.demand, demand, "{name}");
        let load = RoutingStats::from_load(&demand);
        let of = |s: &RoutingStats| (s.load_cv, s.max_over_mean, s.dead, s.entropy);
        assert_eq!(of(&r.stats), of(&load), "{name}");
        let rate = r.assignment.dropped.len() as f64 / r.choices.pairs().max(1) as f64;
        assert!((r.stats.dropped - rate).abs() < 1e-12, "{name}");
    });
    assert!(dropped > 10_000, "capacity binds: {dropped} pairs dropped");
}

#[test]
fn no_slot_is_given_twice_and_none_beyond_the_capacity() {
    for trial in 0..TRIALS {
        let (tokens, experts) = (pick(trial, 0, 0, 30), pick(trial, 1, 1, 9));
        let (k, capacity) = (pick(trial, 2, 1, experts.min(3)), pick(trial, 3, 1, 8));
        let gates: Vec<f64> = numbers(trial, tokens * experts, 1.0).iter().map(|v| v + 1.0).collect();
        let x = numbers(trial + 1, tokens * D, 1.0);
        let choices = Choices::rectangular(tokens, k, mixtura_routing::select::top_k(&gates, experts, k));
        let gate = |t: usize, e: u32| gates[t * experts + e as usize];
        let skip: Vec<bool> = (0..choices.pairs()).map(|p| k == 2 && p % 2 == 1 && p % 3 == 0).collect();
        let tokens_of = similarity::Tokens { gates_te: &gates, experts, x_td: &x };
        let order = priority::batch_order(&choices, gate, true);
        let redirected = tokens_of.redirect(&choices, capacity);
        let all = [
            (slots_by_position(&choices, experts, capacity, DropOrder::TokenMajor), &choices),
            (slots_by_position(&choices, experts, capacity, DropOrder::ChoiceMajor), &choices),
            (priority::slots_by_key(&choices, experts, capacity, gate), &choices),
            (priority::slots_in_order(&choices, experts, capacity, &order), &choices),
            (Queue { skipped_takes_place: true }.slots(&choices, experts, capacity, &skip), &choices),
            (Queue { skipped_takes_place: false }.slots(&choices, experts, capacity, &skip), &choices),
            (tokens_of.slots(&choices, capacity), &choices),
            (redirected.slots.clone(), &redirected.choices),
        ];
        for (i, (slots, choices)) in all.iter().enumerate() {
            let mut taken = vec![vec![false; capacity]; experts];
            for (pair, &slot) in slots.iter().enumerate().filter(|(_, s)| **s != NO_SLOT) {
                let place = &mut taken[choices.experts[pair] as usize][slot as usize];
                assert!(!*place, "order {i}: slot {slot} of expert {} twice", choices.experts[pair]);
                *place = true;
            }
            // Nobody is dropped while the expert has room, but for choices that were skipped.
            for (pair, &slot) in slots.iter().enumerate().filter(|(p, _)| !(skip[*p] || i == 4 || i == 5)) {
                let full = taken[choices.experts[pair] as usize].iter().all(|t| *t);
                assert!(slot != NO_SLOT || full, "order {i}: pair {pair} was dropped beside a free slot");
            }
        }
    }
}

#[test]
fn weights_of_every_router_sum_to_one_zero_or_less() {
    trials_of_every_router(|name, t, r| {
        if matches!(t.config.policy, Policy::Hash | Policy::SparseMixer { .. }) {
            return; // Weight 1 each, and two softmaxes of their own.
        }
        let softmax = t.config.activation.is_softmax();
        for (i, row) in r.combine_te().chunks(t.shape.experts).enumerate() {
            let sum: f64 = row.iter().sum::<f64>() / t.config.weight_scale;
            let (chosen, kept) = (r.choices.of_token(i).len(), r.assignment.rows_of_token(i).len());
            let positive = r.choices.of_token(i).iter().any(|&e| r.probs_te[i * t.shape.experts + e as usize] > 0.0);
            // Two softmaxes of selected logits sum to 1 by themselves, and nothing is divided after drops.
            let whole = match t.config.normalize {
                _ if name == "hierarchical" => kept > 0 && kept == chosen,
                Normalize::AfterDrop => kept > 0,
                Normalize::BeforeDrop => kept > 0 && kept == chosen,
                Normalize::Never => kept > 0 && kept == chosen && t.config.activation == Activation::SoftmaxSelected,
            };
            if kept == 0 {
                assert_eq!(sum, 0.0, "{name}: a token without experts gets nothing");
            } else if whole && (positive || r.noise.is_some()) && t.config.activation != Activation::Relu {
                assert!((sum - 1.0).abs() < 1e-12, "{name} {:?}: row {i} sums to {sum}", t.config.normalize);
            } else if softmax {
                assert!(sum <= 1.0 + 1e-12, "{name} {:?}: row {i} sums to {sum}", t.config.normalize);
            }
            assert!(row.iter().all(|w| *w >= 0.0), "{name}: a negative weight");
        }
    });
}

/// Position `p` of the permuted list holds entry `order[p]`.
fn shuffled(n: usize, trial: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| draws(trial).uniform(a, 5).total_cmp(&draws(trial).uniform(b, 5)));
    order
}

fn permute_rows(m: &[f64], width: usize, order: &[usize]) -> Vec<f64> {
    order.iter().flat_map(|&i| m[i * width..(i + 1) * width].to_vec()).collect()
}

fn permute_columns(m: &[f64], width: usize, order: &[usize]) -> Vec<f64> {
    m.chunks(width).flat_map(|row| order.iter().map(|&j| row[j]).collect::<Vec<_>>()).collect()
}

fn expert(e: usize, x: &[f64]) -> Vec<f64> {
    x.iter().map(|v| (v * (e as f64 + 0.5)).tanh() + 0.1).collect()
}

/// Policies without randomness, whose experts play equal parts.
fn dropless_policies() -> Vec<RouterConfig> {
    let with = |policy, activation| RouterConfig { policy, activation, ..RouterConfig::default() };
    vec![
        with(Policy::TopK, Activation::Softmax),
        with(Policy::TopK, Activation::SoftmaxSelected),
        with(Policy::TopK, Activation::Sigmoid),
        with(Policy::TopK, Activation::SqrtSoftplus),
        with(Policy::TopP { mass: 0.6 }, Activation::Softmax),
        RouterConfig { normalize: Normalize::Never, ..with(Policy::Relu, Activation::Relu) },
        with(Policy::SparseMixer { eps: 0.1 }, Activation::Softmax),
        with(Policy::ExpertChoice, Activation::Softmax),
        with(Policy::Batchwise, Activation::Softmax),
        with(Policy::Sinkhorn, Activation::Sigmoid),
    ]
}

fn output(logits: &[f64], x: &[f64], experts: usize, config: &RouterConfig, of: impl Fn(usize) -> usize) -> Vec<f64> {
    let shape = RouteShape { tokens: x.len() / D, experts, top_k: 2 };
    let routed = route(&RouterInput::new(logits).with_tokens(x), shape, config, &StepContext::training(1, 1, 1));
    let routed = routed.unwrap();
    combine(x, D, &routed.assignment, &routed.weight_n, |e, x| expert(of(e), x))
}

fn assert_close(a: &[f64], b: &[f64], what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst < 1e-12, "{what}: differs by {worst}");
}

#[test]
fn permuting_tokens_permutes_the_output() {
    for trial in 0..TRIALS {
        let (tokens, experts) = (pick(trial, 0, 2, 20), pick(trial, 1, 2, 8));
        let (logits, x) = (numbers(trial, tokens * experts, 3.0), numbers(trial + 500, tokens * D, 1.0));
        let order = shuffled(tokens, trial);
        let (moved, moved_x) = (permute_rows(&logits, experts, &order), permute_rows(&x, D, &order));
        for config in dropless_policies() {
            let y = output(&logits, &x, experts, &config, |e| e);
            let permuted = output(&moved, &moved_x, experts, &config, |e| e);
            assert_close(&permute_rows(&y, D, &order), &permuted, &format!("{:?} trial {trial}", config.policy));
        }
        let phi = numbers(trial + 900, D * experts, 1.0);
        let soft = SoftMoe { phi_ds: &phi, slots: experts, per_expert: 1, scale: 1.5, epsilon: NORM_EPSILON };
        for mixing in [Mixing::Soft, Mixing::Uniform, Mixing::UniformDispatch, Mixing::UniformCombine] {
            let y = soft.forward(&x, D, mixing, expert).y_td;
            let permuted = soft.forward(&moved_x, D, mixing, expert).y_td;
            assert_close(&permute_rows(&y, D, &order), &permuted, &format!("{mixing:?} trial {trial}"));
        }
    }
}

#[test]
fn relabelling_experts_changes_nothing() {
    for trial in 0..TRIALS {
        let (tokens, experts) = (pick(trial, 0, 1, 20), pick(trial, 1, 2, 8));
        let x = numbers(trial + 500, tokens * D, 1.0);
        let gate = numbers(trial, D * experts, 2.0);
        let order = shuffled(experts, trial);
        let (logits, moved) =
            (linear_logits(&x, &gate, D), linear_logits(&x, &permute_columns(&gate, experts, &order), D));
        for config in dropless_policies() {
            if tokens == 1 && config.policy == Policy::Sinkhorn {
                continue; // A plan for one token is even whatever its logits: all ties.
            }
            let y = output(&logits, &x, experts, &config, |e| e);
            let relabelled = output(&moved, &x, experts, &config, |e| order[e]);
            assert_close(&y, &relabelled, &format!("{:?} trial {trial}", config.policy));
        }
        // A whole number of tokens per expert: BASE's remainder goes to the first labels.
        let whole = tokens / experts * experts;
        let config = RouterConfig { policy: Policy::Base, normalize: Normalize::Never, ..RouterConfig::default() };
        let base = |logits: &[f64], of: &dyn Fn(usize) -> usize| {
            let shape = RouteShape { tokens: whole, experts, top_k: 1 };
            let step = StepContext::training(1, 1, 1);
            let r = route(&RouterInput::new(&logits[..whole * experts]), shape, &config, &step).unwrap();
            combine(&x[..whole * D], D, &r.assignment, &r.weight_n, |e, x| expert(of(e), x))
        };
        assert_close(&base(&logits, &|e| e), &base(&moved, &|e| order[e]), &format!("base trial {trial}"));
    }
}

#[test]
fn adding_a_constant_to_all_logits_moves_the_z_loss_and_gates_that_are_no_softmax() {
    for trial in 0..TRIALS {
        let (tokens, experts) = (pick(trial, 0, 1, 16), pick(trial, 1, 2, 8));
        let logits = numbers(trial, tokens * experts, 2.0);
        let constant = 1.0 + draws(trial).uniform(0, 9);
        let moved: Vec<f64> = logits.iter().map(|z| z + constant).collect();
        let shape = RouteShape { tokens, experts, top_k: 2 };
        for activation in [
            Activation::Softmax,
            Activation::SoftmaxSelected,
            Activation::Sigmoid,
            Activation::SqrtSoftplus,
            Activation::Relu,
        ] {
            let config = RouterConfig { activation, normalize: Normalize::Never, ..RouterConfig::default() };
            let run = |z: &[f64]| {
                let input = RouterInput::new(z);
                let r = route(&input, shape, &config, &StepContext::evaluation()).unwrap();
                let balance = BalanceConfig { z_loss: 1.0, coefficient: 0.0, ..BalanceConfig::default() };
                let z = auxiliary(&input, &r, &balance, AuxiliaryOptions::default()).unwrap().z;
                (r, z)
            };
            let ((a, za), (b, zb)) = (run(&logits), run(&moved));
            assert_eq!(a.assignment, b.assignment, "the selection never changes");
            let same = a.weight_n.iter().zip(&b.weight_n).all(|(a, b)| (a - b).abs() < 1e-12);
            // A rectified gate that stays at 0 does not move.
            let still = activation == Activation::Relu && b.weight_n.iter().all(|w| *w == 0.0);
            assert_eq!(same, activation.is_softmax() || still, "{activation:?} trial {trial}");
            // lse moves by the constant on every token.
            let expected = za + 2.0 * constant * a.lse_t.iter().sum::<f64>() / tokens as f64 + constant * constant;
            assert!((zb - expected).abs() < 1e-9 && (zb - za).abs() > 1e-9, "{activation:?} trial {trial}");
        }
    }
}

#[test]
fn with_k_equal_to_e_the_layer_is_the_dense_mixture() {
    for trial in 0..TRIALS {
        let (tokens, experts) = (pick(trial, 0, 1, 12), pick(trial, 1, 1, 8));
        let (logits, x) = (numbers(trial, tokens * experts, 3.0), numbers(trial + 500, tokens * D, 1.0));
        let shape = RouteShape { tokens, experts, top_k: experts };
        for (activation, normalize) in [
            (Activation::SoftmaxSelected, Normalize::Never),
            (Activation::Softmax, Normalize::Never),
            (Activation::Softmax, Normalize::BeforeDrop),
        ] {
            let config = RouterConfig { activation, normalize, ..RouterConfig::default() };
            let r = route(&RouterInput::new(&logits), shape, &config, &StepContext::evaluation()).unwrap();
            let softmax: Vec<f64> = logits
                .chunks(experts)
                .flat_map(|row| {
                    let total: f64 = row.iter().map(|z| z.exp()).sum();
                    row.iter().map(|z| z.exp() / total).collect::<Vec<_>>()
                })
                .collect();
            let y = combine(&x, D, &r.assignment, &r.weight_n, expert);
            assert_close(&y, &combine_dense(&x, D, &softmax, experts, expert), &format!("trial {trial}"));
        }
    }
}

#[test]
fn expert_choice_and_base_are_exactly_even() {
    for trial in 0..TRIALS {
        let (experts, k) = (pick(trial, 0, 1, 8), pick(trial, 1, 1, 3));
        let tokens = pick(trial, 2, 1, 40);
        let logits = numbers(trial, tokens * experts, 2.0);
        let demand = |policy: Policy, tokens: usize, k: usize| {
            let config = RouterConfig { policy, ..RouterConfig::default() };
            let shape = RouteShape { tokens, experts, top_k: k.min(experts) };
            let input = RouterInput::new(&logits[..tokens * experts]);
            route(&input, shape, &config, &StepContext::training(trial, 0, 0)).unwrap().assignment.demand
        };
        let each = (tokens * k.min(experts) / experts).clamp(1, tokens) as u32;
        assert_eq!(demand(Policy::ExpertChoice, tokens, k), vec![each; experts], "trial {trial}");
        let whole = tokens / experts * experts;
        assert_eq!(demand(Policy::Base, whole, 1), vec![(tokens / experts) as u32; experts], "trial {trial}");
        let (least, rest) = (tokens / experts, tokens % experts);
        let expected: Vec<u32> = (0..experts).map(|e| (least + usize::from(e < rest)) as u32).collect();
        assert_eq!(demand(Policy::Base, tokens, 1), expected, "the remainder goes to the first experts");
    }
}

/// A real, small training run: eight scaling experts, a linear gate, tokens in eight clusters, each with its own target.
#[test]
fn the_relu_controller_reaches_its_sparsity_while_a_model_trains() {
    const E: usize = 8;
    const T: usize = 64;
    const W: usize = 8;
    let x: Vec<f64> = (0..T)
        .flat_map(|t| {
            numbers(t as u64 + 1, W, 0.2).into_iter().enumerate().map(move |(i, n)| n + f64::from(u8::from(i == t % E)))
        })
        .collect();
    let target: Vec<f64> =
        (0..T).flat_map(|t| x[t * W..(t + 1) * W].iter().map(move |v| v * (1.0 + (t % E) as f64 / 4.0))).collect();
    let mut gate: Vec<f64> = numbers(90, W * E, 0.2).iter().map(|v| v + 0.15).collect();
    let mut scale = [1.0; E];
    let config = RouterConfig {
        policy: Policy::Relu,
        activation: Activation::Relu,
        normalize: Normalize::Never,
        ..RouterConfig::default()
    };
    let shape = RouteShape { tokens: T, experts: E, top_k: 2 };
    let (mut lambda, mut path, mut errors) = (1e-8, Vec::new(), Vec::new());
    for step in 0..1500 {
        let logits = linear_logits(&x, &gate, W);
        let input = RouterInput::new(&logits);
        let r = route(&input, shape, &config, &StepContext::training(1, step, 0)).unwrap();
        let y = combine(&x, W, &r.assignment, &r.weight_n, |e, x| x.iter().map(|v| v * scale[e]).collect());
        let dy: Vec<f64> = y.iter().zip(&target).map(|(y, t)| 2.0 * (y - t) / T as f64).collect();
        errors.push(y.iter().zip(&target).map(|(y, t)| (y - t) * (y - t)).sum::<f64>() / T as f64);
        let balance =
            BalanceConfig { coefficient: lambda, scope: BalanceScope::Micro, z_loss: 0.0, ..BalanceConfig::default() };
        let mut dlogits = auxiliary(&input, &r, &balance, AuxiliaryOptions::default()).unwrap().dlogits_te;
        let (mut dweight, mut dscale) = (vec![0.0; r.assignment.rows()], vec![0.0; E]);
        for e in 0..E {
            for row in r.assignment.rows_of_expert(e) {
                let t = r.assignment.token_of_row[row] as usize * W;
                let product: f64 = (t..t + W).map(|i| dy[i] * x[i]).sum();
                dweight[row] = product * scale[e];
                dscale[e] += product * r.weight_n[row];
            }
        }
        r.weights_backward(&dweight, &mut dlogits);
        for t in 0..T {
            for (i, g) in gate.iter_mut().enumerate() {
                *g -= 0.3 * dlogits[t * E + i % E] * x[t * W + i / E];
            }
        }
        scale.iter_mut().zip(&dscale).for_each(|(s, d)| *s -= 0.3 * d);
        let sparsity = 1.0 - r.choices.pairs() as f64 / (T * E) as f64;
        lambda = relu_controller(lambda, 1.2, sparsity, E, 2);
        assert!(lambda.is_finite() && lambda > 0.0, "step {step}");
        path.push(sparsity);
    }
    let late = &path[1200..];
    let mean = late.iter().sum::<f64>() / late.len() as f64;
    assert!(path[0] < 0.4, "it starts nearly dense: {}", path[0]);
    assert!((mean - 0.75).abs() < 0.06, "sparsity {mean}, asked for 0.75");
    assert!(errors[1499] < errors[0] / 2.0, "and it learns: {} -> {}", errors[0], errors[1499]);
}
