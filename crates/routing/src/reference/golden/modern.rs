//! The cases of section E: DeepSeekMoE and V3, global-batch balance, shared experts, hash, BASE, Sinkhorn, cosine, MoE++,
//! heterogeneous experts, MLP gate.

use super::GoldenError;
use super::case::{Case, Matrix, rows_json};
use super::foundation::{Logits, Tokens, losses};
use crate::activation::{sigmoid, softmax_rows};
use crate::capacity::zero_cost_shares;
use crate::config::{Activation, BalanceConfig, BalanceLoss, BalanceScope, Normalize, Policy, RouterConfig};
use crate::losses::heterogeneous::{flops_ratio, mean_entropy, normalised_widths, parameter_penalty};
use crate::losses::{
    AuxiliaryOptions, auxiliary, bias_update, device_loss, importance, selection_fractions, switch_loss,
};
use crate::policy::{base, group_limited, hash, sinkhorn, top_p};
use crate::reference::combine::combine;
use crate::residual::shared_gate;
use crate::rng::StepContext;
use crate::route::{RouteShape, RouterInput, route};
use crate::scorers::{Hidden, cosine_scores, mlp_logits, residual_logits, torchscale_scores};
use crate::select::{arg_max, top_k};
use crate::zero_cost::{balance_loss, constant_expert, constant_mix, renormalise_after_zero};
use serde_json::{Value, json};

type Found = Result<Value, GoldenError>;

fn raw() -> RouterConfig {
    RouterConfig { normalize: Normalize::Never, ..RouterConfig::default() }
}

pub(super) fn deepseek_moe(case: &Case) -> Found {
    let logits = Logits::of(case, "Z")?;
    let (t, experts) = (logits.z.rows, logits.z.cols);
    let k = case.count("k")?;
    let devices = case.input("devices")?.as_array().cloned().unwrap_or_default();
    let mut groups = Vec::new();
    for device in &devices {
        let list = case.numbers_of("devices", device)?;
        let valid = |v: &f64| v.fract() == 0.0 && *v >= 0.0 && (*v as usize) < experts;
        if !list.iter().all(valid) {
            return Err(case.shape("devices", &format!("experts below {experts}"), &device.to_string()));
        }
        groups.push(list.into_iter().map(|v| v as usize).collect::<Vec<_>>());
    }
    let routed = logits.route(case, k, &raw(), None)?;
    let tokens = Tokens::of(case, logits.shape(k))?;
    let y = plus_shared(&tokens.output(&routed), &tokens.x, |_| 0.5);
    let fraction = selection_fractions(&routed.choices, experts, t);
    let mean = mean_of(&logits.p);
    let scale = experts as f64 / k as f64;
    Ok(json!({
        "routed_gate": rows_json(&routed.combine_te(), experts),
        "y": y.json(),
        "f": fraction.iter().map(|f| f * scale).collect::<Vec<_>>(),
        "L_expert": switch_loss(&fraction, &mean, k),
        "L_device": device_loss(&fraction, &mean, k, &groups),
        "P": mean,
    }))
}

pub(super) fn deepseek_v3(case: &Case) -> Found {
    let logits = Logits::of(case, "logits")?;
    let (t, experts) = (logits.z.rows, logits.z.cols);
    let bias = case.numbers_sized("bias", experts)?;
    let negative = case.numbers_sized("negative_bias", experts)?;
    let (groups, keep, k) = (case.count("groups")?, case.count("M")?, case.count("k")?);
    let free = RouterConfig {
        activation: Activation::Sigmoid,
        normalize: Normalize::BeforeDrop,
        weight_scale: case.number("scale")?,
        ..RouterConfig::default()
    };
    let limited = RouterConfig { policy: Policy::GroupLimited { groups, keep }, ..free.clone() };
    let shape = logits.shape(k);
    let input = RouterInput::new(&logits.z.data);
    let run = |input: &RouterInput<f64>, config: &RouterConfig| {
        case.routing(route(input, shape, config, &StepContext::evaluation()))
    };
    let routed = run(&input.with_bias(&bias), &limited)?;
    let unlimited = run(&input, &free)?;
    let correct = run(&input.with_bias(&negative), &limited)?;
    let biased =
        |bias: &[f64]| -> Vec<f64> { routed.probs_te.iter().enumerate().map(|(i, s)| s + bias[i % experts]).collect() };
    let scores = biased(&bias);
    let kept = group_limited::kept_groups(&scores, experts, groups, keep, 2);
    let below = biased(&negative);
    let kept_below = group_limited::kept_groups(&below, experts, groups, keep, 2);
    let zero_masked = group_limited::mask_groups(&below, experts, groups, &kept_below, 0.0);
    let mut bias_new: Vec<f32> = vec![0.0; experts];
    let load: Vec<f64> = routed.assignment.demand.iter().map(|&c| f64::from(c)).collect();
    bias_update(&mut bias_new, &load, case.number("u")?);
    // As many sequences of equal length as the case expects losses; the loss counts the unbiased choices.
    let sequences = case.expected("seq_loss")?.as_array().map_or(0, Vec::len);
    if sequences == 0 || !t.is_multiple_of(sequences) {
        return Err(case.shape("logits", &format!("tokens of {sequences} equal sequences"), &format!("{t} tokens")));
    }
    let length = t / sequences;
    let sequences: Vec<Sequence> = (0..sequences).map(|s| Sequence::of(&unlimited, s * length, length)).collect();
    let balance = BalanceConfig {
        coefficient: 1.0,
        scope: BalanceScope::Sequence,
        z_loss: 0.0,
        loss: BalanceLoss::Switch,
        ..BalanceConfig::default()
    };
    let options = AuxiliaryOptions { sequence: length, ..AuxiliaryOptions::default() };
    let mean = case.routing(auxiliary(&input, &unlimited, &balance, options))?.balance;
    Ok(json!({
        "scores": rows_json(&routed.probs_te, experts),
        "group_scores": rows_json(&group_limited::group_scores(&scores, experts, groups, 2), groups),
        "groups_kept": rows_json(&kept, keep),
        "index": rows_json(&routed.choices.experts, k),
        "weights": rows_json(&routed.weight_of_pair, k),
        "index_no_groups_no_bias": rows_json(&unlimited.choices.experts, k),
        "weights_no_groups_no_bias": rows_json(&unlimited.weight_of_pair, k),
        "load": routed.assignment.demand,
        "bias_new": bias.iter().zip(&bias_new).map(|(b, step)| b + f64::from(*step)).collect::<Vec<_>>(),
        "seq_f": sequences.iter().map(|s| s.f.clone()).collect::<Vec<_>>(),
        "seq_P": sequences.iter().map(|s| s.p.clone()).collect::<Vec<_>>(),
        "seq_loss": sequences.iter().map(|s| s.f.iter().zip(&s.p).map(|(f, p)| f * p).sum::<f64>()).collect::<Vec<_>>(),
        "seq_loss_mean": mean,
        "index_negbias_correct": rows_json(&correct.choices.experts, k),
        "index_negbias_zero_mask": rows_json(&top_k(&zero_masked, experts, k), k),
    }))
}

/// f (scaled by E/k) and P of one sequence, scores made a distribution per token.
struct Sequence {
    f: Vec<f64>,
    p: Vec<f64>,
}

impl Sequence {
    fn of(routed: &crate::route::Routed<f64>, first: usize, length: usize) -> Self {
        let RouteShape { experts, top_k, .. } = routed.shape;
        let (mut f, mut p) = (vec![0.0; experts], vec![0.0; experts]);
        for t in first..first + length {
            let row = &routed.probs_te[t * experts..(t + 1) * experts];
            let total: f64 = row.iter().sum();
            p.iter_mut().zip(row).for_each(|(p, s)| *p += s / total / length as f64);
            for &e in routed.choices.of_token(t) {
                f[e as usize] += experts as f64 / (top_k * length) as f64;
            }
        }
        Self { f, p }
    }
}

pub(super) fn global_batch(case: &Case) -> Found {
    let logits = Logits::of(case, "Z")?;
    let (t, experts) = (logits.z.rows, logits.z.cols);
    let (split, k) = (case.counts("split")?, case.count("k")?);
    if split.iter().sum::<usize>() != t || split.contains(&0) {
        return Err(case.shape("split", &format!("positive counts that sum to {t}"), &format!("{split:?}")));
    }
    let merged = logits.route(case, k, &RouterConfig::default(), None)?;
    let f_global = selection_fractions(&merged.choices, experts, t);
    let (mut micro, mut global) = (Vec::new(), Vec::new());
    let mut first = 0;
    for &n in &split {
        let rows = first * experts..(first + n) * experts;
        let input = RouterInput::new(&logits.z.data[rows.clone()]);
        let shape = RouteShape { tokens: n, ..logits.shape(k) };
        let part = case.routing(route(&input, shape, &RouterConfig::default(), &StepContext::evaluation()))?;
        let value = |scope, global_fraction_e| {
            let config = BalanceConfig { coefficient: 1.0, scope, z_loss: 0.0, ..BalanceConfig::default() };
            let options = AuxiliaryOptions { global_fraction_e, ..AuxiliaryOptions::default() };
            case.routing(auxiliary(&input, &part, &config, options)).map(|a| a.balance)
        };
        micro.push(value(BalanceScope::Micro, None)?);
        global.push(value(BalanceScope::Global, Some(&f_global[..]))?);
        first += n;
    }
    let weighted = |values: &[f64]| values.iter().zip(&split).map(|(v, n)| v * *n as f64).sum::<f64>() / t as f64;
    Ok(json!({
        "micro_mean_tokenweighted": weighted(&micro),
        "global_tokenweighted": weighted(&global),
        "micro": micro,
        "global_per_micro": global,
        "f_global": f_global.iter().map(|f| f / k as f64).collect::<Vec<_>>(),
        "merged": losses(case, &logits, &merged, BalanceLoss::Switch)?.balance,
    }))
}

pub(super) fn shared_expert(case: &Case) -> Found {
    let logits = Logits::of(case, "Z")?;
    let k = case.count("k")?;
    let tokens = Tokens::of(case, logits.shape(k))?;
    let w = case.numbers_sized("w", tokens.x.cols)?;
    let gate = shared_gate(&tokens.x.data, &w);
    let output = |config: &RouterConfig| -> Found {
        let routed = logits.route(case, k, config, None)?;
        Ok(plus_shared(&tokens.output(&routed), &tokens.x, |t| 0.5 * gate[t]).json())
    };
    Ok(json!({ "y_norm_false": output(&raw())?, "y_norm_true": output(&RouterConfig::default())?, "gate": gate }))
}

pub(super) fn hash(case: &Case) -> Found {
    let ids: Vec<u32> = case.counts("token_ids")?.into_iter().map(|id| id as u32).collect();
    let (experts, buckets) = (case.count("E")?, case.count("buckets")?);
    if experts == 0 || buckets == 0 {
        return Err(case.shape("E, buckets", "at least 1", "0"));
    }
    let (table, load) = hash::balanced_table(&case.numbers("freq")?, buckets);
    Ok(json!({ "modulo": hash::modulo(&ids, experts), "balanced_bucket": table, "bucket_load": load }))
}

pub(super) fn base(case: &Case) -> Found {
    let affinity = bounded(case, "affinity")?;
    let x = case.matrix("X")?;
    if x.rows != affinity.rows {
        return Err(case.shape("X", &format!("{} tokens", affinity.rows), &format!("{} tokens", x.rows)));
    }
    let assigned = base::assign(&affinity.data, affinity.cols);
    let gate: Vec<f64> = assigned.iter().enumerate().map(|(t, &e)| sigmoid(affinity.row(t)[e as usize])).collect();
    let mut y = x.clone();
    for t in 0..x.rows {
        let scale = gate[t] * f64::from(assigned[t] + 1) + 1.0 - gate[t];
        y.data[t * x.cols..(t + 1) * x.cols].iter_mut().for_each(|v| *v *= scale);
    }
    Ok(json!({
        "total": base::total(&affinity.data, affinity.cols, &assigned),
        "assign": assigned,
        "gate": gate,
        "y": y.json(),
        "greedy": (0..x.rows).map(|t| arg_max(affinity.row(t))).collect::<Vec<_>>(),
    }))
}

pub(super) fn sinkhorn(case: &Case) -> Found {
    let logits = bounded(case, "logits")?;
    let plan = sinkhorn::plan(&logits.data, logits.cols, sinkhorn::TOLERANCE, sinkhorn::MOST_ITERATIONS);
    let p = Matrix::new(logits.rows, logits.cols, plan.plan_te);
    let route = top_k(&p.data, p.cols, 1);
    Ok(json!({
        "plan": p.json(),
        "iterations": plan.iterations,
        "row_sums": (0..p.rows).map(|t| p.row(t).iter().sum::<f64>()).collect::<Vec<_>>(),
        "col_sums": importance(&p.data, p.cols),
        "gate": route.iter().enumerate().map(|(t, &e)| sigmoid(logits.row(t)[e as usize])).collect::<Vec<_>>(),
        "route": route,
    }))
}

/// A non-empty matrix whose work stays bounded for the assignment algorithms.
fn bounded(case: &Case, name: &str) -> Result<Matrix, GoldenError> {
    let m = case.matrix(name)?;
    if m.rows == 0 || m.cols == 0 || m.data.len() > 1 << 16 {
        return Err(case.shape(name, "1 to 65536 numbers", &format!("{} x {}", m.rows, m.cols)));
    }
    Ok(m)
}

pub(super) fn cosine(case: &Case) -> Found {
    let x = case.matrix("X")?;
    let w = case.matrix("W")?;
    let embeddings = case.matrix("E")?;
    let tau = case.number("tau")?;
    if w.cols != x.cols || embeddings.cols != w.rows || x.cols == 0 || embeddings.rows == 0 || tau <= 0.0 {
        return Err(case.shape("W, E, tau", "W [d_e, d], E [E, d_e], tau > 0", "other shapes"));
    }
    let experts = embeddings.rows;
    let cosine = cosine_scores(&x.data, &w.data, &embeddings.data, x.cols);
    let scaled: Vec<f64> = cosine.iter().map(|s| s / tau).collect();
    let mut softmax_gate = vec![0.0; scaled.len()];
    softmax_rows(&scaled, experts, &mut softmax_gate, &mut vec![0.0; x.rows]);
    let route = top_k(&cosine, experts, 1);
    let mut fraction = vec![0.0; experts];
    route.iter().for_each(|&e| fraction[e as usize] += 1.0 / x.rows as f64);
    let mean: Vec<f64> = importance(&softmax_gate, experts).iter().map(|p| p / x.rows as f64).collect();
    // X-MoE's temperature for sigmoid gates; the case's own tau is that of the softmax.
    const SIGMOID_TAU: f64 = 0.07;
    // Tutel: logits times min(exp(t), 100) with t0 = ln 2.
    let tutel = std::f64::consts::LN_2.exp().min(100.0);
    Ok(json!({
        "cosine": rows_json(&cosine, experts),
        "softmax_gate": rows_json(&softmax_gate, experts),
        "sigmoid_gate": rows_json(&cosine.iter().map(|&s| sigmoid(s / SIGMOID_TAU)).collect::<Vec<_>>(), experts),
        "torchscale_score": rows_json(&torchscale_scores(&x.data, &w.data, &embeddings.data, x.cols), experts),
        "tutel_logits": rows_json(&cosine.iter().map(|s| s * tutel).collect::<Vec<_>>(), experts),
        "route": route,
        "balance_loss": switch_loss(&fraction, &mean, 1),
    }))
}

pub(super) fn moe_plus_plus(case: &Case) -> Found {
    let logits = Logits::of(case, "Z")?;
    let (t, experts) = (logits.z.rows, logits.z.cols);
    // FFN experts x -> x, then one constant, one copy, one zero.
    let Some(ffn) = experts.checked_sub(3).filter(|n| *n > 0) else {
        return Err(case.shape("Z", "at least 4 experts", &experts.to_string()));
    };
    let x = case.matrix("X")?;
    let wc = case.matrix_shaped("Wc", 2, x.cols)?;
    let v = case.numbers_sized("v", x.cols)?;
    let previous = case.matrix_shaped("prev_logits", t, experts)?;
    let wg = case.matrix_shaped("Wg", experts, experts)?;
    let (tau, gamma) = (case.number("tau")?, case.number("gamma")?);
    if x.rows != t {
        return Err(case.shape("X", &format!("{t} tokens"), &format!("{} tokens", x.rows)));
    }
    let routed = logits.route(case, 2, &raw(), None)?;
    let expert = |e: usize, row: &[f64]| -> Vec<f64> {
        match e - e.min(ffn) {
            _ if e < ffn => row.to_vec(),
            0 => constant_expert(row, &wc.data, &v),
            1 => row.to_vec(),
            _ => vec![0.0; row.len()],
        }
    };
    let y = combine(&x.data, x.cols, &routed.assignment, &routed.weight_n, expert);
    let alpha: Vec<f64> = (0..t).flat_map(|t| constant_mix(x.row(t), &wc.data)).collect();
    let fraction = selection_fractions(&routed.choices, experts, t);
    let (cap_ffn, cap_zc) = zero_cost_shares(t as f64, ffn as f64, 3.0, tau, gamma);
    let carried = residual_logits(&logits.z.data, &previous.data, &wg.transposed().data, experts);
    Ok(json!({
        "alpha": rows_json(&alpha, 2),
        "y": rows_json(&y, x.cols),
        "logits_with_residual": rows_json(&carried, experts),
        "L_b": balance_loss(&fraction, &mean_of(&logits.p), ffn, tau),
        "cap_ffn": cap_ffn,
        "cap_zc": cap_zc,
        "reference_code_gates":
            rows_json(&renormalise_after_zero(&routed.combine_te(), experts, |e| e == ffn + 2), experts),
    }))
}

pub(super) fn heterogeneous(case: &Case) -> Found {
    let logits = Logits::of(case, "Z")?;
    let (t, experts) = (logits.z.rows, logits.z.cols);
    let widths = case.numbers_sized("h", experts)?;
    let routed = logits.route(case, 2, &RouterConfig::default(), None)?;
    let fraction = selection_fractions(&routed.choices, experts, t);
    let prefix = top_p::select(&logits.p.data, experts, case.number("p")?);
    let mean = mean_of(&logits.p);
    Ok(json!({
        "P_penalty_top2": parameter_penalty(&fraction, &mean, &widths),
        "P_penalty_top2_normalised": parameter_penalty(&fraction, &mean, &normalised_widths(&widths)),
        "top_p_sets": (0..t).map(|t| { let mut s = prefix.of_token(t).to_vec(); s.sort_unstable(); s }).collect::<Vec<_>>(),
        "P_penalty_topp": parameter_penalty(&selection_fractions(&prefix, experts, t), &mean, &widths),
        "mean_entropy": mean_entropy(&logits.p.data, experts),
        "flops_ratio_top2": flops_ratio(&routed.assignment.demand, &widths),
    }))
}

pub(super) fn mlp_gate(case: &Case) -> Found {
    let x = case.matrix("X")?;
    let w1 = case.matrix("W1")?;
    let w2 = case.matrix("W2")?;
    if w1.rows != x.cols || w2.rows != w1.cols || x.cols == 0 || w1.cols == 0 || w2.cols == 0 {
        return Err(case.shape(
            "W1, W2",
            &format!("{} x m, m x E", x.cols),
            &format!("{} x {}, {}", w1.rows, w1.cols, w2.rows),
        ));
    }
    let run = |hidden| mlp_logits(&x.data, &w1.data, &w2.data, x.cols, hidden);
    let tanh = run(Hidden::Tanh);
    let mut gates = vec![0.0; tanh.len()];
    softmax_rows(&tanh, w2.cols, &mut gates, &mut vec![0.0; x.rows]);
    Ok(json!({
        "logits_tanh": rows_json(&tanh, w2.cols),
        "logits_relu": rows_json(&run(Hidden::Relu), w2.cols),
        "gates_tanh": rows_json(&gates, w2.cols),
    }))
}

fn mean_of(p: &Matrix) -> Vec<f64> {
    importance(&p.data, p.cols).iter().map(|m| m / p.rows.max(1) as f64).collect()
}

/// `y + weight(t) x`, the fixtures' shared expert being a scaling.
fn plus_shared(y: &Matrix, x: &Matrix, weight: impl Fn(usize) -> f64) -> Matrix {
    let data = y.data.iter().zip(&x.data).enumerate().map(|(i, (o, v))| o + weight(i / x.cols) * v);
    Matrix::new(y.rows, y.cols, data.collect())
}
