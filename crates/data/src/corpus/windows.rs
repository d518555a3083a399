//! Rows as windows of a run of tokens.
//!
//! With a bos, a row is bos and then `context - 1` tokens, and predicts `context` tokens; without, a row predicts all but its first. An
//! epoch visits every window once, in an order and with a phase (where the first window starts) of its own, both keyed by (seed, epoch):
//! nothing is kept but the number of the row.

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

/// Rows cut from a run of tokens.
#[derive(Clone, Debug)]
pub struct WindowSource {
    run: TokenRun,
    context: usize,
    bos: Option<u32>,
    order: Order,
}

#[derive(Clone, Copy, Debug)]
enum Order {
    Shuffled { seed: u64 },
    InOrder,
}

impl WindowSource {
    /// Shuffled rows, epoch after epoch. `None` where the run is too short for a row.
    pub fn shuffled(run: TokenRun, context: usize, bos: Option<u32>, seed: u64) -> Option<Self> {
        Self::new(run, context, bos, Order::Shuffled { seed })
    }

    /// Rows in the order of the text, always the same. `None` where the run is too short for a row.
    pub fn in_order(run: TokenRun, context: usize, bos: Option<u32>) -> Option<Self> {
        Self::new(run, context, bos, Order::InOrder)
    }

    /// Tokens that one row needs.
    pub fn needed(context: usize, bos: Option<u32>) -> usize {
        context + usize::from(bos.is_none())
    }

    /// Rows of one epoch. Shuffled epochs of eight rows or more give up one row, so that the phase can take any value.
    pub fn rows(&self) -> u64 {
        let rows = (self.predicted() / self.context) as u64;
        match self.order {
            Order::Shuffled { .. } if rows >= 8 => rows - 1,
            _ => rows,
        }
    }

    fn new(run: TokenRun, context: usize, bos: Option<u32>, order: Order) -> Option<Self> {
        (run.len() >= Self::needed(context, bos)).then_some(Self { run, context, bos, order })
    }

    /// Tokens that some row predicts.
    fn predicted(&self) -> usize {
        self.run.len() - usize::from(self.bos.is_none())
    }

    /// The first token that a row predicts.
    fn start(&self, row: u64) -> usize {
        let rows = self.rows();
        match self.order {
            Order::InOrder => (row % rows) as usize * self.context,
            Order::Shuffled { seed } => {
                let mut epoch = SplitMix64::keyed(seed, 0x77_696e_646f_7773, row / rows);
                let slack = self.predicted() - rows as usize * self.context;
                let phase = epoch.below(slack + 1);
                let window = Permutation::new(rows, epoch.next_u64()).at(row % rows);
                phase + window as usize * self.context
            }
        }
    }
}

impl RowSource for WindowSource {
    fn rows_per_epoch(&self) -> Option<u64> {
        Some(self.rows())
    }

    fn fill(&self, row: u64, ids: &mut [u32], targets: &mut [u32]) {
        assert_eq!(ids.len(), self.context, "WindowSource: rows have {} positions", self.context);
        let start = self.start(row);
        match self.bos {
            Some(bos) => {
                for t in 0..self.context {
                    targets[t] = self.run.get(start + t);
                }
                ids[0] = bos;
                ids[1..].copy_from_slice(&targets[..self.context - 1]);
            }
            None => {
                for t in 0..self.context {
                    ids[t] = self.run.get(start + t);
                    targets[t] = self.run.get(start + t + 1);
                }
            }
        }
    }
}
