//! Between dense and sparse models: pruning of experts, merging of experts,
//! aggregation of two checkpoints. All at compile time: nothing here looks at a token being routed.
//!
//! Pruning keeps the m experts with the largest score ([`keep`], [`prune`]); dropping gate rows re-normalises the softmax by
//! itself. Scores, each `[E]`: gate-row norm, raw or centred ([`row_norms`], [`centred_rows`]); hard and soft usage
//! ([`hard_usage`], [`soft_usage`]); gated output norm, per use or in total ([`gated_output_norm`], [`total_output_norm`]).
//!
//! Merging reduces E to m by joining the most similar pair again and again ([`merge_to`]). Averaging two experts without
//! aligning their hidden units first averages unrelated units and destroys the function; [`align`] finds the permutation, by an
//! exact assignment. Identical experts merge without loss under a dense softmax gate if their gate masses add, that is, if
//! the merged LOGIT is the log-sum-exp of the two ([`added_logits`]). One gate row can express that only where the two rows are
//! equal (the bias then takes the log-sum-exp); for different rows `lse(a, b) + lse(-a, -b) >= 2 ln 2` shows that no row
//! and bias will do, and the usage-weighted mean used here is an approximation. Under top-k it is one in any case.

use crate::activation::{log_sum_exp, normalise_row};
use crate::assignment::Choices;
use crate::losses::importance;
use crate::policy::base;
use crate::select::order_descending;

/// Euclidean norm of every gate row, `[E, d]`.
pub fn row_norms(gate_ed: &[f64], width: usize) -> Vec<f64> {
    gate_ed.chunks_exact(width.max(1)).map(|row| dot(row, row).sqrt()).collect()
}

/// Gate rows minus their mean: a vector common to all rows changes no probability but changes norms.
pub fn centred_rows(gate_ed: &[f64], width: usize) -> Vec<f64> {
    let experts = (gate_ed.len() / width.max(1)).max(1);
    let mean: Vec<f64> =
        (0..width).map(|d| gate_ed.iter().skip(d).step_by(width).sum::<f64>() / experts as f64).collect();
    gate_ed.iter().enumerate().map(|(i, v)| v - mean[i % width]).collect()
}

/// Share of all selections that went to each expert, sums to 1 (0 if there were none).
pub fn hard_usage(choices: &Choices, experts: usize) -> Vec<f64> {
    let mut usage: Vec<f64> = choices.demand(experts).into_iter().map(f64::from).collect();
    normalise_row(&mut usage);
    usage
}

/// Probability each expert got in total, `sum_t P[t, e]`; sums to T.
pub fn soft_usage(probs_te: &[f64], experts: usize) -> Vec<f64> {
    importance(probs_te, experts.max(1))
}

/// The `m` experts with the largest score, in index order; ties to the lower index.
pub fn keep(score_e: &[f64], m: usize) -> Vec<u32> {
    let mut kept = order_descending(score_e);
    kept.truncate(m);
    kept.sort_unstable();
    kept
}

/// Gate weight times output norm, averaged over the rows each expert computed (REAP); 0 for an unused expert.
pub fn gated_output_norm(expert_of_row: &[u32], weight_n: &[f64], norm_n: &[f64], experts: usize) -> Vec<f64> {
    let mut count = vec![0.0; experts];
    expert_of_row.iter().for_each(|&e| count[e as usize] += 1.0);
    let total = total_output_norm(expert_of_row, weight_n, norm_n, experts);
    total.iter().zip(count).map(|(s, c)| if c > 0.0 { s / c } else { 0.0 }).collect()
}

/// Gate weight times output norm summed over rows: usage times mean gated output norm, so a rarely used expert counts little.
pub fn total_output_norm(expert_of_row: &[u32], weight_n: &[f64], norm_n: &[f64], experts: usize) -> Vec<f64> {
    let mut sum = vec![0.0; experts];
    for ((&e, w), n) in expert_of_row.iter().zip(weight_n).zip(norm_n) {
        sum[e as usize] += w * n;
    }
    sum
}

/// A two-matrix expert with one row per hidden unit; a gated unit's gate and up rows stand side by side in `w_in_hi`.
#[derive(Debug, Clone, PartialEq)]
pub struct Expert {
    /// `[H, i]`: what each hidden unit reads.
    pub w_in_hi: Vec<f64>,
    /// `[H, o]`: what each hidden unit writes.
    pub w_out_ho: Vec<f64>,
    /// H.
    pub hidden: usize,
}

/// A linear gate, `z_e = <rows[e], x> + bias[e]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Gate {
    /// `[E, d]`.
    pub rows_ed: Vec<f64>,
    /// `[E]`, if the router has one.
    pub bias_e: Option<Vec<f64>>,
    /// d.
    pub width: usize,
}

/// Gate and experts with only those in `kept`, in that order. Keeping all of them is the identity. Panics on an index beyond E.
pub fn prune(gate: &Gate, experts: &[Expert], kept: &[u32]) -> (Gate, Vec<Expert>) {
    let rows_ed = permute_rows(&gate.rows_ed, gate.width, kept);
    let bias_e = gate.bias_e.as_ref().map(|bias| permute_rows(bias, 1, kept));
    let kept_experts = kept.iter().map(|&e| experts[e as usize].clone()).collect();
    (Gate { rows_ed, bias_e, width: gate.width }, kept_experts)
}

/// The most similar pair `(i, j)`, `i < j`, of feature vectors `[E, n]` by cosine (weights, or outputs on a calibration set);
/// ties to the lower indices; `None` for fewer than two. A vector of zeros is similar to nothing.
pub fn most_similar_pair(features_en: &[f64], width: usize) -> Option<(u32, u32, f64)> {
    let rows: Vec<&[f64]> = features_en.chunks_exact(width.max(1)).collect();
    let mut best: Option<(u32, u32, f64)> = None;
    for (i, a) in rows.iter().enumerate() {
        for (j, b) in rows.iter().enumerate().skip(i + 1) {
            let norms = (dot(a, a) * dot(b, b)).sqrt();
            let cosine = if norms > 0.0 { dot(a, b) / norms } else { 0.0 };
            if best.is_none_or(|(_, _, c)| cosine > c) {
                best = Some((i as u32, j as u32, cosine));
            }
        }
    }
    best
}

/// Which experts became one: in the order of the merged experts, each with its members.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// The gate of the merged experts.
    pub gate: Gate,
    /// The merged experts.
    pub experts: Vec<Expert>,
    /// Original experts behind each merged one.
    pub members: Vec<Vec<u32>>,
    /// Summed usage of each.
    pub usage: Vec<f64>,
}

/// Merges the most similar pair until `m` experts are left: features `[E, n]` as for [`most_similar_pair`], averaged by usage
/// along with the experts. The later expert joins the earlier one's place. O((E - m)(E^2 n + H^2 i + H^3)).
///
/// Panics if there are not as many usages, features and gate rows as experts, or if experts differ in shape.
pub fn merge_to(gate: &Gate, experts: &[Expert], features_en: &[f64], usage_e: &[f64], m: usize) -> Merged {
    let n = features_en.len() / experts.len().max(1);
    assert_eq!(usage_e.len(), experts.len(), "merge_to: one usage per expert");
    assert_eq!(features_en.len(), experts.len() * n, "merge_to: features are [E, n]");
    assert_eq!(gate.rows_ed.len(), experts.len() * gate.width, "merge_to: gate rows are [E, d]");
    let mut features: Vec<f64> = features_en.to_vec();
    let members = (0..experts.len() as u32).map(|e| vec![e]).collect();
    let mut out = Merged { gate: gate.clone(), experts: experts.to_vec(), members, usage: usage_e.to_vec() };
    while out.experts.len() > m.max(1)
        && let Some((i, j, _)) = most_similar_pair(&features, n)
    {
        let (i, j) = (i as usize, j as usize);
        let share = share_of(out.usage[i], out.usage[j]);
        let width = out.gate.width;
        out.experts[i] = merge(&out.experts[i], &out.experts[j], share);
        join_rows(&mut out.gate.rows_ed, width, i, j, share);
        join_rows(&mut features, n, i, j, share);
        if let Some(bias) = &mut out.gate.bias_e {
            bias[i] = log_sum_exp(&[bias[i], bias[j]]);
            bias.remove(j);
        }
        out.usage[i] += out.usage[j];
        out.usage.remove(j);
        out.experts.remove(j);
        let joined = out.members.remove(j);
        out.members[i].extend(joined);
    }
    out
}

/// One expert from two: hidden units of `b` aligned with those of `a`, then `share a + (1 - share) b`. Panics if shapes differ.
pub fn merge(a: &Expert, b: &Expert, share: f64) -> Expert {
    assert_eq!(
        (a.hidden, a.w_in_hi.len(), a.w_out_ho.len()),
        (b.hidden, b.w_in_hi.len(), b.w_out_ho.len()),
        "merge: experts of one shape"
    );
    let hidden = a.hidden.max(1);
    let (reads, writes) = (a.w_in_hi.len() / hidden, a.w_out_ho.len() / hidden);
    let order = align(&a.w_in_hi, &b.w_in_hi, reads);
    Expert {
        w_in_hi: average(&a.w_in_hi, &permute_rows(&b.w_in_hi, reads, &order), share),
        w_out_ho: average(&a.w_out_ho, &permute_rows(&b.w_out_ho, writes, &order), share),
        hidden: a.hidden,
    }
}

/// Logits `[T, E]` with experts `a` and `b` made one at `a`'s place: the log-sum-exp of the two, which adds their
/// probabilities and leaves all others as they are. Exact for identical experts under a dense softmax; `[T, E - 1]`.
pub fn added_logits(logits_te: &[f64], experts: usize, a: usize, b: usize) -> Vec<f64> {
    assert!(a < experts && b < experts && a != b, "added_logits: two different experts of {experts}, not {a} and {b}");
    let merged = |row: &[f64]| {
        let at = |e: usize| if e == a { log_sum_exp(&[row[a], row[b]]) } else { row[e] };
        (0..experts).filter(|e| *e != b).map(at).collect::<Vec<f64>>()
    };
    logits_te.chunks_exact(experts).flat_map(merged).collect()
}

/// For every hidden unit (row) of `a`, the unit of `b` that matches it best overall; exact assignment on inner products.
pub fn align(a_hd: &[f64], b_hd: &[f64], width: usize) -> Vec<u32> {
    let rows = a_hd.len() / width.max(1);
    let affinity: Vec<f64> =
        a_hd.chunks_exact(width.max(1)).flat_map(|x| b_hd.chunks_exact(width.max(1)).map(move |y| dot(x, y))).collect();
    base::assign(&affinity, rows)
}

/// Rows of `m` in the given order.
pub fn permute_rows(m: &[f64], width: usize, order: &[u32]) -> Vec<f64> {
    order.iter().flat_map(|&i| m[i as usize * width..(i as usize + 1) * width].iter().copied()).collect()
}

/// `share a + (1 - share) b`.
pub fn average(a: &[f64], b: &[f64], share: f64) -> Vec<f64> {
    a.iter().zip(b).map(|(x, y)| share * x + (1.0 - share) * y).collect()
}

/// Row i becomes the average of rows i and j; row j goes.
fn join_rows(rows: &mut Vec<f64>, width: usize, i: usize, j: usize, share: f64) {
    let joined = average(&rows[i * width..(i + 1) * width], &rows[j * width..(j + 1) * width], share);
    rows[i * width..(i + 1) * width].copy_from_slice(&joined);
    rows.drain(j * width..(j + 1) * width);
}

/// Equal shares where neither was used.
fn share_of(a: f64, b: f64) -> f64 {
    if a + b > 0.0 { a / (a + b) } else { 0.5 }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}
