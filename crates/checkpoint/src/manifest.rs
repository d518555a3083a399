//! `manifest.json`: what a checkpoint directory holds, with a blake3 hash per tensor and per file.
//!
//! [`Manifest::parse`] is a pure function on bytes; [`Manifest::verify`] reads every byte of the directory and names the first
//! tensor or file that differs from what was written.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{CheckpointError, FormatError, Result};
use crate::file::SafetensorsFile;
use crate::write::WrittenFile;

/// File name of the manifest.
pub const MANIFEST_FILE: &str = "manifest.json";
/// The `format` field of every manifest.
pub const MANIFEST_FORMAT: &str = "mixtura-checkpoint";
/// The version that this code writes and the newest it reads.
pub const MANIFEST_VERSION: u32 = 1;

/// What a checkpoint directory holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always `MANIFEST_FORMAT`.
    pub format: String,
    /// `MANIFEST_VERSION` of the writer.
    pub version: u32,
    /// Optimizer steps done.
    pub step: u64,
    /// The number by which "best" is decided, lower is better; none if nothing was evaluated at this step.
    pub metric: Option<f64>,
    /// Files that are hashed whole: `config.json`, `tokenizer.json` and so on.
    pub files: BTreeMap<String, FileRecord>,
    /// Safetensors files, hashed tensor by tensor.
    pub tensor_files: BTreeMap<String, TensorFileRecord>,
}

/// One file hashed whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Its size.
    pub bytes: u64,
    /// Its hash, hexadecimal.
    pub blake3: String,
}

/// One safetensors file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorFileRecord {
    /// Its size.
    pub bytes: u64,
    /// Hash of the header, which holds names, shapes, offsets and metadata.
    pub header_blake3: String,
    /// Tensor name to hash of its stored bytes.
    pub tensors: BTreeMap<String, TensorRecord>,
}

/// One tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorRecord {
    /// Stored type.
    pub dtype: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Hash of its stored bytes, hexadecimal.
    pub blake3: String,
}

impl FileRecord {
    /// The record of a file with these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self { bytes: bytes.len() as u64, blake3: blake3::hash(bytes).to_hex().to_string() }
    }
}

impl From<WrittenFile> for TensorFileRecord {
    fn from(file: WrittenFile) -> Self {
        let record = |t: crate::write::WrittenTensor| {
            (t.name, TensorRecord { dtype: t.dtype, shape: t.shape, blake3: t.blake3 })
        };
        Self {
            bytes: file.bytes,
            header_blake3: file.header_blake3,
            tensors: file.tensors.into_iter().map(record).collect(),
        }
    }
}

impl Manifest {
    /// An empty manifest.
    pub fn new(step: u64, metric: Option<f64>) -> Self {
        Self {
            format: MANIFEST_FORMAT.into(),
            version: MANIFEST_VERSION,
            step,
            metric,
            files: BTreeMap::new(),
            tensor_files: BTreeMap::new(),
        }
    }

    /// Reads a manifest from its bytes.
    pub fn parse(bytes: &[u8]) -> std::result::Result<Self, FormatError> {
        let manifest: Self = FormatError::parse(bytes)?;
        if manifest.format != MANIFEST_FORMAT {
            let (found, expected) = (format!("\"{}\"", manifest.format), format!("\"{MANIFEST_FORMAT}\""));
            return Err(FormatError::BadValue { key: "format".into(), found, expected });
        }
        if manifest.version == 0 || manifest.version > MANIFEST_VERSION {
            let (found, expected) = (manifest.version.to_string(), format!("1 to {MANIFEST_VERSION}"));
            return Err(FormatError::BadValue { key: "version".into(), found, expected });
        }
        let names = manifest.files.keys().chain(manifest.tensor_files.keys());
        for name in names {
            if name.is_empty() || name.contains(['/', '\\', '\0']) || name == "." || name == ".." {
                return Err(FormatError::BadValue {
                    key: "files".into(),
                    found: format!("{name:?}"),
                    expected: "plain file names".into(),
                });
            }
        }
        Ok(manifest)
    }

    /// Reads `manifest.json` of a directory.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST_FILE);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                let reason = format!("{MANIFEST_FILE} is not there: not a training checkpoint, or not a whole one");
                return Err(CheckpointError::NotFound { path: dir.to_path_buf(), reason });
            }
            Err(e) => return Err(CheckpointError::io("read", &path, e)),
        };
        Self::parse(&bytes).map_err(|source| CheckpointError::Format { path, source })
    }

    /// As JSON, for the file.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("maps with string keys always serialise")
    }

    /// Compares every byte of the directory with the hashes.
    pub fn verify(&self, dir: &Path) -> Result<()> {
        for (name, record) in &self.files {
            let path = dir.join(name);
            check_size(&path, record.bytes)?;
            let bytes = fs::read(&path).map_err(|e| CheckpointError::io("read", &path, e))?;
            check_hash(&path, || "the file".into(), &record.blake3, &bytes)?;
        }
        for (name, record) in &self.tensor_files {
            verify_tensors(&dir.join(name), record)?;
        }
        Ok(())
    }
}

fn verify_tensors(path: &Path, record: &TensorFileRecord) -> Result<()> {
    if !path.exists() {
        return Err(missing_file(path));
    }
    // The header's own errors are more telling than a wrong size, so it is opened first.
    let file = SafetensorsFile::open(path)?;
    check_size(path, record.bytes)?;
    for tensor in file.tensors() {
        let Some(expected) = record.tensors.get(&tensor.name) else {
            let reason = format!("tensor `{}` is not in the manifest", tensor.name);
            return Err(CheckpointError::Manifest { path: path.to_path_buf(), reason });
        };
        check_hash(path, || format!("tensor `{}`", tensor.name), &expected.blake3, file.bytes(tensor))?;
    }
    if let Some(lost) = record.tensors.keys().find(|name| file.info(name).is_none()) {
        let reason = format!("tensor `{lost}` is in the manifest but not in the file");
        return Err(CheckpointError::Manifest { path: path.to_path_buf(), reason });
    }
    check_hash(path, || "the header".into(), &record.header_blake3, file.header_bytes())
}

fn check_size(path: &Path, expected: u64) -> Result<()> {
    match fs::metadata(path) {
        Ok(info) if info.len() == expected => Ok(()),
        Ok(info) => {
            let reason = format!("the file has {} bytes, the manifest says {expected}", info.len());
            Err(CheckpointError::Manifest { path: path.to_path_buf(), reason })
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Err(missing_file(path)),
        Err(e) => Err(CheckpointError::io("read", path, e)),
    }
}

fn missing_file(path: &Path) -> CheckpointError {
    let reason = "the file is in the manifest but not in the directory".into();
    CheckpointError::Manifest { path: path.to_path_buf(), reason }
}

fn check_hash(path: &Path, what: impl Fn() -> String, expected: &str, bytes: &[u8]) -> Result<()> {
    let found = blake3::hash(bytes).to_hex();
    if found.as_str() == expected {
        return Ok(());
    }
    let (expected, found) = (expected.to_string(), found.to_string());
    Err(CheckpointError::HashMismatch { path: path.to_path_buf(), what: what(), expected, found })
}
