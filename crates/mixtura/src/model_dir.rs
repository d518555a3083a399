//! MODEL on the command line: a run, a checkpoint or a model directory, loaded whole or not at all.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use mixtura_checkpoint::{CheckpointError, LoadedModel, load_model, load_sealed, newest_loadable, sealed_bytes};
use mixtura_data::propositions::EvaluationItem;
use mixtura_data::{
    DataConfig, DataError, EvaluationWindows, FileContent, HeldBack, Tokenizer, ValidationSet,
    open_file_for_evaluation, open_for_evaluation,
};
use mixtura_infer::available::{Available, gib};
use mixtura_kernels::ways;
use mixtura_nn::Decoder;
use mixtura_ops::{Numerics, Precision};
use mixtura_train::config::RunConfig;
use mixtura_train::error::TrainError;
use mixtura_train::trainer::{DATA_FILE, RUN_FILE};

use crate::cli::{DataArgs, PrecisionArg};
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
    /// The precision that it is to be run in, and how.
    numerics: Numerics,
    /// The run that made it, if we made it. Inside its run directory its files have their whole paths, elsewhere their names alone.
    pub run: Option<RunConfig>,
}

/// How a model's weights are held.
#[derive(Debug, Clone, Copy)]
pub enum Held {
    /// Once, as the kernels read them, in the file's number type: for everything that only runs the model. In the precision asked for,
    /// else in that of its training, else in f32.
    Packed(Option<Precision>),
    /// As parameters, whose values can be looked at.
    Parameters,
}

impl Held {
    /// To be run, in a precision that may be asked for.
    pub fn packed(asked: Option<PrecisionArg>) -> Self {
        Self::Packed(asked.map(Precision::from))
    }
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
    pub fn load(path: &Path, held: Held, output: &Output) -> Result<Self, Failure> {
        for _ in 0..ATTEMPTS {
            let found = resolve(path, output)?;
            let model = Self::load_from(found.clone(), held);
            // A run under way removes its older checkpoints, this one perhaps while it was read: what was read may then lack a file
            // that was there, and there is a newer one.
            if found.is_dir() {
                return model;
            }
        }
        let message = format!("{}: its checkpoints are removed faster than they can be read", path.display());
        Err(Failure::running(message))
    }

    fn load_from(path: PathBuf, held: Held) -> Result<Self, Failure> {
        let run = match path.join(RUN_FILE) {
            file if file.exists() => {
                let text = std::fs::read_to_string(&file).map_err(|e| TrainError::io("read", &file, e))?;
                let mut run = RunConfig::parse_saved(&text, &file.display().to_string())?;
                find_files(&mut run.data, &path);
                Some(run)
            }
            _ => None,
        };
        let trained = run.as_ref().map(|run| Numerics::like(run.train.precision, run.train.way));
        let (numerics, tokenizer, loaded) = std::thread::scope(|scope| {
            // A large vocabulary takes half a second on one core, about as long as a gigabyte of weights on the others.
            let tokenizer = scope.spawn(|| tokenizer_in(&path));
            let (numerics, loaded) = match held {
                Held::Packed(asked) => {
                    let numerics = asked.map(Numerics::new).or(trained).unwrap_or_default();
                    (numerics, check_memory(&path, numerics.precision).and_then(|()| sealed(&path, numerics)))
                }
                Held::Parameters => {
                    let loaded = load_model(&path, &Device::default()).map_err(checkpoint_failure);
                    (trained.unwrap_or_default(), loaded)
                }
            };
            (numerics, tokenizer.join(), loaded)
        });
        let loaded = loaded?;
        let tokenizer = tokenizer.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(Self { loaded, path, tokenizer, numerics, run })
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

    /// What it is to be run in.
    pub fn numerics(&self) -> Numerics {
        self.numerics
    }

    /// Windows for evaluation: as asked, else rows as long as those of the run that trained the model, else the model's whole context.
    /// As many windows are computed at once as make a batch of that run, or about 4096 tokens.
    pub fn windows(&self, args: &DataArgs, stride: Option<usize>) -> Result<EvaluationWindows, Failure> {
        let longest = self.loaded.config.context;
        let trained = self.run.as_ref().map(|run| &run.data);
        let context = args.context.unwrap_or(trained.map_or(longest, |data| data.context.min(longest)));
        if !(2..=longest).contains(&context) {
            let message = format!("--context {context}: this model's windows have 2 to {longest} tokens");
            return Err(Failure::usage(message));
        }
        let stride = stride.unwrap_or(context);
        if !(1..=context).contains(&stride) {
            let message = format!(
                "--stride {stride}: windows of {context} tokens advance by 1 to {context}, or tokens are left out"
            );
            return Err(Failure::usage(message));
        }
        let at_once = trained.map_or(4096, |data| data.batch * data.context);
        Ok(EvaluationWindows { context, stride, batch: (at_once / context).max(1) })
    }

    /// The text of `file`, or what the model's run held back, with the questions of propositions.
    pub fn data(
        &self,
        file: Option<&Path>,
        args: &DataArgs,
        stride: Option<usize>,
    ) -> Result<(ValidationSet, Vec<EvaluationItem>), Failure> {
        let tokenizer = self.tokenizer("evaluation")?;
        let windows = self.windows(args, stride)?;
        if let Some(path) = file {
            let field = self.run.as_ref().map(|run| run.data.text_field.as_str());
            let field = args.text_field.as_deref().or(field).unwrap_or("text");
            return Ok((open_file_for_evaluation(path, field, windows, tokenizer)?, Vec::new()));
        }
        let Some(run) = &self.run else {
            let message = "it does not record the data it was trained on; give --data FILE";
            return Err(Failure::usage(format!("{}: {message}", self.path.display())));
        };
        if args.text_field.is_some() {
            return Err(Failure::usage(
                "--text-field goes with --data FILE; what the run held back has the field of its config",
            ));
        }
        let windows = (args.context.is_some() || stride.is_some()).then_some(windows);
        // The tokenizer beside the model is the one it was trained with, whatever the config would make or read.
        let HeldBack { validation, evaluation, contents } = open_for_evaluation(&run.data, windows, tokenizer)
            .map_err(|error| match error {
                DataError::Missing { path } => Failure::usage(format!(
                    "{}: it was trained on {}, which is not there; give --data FILE to score another text",
                    self.path.display(),
                    path.display()
                )),
                other => other.into(),
            })?;
        FileContent::check(&self.trained_on()?, &contents, "the model's training")?;
        if validation.is_empty() {
            let message = "its run held nothing back (data.validation_fraction = 0); give --data FILE";
            return Err(Failure::usage(format!("{}: {message}", self.path.display())));
        }
        Ok((validation, evaluation))
    }

    /// What the files held that it was trained on, as recorded beside it.
    fn trained_on(&self) -> Result<Vec<FileContent>, Failure> {
        let file = self.path.join(DATA_FILE);
        if !file.exists() {
            return Ok(Vec::new());
        }
        let text = std::fs::read(&file).map_err(|e| TrainError::io("read", &file, e))?;
        serde_json::from_slice(&text).map_err(|e| Failure::running(format!("{}: not readable: {e}", file.display())))
    }
}

/// A saved model names its files without their directories. The run directory it lies in (as `final/` or `checkpoints/step-N/`)
/// knows them whole.
fn find_files(data: &mut DataConfig, model: &Path) {
    let Ok(model) = std::fs::canonicalize(model) else { return };
    let read = |directory: &Path| {
        let file = directory.join("config.toml");
        let text = std::fs::read_to_string(&file).ok()?;
        RunConfig::parse_saved(&text, &file.display().to_string()).ok()
    };
    let Some(run) = model.ancestors().skip(1).take(2).find_map(read) else { return };
    let names = run.data.clone().with_names_only();
    if (names.kind, &names.paths, &names.sources) == (data.kind, &data.paths, &data.sources) {
        (data.paths, data.sources) = (run.data.paths, run.data.sources);
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
        damaged.iter().for_each(|e| output.warn(&format!("a damaged checkpoint is passed over: {e}")));
        return newest
            .map(|checkpoint| checkpoint.path().to_path_buf())
            .ok_or_else(|| missing("the run has no intact checkpoint yet"));
    }
    Ok(path.to_path_buf())
}

fn sealed(path: &Path, numerics: Numerics) -> Result<LoadedModel, Failure> {
    load_sealed(path, numerics).map_err(checkpoint_failure)
}

/// The tokenizer beside a model, if there is one.
fn tokenizer_in(path: &Path) -> Result<Option<Tokenizer>, Failure> {
    match path.join("tokenizer.json") {
        file if file.exists() => Tokenizer::from_file(&file).map(Some).map_err(|e| Failure::running(e.to_string())),
        _ => Ok(None),
    }
}

/// Refuses weights that do not fit into the memory there is, before they are taken. Files that cannot be read are for the loader to say.
fn check_memory(path: &Path, precision: Precision) -> Result<(), Failure> {
    let Ok(needed) = sealed_bytes(path, precision) else { return Ok(()) };
    match Available::now() {
        Some(Available { bytes, bound }) if needed > bytes => Err(Failure::running(format!(
            "{}: its weights take {}, and {bound} leaves {}",
            path.display(),
            gib(needed),
            gib(bytes)
        ))),
        _ => Ok(()),
    }
}

/// A model that is not there is a wrong argument; one that is damaged is a failure.
pub fn checkpoint_failure(error: CheckpointError) -> Failure {
    Failure::from(TrainError::from(error))
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        TrainError::from(error).into()
    }
}
