//! The generator of the specification (H2), draw for draw, for checking golden vectors.
//!
//! One SplitMix64 stream; per item: connective, target truth, pair of atom truths among those that give the target (in the order FF,
//! FT, TF, TT), first subject, second subject among the others, a wrong count per false atom, modality. Every draw is a remainder.
//! The facts are an argument, because a golden-vector file brings its own.

use super::formula::{Connective, Modality, Verdict};
use super::world::number_word;
use crate::rng::SplitMix64;

/// An item as the specification stores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecifiedItem {
    /// The sentence.
    pub text: String,
    /// Its connective.
    pub connective: Connective,
    /// How it is put forward.
    pub modality: Modality,
    /// Subject, claimed count and truth of the two atoms.
    pub atoms: [(String, u32, bool); 2],
    /// Truth of the body.
    pub body_truth: bool,
    /// The verdict.
    pub label: Verdict,
}

/// An endless stream of specified items.
///
/// ```
/// use mixtura_data::propositions::SpecifiedItems;
/// let facts = [("Mercury", 0), ("Venus", 0), ("Earth", 1), ("Mars", 2)].map(|(name, count)| (name.to_string(), count));
/// let first = SpecifiedItems::new(1, facts.to_vec()).next().unwrap();
/// assert!(first.text.starts_with("It is not the case that: neither Mars has exactly three natural satellites"));
/// ```
#[derive(Clone, Debug)]
pub struct SpecifiedItems {
    rng: SplitMix64,
    facts: Vec<(String, u32)>,
    counts: Vec<u32>,
}

impl SpecifiedItems {
    /// The stream of a seed over facts (name, number of natural satellites). Claims range over 0..=3, or up to the largest fact.
    /// Panics with fewer than two facts or a fact above twenty.
    pub fn new(seed: u64, facts: Vec<(String, u32)>) -> Self {
        assert!(facts.len() >= 2, "SpecifiedItems: two subjects are needed, {} given", facts.len());
        let largest = facts.iter().map(|(_, count)| *count).max().unwrap_or(0).max(3);
        assert!(largest <= 20, "SpecifiedItems: counts above twenty have no word, {largest} given");
        Self { rng: SplitMix64::new(seed), facts, counts: (0..=largest).collect() }
    }

    /// How many different bodies there are: ordered pairs of subjects x counts x connectives.
    pub fn distinct_bodies(&self) -> usize {
        self.facts.len() * (self.facts.len() - 1) * self.counts.len().pow(2) * Connective::ALL.len()
    }

    fn claim(&mut self, subject: usize, truth: bool) -> (String, u32, bool) {
        let (name, fact) = self.facts[subject].clone();
        if truth {
            return (name, fact, true);
        }
        let wrong: Vec<u32> = self.counts.iter().copied().filter(|count| *count != fact).collect();
        (name, *self.rng.pick(&wrong), false)
    }
}

impl Iterator for SpecifiedItems {
    type Item = SpecifiedItem;

    fn next(&mut self) -> Option<SpecifiedItem> {
        let connective = *self.rng.pick(&Connective::ALL);
        let body_truth = self.rng.below(2) == 1;
        let (left_truth, right_truth) = *self.rng.pick(&connective.operands_giving(body_truth));
        let left = self.rng.below(self.facts.len());
        let others: Vec<usize> = (0..self.facts.len()).filter(|i| *i != left).collect();
        let right = *self.rng.pick(&others);
        let atoms = [self.claim(left, left_truth), self.claim(right, right_truth)];
        let modality = *self.rng.pick(&Modality::ALL);

        let [before, between, after] = connective.phrases();
        let [left, right] = atoms.each_ref().map(|(name, count, _)| {
            let plural = if *count == 1 { "" } else { "s" };
            format!("{name} has exactly {} natural satellite{plural}", number_word(*count))
        });
        let text = format!("{}{before}{left}{between}{right}{after}.", modality.phrase());
        Some(SpecifiedItem { text, connective, modality, atoms, body_truth, label: modality.verdict(body_truth) })
    }
}
