//! The cases of sections F, G and H: bounds of the balance loss, upcycling, pruning and merging, similarity-aware selection,
//! propositions, the batch sampler.

use super::GoldenError;
use super::case::{Case, rows_json};
use super::foundation::{Logits, Tokens};
use crate::activation::normalise_row;
use crate::assignment::Assignment;
use crate::config::RouterConfig;
use crate::losses::importance;
use crate::policy::expert_choice;
use crate::policy::similarity::{self, fuzzy_membership};
use crate::reference::balance_bounds::{infimum, infimum_for, switch_loss_of, top_k_family, witness};
use crate::reference::combine::combine;
use crate::reference::compress::{align, average, gated_output_norm, keep, permute_rows, row_norms};
use crate::reference::dispersion::deficit_batches;
use crate::reference::propositions::{Connective, Item, SplitMix64, atom_text, distinct_bodies, draw};
use serde_json::{Map, Value, json};

type Found = Result<Value, GoldenError>;

pub(super) fn lower_bound(case: &Case) -> Found {
    let eps = case.number("eps")?;
    let live = case.count("n7_live")?;
    if !(1..7).contains(&live) || eps.is_nan() || eps.abs() > 0.05 {
        return Err(case.shape("n7_live, eps", "1 <= n7_live < 7, |eps| <= 0.05", &format!("{live}, {eps}")));
    }
    // Three experts, four tokens: expert 0 holds 1/2 - eps everywhere and never wins.
    let (high, low) = (0.5 + eps, 0.5 - eps);
    let seed = [[low, high, 0.0], [low, high, 0.0], [low, 0.0, high], [low, 0.0, high]].concat();
    let rows = witness(7, live, eps);
    let ask = |name: &str, value: &dyn Fn(&[usize]) -> Option<f64>| -> Found {
        let keys = case.expected(name)?.as_object().cloned().unwrap_or_default();
        let mut answers = Map::new();
        for key in keys.keys() {
            let numbers: Vec<usize> = key.split(',').filter_map(|n| n.trim().parse().ok()).collect();
            let answer = value(&numbers).filter(|_| numbers.iter().all(|n| *n <= 1 << 16));
            let answer = answer.ok_or_else(|| case.shape(name, "keys of positive numbers", key))?;
            answers.insert(key.clone(), json!(answer));
        }
        Ok(Value::Object(answers))
    };
    Ok(json!({
        "seed_value_eps": switch_loss_of(&seed, 3),
        "seed_formula": 0.75 * (1.0 + 2.0 * eps),
        "L_witness_n7": switch_loss_of(&rows, 7),
        "witness_n7": rows_json(&rows, 7),
        "L_witness_n7_eps0": switch_loss_of(&witness(7, live, 0.0), 7),
        "limit_by_n": ask("limit_by_n", &|n| matches!(n, [n] if *n > 0).then(|| infimum(n[0])))?,
        "exact_nT": ask("exact_nT", &|n| matches!(n, [a, b] if *a > 0 && *b > 0).then(|| infimum_for(n[0], n[1])))?,
        "topk_family": ask("topk_family", &|n| matches!(n, [a, b] if *b > 0 && b <= a).then(|| top_k_family(n[0], n[1])))?,
    }))
}

pub(super) fn two_experts(case: &Case) -> Found {
    let w = case.matrix("W")?;
    Ok(json!({ "L": switch_loss_of(&w.data, w.cols), "limit": infimum(w.cols) }))
}

pub(super) fn stop_gradient(case: &Case) -> Found {
    let logits = Logits::of(case, "Z")?;
    let routed = logits.route(case, 1, &RouterConfig::switch(), None)?;
    let aux = super::foundation::losses(case, &logits, &routed, crate::config::BalanceLoss::Switch)?;
    let t = logits.z.rows as f64;
    Ok(json!({
        "L": aux.balance,
        "f": routed.assignment.demand.iter().map(|&c| f64::from(c) / t).collect::<Vec<_>>(),
        "grad": rows_json(&aux.dlogits_te, logits.z.cols),
    }))
}

pub(super) fn combine_norm(case: &Case) -> Found {
    let w = case.numbers("w")?;
    let normalised = |values: &[f64]| {
        let mut row = values.to_vec();
        normalise_row(&mut row);
        row
    };
    Ok(json!({
        "normalised": normalised(&w),
        "single": normalised(&w[..w.len().min(1)]),
        "none": normalised(&vec![0.0; w.len()]),
    }))
}

pub(super) fn upcycle(case: &Case) -> Found {
    let logits = Logits::of(case, "Z")?;
    let (t, experts) = (logits.z.rows, logits.z.cols);
    let k = case.count("k")?;
    if k == 0 || k > t {
        return Err(case.shape("k", &format!("1 to {t}"), &k.to_string()));
    }
    let x = Tokens::of(case, logits.shape(1))?.x;
    let choices = expert_choice::select(&logits.p.data, experts, k);
    let assignment = Assignment::dropless(&choices, experts);
    let mut gate = vec![0.0; t * experts];
    for t in 0..t {
        choices.of_token(t).iter().for_each(|&e| gate[t * experts + e as usize] = logits.p.row(t)[e as usize]);
    }
    let mut normalised = gate.clone();
    normalised.chunks_exact_mut(experts).for_each(normalise_row);
    // Every expert is the dense MLP x -> 2 x.
    let output = |gate: &[f64]| {
        let at = |(row, &e): (usize, &u32)| gate[assignment.token_of_row[row] as usize * experts + e as usize];
        let weights: Vec<f64> = assignment.expert_of_row().iter().enumerate().map(at).collect();
        combine(&x.data, x.cols, &assignment, &weights, |_, x| x.iter().map(|v| 2.0 * v).collect())
    };
    let y_norm = output(&normalised);
    let routed = |t: usize| !choices.of_token(t).is_empty();
    let error = |i: usize| if routed(i / x.cols) { (y_norm[i] - 2.0 * x.data[i]).abs() } else { 0.0 };
    Ok(json!({
        "y_raw": rows_json(&output(&gate), x.cols),
        "max_err_norm_routed": (0..y_norm.len()).map(error).fold(0.0, f64::max),
        "y_norm": rows_json(&y_norm, x.cols),
        "unrouted": (0..t).filter(|t| !routed(*t)).collect::<Vec<_>>(),
        "rel_gain_raw": gate.chunks_exact(experts).map(|row| row.iter().sum::<f64>()).collect::<Vec<_>>(),
    }))
}

pub(super) fn prune_and_merge(case: &Case) -> Found {
    let rows = case.matrix("rows")?;
    let usage = case.numbers_sized("usage", rows.rows)?;
    let logits = Logits::of(case, "Z")?;
    let tokens = Tokens::of(case, logits.shape(1))?;
    let routed = logits.route(case, 1, &RouterConfig::switch(), None)?;
    let expert_of_row = routed.assignment.expert_of_row();
    let norm = |(row, &e): (usize, &u32)| {
        let x = tokens.x.row(routed.assignment.token_of_row[row] as usize);
        x.iter().map(|v| (tokens.scale[e as usize] * v).powi(2)).sum::<f64>().sqrt()
    };
    let norms: Vec<f64> = expert_of_row.iter().enumerate().map(norm).collect();
    let a = case.matrix("W_in_a")?;
    let b = case.matrix_shaped("W_in_b", a.rows, a.cols)?;
    if a.data.len() > 1 << 16 || a.rows > 256 || a.data.is_empty() {
        return Err(case.shape("W_in_a", "1 to 256 rows", &format!("{} x {}", a.rows, a.cols)));
    }
    let order = align(&a.data, &b.data, a.cols);
    let l2 = row_norms(&rows.data, rows.cols);
    // The case's usage weights are 3/4 and 1/4.
    let merged = average(&a.data, &permute_rows(&b.data, b.cols, &order), 0.75);
    Ok(json!({
        "l2_keep2": keep(&l2, 2),
        "l2": l2,
        "usage_keep2": keep(&usage, 2),
        "soft_usage": importance(&logits.p.data, logits.z.cols),
        "reap": gated_output_norm(&expert_of_row, &routed.weight_n, &norms, logits.z.cols),
        "perm": order,
        "merged_W_in": rows_json(&merged, a.cols),
        "naive_merge_W_in": rows_json(&average(&a.data, &b.data, 0.75), a.cols),
    }))
}

pub(super) fn similarity(case: &Case) -> Found {
    let logits = Logits::of(case, "Z")?;
    let experts = logits.z.cols;
    let x = Tokens::of(case, logits.shape(1))?.x;
    let capacity = case.count("C")?;
    let prototypes = case.matrix_shaped("prototypes", experts, x.cols)?;
    let fuzzifier = case.number("fuzzifier")?;
    if fuzzifier <= 1.0 || capacity == 0 {
        return Err(case.shape("fuzzifier, C", "fuzzifier > 1, C >= 1", &format!("{fuzzifier}, {capacity}")));
    }
    let routed = logits.route(case, 1, &RouterConfig::switch(), None)?;
    let tokens = similarity::Tokens { gates_te: &logits.p.data, experts, x_td: &x.data };
    let slots = tokens.slots(&routed.choices, capacity);
    let redirected = tokens.redirect(&routed.choices, capacity);
    let kept = |choices: &crate::assignment::Choices, slots: &[u32]| -> Value {
        let assignment = Assignment::with_slots(choices, experts, slots);
        let list = |e: usize| json!(assignment.token_of_row[assignment.rows_of_expert(e)]);
        Value::Object((0..experts).map(|e| (e.to_string(), list(e))).collect())
    };
    let lost: Vec<usize> = (0..slots.len()).filter(|p| slots[*p] == crate::assignment::NO_SLOT).collect();
    let moved: Map<String, Value> = redirected.moved.iter().map(|(t, e)| (t.to_string(), json!(e))).collect();
    Ok(json!({
        "kept_drop": kept(&routed.choices, &slots),
        "lost": lost,
        "kept_rematch": kept(&redirected.choices, &redirected.slots),
        "redirected": moved,
        "fuzzy_membership": rows_json(&fuzzy_membership(&x.data, &prototypes.data, x.cols, fuzzifier), experts),
    }))
}

pub(super) fn logic(case: &Case) -> Found {
    let seed = case.count("seed")? as u64;
    let facts = case.input("facts")?.as_object().cloned().unwrap_or_default();
    let mut world: Vec<(String, u32)> = Vec::new();
    for name in case.subjects() {
        let count = facts.get(name).and_then(Value::as_u64).filter(|c| *c <= 1000);
        let count = count.ok_or_else(|| case.shape("facts", "counts of at most 1000", name))?;
        world.push((name.clone(), count as u32));
    }
    if world.len() < 2 {
        return Err(case.shape("facts", "at least two subjects", &world.len().to_string()));
    }
    let mut rng = SplitMix64(seed);
    let first: Vec<Value> = (0..8).map(|_| item_json(&draw(&mut rng, &world), &world)).collect();
    let mut splitmix = SplitMix64(seed);
    let tables: Map<String, Value> = Connective::ALL
        .iter()
        .map(|c| {
            let rows = [(false, false), (false, true), (true, false), (true, true)];
            (c.name().to_string(), json!(rows.map(|(a, b)| c.truth(a, b))))
        })
        .collect();
    // The labels of the first thousand items of seed 7.
    let mut labels = Map::new();
    let mut seven = SplitMix64(7);
    let drawn: Vec<&str> = (0..1000).map(|_| draw(&mut seven, &world).label).collect();
    for label in ["true", "false", "undetermined"] {
        labels.insert(label.to_string(), json!(drawn.iter().filter(|l| **l == label).count()));
    }
    Ok(json!({
        "first8": first,
        "splitmix_first3": (0..3).map(|_| splitmix.next_u64().to_string()).collect::<Vec<_>>(),
        "truth_tables": tables,
        "canonical": canonical(case, &world)?,
        "distinct_bodies": distinct_bodies(&world),
        "labels_in_1000": labels,
    }))
}

/// "Earth has exactly two ... OR Mars has exactly one ...", judged by the file's facts.
fn canonical(case: &Case, world: &[(String, u32)]) -> Found {
    let atom = |name: &str, count: u32| {
        let subject = world.iter().position(|(n, _)| n == name);
        let subject = subject.ok_or_else(|| case.shape("facts", "Earth and Mars among them", name))?;
        Ok(crate::reference::propositions::Atom { subject, count, truth: world[subject].1 == count })
    };
    let (a, b): (crate::reference::propositions::Atom, crate::reference::propositions::Atom) =
        (atom("Earth", 2)?, atom("Mars", 1)?);
    let truth = Connective::Or.truth(a.truth, b.truth);
    Ok(json!({
        "text": format!("{} OR {}.", atom_text(&a, world), atom_text(&b, world)),
        "atoms": [a.truth, b.truth],
        "label": if truth { "true" } else { "false" },
    }))
}

fn item_json(item: &Item, world: &[(String, u32)]) -> Value {
    let atoms: Vec<Value> = item.atoms.iter().map(|a| json!([world[a.subject].0, a.count, a.truth])).collect();
    json!({
        "text": item.text,
        "connective": item.connective.name(),
        "modality": item.modality.name(),
        "atoms": atoms,
        "body_truth": item.body_truth,
        "label": item.label,
    })
}

pub(super) fn sampler(case: &Case) -> Found {
    let sizes = case.counts("sizes")?;
    let batch = case.count("batch")?;
    let total: usize = sizes.iter().sum();
    if batch == 0 || total > 1 << 16 || sizes.len() > 1 << 8 {
        return Err(case.shape(
            "sizes, batch",
            "batch >= 1, at most 65536 documents of 256 sources",
            &total.to_string(),
        ));
    }
    let batches = deficit_batches(&sizes, batch);
    let share = |b: &Vec<u32>| {
        let most = (0..sizes.len()).map(|s| b.iter().filter(|x| **x == s as u32).count()).max().unwrap_or(0);
        most as f64 / b.len() as f64
    };
    Ok(json!({
        "max_share": batches.iter().map(share).collect::<Vec<_>>(),
        "batches": batches,
        "ideal": sizes.iter().map(|s| *s as f64 / total as f64).collect::<Vec<_>>(),
    }))
}
