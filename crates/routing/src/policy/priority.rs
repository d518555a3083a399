//! Who gets a slot when an expert is full, by a key instead of by position: random token selection, scores, batch priority.
//!
//! None of these is causal: whether a token is evicted depends on who else, later tokens included, wants the same expert.

use crate::assignment::{Choices, NO_SLOT};
use crate::select::order_descending;

/// Every expert keeps its `capacity` largest keys (ties: lower token); slots are then numbered in pair order. O(pairs + E):
/// a full expert's list is partitioned at its capacity, not sorted.
pub fn slots_by_key(choices: &Choices, experts: usize, capacity: usize, key: impl Fn(usize, u32) -> f64) -> Vec<u32> {
    let mut wanted: Vec<Vec<(f64, u32)>> = vec![Vec::new(); experts];
    for t in 0..choices.tokens() {
        for pair in choices.pair_range(t) {
            let e = choices.experts[pair];
            wanted[e as usize].push((key(t, e), pair as u32));
        }
    }
    let mut slots = vec![NO_SLOT; choices.pairs()];
    for list in &mut wanted {
        if list.len() > capacity && capacity > 0 {
            list.select_nth_unstable_by(capacity - 1, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        }
        list.truncate(capacity);
        // Any number but NO_SLOT: the pass below gives them out.
        list.iter().for_each(|&(_, pair)| slots[pair as usize] = 0);
    }
    let mut next = vec![0u32; experts];
    for (slot, &e) in slots.iter_mut().zip(&choices.experts).filter(|(slot, _)| **slot != NO_SLOT) {
        *slot = next[e as usize];
        next[e as usize] += 1;
    }
    slots
}

/// Tokens by descending priority, the largest of a token's weights or their sum; stable. O(pairs + T log T).
pub fn batch_order(choices: &Choices, weight: impl Fn(usize, u32) -> f64, sum: bool) -> Vec<u32> {
    let priority: Vec<f64> = (0..choices.tokens())
        .map(|t| {
            let weights = choices.of_token(t).iter().map(|&e| weight(t, e));
            if sum { weights.sum() } else { weights.fold(f64::NEG_INFINITY, f64::max) }
        })
        .collect();
    order_descending(&priority)
}

/// Choice-major slots with tokens in the given order.
pub fn slots_in_order(choices: &Choices, experts: usize, capacity: usize, order: &[u32]) -> Vec<u32> {
    let mut next = vec![0usize; experts];
    let mut slots = vec![NO_SLOT; choices.pairs()];
    for choice in 0..choices.most_per_token() {
        for &t in order {
            let pairs = choices.pair_range(t as usize);
            let pair = pairs.start + choice;
            if pair < pairs.end {
                let place = &mut next[choices.experts[pair] as usize];
                if *place < capacity {
                    slots[pair] = *place as u32;
                }
                *place += 1;
            }
        }
    }
    slots
}
