//! Two-level mixtures (Shazeer et al. 2017, appendix B): a primary gate over groups, a secondary gate inside each chosen group.
//!
//! Expert (i, j) of `a` groups of `b` has index `i b + j`. Weights are products, so a token's total stays 1. The load of a
//! group's experts is estimated on the tokens that reached the group and scaled by the primary load, which keeps a gradient
//! for the primary gate.

use crate::activation::{log_sum_exp, softmax};
use crate::assignment::Choices;
use crate::config::{Policy, RouterConfig};
use crate::input::RouteShape;
use crate::real::Real;
use crate::select::top_k_row;

/// How experts are arranged. A token's logits are those of the `groups * per_group` experts, then those of the groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Levels {
    /// a.
    pub groups: usize,
    /// b.
    pub per_group: usize,
    /// Groups a token takes.
    pub keep: usize,
    /// Experts it takes in each.
    pub inner: usize,
}

impl Levels {
    /// Of a valid configuration; `None` with any other policy.
    pub(crate) fn of(config: &RouterConfig, shape: RouteShape) -> Option<Self> {
        let Policy::Hierarchical { groups, keep } = config.policy else { return None };
        Some(Self { groups, per_group: shape.experts / groups, keep, inner: shape.top_k / keep })
    }

    /// E.
    pub fn experts(self) -> usize {
        self.groups * self.per_group
    }

    /// Logits per token, E + a.
    pub fn width(self) -> usize {
        self.experts() + self.groups
    }

    /// A token's logits: of its experts, of its groups.
    pub fn split<S>(self, row: &[S]) -> (&[S], &[S]) {
        row.split_at(self.experts())
    }

    /// Chosen experts, best group first and best expert first within it.
    pub fn choose<S: Real>(self, logits_ts: &[S]) -> Choices {
        let rows = logits_ts.chunks_exact(self.width()).map(|row| self.split(row));
        let (secondary, primary): (Vec<_>, Vec<_>) = rows.unzip();
        let k = [self.keep, self.inner];
        route_two_level(&primary.concat(), &secondary.concat(), self.groups, self.per_group, k).choices
    }

    /// Logarithm of `P(group) P(expert | group)` of every expert, `[T, E]`, and the root of the token's z-loss: the squared
    /// log-sum-exp over the groups plus the mean of those within the groups.
    pub fn joint<S: Real>(self, logits_ts: &[S]) -> (Vec<S>, Vec<S>) {
        let tokens = logits_ts.len() / self.width();
        let (mut joint_te, mut root_t) = (Vec::with_capacity(tokens * self.experts()), Vec::with_capacity(tokens));
        for row in logits_ts.chunks_exact(self.width()) {
            let (secondary, primary) = self.split(row);
            let outer = log_sum_exp(primary);
            let mut inner_squares = S::ZERO;
            for (experts, &group) in secondary.chunks_exact(self.per_group).zip(primary) {
                let inner = log_sum_exp(experts);
                inner_squares += inner * inner;
                joint_te.extend(experts.iter().map(|&z| (group - outer) + (z - inner)));
            }
            root_t.push((outer * outer + inner_squares / S::of(self.groups as f64)).sqrt());
        }
        (joint_te, root_t)
    }

    /// From gradients for [`joint`](Self::joint)'s logarithms to those for the logits, added to `dlogits_ts`.
    pub fn joint_backward<S: Real>(self, probs_te: &[S], djoint_te: &[S], dlogits_ts: &mut [S]) {
        let (experts, width) = (self.experts(), self.width());
        let tokens = probs_te.chunks_exact(experts).zip(djoint_te.chunks_exact(experts));
        for ((probs, djoint), dlogits) in tokens.zip(dlogits_ts.chunks_exact_mut(width)) {
            let total: S = djoint.iter().copied().sum();
            let (dsecondary, dprimary) = dlogits.split_at_mut(experts);
            for (i, dgroup) in dprimary.iter_mut().enumerate() {
                let members = i * self.per_group..(i + 1) * self.per_group;
                let (p, d) = (&probs[members.clone()], &djoint[members.clone()]);
                let (group, own): (S, S) = (p.iter().copied().sum(), d.iter().copied().sum());
                *dgroup += own - group * total;
                for ((dz, &p), &d) in dsecondary[members].iter_mut().zip(p).zip(d) {
                    *dz += d - if group > S::ZERO { p / group * own } else { S::ZERO };
                }
            }
        }
    }

    /// Weight of every pair: the softmax over the token's groups times that over its experts of the group.
    pub fn weights<S: Real>(self, choices: &Choices, logits_ts: &[S]) -> Vec<S> {
        let tokens = 0..choices.tokens();
        tokens.flat_map(|t| self.gates(choices, logits_ts, t)).map(|gate| gate.outer * gate.inner).collect()
    }

    /// Gradient of [`weights`](Self::weights), added to `dlogits_ts`.
    pub fn weights_backward<S: Real>(self, choices: &Choices, logits_ts: &[S], dpair: &[S], dlogits_ts: &mut [S]) {
        for t in 0..choices.tokens() {
            let gates = self.gates(choices, logits_ts, t);
            let d = &dpair[choices.pair_range(t)];
            let dlogits = &mut dlogits_ts[t * self.width()..(t + 1) * self.width()];
            // <dw, w> of the whole token, and within a group relative to the group's own weight.
            let whole: S = gates.iter().zip(d).map(|(g, &d)| d * g.outer * g.inner).sum();
            let within = |group: u32| -> S {
                gates.iter().zip(d).filter(|(g, _)| g.group == group).map(|(g, &d)| d * g.inner).sum()
            };
            for ((gate, &d), &e) in gates.iter().zip(d).zip(choices.of_token(t)) {
                let inner = within(gate.group);
                dlogits[e as usize] += gate.outer * gate.inner * (d - inner);
                // The group's own gradient is outer (inner - whole); each of its pairs brings its share.
                dlogits[self.experts() + gate.group as usize] += gate.outer * gate.inner * (inner - whole);
            }
        }
    }

    /// Both gates of every pair of a token.
    fn gates<S: Real>(self, choices: &Choices, logits_ts: &[S], t: usize) -> Vec<Gate<S>> {
        let (secondary, primary) = self.split(&logits_ts[t * self.width()..(t + 1) * self.width()]);
        let list = choices.of_token(t);
        let group_of = |e: u32| e / self.per_group as u32;
        let softmax_among = |own: S, among: &[S]| -> S {
            let top = among.iter().fold(own, |best, &z| best.larger(z));
            (own - top).exp() / among.iter().map(|&z| (z - top).exp()).sum::<S>()
        };
        // Sorted, because redirected choices need not lie group by group.
        let mut groups: Vec<u32> = list.iter().map(|&e| group_of(e)).collect();
        groups.sort_unstable();
        groups.dedup();
        let of_groups: Vec<S> = groups.iter().map(|&g| primary[g as usize]).collect();
        let gate = |&e: &u32| {
            let group = group_of(e);
            let peers: Vec<S> =
                list.iter().filter(|o| group_of(**o) == group).map(|&o| secondary[o as usize]).collect();
            let outer = softmax_among(primary[group as usize], &of_groups);
            Gate { group, outer, inner: softmax_among(secondary[e as usize], &peers) }
        };
        list.iter().map(gate).collect()
    }
}

/// The gates of one pair.
struct Gate<S> {
    group: u32,
    outer: S,
    inner: S,
}

/// A two-level routing.
#[derive(Debug, Clone, PartialEq)]
pub struct TwoLevel<S> {
    /// Chosen experts, group by group, best group first.
    pub choices: Choices,
    /// Product of the two gates of every pair.
    pub weight_of_pair: Vec<S>,
    /// Primary gate `[T, a]`, 0 where not chosen.
    pub primary_ta: Vec<S>,
}

/// Routes by two sets of (noisy) logits, `primary_ta` `[T, a]` and `secondary_tab` `[T, a, b]`, to so many groups and so many
/// experts in each.
pub fn route_two_level<S: Real>(
    primary_ta: &[S],
    secondary_tab: &[S],
    groups: usize,
    per_group: usize,
    [k_groups, k_inner]: [usize; 2],
) -> TwoLevel<S> {
    let (k_groups, k_inner) = (k_groups.min(groups), k_inner.min(per_group));
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
