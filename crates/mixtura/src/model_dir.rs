//! MODEL on the command line: a run, a checkpoint or a model directory, loaded whole or not at all.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use mixtura_checkpoint::{CheckpointError, LoadedModel, load_model, newest_loadable};
use mixtura_data::propositions::EvaluationItem;
use mixtura_data::{DataConfig, DataError, Tokenizer, ValidationSet, open_file_for_evaluation, open_with_tokenizer};
use mixtura_nn::Decoder;
use mixtura_ops::{Numerics, Precision};
use mixtura_train::config::RunConfig;
use mixtura_train::error::TrainError;
use mixtura_train::trainer::RUN_FILE;

use crate::cli::PrecisionArg;
use crate::failure::Failure;
use crate::output::Output;

/// A model ready for inference, and what lies beside it.
pub struct Model {
    /// The directory it was loaded from.
    pub path: PathBuf,
    /// The weights and their layout.
    pub loaded: LoadedModel,
    /// `tokenizer.json`, if there is one.
    pub tokenizer: Option<Tokenizer>,
    /// The run that made it, if we made it.
    pub run: Option<RunConfig>,
}

impl From<PrecisionArg> for Precision {
    fn from(precision: PrecisionArg) -> Self {
        match precision {
            PrecisionArg::F32 => Self::F32,
            PrecisionArg::Bf16 => Self::Bf16,
            PrecisionArg::Bf16Native => Self::Bf16Native,
        }
    }
}

impl Model {
    /// Loads `path`: a run's `final/` or else its newest intact checkpoint, or the directory itself.
    pub fn load(path: &Path, output: &Output) -> Result<Self, Failure> {
        for _ in 0..ATTEMPTS {
            let found = resolve(path, output)?;
            let model = Self::load_from(found.clone());
            // A run under way removes its older checkpoints, this one perhaps while it was read: what was read may then lack a file
            // that was there, and there is a newer one.
            if found.is_dir() {
                return model;
            }
        }
        let message = format!("{}: its checkpoints are removed faster than they can be read", path.display());
        Err(Failure::running(message))
    }

    fn load_from(path: PathBuf) -> Result<Self, Failure> {
        let loaded = load_model(&path, &Device::default()).map_err(checkpoint_failure)?;
        let tokenizer = match path.join("tokenizer.json") {
            file if file.exists() => Some(Tokenizer::from_file(&file).map_err(|e| Failure::running(e.to_string()))?),
            _ => None,
        };
        let run = match path.join(RUN_FILE) {
            file if file.exists() => {
                let text = std::fs::read_to_string(&file).map_err(|e| TrainError::io("read", &file, e))?;
                Some(RunConfig::parse(&text, &file.display().to_string(), &[])?)
            }
            _ => None,
        };
        Ok(Self { path, loaded, tokenizer, run })
    }

    /// The weights.
    pub fn decoder(&self) -> &Decoder {
        &self.loaded.decoder
    }

    /// The tokenizer, or an error that says what it is needed for.
    pub fn tokenizer(&self, purpose: &str) -> Result<&Tokenizer, Failure> {
        self.tokenizer.as_ref().ok_or_else(|| {
            Failure::usage(format!("{}: there is no tokenizer.json, which {purpose} needs", self.path.display()))
        })
    }

    /// The ids that end a text: those that the model's files name, else the tokenizer's.
    pub fn ends(&self) -> Vec<u32> {
        let named = &self.loaded.ids.eos;
        let own = || self.tokenizer.as_ref().and_then(Tokenizer::eos).into_iter().collect();
        if named.is_empty() { own() } else { named.clone() }
    }

    /// The precision asked for, else the one it was trained with, else f32.
    pub fn numerics(&self, asked: Option<PrecisionArg>) -> Numerics {
        let trained = self.run.as_ref().map(|run| run.train.precision);
        Numerics::new(asked.map(Precision::from).or(trained).unwrap_or(Precision::F32))
    }

    /// The text of `file` cut as in training, or what the model's run held back, with the questions of propositions.
    pub fn data(&self, file: Option<&Path>) -> Result<(ValidationSet, Vec<EvaluationItem>), Failure> {
        let tokenizer = self.tokenizer("evaluation")?;
        let context = self.loaded.config.context;
        if let Some(path) = file {
            let trained = self.run.as_ref().map(|run| run.data.clone()).unwrap_or_default();
            let config = DataConfig { context: trained.context.min(context), validation_batches: 0, ..trained };
            return Ok((open_file_for_evaluation(path, &config, tokenizer)?, Vec::new()));
        }
        let Some(run) = &self.run else {
            let message = "it does not record the data it was trained on; give --data FILE";
            return Err(Failure::usage(format!("{}: {message}", self.path.display())));
        };
        // The tokenizer beside the model is the one it was trained with, whatever the config would make or read.
        let data = open_with_tokenizer(&run.data, tokenizer.clone())?;
        Ok((data.validation, data.evaluation))
    }
}

/// How often the newest checkpoint may vanish while it is read: each time it does, a newer one was written.
const ATTEMPTS: usize = 20;

/// The directory that holds the weights.
pub fn resolve(path: &Path, output: &Output) -> Result<PathBuf, Failure> {
    let missing = |what: &str| Failure::usage(format!("no model in {}: {what}", path.display()));
    if !path.is_dir() {
        return Err(missing(if path.exists() {
            "this is a file; a directory was expected"
        } else {
            "there is no such directory"
        }));
    }
    if path.join("final").is_dir() {
        return Ok(path.join("final"));
    }
    let checkpoints = path.join("checkpoints");
    if checkpoints.is_dir() {
        let (newest, damaged) = newest_loadable(&checkpoints).map_err(checkpoint_failure)?;
        damaged.iter().for_each(|e| output.note(&format!("warning: a damaged checkpoint is passed over: {e}")));
        return newest
            .map(|checkpoint| checkpoint.path().to_path_buf())
            .ok_or_else(|| missing("the run has no intact checkpoint yet"));
    }
    Ok(path.to_path_buf())
}

/// A model that is not there is a wrong argument; one that is damaged is a failure.
fn checkpoint_failure(error: CheckpointError) -> Failure {
    Failure::from(TrainError::from(error))
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        TrainError::from(error).into()
    }
}
