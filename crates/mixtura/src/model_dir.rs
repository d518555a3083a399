//! MODEL on the command line: a run, a checkpoint or a model directory, loaded whole or not at all.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use mixtura_checkpoint::{CheckpointError, LoadedModel, load_model, newest_loadable};
use mixtura_data::propositions::EvaluationItem;
use mixtura_data::{
    DataConfig, DataError, Tokenizer, TokenizerChoice, ValidationSet, open_file_for_evaluation, open_with_tokenizer,
};
use mixtura_kernels::ways;
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
            PrecisionArg::Auto => ways::fastest().0,
        }
    }
}

impl Model {
    /// Loads `path`: a run's `final/` or else its newest intact checkpoint, or the directory itself.
    pub fn load(path: &Path, output: &Output) -> Result<Self, Failure> {
        let path = resolve(path, output)?;
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

    /// The precision asked for, else the one it was trained with and the order of its sums, else f32.
    pub fn numerics(&self, asked: Option<PrecisionArg>) -> Numerics {
        match (asked, &self.run) {
            (Some(precision), _) => Numerics::new(precision.into()),
            (None, Some(run)) => Numerics::like(run.train.precision, run.train.way),
            (None, None) => Numerics::new(Precision::F32),
        }
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
        // The tokenizer beside the model is the one it was trained with, even where the config would train a new one.
        let choice = run.data.tokenizer.clone().filter(|choice| *choice != TokenizerChoice::Bpe);
        let config = DataConfig { tokenizer: choice.or(run.data.tokenizer.clone()), ..run.data.clone() };
        let data = open_with_tokenizer(&config, tokenizer.clone())?;
        Ok((data.validation, data.evaluation))
    }
}

/// The directory that holds the weights.
fn resolve(path: &Path, output: &Output) -> Result<PathBuf, Failure> {
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
