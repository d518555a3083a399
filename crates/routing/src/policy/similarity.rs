//! Similarity-aware token selection (SATS): a full expert keeps confident tokens that differ from those it already keeps, so
//! that what it drops is represented by what it keeps.
//!
//! First the highest gate, then repeatedly the largest `gate (1 - max cosine to a kept token) / 2`; ties to the lower token.
//! SATS-D drops the rest. SATS-R offers them, most confident first, to their next experts with room.
//! O(n C d) per full expert with n candidates; SATS-R adds O(E log E) per dropped pair.

use crate::assignment::{Choices, NO_SLOT};
use crate::select::order_descending;

/// Tokens and how much each expert wants them.
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a> {
    /// `[T, E]`.
    pub gates_te: &'a [f64],
    /// E.
    pub experts: usize,
    /// `[T, d]`.
    pub x_td: &'a [f64],
}

/// Choices after offering dropped pairs elsewhere.
#[derive(Debug, Clone, PartialEq)]
pub struct Redirected {
    /// The choices, redirected pairs at their new expert.
    pub choices: Choices,
    /// Slot of every pair.
    pub slots: Vec<u32>,
    /// (token, new expert) in the order they were placed.
    pub moved: Vec<(u32, u32)>,
}

impl Tokens<'_> {
    /// SATS-D: slots of the kept pairs, numbered in token order.
    pub fn slots(&self, choices: &Choices, capacity: usize) -> Vec<u32> {
        let mut wanted: Vec<Vec<(usize, usize)>> = vec![Vec::new(); self.experts];
        for t in 0..choices.tokens() {
            choices.pair_range(t).for_each(|pair| wanted[choices.experts[pair] as usize].push((t, pair)));
        }
        let mut slots = vec![NO_SLOT; choices.pairs()];
        for (e, wanted) in wanted.iter().enumerate() {
            let tokens: Vec<usize> = wanted.iter().map(|(t, _)| *t).collect();
            let mut kept = self.keep(&tokens, e as u32, capacity);
            kept.sort_unstable();
            for (slot, i) in kept.into_iter().enumerate() {
                slots[wanted[i].1] = slot as u32;
            }
        }
        slots
    }

    /// SATS-R.
    pub fn redirect(&self, choices: &Choices, capacity: usize) -> Redirected {
        let mut out = Redirected { choices: choices.clone(), slots: self.slots(choices, capacity), moved: Vec::new() };
        let mut load = vec![0usize; self.experts];
        for (pair, &e) in choices.experts.iter().enumerate() {
            load[e as usize] += usize::from(out.slots[pair] != NO_SLOT);
        }
        let lost: Vec<(usize, usize)> = (0..choices.tokens())
            .flat_map(|t| choices.pair_range(t).map(move |pair| (t, pair)))
            .filter(|(_, pair)| out.slots[*pair] == NO_SLOT)
            .collect();
        let confidence: Vec<f64> = lost.iter().map(|&(t, pair)| self.gate(t, choices.experts[pair])).collect();
        for i in order_descending(&confidence) {
            let (t, pair) = lost[i as usize];
            let row = &self.gates_te[t * self.experts..(t + 1) * self.experts];
            let taken = &out.choices.experts[choices.pair_range(t)];
            let next = order_descending(row).into_iter().find(|e| load[*e as usize] < capacity && !taken.contains(e));
            if let Some(e) = next {
                out.choices.experts[pair] = e;
                out.slots[pair] = load[e as usize] as u32;
                load[e as usize] += 1;
                out.moved.push((t as u32, e));
            }
        }
        out
    }

    /// Which of `tokens` expert `e` keeps, as indices into `tokens`, in the order of keeping.
    pub fn keep(&self, tokens: &[usize], e: u32, capacity: usize) -> Vec<usize> {
        if tokens.len() <= capacity {
            return (0..tokens.len()).collect();
        }
        let mut kept: Vec<usize> = Vec::with_capacity(capacity);
        // Largest cosine of each candidate to anything kept; -1 makes the first pick the highest gate.
        let mut nearest = vec![-1.0f64; tokens.len()];
        let mut taken = vec![false; tokens.len()];
        while kept.len() < capacity {
            let mut best: Option<(f64, usize)> = None;
            for i in (0..tokens.len()).filter(|i| !taken[*i]) {
                let score = self.gate(tokens[i], e) * (1.0 - nearest[i]) / 2.0;
                if best.is_none_or(|(b, _)| score > b) {
                    best = Some((score, i));
                }
            }
            let Some((_, chosen)) = best else { break };
            kept.push(chosen);
            taken[chosen] = true;
            for i in 0..tokens.len() {
                nearest[i] = nearest[i].max(self.cosine(tokens[i], tokens[chosen]));
            }
        }
        kept
    }

    fn gate(&self, t: usize, e: u32) -> f64 {
        self.gates_te[t * self.experts + e as usize]
    }

    fn cosine(&self, a: usize, b: usize) -> f64 {
        let width = self.x_td.len() / (self.gates_te.len() / self.experts).max(1);
        let (x, y) = (&self.x_td[a * width..(a + 1) * width], &self.x_td[b * width..(b + 1) * width]);
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(a, b)| a * b).sum::<f64>();
        let norms = (dot(x, x) * dot(y, y)).sqrt();
        if norms == 0.0 { 0.0 } else { dot(x, y) / norms }
    }
}

/// Fuzzy c-means membership of every token to every prototype: `d2^(-1/(m-1))`, normalised; `[T, E]`.
///
/// 1e-9 keeps a token that sits on a prototype defined. Its logarithm is a router logit, see [`crate::scorers::fuzzy_logits`].
pub fn fuzzy_membership(x_td: &[f64], prototypes_ed: &[f64], width: usize, fuzzifier: f64) -> Vec<f64> {
    let experts = prototypes_ed.len() / width.max(1);
    let logits = crate::scorers::fuzzy_logits(x_td, prototypes_ed, width, fuzzifier);
    let mut out = vec![0.0; logits.len()];
    for (row, probs) in logits.chunks_exact(experts.max(1)).zip(out.chunks_exact_mut(experts.max(1))) {
        crate::activation::softmax(row, probs);
    }
    out
}
