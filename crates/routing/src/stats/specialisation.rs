//! What experts specialise in: how much the expert a token goes to tells about a label of that token (its logical form, its
//! content, its source), and how much the expert sets of related tokens overlap. Pure functions on lists, one entry a token.
//!
//! - [`specialisation`]: normalised mutual information `2 I / (H(expert) + H(label))`, 0 = independent, 1 = each determines the
//!   other, with a permutation test. A label with many values shares information with anything by chance, so labels of different
//!   kinds are compared by [`Specialisation::above_chance`], not by the raw value.
//! - [`overlap`]: mean Jaccard index of pairs of expert sets against the same sets paired at random;
//!   [`pairs_of_one_content`] pairs tokens that say the same in different forms.
//!
//! Shuffles come from the counter-based stream of (seed, shuffle number): the same arguments give the same bits anywhere. With
//! top-k routing a token may be listed once per expert, its label repeated.

use crate::rng::{Purpose, StepContext};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How much the expert tells about the label. Zero tokens, one expert or one label: all 0 with p-value 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Specialisation {
    /// Mutual information in nats.
    pub nats: f64,
    /// Normalised mutual information, 0 to 1.
    pub normalised: f64,
    /// Mean normalised mutual information over the shuffles: what chance alone gives.
    pub by_chance: f64,
    /// `(normalised - by_chance) / (1 - by_chance)`: 0 = chance, 1 = each determines the other; may be slightly negative.
    pub above_chance: f64,
    /// `(1 + shuffles that reach it) / (1 + shuffles)`: the probability of this much information if labels were random.
    pub p_value: f64,
}

/// Information between `expert_n` and `label_n`, one entry per token, against `shuffles` random permutations of the labels.
///
/// Ids are names: only their equality counts. O((shuffles + log N) N) time, O(N) memory. Panics if the lengths differ.
pub fn specialisation(expert_n: &[u32], label_n: &[u32], shuffles: usize, seed: u64) -> Specialisation {
    let table = Table::new(expert_n, label_n);
    let nats = table.nats(&table.labels);
    let normalised = table.normalise(nats);
    let (mut reached, mut sum) = (0usize, 0.0);
    let mut labels = table.labels.clone();
    for i in 0..shuffles {
        shuffle(&mut labels, seed, i);
        let found = table.nats(&labels);
        // The order of summation may move the last bits of an equal table; a tie counts against the label.
        reached += usize::from(found >= nats - 1e-12 * (1.0 + nats));
        sum += table.normalise(found);
    }
    let by_chance = if shuffles == 0 { 0.0 } else { sum / shuffles as f64 };
    let above_chance = if by_chance < 1.0 { (normalised - by_chance) / (1.0 - by_chance) } else { 0.0 };
    Specialisation { nats, normalised, by_chance, above_chance, p_value: share(reached, shuffles) }
}

/// Normalised mutual information alone, 0 to 1; see [`specialisation`].
pub fn normalised_information(expert_n: &[u32], label_n: &[u32]) -> f64 {
    let table = Table::new(expert_n, label_n);
    table.normalise(table.nats(&table.labels))
}

/// How much the expert sets of paired tokens overlap. No pairs: all 0 with p-values 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Overlap {
    /// Mean Jaccard index of the pairs, 0 to 1.
    pub mean: f64,
    /// The same with the sets dealt to tokens at random.
    pub by_chance: f64,
    /// Probability of an overlap this small by chance: small if the pair's difference separates them.
    pub p_lower: f64,
    /// Probability of an overlap this large by chance: small if what the pair shares decides its experts.
    pub p_higher: f64,
}

/// Mean Jaccard index of `set_n[i]` and `set_n[j]` over `pairs`, against `shuffles` random permutations of the sets.
///
/// O((shuffles + 1) pairs k^2). Panics if a pair names a token that has no set.
pub fn overlap<E: AsRef<[u32]>>(set_n: &[E], pairs: &[(u32, u32)], shuffles: usize, seed: u64) -> Overlap {
    let mut owner: Vec<u32> = (0..set_n.len() as u32).collect();
    let mean_of = |owner: &[u32]| {
        let set = |i: u32| set_n[owner[i as usize] as usize].as_ref();
        pairs.iter().map(|&(i, j)| jaccard(set(i), set(j))).sum::<f64>() / pairs.len().max(1) as f64
    };
    let mean = mean_of(&owner);
    let (mut lower, mut higher, mut sum) = (0, 0, 0.0);
    for i in 0..shuffles {
        shuffle(&mut owner, seed, i);
        let found = mean_of(&owner);
        lower += usize::from(found <= mean + 1e-12);
        higher += usize::from(found >= mean - 1e-12);
        sum += found;
    }
    let by_chance = if shuffles == 0 { 0.0 } else { sum / shuffles as f64 };
    Overlap { mean, by_chance, p_lower: share(lower, shuffles), p_higher: share(higher, shuffles) }
}

/// `|a and b| / |a or b|` of two lists of experts without repeats; 1 if both are empty.
pub fn jaccard(a: &[u32], b: &[u32]) -> f64 {
    let common = a.iter().filter(|e| b.contains(e)).count();
    let union = a.len() + b.len() - common;
    if union == 0 { 1.0 } else { common as f64 / union as f64 }
}

/// Every token with the next one of the same content and another form: at most N pairs. Panics if the lengths differ.
pub fn pairs_of_one_content(content_n: &[u32], form_n: &[u32]) -> Vec<(u32, u32)> {
    assert_eq!(content_n.len(), form_n.len(), "pairs_of_one_content: one content and one form per token");
    let mut last: BTreeMap<u32, usize> = BTreeMap::new();
    let mut pairs = Vec::new();
    for (j, (content, form)) in content_n.iter().zip(form_n).enumerate() {
        if let Some(i) = last.insert(*content, j)
            && form_n[i] != *form
        {
            pairs.push((i as u32, j as u32));
        }
    }
    pairs
}

/// Both labelings with ids renumbered from 0, tokens sorted by expert, and the two entropies, which no shuffle changes.
struct Table {
    /// Tokens of expert e are `offsets[e]..offsets[e + 1]` of the lists below.
    offsets: Vec<usize>,
    /// Label of each token, in expert order.
    labels: Vec<u32>,
    kinds: usize,
    expert_nats: f64,
    label_nats: f64,
}

impl Table {
    fn new(expert_n: &[u32], label_n: &[u32]) -> Self {
        assert_eq!(expert_n.len(), label_n.len(), "specialisation: one expert and one label per token");
        let (experts, expert_count) = renumber(expert_n);
        let (labels, kinds) = renumber(label_n);
        let mut order: Vec<usize> = (0..experts.len()).collect();
        order.sort_by_key(|&i| experts[i]);
        let sizes = histogram(&experts, expert_count);
        let mut offsets = vec![0];
        offsets.extend(sizes.iter().scan(0, |end, &n| {
            *end += n as usize;
            Some(*end)
        }));
        Self {
            offsets,
            expert_nats: entropy(&sizes, experts.len()),
            label_nats: entropy(&histogram(&labels, kinds), labels.len()),
            labels: order.into_iter().map(|i| labels[i]).collect(),
            kinds,
        }
    }

    /// `H(expert) + H(label) - H(expert, label)`, labels in expert order.
    fn nats(&self, labels: &[u32]) -> f64 {
        let n = labels.len();
        let mut count = vec![0u32; self.kinds];
        let mut joint = 0.0;
        for group in self.offsets.windows(2) {
            let group = &labels[group[0]..group[1]];
            group.iter().for_each(|&label| count[label as usize] += 1);
            for &label in group {
                joint += entropy_term(std::mem::take(&mut count[label as usize]), n);
            }
        }
        (self.expert_nats + self.label_nats - joint).max(0.0)
    }

    fn normalise(&self, nats: f64) -> f64 {
        if self.expert_nats <= 0.0 || self.label_nats <= 0.0 {
            return 0.0;
        }
        (2.0 * nats / (self.expert_nats + self.label_nats)).clamp(0.0, 1.0)
    }
}

/// Ids from 0 in ascending order of the given ones, and how many there are.
fn renumber(ids: &[u32]) -> (Vec<u32>, usize) {
    let mut known: Vec<u32> = ids.to_vec();
    known.sort_unstable();
    known.dedup();
    (ids.iter().map(|id| known.partition_point(|k| k < id) as u32).collect(), known.len())
}

fn histogram(ids: &[u32], kinds: usize) -> Vec<u32> {
    let mut count = vec![0; kinds];
    ids.iter().for_each(|&id| count[id as usize] += 1);
    count
}

fn entropy(counts: &[u32], n: usize) -> f64 {
    counts.iter().map(|&c| entropy_term(c, n)).sum()
}

fn entropy_term(count: u32, n: usize) -> f64 {
    if count == 0 {
        return 0.0;
    }
    let p = f64::from(count) / n as f64;
    -p * p.ln()
}

/// Fisher and Yates with the draws of (seed, shuffle).
fn shuffle(values: &mut [u32], seed: u64, shuffle: usize) {
    let Some(stream) = StepContext::training(seed, shuffle as u64, 0).stream(Purpose::Permutation) else { return };
    for i in (1..values.len()).rev() {
        let [high, low, ..] = stream.bits(i, 0);
        let draw = u128::from(u64::from(high) << 32 | u64::from(low));
        values.swap(i, ((draw * (i as u128 + 1)) >> 64) as usize);
    }
}

fn share(reached: usize, of: usize) -> f64 {
    (reached + 1) as f64 / (of + 1) as f64
}
