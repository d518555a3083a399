//! Rows as windows of a run of tokens.
//!
//! With a bos, a row is bos and then `context - 1` tokens, and predicts `context` tokens; without, a row predicts all but its first. An
//! epoch visits every window once, in an order and with a phase (where the first window starts) of its own, both keyed by (seed, epoch):
//! nothing is kept but the number of the row. A run shorter than a row is one row, padded: a short file among long ones is trained on too.

use std::ops::Range;
use std::sync::Arc;

use super::shards::ShardReader;
use crate::loader::RowSource;
use crate::rng::{Permutation, SplitMix64};

/// A run of tokens, in memory or mapped; clones and slices share the storage.
#[derive(Clone, Debug)]
pub struct TokenRun {
    storage: Storage,
    range: Range<usize>,
}

#[derive(Clone, Debug)]
enum Storage {
    Memory(Arc<[u32]>),
    Shard(ShardReader),
}

impl TokenRun {
    /// Tokens in memory.
    pub fn from_ids(ids: Vec<u32>) -> Self {
        let range = 0..ids.len();
        Self { storage: Storage::Memory(ids.into()), range }
    }

    /// All tokens of a shard.
    pub fn from_shard(shard: ShardReader) -> Self {
        let range = 0..shard.len();
        Self { storage: Storage::Shard(shard), range }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The token at a position. Panics outside the run.
    pub fn get(&self, at: usize) -> u32 {
        assert!(at < self.len(), "TokenRun: position {at} of {}", self.len());
        match &self.storage {
            Storage::Memory(ids) => ids[self.range.start + at],
            Storage::Shard(shard) => shard.get(self.range.start + at),
        }
    }

    /// The tokens before a position, and those from it on. Panics beyond the end.
    pub fn split_at(&self, at: usize) -> (Self, Self) {
        assert!(at <= self.len(), "TokenRun: cannot split {} tokens at {at}", self.len());
        let middle = self.range.start + at;
        let part = |range| Self { storage: self.storage.clone(), range };
        (part(self.range.start..middle), part(middle..self.range.end))
    }
}

/// Shuffled rows cut from a run of tokens, epoch after epoch.
#[derive(Clone, Debug)]
pub struct WindowSource {
    run: TokenRun,
    context: usize,
    bos: Option<u32>,
    seed: u64,
}

impl WindowSource {
    /// Rows of `context` positions. A run that is too short for one is a single row with padding behind it; `None` where it has not
    /// even one token to predict.
    pub fn shuffled(run: TokenRun, context: usize, bos: Option<u32>, seed: u64) -> Option<Self> {
        let source = Self { run, context, bos, seed };
        (source.predicted() > 0).then_some(source)
    }

    /// Tokens that one row needs.
    pub fn needed(context: usize, bos: Option<u32>) -> usize {
        context + usize::from(bos.is_none())
    }

    /// Whether the run is too short for a whole row.
    pub fn is_short(&self) -> bool {
        self.predicted() < self.context
    }

    /// Rows of one epoch. Epochs of eight rows or more give up one row, so that the phase can take any value.
    pub fn rows(&self) -> u64 {
        match (self.predicted() / self.context) as u64 {
            0 => 1,
            rows if rows >= 8 => rows - 1,
            rows => rows,
        }
    }

    /// Tokens that some row predicts.
    fn predicted(&self) -> usize {
        self.run.len().saturating_sub(usize::from(self.bos.is_none()))
    }

    /// The first token that a row predicts.
    fn start(&self, row: u64) -> usize {
        let rows = self.rows();
        let mut epoch = SplitMix64::keyed(self.seed, 0x77_696e_646f_7773, row / rows);
        let slack = self.predicted().saturating_sub(rows as usize * self.context);
        let phase = epoch.below(slack + 1);
        let window = Permutation::new(rows, epoch.next_u64()).at(row % rows);
        phase + window as usize * self.context
    }
}

impl RowSource for WindowSource {
    fn rows_per_epoch(&self) -> Option<u64> {
        Some(self.rows())
    }

    fn fill(&self, row: u64, ids: &mut [u32], targets: &mut [u32]) {
        assert_eq!(ids.len(), self.context, "WindowSource: rows have {} positions", self.context);
        let (start, length) = (self.start(row), self.context.min(self.predicted()));
        match self.bos {
            Some(bos) => {
                for t in 0..length {
                    targets[t] = self.run.get(start + t);
                }
                ids[0] = bos;
                ids[1..length].copy_from_slice(&targets[..length - 1]);
            }
            None => {
                for t in 0..length {
                    ids[t] = self.run.get(start + t);
                    targets[t] = self.run.get(start + t + 1);
                }
            }
        }
    }
}
