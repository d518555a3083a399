//! Tokenizers, corpora, the propositions world, and resumable batches.
//!
//! [`open`] turns a [`DataConfig`] into a [`Dataset`]: a [`Tokenizer`], a [`Loader`] of training batches that resumes at the exact batch,
//! a [`ValidationSet`] that is the same on every pass, and for propositions the items to ask. Nothing here knows of models or tensors:
//! a [`Batch`] is ids and targets.
//!
//! ```
//! use mixtura_data::{DataConfig, open};
//! let mut data = open(&DataConfig { batch: 2, context: 192, ..DataConfig::default() })?;
//! let batch = data.train.next_batch();
//! println!("{}", data.tokenizer.decode(&batch.ids[..batch.seq]));
//! # Ok::<(), mixtura_data::DataError>(())
//! ```

mod config;
mod files;
mod tokenizer;
pub mod propositions;
pub mod corpus;
mod loader;
mod sampler;
mod validation;
pub mod rng;
mod error;

pub use config::{
    DataConfig, DataKind, Dataset, EvaluationWindows, HeldBack, SourceConfig, TokenizerChoice, kind_of, open,
    open_file_for_evaluation, open_for_evaluation, reopen,
};
pub use error::DataError;
pub use files::FileContent;
pub use loader::{Batch, IGNORED, Loader, LoaderOptions, LoaderState, RowSource, WeightedSource};
pub use sampler::{Mixing, Scheduler};
pub use tokenizer::{BOS, EOS, PAD, TextStream, Tokenizer};
pub use validation::ValidationSet;
