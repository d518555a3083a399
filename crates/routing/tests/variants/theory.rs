//! Sections F, G and H: bounds of the balance loss, upcycling, pruning and merging, similarity-aware selection, propositions,
//! the batch sampler.

use super::plain::*;
use super::token_choice::Fixture;
use serde_json::{Map, Value, json};

type Case = (&'static str, Value, Value);

pub fn cases(rng: &mut Rng, f: &Fixture) -> Vec<Case> {
    let mut out = vec![lower_bound(rng), two_experts(rng), stop_gradient(rng), combine_norm(rng), upcycle(f)];
    out.extend([prune_and_merge(rng, f), similarity(rng, f), propositions(rng), sampler(rng)]);
    out
}

fn switch_loss(w: &M) -> f64 {
    balance(&all_best(w, 1), w, 1)
}

/// `z` decoys behind `live` winners in turn.
fn witness(n: usize, live: usize, eps: f64) -> M {
    let z = n - live;
    let share = 1.0 / (z + 1) as f64;
    let row = |t: usize| {
        (0..n)
            .map(|i| {
                if i == t {
                    share + eps
                } else if i >= live {
                    share - eps / z as f64
                } else {
                    0.0
                }
            })
            .collect()
    };
    (0..live).map(row).collect()
}

/// The least loss for n experts and T tokens: every split of the wins, every set around every winner.
fn least(n: usize, tokens: usize) -> f64 {
    fn splits(left: usize, experts: usize, most: usize) -> Vec<Vec<usize>> {
        if experts == 0 {
            return if left == 0 { vec![vec![]] } else { vec![] };
        }
        (0..=most.min(left))
            .flat_map(|c| splits(left - c, experts - 1, c).into_iter().map(move |r| [vec![c], r].concat()))
            .collect()
    }
    let value = |wins: &Vec<usize>| -> f64 {
        let mean = |set: usize| {
            let members: Vec<usize> = (0..n).filter(|j| set >> j & 1 == 1).map(|j| wins[j]).collect();
            members.iter().sum::<usize>() as f64 / members.len() as f64
        };
        let around = |e: usize| (1..1usize << n).filter(|s| s >> e & 1 == 1).map(mean).fold(f64::INFINITY, f64::min);
        n as f64 * (0..n).map(|e| wins[e] as f64 * around(e)).sum::<f64>() / (tokens * tokens) as f64
    };
    splits(tokens, n, tokens).iter().map(value).fold(f64::INFINITY, f64::min)
}

fn lower_bound(rng: &mut Rng) -> Case {
    let (eps, live) = (0.001 + 0.02 * rng.unit(), 2 + rng.below(4));
    let (a, b) = (0.5 - eps, 0.5 + eps);
    let seed = vec![vec![a, b, 0.0], vec![a, b, 0.0], vec![a, 0.0, b], vec![a, 0.0, b]];
    let rows = witness(7, live, eps);
    let object = |keys: &[String], value: &dyn Fn(usize) -> f64| -> Value {
        Value::Object(keys.iter().enumerate().map(|(i, k)| (k.clone(), json!(value(i)))).collect::<Map<_, _>>())
    };
    let ns = [1usize, 2, 3, 7, 20, 100];
    let limit = |n: usize| match n {
        1 => 1.0,
        2 => 0.875,
        _ => (0..n).map(|z| n as f64 / ((z + 1) * (n - z)) as f64).fold(f64::INFINITY, f64::min),
    };
    let pairs = [(1usize, 4usize), (2, 6), (3, 5), (5, 7), (6, 9)];
    let families = [(16usize, 4usize), (60, 4), (9, 3)];
    let family = |(n, k): (usize, usize)| {
        (0..=n - k).map(|z| (n * k) as f64 / ((k + z) * (n - z)) as f64).fold(f64::INFINITY, f64::min)
    };
    let names = |list: &[(usize, usize)]| list.iter().map(|(a, b)| format!("{a},{b}")).collect::<Vec<_>>();
    // With eps 0 the winner and the decoys tie and the lowest index, the winner's, wins.
    let expected = json!({
        "seed_value_eps": switch_loss(&seed), "seed_formula": 0.75 * (1.0 + 2.0 * eps), "witness_n7": rows,
        "L_witness_n7": switch_loss(&rows), "L_witness_n7_eps0": switch_loss(&witness(7, live, 0.0)),
        "limit_by_n": object(&ns.map(|n| n.to_string()), &|i| limit(ns[i])),
        "exact_nT": object(&names(&pairs), &|i| least(pairs[i].0, pairs[i].1)),
        "topk_family": object(&names(&families), &|i| family(families[i])),
    });
    ("F1.aux_lower_bound", json!({"eps": eps, "n7_live": live}), expected)
}

fn two_experts(rng: &mut Rng) -> Case {
    let w = softmaxes(&rng.matrix(5, 2, 2.0));
    ("F2.aux_n2", json!({"W": w}), json!({"L": switch_loss(&w), "limit": 0.875}))
}

fn stop_gradient(rng: &mut Rng) -> Case {
    let z = rng.matrix(4, 5, 2.0);
    let chosen = all_best(&z, 1);
    let loss = |z: &M| balance(&chosen, &softmaxes(z), 1);
    (
        "F3.aux_gradient",
        json!({"Z": z}),
        json!({"L": loss(&z), "f": fractions(&chosen, 5), "grad": differences(&z, loss)}),
    )
}

fn combine_norm(rng: &mut Rng) -> Case {
    let w: Vec<f64> = (0..4).map(|_| rng.unit()).collect();
    let total: f64 = w.iter().sum();
    let normalised: Vec<f64> = w.iter().map(|v| v / total).collect();
    (
        "G1.combine_norm",
        json!({"w": w}),
        json!({"normalised": normalised, "single": [1.0], "none": [0.0, 0.0, 0.0, 0.0]}),
    )
}

fn upcycle(f: &Fixture) -> Case {
    let (k, p, t) = (1, f.p(), f.z.len());
    let index = all_best(&transposed(&p), k);
    let chosen: Vec<Vec<usize>> =
        (0..t).map(|t| (0..f.experts()).filter(|e| index[*e].contains(&t)).collect()).collect();
    let g = at_chosen(&p, &chosen);
    let twice = vec![2.0; f.experts()];
    let unrouted: Vec<usize> = (0..t).filter(|t| chosen[*t].is_empty()).collect();
    let gain: Vec<f64> = g.iter().map(|row| row.iter().sum()).collect();
    let expected = json!({"y_raw": scaled(&g, &f.x, &twice), "y_norm": scaled(&normalised(&g), &f.x, &twice),
        "unrouted": unrouted, "max_err_norm_routed": 0.0, "rel_gain_raw": gain});
    ("G1.upcycle_init", json!({"k": k}), expected)
}

/// Every order of `0..n`.
fn permutations(n: usize) -> Vec<Vec<usize>> {
    if n == 0 {
        return vec![vec![]];
    }
    permutations(n - 1)
        .into_iter()
        .flat_map(|p| {
            (0..n).map(move |at| {
                let mut q = p.clone();
                q.insert(at, n - 1);
                q
            })
        })
        .collect()
}

fn prune_and_merge(rng: &mut Rng, f: &Fixture) -> Case {
    let (e, p) = (f.experts(), f.p());
    let (rows, usage) = (rng.matrix(5, 3, 2.0), (0..5).map(|_| rng.below(20) as f64).collect::<Vec<_>>());
    let l2: Vec<f64> = rows.iter().map(|r| dot(r, r).sqrt()).collect();
    let keep = |score: &[f64]| {
        let mut kept = best(score, 2);
        kept.sort_unstable();
        kept
    };
    let first = all_best(&f.z, 1).concat();
    let reap: Vec<f64> = (0..e)
        .map(|i| {
            let own: Vec<usize> = (0..f.z.len()).filter(|t| first[*t] == i).collect();
            let of = |t: &usize| p[*t][i] * f.scale[i].abs() * dot(&f.x[*t], &f.x[*t]).sqrt();
            if own.is_empty() { 0.0 } else { own.iter().map(of).sum::<f64>() / own.len() as f64 }
        })
        .collect();
    let (a, b) = (rng.matrix(4, 3, 1.0), rng.matrix(4, 3, 1.0));
    let match_of = |perm: &Vec<usize>| perm.iter().zip(&a).map(|(&j, a)| dot(a, &b[j])).sum::<f64>();
    let perm = permutations(4).into_iter().max_by(|x, y| match_of(x).total_cmp(&match_of(y))).unwrap();
    let aligned: M = perm.iter().map(|&j| b[j].clone()).collect();
    let blend = |b: &M| -> M {
        a.iter().zip(b).map(|(a, b)| a.iter().zip(b).map(|(x, y)| 0.75 * x + 0.25 * y).collect()).collect()
    };
    let expected = json!({"l2": l2, "l2_keep2": keep(&l2), "usage_keep2": keep(&usage), "soft_usage": column_sums(&p),
        "reap": reap, "perm": perm, "merged_W_in": blend(&aligned), "naive_merge_W_in": blend(&b)});
    ("G2.prune_merge", json!({"rows": rows, "usage": usage, "W_in_a": a, "W_in_b": b}), expected)
}

fn similarity(rng: &mut Rng, f: &Fixture) -> Case {
    let (t, e, capacity, p) = (f.z.len(), f.experts(), 1, f.p());
    let (prototypes, fuzzifier) = (rng.matrix(e, f.x[0].len(), 1.5), 1.5 + rng.unit());
    let first = all_best(&f.z, 1).concat();
    let cosine = |a: usize, b: usize| {
        let norms = dot(&f.x[a], &f.x[a]).sqrt() * dot(&f.x[b], &f.x[b]).sqrt();
        dot(&f.x[a], &f.x[b]) / norms
    };
    let mut kept: Vec<Vec<usize>> = Vec::new();
    for i in 0..e {
        let wanting: Vec<usize> = (0..t).filter(|t| first[*t] == i).collect();
        let mut own: Vec<usize> = Vec::new();
        while own.len() < capacity.min(wanting.len()) {
            let left: Vec<usize> = wanting.iter().copied().filter(|t| !own.contains(t)).collect();
            let score = |t: &usize| {
                let near = own.iter().map(|s| cosine(*t, *s)).fold(-1.0, f64::max);
                p[*t][i] * (1.0 - near) / 2.0
            };
            own.push(left[best(&left.iter().map(score).collect::<Vec<_>>(), 1)[0]]);
        }
        own.sort_unstable();
        kept.push(own);
    }
    let lost: Vec<usize> = (0..t).filter(|t| !kept[first[*t]].contains(t)).collect();
    let mut rematched = kept.clone();
    let mut moved = Map::new();
    for i in descending(&lost.iter().map(|&t| p[t][first[t]]).collect::<Vec<_>>()) {
        let t = lost[i];
        if let Some(next) = descending(&p[t]).into_iter().find(|e| *e != first[t] && rematched[*e].len() < capacity) {
            rematched[next].push(t);
            moved.insert(t.to_string(), json!(next));
        }
    }
    rematched.iter_mut().for_each(|list| list.sort_unstable());
    let named = |lists: &[Vec<usize>]| {
        Value::Object(lists.iter().enumerate().map(|(e, l)| (e.to_string(), json!(l))).collect::<Map<_, _>>())
    };
    let membership: M =
        f.x.iter()
            .map(|x| {
                let power = |c: &Vec<f64>| {
                    let d2: f64 = x.iter().zip(c).map(|(a, b)| (a - b) * (a - b)).sum();
                    (d2 + 1e-9).powf(-1.0 / (fuzzifier - 1.0))
                };
                let u: Vec<f64> = prototypes.iter().map(power).collect();
                u.iter().map(|v| v / u.iter().sum::<f64>()).collect()
            })
            .collect();
    let expected = json!({"kept_drop": named(&kept), "lost": lost, "kept_rematch": named(&rematched), "redirected": moved,
        "fuzzy_membership": membership});
    ("H1.sats", json!({"C": capacity, "prototypes": prototypes, "fuzzifier": fuzzifier}), expected)
}

struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

const CONNECTIVES: [&str; 6] = ["AND", "OR", "XOR", "IMPLIES", "IFF", "NOR"];

fn holds(connective: &str, a: bool, b: bool) -> bool {
    match connective {
        "AND" => a & b,
        "OR" => a | b,
        "XOR" => a ^ b,
        "IMPLIES" => !a | b,
        "IFF" => !(a ^ b),
        _ => !(a | b),
    }
}

fn atom(name: &str, count: u64) -> String {
    let word = ["zero", "one", "two", "three", "four", "five"][count as usize];
    format!("{name} has exactly {word} natural satellite{}", if count == 1 { "" } else { "s" })
}

fn proposition(r: &mut SplitMix, facts: &[(&str, u64)]) -> Value {
    let most = facts.iter().map(|f| f.1).max().unwrap().max(3);
    let connective = CONNECTIVES[r.below(6)];
    let target = r.below(2) == 1;
    let mut fitting = Vec::new();
    for a in [false, true] {
        for b in [false, true] {
            if holds(connective, a, b) == target {
                fitting.push([a, b]);
            }
        }
    }
    let truths = fitting[r.below(fitting.len())];
    let first = r.below(facts.len());
    let others: Vec<usize> = (0..facts.len()).filter(|s| *s != first).collect();
    let subjects = [first, others[r.below(others.len())]];
    let counts: Vec<u64> = (0..2)
        .map(|i| {
            let fact = facts[subjects[i]].1;
            let wrong: Vec<u64> = (0..=most).filter(|c| *c != fact).collect();
            if truths[i] { fact } else { wrong[r.below(wrong.len())] }
        })
        .collect();
    let modality = ["plain", "negated", "belief", "possibly"][r.below(4)];
    let (a, b) = (atom(facts[subjects[0]].0, counts[0]), atom(facts[subjects[1]].0, counts[1]));
    let body = match connective {
        "AND" | "OR" => format!("{a} {connective} {b}"),
        "XOR" => format!("either {a} or {b}, but not both"),
        "IMPLIES" => format!("if {a}, then {b}"),
        "IFF" => format!("{a} if and only if {b}"),
        _ => format!("neither {a} nor {b}"),
    };
    let (prefix, label) = match (modality, target) {
        ("plain", _) => ("", if target { "true" } else { "false" }),
        ("negated", _) => ("It is not the case that: ", if target { "false" } else { "true" }),
        ("belief", _) => ("Someone believes that: ", "undetermined"),
        (_, true) => ("It is possible that: ", "true"),
        _ => ("It is possible that: ", "undetermined"),
    };
    let atoms: Vec<Value> = (0..2).map(|i| json!([facts[subjects[i]].0, counts[i], truths[i]])).collect();
    json!({"text": format!("{prefix}{body}."), "connective": connective, "modality": modality, "atoms": atoms,
        "body_truth": target, "label": label})
}

fn propositions(rng: &mut Rng) -> Case {
    // Keys in alphabetical order, since the test's own JSON sorts them.
    let facts: [(&str, u64); 4] =
        [("Earth", 1 + rng.below(3) as u64), ("Mars", rng.below(4) as u64), ("Neptune", 4), ("Venus", 0)];
    let seed = rng.below(1000);
    let mut r = SplitMix(seed as u64);
    let first: Vec<Value> = (0..8).map(|_| proposition(&mut r, &facts)).collect();
    let mut s = SplitMix(seed as u64);
    let raw: Vec<String> = (0..3).map(|_| s.next().to_string()).collect();
    let table = |c: &str| [[false, false], [false, true], [true, false], [true, true]].map(|[a, b]| holds(c, a, b));
    let tables: Map<String, Value> = CONNECTIVES.iter().map(|c| (c.to_string(), json!(table(c)))).collect();
    let mut seven = SplitMix(7);
    let labels: Vec<Value> = (0..1000).map(|_| proposition(&mut seven, &facts)["label"].clone()).collect();
    let count = |l: &str| labels.iter().filter(|x| *x == l).count();
    let (a, b) = (facts[0].1 == 2, facts[1].1 == 1);
    let expected = json!({
        "first8": first, "splitmix_first3": raw, "truth_tables": tables,
        "canonical": {"text": format!("{} OR {}.", atom("Earth", 2), atom("Mars", 1)), "atoms": [a, b], "label": if a || b { "true" } else { "false" }},
        // Six connectives, ordered pairs of different subjects, claims 0 to 4 each.
        "distinct_bodies": 6 * 4 * 3 * 5 * 5,
        "labels_in_1000": {"true": count("true"), "false": count("false"), "undetermined": count("undetermined")},
    });
    let facts: Map<String, Value> = facts.iter().map(|(n, c)| (n.to_string(), json!(c))).collect();
    ("H2.logic_dataset", json!({"seed": seed, "facts": facts}), expected)
}

fn sampler(rng: &mut Rng) -> Case {
    let (sizes, batch): (Vec<usize>, usize) = ((0..4).map(|_| 1 + rng.below(7)).collect(), 3);
    let total: usize = sizes.iter().sum();
    let (mut drawn, mut batches) = (vec![0usize; 4], vec![Vec::<usize>::new()]);
    for n in 0..total {
        if batches.last().unwrap().len() == batch {
            batches.push(Vec::new());
        }
        let current = batches.last().unwrap();
        // Deficits as whole numbers over `total`, so that ties are ties.
        let deficit = |s: usize| (sizes[s] * (n + 1)) as i64 - (drawn[s] * total) as i64;
        let held = |s: usize| current.iter().filter(|x| **x == s).count();
        let left = (0..4).filter(|s| drawn[*s] < sizes[*s]);
        let next = left.min_by_key(|&s| (-deficit(s), held(s), s)).unwrap();
        drawn[next] += 1;
        batches.last_mut().unwrap().push(next);
    }
    let share: Vec<f64> = batches
        .iter()
        .map(|b| (0..4).map(|s| b.iter().filter(|x| **x == s).count()).max().unwrap() as f64 / b.len() as f64)
        .collect();
    let ideal: Vec<f64> = sizes.iter().map(|s| *s as f64 / total as f64).collect();
    (
        "H3.sampler",
        json!({"sizes": sizes, "batch": batch}),
        json!({"batches": batches, "max_share": share, "ideal": ideal}),
    )
}
