//! The cases of sections B and C: hierarchical and batchwise gating, GShard, ST-MoE, DeepSpeed, Tutel, V-MoE.

use super::GoldenError;
use super::case::{Case, Matrix, rows_json};
use super::foundation::{Logits, Tokens, losses};
use crate::assignment::{Choices, NO_SLOT};
use crate::capacity::{Fraction, slots_by_position};
use crate::config::{BalanceLoss, DropOrder, Normalize, RouterConfig, SecondChoice};
use crate::losses::{cv_squared, importance, normal_cdf};
use crate::policy::{batchwise, expert_choice, gshard, hierarchical, priority, sampled_second};
use crate::reference::compress::average;
use crate::residual::{coefficients, distillation};
use crate::route::{Routed, RouterInput, route_choices};
use crate::select::top_k;
use serde_json::{Map, Value, json};

type Found = Result<Value, GoldenError>;

pub(super) fn hierarchical(case: &Case) -> Found {
    let gp = case.matrix("Gp")?;
    let gs = case.matrices("Gs")?;
    let (groups, inner) = (gp.cols, gs.first().map_or(0, |m| m.cols));
    if gs.len() != gp.rows || gs.iter().any(|m| m.rows != groups) || inner == 0 {
        return Err(case.shape("Gs", &format!("{} x {groups} x b", gp.rows), &format!("{} matrices", gs.len())));
    }
    let secondary: Vec<f64> = gs.iter().flat_map(|m| m.data.clone()).collect();
    let gate = hierarchical::combined_gate(&gp.data, &secondary, inner);
    let sizes = hierarchical::group_sizes(&gp.data, groups);
    let primary = case.numbers_sized("load_primary", groups)?;
    let secondary_load = case.matrix_shaped("load_secondary", groups, inner)?;
    let load = hierarchical::load(&primary, &secondary_load.data, &sizes, inner);
    let importance = importance(&gate, groups * inner);
    let per_token: Vec<Value> = gate.chunks_exact(groups * inner).map(|g| rows_json(g, inner)).collect();
    Ok(json!({
        "combined_gate": per_token,
        "importance_H": rows_json(&importance, inner),
        "group_size": sizes,
        "load_H": rows_json(&load, inner),
        "cv2_importance": cv_squared(&importance),
        "cv2_load": cv_squared(&load),
    }))
}

pub(super) fn batchwise(case: &Case) -> Found {
    let p = case.matrix("Gsigma")?;
    let experts = p.cols;
    let thresholds = case.numbers_sized("T", experts)?;
    let k = case.count("k")?;
    if experts == 0 {
        return Err(case.shape("Gsigma", "at least one expert", "none"));
    }
    let each = (k * p.rows / experts).min(p.rows);
    let gates = |choices: &Choices| {
        let mask = batchwise::mask(choices, experts);
        let mut g: Vec<f64> = mask.iter().zip(&p.data).map(|(m, p)| m * p).collect();
        g.chunks_exact_mut(experts).for_each(crate::activation::normalise_row);
        (mask, g)
    };
    let (batch, g_batch) = gates(&expert_choice::select(&p.data, experts, each));
    let (threshold, g_threshold) = gates(&batchwise::above_thresholds(&p.data, &thresholds));
    let (loss, gradient) = batchwise::threshold_loss(&p.data, &thresholds, &batch, &threshold);
    Ok(json!({
        "m": each,
        "M_batchwise": rows_json(&batch, experts),
        "G_batchwise": rows_json(&g_batch, experts),
        "M_threshold": rows_json(&threshold, experts),
        "G_threshold": rows_json(&g_threshold, experts),
        "L_batchwise": loss,
        "dL_dT": gradient,
    }))
}

pub(super) fn gshard(case: &Case) -> Found {
    let f = Fixture::of(case)?;
    let experts = f.logits.z.cols;
    let capacity = case.count("C")?;
    let draws = case.numbers_sized("rnd", f.logits.z.rows)?;
    let choices = f.choices(case, 2, |z| top_k(z, experts, 2))?;
    let variant = |rule: SecondChoice, normalize: Normalize| -> Found {
        let skip = gshard::skipped(&choices, &f.logits.p.data, experts, rule, |t| draws[t]);
        let queue = gshard::Queue { skipped_takes_place: gshard::skipped_takes_place(rule) };
        let slots = queue.slots(&choices, experts, capacity, &skip);
        f.two_pass(case, &choices, slots, &skip, normalize)
    };
    let first: Vec<u32> = choices.experts.iter().step_by(2).copied().collect();
    let second: Vec<u32> = choices.experts.iter().skip(1).step_by(2).copied().collect();
    let gate = |t: usize, e: u32| f.logits.p.row(t)[e as usize];
    let share = |t: usize, e: u32| gate(t, e) / (gate(t, first[t]) + gate(t, second[t]));
    let tokens = f.logits.z.rows as f64;
    let mut fraction = vec![0.0; experts];
    first.iter().for_each(|&e| fraction[e as usize] += 1.0 / tokens);
    let mean: Vec<f64> = importance(&f.logits.p.data, experts).iter().map(|p| p / tokens).collect();
    let product: f64 = fraction.iter().zip(&mean).map(|(f, p)| f * p).sum();
    Ok(json!({
        "g1_norm": first.iter().enumerate().map(|(t, &e)| share(t, e)).collect::<Vec<_>>(),
        "g2_norm": second.iter().enumerate().map(|(t, &e)| share(t, e)).collect::<Vec<_>>(),
        "first": first,
        "second": second,
        "paper": variant(SecondChoice::Paper, Normalize::BeforeDrop)?,
        // The case's description sets this threshold.
        "mesh_legacy": variant(SecondChoice::Threshold(0.5), Normalize::BeforeDrop)?,
        "lingvo_new_all": variant(SecondChoice::All, Normalize::AfterDrop)?,
        "deepspeed_nosample": variant(SecondChoice::All, Normalize::AfterDrop)?,
        "fraction_first": fraction,
        "mean_gate": mean,
        "l_aux_paper": product / experts as f64,
        "l_aux_times_E2": product * experts as f64,
    }))
}

pub(super) fn st_moe(case: &Case) -> Found {
    let f = Fixture::of(case)?;
    let experts = f.logits.z.cols;
    let threshold = case.number("threshold")?;
    let choices = f.choices(case, 2, |z| top_k(z, experts, 2))?;
    let first = f.logits.route(case, 1, &RouterConfig::switch(), None)?;
    let aux = losses(case, &f.logits, &first, BalanceLoss::Switch)?;
    let tokens = f.logits.z.rows as f64;
    let dz: Vec<f64> =
        f.logits.p.data.iter().enumerate().map(|(i, p)| 2.0 / tokens * f.logits.lse[i / experts] * p).collect();
    let keep = |threshold: f64| -> Vec<f64> {
        let share = |t: usize| {
            let gate = |e: &u32| f.logits.p.row(t)[*e as usize];
            match choices.of_token(t) {
                [a, b] => gate(b) / (gate(a) + gate(b)),
                _ => 0.0,
            }
        };
        let rule = SecondChoice::Threshold(threshold);
        (0..choices.tokens()).map(|t| gshard::keep_probability(rule, share(t))).collect()
    };
    Ok(json!({
        "z_loss": aux.z,
        "dz_dZ": rows_json(&dz, experts),
        "keep_prob_second": keep(threshold),
        "keep_prob_second_threshold_0_5": keep(0.5),
        "total_aux": case.number("cB")? * aux.balance + case.number("cz")? * aux.z,
    }))
}

pub(super) fn deepspeed_top1(case: &Case) -> Found {
    let f = Fixture::of(case)?;
    let (tokens, experts) = (f.logits.z.rows, f.logits.z.cols);
    let uniform = case.matrix_shaped("U", tokens, experts)?;
    let gumbel = case.matrix_shaped("gumbel", tokens, experts)?;
    let factor = case.number("capacity_factor")?;
    let exact = Fraction::from_decimal(factor);
    let exact = exact.ok_or_else(|| case.shape("capacity_factor", "between 0 and 1e6", &factor.to_string()))?;
    let capacity = (exact.ceil_mul_div(tokens as u128, experts as u128) as usize).max(case.count("min_capacity")?);
    let choices = f.choices(case, 1, |z| top_k(z, experts, 1))?;
    let run = |slots: Vec<u32>| f.routed(case, &choices, slots, &RouterConfig::switch());
    let random = priority::slots_by_key(&choices, experts, capacity, |t, e| uniform.row(t)[e as usize]);
    let rts_slot: Vec<u32> = random.iter().map(|&s| if s == NO_SLOT { 0 } else { s }).collect();
    let random = run(random)?;
    let sequential = run(slots_by_position(&choices, experts, capacity, DropOrder::TokenMajor))?;
    let kept = |r: &Routed<f64>| (0..tokens).filter(|t| !r.assignment.rows_of_token(*t).is_empty()).collect::<Vec<_>>();
    let noisy: Vec<f64> = f.logits.z.data.iter().zip(&gumbel.data).map(|(z, g)| z + g).collect();
    let sampled = top_k(&noisy, experts, 1);
    let gates: Vec<f64> = sampled.iter().enumerate().map(|(t, &e)| f.logits.p.row(t)[e as usize]).collect();
    Ok(json!({
        "capacity": capacity,
        "rts_combine": rows_json(&random.combine_te(), experts),
        "rts_slot": rts_slot,
        "rts_kept": kept(&random),
        "sequential_combine": rows_json(&sequential.combine_te(), experts),
        "sequential_kept": kept(&sequential),
        "exp_counts": random.assignment.demand,
        "l_aux": losses(case, &f.logits, &random, BalanceLoss::Switch)?.balance,
        "rsample_index": sampled,
        "rsample_gate": gates,
        "capacity_if_no_drop": random.assignment.demand.iter().max(),
    }))
}

pub(super) fn deepspeed_top2(case: &Case) -> Found {
    let f = Fixture::of(case)?;
    let (tokens, experts) = (f.logits.z.rows, f.logits.z.cols);
    let gumbel = case.matrix_shaped("gumbel", tokens, experts)?;
    let noisy: Vec<f64> = f.logits.z.data.iter().zip(&gumbel.data).map(|(z, g)| z + g).collect();
    let choices = f.choices(case, 2, |z| sampled_second(z, &noisy, experts))?;
    let slots = slots_by_position(&choices, experts, case.count("capacity")?, DropOrder::ChoiceMajor);
    let found = f.two_pass(case, &choices, slots, &vec![false; choices.pairs()], Normalize::AfterDrop)?;
    let first = f.logits.route(case, 1, &RouterConfig::switch(), None)?;
    let mut found = found.as_object().cloned().unwrap_or_default();
    found.insert("second".to_string(), json!(choices.experts.iter().skip(1).step_by(2).collect::<Vec<_>>()));
    found.insert("l_aux".to_string(), json!(losses(case, &f.logits, &first, BalanceLoss::Switch)?.balance));
    Ok(Value::Object(found))
}

pub(super) fn deepspeed_top_k(case: &Case) -> Found {
    let logits = Logits::of(case, "Z")?;
    let experts = logits.z.cols;
    let (k, capacity) = (case.count("k")?, case.count("C")?);
    let dropless = logits.route(case, k, &RouterConfig::default(), None)?;
    let choices = &dropless.choices;
    let mask = batchwise::mask(choices, experts);
    let after = RouterConfig { normalize: Normalize::AfterDrop, ..RouterConfig::default() };
    let run = |slots: Vec<u32>| -> Result<(Vec<f64>, Vec<f64>), GoldenError> {
        let input = RouterInput::new(&logits.z.data);
        let routed = case.routing(route_choices(&input, logits.shape(k), &after, choices.clone(), Some(slots)))?;
        let combine = routed.combine_te();
        let mut kept = vec![0.0; combine.len()];
        for (row, &e) in routed.assignment.expert_of_row().iter().enumerate() {
            kept[routed.assignment.token_of_row[row] as usize * experts + e as usize] = 1.0;
        }
        Ok((kept, combine))
    };
    let probs = run(priority::slots_by_key(choices, experts, capacity, |t, e| logits.p.row(t)[e as usize]))?;
    // DeepSpeed counts places over its k-hot mask, token by token: this one policy of its is token-major.
    let position = run(slots_by_position(choices, experts, capacity, DropOrder::TokenMajor))?;
    // The old code ranked raw logits with 0 for unselected pairs: a selected negative logit loses to an unselected pair.
    let ranked: Vec<f64> = mask.iter().zip(&logits.z.data).map(|(m, z)| if *m > 0.0 { *z } else { 0.0 }).collect();
    let winners = expert_choice::pick(&ranked, experts, capacity.min(logits.z.rows));
    let each = capacity.min(logits.z.rows).max(1);
    let mut bug_slots = vec![NO_SLOT; choices.pairs()];
    for (i, &t) in winners.iter().enumerate() {
        let e = (i / each) as u32;
        let pairs = choices.pair_range(t as usize);
        if let Some(j) = choices.of_token(t as usize).iter().position(|c| *c == e) {
            bug_slots[pairs.start + j] = (i % each) as u32;
        }
    }
    let bug = run(bug_slots)?;
    Ok(json!({
        "P": logits.p.json(),
        "topk": rows_json(&choices.experts, k),
        "mask": rows_json(&mask, experts),
        "mask_probs": rows_json(&probs.0, experts),
        "combine_probs": rows_json(&probs.1, experts),
        "mask_logits_bug": rows_json(&bug.0, experts),
        "combine_logits_bug": rows_json(&bug.1, experts),
        "mask_position": rows_json(&position.0, experts),
        "combine_position": rows_json(&position.1, experts),
        "l_aux": losses(case, &logits, &dropless, BalanceLoss::Switch)?.balance,
    }))
}

pub(super) fn residual(case: &Case) -> Found {
    let f = Fixture::of(case)?;
    let width = f.tokens.x.cols;
    let wc = case.matrix_shaped("Wc", width, 2)?;
    let bias = case.numbers_sized("bc", 2)?;
    // "On F1/Switch output": capacity 2, as in C2.switch; the dense branch is 0.5 x.
    let routed = f.logits.route(case, 1, &RouterConfig::switch(), Some(2))?;
    let moe = f.tokens.output(&routed);
    let coef = coefficients(&f.tokens.x.data, &wc.data, &bias, width);
    let blend = |i: usize| coef[i / width * 2] * moe.data[i] + coef[i / width * 2 + 1] * 0.5 * f.tokens.x.data[i];
    let y: Vec<f64> = (0..moe.data.len()).map(blend).collect();
    let student = case.matrix("student")?;
    let teacher = case.matrix_shaped("teacher", student.rows, student.cols)?;
    let labels = case.counts("labels")?;
    if student.cols == 0 || labels.len() != student.rows || labels.iter().any(|l| *l >= student.cols) {
        return Err(case.shape("labels", &format!("{} below {}", student.rows, student.cols), &format!("{labels:?}")));
    }
    let (ce, kl) = distillation(&student.data, &teacher.data, &labels, student.cols);
    Ok(json!({
        "coef": rows_json(&coef, 2),
        "y": rows_json(&y, width),
        "ce": ce,
        "kl": kl,
        "loss_stage1": ce + kl,
        "loss_stage2": ce,
    }))
}

pub(super) fn tutel(case: &Case) -> Found {
    let f = Fixture::of(case)?;
    let (tokens, experts) = (f.logits.z.rows, f.logits.z.cols);
    let (k, cf) = (case.count("k")?, case.number("cf")?);
    let routed = f.logits.route(case, k, &RouterConfig::default(), None)?;
    let choices = &routed.choices;
    let order = priority::batch_order(choices, |t, e| f.logits.p.row(t)[e as usize], false);
    let locations = slots_by_position(choices, experts, usize::MAX, DropOrder::ChoiceMajor);
    let prioritised = priority::slots_in_order(choices, experts, usize::MAX, &order);
    let slots = |factor: f64| -> Result<usize, GoldenError> {
        let exact = Fraction::from_decimal(factor);
        let exact = exact.ok_or_else(|| case.shape("cf", "between 0 and 1e6", &factor.to_string()))?;
        Ok(k * exact.floor_mul_div(tokens.div_ceil(experts) as u128, 1) as usize)
    };
    let capacity = slots(cf)?;
    let dynamic = locations.iter().map(|l| *l as usize + 1).max().unwrap_or(0);
    let dropped: Vec<[usize; 2]> =
        (0..locations.len()).filter(|p| locations[*p] as usize >= capacity).map(|p| [p / k, p % k]).collect();
    Ok(json!({
        "topk": rows_json(&choices.experts, k),
        "locations": rows_json(&locations, k),
        "locations_bpr": rows_json(&prioritised, k),
        "gates": rows_json(&routed.weight_of_pair, k),
        "capacity": capacity,
        "dropped_pairs": dropped,
        "capacity_dynamic": dynamic,
        "capacity_dynamic_capped_0_5": dynamic.min(slots(0.5)?),
    }))
}

pub(super) fn v_moe(case: &Case) -> Found {
    let f = Fixture::of(case)?;
    let (tokens, experts) = (f.logits.z.rows, f.logits.z.cols);
    let capacity = case.count("C")?;
    let eps = case.matrix_shaped("eps", tokens, experts)?;
    let raw = RouterConfig { normalize: Normalize::Never, ..RouterConfig::default() };
    let choices = f.choices(case, 2, |z| top_k(z, experts, 2))?;
    let gate = |t: usize, e: u32| f.logits.p.row(t)[e as usize];
    let combine =
        |slots: Vec<u32>| -> Found { Ok(rows_json(&f.routed(case, &choices, slots, &raw)?.combine_te(), experts)) };
    let by_max = priority::batch_order(&choices, gate, false);
    let by_sum = priority::batch_order(&choices, gate, true);
    let noisy: Vec<f64> = f.logits.z.data.iter().zip(&eps.data).map(|(z, e)| z + e / experts as f64).collect();
    let mut noisy_prob = vec![0.0; noisy.len()];
    crate::activation::softmax_rows(&noisy, experts, &mut noisy_prob, &mut vec![0.0; tokens]);
    // One threshold per token, its second largest noisy logit, for every expert.
    let second = top_k(&noisy, experts, 2);
    let mut load = vec![0.0; experts];
    for t in 0..tokens {
        let threshold = noisy[t * experts + second[t * 2 + 1] as usize];
        for e in 0..experts {
            load[e] += 1.0 - normal_cdf((threshold - f.logits.z.row(t)[e]) * experts as f64);
        }
    }
    Ok(json!({
        "vanilla": combine(slots_by_position(&choices, experts, capacity, DropOrder::ChoiceMajor))?,
        "bpr_max": combine(priority::slots_in_order(&choices, experts, capacity, &by_max))?,
        "order_max": by_max,
        "bpr_sum": combine(priority::slots_in_order(&choices, experts, capacity, &by_sum))?,
        "order_sum": by_sum,
        "noisy_prob": rows_json(&noisy_prob, experts),
        "importance_loss": cv_squared(&importance(&f.logits.p.data, experts)),
        "load_loss": cv_squared(&load),
    }))
}

pub(super) fn aggregation(case: &Case) -> Found {
    let a = case.matrix("gate_a")?;
    let b = case.matrix("gate_b")?;
    if a.cols != b.cols {
        return Err(case.shape("gate_b", &format!("{} columns", a.cols), &format!("{} columns", b.cols)));
    }
    let x = case.matrix("x")?;
    if x.cols != a.cols {
        return Err(case.shape("x", &format!("{} columns", a.cols), &format!("{} columns", x.cols)));
    }
    let dense_a = case.numbers("dense_a")?;
    let dense_b = case.numbers_sized("dense_b", dense_a.len())?;
    let gate = Matrix::new(a.rows + b.rows, a.cols, [a.data, b.data].concat());
    Ok(json!({
        "logits": x.times(&gate.transposed()).json(),
        "gate": gate.json(),
        "dense": average(&dense_a, &dense_b, 0.5),
    }))
}

/// F1's logits and tokens.
struct Fixture {
    logits: Logits,
    tokens: Tokens,
}

impl Fixture {
    fn of(case: &Case) -> Result<Self, GoldenError> {
        let logits = Logits::of(case, "Z")?;
        let tokens = Tokens::of(case, logits.shape(1))?;
        Ok(Self { logits, tokens })
    }

    /// k choices per token by `choose`, which may rely on k <= E.
    fn choices(&self, case: &Case, k: usize, choose: impl Fn(&[f64]) -> Vec<u32>) -> Result<Choices, GoldenError> {
        if k > self.logits.z.cols {
            return Err(case.shape("Z", &format!("at least {k} experts"), &self.logits.z.cols.to_string()));
        }
        Ok(Choices::rectangular(self.logits.z.rows, k, choose(&self.logits.z.data)))
    }

    fn routed(
        &self,
        case: &Case,
        choices: &Choices,
        slots: Vec<u32>,
        config: &RouterConfig,
    ) -> Result<Routed<f64>, GoldenError> {
        let k = choices.most_per_token().max(1);
        let input = RouterInput::new(&self.logits.z.data);
        case.routing(route_choices(&input, self.logits.shape(k), config, choices.clone(), Some(slots)))
    }

    /// What every top-2 variant reports.
    fn two_pass(&self, case: &Case, choices: &Choices, slots: Vec<u32>, skip: &[bool], normalize: Normalize) -> Found {
        let config = RouterConfig { normalize, ..RouterConfig::default() };
        let listed: Vec<f64> = slots.iter().map(|&s| if s == NO_SLOT { -1.0 } else { f64::from(s) }).collect();
        let tokens = choices.tokens();
        let dropped =
            |j: usize| (0..tokens).filter(|t| slots[t * 2 + j] == NO_SLOT && !skip[t * 2 + j]).collect::<Vec<_>>();
        let mut found = Map::new();
        found.insert("drop_first".to_string(), json!(dropped(0)));
        found.insert("drop_second".to_string(), json!(dropped(1)));
        found.insert("skipped_second".to_string(), json!((0..tokens).filter(|t| skip[t * 2 + 1]).collect::<Vec<_>>()));
        let routed = self.routed(case, choices, slots, &config)?;
        found.insert("combine".to_string(), rows_json(&routed.combine_te(), self.logits.z.cols));
        found.insert("slot".to_string(), rows_json(&listed, 2));
        found.insert("y".to_string(), self.tokens.output(&routed).json());
        Ok(Value::Object(found))
    }
}
