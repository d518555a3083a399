//! All tensors of a model directory, whether they lie in one `model.safetensors` or in shards with an index.
//!
//! [`ShardIndex::parse`] is a pure function on the bytes of `model.safetensors.index.json`. [`TensorStore::open`] opens every
//! shard and checks that index and shards agree, so that nothing is discovered half-way through loading.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{CheckpointError, FormatError, Result};
use crate::file::SafetensorsFile;
use crate::header::TensorInfo;

/// File name of an unsharded model.
pub const MODEL_FILE: &str = "model.safetensors";
/// File name of the index of a sharded model.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// `model.safetensors.index.json`: which shard holds which tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShardIndex {
    /// `total_size` in bytes and whatever else a writer put there.
    #[serde(default)]
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// Tensor name to shard file name; names written as `./name` are read as `name`.
    pub weight_map: BTreeMap<String, String>,
}

impl ShardIndex {
    /// Reads an index from its bytes. Shard names must be plain file names, a `./` before them aside: an index cannot reach out of its
    /// directory.
    pub fn parse(bytes: &[u8]) -> std::result::Result<Self, FormatError> {
        let mut index: Self = FormatError::parse(bytes)?;
        for (tensor, shard) in &mut index.weight_map {
            while let Some(plain) = shard.strip_prefix("./") {
                *shard = plain.to_string();
            }
            let plain = !shard.is_empty() && !shard.contains(['/', '\\', '\0']) && shard != "." && shard != "..";
            if !plain {
                return Err(FormatError::UnsafePath { tensor: tensor.clone(), shard: shard.clone() });
            }
        }
        Ok(index)
    }

    /// The shard files in order, each once.
    pub fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}

/// The tensors of a model directory.
#[derive(Debug)]
pub struct TensorStore {
    path: PathBuf,
    files: Vec<SafetensorsFile>,
    /// Tensor name to (file, position in that file).
    place: BTreeMap<String, (usize, usize)>,
}

impl TensorStore {
    /// Opens `model.safetensors` in `dir`, or else the shards named by `model.safetensors.index.json`.
    pub fn open(dir: &Path) -> Result<Self> {
        let (single, index) = (dir.join(MODEL_FILE), dir.join(INDEX_FILE));
        if single.exists() {
            Self::from_files(dir, vec![SafetensorsFile::open(&single)?])
        } else if index.exists() {
            Self::open_shards(dir, &index)
        } else {
            let reason = format!("neither {MODEL_FILE} nor {INDEX_FILE} is there");
            Err(CheckpointError::NotFound { path: dir.to_path_buf(), reason })
        }
    }

    fn open_shards(dir: &Path, path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| CheckpointError::io("read", path, e))?;
        let index =
            ShardIndex::parse(&bytes).map_err(|source| CheckpointError::Format { path: path.to_path_buf(), source })?;
        for (tensor, shard) in &index.weight_map {
            if !dir.join(shard).exists() {
                let (path, shard, tensor) = (path.to_path_buf(), shard.clone(), tensor.clone());
                return Err(CheckpointError::ShardMissing { path, shard, tensor });
            }
        }
        let files =
            index.shards().into_iter().map(|s| SafetensorsFile::open(&dir.join(s))).collect::<Result<Vec<_>>>()?;
        let store = Self::from_files(dir, files)?;
        for (tensor, shard) in &index.weight_map {
            let found = store.place.get(tensor).map(|&(f, _)| store.files[f].path().to_path_buf());
            if found != Some(dir.join(shard)) {
                let (path, shard, tensor) = (path.to_path_buf(), shard.clone(), tensor.clone());
                return Err(CheckpointError::NotInShard { path, shard, tensor });
            }
        }
        Ok(store)
    }

    fn from_files(dir: &Path, files: Vec<SafetensorsFile>) -> Result<Self> {
        let mut place = BTreeMap::new();
        for (f, file) in files.iter().enumerate() {
            for (i, t) in file.tensors().iter().enumerate() {
                if let Some((first, _)) = place.insert(t.name.clone(), (f, i)) {
                    let name = |file: &SafetensorsFile| file.path().file_name().unwrap_or_default().into();
                    return Err(CheckpointError::InTwoShards {
                        path: dir.to_path_buf(),
                        tensor: t.name.clone(),
                        first: name(&files[first]),
                        second: name(file),
                    });
                }
            }
        }
        Ok(Self { path: dir.to_path_buf(), files, place })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that hold the tensors.
    pub fn files(&self) -> &[SafetensorsFile] {
        &self.files
    }

    /// Every tensor, file by file in the order of the data.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.files.iter().flat_map(|f| f.tensors())
    }

    /// A tensor and the file it lies in.
    pub fn find(&self, name: &str) -> Option<(&SafetensorsFile, &TensorInfo)> {
        self.place.get(name).map(|&(f, i)| (&self.files[f], &self.files[f].tensors()[i]))
    }
}
