//! `train_state.safetensors`: what training needs beyond the model to go on bit for bit.
//!
//! Tensors (the optimizer's moments) are stored as F32; everything else (step, loader position, bias terms, best metric ...) is
//! one JSON document of the caller's own type under `__metadata__`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{CheckpointError, FormatError, HeaderError, Result};
use crate::file::SafetensorsFile;
use crate::write::TensorOut;

/// File name of the training state in a checkpoint.
pub const TRAIN_STATE_FILE: &str = "train_state.safetensors";
/// Key of the JSON document in `__metadata__`.
const STATE_KEY: &str = "mixtura_train_state";

/// Training state on its way to the disk.
pub struct TrainStateOut<'a> {
    /// Optimizer moments, named by the caller (for example `adamw.m.layers.0.attention.qkv`).
    pub tensors: Vec<TensorOut<'a>>,
    /// The rest, as JSON.
    pub(crate) json: String,
}

impl<'a> TrainStateOut<'a> {
    /// Combines tensors with a serialisable value.
    ///
    /// # Panics
    /// If `state` cannot be written as JSON (a map with keys that are not strings).
    pub fn new(state: &impl Serialize, tensors: Vec<TensorOut<'a>>) -> Self {
        Self { tensors, json: serde_json::to_string(state).expect("the training state serialises to JSON") }
    }

    pub(crate) fn metadata(&self) -> BTreeMap<String, String> {
        BTreeMap::from([(STATE_KEY.to_string(), self.json.clone())])
    }
}

/// Training state read back.
#[derive(Debug)]
pub struct TrainState {
    file: SafetensorsFile,
}

impl TrainState {
    /// Opens the file; hashes are the manifest's business.
    pub fn open(path: &Path) -> Result<Self> {
        let file = SafetensorsFile::open(path)?;
        if !file.metadata().contains_key(STATE_KEY) {
            let source = HeaderError::BadMetadata { reason: format!("lacks `{STATE_KEY}`") };
            return Err(CheckpointError::Header { path: path.to_path_buf(), source });
        }
        Ok(Self { file })
    }

    /// The caller's own state.
    pub fn state<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_str(&self.file.metadata()[STATE_KEY]).map_err(|e| {
            let source = FormatError::Json { reason: format!("{STATE_KEY}: {e}") };
            CheckpointError::Format { path: self.file.path().to_path_buf(), source }
        })
    }

    /// Names of the tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.file.tensors().iter().map(|t| t.name.as_str())
    }

    /// One tensor, which must be there in this shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let path = || self.file.path().to_path_buf();
        let Some(info) = self.file.info(name) else {
            return Err(CheckpointError::MissingTensor {
                path: path(),
                tensor: name.into(),
                expected: shape.to_vec(),
                missing: 1,
                nearest_name: None,
            });
        };
        if info.shape != shape {
            let (expected, found) = (shape.to_vec(), info.shape.clone());
            return Err(CheckpointError::ShapeMismatch { path: path(), tensor: name.into(), expected, found });
        }
        self.file.read_f32(info)
    }
}
