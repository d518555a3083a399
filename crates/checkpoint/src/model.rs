//! Models to directories and back.
//!
//! Loading is all or nothing: configuration, every tensor's presence, shape and type are checked first, from headers alone;
//! then the hashes where a manifest lists them; only then is a weight read, and only when all are read is one replaced.
//!
//! Our own configuration travels in `config.json` under the key `mixtura`, in every family. Other programs ignore it; we get back
//! what they have no words for (noise, capacity, balance losses).

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::rc::Rc;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};
use mixtura_nn::{Decoder, LoadError, ModelConfig, NamedParameters};
use serde_json::Value;

use crate::atomic::{create_dir, create_synced, parent, publish_dir, temporary_name};
use crate::checkpoints::{CONFIG_FILE, ModelOut};
use crate::compare::{first_difference, first_disagreement};
use crate::error::{CheckpointError, FormatError, Result};
use crate::families::HfFamily;
use crate::family::Family;
use crate::hf_config::{HfConfig, mixtura_json, native_config};
use crate::layout::{CheckedTensors, ParameterLayout, family_layout, native_layout};
use crate::manifest::{MANIFEST_FILE, Manifest};
use crate::store::{INDEX_FILE, MODEL_FILE, ShardIndex, TensorStore};
use crate::token_ids::{GENERATION_FILE, TokenIds};
use crate::write::{StoredType, TensorOut, write_to};

/// A model and how it lay on the disk.
#[derive(Debug)]
pub struct LoadedModel {
    /// The model, with its weights.
    pub decoder: Decoder,
    /// What it was made from.
    pub config: ModelConfig,
    /// The layout it was read from.
    pub family: Family,
    /// The special ids that its files name.
    pub ids: TokenIds,
}

/// Loads the model in `dir`, whatever known layout it has, onto `device` (with autodiff to train it further).
///
/// ```no_run
/// # use mixtura_checkpoint::load_model;
/// let model = load_model("olmoe-1b-7b".as_ref(), &Default::default())?;
/// println!("{}: {} layers", model.family, model.config.layers);
/// # Ok::<(), mixtura_checkpoint::CheckpointError>(())
/// ```
pub fn load_model(dir: &Path, device: &Device) -> Result<LoadedModel> {
    let (config, family) = load_config(dir)?;
    // The weights are drawn on first read, so a decoder that is about to be loaded costs nothing.
    let mut decoder = new_decoder(dir, &config, device)?;
    let ids = TokenIds::read(dir)?;
    read_weights(dir, family, &mut decoder)?;
    Ok(LoadedModel { decoder, config, family, ids })
}

/// The configuration of the model in `dir`, without its weights.
pub fn load_config(dir: &Path) -> Result<(ModelConfig, Family)> {
    let path = dir.join(CONFIG_FILE);
    let bytes = match fs::read(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let reason = if dir.is_dir() { "config.json is not there" } else { "the directory does not exist" };
            return Err(CheckpointError::NotFound { path: dir.to_path_buf(), reason: reason.into() });
        }
        other => other.map_err(|e| CheckpointError::io("read", &path, e))?,
    };
    let (config, family) = parse_config(&bytes).map_err(|source| {
        let path = path.clone();
        match source {
            FormatError::Unsupported { key, value, reason } => {
                CheckpointError::Unsupported { path, key, value, reason }
            }
            source => CheckpointError::Format { path, source },
        }
    })?;
    config.validate().map_err(|e| CheckpointError::Config { path, reason: e.to_string() })?;
    Ok((config, family))
}

/// Loads the weights in `dir` into a model that exists, which must be of the same architecture. On an error nothing changes.
pub fn load_weights(dir: &Path, decoder: &mut Decoder) -> Result<()> {
    let family = check_architecture(dir, decoder.config())?;
    read_weights(dir, family, decoder)
}

/// Refuses a checkpoint in `dir` that is of another architecture than `expected`, by the name of the first key that differs.
pub fn check_architecture(dir: &Path, expected: &ModelConfig) -> Result<Family> {
    let (config, family) = load_config(dir)?;
    if let Some((key, found, expected)) = first_difference(&config, expected) {
        let reason = format!("{key} is {found} there, {expected} in the model being trained");
        return Err(CheckpointError::Architecture { path: dir.to_path_buf(), reason });
    }
    Ok(family)
}

/// Reads `config.json` from its bytes. Where it carries our own configuration, that must agree with the family's keys.
pub(crate) fn parse_config(bytes: &[u8]) -> std::result::Result<(ModelConfig, Family), FormatError> {
    let (family, native) = native_config(bytes)?;
    let native = native.map(serde_json::from_value::<ModelConfig>).transpose();
    let native = native.map_err(|e| FormatError::Json { reason: format!("key `mixtura`: {e}") })?;
    let Family::Hf(hf) = family else {
        let config = native.ok_or_else(|| FormatError::MissingKey { key: "mixtura".into() })?;
        return Ok((config, family));
    };
    let theirs = HfConfig::parse(bytes)?;
    let Some(ours) = native else { return Ok(((hf.model)(&theirs), family)) };
    match first_disagreement(&ours, &theirs) {
        None => Ok((ours, family)),
        Some((key, found, expected)) => Err(FormatError::BadValue {
            key: format!("mixtura ({key})"),
            found,
            expected: format!(
                "{expected}, as the file's own {key} says (another program changed one and not the other)"
            ),
        }),
    }
}

fn new_decoder(dir: &Path, config: &ModelConfig, device: &Device) -> Result<Decoder> {
    Decoder::new(config, 0, device)
        .map_err(|e| CheckpointError::Config { path: dir.join(CONFIG_FILE), reason: e.to_string() })
}

fn expressed(family: &HfFamily, config: &ModelConfig) -> Result<HfConfig> {
    (family.express)(config)
        .map_err(|reason| CheckpointError::NotExpressible { family: family.model_type.into(), reason })
}

/// The table for a model of `config` that lies in `dir`.
pub(crate) fn layout_in(dir: &Path, family: Family, config: &ModelConfig) -> Result<Vec<ParameterLayout>> {
    // The weights of this one are never drawn.
    layout(family, &new_decoder(dir, config, &Device::default())?)
}

/// Checks the hashes of the files in `dir`, where a manifest lists them.
pub(crate) fn verify(dir: &Path) -> Result<()> {
    if dir.join(MANIFEST_FILE).exists() { Manifest::read(dir)?.verify(dir) } else { Ok(()) }
}

/// The table for this model. A table that does not fit the model's own parameters is a mistake in this crate.
fn layout(family: Family, decoder: &Decoder) -> Result<Vec<ParameterLayout>> {
    let infos: Vec<_> = decoder.parameter_infos().into_iter().map(|info| (info.name, info.shape)).collect();
    let Family::Hf(hf) = family else { return Ok(native_layout(&infos)) };
    let table = family_layout(&expressed(hf, decoder.config())?);
    let by_name: BTreeMap<_, _> = infos.into_iter().collect();
    for parameter in &table {
        let found = by_name.get(&parameter.name);
        assert_eq!(found, Some(&parameter.shape), "layout of {family}: parameter `{}`", parameter.name);
    }
    assert_eq!(table.len(), by_name.len(), "layout of {family}: a parameter has no place");
    Ok(table)
}

fn read_weights(dir: &Path, family: Family, decoder: &mut Decoder) -> Result<()> {
    let store = TensorStore::open(dir)?;
    let table = layout(family, decoder)?;
    let checked = CheckedTensors::new(&table, &store)?;
    verify(dir)?;
    let mut parameters = Vec::with_capacity(table.len());
    for parameter in checked.parameters() {
        parameters.push((parameter.name.clone(), parameter.shape.clone(), Cow::Owned(checked.read(parameter)?)));
    }
    decoder.load_named(parameters).map_err(|e| load_error(dir, e))
}

/// The table was compared with the model, so these cannot happen; they are translated rather than hidden.
fn load_error(dir: &Path, error: LoadError) -> CheckpointError {
    let path = dir.to_path_buf();
    match error {
        LoadError::Missing { name, shape } => {
            CheckpointError::MissingTensor { path, tensor: name, expected: shape, missing: 1, nearest_name: None }
        }
        LoadError::Unknown { name, .. } | LoadError::Twice { name } => {
            CheckpointError::ExtraTensor { path, tensor: name, found: vec![], extra: 1 }
        }
        LoadError::Shape { name, expected, found } => {
            CheckpointError::ShapeMismatch { path, tensor: name, expected, found }
        }
    }
}

/// How a model is written.
#[derive(Debug, Clone)]
pub struct SaveOptions {
    /// Number type on the disk. F32 loses nothing.
    pub stored: StoredType,
    /// A model with more bytes of weights than this is split into shards with an index.
    pub max_shard_bytes: usize,
    /// Special tokens for `config.json` and `generation_config.json`.
    pub ids: TokenIds,
    /// Further files, such as `("tokenizer.json", bytes)`.
    pub files: Vec<(String, Vec<u8>)>,
}

impl Default for SaveOptions {
    /// F32, shards of 5 GB, no special tokens.
    fn default() -> Self {
        Self { stored: StoredType::F32, max_shard_bytes: 5_000_000_000, ids: TokenIds::default(), files: Vec::new() }
    }
}

/// `config.json` and tensors of a model in a family's layout, for a training checkpoint. Weights are borrowed from the model's
/// storage and rearranged one by one as they are written; drop the value before the next optimizer step, so that the step
/// can update in place.
pub fn model_out<'a>(decoder: &Decoder, family: Family, stored: StoredType, ids: &TokenIds) -> Result<ModelOut<'a>> {
    let config = decoder.config();
    let native: Value = serde_json::to_value(config).expect("a model configuration serialises to JSON");
    let config_json = match family {
        Family::Mixtura => mixtura_json(native, stored, ids),
        Family::Hf(hf) => HfConfig { native: Some(native), ..expressed(hf, config)? }.to_json(stored, ids),
    };
    let weights = weights(decoder);
    let infos = decoder.parameter_infos();
    let integral: BTreeSet<_> = infos.iter().filter(|info| info.role.is_integral()).map(|info| &*info.name).collect();
    let mut tensors = Vec::new();
    for parameter in layout(family, decoder)? {
        let weight = Rc::new(weights[&parameter.name].clone());
        let stored = if integral.contains(&*parameter.name) { StoredType::F32 } else { stored };
        for piece in parameter.pieces {
            let (place, weight) = (piece.places[0].clone(), weight.clone());
            tensors.push(TensorOut::lazy(place.name, &place.shape, stored, move || {
                Cow::Owned(mixtura_ops::with_slice(&weight, |values| piece.gather(values)))
            }));
        }
    }
    Ok(ModelOut { config_json, tensors })
}

/// Every parameter as a flat tensor that shares the model's storage.
fn weights(decoder: &Decoder) -> BTreeMap<String, Tensor<1>> {
    struct Collect(Vec<Tensor<1>>);
    impl ModuleVisitor for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val().inner();
            let elements = value.shape().num_elements();
            self.0.push(value.reshape([elements]));
        }
    }
    let mut collect = Collect(Vec::new());
    decoder.visit(&mut collect);
    let names = decoder.parameter_infos().into_iter().map(|info| info.name);
    names.zip(collect.0).collect()
}

/// Writes the model to the directory `dir`, replacing what is there. The directory appears whole or not at all.
pub fn save_model(dir: &Path, decoder: &Decoder, family: Family, options: &SaveOptions) -> Result<()> {
    let model = model_out(decoder, family, options.stored, &options.ids)?;
    create_dir(parent(dir))?;
    let temporary = parent(dir).join(temporary_name(dir));
    let written = write_model(&temporary, model, options)
        .and_then(|()| publish_dir(&temporary, dir).map_err(|e| CheckpointError::io("write", dir, e)));
    if written.is_err() {
        let _ = fs::remove_dir_all(&temporary);
    }
    written
}

fn write_model(dir: &Path, model: ModelOut, options: &SaveOptions) -> Result<()> {
    create_dir(dir)?;
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        create_synced(&path, None, |out| out.write_all(bytes)).map_err(|e| CheckpointError::io("write", &path, e))
    };
    write(CONFIG_FILE, &model.config_json)?;
    if let Some(bytes) = options.ids.generation_config() {
        write(GENERATION_FILE, &bytes)?;
    }
    for (name, bytes) in &options.files {
        write(name, bytes)?;
    }
    let shards = into_shards(model.tensors, options.max_shard_bytes);
    let count = shards.len();
    let mut index = ShardIndex { metadata: BTreeMap::new(), weight_map: BTreeMap::new() };
    let mut total = 0usize;
    for (i, tensors) in shards.into_iter().enumerate() {
        let name = if count == 1 { MODEL_FILE.into() } else { format!("model-{:05}-of-{count:05}.safetensors", i + 1) };
        for tensor in &tensors {
            total += tensor.byte_len();
            index.weight_map.insert(tensor.name.clone(), name.clone());
        }
        let path = dir.join(&name);
        create_synced(&path, None, |out| write_to(out, tensors, &BTreeMap::new()))
            .map_err(|e| CheckpointError::io("write", &path, e))?;
    }
    if count > 1 {
        index.metadata.insert("total_size".into(), total.into());
        write(INDEX_FILE, &serde_json::to_vec_pretty(&index).expect("maps with string keys always serialise"))?;
    }
    Ok(())
}

/// In order, each shard as full as the limit allows; a tensor larger than the limit has one of its own.
fn into_shards(tensors: Vec<TensorOut>, limit: usize) -> Vec<Vec<TensorOut>> {
    let mut shards = vec![Vec::new()];
    let mut size = 0;
    for tensor in tensors {
        if size > 0 && size + tensor.byte_len() > limit {
            shards.push(Vec::new());
            size = 0;
        }
        size += tensor.byte_len();
        shards.last_mut().expect("there is always one").push(tensor);
    }
    shards
}
