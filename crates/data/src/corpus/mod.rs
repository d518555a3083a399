//! Corpora: files of text or tokens, split into training and validation, cut into rows.
//!
//! - plain text: one document per file; its tail is validation.
//! - JSON lines: one document per line; each goes to validation or not by the hash of its text, so the split survives reordering.
//!   Where the draw holds none back, the document that would have been next is.
//! - shards: tokens made earlier, memory mapped; the tail of each is validation.
//!
//! Documents are joined by eos into one run of tokens per source, and rows are windows of it.

mod text;
mod jsonl;
mod shards;
mod windows;
mod scored;
mod split;
mod tokenize;
pub(crate) mod foreign;

pub use jsonl::documents_of_jsonl;
pub use scored::ScoredWindows;
pub use shards::{ShardHeader, ShardReader, ShardWriter, TokenWidth};
pub use split::held_back;
pub(crate) use split::hold_back;
pub use text::{read_text, utf8};
pub use tokenize::{Tokenized, tokenize_files};
pub use windows::{TokenRun, WindowSource};

/// Training and validation parts of one source.
#[derive(Clone, Debug)]
pub struct SplitRun {
    /// What is trained on.
    pub train: TokenRun,
    /// What is held back.
    pub validation: TokenRun,
}
