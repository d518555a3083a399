//! Sections D and E: expert choice, Soft MoE, ReLU, merging, Mixture of Tokens, block-causal slots; DeepSeek, global batch,
//! shared gate, hash, BASE, Sinkhorn, cosine, MoE++, heterogeneous, MLP gate.

use super::plain::*;
use super::token_choice::Fixture;
use serde_json::{Value, json};

type Case = (&'static str, Value, Value);

pub fn cases(rng: &mut Rng, f: &Fixture) -> Vec<Case> {
    let mut out =
        vec![expert_choice(f), soft_moe(rng), identity(rng), relu(rng, f), merging(rng), mixture_of_tokens(rng)];
    out.extend([block_causal(rng), deepseek_moe(f), deepseek_v3(rng), global_batch(f), shared(rng, f), hash(rng)]);
    out.extend([base(rng), sinkhorn(rng), cosine(rng), moe_plus_plus(rng, f), heterogeneous(rng, f), mlp_gate(rng)]);
    out
}

/// KL-Dykstra as the specification writes it: rows, columns with memory, entries with memory, on logarithms; `[E, T]`.
fn capped(p: &M, k: f64, b: f64, lam: f64, iterations: usize) -> M {
    let mut l: M = transposed(p).iter().map(|row| row.iter().map(|s| s / lam).collect()).collect();
    let (e, t) = (l.len(), l[0].len());
    let (mut q2, mut q3) = (zeros(e, t), zeros(e, t));
    let stable = |v: &[f64]| {
        let top = v.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        top + lse(&v.iter().map(|x| x - top).collect::<Vec<_>>())
    };
    for _ in 0..iterations {
        for row in &mut l {
            let shift = stable(row) - k.ln();
            row.iter_mut().for_each(|v| *v -= shift);
        }
        for t in 0..t {
            let y: Vec<f64> = (0..e).map(|i| l[i][t] + q2[i][t]).collect();
            let over = (stable(&y) - b.ln()).max(0.0);
            for i in 0..e {
                l[i][t] = y[i] - over;
                q2[i][t] = over;
            }
        }
        for i in 0..e {
            for t in 0..t {
                let y = l[i][t] + q3[i][t];
                l[i][t] = y.min(0.0);
                q3[i][t] = y - l[i][t];
            }
        }
    }
    l.iter().map(|row| row.iter().map(|v| v.exp()).collect()).collect()
}

fn expert_choice(f: &Fixture) -> Case {
    let (p, t, k, b) = (f.p(), f.z.len(), 3, 2);
    let (lam, iterations) = (0.05, 100);
    let index = all_best(&transposed(&p), k);
    let chosen: Vec<Vec<usize>> =
        (0..t).map(|t| (0..f.experts()).filter(|e| index[*e].contains(&t)).collect()).collect();
    let g = at_chosen(&p, &chosen);
    let per_token =
        |index: &[Vec<usize>]| (0..t).map(|t| index.iter().flatten().filter(|u| **u == t).count()).collect::<Vec<_>>();
    let a = capped(&p, k as f64, b as f64, lam, iterations);
    let (fast, slow) = (capped(&p, 1.0, 1.0, 1e-3, 100), capped(&p, 1.0, 1.0, 0.02, 200));
    let expected = json!({
        "index": index, "combine": g, "experts_per_token": per_token(&index), "y": f.y(&g),
        "A_capped": a, "index_capped": all_best(&a, k), "experts_per_token_capped": per_token(&all_best(&a, k)),
        "A_b1_k1_lam0_001_NOT_CONVERGED": fast, "index_b1_k1_lam0_001_violates_cap": all_best(&fast, 1).concat(),
        "A_b1_k1_lam0_02": slow, "index_b1_k1_lam0_02": all_best(&slow, 1).concat(),
        "index_b1_k1_uncapped": all_best(&transposed(&p), 1).concat(),
    });
    ("D1.expert_choice", json!({"k": k, "b": b, "lam": lam, "iters": iterations}), expected)
}

fn unit(v: &[f64], eps: f64) -> Vec<f64> {
    let norm = (dot(v, v) + eps).sqrt();
    v.iter().map(|x| x / norm).collect()
}

/// The Soft MoE cases' experts.
fn soft_expert(e: usize, x: &[f64]) -> Vec<f64> {
    x.iter().map(|v| if e.is_multiple_of(2) { 2.0 * v } else { v * v }).collect()
}

fn mixed(weights: &[f64], rows: &M) -> Vec<f64> {
    (0..rows[0].len()).map(|d| weights.iter().zip(rows).map(|(w, row)| w * row[d]).sum()).collect()
}

/// phi `[d][slots]`; `scale <x^, phi^>` `[T][slots]`.
fn soft_logits(x: &M, phi: &M, scale: f64, eps: f64) -> M {
    let columns: M = transposed(phi).iter().map(|c| unit(c, eps)).collect();
    x.iter().map(|x| columns.iter().map(|c| scale * dot(&unit(x, eps), c)).collect()).collect()
}

struct Soft {
    logits: M,
    dispatch: M,
    combine: M,
    slots: M,
    out: M,
    y: M,
}

fn soft(x: &M, phi: &M, p: usize, scale: f64, eps: f64, even_dispatch: bool, even_combine: bool) -> Soft {
    let logits = soft_logits(x, phi, scale, eps);
    let (t, s) = (x.len(), phi[0].len());
    let dispatch =
        if even_dispatch { vec![vec![1.0 / t as f64; s]; t] } else { transposed(&softmaxes(&transposed(&logits))) };
    let combine = if even_combine { vec![vec![1.0 / s as f64; s]; t] } else { softmaxes(&logits) };
    let slots: M = transposed(&dispatch).iter().map(|w| mixed(w, x)).collect();
    let out: M = slots.iter().enumerate().map(|(i, x)| soft_expert(i / p, x)).collect();
    let y = combine.iter().map(|w| mixed(w, &out)).collect();
    Soft { logits, dispatch, combine, slots, out, y }
}

/// `[T][n p]` as `[T][n][p]`.
fn nested(m: &M, p: usize) -> Vec<Vec<Vec<f64>>> {
    m.iter().map(|row| row.chunks(p).map(<[f64]>::to_vec).collect()).collect()
}

fn soft_moe(rng: &mut Rng) -> Case {
    let (t, d, n, p) = (4, 3, 2, 2);
    let (x, phi, scale, eps) = (rng.matrix(t, d, 1.5), rng.matrix(d, n * p, 1.0), 1.0 + rng.unit(), 1e-6);
    let run = |x: &M, scale: f64, a, b| soft(x, &phi, p, scale, eps, a, b);
    let total = |scale: f64| run(&x, scale, false, false).y.concat().iter().sum::<f64>();
    let s = run(&x, scale, false, false);
    let rotated: M = [vec![x[t - 1].clone()], x[..t - 1].to_vec()].concat();
    let by_expert = |m: &M| m.chunks(p).map(<[Vec<f64>]>::to_vec).collect::<Vec<_>>();
    let expected = json!({
        "logits": nested(&s.logits, p), "dispatch": nested(&s.dispatch, p), "combine": nested(&s.combine, p),
        "slots": by_expert(&s.slots), "expert_out": by_expert(&s.out), "y": s.y,
        "dsum_y_dscale": (total(scale + 1e-5) - total(scale - 1e-5)) / 2e-5,
        "y_uniform": run(&x, scale, true, true).y, "y_uniform_dispatch": run(&x, scale, true, false).y,
        "y_uniform_combine": run(&x, scale, false, true).y, "y_perm_check": run(&rotated, scale, false, false).y,
    });
    ("D2.soft_moe", json!({"X": x, "phi": nested(&phi, p), "scale": scale, "eps": eps}), expected)
}

fn identity(rng: &mut Rng) -> Case {
    let (n, p) = (1 + rng.below(3), 1 + rng.below(3));
    let m = n * p + rng.below(4);
    let slot: Vec<usize> = (0..m).map(|t| t % (n * p)).collect();
    let expert: Vec<usize> = slot.iter().map(|s| s / p).collect();
    ("D2.identity_map", json!({"m": m, "n": n, "p": p}), json!({"slot_of_token": slot, "expert_of_token": expert}))
}

fn relu(rng: &mut Rng, f: &Fixture) -> Case {
    let (t, e, k) = (f.z.len(), f.experts(), 2);
    let logits = rng.matrix(t, e, 2.0);
    let gates: M = logits.iter().map(|row| row.iter().map(|z| z.max(0.0)).collect()).collect();
    let active: Vec<usize> = logits.iter().map(|row| row.iter().filter(|z| **z > 0.0).count()).collect();
    let fraction: Vec<f64> =
        (0..e).map(|i| e as f64 / (k * t) as f64 * logits.iter().filter(|row| row[i] > 0.0).count() as f64).collect();
    let penalty =
        |z: &M| z.iter().map(|row| (0..e).map(|i| fraction[i] * row[i].max(0.0)).sum::<f64>()).sum::<f64>() / t as f64;
    let (mut lambda, alpha) = (1e-8, 1.1 + rng.unit() / 4.0);
    let target = 1.0 - k as f64 / e as f64;
    let sparsities: Vec<f64> = (0..6).map(|i| if i == 3 { target } else { rng.unit() }).collect();
    let path: Vec<f64> = sparsities
        .iter()
        .map(|s| {
            if *s < target {
                lambda *= alpha;
            } else if *s > target {
                lambda /= alpha;
            }
            lambda * 1e8
        })
        .collect();
    let sparsity = 1.0 - active.iter().sum::<usize>() as f64 / (t * e) as f64;
    let expected = json!({"gates": gates, "active": active, "sparsity": sparsity, "f": fraction, "L_reg": penalty(&logits),
        "dL_dlogits": differences(&logits, penalty), "lambda_1e8": path, "y": f.y(&gates)});
    ("D3.remoe", json!({"logits": logits, "k": k, "lambda0": 1e-8, "alpha": alpha, "sparsities": sparsities}), expected)
}

fn merging(rng: &mut Rng) -> Case {
    let (t, d, e, seg) = (5, 2, 3, 2);
    let (x, router) = (rng.matrix(t, d, 1.5), rng.matrix(d, e, 1.0));
    let w: Vec<M> = (0..e).map(|_| rng.matrix(d, d, 1.0)).collect();
    let weights_of = |rows: &[Vec<f64>]| softmax(&times(&vec![column_means(&rows.to_vec())], &router)[0]);
    let apply = |weights: &[f64], x: &[f64]| -> Vec<f64> {
        let row = |i: usize| -> Vec<f64> { (0..d).map(|j| (0..e).map(|k| weights[k] * w[k][i][j]).sum()).collect() };
        (0..d).map(|i| dot(&row(i), x).max(0.0)).collect()
    };
    let own: M = x.chunks(seg).map(weights_of).collect();
    let used: M = (0..own.len()).map(|s| own[s.max(1) - 1].clone()).collect();
    let smear = weights_of(&x);
    let lory: M = (0..t).map(|t| apply(&used[t / seg], &x[t])).collect();
    let merged: M = x.iter().map(|x| apply(&smear, x)).collect();
    let expected =
        json!({"seg_weights": own, "used_weights": used, "y_lory": lory, "smear_weights": smear, "y_smear": merged});
    ("D4.lory_smear", json!({"X": x, "W": w, "router": router, "seg": seg}), expected)
}

fn mixture_of_tokens(rng: &mut Rng) -> Case {
    let (g, positions, d, e) = (3, 2, 2, 3);
    let x: Vec<M> = (0..g).map(|_| rng.matrix(positions, d, 1.5)).collect();
    let (controller, scale, temperature) = (rng.matrix(d, e, 1.0), rng.list(e, 2.0), 0.5 + rng.unit());
    let weights_at = |group: &M| -> M {
        let logits = times(group, &controller);
        let per_expert: M = transposed(&logits)
            .iter()
            .map(|c| softmax(&c.iter().map(|z| z / temperature).collect::<Vec<_>>()))
            .collect();
        transposed(&per_expert)
    };
    let layer = |group: &M| -> (M, M) {
        let w = weights_at(group);
        let input: M = transposed(&w).iter().map(|w| mixed(w, group)).collect();
        let y =
            w.iter().map(|w| (0..d).map(|j| (0..e).map(|i| w[i] * scale[i] * input[i][j]).sum()).collect()).collect();
        (w, y)
    };
    let groups: Vec<(M, M)> = (0..positions).map(|p| layer(&(0..g).map(|s| x[s][p].clone()).collect())).collect();
    let y: Vec<M> = (0..g).map(|s| (0..positions).map(|p| groups[p].1[s].clone()).collect()).collect();
    let alone: Vec<M> =
        x.iter().map(|s| s.iter().map(|row| layer(&vec![row.clone()]).1[0].clone()).collect()).collect();
    let weights: Vec<&M> = groups.iter().map(|g| &g.0).collect();
    let expected = json!({"weights_pos_token_expert": weights, "y": y, "y_group_size_1": alone});
    ("D5.mot", json!({"X": x, "controller": controller, "scale": scale, "temperature": temperature}), expected)
}

fn block_causal(rng: &mut Rng) -> Case {
    let (t, d, n, p, block) = (7, 2, 2, 2, 2);
    let (x, phi, scale) = (rng.matrix(t, d, 1.5), rng.matrix(d, n * p, 1.0), 1.0 + rng.unit());
    let logits = soft_logits(&x, &phi, scale, 1e-6);
    let (mut y, mut all_slots) = (zeros(block, d), Vec::new());
    for start in (block..t).step_by(block) {
        let weights = softmaxes(&transposed(&logits[..start].to_vec()));
        let slots: M = weights.iter().map(|w| mixed(w, &x[..start].to_vec())).collect();
        let out: M = slots.iter().enumerate().map(|(s, x)| soft_expert(s / p, x)).collect();
        y.extend(logits[start..(start + block).min(t)].iter().map(|z| mixed(&softmax(z), &out)));
        all_slots.push(slots);
    }
    let inputs = json!({"X": x, "phi": nested(&phi, p), "block": block, "scale": scale});
    ("D6.block_causal_soft", inputs, json!({"y": y, "slots": all_slots}))
}

fn deepseek_moe(f: &Fixture) -> Case {
    let (k, e, p) = (2, f.experts(), f.p());
    let chosen = all_best(&f.z, k);
    let g = at_chosen(&p, &chosen);
    let scaled: Vec<f64> = fractions(&chosen, e).iter().map(|v| v * e as f64 / k as f64).collect();
    let mean = column_means(&p);
    let devices = [vec![0], (1..e).collect::<Vec<_>>()];
    let device = |d: &Vec<usize>| {
        let f = d.iter().map(|&i| scaled[i]).sum::<f64>() / d.len() as f64;
        f * d.iter().map(|&i| mean[i]).sum::<f64>()
    };
    let expected = json!({"routed_gate": g, "y": plus(&f.y(&g), &f.x, |_| 0.5), "f": scaled, "P": mean,
        "L_expert": dot(&scaled, &mean), "L_device": devices.iter().map(device).sum::<f64>()});
    ("E3.deepseekmoe", json!({"k": k, "devices": devices}), expected)
}

fn deepseek_v3(rng: &mut Rng) -> Case {
    let (t, e, groups, keep, k, scale, u) = (6, 8, 4, 2, 3, 1.7, 0.01);
    let size = e / groups;
    let (logits, bias) = (rng.matrix(t, e, 2.0), rng.list(e, 0.3));
    let negative: Vec<f64> = rng.list(e, 0.3).iter().map(|b| b - 1.5).collect();
    let s: M = logits.iter().map(|row| row.iter().map(|&z| sigmoid(z)).collect()).collect();
    let biased = |b: &[f64]| -> M { s.iter().map(|row| row.iter().zip(b).map(|(s, b)| s + b).collect()).collect() };
    let group_scores = |c: &M| -> M {
        let of = |g: &[f64]| best(g, 2).iter().map(|&i| g[i]).sum::<f64>();
        c.iter().map(|row| row.chunks(size).map(of).collect()).collect()
    };
    let masked = |c: &M, with: f64| -> M {
        let kept = all_best(&group_scores(c), keep);
        (0..t).map(|t| (0..e).map(|i| if kept[t].contains(&(i / size)) { c[t][i] } else { with }).collect()).collect()
    };
    let weights = |chosen: &[Vec<usize>]| -> M {
        let row = |(s, c): (&Vec<f64>, &Vec<usize>)| {
            let total: f64 = c.iter().map(|&e| s[e]).sum();
            c.iter().map(|&e| s[e] / total * scale).collect()
        };
        s.iter().zip(chosen).map(row).collect()
    };
    let c = biased(&bias);
    let index = all_best(&masked(&c, f64::NEG_INFINITY), k);
    let free = all_best(&s, k);
    let load = counts(&index, e);
    let mean = load.iter().sum::<usize>() as f64 / e as f64;
    let step = |n: usize| {
        if (n as f64) < mean {
            u
        } else if n as f64 > mean {
            -u
        } else {
            0.0
        }
    };
    let bias_new: Vec<f64> = bias.iter().zip(&load).map(|(b, n)| b + step(*n)).collect();
    let (seq_f, seq_p): (M, M) = (0..t / 2)
        .map(|q| {
            let rows = 2 * q..2 * q + 2;
            let f = fractions(&free[rows.clone()], e).iter().map(|v| v * e as f64 / k as f64).collect::<Vec<_>>();
            (f, column_means(&normalised(&s[rows].to_vec())))
        })
        .unzip();
    let loss: Vec<f64> = seq_f.iter().zip(&seq_p).map(|(f, p)| dot(f, p)).collect();
    let below = biased(&negative);
    let expected = json!({
        "scores": s, "group_scores": group_scores(&c), "groups_kept": all_best(&group_scores(&c), keep), "index": index,
        "weights": weights(&index), "index_no_groups_no_bias": free, "weights_no_groups_no_bias": weights(&free),
        "load": load, "bias_new": bias_new, "seq_f": seq_f, "seq_P": seq_p, "seq_loss": loss,
        "seq_loss_mean": loss.iter().sum::<f64>() / loss.len() as f64,
        "index_negbias_correct": all_best(&masked(&below, f64::NEG_INFINITY), k),
        "index_negbias_zero_mask": all_best(&masked(&below, 0.0), k),
    });
    let inputs = json!({"logits": logits, "bias": bias, "groups": groups, "M": keep, "k": k, "scale": scale, "u": u, "negative_bias": negative});
    ("E4.deepseek_v3", inputs, expected)
}

fn global_batch(f: &Fixture) -> Case {
    let (k, e, t) = (2, f.experts(), f.z.len());
    let split = [1, 2, t - 3];
    let chosen = all_best(&f.z, k);
    let global = fractions(&chosen, e);
    let (mut micro, mut with_global, mut at) = (Vec::new(), Vec::new(), 0);
    for n in split {
        let p = softmaxes(&f.z[at..at + n].to_vec());
        micro.push(balance(&chosen[at..at + n], &p, k));
        with_global.push(e as f64 / k as f64 * dot(&global, &column_means(&p)));
        at += n;
    }
    let weighted = |v: &[f64]| v.iter().zip(split).map(|(v, n)| v * n as f64).sum::<f64>() / t as f64;
    let expected = json!({"micro": micro, "micro_mean_tokenweighted": weighted(&micro),
        "f_global": global.iter().map(|v| v / k as f64).collect::<Vec<_>>(), "global_per_micro": with_global,
        "global_tokenweighted": weighted(&with_global), "merged": balance(&chosen, &f.p(), k)});
    ("E5.global_batch_lbl", json!({"split": split, "k": k}), expected)
}

fn shared(rng: &mut Rng, f: &Fixture) -> Case {
    let (w, k) = (rng.list(f.x[0].len(), 1.0), 2);
    let gate: Vec<f64> = f.x.iter().map(|x| sigmoid(dot(x, &w))).collect();
    let raw = at_chosen(&f.p(), &all_best(&f.z, k));
    let y = |g: &M| plus(&f.y(g), &f.x, |t| 0.5 * gate[t]);
    let expected = json!({"gate": gate, "y_norm_false": y(&raw), "y_norm_true": y(&normalised(&raw))});
    ("E6.qwen_shared", json!({"w": w, "k": k}), expected)
}

fn hash(rng: &mut Rng) -> Case {
    let (ids, experts): (Vec<usize>, usize) = ((0..6).map(|_| rng.below(1000)).collect(), 1 + rng.below(7));
    let frequency: Vec<f64> = (0..9).map(|_| rng.below(40) as f64).collect();
    let buckets = 1 + rng.below(4);
    let (mut table, mut load) = (vec![0; 9], vec![0.0; buckets]);
    for id in descending(&frequency) {
        let lightest = best(&load.iter().map(|l| -l).collect::<Vec<f64>>(), 1)[0];
        table[id] = lightest;
        load[lightest] += frequency[id];
    }
    let modulo: Vec<usize> = ids.iter().map(|id| id % experts).collect();
    let expected = json!({"modulo": modulo, "balanced_bucket": table, "bucket_load": load});
    ("E7.hash", json!({"token_ids": ids, "E": experts, "freq": frequency, "buckets": buckets}), expected)
}

fn base(rng: &mut Rng) -> Case {
    let (t, e, d) = (6usize, 3usize, 2);
    let (a, x) = (rng.matrix(t, e, 2.0), rng.matrix(t, d, 1.0));
    let mut top: Option<(f64, Vec<usize>)> = None;
    for code in 0..e.pow(t as u32) {
        let assigned: Vec<usize> = (0..t).map(|i| code / e.pow(i as u32) % e).collect();
        let total: f64 = (0..t).map(|i| a[i][assigned[i]]).sum();
        let even = (0..e).all(|e| assigned.iter().filter(|x| **x == e).count() == 2);
        if even && top.as_ref().is_none_or(|(b, _)| total > *b) {
            top = Some((total, assigned));
        }
    }
    let (total, assigned) = top.unwrap();
    let gate: Vec<f64> = (0..t).map(|i| sigmoid(a[i][assigned[i]])).collect();
    let y: M = (0..t)
        .map(|i| x[i].iter().map(|v| gate[i] * (assigned[i] + 1) as f64 * v + (1.0 - gate[i]) * v).collect())
        .collect();
    let greedy: Vec<usize> = a.iter().map(|row| best(row, 1)[0]).collect();
    (
        "E8.base",
        json!({"affinity": a, "X": x}),
        json!({"assign": assigned, "total": total, "gate": gate, "y": y, "greedy": greedy}),
    )
}

fn sinkhorn(rng: &mut Rng) -> Case {
    let (t, e) = (6, 3);
    let z = rng.matrix(t, e, 1.5);
    let k: M = z.iter().map(|row| row.iter().map(|v| v.exp()).collect()).collect();
    let (mut d0, mut d1, mut iterations) = (vec![1.0; t], vec![1.0; e], 0);
    loop {
        iterations += 1;
        d0.iter_mut().zip(&k).for_each(|(d, row)| *d = 1.0 / t as f64 / dot(row, &d1));
        let next: Vec<f64> = transposed(&k).iter().map(|column| 1.0 / e as f64 / dot(column, &d0)).collect();
        let moved = next.iter().zip(&d1).map(|(a, b)| (a - b).abs()).sum::<f64>() / e as f64;
        d1 = next;
        if moved <= 1e-4 {
            break;
        }
    }
    let plan: M = (0..t).map(|i| (0..e).map(|j| d0[i] * k[i][j] * d1[j]).collect()).collect();
    let route: Vec<usize> = plan.iter().map(|row| best(row, 1)[0]).collect();
    let expected = json!({"plan": plan, "iterations": iterations, "row_sums": plan.iter().map(|r| r.iter().sum::<f64>()).collect::<Vec<_>>(),
        "col_sums": column_sums(&plan), "gate": (0..t).map(|i| sigmoid(z[i][route[i]])).collect::<Vec<_>>(), "route": route});
    ("E9.sinkhorn", json!({"logits": z}), expected)
}

fn cosine(rng: &mut Rng) -> Case {
    let (x, w, e, tau) = (rng.matrix(5, 3, 1.0), rng.matrix(2, 3, 1.0), rng.matrix(4, 2, 1.0), 0.2 + rng.unit());
    let h = times(&x, &transposed(&w));
    let norm = |v: &[f64]| dot(v, v).sqrt();
    let cos: M = h.iter().map(|h| e.iter().map(|e| dot(h, e) / norm(h) / norm(e)).collect()).collect();
    let map =
        |m: &M, f: &dyn Fn(f64) -> f64| -> M { m.iter().map(|row| row.iter().map(|v| f(*v)).collect()).collect() };
    let gate = softmaxes(&map(&cos, &|s| s / tau));
    let chosen = all_best(&cos, 1);
    let torchscale: M = h.iter().map(|h| e.iter().map(|e| dot(h, e) / norm(e)).collect()).collect();
    let expected = json!({"cosine": cos, "softmax_gate": gate, "sigmoid_gate": map(&cos, &|s| sigmoid(s / 0.07)),
        "torchscale_score": torchscale, "tutel_logits": map(&cos, &|s| 2.0 * s), "route": chosen.concat(),
        "balance_loss": balance(&chosen, &gate, 1)});
    ("E10.cosine", json!({"X": x, "W": w, "E": e, "tau": tau}), expected)
}

fn moe_plus_plus(rng: &mut Rng, f: &Fixture) -> Case {
    let (t, e, d) = (f.z.len(), f.experts(), f.x[0].len());
    let ffn = e - 3;
    let (wc, v, previous, wg) = (rng.matrix(2, d, 1.0), rng.list(d, 1.0), rng.matrix(t, e, 1.0), rng.matrix(e, e, 0.5));
    let (tau, gamma) = (0.5 + rng.unit() / 2.0, 1.0 + rng.unit());
    let (p, chosen) = (f.p(), all_best(&f.z, 2));
    let g = at_chosen(&p, &chosen);
    let alpha: M = f.x.iter().map(|x| softmax(&[dot(&wc[0], x), dot(&wc[1], x)])).collect();
    let out = |t: usize, i: usize| -> Vec<f64> {
        let x = &f.x[t];
        if i < ffn || i == ffn + 1 {
            x.clone()
        } else if i == ffn {
            (0..d).map(|j| alpha[t][0] * x[j] + alpha[t][1] * v[j]).collect()
        } else {
            vec![0.0; d]
        }
    };
    let y: M = (0..t).map(|t| (0..d).map(|j| (0..e).map(|i| g[t][i] * out(t, i)[j]).sum()).collect()).collect();
    let fraction = fractions(&chosen, e);
    let mean = column_means(&p);
    let loss: f64 = (0..e).map(|i| if i < ffn { 1.0 } else { tau } * fraction[i] * mean[i]).sum();
    let share = gamma * t as f64 / (tau * ffn as f64 + 3.0);
    let mut without = g.clone();
    without.iter_mut().for_each(|row| row[ffn + 2] = 0.0);
    let carried: M = (0..t).map(|t| (0..e).map(|i| f.z[t][i] + dot(&wg[i], &previous[t])).collect()).collect();
    let expected = json!({"alpha": alpha, "y": y, "logits_with_residual": carried, "L_b": loss, "cap_ffn": tau * share,
        "cap_zc": share, "reference_code_gates": normalised(&without)});
    ("E11.moepp", json!({"Wc": wc, "v": v, "prev_logits": previous, "Wg": wg, "tau": tau, "gamma": gamma}), expected)
}

fn heterogeneous(rng: &mut Rng, f: &Fixture) -> Case {
    let (e, t, p) = (f.experts(), f.z.len(), f.p());
    let h: Vec<f64> = (0..e).map(|_| 1.0 + rng.below(20) as f64).collect();
    let mass = 0.3 + 0.6 * rng.unit();
    let penalty = |chosen: &[Vec<usize>], h: &[f64]| {
        let (f, mean) = (fractions(chosen, e), column_means(&p));
        e as f64 * (0..e).map(|i| f[i] * h[i] * mean[i]).sum::<f64>()
    };
    let average = h.iter().sum::<f64>() / e as f64;
    let even: Vec<f64> = h.iter().map(|h| h / average).collect();
    let two = all_best(&f.z, 2);
    let prefix: Vec<Vec<usize>> = p
        .iter()
        .map(|row| {
            let mut set = Vec::new();
            for i in descending(row) {
                set.push(i);
                if set.iter().map(|&j| row[j]).sum::<f64>() >= mass {
                    break;
                }
            }
            set.sort_unstable();
            set
        })
        .collect();
    let entropy = -p.concat().iter().map(|p| p * p.ln()).sum::<f64>() / t as f64;
    let computed: f64 = two.iter().flatten().map(|&i| h[i]).sum();
    let expected = json!({"P_penalty_top2": penalty(&two, &h), "P_penalty_top2_normalised": penalty(&two, &even),
        "top_p_sets": prefix, "P_penalty_topp": penalty(&prefix, &h), "mean_entropy": entropy,
        "flops_ratio_top2": computed / (2.0 * t as f64 * average)});
    ("E12.hmoe", json!({"h": h, "p": mass}), expected)
}

fn mlp_gate(rng: &mut Rng) -> Case {
    let (x, w1, w2) = (rng.matrix(4, 2, 1.5), rng.matrix(2, 5, 1.0), rng.matrix(5, 3, 1.0));
    let act = |f: &dyn Fn(f64) -> f64| -> M {
        times(&times(&x, &w1).iter().map(|row| row.iter().map(|v| f(*v)).collect()).collect(), &w2)
    };
    let tanh = act(&f64::tanh);
    let expected = json!({"logits_tanh": tanh, "logits_relu": act(&|v| v.max(0.0)), "gates_tanh": softmaxes(&tanh)});
    ("E13.mlp_gate", json!({"X": x, "W1": w1, "W2": w2}), expected)
}
