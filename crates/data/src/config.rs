//! `[data]` of a run's configuration, and the data set it opens.
//!
//! | kind | paths | default tokenizer |
//! | --- | --- | --- |
//! | `propositions` | none: generated | `propositions` |
//! | `text` | plain text files | `byte` |
//! | `jsonl` | JSON lines files | `byte` |
//! | `shards` | token shards | none: must be the `tokenizer.json` they were made with, or `byte` |

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::corpus::{
    ScoredWindows, ShardReader, SplitRun, TokenRun, WindowSource, documents_of_jsonl, hold_back, read_text,
};
use crate::error::DataError;
use crate::files::{FileContent, path_text, paths_text};
use crate::loader::{Loader, LoaderOptions, RowSource, WeightedSource};
use crate::propositions::{Counted, EvaluationItem, PropositionsConfig, PropositionsSource, Split, evaluation_items};
use crate::sampler::Mixing;
use crate::tokenizer::Tokenizer;
use crate::validation::ValidationSet;

/// What the data is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataKind {
    /// The generated world of propositions.
    #[default]
    Propositions,
    /// Plain text files.
    Text,
    /// JSON lines files.
    Jsonl,
    /// Token shards.
    Shards,
}

/// Which tokenizer: `"byte"`, `"propositions"`, `"bpe"` (trained on the training text), or the path of a `tokenizer.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum TokenizerChoice {
    /// One id per byte.
    Byte,
    /// The fixed vocabulary of the propositions world.
    Propositions,
    /// Byte-level BPE, trained when the data is opened.
    Bpe,
    /// A `tokenizer.json`.
    File(PathBuf),
}

impl From<String> for TokenizerChoice {
    fn from(text: String) -> Self {
        match text.as_str() {
            "byte" => Self::Byte,
            "propositions" => Self::Propositions,
            "bpe" => Self::Bpe,
            _ => Self::File(path_text::from_text(&text)),
        }
    }
}

impl From<TokenizerChoice> for String {
    fn from(choice: TokenizerChoice) -> Self {
        match choice {
            TokenizerChoice::Byte => "byte".into(),
            TokenizerChoice::Propositions => "propositions".into(),
            TokenizerChoice::Bpe => "bpe".into(),
            TokenizerChoice::File(path) => path_text::to_text(&path),
        }
    }
}

/// One of several sources, mixed row by row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// Its file.
    #[serde(with = "path_text")]
    pub path: PathBuf,
    /// Its share of the rows, relative to the other shares; left out, its number of rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<u64>,
}

/// `[data]`: everything that decides what a run is trained on.
///
/// ```
/// use mixtura_data::DataConfig;
/// let config: DataConfig = serde_json::from_str(r#"{"kind": "text", "paths": ["a.txt"], "context": 64}"#).unwrap();
/// assert_eq!(config.batch, DataConfig::default().batch);
/// assert!(serde_json::from_str::<DataConfig>(r#"{"contxt": 64}"#).is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// What the data is.
    pub kind: DataKind,
    /// Its files, each a source of its own with its number of rows as share. A single one may be a plain string.
    #[serde(with = "paths_text")]
    pub paths: Vec<PathBuf>,
    /// Further files, with shares of their own.
    pub sources: Vec<SourceConfig>,
    /// How the rows of several sources are interleaved.
    pub mixing: Mixing,
    /// The field of JSON lines that holds the text.
    pub text_field: String,
    /// Which tokenizer; left out, the default of the kind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<TokenizerChoice>,
    /// Vocabulary size for `tokenizer = "bpe"`.
    pub bpe_vocab: usize,
    /// Positions per row.
    pub context: usize,
    /// Rows per batch.
    pub batch: usize,
    /// Part of the data that is held back for validation.
    pub validation_fraction: f64,
    /// Batches of a validation pass at most; 0 for all.
    pub validation_batches: usize,
    /// Seed of the order of rows and of generated items.
    pub seed: u64,
    /// Batches made ahead of the training thread.
    pub prefetch: usize,
    /// Which tokens of a proposition count in the loss.
    pub loss_on: Counted,
    /// What to draw, for `kind = "propositions"`.
    pub propositions: PropositionsConfig,
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            kind: DataKind::Propositions,
            paths: Vec::new(),
            sources: Vec::new(),
            mixing: Mixing::Dispersed,
            text_field: "text".into(),
            tokenizer: None,
            bpe_vocab: 1024,
            context: 256,
            batch: 16,
            validation_fraction: 0.05,
            validation_batches: 16,
            seed: 0,
            prefetch: 2,
            loss_on: Counted::Answer,
            propositions: PropositionsConfig::default(),
        }
    }
}

/// As long as the longest context of a model.
const LONGEST_ROW: usize = 1 << 24;

impl DataConfig {
    /// Refuses values that cannot work whatever the files hold.
    pub fn validate(&self) -> Result<(), DataError> {
        let error = |key: &str, found: String, expected: &str| {
            Err(DataError::Config { key: key.into(), found, expected: expected.into() })
        };
        if self.context < 2 {
            return error("context", self.context.to_string(), "at least 2 positions per row are needed");
        }
        if self.batch == 0 {
            return error("batch", "0".into(), "at least 1 row per batch is needed");
        }
        if self.context > LONGEST_ROW {
            return error("context", self.context.to_string(), "at most 2^24 positions per row are possible");
        }
        if self.batch.checked_mul(self.context).is_none_or(|tokens| tokens > 1 << 31) {
            let found = self.batch.to_string();
            return error("batch", found, "batch x context must stay below 2^31 positions");
        }
        if !(0.0..=0.9).contains(&self.validation_fraction) {
            let found = self.validation_fraction.to_string();
            return error("validation_fraction", found, "a fraction from 0 to 0.9 is possible");
        }
        if self.validation_batches > 1 << 24 {
            let found = self.validation_batches.to_string();
            return error("validation_batches", found, "at most 2^24 batches; 0 takes all of a finite validation part");
        }
        if self.bpe_vocab > 1 << 24 {
            return error("bpe_vocab", self.bpe_vocab.to_string(), "at most 2^24 entries are supported");
        }
        if self.prefetch > 1024 {
            return error("prefetch", self.prefetch.to_string(), "at most 1024 batches can be made ahead");
        }
        if self.sources.iter().any(|source| source.share == Some(0)) {
            return error("sources.share", "0".into(), "a share is at least 1; leave the source out instead");
        }
        if self.sources.iter().any(|source| source.share.is_some_and(|share| share > 1 << 48)) {
            return error("sources.share", "more than 2^48".into(), "shares are relative, smaller numbers do");
        }
        let files = self.paths.len() + self.sources.len();
        match self.kind {
            DataKind::Propositions if files > 0 => {
                error("paths", format!("{files} files"), "kind = \"propositions\" is generated and reads no files")
            }
            DataKind::Propositions => self.propositions.validate(),
            _ if files == 0 => error("paths", "[]".into(), "this kind of data needs at least one file"),
            DataKind::Shards if matches!(self.tokenizer, None | Some(TokenizerChoice::Bpe)) => {
                let expected = "shards need the tokenizer they were made with: \"byte\" or a tokenizer.json";
                let found = self.tokenizer.clone().map_or("(none)".into(), String::from);
                error("tokenizer", found, expected)
            }
            _ => Ok(()),
        }
    }
}

impl DataConfig {
    /// The key that names source number `number`: the files of `paths` come before those of `sources`.
    fn key_of_file(&self, number: usize) -> String {
        match number.checked_sub(self.paths.len()) {
            None => format!("data.paths[{number}]"),
            Some(number) => format!("data.sources[{number}]"),
        }
    }
}

/// What a configuration opens.
pub struct Dataset {
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// Training batches.
    pub train: Loader,
    /// The held-back part, always in the same batches.
    pub validation: ValidationSet,
    /// For propositions, what to ask: by split and depth, in this order.
    pub evaluation: Vec<EvaluationItem>,
    /// Names of the sources, as numbered in [`Batch::sources`](crate::Batch::sources).
    pub source_names: Vec<String>,
    /// Tokens held for training, where the data is finite.
    pub train_tokens: Option<u64>,
    /// What each file held, in the order of the sources.
    pub contents: Vec<FileContent>,
}

/// Opens the data of a configuration: reads, tokenizes and splits the files, or sets up the generator.
///
/// ```
/// use mixtura_data::{DataConfig, open};
/// let mut data = open(&DataConfig::default()).unwrap();
/// let batch = data.train.next_batch();
/// assert_eq!(batch.ids.len(), batch.batch * batch.seq);
/// assert!(data.validation.batches().count() > 0);
/// ```
pub fn open(config: &DataConfig) -> Result<Dataset, DataError> {
    reopen(config, None, &[])
}

/// Opens the data of a run that goes on: with the tokenizer it was started with, if there is one, and what is `known` of its files.
pub fn reopen(config: &DataConfig, tokenizer: Option<Tokenizer>, known: &[FileContent]) -> Result<Dataset, DataError> {
    config.validate()?;
    if config.kind == DataKind::Propositions {
        let tokenizer = tokenizer.map_or_else(|| propositions_tokenizer(config), Ok)?;
        return propositions_with(config, tokenizer);
    }
    let sources = read_sources(config, known)?;
    let tokenizer = tokenizer.map_or_else(|| files_tokenizer(config, &sources), Ok)?;
    files_with(config, sources, tokenizer)
}

/// How a file is cut for [`open_file_for_evaluation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvaluationWindows {
    /// Positions of a window.
    pub context: usize,
    /// Tokens from one window to the next, at most `context`; tokens that an earlier window predicted do not count again.
    pub stride: usize,
    /// Windows per batch.
    pub batch: usize,
}

/// The validation rows of one file, whatever the run was trained on (`mixtura eval --data FILE`): all of it, in order. The kind is
/// told by the file's ending: `.jsonl`, `.ndjson` and `.json` are objects with the text in `text_field`, `.tokens` is a token shard,
/// everything else plain text.
pub fn open_file_for_evaluation(
    path: &Path,
    text_field: &str,
    windows: EvaluationWindows,
    tokenizer: &Tokenizer,
) -> Result<ValidationSet, DataError> {
    let (kind, text_field) = (kind_of(path), text_field.into());
    let config = DataConfig { kind, validation_fraction: 0.0, text_field, ..DataConfig::default() };
    let (raw, _) = read_source(&config, path, &[])?;
    let held = split(&config, [&raw])?.remove(0);
    let run = encode_source(&config, raw, &held, tokenizer)?.train;
    ValidationSet::of_runs(windows, 0, vec![run], tokenizer, || (path.display().to_string(), ""))
}

/// What a configuration does not train on.
pub struct HeldBack {
    /// The held-back part of the files, or rows of propositions of their own.
    pub validation: ValidationSet,
    /// For propositions, what to ask.
    pub evaluation: Vec<EvaluationItem>,
    /// What each file held, in the order of the sources.
    pub contents: Vec<FileContent>,
}

/// What `config` holds back and what it asks, without anything to train on, for a tokenizer that is already there. The held-back part
/// is cut as in training, at most `validation_batches` batches of it; or, given `windows`, into those, all of it.
pub fn open_for_evaluation(
    config: &DataConfig,
    windows: Option<EvaluationWindows>,
    tokenizer: &Tokenizer,
) -> Result<HeldBack, DataError> {
    config.validate()?;
    if config.kind == DataKind::Propositions {
        if let Some(windows) = windows {
            let (found, expected) =
                (windows.context.to_string(), "rows of propositions are whole items; other windows need --data FILE");
            return Err(DataError::Config { key: "context".into(), found, expected: expected.into() });
        }
        let data = propositions_with(config, tokenizer.clone())?;
        return Ok(HeldBack { validation: data.validation, evaluation: data.evaluation, contents: data.contents });
    }
    let sources = read_sources(config, &[])?;
    let held = split(config, sources.iter().map(|source| &source.raw))?;
    let (mut runs, mut names, mut contents) = (Vec::new(), Vec::new(), Vec::new());
    for (ReadSource { path, raw, content, .. }, held) in sources.into_iter().zip(held) {
        runs.push(encode_source(config, raw, &held, tokenizer)?.validation);
        names.push(path.display().to_string());
        contents.push(content);
    }
    let validation = validation(config, windows, runs, &names, tokenizer)?;
    Ok(HeldBack { validation, evaluation: Vec::new(), contents })
}

/// The held-back part of files, in the windows of training or in others.
fn validation(
    config: &DataConfig,
    windows: Option<EvaluationWindows>,
    runs: Vec<TokenRun>,
    names: &[String],
    tokenizer: &Tokenizer,
) -> Result<ValidationSet, DataError> {
    if config.validation_fraction == 0.0 {
        return Ok(ValidationSet::none(config));
    }
    let (context, batch) = (config.context, config.batch);
    let limit = if windows.is_some() { 0 } else { config.validation_batches };
    let windows = windows.unwrap_or(EvaluationWindows { context, stride: context, batch });
    let what = || {
        let name = format!("the part of {} held back by data.validation_fraction", names.join(", "));
        (name, "; a larger fraction holds back more, and 0 nothing")
    };
    ValidationSet::of_runs(windows, limit, runs, tokenizer, what)
}

/// What a file's ending says that it holds.
pub fn kind_of(path: &Path) -> DataKind {
    let ending = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    match ending.as_str() {
        "jsonl" | "ndjson" | "json" => DataKind::Jsonl,
        "tokens" => DataKind::Shards,
        _ => DataKind::Text,
    }
}

fn propositions_tokenizer(config: &DataConfig) -> Result<Tokenizer, DataError> {
    match &config.tokenizer {
        None | Some(TokenizerChoice::Propositions) => Ok(Tokenizer::propositions()),
        Some(TokenizerChoice::Byte) => Ok(Tokenizer::byte()),
        Some(TokenizerChoice::File(path)) => Tokenizer::from_file(path),
        Some(TokenizerChoice::Bpe) => {
            let PropositionsConfig { depths, modalities, .. } = &config.propositions;
            let sample = (0..2000).map(|index| {
                let item = crate::propositions::generate(0, Split::Train, depths, depths, modalities, index);
                item.question() + &item.answer()
            });
            Tokenizer::train_bpe(sample, config.bpe_vocab)
        }
    }
}

fn propositions_with(config: &DataConfig, tokenizer: Tokenizer) -> Result<Dataset, DataError> {
    let source = |seed, split| {
        let items = config.propositions.clone();
        PropositionsSource::new(items, tokenizer.clone(), config.context, seed, split, config.loss_on)
    };
    let train = Arc::new(source(config.seed, Split::Train)?);
    let validation: Arc<dyn RowSource> = Arc::new(source(VALIDATION_SEED, Split::Iid)?);
    let batches = if config.validation_batches == 0 { 16 } else { config.validation_batches };
    let validation = ValidationSet::of_rows(config, validation, batches, pad_of(&tokenizer));
    let evaluation = evaluation_items(&config.propositions, &tokenizer)?;
    let PropositionsConfig { depths, modalities, packing, .. } = &config.propositions;
    let mut identity = identity(config, &tokenizer);
    identity.insert("data.propositions.depths".into(), text_of(depths));
    identity.insert("data.propositions.modalities".into(), text_of(modalities));
    identity.insert("data.propositions.packing".into(), text_of(packing));
    identity.insert("data.loss_on".into(), text_of(&config.loss_on));
    let train = loader(config, vec![WeightedSource { rows: train, share: 1 }], &tokenizer, identity);
    let source_names = vec!["propositions".into()];
    let contents = Vec::new();
    Ok(Dataset { tokenizer, train, validation, evaluation, source_names, train_tokens: None, contents })
}

/// Validation rows are the same whatever the seed of training, so that runs can be compared.
const VALIDATION_SEED: u64 = 0x7661_6c69_6461_7465;

fn files_tokenizer(config: &DataConfig, sources: &[ReadSource]) -> Result<Tokenizer, DataError> {
    match &config.tokenizer {
        None | Some(TokenizerChoice::Byte) => Ok(Tokenizer::byte()),
        Some(TokenizerChoice::Propositions) => Ok(Tokenizer::propositions()),
        Some(TokenizerChoice::File(path)) => Tokenizer::from_file(path),
        Some(TokenizerChoice::Bpe) => Tokenizer::train_bpe(training_text(config, sources)?, config.bpe_vocab),
    }
}

/// A file as it was read, before tokenization.
enum Raw {
    Documents(Vec<String>),
    Tokens(ShardReader),
}

impl Raw {
    fn documents(&self) -> &[String] {
        match self {
            Self::Documents(documents) => documents,
            Self::Tokens(_) => &[],
        }
    }
}

struct ReadSource {
    path: PathBuf,
    share: Option<u64>,
    raw: Raw,
    content: FileContent,
}

fn read_sources(config: &DataConfig, known: &[FileContent]) -> Result<Vec<ReadSource>, DataError> {
    let plain = config.paths.iter().map(|path| SourceConfig { path: path.clone(), share: None });
    plain
        .chain(config.sources.iter().cloned())
        .map(|SourceConfig { path, share }| {
            let (raw, content) = read_source(config, &path, known)?;
            Ok(ReadSource { path, share, raw, content })
        })
        .collect()
}

fn read_source(config: &DataConfig, path: &Path, known: &[FileContent]) -> Result<(Raw, FileContent), DataError> {
    if config.kind == DataKind::Shards {
        let shard = ShardReader::open(path)?;
        let content = FileContent::of_shard(path, &shard, known)?;
        return Ok((Raw::Tokens(shard), content));
    }
    let text = read_text(path)?;
    let content = FileContent::of_text(path, &text);
    let documents = match config.kind {
        DataKind::Jsonl => documents_of_jsonl(&text, &config.text_field, path)?,
        _ => vec![text],
    };
    Ok((Raw::Documents(documents), content))
}

/// For every document of every source, whether all of it is held back; text gives up the end of each document instead.
fn split<'a>(config: &DataConfig, sources: impl IntoIterator<Item = &'a Raw>) -> Result<Vec<Vec<bool>>, DataError> {
    let documents: Vec<&[String]> = sources.into_iter().map(Raw::documents).collect();
    match config.kind {
        DataKind::Jsonl => hold_back(&documents, config.validation_fraction),
        _ => Ok(documents.iter().map(|documents| vec![false; documents.len()]).collect()),
    }
}

/// The text that BPE may see: what is trained on, never what is held back.
fn training_text(config: &DataConfig, sources: &[ReadSource]) -> Result<Vec<String>, DataError> {
    let held = split(config, sources.iter().map(|source| &source.raw))?;
    let documents = sources.iter().flat_map(|source| source.raw.documents()).zip(held.into_iter().flatten());
    let trained = |(document, held): (&String, bool)| match config.kind {
        DataKind::Jsonl => (!held).then(|| document.clone()),
        _ => Some(document[..tail_start(document, config.validation_fraction)].to_string()),
    };
    Ok(documents.filter_map(trained).collect())
}

/// Where the held-back tail of a document starts: at a character's start. A document too short to be cut is trained on whole.
fn tail_start(document: &str, fraction: f64) -> usize {
    let wanted = tail_of(document.len(), fraction);
    (wanted..=document.len()).find(|at| document.is_char_boundary(*at)).unwrap_or(document.len())
}

/// Where the held-back tail of `length` bytes or tokens starts; something is left to train on.
fn tail_of(length: usize, fraction: f64) -> usize {
    match (length as f64 * (1.0 - fraction)).floor() as usize {
        0 => length,
        at => at.min(length),
    }
}

/// The tokens of one source; `held` says which of its documents are held back whole.
fn encode_source(config: &DataConfig, raw: Raw, held: &[bool], tokenizer: &Tokenizer) -> Result<SplitRun, DataError> {
    let fraction = config.validation_fraction;
    let documents = match raw {
        Raw::Documents(documents) => documents,
        Raw::Tokens(shard) => {
            shard.check_tokenizer(tokenizer)?;
            let run = TokenRun::from_shard(shard);
            let (train, validation) = run.split_at(tail_of(run.len(), fraction));
            return Ok(SplitRun { train, validation });
        }
    };
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for (document, held) in documents.iter().zip(held) {
        let (start, end) = match config.kind {
            DataKind::Jsonl if *held => ("", document.as_str()),
            DataKind::Jsonl => (document.as_str(), ""),
            _ => document.split_at(tail_start(document, fraction)),
        };
        for (part, run) in [(start, &mut train), (end, &mut validation)] {
            if !part.is_empty() {
                run.extend(tokenizer.encode(part)?);
                run.extend(tokenizer.eos());
            }
        }
    }
    Ok(SplitRun { train: TokenRun::from_ids(train), validation: TokenRun::from_ids(validation) })
}

fn files_with(config: &DataConfig, sources: Vec<ReadSource>, tokenizer: Tokenizer) -> Result<Dataset, DataError> {
    let (mut train, mut held_runs, mut names) = (Vec::new(), Vec::new(), Vec::new());
    let mut train_tokens = 0;
    let mut contents = Vec::new();
    let mut identity = identity(config, &tokenizer);
    identity.insert("data.validation_fraction".into(), config.validation_fraction.to_string());
    if config.kind == DataKind::Jsonl {
        identity.insert("data.text_field".into(), text_of(&config.text_field));
    }
    let held = split(config, sources.iter().map(|source| &source.raw))?;
    let mut has_whole_row = false;
    for (number, ReadSource { path, share, raw, content }) in sources.into_iter().enumerate() {
        let name = path.display().to_string();
        let parts = encode_source(config, raw, &held[number], &tokenizer)?;
        let tokens = parts.train.len() as u64;
        let seed = crate::rng::mix(config.seed ^ crate::rng::mix(number as u64 + 1));
        let Some(rows) = WindowSource::shuffled(parts.train, config.context, tokenizer.bos(), seed) else {
            let needed = ScoredWindows::needed(tokenizer.bos()) as u64;
            return Err(DataError::NothingToPredict { name, tokens, needed, help: "; leave it out" });
        };
        has_whole_row |= !rows.is_short();
        identity.insert(config.key_of_file(number), content.content());
        contents.push(content);
        train_tokens += tokens;
        let share = share.unwrap_or(rows.rows());
        train.push(WeightedSource { rows: Arc::new(rows), share });
        held_runs.push(parts.validation);
        names.push(name);
    }
    if !has_whole_row {
        let needed = WindowSource::needed(config.context, tokenizer.bos()) as u64;
        return Err(DataError::TooShort {
            name: names.join(", "),
            tokens: train_tokens,
            context: config.context,
            needed,
        });
    }
    let validation = validation(config, None, held_runs, &names, &tokenizer)?;
    let train = loader(config, train, &tokenizer, identity);
    let train_tokens = Some(train_tokens);
    Ok(Dataset { tokenizer, train, validation, evaluation: Vec::new(), source_names: names, train_tokens, contents })
}

/// What the rows of every kind of data depend on, by the name of its key.
fn identity(config: &DataConfig, tokenizer: &Tokenizer) -> BTreeMap<String, String> {
    let hash = blake3::hash(tokenizer.to_json().as_bytes()).to_hex();
    let tokenizer = format!("a vocabulary of {}, blake3 {}", tokenizer.vocab_size(), &hash[..16]);
    [("data.kind".to_string(), text_of(&config.kind)), ("data.tokenizer".to_string(), tokenizer)].into()
}

/// A value as a config file shows it.
fn text_of(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("keys of a config are text and numbers")
}

fn loader(
    config: &DataConfig,
    sources: Vec<WeightedSource>,
    tokenizer: &Tokenizer,
    identity: BTreeMap<String, String>,
) -> Loader {
    let options = LoaderOptions {
        batch: config.batch,
        context: config.context,
        pad: pad_of(tokenizer),
        mixing: config.mixing,
        seed: config.seed,
        prefetch: config.prefetch,
        identity,
    };
    Loader::new(sources, options)
}

/// What fills the free end of a row; its target never counts, so any id does where the vocabulary has no padding.
fn pad_of(tokenizer: &Tokenizer) -> u32 {
    tokenizer.pad().or(tokenizer.eos()).unwrap_or(0)
}
