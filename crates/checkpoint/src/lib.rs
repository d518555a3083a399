//! Checkpoints: safetensors files, Hugging Face families, and training state that survives a kill.
//!
//! Reading is all or nothing: every header, shape, type and hash is checked before a model is built, and whatever is wrong is
//! a [`CheckpointError`] that names the file and the tensor. Writing is atomic: a reader sees the old checkpoint or the new one.
//!
//! | you have | you call |
//! | --- | --- |
//! | a directory of safetensors | [`TensorStore::open`], [`SafetensorsFile::open`] |
//! | a model directory | [`load_model`] to train it, [`load_sealed`] to use it, [`load_config`], [`save_model`] |
//! | a run directory | [`RunLock::acquire`], then [`CheckpointStore::open`] |
//! | bytes from outside | [`parse_header`], [`ShardIndex::parse`], [`Manifest::parse`], [`HfConfig::parse`] |

mod error;
mod mmap;
mod header;
mod foreign;
mod file;
mod store;
mod write;
mod atomic;
mod lock;
mod manifest;
mod train_state;
mod checkpoints;
mod family;
mod families;
mod hf_keys;
mod hf_config;
mod token_ids;
mod layout;
mod hf_tensors;
#[cfg(feature = "model")]
mod express;
#[cfg(feature = "model")]
mod compare;
#[cfg(feature = "model")]
mod model;
#[cfg(feature = "model")]
mod sealed;

pub use atomic::{TEMPORARY_PREFIX, remove_leftovers, write_file};
pub use checkpoints::{
    CONFIG_FILE, Checkpoint, CheckpointContents, CheckpointStore, ModelOut, Retention, newest_loadable, steps_in,
};
pub use error::{CheckpointError, FormatError, HeaderError, Result};
pub use families::HfFamily;
pub use family::Family;
pub use file::{SafetensorsFile, Values};
pub use header::{Header, MAX_HEADER_BYTES, TensorInfo, parse_header};
pub use hf_config::{HfConfig, HfMoe, mixtura_json, native_config};
pub use layout::{CheckedTensors, ParameterLayout, Piece, Place, family_layout, native_layout};
pub use lock::{LOCK_FILE, RunLock};
pub use manifest::{FileRecord, MANIFEST_FILE, Manifest, TensorFileRecord, TensorRecord};
pub use mmap::MappedFile;
#[cfg(feature = "model")]
pub use model::{
    LoadedModel, SaveOptions, check_architecture, load_config, load_model, load_weights, model_out, save_model,
};
pub use safetensors::Dtype;
#[cfg(feature = "model")]
pub use sealed::{load_sealed, sealed_bytes};
pub use store::{INDEX_FILE, MODEL_FILE, ShardIndex, TensorStore};
pub use token_ids::{GENERATION_FILE, TokenIds};
pub use train_state::{TRAIN_STATE_FILE, TrainState, TrainStateOut};
pub use write::{StoredType, TensorOut, WrittenFile, WrittenTensor, write_safetensors, write_to};
