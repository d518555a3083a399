//! Batches: rows drawn in a fixed order, mixed over sources, made ahead of time off the training thread, resumable at the exact batch.
//!
//! A [`RowSource`] gives row number r as a pure function of r, so a position in the data is a handful of counters
//! ([`LoaderState`]). Rows of several sources are interleaved by [`Mixing`]; `dispersed` is the deficit scheduler (H3). The prefetch
//! thread sends every batch together with the state after it, and the loader reports the state of the batch that was handed out last:
//! batches made ahead but not handed out are made again after a resume.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::sampler::{Mixing, Scheduler};

/// The target of a position that is not counted in the loss.
pub const IGNORED: u32 = u32::MAX;

/// Rows of one source, each a pure function of its number.
pub trait RowSource: Send + Sync {
    /// Rows until the source repeats itself (in another order), or `None` where it never does.
    fn rows_per_epoch(&self) -> Option<u64>;

    /// Writes row number `row` (any number: epochs follow one another). `ids` comes filled with padding and `targets` with
    /// [`IGNORED`]; both have one entry per position of the context.
    fn fill(&self, row: u64, ids: &mut [u32], targets: &mut [u32]);
}

/// A batch: `batch` rows of `seq` positions, row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Token of every position.
    pub ids: Vec<u32>,
    /// The token that each position should predict, [`IGNORED`] where none is.
    pub targets: Vec<u32>,
    /// Rows.
    pub batch: usize,
    /// Positions per row.
    pub seq: usize,
    /// The source of every row.
    pub sources: Vec<u32>,
}

impl Batch {
    /// Positions whose target counts.
    pub fn counted(&self) -> usize {
        self.targets.iter().filter(|target| **target != IGNORED).count()
    }

    /// Positions, padding included: `batch * seq`.
    pub fn tokens(&self) -> usize {
        self.batch * self.seq
    }
}

/// A position in the data: everything that decides the next batch, given the same configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoaderState {
    /// Batches handed out.
    pub batches: u64,
    /// Rows drawn from each source.
    pub drawn: Vec<u64>,
    /// What the rows and their order depend on (files' contents, seed, batch, context), by key: a state only fits a loader that agrees.
    pub fingerprint: BTreeMap<String, String>,
}

/// What shapes the batches of a loader.
#[derive(Clone, Debug, PartialEq)]
pub struct LoaderOptions {
    /// Rows per batch.
    pub batch: usize,
    /// Positions per row.
    pub context: usize,
    /// The id that fills what a row leaves free.
    pub pad: u32,
    /// How the rows of several sources are interleaved.
    pub mixing: Mixing,
    /// Seed of [`Mixing::Random`].
    pub seed: u64,
    /// Batches made ahead on another thread; 0 makes each when asked.
    pub prefetch: usize,
    /// Told apart in [`LoaderState::fingerprint`]: anything else that changes what the rows hold, by key.
    pub identity: BTreeMap<String, String>,
}

/// A source and its share of the rows.
#[derive(Clone)]
pub struct WeightedSource {
    /// The rows.
    pub rows: Arc<dyn RowSource>,
    /// Its share, relative to the other sources' shares.
    pub share: u64,
}

/// The endless, resumable supply of training batches.
///
/// ```
/// use mixtura_data::{DataConfig, open};
/// let mut one = open(&DataConfig::default()).unwrap().train;
/// let mut other = open(&DataConfig::default()).unwrap().train;
/// one.next_batch();
/// other.restore(&one.state()).unwrap();
/// assert_eq!(one.next_batch(), other.next_batch());
/// ```
pub struct Loader {
    maker: BatchMaker,
    prefetch: usize,
    state: LoaderState,
    ahead: Option<Ahead>,
}

/// The thread that makes batches ahead, and the channel they come through.
struct Ahead {
    receiver: Receiver<(Batch, LoaderState)>,
    thread: JoinHandle<()>,
}

impl Loader {
    /// A loader at the start of its data. Panics without sources, shares, rows or positions.
    pub fn new(sources: Vec<WeightedSource>, options: LoaderOptions) -> Self {
        assert!(!sources.is_empty() && sources.iter().all(|s| s.share > 0), "Loader: every source needs a share");
        assert!(options.batch > 0 && options.context > 0, "Loader: batches of no rows or no positions");
        let shares: Vec<u64> = sources.iter().map(|s| s.share).collect();
        let mut fingerprint = options.identity.clone();
        fingerprint.extend([
            ("data.batch".to_string(), options.batch.to_string()),
            ("data.context".to_string(), options.context.to_string()),
            ("data.mixing".to_string(), format!("{:?}", options.mixing).to_lowercase()),
            ("data.seed".to_string(), options.seed.to_string()),
            ("shares of the sources".to_string(), format!("{shares:?}")),
        ]);
        let state = LoaderState { batches: 0, drawn: vec![0; sources.len()], fingerprint };
        let prefetch = options.prefetch;
        Self { maker: BatchMaker { sources: sources.into(), options: Arc::new(options) }, prefetch, state, ahead: None }
    }

    /// The next batch.
    pub fn next_batch(&mut self) -> Batch {
        let (batch, after) = if self.prefetch == 0 {
            self.maker.make(&self.state)
        } else {
            let ahead = self.ahead.get_or_insert_with(|| self.maker.start(self.state.clone(), self.prefetch));
            match ahead.receiver.recv() {
                Ok(made) => made,
                Err(_) => {
                    // The thread only ends early by a panic: it is passed on to whoever asked for the batch.
                    let thread = self.ahead.take().expect("a receiver belongs to a thread").thread;
                    match thread.join() {
                        Err(panic) => std::panic::resume_unwind(panic),
                        Ok(()) => unreachable!("the prefetch thread runs until its receiver is dropped"),
                    }
                }
            }
        };
        self.state = after;
        batch
    }

    /// The position after the batches handed out so far.
    pub fn state(&self) -> LoaderState {
        self.state.clone()
    }

    /// Continues from a saved position, exactly; refuses one that belongs to other data.
    pub fn restore(&mut self, state: &LoaderState) -> Result<(), DataError> {
        let refuse = |reason: String| Err(DataError::State { reason });
        if state.fingerprint != self.state.fingerprint {
            return refuse(differences(&state.fingerprint, &self.state.fingerprint));
        }
        let rows = state.drawn.iter().try_fold(0u64, |sum, drawn| sum.checked_add(*drawn));
        let expected = state.batches.checked_mul(self.maker.options.batch as u64);
        if state.drawn.len() != self.state.drawn.len() || rows.is_none() || rows != expected {
            return refuse(format!("{} batches cannot have drawn {:?} rows", state.batches, state.drawn));
        }
        self.ahead = None;
        self.state = state.clone();
        Ok(())
    }

    /// Rows per batch.
    pub fn batch(&self) -> usize {
        self.maker.options.batch
    }

    /// Positions per row.
    pub fn context(&self) -> usize {
        self.maker.options.context
    }

    /// How many sources are mixed.
    pub fn sources(&self) -> usize {
        self.maker.sources.len()
    }

    /// Rows of one pass over all finite sources, if there are any.
    pub fn rows_per_epoch(&self) -> Option<u64> {
        let rows: Vec<u64> = self.maker.sources.iter().filter_map(|s| s.rows.rows_per_epoch()).collect();
        (!rows.is_empty()).then(|| rows.iter().sum())
    }
}

/// Every key with another value, in the words of an error.
fn differences(was: &BTreeMap<String, String>, is: &BTreeMap<String, String>) -> String {
    let keys: BTreeSet<&String> = was.keys().chain(is.keys()).collect();
    let of = |map: &BTreeMap<String, String>, key| map.get(key).map_or("not there".to_string(), String::clone);
    let differing = keys.into_iter().filter(|key| was.get(*key) != is.get(*key));
    let words = differing.map(|key| format!("{key} was {} when it was saved and is {} now", of(was, key), of(is, key)));
    words.collect::<Vec<_>>().join("; ")
}

/// Makes the batch that follows a state: a pure function, called on either thread.
#[derive(Clone)]
struct BatchMaker {
    sources: Arc<[WeightedSource]>,
    options: Arc<LoaderOptions>,
}

impl BatchMaker {
    fn make(&self, state: &LoaderState) -> (Batch, LoaderState) {
        let LoaderOptions { batch, context, pad, mixing, seed, .. } = *self.options;
        let shares: Vec<u64> = self.sources.iter().map(|s| s.share).collect();
        let mut scheduler = Scheduler::resumed(mixing, seed, &shares, &state.drawn);
        let mut made = Batch {
            ids: vec![pad; batch * context],
            targets: vec![IGNORED; batch * context],
            batch,
            seq: context,
            sources: scheduler.next_batch(batch).into_iter().map(|s| s as u32).collect(),
        };
        let mut next_row = state.drawn.clone();
        let rows = made.ids.chunks_exact_mut(context).zip(made.targets.chunks_exact_mut(context));
        for (source, (ids, targets)) in made.sources.iter().map(|s| *s as usize).zip(rows) {
            self.sources[source].rows.fill(next_row[source], ids, targets);
            next_row[source] += 1;
        }
        let fingerprint = state.fingerprint.clone();
        (made, LoaderState { batches: state.batches + 1, drawn: next_row, fingerprint })
    }

    fn start(&self, from: LoaderState, depth: usize) -> Ahead {
        let (sender, receiver) = sync_channel(depth);
        let maker = self.clone();
        let run = move || {
            let mut state = from;
            loop {
                let (batch, after) = maker.make(&state);
                // The receiver is gone when the loader was dropped or restored elsewhere.
                if sender.send((batch, after.clone())).is_err() {
                    return;
                }
                state = after;
            }
        };
        let thread = std::thread::Builder::new().name("mixtura-data".into()).spawn(run);
        Ahead { receiver, thread: thread.expect("the system can start one more thread") }
    }
}
