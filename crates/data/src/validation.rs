//! Batches that measure: the held-back part of a run's data, or a file given to `eval`. Every pass gives the same batches, in the
//! order of the text, and every token counts.
//!
//! Whole windows of all sources come first, `data.batch` of them a batch; then the shorter one at the end of each source, a batch of
//! its own, so that nothing is padded.

use std::sync::Arc;

use crate::config::{DataConfig, EvaluationWindows};
use crate::corpus::{ScoredWindows, TokenRun};
use crate::error::DataError;
use crate::loader::{Batch, IGNORED, RowSource};
use crate::tokenizer::Tokenizer;

/// The held-back rows: every pass gives the same batches, in the order of the text.
#[derive(Clone)]
pub struct ValidationSet {
    parts: Vec<Part>,
    batch: usize,
    /// Positions of a whole row.
    positions: usize,
    pad: u32,
    /// Batches of a pass at most; 0 for all.
    limit: usize,
}

/// Rows of one source, numbered from 0; all but a tail have as many positions as the set.
#[derive(Clone)]
struct Part {
    rows: Rows,
    whole: u64,
    tail: Option<usize>,
}

#[derive(Clone)]
enum Rows {
    Made(Arc<dyn RowSource>),
    Windows(ScoredWindows),
}

impl Rows {
    fn fill(&self, row: u64, ids: &mut [u32], targets: &mut [u32]) {
        match self {
            Self::Made(rows) => rows.fill(row, ids, targets),
            Self::Windows(windows) => windows.fill(row as usize, ids, targets),
        }
    }
}

impl ValidationSet {
    /// One pass, lazily. A batch may have fewer rows than `data.batch`, and the last of a source fewer positions.
    pub fn batches(&self) -> impl Iterator<Item = Batch> + '_ {
        let whole: u64 = self.parts.iter().map(|part| part.whole).sum();
        let batches = whole.div_ceil(self.batch as u64);
        let limit = if self.limit == 0 { usize::MAX } else { self.limit };
        let of_whole = (0..batches).map(move |number| {
            let first = number * self.batch as u64;
            self.rows_from(first, (whole - first).min(self.batch as u64) as usize)
        });
        let of_tails = self.parts.iter().enumerate().filter_map(move |(source, part)| {
            let mut tail = self.empty(1, part.tail?);
            part.rows.fill(part.whole, &mut tail.ids, &mut tail.targets);
            tail.sources.push(source as u32);
            Some(tail)
        });
        of_whole.chain(of_tails).take(limit)
    }

    /// Rows held back, the shorter ones included.
    pub fn rows(&self) -> u64 {
        self.parts.iter().map(|part| part.whole + u64::from(part.tail.is_some())).sum()
    }

    /// Bytes of text that a batch's counted targets stand for: for bits per byte.
    pub fn target_bytes(batch: &Batch, tokenizer: &Tokenizer) -> u64 {
        let lengths = tokenizer.byte_lengths();
        let counted = batch.targets.iter().filter(|target| **target != IGNORED);
        counted.map(|target| u64::from(lengths[*target as usize])).sum()
    }

    /// Whether nothing was held back.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Nothing held back.
    pub(crate) fn none(config: &DataConfig) -> Self {
        Self { parts: Vec::new(), batch: config.batch, positions: config.context, pad: 0, limit: 0 }
    }

    /// `rows` rows that a source makes, padded with `pad`.
    pub(crate) fn of_rows(config: &DataConfig, rows: Arc<dyn RowSource>, batches: usize, pad: u32) -> Self {
        let part = Part { rows: Rows::Made(rows), whole: (batches * config.batch) as u64, tail: None };
        Self { parts: vec![part], pad, limit: batches, ..Self::none(config) }
    }

    /// Windows over runs of tokens, `limit` batches of them at most (0 for all). `what` names the runs where nothing can be predicted.
    pub(crate) fn of_runs(
        windows: EvaluationWindows,
        limit: usize,
        runs: Vec<TokenRun>,
        tokenizer: &Tokenizer,
        what: impl FnOnce() -> (String, &'static str),
    ) -> Result<Self, DataError> {
        let EvaluationWindows { context, stride, batch } = windows;
        let tokens: u64 = runs.iter().map(|run| run.len() as u64).sum();
        let parts = runs.into_iter().filter_map(|run| {
            let windows = ScoredWindows::new(run, context, stride, tokenizer.bos())?;
            Some(Part { whole: windows.whole() as u64, tail: windows.tail(), rows: Rows::Windows(windows) })
        });
        let parts: Vec<Part> = parts.collect();
        let Some(Part { rows: Rows::Windows(windows), .. }) = parts.first() else {
            let needed = ScoredWindows::needed(tokenizer.bos()) as u64;
            let (name, help) = what();
            return Err(DataError::NothingToPredict { name, tokens, needed, help });
        };
        let positions = windows.positions();
        Ok(Self { parts, positions, limit, batch, pad: 0 })
    }

    fn empty(&self, rows: usize, positions: usize) -> Batch {
        let (ids, targets) = (vec![self.pad; rows * positions], vec![IGNORED; rows * positions]);
        Batch { ids, targets, batch: rows, seq: positions, sources: Vec::with_capacity(rows) }
    }

    fn rows_from(&self, first: u64, count: usize) -> Batch {
        let mut made = self.empty(count, self.positions);
        let rows = made.ids.chunks_exact_mut(self.positions).zip(made.targets.chunks_exact_mut(self.positions));
        for (row, (ids, targets)) in (first..).zip(rows) {
            let (mut source, mut row) = (0, row);
            while row >= self.parts[source].whole {
                row -= self.parts[source].whole;
                source += 1;
            }
            self.parts[source].rows.fill(row, ids, targets);
            made.sources.push(source as u32);
        }
        made
    }
}
