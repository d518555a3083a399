//! Upcycling, pruning, merging: what is exact is tested as exact, and what is not is shown not to be.

mod common;

use common::numbers;
use mixtura_routing::activation::{log_sum_exp, normalise_row, softmax_rows};
use mixtura_routing::policy::expert_choice;
use mixtura_routing::reference::combine::{combine, combine_dense};
use mixtura_routing::reference::compress::{
    Expert, Gate, added_logits, align, average, centred_rows, gated_output_norm, hard_usage, keep, merge, merge_to,
    most_similar_pair, permute_rows, prune, row_norms, soft_usage, total_output_norm,
};
use mixtura_routing::select::top_k;
use mixtura_routing::zero_cost::renormalise_after_zero;
use mixtura_routing::{Assignment, Choices};

const D: usize = 3;
const H: usize = 5;
const T: usize = 6;

fn gate(seed: u64, experts: usize, biased: bool) -> Gate {
    let bias_e = biased.then(|| numbers(seed + 1, experts, 1.0));
    Gate { rows_ed: numbers(seed, experts * D, 1.0), bias_e, width: D }
}

fn expert(seed: u64) -> Expert {
    Expert { w_in_hi: numbers(seed, H * D, 1.0), w_out_ho: numbers(seed + 50, H * D, 1.0), hidden: H }
}

/// `W_out relu(W_in x)`.
fn apply(e: &Expert, x: &[f64]) -> Vec<f64> {
    let mut y = vec![0.0; D];
    for (w, v) in e.w_in_hi.chunks(D).zip(e.w_out_ho.chunks(D)) {
        let unit = w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>().max(0.0);
        y.iter_mut().zip(v).for_each(|(y, v)| *y += unit * v);
    }
    y
}

fn logits(g: &Gate, x: &[f64]) -> Vec<f64> {
    let row = |x: &[f64]| {
        let at = |(e, w): (usize, &[f64])| {
            w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + g.bias_e.as_ref().map_or(0.0, |b| b[e])
        };
        g.rows_ed.chunks(D).enumerate().map(at).collect::<Vec<_>>()
    };
    x.chunks(D).flat_map(row).collect()
}

/// The dense mixture of a gate and experts.
fn dense(x: &[f64], logits: &[f64], experts: &[Expert]) -> Vec<f64> {
    let mut probs = vec![0.0; logits.len()];
    softmax_rows(logits, experts.len(), &mut probs, &mut vec![0.0; logits.len() / experts.len()]);
    combine_dense(x, D, &probs, experts.len(), |e, x| apply(&experts[e], x))
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn pruning_no_expert_is_the_identity_and_scores_rank() {
    let score = [0.3, 2.0, 0.3, 1.0];
    assert_eq!(keep(&score, 4), [0, 1, 2, 3]);
    assert_eq!(keep(&score, 3), [0, 1, 3], "ties go to the lower expert");
    assert_eq!(keep(&score, 0), [0u32; 0]);
    let (g, experts) = (gate(1, 4, true), (10..14).map(expert).collect::<Vec<_>>());
    assert_eq!(prune(&g, &experts, &keep(&score, 4)), (g, experts));
}

#[test]
fn pruned_gates_give_the_old_probabilities_renormalised() {
    for trial in 0..50 {
        let (g, experts) = (gate(trial, 5, trial % 2 == 0), (10..15).map(expert).collect::<Vec<_>>());
        let x = numbers(trial + 300, T * D, 1.0);
        let kept = keep(&row_norms(&g.rows_ed, D), 3);
        let (pruned, fewer) = prune(&g, &experts, &kept);
        let before = logits(&g, &x);
        let mut probs = vec![0.0; T * 5];
        softmax_rows(&before, 5, &mut probs, &mut [0.0; T]);
        let mut renormalised: Vec<f64> =
            probs.chunks(5).flat_map(|row| kept.iter().map(|&e| row[e as usize]).collect::<Vec<_>>()).collect();
        renormalised.chunks_mut(3).for_each(normalise_row);
        let expected = combine_dense(&x, D, &renormalised, 3, |e, x| apply(&fewer[e], x));
        assert!(distance(&dense(&x, &logits(&pruned, &x), &fewer), &expected) < 1e-12, "trial {trial}");
        assert!(kept.iter().enumerate().all(|(i, &e)| fewer[i] == experts[e as usize]));
    }
}

#[test]
fn usage_scores_count_selections_probability_and_output() {
    let choices = Choices::rectangular(3, 2, vec![0, 2, 2, 1, 2, 0]);
    assert_eq!(hard_usage(&choices, 4), [2.0 / 6.0, 1.0 / 6.0, 0.5, 0.0]);
    assert_eq!(hard_usage(&Choices::rectangular(0, 2, vec![]), 2), [0.0, 0.0]);
    assert_eq!(soft_usage(&[0.5, 0.5, 0.25, 0.75], 2), [0.75, 1.25]);
    let (experts, weights, norms) = ([0, 0, 2], [0.5, 0.25, 1.0], [2.0, 4.0, 3.0]);
    assert_eq!(total_output_norm(&experts, &weights, &norms, 3), [2.0, 0.0, 3.0]);
    assert_eq!(gated_output_norm(&experts, &weights, &norms, 3), [1.0, 0.0, 3.0]);
}

#[test]
fn a_common_vector_changes_row_norms_but_not_centred_ones() {
    let (x, g) = (numbers(3, T * D, 1.0), gate(4, 4, false));
    let moved: Vec<f64> = g.rows_ed.iter().enumerate().map(|(i, v)| v + [3.0, -1.0, 2.0][i % D]).collect();
    let moved = Gate { rows_ed: moved, ..g.clone() };
    let experts: Vec<Expert> = (20..24).map(expert).collect();
    assert!(distance(&dense(&x, &logits(&g, &x), &experts), &dense(&x, &logits(&moved, &x), &experts)) < 1e-12);
    assert_ne!(row_norms(&g.rows_ed, D), row_norms(&moved.rows_ed, D));
    let centred = |g: &Gate| row_norms(&centred_rows(&g.rows_ed, D), D);
    assert!(distance(&centred(&g), &centred(&moved)) < 1e-12);
}

#[test]
fn alignment_undoes_a_permutation_of_hidden_units_exactly() {
    for trial in 0..50 {
        let a = expert(trial);
        let mut order: Vec<u32> = (0..H as u32).collect();
        order.rotate_left(1 + trial as usize % (H - 1));
        order.swap(0, 3);
        let b = Expert {
            w_in_hi: permute_rows(&a.w_in_hi, D, &order),
            w_out_ho: permute_rows(&a.w_out_ho, D, &order),
            hidden: H,
        };
        let found = align(&a.w_in_hi, &b.w_in_hi, D);
        assert_eq!(permute_rows(&b.w_in_hi, D, &found), a.w_in_hi, "trial {trial}");
        let x = numbers(trial + 700, D, 1.0);
        let merged = merge(&a, &b, 0.3);
        assert!(distance(&apply(&merged, &x), &apply(&a, &x)) < 1e-12, "the same function before and after");
        let naive = Expert {
            w_in_hi: average(&a.w_in_hi, &b.w_in_hi, 0.5),
            w_out_ho: average(&a.w_out_ho, &b.w_out_ho, 0.5),
            hidden: H,
        };
        let error: f64 = (0..20)
            .map(|i| {
                let x = numbers(trial * 40 + i, D, 1.0);
                distance(&apply(&naive, &x), &apply(&a, &x))
            })
            .sum();
        assert!(error > 1e-3, "without alignment the function is lost");
    }
}

#[test]
fn identical_experts_merge_without_loss_when_their_gate_masses_add() {
    for trial in 0..50 {
        let x = numbers(trial, T * D, 1.0);
        let z = logits(&gate(trial + 100, 4, true), &x);
        let twin = expert(trial);
        let experts = [expert(30), twin.clone(), expert(31), twin];
        let before = dense(&x, &z, &experts);
        let after = dense(&x, &added_logits(&z, 4, 1, 3), &experts[..3]);
        assert!(distance(&before, &after) < 1e-12, "trial {trial}");
        // The mean of the two logits loses mass.
        let mean: Vec<f64> = z.chunks(4).flat_map(|z| [z[0], (z[1] + z[3]) / 2.0, z[2]]).collect();
        assert!(distance(&before, &dense(&x, &mean, &experts[..3])) > 1e-3);
    }
}

#[test]
fn equal_gate_rows_merge_exactly_into_one_row_with_the_log_sum_of_biases() {
    for trial in 0..50 {
        let mut g = gate(trial, 4, true);
        let row = g.rows_ed[..D].to_vec();
        g.rows_ed[2 * D..3 * D].copy_from_slice(&row);
        let mut experts: Vec<Expert> = (40..44).map(expert).collect();
        experts[2] = experts[0].clone();
        let features: Vec<f64> = experts.iter().flat_map(|e| e.w_in_hi.clone()).collect();
        let merged = merge_to(&g, &experts, &features, &[0.1, 0.4, 0.3, 0.2], 3);
        assert_eq!(merged.members, [vec![0, 2], vec![1], vec![3]], "the twins are the most similar pair");
        assert!(distance(&merged.usage, &[0.4, 0.4, 0.2]) < 1e-15);
        let x = numbers(trial + 900, T * D, 1.0);
        let (before, after) =
            (dense(&x, &logits(&g, &x), &experts), dense(&x, &logits(&merged.gate, &x), &merged.experts));
        assert!(distance(&before, &after) < 1e-12, "trial {trial}");
    }
}

/// "Log-sum-exp of the rows" read literally is not the sum of gate masses, and no single row is.
#[test]
fn no_gate_row_expresses_the_sum_of_two_different_gates() {
    let (a, b) = ([1.0, -0.5, 0.3], [-0.4, 0.9, 0.2]);
    let at = |row: &[f64], x: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>();
    let rows: Vec<f64> = a.iter().zip(b).map(|(a, b)| log_sum_exp(&[*a, b])).collect();
    let x = [0.7, -1.1, 0.4];
    let exact = |x: &[f64]| log_sum_exp(&[at(&a, x), at(&b, x)]);
    assert!((at(&rows, &x) - exact(&x)).abs() > 0.1);
    // A row w and bias c give c at x and -x together 2 c; the sum of masses gives 2 ln(2 cosh((a - b) x / 2)), which varies.
    let both = |x: [f64; 3]| exact(&x) + exact(&x.map(|v| -v));
    assert!((both([0.0; 3]) - 2.0 * 2f64.ln()).abs() < 1e-12 && both(x) > 2.0 * 2f64.ln() + 0.1);
}

#[test]
fn merging_goes_down_to_one_expert_and_averages_by_usage() {
    let (g, experts) = (gate(5, 5, true), (60..65).map(expert).collect::<Vec<_>>());
    let features = numbers(8, 5 * 7, 1.0);
    let usage = [0.5, 0.0, 0.2, 0.3, 0.0];
    for m in (0..=5).rev() {
        let merged = merge_to(&g, &experts, &features, &usage, m);
        let left = m.max(1);
        assert_eq!((merged.experts.len(), merged.gate.rows_ed.len(), merged.usage.len()), (left, left * D, left));
        let mut all: Vec<u32> = merged.members.concat();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4], "every expert is in one merged expert");
        assert!((merged.usage.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        if m == 5 {
            assert_eq!((merged.gate, merged.experts), (g.clone(), experts.clone()), "nothing to merge is the identity");
        } else if m <= 1 {
            let mean: Vec<f64> = (0..D).map(|d| (0..5).map(|e| usage[e] * g.rows_ed[e * D + d]).sum()).collect();
            assert!(distance(&merged.gate.rows_ed, &mean) < 1e-12, "usage-weighted in any order of merging");
            let bias = merged.gate.bias_e.unwrap()[0];
            assert!((bias - log_sum_exp(g.bias_e.as_ref().unwrap())).abs() < 1e-12);
        }
    }
    assert_eq!(most_similar_pair(&[1.0, 0.0, 0.0, 1.0, 1.0, 0.1], 2).map(|(i, j, _)| (i, j)), Some((0, 2)));
    assert_eq!(most_similar_pair(&[1.0, 0.0], 2), None);
    assert_eq!(most_similar_pair(&[0.0, 0.0, 0.0, 0.0], 2), Some((0, 1, 0.0)), "zeros, not NaN");
}

#[test]
fn normalised_upcycling_recovers_the_dense_layer_for_every_routed_token() {
    for trial in 0..50 {
        let (x, mlp) = (numbers(trial, T * D, 1.0), expert(trial));
        let experts = 4;
        let mut probs = vec![0.0; T * experts];
        softmax_rows(&numbers(trial + 60, T * experts, 2.0), experts, &mut probs, &mut [0.0; T]);
        let token_choice = Choices::rectangular(T, 2, top_k(&probs, experts, 2));
        for choices in [token_choice, expert_choice::select(&probs, experts, 2)] {
            let assignment = Assignment::dropless(&choices, experts);
            let mut weights = vec![0.0; T * experts];
            for t in 0..T {
                choices
                    .of_token(t)
                    .iter()
                    .for_each(|&e| weights[t * experts + e as usize] = probs[t * experts + e as usize]);
            }
            let raw_sum: Vec<f64> = weights.chunks(experts).map(|row| row.iter().sum()).collect();
            let run = |weights: &[f64]| {
                let of_row = assignment.expert_of_row();
                let weight_n: Vec<f64> = (0..assignment.rows())
                    .map(|row| weights[assignment.token_of_row[row] as usize * experts + of_row[row] as usize])
                    .collect();
                combine(&x, D, &assignment, &weight_n, |_, x| apply(&mlp, x))
            };
            let raw = run(&weights);
            weights.chunks_mut(experts).for_each(normalise_row);
            let normalised = run(&weights);
            for t in 0..T {
                let dense = apply(&mlp, &x[t * D..(t + 1) * D]);
                let routed = if choices.of_token(t).is_empty() { 0.0 } else { 1.0 };
                for d in 0..D {
                    assert!((normalised[t * D + d] - routed * dense[d]).abs() < 1e-12);
                    assert!((raw[t * D + d] - raw_sum[t] * dense[d]).abs() < 1e-12, "raw weights scale by their sum");
                }
            }
        }
    }
}

#[test]
fn rows_without_weight_stay_zero() {
    let mut none = [0.0; 3];
    normalise_row(&mut none);
    assert_eq!(none, [0.0; 3]);
    assert_eq!(renormalise_after_zero(&[0.0, 0.4], 2, |e| e == 1), [0.0, 0.0]);
    assert_eq!(renormalise_after_zero(&[0.2, 0.4], 2, |e| e == 1), [1.0, 0.0]);
}
