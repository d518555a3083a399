//! GShard's second choice and its two-pass queue: all first choices in token order, then all second choices.
//!
//! The second choice is skipped at random in training. Implementations differ in two ways that change who is kept: the
//! probability, and whether a skipped choice still takes its place in the expert's queue. Whether the second pass starts
//! after all first choices or after the kept ones never changes anything: if they differ, the expert is full. O(T E).
//! Sources: Lepikhin et al. 2020, algorithm 1; lingvo gshard_layers.py; mesh_tensorflow moe.py.

use crate::assignment::{Choices, NO_SLOT};
use crate::config::SecondChoice;
use crate::real::Real;

/// Which pairs are skipped: second choices that fail their draw `uniform(token)` on (0, 1).
pub fn skipped<S: Real>(
    choices: &Choices,
    gates_te: &[S],
    experts: usize,
    rule: SecondChoice,
    uniform: impl Fn(usize) -> f64,
) -> Vec<bool> {
    let mut skip = vec![false; choices.pairs()];
    for t in 0..choices.tokens() {
        let list = choices.of_token(t);
        if let [first, second] = list {
            let gate = |e: &u32| gates_te[t * experts + *e as usize].f64();
            let share = gate(second) / (gate(first) + gate(second));
            skip[choices.pair_range(t).start + 1] = keep_probability(rule, share) <= uniform(t);
        }
    }
    skip
}

/// Probability that a second choice with normalised gate `g2` is kept.
pub fn keep_probability(rule: SecondChoice, g2: f64) -> f64 {
    match rule {
        SecondChoice::All => 1.0,
        SecondChoice::Paper => (2.0 * g2).min(1.0),
        SecondChoice::Threshold(threshold) => (g2 / threshold).min(1.0),
    }
}

/// Whether a skipped choice keeps others behind it waiting.
pub fn skipped_takes_place(rule: SecondChoice) -> bool {
    matches!(rule, SecondChoice::Paper)
}

/// The queue at every expert.
#[derive(Debug, Clone, Copy)]
pub struct Queue {
    /// Paper: yes. Mesh, lingvo: no.
    pub skipped_takes_place: bool,
}

impl Queue {
    /// Slots in choice-major order; [`NO_SLOT`] for skipped pairs and from `capacity` on.
    pub fn slots(self, choices: &Choices, experts: usize, capacity: usize, skip: &[bool]) -> Vec<u32> {
        let mut next = vec![0usize; experts];
        let mut slots = vec![NO_SLOT; choices.pairs()];
        for choice in 0..choices.most_per_token() {
            for t in 0..choices.tokens() {
                let pairs = choices.pair_range(t);
                let pair = pairs.start + choice;
                if pair >= pairs.end || (skip[pair] && !self.skipped_takes_place) {
                    continue;
                }
                let place = &mut next[choices.experts[pair] as usize];
                if *place < capacity && !skip[pair] {
                    slots[pair] = *place as u32;
                }
                *place += 1;
            }
        }
        slots
    }
}
