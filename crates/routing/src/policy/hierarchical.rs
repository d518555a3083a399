//! Two-level mixtures (Shazeer et al. 2017, appendix B): a primary gate over groups, a secondary gate inside each chosen group.
//!
//! Expert (i, j) of `a` groups of `b` has index `i b + j`. Weights are products, so a token's total stays 1. The load of a
//! group's experts is estimated on the tokens that reached the group and scaled by the primary load, which keeps a gradient
//! for the primary gate.

use crate::activation::softmax;
use crate::assignment::Choices;
use crate::real::Real;
use crate::select::top_k_row;

/// A two-level routing: `k` groups, `k` experts in each.
#[derive(Debug, Clone, PartialEq)]
pub struct TwoLevel<S> {
    /// Chosen experts, group by group, best group first.
    pub choices: Choices,
    /// Product of the two gates of every pair.
    pub weight_of_pair: Vec<S>,
    /// Primary gate `[T, a]`, 0 where not chosen.
    pub primary_ta: Vec<S>,
}

/// Routes by two sets of (noisy) logits: `primary_ta` `[T, a]` and `secondary_tab` `[T, a, b]`.
pub fn route_two_level<S: Real>(
    primary_ta: &[S],
    secondary_tab: &[S],
    groups: usize,
    per_group: usize,
    k: usize,
) -> TwoLevel<S> {
    let (k_groups, k_inner) = (k.min(groups), k.min(per_group));
    let mut lists = Vec::new();
    let mut weight_of_pair = Vec::new();
    let mut gates = vec![S::ZERO; primary_ta.len()];
    for (t, row) in primary_ta.chunks_exact(groups).enumerate() {
        let outer = selected_softmax(row, k_groups);
        let mut list = Vec::with_capacity(k_groups * k_inner);
        for &(g, outer_weight) in &outer {
            gates[t * groups + g as usize] = outer_weight;
            let first = (t * groups + g as usize) * per_group;
            for (j, inner_weight) in selected_softmax(&secondary_tab[first..first + per_group], k_inner) {
                list.push(g * per_group as u32 + j);
                weight_of_pair.push(outer_weight * inner_weight);
            }
        }
        lists.push(list);
    }
    TwoLevel { choices: Choices::ragged(lists), weight_of_pair, primary_ta: gates }
}

/// The k largest of a row with the softmax over them.
fn selected_softmax<S: Real>(row: &[S], k: usize) -> Vec<(u32, S)> {
    let (mut values, mut best) = (vec![S::NEG_INFINITY; k], vec![0; k]);
    top_k_row(row, &mut values, &mut best);
    let mut weights = vec![S::ZERO; k];
    softmax(&values, &mut weights);
    best.into_iter().zip(weights).collect()
}

/// `Gp[t, i] G_i[t, j]`; `[T, a, b]`.
pub fn combined_gate(primary_ta: &[f64], secondary_tab: &[f64], per_group: usize) -> Vec<f64> {
    secondary_tab.iter().enumerate().map(|(i, g)| primary_ta[i / per_group] * g).collect()
}

/// Tokens that reached each group; `[a]`.
pub fn group_sizes(primary_ta: &[f64], groups: usize) -> Vec<usize> {
    (0..groups).map(|i| primary_ta.iter().skip(i).step_by(groups).filter(|g| **g > 0.0).count()).collect()
}

/// `Load_p[i] Load_i[j] / |X_i|`, 0 for a group nobody reached; `[a, b]`.
pub fn load(primary_a: &[f64], secondary_ab: &[f64], sizes: &[usize], per_group: usize) -> Vec<f64> {
    let scaled = |(i, inner): (usize, &f64)| match sizes[i / per_group] {
        0 => 0.0,
        n => primary_a[i / per_group] * inner / n as f64,
    };
    secondary_ab.iter().enumerate().map(scaled).collect()
}
