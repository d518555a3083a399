//! Every way a checkpoint can be wrong, as a type that carries the evidence.
//!
//! Errors about bytes ([`HeaderError`], [`FormatError`]) know no path; the functions that open files wrap them in a
//! [`CheckpointError`] that does.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, CheckpointError>;

/// What went wrong while reading or writing a checkpoint.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The operating system refused something; `action` says what was being done.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// A verb, for example "read" or "create".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The disk is full (or the quota is used up). Nothing half-written is left behind.
    #[error(
        "no space left on the disk that holds {}: {source}. The unfinished files were removed; \
         earlier checkpoints are untouched",
        path.display()
    )]
    DiskFull {
        /// The file that was being written.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The directory or file system may not be written to.
    #[error("{} is not writable: {source}", path.display())]
    ReadOnly {
        /// The file that was to be written.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Another process works in this directory.
    #[error(
        "{} is in use by another run ({holder}). Give this run a directory of its own, or wait for the other to end",
        path.display()
    )]
    Locked {
        /// The run directory.
        path: PathBuf,
        /// What the lock file says about its holder.
        holder: String,
    },
    /// There is no checkpoint or model where one was asked for.
    #[error("no model in {}: {reason}", path.display())]
    NotFound {
        /// The directory that was searched.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// A safetensors file is not well formed.
    #[error("{}: {source}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: HeaderError,
    },
    /// A JSON file (`config.json`, an index, a manifest) cannot be understood.
    #[error("{}: {source}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: FormatError,
    },
    /// The index names a shard that is not there.
    #[error("{}: tensor `{tensor}` should be in shard `{shard}`, which does not exist", path.display())]
    ShardMissing {
        /// The index file.
        path: PathBuf,
        /// The missing file.
        shard: String,
        /// One of the tensors it should hold.
        tensor: String,
    },
    /// Index and shard disagree about where a tensor lies.
    #[error("{}: the index puts tensor `{tensor}` in shard `{shard}`, which does not hold it", path.display())]
    NotInShard {
        /// The index file.
        path: PathBuf,
        /// The file named by the index.
        shard: String,
        /// The tensor.
        tensor: String,
    },
    /// Two shards hold a tensor of one name, and nothing says which is meant.
    #[error(
        "{}: tensor `{tensor}` lies in two shards, {} and {}, of which only one can be meant; remove the other, or write the model anew",
        path.display(), first.display(), second.display()
    )]
    InTwoShards {
        /// The directory.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// File name of one shard.
        first: PathBuf,
        /// File name of the other.
        second: PathBuf,
    },
    /// The model needs a tensor that the checkpoint lacks.
    #[error(
        "{}: tensor `{tensor}` {expected:?} is missing ({missing} missing in all){}{}",
        path.display(), nearest(nearest_name), untied(tensor)
    )]
    MissingTensor {
        /// The file or directory.
        path: PathBuf,
        /// The first missing tensor.
        tensor: String,
        /// The shape it should have.
        expected: Vec<usize>,
        /// How many are missing.
        missing: usize,
        /// The closest name that is there, if one is close.
        nearest_name: Option<String>,
    },
    /// The checkpoint holds a tensor that the model has no place for.
    #[error(
        "{}: unexpected tensor `{tensor}` {found:?} ({extra} unexpected in all): the configuration has no place for it{}",
        path.display(), tied(tensor)
    )]
    ExtraTensor {
        /// The file or directory.
        path: PathBuf,
        /// The first unexpected tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// How many are unexpected.
        extra: usize,
    },
    /// A tensor's shape is not what the configuration says.
    #[error("{}: tensor `{tensor}` has shape {found:?}, the configuration needs {expected:?}", path.display())]
    ShapeMismatch {
        /// The file or directory.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What the configuration needs.
        expected: Vec<usize>,
        /// What the file has.
        found: Vec<usize>,
    },
    /// A tensor is stored in a type that cannot be read as real numbers.
    #[error("{}: tensor `{tensor}` is stored as {found}; readable are F32, BF16, F16 and F64", path.display())]
    WrongDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The type found.
        found: String,
    },
    /// A tensor holds NaN or infinity.
    #[error("{}: tensor `{tensor}` holds {value} at element {index}", path.display())]
    NonFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Row-major position.
        index: usize,
        /// What was found there.
        value: f32,
    },
    /// The bytes are not those that were written.
    #[error(
        "{}: {what} is damaged: its blake3 hash is {found}, the manifest says {expected}",
        path.display()
    )]
    HashMismatch {
        /// The file.
        path: PathBuf,
        /// "tensor `name`" or "file".
        what: String,
        /// Hash in the manifest, hexadecimal.
        expected: String,
        /// Hash of the bytes that are there.
        found: String,
    },
    /// Manifest and files disagree about what should be there.
    #[error("{}: {reason}", path.display())]
    Manifest {
        /// The checkpoint directory or a file in it.
        path: PathBuf,
        /// What disagrees.
        reason: String,
    },
    /// The configuration asks for something that this version cannot run exactly.
    #[error("{}: `{key}` = {value} is not supported: {reason}", path.display())]
    Unsupported {
        /// `config.json`.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// Why, and what would be accepted.
        reason: String,
    },
    /// A family cannot express this architecture.
    #[error("the {family} layout cannot hold this model: {reason}")]
    NotExpressible {
        /// The family asked for.
        family: String,
        /// The first thing it lacks.
        reason: String,
    },
    /// The configuration is readable but impossible.
    #[error("{}: {reason}", path.display())]
    Config {
        /// `config.json`.
        path: PathBuf,
        /// The model crate's explanation.
        reason: String,
    },
    /// A checkpoint of another architecture than the one being trained.
    #[error("{}: this checkpoint is of another architecture: {reason}", path.display())]
    Architecture {
        /// The checkpoint.
        path: PathBuf,
        /// The first difference.
        reason: String,
    },
}

/// What is wrong with the bytes of a safetensors file.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum HeaderError {
    /// Fewer than the eight bytes of the header length.
    #[error("not a safetensors file: {len} bytes, shorter than the 8-byte header length")]
    TooShort {
        /// Size of the file.
        len: usize,
    },
    /// Another format, told by its first bytes.
    #[error("not a safetensors file: it is {what}")]
    Foreign {
        /// What it is, and what to do about it.
        what: &'static str,
    },
    /// The length field is absurd.
    #[error(
        "not a safetensors file, or a corrupt one: it announces a header of {declared} bytes (at most {limit} are allowed)"
    )]
    TooLarge {
        /// What the length field says.
        declared: u64,
        /// The format's limit.
        limit: u64,
    },
    /// The header itself is cut off.
    #[error("truncated: the header should have {declared} bytes, the file ends after {available}")]
    TruncatedHeader {
        /// What the length field says.
        declared: u64,
        /// Bytes after the length field.
        available: usize,
    },
    /// The header is not UTF-8.
    #[error("corrupt header: not UTF-8 after byte {valid_up_to}")]
    NotUtf8 {
        /// Bytes that still were.
        valid_up_to: usize,
    },
    /// The header is not a JSON object.
    #[error("corrupt header: {reason}")]
    NotJson {
        /// The JSON parser's reason.
        reason: String,
    },
    /// `__metadata__` is not a map from strings to strings.
    #[error("corrupt header: `__metadata__` {reason}")]
    BadMetadata {
        /// What is wrong.
        reason: String,
    },
    /// An entry lacks a field or has one of a wrong type.
    #[error("corrupt header: tensor `{tensor}`: {reason}")]
    BadEntry {
        /// The tensor.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// Two entries of the same name.
    #[error("corrupt header: tensor `{tensor}` is listed twice")]
    Duplicate {
        /// The tensor.
        tensor: String,
    },
    /// The shape's element count does not fit an integer.
    #[error("corrupt header: tensor `{tensor}` of shape {shape:?} is too large to address")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// Its declared shape.
        shape: Vec<usize>,
    },
    /// Shape and offsets disagree.
    #[error(
        "mis-shaped: tensor `{tensor}` of shape {shape:?} and type {dtype} needs {expected} bytes, its offsets span {found}"
    )]
    SizeMismatch {
        /// The tensor.
        tensor: String,
        /// Its declared type.
        dtype: String,
        /// Its declared shape.
        shape: Vec<usize>,
        /// Bytes by shape.
        expected: usize,
        /// Bytes by offsets.
        found: usize,
    },
    /// A tensor starts before the one in front of it ends, or ends before it starts.
    #[error(
        "corrupt header: tensor `{tensor}` (bytes {begin}..{end}) overlaps `{other}`, which ends at byte {other_end}"
    )]
    Overlap {
        /// The tensor.
        tensor: String,
        /// Where it starts, after the header.
        begin: usize,
        /// Where it ends.
        end: usize,
        /// The tensor in front of it.
        other: String,
        /// Where that one ends.
        other_end: usize,
    },
    /// Bytes that belong to no tensor.
    #[error("corrupt header: bytes {from}..{to} before tensor `{tensor}` belong to no tensor")]
    Gap {
        /// The tensor behind the gap.
        tensor: String,
        /// Start of the gap.
        from: usize,
        /// End of the gap.
        to: usize,
    },
    /// The data of a tensor is cut off.
    #[error("truncated: tensor `{tensor}` ends at data byte {end}, the file holds {available}")]
    Truncated {
        /// The first tensor that is not whole.
        tensor: String,
        /// Where it should end.
        end: usize,
        /// Data bytes that are there.
        available: usize,
    },
    /// More data than the header describes.
    #[error("corrupt: the header describes {described} data bytes, the file holds {available}")]
    TrailingBytes {
        /// Bytes described.
        described: usize,
        /// Bytes there.
        available: usize,
    },
    /// The format library found something that the checks above do not name.
    #[error("corrupt: {reason}")]
    Format {
        /// The library's reason.
        reason: String,
    },
}

/// What is wrong with the bytes of a JSON file of a checkpoint.
#[derive(Debug, Error, Clone, PartialEq)]
#[non_exhaustive]
pub enum FormatError {
    /// Another format, told by its first bytes.
    #[error("not JSON: it is {what}")]
    Foreign {
        /// What it is, and what to do about it.
        what: &'static str,
    },
    /// Not JSON, or a field of a wrong type; the parser's reason has line and column.
    #[error("not readable: {reason}")]
    Json {
        /// The parser's reason.
        reason: String,
    },
    /// A key without which the file means nothing.
    #[error("key `{key}` is missing")]
    MissingKey {
        /// The key, or "a or b" where two spellings exist.
        key: String,
    },
    /// A key with an impossible value.
    #[error("key `{key}` is {found}, expected {expected}")]
    BadValue {
        /// The key.
        key: String,
        /// What was found.
        found: String,
        /// What would be right.
        expected: String,
    },
    /// A shard name that is not a plain file name beside the index.
    #[error("tensor `{tensor}` points to `{shard}`, which is not a plain file name")]
    UnsafePath {
        /// The tensor.
        tensor: String,
        /// The offending name.
        shard: String,
    },
    /// A model type this version does not know.
    #[error("model_type `{found}` is not known; known are {known}")]
    UnknownFamily {
        /// What the file says.
        found: String,
        /// What would be read.
        known: String,
    },
    /// A key whose value would change the numbers and is not implemented.
    #[error("`{key}` = {value} is not supported: {reason}")]
    Unsupported {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// Why, and what would be accepted.
        reason: String,
    },
}

impl CheckpointError {
    /// Wraps an I/O error, telling a full disk and a read-only directory from the rest.
    pub fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path, source },
            io::ErrorKind::ReadOnlyFilesystem => Self::ReadOnly { path, source },
            io::ErrorKind::PermissionDenied if action != "read" => Self::ReadOnly { path, source },
            _ => Self::Io { action, path, source },
        }
    }
}

impl FormatError {
    /// Parses a JSON file's bytes, with or without a byte order mark.
    pub(crate) fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> std::result::Result<T, Self> {
        let bytes = crate::foreign::json(bytes).map_err(|what| Self::Foreign { what })?;
        serde_json::from_slice(bytes).map_err(|e| Self::Json { reason: e.to_string() })
    }
}

/// The output projection that differs from the embedding it is said to be.
fn tied(tensor: &str) -> &'static str {
    match tensor {
        "lm_head.weight" => {
            "; config.json says `tie_word_embeddings`: true, so the output projection is the embedding, but this one differs from it: \
             if it is the model's own, the key must be false"
        }
        _ => "",
    }
}

/// The output projection that is not there although it is no embedding.
fn untied(tensor: &str) -> &'static str {
    match tensor {
        "lm_head.weight" => {
            "; if the output projection is the embedding, config.json must say `tie_word_embeddings`: true"
        }
        _ => "",
    }
}

fn nearest(name: &Option<String>) -> String {
    name.as_ref().map(|n| format!("; the nearest name there is `{n}`")).unwrap_or_default()
}
