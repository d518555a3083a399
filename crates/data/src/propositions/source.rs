//! Propositions as training rows and as evaluation items.
//!
//! Row number r of a source is a pure function of (configuration, r): the items of row r are drawn from the stream of r. A row holds
//! whole items, each from bos to eos; with `packed` as many as fit, with `padded` one. What is left of a row is padding, not counted.

use serde::{Deserialize, Serialize};

use super::formula::{Modality, Proposition};
use super::generate::{DEEPEST, Split, generate};
use crate::error::DataError;
use crate::loader::{IGNORED, RowSource};
use crate::tokenizer::Tokenizer;

/// How many items a row holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// As many whole items as fit.
    #[default]
    Packed,
    /// One item, then padding.
    Padded,
}

/// Which tokens count in the loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Counted {
    /// The worked answer and its eos.
    #[default]
    Answer,
    /// Question and answer.
    All,
}

/// A million questions are answered in hours.
const MOST_EVALUATION_ITEMS: usize = 1_000_000;

/// `[data.propositions]`: which items are drawn and how they are laid out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PropositionsConfig {
    /// Nesting depths of training items, each in 1..=3; the depths left out form the depth split.
    pub depths: Vec<usize>,
    /// Modalities to draw from.
    pub modalities: Vec<Modality>,
    /// How many items a row holds.
    pub packing: Packing,
    /// Items per evaluation split and depth.
    pub evaluation_items: usize,
}

impl Default for PropositionsConfig {
    fn default() -> Self {
        let (depths, modalities) = (vec![1, 2], Modality::ALL.to_vec());
        Self { depths, modalities, packing: Packing::Packed, evaluation_items: 128 }
    }
}

impl PropositionsConfig {
    /// Refuses lists from which nothing can be drawn.
    pub fn validate(&self) -> Result<(), DataError> {
        let error = |key: &str, found: String, expected: String| {
            Err(DataError::Config { key: format!("propositions.{key}"), found, expected })
        };
        if self.depths.is_empty() || self.depths.iter().any(|d| !(1..=DEEPEST).contains(d)) {
            return error(
                "depths",
                format!("{:?}", self.depths),
                format!("a list of depths, each from 1 to {DEEPEST}"),
            );
        }
        // Held-out forms cover belief and possibly in one connective each: any single modality still leaves five connectives.
        if self.modalities.is_empty() {
            return error("modalities", "[]".into(), "at least one of plain, negated, belief, possibly".into());
        }
        if self.evaluation_items > MOST_EVALUATION_ITEMS {
            let expected = format!(
                "at most {MOST_EVALUATION_ITEMS} per split and depth, all of which are made when the data is opened"
            );
            return error("evaluation_items", self.evaluation_items.to_string(), expected);
        }
        Ok(())
    }
}

/// Training (or validation) rows of propositions, drawn on the fly.
#[derive(Clone, Debug)]
pub struct PropositionsSource {
    config: PropositionsConfig,
    tokenizer: Tokenizer,
    context: usize,
    seed: u64,
    split: Split,
    counted: Counted,
}

impl PropositionsSource {
    /// Rows of `context` positions from the items of a split. Fails where an item of the deepest depth might not fit a row.
    pub fn new(
        config: PropositionsConfig,
        tokenizer: Tokenizer,
        context: usize,
        seed: u64,
        split: Split,
        counted: Counted,
    ) -> Result<Self, DataError> {
        config.validate()?;
        let source = Self { config, tokenizer, context, seed, split, counted };
        let longest = source.longest_item()?;
        if longest > context + 1 {
            return Err(DataError::Config {
                key: "context".into(),
                found: context.to_string(),
                expected: format!(
                    "an item of depth {} takes up to {longest} tokens, so at least {} (or fewer depths)",
                    source.config.depths.iter().max().unwrap_or(&0),
                    longest - 1
                ),
            });
        }
        Ok(source)
    }

    /// The items of a row, in order.
    pub fn items(&self, row: u64) -> Vec<Proposition> {
        self.packed(row).into_iter().map(|(item, _, _)| item).collect()
    }

    /// The longest of a sample of items of the deepest depth. An item longer still, should one be drawn, is passed over by `packed`.
    fn longest_item(&self) -> Result<usize, DataError> {
        let deepest = self.config.depths.iter().max().copied().unwrap_or(1);
        let mut longest = 0;
        for index in 0..64 {
            let item = generate(0, Split::Train, &[deepest], &self.config.depths, &self.config.modalities, index);
            longest = longest.max(tokenize_item(&self.tokenizer, &item)?.0.len());
        }
        Ok(longest)
    }

    /// Items with their ids and the length of the question.
    fn packed(&self, row: u64) -> Vec<(Proposition, Vec<u32>, usize)> {
        let mut items = Vec::new();
        let mut used = 0;
        // Items of a row: as many draws as fit, then up to four more for the space left at the end.
        for draw in 0..1024u64 {
            let config = &self.config;
            let index = row * 1024 + draw;
            let item = generate(self.seed, self.split, &config.depths, &config.depths, &config.modalities, index);
            let (ids, question) = tokenize_item(&self.tokenizer, &item).expect("built-in text can always be encoded");
            if used + ids.len() <= self.context + 1 {
                used += ids.len();
                items.push((item, ids, question));
                if self.config.packing == Packing::Padded {
                    break;
                }
            } else if draw as usize >= items.len() + 4 {
                break;
            }
        }
        items
    }
}

impl RowSource for PropositionsSource {
    fn rows_per_epoch(&self) -> Option<u64> {
        None
    }

    fn fill(&self, row: u64, ids: &mut [u32], targets: &mut [u32]) {
        let mut at = 0;
        for (_, item, question) in self.packed(row) {
            for (i, id) in item.iter().enumerate() {
                if at + i < ids.len() {
                    ids[at + i] = *id;
                }
                // Position i predicts token i + 1; the first token of an item is predicted by nobody.
                let counts = i > 0 && (self.counted == Counted::All || i >= question);
                if i > 0 && at + i - 1 < targets.len() {
                    targets[at + i - 1] = if counts { *id } else { IGNORED };
                }
            }
            at += item.len();
        }
    }
}

/// The ids of an item from bos to eos, and how many of them are the question (bos included).
pub fn tokenize_item(tokenizer: &Tokenizer, item: &Proposition) -> Result<(Vec<u32>, usize), DataError> {
    let mut ids = tokenizer.encode_prompt(&item.question())?;
    let question = ids.len();
    ids.extend(tokenizer.encode(&item.answer())?);
    ids.extend(tokenizer.eos());
    Ok((ids, question))
}

/// An item to be answered, with what it tests.
#[derive(Clone, Debug, PartialEq)]
pub struct EvaluationItem {
    /// What about it is new to the model.
    pub split: Split,
    /// Its nesting depth.
    pub depth: usize,
    /// The item.
    pub item: Proposition,
    /// bos and the question: what the model is given.
    pub prompt: Vec<u32>,
    /// The worked answer and eos: what it should write.
    pub answer: Vec<u32>,
}

/// The evaluation items of a configuration, split by split and depth by depth: the same for every seed of training, so that runs can
/// be compared.
pub fn evaluation_items(config: &PropositionsConfig, tokenizer: &Tokenizer) -> Result<Vec<EvaluationItem>, DataError> {
    config.validate()?;
    let mut items = Vec::new();
    for split in Split::EVALUATION {
        for depth in 1..=DEEPEST {
            if config.depths.contains(&depth) == (split == Split::Depth) {
                continue;
            }
            for index in 0..config.evaluation_items as u64 {
                let item = generate(EVALUATION_SEED, split, &[depth], &config.depths, &config.modalities, index);
                let (mut prompt, question) = tokenize_item(tokenizer, &item)?;
                let answer = prompt.split_off(question);
                items.push(EvaluationItem { split, depth, item, prompt, answer });
            }
        }
    }
    Ok(items)
}

const EVALUATION_SEED: u64 = 0x006d_6978_7475_7261;
