//! Windows that score a run of tokens: every token that has something before it is predicted, and counted once.
//!
//! ```text
//! stride = context    windows follow each other; one of C positions predicts C tokens          |--------|--------|---|
//! stride < context    windows of C tokens overlap; of their C - 1 predictions, those of tokens |--------|
//!                     that no earlier window predicted count (the rest is context)                 |----+++|
//! ```
//!
//! With a bos every window is bos and then text, as rows of training are, so the first token is predicted too; without, the first
//! token of a run is context only. The last window is as long as what is left: nothing is padded and nothing left out. Without a bos
//! and with a smaller stride these are the windows of the sliding loop that users of transformers write (`max_length`, `stride`).

use super::windows::TokenRun;
use crate::loader::IGNORED;

/// Which tokens a window reads and which it predicts.
///
/// ```
/// use mixtura_data::corpus::{ScoredWindows, TokenRun};
/// let run = || TokenRun::from_ids((0..10).collect());
/// // Ten tokens behind a bos, four positions a window: 4 + 4 + 2 predictions.
/// let windows = ScoredWindows::new(run(), 4, 4, Some(99)).unwrap();
/// assert_eq!((windows.whole(), windows.tail()), (2, Some(2)));
/// // Overlapping by half: windows of four tokens, 0..4, 2..6, 4..8, 6..10.
/// let windows = ScoredWindows::new(run(), 4, 2, None).unwrap();
/// assert_eq!((windows.positions(), windows.whole(), windows.tail()), (3, 4, None));
/// ```
#[derive(Clone, Debug)]
pub struct ScoredWindows {
    run: TokenRun,
    bos: Option<u32>,
    stride: usize,
    positions: usize,
}

impl ScoredWindows {
    /// Windows over `run`. `None` where nothing can be predicted: no token, or only one and no bos.
    ///
    /// # Panics
    /// Unless `1 <= stride <= context` and `context >= 2`.
    pub fn new(run: TokenRun, context: usize, stride: usize, bos: Option<u32>) -> Option<Self> {
        assert!(
            context >= 2 && (1..=context).contains(&stride),
            "ScoredWindows: windows of {context} positions cannot advance by {stride}"
        );
        let positions = if stride < context { context - 1 } else { context };
        let windows = Self { run, bos, stride, positions };
        (windows.predictions() > 0).then_some(windows)
    }

    /// Tokens that a run must have so that one can be predicted.
    pub fn needed(bos: Option<u32>) -> usize {
        if bos.is_some() { 1 } else { 2 }
    }

    /// Tokens that are predicted, each once.
    pub fn predictions(&self) -> usize {
        self.run.len().saturating_sub(usize::from(self.bos.is_none()))
    }

    /// Positions of a whole window.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Whole windows.
    pub fn whole(&self) -> usize {
        self.predictions().checked_sub(self.positions).map_or(0, |rest| rest / self.stride + 1)
    }

    /// Positions of the shorter window at the end, if tokens are left for one.
    pub fn tail(&self) -> Option<usize> {
        let whole = self.whole();
        let reached = if whole == 0 { 0 } else { (whole - 1) * self.stride + self.positions };
        (reached < self.predictions()).then(|| self.predictions() - whole * self.stride)
    }

    /// Writes window number `window`; a target that an earlier window counted is [`IGNORED`].
    ///
    /// # Panics
    /// If the slices are not as long as that window.
    pub fn fill(&self, window: usize, ids: &mut [u32], targets: &mut [u32]) {
        let start = window * self.stride;
        let length = if window < self.whole() { Some(self.positions) } else { self.tail() };
        assert_eq!((Some(ids.len()), ids.len()), (length, targets.len()), "ScoredWindows: length of window {window}");
        let behind = usize::from(self.bos.is_none());
        for t in 0..ids.len() {
            targets[t] = self.run.get(start + t + behind);
            ids[t] = match (t, self.bos) {
                (0, Some(bos)) => bos,
                (t, Some(_)) => self.run.get(start + t - 1),
                (t, None) => self.run.get(start + t),
            };
        }
        let counted_before = if window == 0 { 0 } else { self.positions - self.stride };
        targets[..counted_before].fill(IGNORED);
    }
}
