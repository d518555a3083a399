//! The cases of section D: expert choice, Soft MoE, ReLU routing, merging, Mixture of Tokens, block-causal slots, causality.

use super::GoldenError;
use super::case::{Case, Matrix, rows_json};
use super::foundation::{Logits, Tokens, losses};
use crate::config::{Activation, BalanceLoss, Normalize, Policy, RouterConfig};
use crate::losses::relu_controller;
use crate::policy::expert_choice;
use crate::real::Real;
use crate::reference::causality;
use crate::reference::dual_numbers::Dual;
use crate::soft::merge::{FirstSegment, merged_forward, segment_weights, shifted_weights};
use crate::soft::soft_moe::{Mixing, NORM_EPSILON, SoftMoe, slot_of_token};
use crate::soft::{block_causal, mixture_of_tokens};
use serde_json::{Map, Value, json};

type Found = Result<Value, GoldenError>;

pub(super) fn expert_choice(case: &Case) -> Found {
    let logits = Logits::of(case, "Z")?;
    let tokens = Tokens::of(case, logits.shape(1))?;
    let (t, experts) = (logits.z.rows, logits.z.cols);
    let (k, cap) = (case.count("k")?, case.count("b")?);
    let (lambda, iterations) = (case.number("lam")?, case.count("iters")?);
    if k == 0 || k > t || cap == 0 || lambda <= 0.0 || iterations > 10_000 {
        return Err(case.shape("k, b, lam, iters", "1 <= k <= T, b >= 1, lam > 0, iters <= 10000", "something else"));
    }
    let picks = expert_choice::pick(&logits.p.data, experts, k);
    let choices = expert_choice::select(&logits.p.data, experts, k);
    let raw = RouterConfig { normalize: Normalize::Never, ..RouterConfig::default() };
    let input = crate::route::RouterInput::new(&logits.z.data);
    let routed = case.routing(crate::route::route_choices(&input, logits.shape(1), &raw, choices, None))?;
    let per_token = |picks: &[Vec<u32>]| {
        let mut count = vec![0; t];
        picks.iter().flatten().for_each(|&t| count[t as usize] += 1);
        count
    };
    let plan = |each, cap, lambda, iterations| {
        expert_choice::capped_plan(&logits.p.data, experts, each, cap, lambda, iterations)
    };
    let capped = plan(k, cap, lambda, iterations);
    let (fast, slow) = (plan(1, 1, 1e-3, 100), plan(1, 1, 0.02, 200));
    let nested: Vec<Vec<u32>> = picks.chunks(k).map(<[u32]>::to_vec).collect();
    Ok(json!({
        "index": rows_json(&picks, k),
        "combine": rows_json(&routed.combine_te(), experts),
        "experts_per_token": per_token(&nested),
        "y": tokens.output(&routed).json(),
        "A_capped": rows_json(&capped.a_et, t),
        "index_capped": capped.pick(k),
        "experts_per_token_capped": per_token(&capped.pick(k)),
        "A_b1_k1_lam0_001_NOT_CONVERGED": rows_json(&fast.a_et, t),
        "index_b1_k1_lam0_001_violates_cap": fast.pick(1).concat(),
        "A_b1_k1_lam0_02": rows_json(&slow.a_et, t),
        "index_b1_k1_lam0_02": slow.pick(1).concat(),
        "index_b1_k1_uncapped": expert_choice::pick(&logits.p.data, experts, 1),
    }))
}

/// The two experts of the Soft MoE cases: `2 x` and `x * x`, alternating if there are more.
fn doubling_and_squaring<S: Real>(e: usize, x: &[S]) -> Vec<S> {
    x.iter().map(|&v| if e.is_multiple_of(2) { v + v } else { v * v }).collect()
}

/// phi `[d][n][p]` flattened to `[d, n p]`, with n and p.
fn phi(case: &Case, width: usize) -> Result<(Vec<f64>, usize, usize), GoldenError> {
    let per_dim = case.matrices("phi")?;
    let (n, p) = per_dim.first().map_or((0, 0), |m| (m.rows, m.cols));
    if per_dim.len() != width || n * p == 0 {
        return Err(case.shape("phi", &format!("{width} x n x p"), &format!("{} x {n} x {p}", per_dim.len())));
    }
    Ok((per_dim.into_iter().flat_map(|m| m.data).collect(), n, p))
}

pub(super) fn soft_moe(case: &Case) -> Found {
    let x = case.matrix("X")?;
    let (t, width) = (x.rows, x.cols);
    let (phi, n, p) = phi(case, width)?;
    let (scale, epsilon) = (case.number("scale")?, case.number("eps")?);
    if t == 0 || epsilon < 0.0 {
        return Err(case.shape("X, eps", "at least one token and eps >= 0", "something else"));
    }
    let slots = n * p;
    let layer = SoftMoe { phi_ds: &phi, slots, per_expert: p, scale, epsilon };
    let run = |x: &[f64], mixing| layer.forward(x, width, mixing, doubling_and_squaring);
    let soft = run(&x.data, Mixing::Soft);
    let dual = |v: &[f64]| v.iter().map(|&v| Dual::constant(v)).collect::<Vec<_>>();
    let (phi_dual, x_dual) = (dual(&phi), dual(&x.data));
    let moved = SoftMoe { phi_ds: &phi_dual, slots, per_expert: p, scale: Dual::variable(scale), epsilon };
    let moved = moved.forward(&x_dual, width, Mixing::Soft, doubling_and_squaring);
    // The last token first, the others behind it.
    let rotated: Vec<f64> = [&x.data[(t - 1) * width..], &x.data[..(t - 1) * width]].concat();
    let nested = |v: &[f64]| v.chunks_exact(slots).map(|row| rows_json(row, p)).collect::<Vec<_>>();
    let slot_rows = |v: &[f64]| v.chunks_exact(p * width).map(|e| rows_json(e, width)).collect::<Vec<_>>();
    Ok(json!({
        "logits": nested(&soft.logits_ts),
        "dispatch": nested(&soft.dispatch_ts),
        "combine": nested(&soft.combine_ts),
        "slots": slot_rows(&soft.slots_sd),
        "expert_out": slot_rows(&soft.outputs_sd),
        "y": rows_json(&soft.y_td, width),
        "dsum_y_dscale": moved.y_td.iter().map(|y| y.derivative).sum::<f64>(),
        "y_uniform": rows_json(&run(&x.data, Mixing::Uniform).y_td, width),
        "y_uniform_dispatch": rows_json(&run(&x.data, Mixing::UniformDispatch).y_td, width),
        "y_uniform_combine": rows_json(&run(&x.data, Mixing::UniformCombine).y_td, width),
        "y_perm_check": rows_json(&run(&rotated, Mixing::Soft).y_td, width),
    }))
}

pub(super) fn identity(case: &Case) -> Found {
    let (m, n, p) = (case.count("m")?, case.count("n")?, case.count("p")?);
    if n * p == 0 {
        return Err(case.shape("n, p", "at least one slot", "none"));
    }
    let slots: Vec<usize> = (0..m).map(|t| slot_of_token(t, n * p)).collect();
    Ok(json!({ "expert_of_token": slots.iter().map(|s| s / p).collect::<Vec<_>>(), "slot_of_token": slots }))
}

pub(super) fn relu(case: &Case) -> Found {
    let logits = Logits::of(case, "logits")?;
    let (t, experts) = (logits.z.rows, logits.z.cols);
    let k = case.count("k")?;
    let config = RouterConfig {
        policy: Policy::Relu,
        activation: Activation::Relu,
        normalize: Normalize::Never,
        ..RouterConfig::default()
    };
    let routed = logits.route(case, k, &config, None)?;
    let tokens = Tokens::of(case, logits.shape(k))?;
    let penalty = losses(case, &logits, &routed, BalanceLoss::Switch)?;
    let scale = experts as f64 / (k * t) as f64;
    let pairs = routed.choices.pairs();
    let mut lambda = case.number("lambda0")?;
    let alpha = case.number("alpha")?;
    let mut path = Vec::new();
    for sparsity in case.numbers("sparsities")? {
        lambda = relu_controller(lambda, alpha, sparsity, experts, k);
        path.push(lambda * 1e8);
    }
    Ok(json!({
        "gates": rows_json(&routed.probs_te, experts),
        "active": (0..t).map(|t| routed.choices.of_token(t).len()).collect::<Vec<_>>(),
        "sparsity": 1.0 - pairs as f64 / (t * experts) as f64,
        "f": routed.assignment.demand.iter().map(|&c| f64::from(c) * scale).collect::<Vec<_>>(),
        "L_reg": penalty.balance,
        "dL_dlogits": rows_json(&penalty.dlogits_te, experts),
        "lambda_1e8": path,
        "y": tokens.output(&routed).json(),
    }))
}

pub(super) fn merging(case: &Case) -> Found {
    let x = case.matrix("X")?;
    let width = x.cols;
    let router = case.matrix("router")?;
    let weights = case.matrices("W")?;
    let segment = case.count("seg")?;
    let experts = router.cols;
    let square = weights.iter().all(|w| (w.rows, w.cols) == (width, width));
    if router.rows != width || weights.len() != experts || !square || segment == 0 || x.rows == 0 || experts == 0 {
        let expected = format!("router {width} x E, W E x {width} x {width}, seg >= 1");
        return Err(case.shape(
            "router, W, seg",
            &expected,
            &format!("router {} x {experts}, {} W", router.rows, weights.len()),
        ));
    }
    let parameters: Vec<f64> = weights.iter().flat_map(|w| w.data.clone()).collect();
    let apply = |w: &[f64], x: &[f64]| -> Vec<f64> {
        w.chunks_exact(width).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum::<f64>().max(0.0)).collect()
    };
    let own = segment_weights(&x.data, &router.data, width, segment);
    let used = shifted_weights(&own, experts, FirstSegment::OwnMean);
    let lory = merged_forward(&x.data, width, segment, &used, &parameters, experts, apply);
    let smear = segment_weights(&x.data, &router.data, width, x.rows);
    let merged = merged_forward(&x.data, width, x.rows, &smear, &parameters, experts, apply);
    Ok(json!({
        "seg_weights": rows_json(&own, experts),
        "used_weights": rows_json(&used, experts),
        "y_lory": rows_json(&lory, width),
        "smear_weights": smear,
        "y_smear": rows_json(&merged, width),
    }))
}

pub(super) fn mixture_of_tokens(case: &Case) -> Found {
    let sequences = case.matrices("X")?;
    let (positions, width) = sequences.first().map_or((0, 0), |m| (m.rows, m.cols));
    let controller = case.matrix("controller")?;
    let experts = controller.cols;
    let scale = case.numbers_sized("scale", experts)?;
    let temperature = case.number("temperature")?;
    if controller.rows != width || experts == 0 || width == 0 {
        return Err(case.shape("controller", &format!("{width} x E"), &format!("{} x {experts}", controller.rows)));
    }
    let expert = |e: usize, x: &[f64]| x.iter().map(|v| scale[e] * v).collect::<Vec<f64>>();
    let run = |x: &[f64]| mixture_of_tokens::group_forward(x, &controller.data, width, temperature, expert);
    let mut y: Vec<Matrix> = sequences.clone();
    let mut weights = Vec::new();
    for position in 0..positions {
        let group: Vec<f64> = sequences.iter().flat_map(|s| s.row(position).to_vec()).collect();
        let (w, out) = run(&group);
        weights.push(rows_json(&w, experts));
        for (s, row) in out.chunks_exact(width).enumerate() {
            y[s].data[position * width..(position + 1) * width].copy_from_slice(row);
        }
    }
    let alone: Vec<Value> = sequences
        .iter()
        .map(|s| rows_json(&(0..positions).flat_map(|p| run(s.row(p)).1).collect::<Vec<_>>(), width))
        .collect();
    Ok(json!({
        "weights_pos_token_expert": weights,
        "y": y.iter().map(Matrix::json).collect::<Vec<_>>(),
        "y_group_size_1": alone,
    }))
}

pub(super) fn block_causal(case: &Case) -> Found {
    let x = case.matrix("X")?;
    let (phi, n, p) = phi(case, x.cols)?;
    let block = case.count("block")?;
    if block == 0 {
        return Err(case.shape("block", "at least 1", "0"));
    }
    let (scale, slots) = (case.number("scale")?, n * p);
    let layer = SoftMoe { phi_ds: &phi, slots, per_expert: p, scale, epsilon: NORM_EPSILON };
    let out = block_causal::forward(&layer, &x.data, x.cols, block, doubling_and_squaring);
    let slots: Vec<Value> = out.slots_bsd.chunks(slots * x.cols).map(|b| rows_json(b, x.cols)).collect();
    Ok(json!({ "y": rows_json(&out.y_td, x.cols), "slots": slots }))
}

pub(super) fn causality(case: &Case) -> Found {
    const TRIALS: usize = 200;
    let asked = case.expected("causal")?.as_object().cloned().unwrap_or_default();
    let (mut causal, mut invariant) = (Map::new(), Map::new());
    for probe in causality::probes() {
        if asked.contains_key(probe.name) {
            let verdict = probe.verdict(TRIALS);
            causal.insert(probe.name.to_string(), json!(verdict.causal));
            invariant.insert(probe.name.to_string(), json!(verdict.batch_invariant));
        }
    }
    Ok(json!({ "causal": causal, "batch_invariant_when_group_is_the_batch": invariant }))
}
