//! Corpora: files of text or tokens, split into training and validation, cut into rows.
//!
//! - plain text: one document per file; its tail is validation.
//! - JSON lines: one document per line; each goes to validation or not by the hash of its text, so the split survives reordering.
//! - shards: tokens made earlier, memory mapped; the tail of each is validation.
//!
//! Documents are joined by eos into one run of tokens per source, and rows are windows of it.

mod text;
mod jsonl;
mod shards;
mod windows;
mod tokenize;

pub use jsonl::{documents_of_jsonl, read_jsonl};
pub use shards::{ShardHeader, ShardReader, ShardWriter, TokenWidth};
pub use text::read_text;
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

/// Whether a document is held back, by the hash of its text.
///
/// ```
/// let held = (0..1000).filter(|i| mixtura_data::corpus::held_back(&format!("document {i}"), 0.1)).count();
/// assert!((60..140).contains(&held));
/// ```
pub fn held_back(document: &str, fraction: f64) -> bool {
    let hash = blake3::hash(document.as_bytes());
    let word = u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"));
    // 53 bits are what an f64 in [0, 1) can hold.
    ((word >> 11) as f64) < fraction * (1u64 << 53) as f64
}
