//! What can go wrong with data from outside: one variant per reason, each a single paragraph that names the file and what was found in it.

use std::path::{Path, PathBuf};

/// A corpus, tokenizer or data configuration that cannot be used, with the evidence.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The file is not there.
    #[error("data file {path} does not exist; check the path (a relative one starts at the working directory)")]
    Missing {
        /// The path as configured.
        path: PathBuf,
    },
    /// The file is there but the operating system refused to read it.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file or directory concerned.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file holds nothing to learn from.
    #[error("data file {path} is empty: {reason}")]
    Empty {
        /// The file.
        path: PathBuf,
        /// What was looked for and not found.
        reason: String,
    },
    /// A text file that is not text.
    #[error(
        "data file {path} is not UTF-8 text: {reason} at byte {offset}; plain text and JSON lines must be UTF-8 without NUL bytes"
    )]
    NotText {
        /// The file.
        path: PathBuf,
        /// Offset of the first offending byte.
        offset: usize,
        /// What is wrong there.
        reason: String,
    },
    /// A line of a JSON lines file that is not an object with the text field.
    #[error("{path}, line {line}: {reason}")]
    JsonLine {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What was expected and what was found.
        reason: String,
    },
    /// An element of a JSON array that is not an object with the text field.
    #[error("{path}, element {element}: {reason}")]
    JsonElement {
        /// The file.
        path: PathBuf,
        /// Its number in the array, from 1.
        element: usize,
        /// What was expected and what was found.
        reason: String,
    },
    /// A file of another format than the one that was expected.
    #[error("data file {path} is not UTF-8 text: it is {what}")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is, and what to do about it.
        what: &'static str,
    },
    /// A token shard whose header, length or hash is wrong.
    #[error("token shard {path}: {reason}")]
    Shard {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// A tokenizer that cannot be loaded or trained.
    #[error("tokenizer {name}: {reason}")]
    Tokenizer {
        /// The file, or `byte`, `bpe`, `propositions`.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A value of the data configuration that is impossible.
    #[error("data.{key} = {found}: {expected}")]
    Config {
        /// The key inside `[data]`.
        key: String,
        /// The value given.
        found: String,
        /// What would be possible.
        expected: String,
    },
    /// Too little text for one window.
    #[error(
        "{name} holds {tokens} tokens to train on, but one row of context {context} needs {needed}; use a smaller data.context, a \
         smaller data.validation_fraction or more data"
    )]
    TooShort {
        /// The file or files.
        name: String,
        /// Tokens found.
        tokens: u64,
        /// The configured context.
        context: usize,
        /// Tokens that one row needs.
        needed: u64,
    },
    /// Not one token can be predicted.
    #[error(
        "{name} holds {tokens} tokens, but to predict one there must be at least {needed} (the first needs something before it, a \
         start token or text){help}"
    )]
    NothingToPredict {
        /// The file, or the held-back part.
        name: String,
        /// Tokens found.
        tokens: u64,
        /// Tokens that one prediction needs: one behind a start token, else two.
        needed: u64,
        /// What to do about it, where something can be done.
        help: &'static str,
    },
    /// No document can be held back without leaving its file empty.
    #[error(
        "no document can be held back and leave something to train on, since each is the only one of its file or equals the others \
         there ({documents} in all); set data.validation_fraction = 0 (it is {fraction}), add documents, or use kind = \"text\", which \
         holds back the end of each file"
    )]
    NothingHeldBack {
        /// Documents in all files.
        documents: usize,
        /// The configured fraction.
        fraction: f64,
    },
    /// A saved loader position that belongs to other data or settings.
    #[error("the saved data position does not fit this run: {reason}")]
    State {
        /// What differs.
        reason: String,
    },
    /// A file that holds something else than it did.
    #[error(
        "data file {path} is not the one that {was} read: that had {recorded}, this has {found}; put the file back, name another with \
         eval --data FILE, or start a new run"
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// Whose record it is: "this run", "the model".
        was: String,
        /// Size and hash on record.
        recorded: String,
        /// Size and hash found.
        found: String,
    },
}

impl DataError {
    /// The error for an I/O failure on `path`: [`DataError::Missing`] where the file does not exist.
    pub fn io(path: &Path, source: std::io::Error) -> Self {
        match source.kind() {
            std::io::ErrorKind::NotFound => Self::Missing { path: path.into() },
            _ => Self::Io { path: path.into(), source },
        }
    }

    /// Whether the configuration (exit code 2), rather than the running of it (1), is at fault.
    pub fn is_config(&self) -> bool {
        matches!(self, Self::Config { .. })
    }
}
