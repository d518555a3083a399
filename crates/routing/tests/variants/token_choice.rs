//! Sections 0, B and C: fixture, ties, edges, capacity, noisy top-k, hierarchical, batchwise, GShard, ST-MoE, DeepSpeed, Tutel,
//! V-MoE, residual, aggregation; and the plain top-k routers of section E.

use super::plain::*;
use serde_json::{Value, json};

/// What the fixture of a file holds.
pub struct Fixture {
    pub z: M,
    pub x: M,
    pub scale: Vec<f64>,
}

impl Fixture {
    pub fn new(rng: &mut Rng, tokens: usize, experts: usize, width: usize) -> Self {
        let scale = (0..experts).map(|e| e as f64 * 0.5 + 0.25 + rng.unit()).collect();
        Self { z: rng.matrix(tokens, experts, 2.5), x: rng.matrix(tokens, width, 1.5), scale }
    }

    pub fn p(&self) -> M {
        softmaxes(&self.z)
    }

    pub fn experts(&self) -> usize {
        self.z[0].len()
    }

    pub fn y(&self, g: &M) -> M {
        scaled(g, &self.x, &self.scale)
    }
}

type Case = (&'static str, Value, Value);

pub fn cases(rng: &mut Rng, f: &Fixture) -> Vec<Case> {
    let mut out =
        vec![fixture(f), ties(rng), edge(rng), capacity(rng), noisy(rng, f), hierarchical(rng), batchwise(rng)];
    out.extend([gshard(rng, f), st_moe(rng, f), ds_top1(rng, f), ds_top2(rng, f), ds_top_k(rng), residual(rng, f)]);
    out.extend([
        tutel(rng, f),
        v_moe(rng, f),
        aggregation(rng),
        switch(rng, f),
        mixtral(f),
        dropless(rng, f),
        olmoe(f),
    ]);
    out
}

fn fixture(f: &Fixture) -> Case {
    let inputs = json!({"Z": f.z, "X": f.x, "expert_scale": f.scale});
    let top1: Vec<usize> = f.z.iter().map(|row| best(row, 1)[0]).collect();
    let lse: Vec<f64> = f.z.iter().map(|row| lse(row)).collect();
    ("F1", inputs, json!({"P": f.p(), "top1": top1, "top2": all_best(&f.z, 2), "lse": lse}))
}

fn ties(rng: &mut Rng) -> Case {
    // Few distinct values: ties everywhere.
    let z: M = (0..4).map(|_| (0..5).map(|_| rng.below(3) as f64 - 1.0).collect()).collect();
    let priority: Vec<f64> = (0..7).map(|_| rng.below(3) as f64 / 2.0).collect();
    let first: Vec<usize> = z.iter().map(|row| best(row, 1)[0]).collect();
    let expected = json!({"argmax": first, "top2": all_best(&z, 2), "order_desc": descending(&priority)});
    ("T1.ties", json!({"Z": z, "priority": priority}), expected)
}

fn edge(rng: &mut Rng) -> Case {
    let z = rng.matrix(3, 1, 2.0);
    let square = z.iter().map(|row| row[0] * row[0]).sum::<f64>() / 3.0;
    ("T2.edge", json!({"Z": z}), json!({"P": [[1.0], [1.0], [1.0]], "aux": 1.0, "z_loss": square}))
}

fn capacity(rng: &mut Rng) -> Case {
    let (mut rows, mut expected) = (Vec::new(), Vec::new());
    for _ in 0..8 {
        // The factor is a whole number of quarters: everything below is exact in whole numbers.
        let (s, e, quarters, k) = (1 + rng.below(300), 1 + rng.below(16), 1 + rng.below(12), 1 + rng.below(4));
        rows.push(json!([s, e, quarters as f64 / 4.0, k]));
        let up = |a: usize, b: usize| a.div_ceil(b);
        let even = |a: usize, b: usize| {
            let (whole, rest) = (a / b, a % b);
            if 2 * rest > b || (2 * rest == b && whole % 2 == 1) { whole + 1 } else { whole }
        };
        let up4 = |n: usize| up(n, 4) * 4;
        let share = |n: usize| n * quarters; // over 4 e
        let mesh = (share(s) / (4 * e)).min(s).max(4);
        let lingvo = match share(s) / (4 * e) {
            0 => 4,
            n => up4(n),
        };
        expected.push(json!({
            "mesh_tf(max(min(S,floor(S*cf/E)),4))": mesh,
            "deepspeed(max(ceil(S/E*cf*k),4))": up(share(s * k), 4 * e).max(4),
            "tutel(k*floor(cf*ceil(S/E)))": k * (share(up(s, e)) / 4),
            "torchscale_top1_train(floor(cf*ceil(S/E)))": share(up(s, e)) / 4,
            "vmoe(up4(ceil(S*k*cf/E)))": up4(up(share(s * k), 4 * e)),
            "vmoe_paper(round(S*k*cf/E))": even(share(s * k), 4 * e),
            "flaxformer(max(round_half_even(cf*S/E),4))": even(share(s), 4 * e).max(4),
            "lingvo(up4(floor(S*cf/E) or 4))": lingvo,
            "megablocks(floor(cf*k*S/E))": share(s * k) / (4 * e),
            "megatron(ceil(S*k/E*cf))": up(share(s * k), 4 * e),
            "fastmoe_gshard(floor(ceil(cf*S)*k/E))": up(share(s), 4) * k / e,
            "lucidrains_st(max(min(S,floor(S*cf/E)),4))": mesh,
        }));
    }
    ("C0.capacity", json!({"rows": rows}), json!({"rows": expected}))
}

/// The load estimate with the threshold's noisy logits apart, so that stopping its gradient is a choice of argument.
fn load(clean: &M, thresholds: &M, noisy: &M, sd: &M, k: usize) -> (M, Vec<f64>) {
    let mut p = zeros(clean.len(), clean[0].len());
    for t in 0..clean.len() {
        for i in 0..clean[0].len() {
            // The k-th largest without i, chosen on the noisy logits, valued on the given thresholds.
            let others: Vec<f64> =
                noisy[t].iter().enumerate().map(|(j, z)| if j == i { f64::NEG_INFINITY } else { *z }).collect();
            let kth = best(&others, k)[k - 1];
            p[t][i] = phi((clean[t][i] - thresholds[t][kth]) / sd[t][i]);
        }
    }
    let sums = column_sums(&p);
    (p, sums)
}

fn noisy(rng: &mut Rng, f: &Fixture) -> Case {
    let (t, e, k) = (f.z.len(), f.experts(), 2);
    let (raw, eps, floor) = (rng.matrix(t, e, 1.0), rng.matrix(t, e, 2.0), 0.05);
    let softplus = |r: f64| (1.0 + r.exp()).ln();
    let sd_of = |raw: &M, floor: f64| -> M {
        raw.iter().map(|row| row.iter().map(|&r| softplus(r) + floor).collect()).collect()
    };
    let noisy_of = |clean: &M, sd: &M| -> M {
        let cell = |t: usize, e: usize| clean[t][e] + eps[t][e] * sd[t][e];
        (0..t).map(|t| (0..e).map(|i| cell(t, i)).collect()).collect()
    };
    let sd = sd_of(&raw, floor);
    let h = noisy_of(&f.z, &sd);
    let chosen = all_best(&h, k);
    let over_chosen = |z: &M, chosen: &[Vec<usize>]| {
        let exps: M = z.iter().map(|row| row.iter().map(|v| v.exp()).collect()).collect();
        normalised(&at_chosen(&exps, chosen))
    };
    let g = over_chosen(&h, &chosen);
    let (p, loads) = load(&f.z, &h, &h, &sd, k);
    let floored = {
        let sd = sd_of(&raw, 0.01);
        let h = noisy_of(&f.z, &sd);
        load(&f.z, &h, &h, &sd, k).1
    };
    let importance = column_sums(&g);
    let bessel = e as f64 / (e - 1) as f64;
    let loss = |clean: &M, sd: &M| {
        let h = noisy_of(clean, sd);
        cv2(&load(clean, &h, &h, sd, k).1)
    };
    let inputs = json!({"clean": f.z, "raw_noise": raw, "eps": eps, "k": k, "noise_floor": floor});
    let expected = json!({
        "H": h, "G": g, "P_in_topk": p, "importance": importance, "load": loads, "hard_load": counts(&chosen, e),
        "cv2_importance": cv2(&importance), "cv2_load": cv2(&loads),
        "cv2_importance_bessel": cv2(&importance) * bessel, "cv2_load_bessel": cv2(&loads) * bessel,
        "dLload_dclean_full": differences(&f.z, |clean| loss(clean, &sd)),
        "dLload_draw_full": differences(&raw, |raw| loss(&f.z, &sd_of(raw, floor))),
        "dLload_dclean_stopthr": differences(&f.z, |clean| cv2(&load(clean, &h, &h, &sd, k).1)),
        "y": f.y(&g), "G_eval": over_chosen(&f.z, &all_best(&f.z, k)), "load_with_floor_1e2": floored,
    });
    ("B1.noisy_topk", inputs, expected)
}

fn hierarchical(rng: &mut Rng) -> Case {
    let (t, a, b) = (5, 3, 2);
    let gp = normalised(&at_chosen(
        &softmaxes(&rng.matrix(t, a, 2.0)),
        &(0..t).map(|t| vec![t % 2, 1 + t % 2]).collect::<Vec<_>>(),
    ));
    let gs: Vec<M> = (0..t).map(|_| softmaxes(&rng.matrix(a, b, 2.0))).collect();
    let (lp, ls) = (rng.list(a, 3.0), rng.matrix(a, b, 2.0));
    let gate: Vec<M> =
        (0..t).map(|t| (0..a).map(|i| (0..b).map(|j| gp[t][i] * gs[t][i][j]).collect()).collect()).collect();
    let importance: M = (0..a).map(|i| (0..b).map(|j| gate.iter().map(|g| g[i][j]).sum()).collect()).collect();
    let size: Vec<usize> = (0..a).map(|i| gp.iter().filter(|g| g[i] > 0.0).count()).collect();
    let loads: M = (0..a)
        .map(|i| (0..b).map(|j| if size[i] == 0 { 0.0 } else { lp[i] * ls[i][j] / size[i] as f64 }).collect())
        .collect();
    let expected = json!({"combined_gate": gate, "importance_H": importance, "group_size": size, "load_H": loads,
        "cv2_importance": cv2(&importance.concat()), "cv2_load": cv2(&loads.concat())});
    ("B2.hierarchical", json!({"Gp": gp, "Gs": gs, "load_primary": lp, "load_secondary": ls}), expected)
}

fn batchwise(rng: &mut Rng) -> Case {
    let (t, e, k) = (6, 4, 2);
    let p = softmaxes(&rng.matrix(t, e, 2.0));
    let th: Vec<f64> = rng.list(e, 0.1).iter().map(|v| v + 0.25).collect();
    let m = k * t / e;
    let columns = transposed(&p);
    let batch: M =
        (0..t).map(|t| (0..e).map(|i| f64::from(u8::from(best(&columns[i], m).contains(&t)))).collect()).collect();
    let above: M = p.iter().map(|row| (0..e).map(|i| f64::from(u8::from(row[i] > th[i]))).collect()).collect();
    let masked = |mask: &M| normalised(&(0..t).map(|t| (0..e).map(|i| mask[t][i] * p[t][i]).collect()).collect());
    let difference = |t: usize, i: usize| above[t][i] - batch[t][i];
    let loss: f64 =
        (0..t).flat_map(|t| (0..e).map(move |i| (t, i))).map(|(t, i)| difference(t, i) * (p[t][i] - th[i])).sum();
    let gradient: Vec<f64> = (0..e).map(|i| -(0..t).map(|t| difference(t, i)).sum::<f64>() + 0.0).collect();
    let expected = json!({"m": m, "M_batchwise": batch, "G_batchwise": masked(&batch), "M_threshold": above,
        "G_threshold": masked(&above), "L_batchwise": loss, "dL_dT": gradient});
    ("B3.batchwise", json!({"Gsigma": p, "k": k, "T": th}), expected)
}

struct TwoPass<'a> {
    f: &'a Fixture,
    chosen: Vec<Vec<usize>>,
    capacity: usize,
}

impl TwoPass<'_> {
    /// Algorithm 1 and its variants as loops.
    fn run(&self, skipped: &[bool], skipped_counts: bool, after: bool) -> Value {
        let (t, e) = (self.f.z.len(), self.f.experts());
        let p = self.f.p();
        let mut counter = vec![0usize; e];
        let mut slot = vec![vec![-1i64; 2]; t];
        let (mut drop_first, mut drop_second) = (Vec::new(), Vec::new());
        for t in 0..t {
            let e = self.chosen[t][0];
            if counter[e] < self.capacity {
                slot[t][0] = counter[e] as i64;
            } else {
                drop_first.push(t);
            }
            counter[e] += 1;
        }
        for t in 0..t {
            let e = self.chosen[t][1];
            if skipped[t] && !skipped_counts {
                continue;
            }
            if !skipped[t] {
                if counter[e] < self.capacity {
                    slot[t][1] = counter[e] as i64;
                } else {
                    drop_second.push(t);
                }
            }
            counter[e] += 1;
        }
        let mut g = zeros(t, e);
        for t in 0..t {
            let gates: Vec<f64> = self.chosen[t].iter().map(|&e| p[t][e]).collect();
            let kept: f64 = (0..2).filter(|j| slot[t][*j] >= 0).map(|j| gates[j]).sum();
            let total = if after { kept } else { gates[0] + gates[1] };
            (0..2).filter(|j| slot[t][*j] >= 0).for_each(|j| g[t][self.chosen[t][j]] = gates[j] / total);
        }
        let skipped: Vec<usize> = (0..t).filter(|t| skipped[*t]).collect();
        json!({"combine": g, "slot": slot, "drop_first": drop_first, "drop_second": drop_second,
            "skipped_second": skipped, "y": self.f.y(&g)})
    }
}

fn gshard(rng: &mut Rng, f: &Fixture) -> Case {
    let (t, capacity) = (f.z.len(), 2);
    let (p, chosen) = (f.p(), all_best(&f.z, 2));
    let draws: Vec<f64> = (0..t).map(|_| rng.unit()).collect();
    let share = |t: usize, j: usize| p[t][chosen[t][j]] / (p[t][chosen[t][0]] + p[t][chosen[t][1]]);
    let pass = TwoPass { f, chosen: chosen.clone(), capacity };
    let skip = |keep: &dyn Fn(f64) -> f64| (0..t).map(|t| keep(share(t, 1)) <= draws[t]).collect::<Vec<_>>();
    let never = vec![false; t];
    let firsts: Vec<Vec<usize>> = chosen.iter().map(|c| vec![c[0]]).collect();
    let (fraction, mean) = (fractions(&firsts, f.experts()), column_means(&p));
    let e = f.experts() as f64;
    let expected = json!({
        "first": chosen.iter().map(|c| c[0]).collect::<Vec<_>>(), "second": chosen.iter().map(|c| c[1]).collect::<Vec<_>>(),
        "g1_norm": (0..t).map(|t| share(t, 0)).collect::<Vec<_>>(), "g2_norm": (0..t).map(|t| share(t, 1)).collect::<Vec<_>>(),
        "paper": pass.run(&skip(&|g| 2.0 * g), true, false),
        "mesh_legacy": pass.run(&skip(&|g| g / 0.5), false, false),
        "lingvo_new_all": pass.run(&never, false, true), "deepspeed_nosample": pass.run(&never, true, true),
        "fraction_first": fraction, "mean_gate": mean,
        "l_aux_paper": dot(&fraction, &mean) / e, "l_aux_times_E2": dot(&fraction, &mean) * e,
    });
    ("C1.gshard_top2", json!({"C": capacity, "rnd": draws}), expected)
}

fn st_moe(rng: &mut Rng, f: &Fixture) -> Case {
    let (threshold, cb, cz) = (0.1 + rng.unit() / 2.0, rng.unit(), rng.unit());
    let (p, chosen, t) = (f.p(), all_best(&f.z, 2), f.z.len() as f64);
    let z_loss = f.z.iter().map(|row| lse(row).powi(2)).sum::<f64>() / t;
    let keep = |threshold: f64| -> Vec<f64> {
        let share = |(p, c): (&Vec<f64>, &Vec<usize>)| p[c[1]] / (p[c[0]] + p[c[1]]);
        p.iter().zip(&chosen).map(share).map(|g| (g / threshold).min(1.0)).collect()
    };
    let aux = balance(&all_best(&f.z, 1), &p, 1);
    let gradient = differences(&f.z, |z| z.iter().map(|row| lse(row).powi(2)).sum::<f64>() / t);
    let expected = json!({"z_loss": z_loss, "dz_dZ": gradient, "keep_prob_second": keep(threshold),
        "keep_prob_second_threshold_0_5": keep(0.5), "total_aux": cb * aux + cz * z_loss});
    ("C3.stmoe", json!({"threshold": threshold, "cB": cb, "cz": cz}), expected)
}

/// Raw probabilities of kept first choices.
fn raw_first(p: &M, first: &[usize], kept: &[usize]) -> M {
    let mut g = zeros(p.len(), p[0].len());
    kept.iter().for_each(|&t| g[t][first[t]] = p[t][first[t]]);
    g
}

fn ds_top1(rng: &mut Rng, f: &Fixture) -> Case {
    let (t, e, p) = (f.z.len(), f.experts(), f.p());
    let u: M = (0..t).map(|_| (0..e).map(|_| rng.unit()).collect()).collect();
    let gumbel: M = (0..t).map(|_| (0..e).map(|_| -(-rng.unit().ln()).ln()).collect()).collect();
    // Factor 3/4: ceil(3 t / 4 e).
    let capacity = (3 * t).div_ceil(4 * e);
    let first: Vec<usize> = f.z.iter().map(|row| best(row, 1)[0]).collect();
    let wanting = |e: usize| (0..t).filter(|t| first[*t] == e).collect::<Vec<_>>();
    let (mut kept, mut sequential, mut slot) = (Vec::new(), Vec::new(), vec![0; t]);
    for e in 0..e {
        let tokens = wanting(e);
        let keys: Vec<f64> = tokens.iter().map(|&t| u[t][e]).collect();
        let mut lucky: Vec<usize> = best(&keys, capacity).into_iter().map(|i| tokens[i]).collect();
        lucky.sort_unstable();
        lucky.iter().enumerate().for_each(|(i, &t)| slot[t] = i);
        kept.extend(lucky);
        sequential.extend(tokens.into_iter().take(capacity));
    }
    kept.sort_unstable();
    sequential.sort_unstable();
    let sampled: Vec<usize> =
        (0..t).map(|t| best(&(0..e).map(|i| f.z[t][i] + gumbel[t][i]).collect::<Vec<_>>(), 1)[0]).collect();
    let load: Vec<usize> = (0..e).map(|e| wanting(e).len()).collect();
    let expected = json!({
        "capacity": capacity, "rts_combine": raw_first(&p, &first, &kept), "rts_slot": slot, "rts_kept": kept,
        "sequential_combine": raw_first(&p, &first, &sequential), "sequential_kept": sequential, "exp_counts": load,
        "l_aux": balance(&all_best(&f.z, 1), &p, 1), "rsample_index": sampled,
        "rsample_gate": (0..t).map(|t| p[t][sampled[t]]).collect::<Vec<_>>(), "capacity_if_no_drop": load.iter().max(),
    });
    ("C4.ds_top1", json!({"capacity_factor": 0.75, "min_capacity": 1, "U": u, "gumbel": gumbel}), expected)
}

fn ds_top2(rng: &mut Rng, f: &Fixture) -> Case {
    let (t, e, capacity) = (f.z.len(), f.experts(), 3);
    let gumbel = rng.matrix(t, e, 2.0);
    let chosen: Vec<Vec<usize>> = (0..t)
        .map(|t| {
            let first = best(&f.z[t], 1)[0];
            let noisy: Vec<f64> =
                (0..e).map(|i| if i == first { f64::NEG_INFINITY } else { f.z[t][i] + gumbel[t][i] }).collect();
            vec![first, best(&noisy, 1)[0]]
        })
        .collect();
    let pass = TwoPass { f, chosen: chosen.clone(), capacity };
    let mut expected = pass.run(&vec![false; t], true, true);
    expected["second"] = json!(chosen.iter().map(|c| c[1]).collect::<Vec<_>>());
    expected["l_aux"] = json!(balance(&all_best(&f.z, 1), &f.p(), 1));
    ("C5.ds_top2", json!({"capacity": capacity, "gumbel": gumbel}), expected)
}

fn ds_top_k(rng: &mut Rng) -> Case {
    let (t, e, k, capacity) = (6, 4, 2, 2);
    let z: M = rng.matrix(t, e, 1.5).into_iter().map(|row| row.into_iter().map(|v| v - 0.7).collect()).collect();
    let (p, chosen) = (softmaxes(&z), all_best(&z, k));
    let mask: M = chosen.iter().map(|c| (0..e).map(|i| f64::from(u8::from(c.contains(&i)))).collect()).collect();
    // Per expert, the largest entries of a column of scores; only selected entries count.
    let by = |scores: &M| -> M {
        let columns = transposed(scores);
        let kept = |t: usize, i: usize| best(&columns[i], capacity).contains(&t) && mask[t][i] > 0.0;
        (0..t).map(|t| (0..e).map(|i| f64::from(u8::from(kept(t, i)))).collect()).collect()
    };
    let only = |scores: &M, none: f64| -> M {
        (0..t).map(|t| (0..e).map(|i| if mask[t][i] > 0.0 { scores[t][i] } else { none }).collect()).collect()
    };
    let probs = by(&only(&p, f64::NEG_INFINITY));
    let bug = by(&only(&z, 0.0));
    let position: M = (0..t)
        .map(|t| {
            (0..e)
                .map(|i| if mask[..t].iter().map(|m| m[i]).sum::<f64>() < capacity as f64 { mask[t][i] } else { 0.0 })
                .collect()
        })
        .collect();
    let combine = |m: &M| normalised(&(0..t).map(|t| (0..e).map(|i| m[t][i] * p[t][i]).collect()).collect());
    let expected = json!({"P": p, "topk": chosen, "mask": mask, "mask_probs": probs, "combine_probs": combine(&probs),
        "mask_logits_bug": bug, "combine_logits_bug": combine(&bug), "mask_position": position,
        "combine_position": combine(&position), "l_aux": balance(&chosen, &p, k)});
    ("C6.ds_topk", json!({"Z": z, "k": k, "C": capacity}), expected)
}

/// Switch at capacity by position: raw probability of the first `capacity` tokens of each expert.
fn switch_gate(f: &Fixture, capacity: usize) -> (M, Vec<usize>) {
    let (mut g, mut seen, mut dropped) = (zeros(f.z.len(), f.experts()), vec![0; f.experts()], Vec::new());
    for (t, row) in f.z.iter().enumerate() {
        let e = best(row, 1)[0];
        if seen[e] < capacity {
            g[t][e] = softmax(row)[e];
        } else {
            dropped.push(t);
        }
        seen[e] += 1;
    }
    (g, dropped)
}

fn residual(rng: &mut Rng, f: &Fixture) -> Case {
    let (wc, bc) = (rng.matrix(f.x[0].len(), 2, 1.0), rng.list(2, 0.5));
    let (student, teacher, labels) = (rng.matrix(3, 4, 2.0), rng.matrix(3, 4, 2.0), [1, 3, 0]);
    let coefficients: M = times(&f.x, &wc).iter().map(|row| softmax(&[row[0] + bc[0], row[1] + bc[1]])).collect();
    let moe = f.y(&switch_gate(f, 2).0);
    let y: M = (0..f.x.len())
        .map(|t| {
            (0..f.x[0].len()).map(|d| coefficients[t][0] * moe[t][d] + coefficients[t][1] * 0.5 * f.x[t][d]).collect()
        })
        .collect();
    let (s, t) = (softmaxes(&student), softmaxes(&teacher));
    let ce = -(0..3).map(|i| s[i][labels[i]].ln()).sum::<f64>() / 3.0;
    let kl = (0..3).map(|i| (0..4).map(|c| t[i][c] * (t[i][c] / s[i][c]).ln()).sum::<f64>()).sum::<f64>() / 3.0;
    let expected = json!({"coef": coefficients, "y": y, "ce": ce, "kl": kl, "loss_stage1": ce + kl, "loss_stage2": ce});
    ("C7.residual_mos", json!({"Wc": wc, "bc": bc, "student": student, "teacher": teacher, "labels": labels}), expected)
}

fn tutel(rng: &mut Rng, f: &Fixture) -> Case {
    let (t, e, k, cf) = (f.z.len(), f.experts(), 2, [0.5, 1.0, 2.0][rng.below(3)]);
    let (p, chosen) = (f.p(), all_best(&f.z, k));
    let order: Vec<usize> = (0..t).collect();
    let locations = places(&chosen, e, &order, k);
    let top: Vec<f64> = p.iter().map(|row| row.iter().copied().fold(0.0, f64::max)).collect();
    let slots = |factor: f64| k * (factor * t.div_ceil(e) as f64) as usize;
    let capacity = slots(cf);
    let most = counts(&chosen, e).into_iter().max().unwrap();
    let dropped: Vec<[usize; 2]> =
        (0..t).flat_map(|t| (0..k).map(move |j| [t, j])).filter(|p| locations[p[0]][p[1]] >= capacity).collect();
    let gates: M = (0..t)
        .map(|t| {
            let total: f64 = chosen[t].iter().map(|&e| p[t][e]).sum();
            chosen[t].iter().map(|&e| p[t][e] / total).collect()
        })
        .collect();
    let expected = json!({"topk": chosen, "locations": locations, "locations_bpr": places(&chosen, e, &descending(&top), k),
        "gates": gates, "capacity": capacity, "dropped_pairs": dropped, "capacity_dynamic": most,
        "capacity_dynamic_capped_0_5": most.min(slots(0.5))});
    ("C8.tutel", json!({"k": k, "cf": cf}), expected)
}

fn v_moe(rng: &mut Rng, f: &Fixture) -> Case {
    let (t, e, capacity) = (f.z.len(), f.experts(), 2);
    let (eps, p, chosen) = (rng.matrix(t, e, 2.0), f.p(), all_best(&f.z, 2));
    let keep = |order: &[usize]| {
        let place = places(&chosen, e, order, 2);
        let mut g = zeros(t, e);
        for t in 0..t {
            (0..2).filter(|j| place[t][*j] < capacity).for_each(|j| g[t][chosen[t][j]] = p[t][chosen[t][j]]);
        }
        g
    };
    let max: Vec<f64> = (0..t).map(|t| p[t][chosen[t][0]]).collect();
    let sum: Vec<f64> = (0..t).map(|t| p[t][chosen[t][0]] + p[t][chosen[t][1]]).collect();
    let noisy: M = (0..t).map(|t| (0..e).map(|i| f.z[t][i] + eps[t][i] / e as f64).collect()).collect();
    let load: Vec<f64> = (0..e)
        .map(|i| {
            let of = |t: usize| 1.0 - phi((noisy[t][best(&noisy[t], 2)[1]] - f.z[t][i]) * e as f64);
            (0..t).map(of).sum::<f64>() / t as f64
        })
        .collect();
    let in_order: Vec<usize> = (0..t).collect();
    let expected = json!({"vanilla": keep(&in_order), "order_max": descending(&max), "bpr_max": keep(&descending(&max)),
        "order_sum": descending(&sum), "bpr_sum": keep(&descending(&sum)), "noisy_prob": softmaxes(&noisy),
        "importance_loss": cv2(&column_sums(&p)), "load_loss": cv2(&load)});
    ("C9.vmoe_bpr", json!({"C": capacity, "eps": eps}), expected)
}

fn aggregation(rng: &mut Rng) -> Case {
    let (a, b, x) = (rng.matrix(2, 3, 1.0), rng.matrix(3, 3, 1.0), rng.matrix(4, 3, 1.0));
    let (da, db) = (rng.list(4, 1.0), rng.list(4, 1.0));
    let gate: M = a.iter().chain(&b).cloned().collect();
    let logits: M = x.iter().map(|x| gate.iter().map(|g| dot(g, x)).collect()).collect();
    let dense: Vec<f64> = da.iter().zip(&db).map(|(a, b)| (a + b) / 2.0).collect();
    let inputs = json!({"gate_a": a, "gate_b": b, "dense_a": da, "dense_b": db, "x": x});
    ("C10.aoe", inputs, json!({"gate": gate, "logits": logits, "dense": dense}))
}

fn switch(rng: &mut Rng, f: &Fixture) -> Case {
    let (t, width) = (f.z.len(), f.x[0].len());
    let jitter: M = rng.matrix(t, width, 0.01).into_iter().map(|r| r.into_iter().map(|v| 1.0 + v).collect()).collect();
    let (wr, p, chosen) = (rng.matrix(width, f.experts(), 1.0), f.p(), all_best(&f.z, 1));
    let (g, dropped) = switch_gate(f, 2);
    let y = f.y(&g);
    let jittered: M = (0..t).map(|t| (0..width).map(|d| f.x[t][d] * jitter[t][d]).collect()).collect();
    let expected = json!({
        "combine": g, "dropped": dropped, "y": y, "y_with_residual": plus(&y, &f.x, |_| 1.0),
        "f": fractions(&chosen, f.experts()), "P": column_means(&p), "aux": balance(&chosen, &p, 1),
        "daux_dZ": differences(&f.z, |z| balance(&chosen, &softmaxes(z), 1)),
        "logits_jittered": times(&jittered, &wr), "logits_clean": times(&f.x, &wr),
    });
    ("C2.switch", json!({"C": 2, "jitter": jitter, "Wr": wr}), expected)
}

fn mixtral(f: &Fixture) -> Case {
    let (k, p) = (3, f.p());
    let chosen = all_best(&f.z, k);
    let g = normalised(&at_chosen(&p, &chosen));
    let weights: M =
        chosen.iter().zip(&f.z).map(|(c, z)| softmax(&c.iter().map(|&e| z[e]).collect::<Vec<_>>())).collect();
    let b = balance(&chosen, &p, k);
    let expected = json!({"topk": chosen, "weights": weights, "combine": g, "y": f.y(&g), "hf_balance": b * k as f64, "k_normalised_balance": b});
    ("E1.mixtral", json!({"k": k}), expected)
}

fn dropless(rng: &mut Rng, f: &Fixture) -> Case {
    let (k, block) = (2, 1 + rng.below(5));
    let pairs: Vec<usize> = all_best(&f.z, k).concat();
    let (mut sorted, mut per, mut padded, mut row) = (Vec::new(), Vec::new(), Vec::new(), vec![0; pairs.len()]);
    let (mut bins, mut padded_bins) = (Vec::new(), Vec::new());
    for e in 0..f.experts() {
        let own: Vec<usize> = (0..pairs.len()).filter(|p| pairs[*p] == e).collect();
        let start: usize = padded.iter().sum();
        own.iter().enumerate().for_each(|(i, &p)| row[p] = start + i);
        per.push(own.len());
        padded.push(own.len().div_ceil(block) * block);
        sorted.extend(own);
        bins.push(per.iter().sum::<usize>());
        padded_bins.push(padded.iter().sum::<usize>());
    }
    let expected = json!({"pair_expert": pairs, "sorted_pairs": sorted, "tokens_per_expert": per, "bins": bins,
        "padded_tokens_per_expert": padded, "padded_bins": padded_bins, "padded_row_of_pair": row, "total_rows": padded_bins.last()});
    ("E2.dropless", json!({"k": k, "block": block}), expected)
}

fn olmoe(f: &Fixture) -> Case {
    let (k, p) = (3, f.p());
    let chosen = all_best(&f.z, k);
    let z = f.z.iter().map(|row| lse(row).powi(2)).sum::<f64>() / f.z.len() as f64;
    let expected =
        json!({"lbl": 0.01 * balance(&chosen, &p, k), "zloss": 0.001 * z, "y": f.y(&at_chosen(&p, &chosen))});
    ("E14.olmoe", json!({"k": k}), expected)
}
