//! Group-limited top-k (DeepSeek-V2/V3): experts in equal groups (nodes); a token may use only its `keep` best groups.
//!
//! A group's score is the sum of its `best` largest biased scores: 2 in V3, 1 (the maximum) in V2. Experts of other groups
//! get minus infinity, never 0: with negative biased scores a 0 would win. O(T E min(k, log E)).

use crate::real::Real;
use crate::select::top_k;

/// Sum of each group's `best` largest scores; `[T, groups]`.
pub fn group_scores<S: Real>(scores_te: &[S], experts: usize, groups: usize, best: usize) -> Vec<S> {
    let size = experts / groups;
    let best = best.min(size);
    let chosen = top_k(scores_te, size, best);
    scores_te
        .chunks_exact(size)
        .zip(chosen.chunks_exact(best))
        .map(|(group, top)| top.iter().map(|&i| group[i as usize]).sum())
        .collect()
}

/// The groups each token may use, best first; `[T, keep]`.
pub fn kept_groups<S: Real>(scores_te: &[S], experts: usize, groups: usize, keep: usize, best: usize) -> Vec<u32> {
    top_k(&group_scores(scores_te, experts, groups, best), groups, keep)
}

/// Scores with every expert outside the kept groups replaced by `masked`.
pub fn mask_groups<S: Real>(scores_te: &[S], experts: usize, groups: usize, kept: &[u32], masked: S) -> Vec<S> {
    let size = experts / groups;
    let keep = kept.len() * experts / scores_te.len().max(1);
    let mut out = vec![masked; scores_te.len()];
    for (t, (row, scores)) in out.chunks_exact_mut(experts).zip(scores_te.chunks_exact(experts)).enumerate() {
        for &g in &kept[t * keep..(t + 1) * keep] {
            let group = g as usize * size..(g as usize + 1) * size;
            row[group.clone()].copy_from_slice(&scores[group]);
        }
    }
    out
}

/// The k best experts of each token within its kept groups; `[T, k]`.
pub fn select<S: Real>(scores_te: &[S], experts: usize, groups: usize, keep: usize, best: usize, k: usize) -> Vec<u32> {
    let kept = kept_groups(scores_te, experts, groups, keep, best);
    top_k(&mask_groups(scores_te, experts, groups, &kept, S::NEG_INFINITY), experts, k)
}
