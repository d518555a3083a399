//! `[data]` of a run's configuration, and the data set it opens.
//!
//! | kind | paths | default tokenizer |
//! | --- | --- | --- |
//! | `propositions` | none: generated | `propositions` |
//! | `text` | plain text files | `byte` |
//! | `jsonl` | JSON lines files | `byte` |
//! | `shards` | token shards | none: must be the `tokenizer.json` they were made with, or `byte` |

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::corpus::{ShardReader, SplitRun, TokenRun, WindowSource, held_back, read_jsonl, read_text};
use crate::error::DataError;
use crate::loader::{Batch, IGNORED, Loader, LoaderOptions, RowSource, WeightedSource};
use crate::propositions::{Counted, EvaluationItem, PropositionsConfig, PropositionsSource, Split, evaluation_items};
use crate::sampler::Mixing;
use crate::tokenizer::Tokenizer;

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
            _ => Self::File(text.into()),
        }
    }
}

impl From<TokenizerChoice> for String {
    fn from(choice: TokenizerChoice) -> Self {
        match choice {
            TokenizerChoice::Byte => "byte".into(),
            TokenizerChoice::Propositions => "propositions".into(),
            TokenizerChoice::Bpe => "bpe".into(),
            TokenizerChoice::File(path) => path.display().to_string(),
        }
    }
}

/// One of several sources, mixed row by row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// Its file.
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
    /// Its files, each a source of its own with its number of rows as share.
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
        if self.batch.checked_mul(self.context).is_none_or(|tokens| tokens > 1 << 31) {
            let found = self.batch.to_string();
            return error("batch", found, "batch x context must stay below 2^31 positions");
        }
        if !(0.0..=0.9).contains(&self.validation_fraction) {
            let found = self.validation_fraction.to_string();
            return error("validation_fraction", found, "a fraction from 0 to 0.9 is possible");
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
    /// Names of the sources, as numbered in [`Batch::sources`].
    pub source_names: Vec<String>,
    /// Tokens held for training, where the data is finite.
    pub train_tokens: Option<u64>,
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
    config.validate()?;
    match config.kind {
        DataKind::Propositions => open_propositions(config),
        _ => open_files(config),
    }
}

/// Opens `config`'s data with a tokenizer that is already there, as `eval` does with the one saved beside a model.
pub fn open_with_tokenizer(config: &DataConfig, tokenizer: Tokenizer) -> Result<Dataset, DataError> {
    config.validate()?;
    match config.kind {
        DataKind::Propositions => propositions_with(config, tokenizer),
        _ => files_with(config, read_sources(config)?, tokenizer),
    }
}

/// The validation rows of one file, whatever the run was trained on (`mixtura eval --data FILE`): all of it, in order.
/// The kind is told by the file's ending: `.jsonl` and `.tokens`, else plain text.
pub fn open_file_for_evaluation(
    path: &Path,
    config: &DataConfig,
    tokenizer: &Tokenizer,
) -> Result<ValidationSet, DataError> {
    let kind = match path.extension().and_then(|ending| ending.to_str()) {
        Some("jsonl") => DataKind::Jsonl,
        Some("tokens") => DataKind::Shards,
        _ => DataKind::Text,
    };
    let config = DataConfig { kind, validation_fraction: 0.0, ..config.clone() };
    let run = encode_source(&config, read_source(&config, path)?, tokenizer)?.train;
    let name = path.display().to_string();
    ValidationSet::of_runs(&config, tokenizer, vec![(name, run)], 0)
}

fn open_propositions(config: &DataConfig) -> Result<Dataset, DataError> {
    let tokenizer = match &config.tokenizer {
        None | Some(TokenizerChoice::Propositions) => Tokenizer::propositions(),
        Some(TokenizerChoice::Byte) => Tokenizer::byte(),
        Some(TokenizerChoice::File(path)) => Tokenizer::from_file(path)?,
        Some(TokenizerChoice::Bpe) => {
            let PropositionsConfig { depths, modalities, .. } = &config.propositions;
            let sample = (0..2000).map(|index| {
                let item = crate::propositions::generate(0, Split::Train, depths, depths, modalities, index);
                item.question() + &item.answer()
            });
            Tokenizer::train_bpe(sample, config.bpe_vocab)?
        }
    };
    propositions_with(config, tokenizer)
}

fn propositions_with(config: &DataConfig, tokenizer: Tokenizer) -> Result<Dataset, DataError> {
    let source = |seed, split| {
        let items = config.propositions.clone();
        PropositionsSource::new(items, tokenizer.clone(), config.context, seed, split, config.loss_on)
    };
    let train = Arc::new(source(config.seed, Split::Train)?);
    let validation = Arc::new(source(VALIDATION_SEED, Split::Iid)?);
    let batches = if config.validation_batches == 0 { 16 } else { config.validation_batches };
    let validation = ValidationSet {
        sources: vec![(validation as Arc<dyn RowSource>, (batches * config.batch) as u64)],
        batch: config.batch,
        context: config.context,
        pad: pad_of(&tokenizer),
        limit: batches,
    };
    let evaluation = evaluation_items(&config.propositions, &tokenizer)?;
    let identity = format!("{:?} {:?} {}", config.propositions, config.loss_on, tokenizer.vocab_size());
    let train = loader(config, vec![WeightedSource { rows: train, share: 1 }], &tokenizer, identity);
    let source_names = vec!["propositions".into()];
    Ok(Dataset { tokenizer, train, validation, evaluation, source_names, train_tokens: None })
}

/// Validation rows are the same whatever the seed of training, so that runs can be compared.
const VALIDATION_SEED: u64 = 0x7661_6c69_6461_7465;

fn open_files(config: &DataConfig) -> Result<Dataset, DataError> {
    let sources = read_sources(config)?;
    let tokenizer = match &config.tokenizer {
        None | Some(TokenizerChoice::Byte) => Tokenizer::byte(),
        Some(TokenizerChoice::Propositions) => Tokenizer::propositions(),
        Some(TokenizerChoice::File(path)) => Tokenizer::from_file(path)?,
        Some(TokenizerChoice::Bpe) => Tokenizer::train_bpe(training_text(config, &sources), config.bpe_vocab)?,
    };
    files_with(config, sources, tokenizer)
}

/// A file as it was read, before tokenization.
enum Raw {
    Documents(Vec<String>),
    Tokens(ShardReader),
}

struct ReadSource {
    path: PathBuf,
    share: Option<u64>,
    raw: Raw,
}

fn read_sources(config: &DataConfig) -> Result<Vec<ReadSource>, DataError> {
    let plain = config.paths.iter().map(|path| SourceConfig { path: path.clone(), share: None });
    plain
        .chain(config.sources.iter().cloned())
        .map(|SourceConfig { path, share }| Ok(ReadSource { raw: read_source(config, &path)?, path, share }))
        .collect()
}

fn read_source(config: &DataConfig, path: &Path) -> Result<Raw, DataError> {
    match config.kind {
        DataKind::Jsonl => Ok(Raw::Documents(read_jsonl(path, &config.text_field)?)),
        DataKind::Shards => Ok(Raw::Tokens(ShardReader::open(path)?)),
        DataKind::Text | DataKind::Propositions => Ok(Raw::Documents(vec![read_text(path)?])),
    }
}

/// The text that BPE may see: what is trained on, never what is held back.
fn training_text(config: &DataConfig, sources: &[ReadSource]) -> Vec<String> {
    let documents = sources.iter().flat_map(|source| match &source.raw {
        Raw::Documents(documents) => documents.as_slice(),
        Raw::Tokens(_) => &[],
    });
    match config.kind {
        DataKind::Jsonl => documents.filter(|d| !held_back(d, config.validation_fraction)).cloned().collect(),
        _ => documents.map(|d| d[..tail_start(d, config.validation_fraction)].to_string()).collect(),
    }
}

/// Where the held-back tail of a document starts: at a character's start.
fn tail_start(document: &str, fraction: f64) -> usize {
    let wanted = (document.len() as f64 * (1.0 - fraction)).floor() as usize;
    (wanted.min(document.len())..=document.len()).find(|at| document.is_char_boundary(*at)).unwrap_or(document.len())
}

fn encode_source(config: &DataConfig, raw: Raw, tokenizer: &Tokenizer) -> Result<SplitRun, DataError> {
    let fraction = config.validation_fraction;
    let documents = match raw {
        Raw::Documents(documents) => documents,
        Raw::Tokens(shard) => {
            shard.check_tokenizer(tokenizer)?;
            let run = TokenRun::from_shard(shard);
            let at = (run.len() as f64 * (1.0 - fraction)).floor() as usize;
            let (train, validation) = run.split_at(at.min(run.len()));
            return Ok(SplitRun { train, validation });
        }
    };
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for document in &documents {
        let (start, end) = match config.kind {
            DataKind::Jsonl if held_back(document, fraction) => ("", document.as_str()),
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
    let (mut train, mut validation, mut names) = (Vec::new(), Vec::new(), Vec::new());
    let mut train_tokens = 0;
    let mut identity = String::new();
    for (number, ReadSource { path, share, raw }) in sources.into_iter().enumerate() {
        let name = path.display().to_string();
        let parts = encode_source(config, raw, &tokenizer)?;
        let tokens = parts.train.len() as u64;
        let seed = crate::rng::mix(config.seed ^ crate::rng::mix(number as u64 + 1));
        let Some(rows) = WindowSource::shuffled(parts.train, config.context, tokenizer.bos(), seed) else {
            let needed = WindowSource::needed(config.context, tokenizer.bos()) as u64;
            return Err(DataError::TooShort { name, tokens, context: config.context, needed });
        };
        identity += &format!("{tokens} ");
        train_tokens += tokens;
        let share = share.unwrap_or(rows.rows());
        train.push(WeightedSource { rows: Arc::new(rows), share });
        validation.push((name.clone(), parts.validation));
        names.push(name);
    }
    let validation = if config.validation_fraction == 0.0 {
        ValidationSet::none(config, &tokenizer)
    } else {
        ValidationSet::of_runs(config, &tokenizer, validation, config.validation_batches)?
    };
    identity += &tokenizer.vocab_size().to_string();
    let train = loader(config, train, &tokenizer, identity);
    let train_tokens = Some(train_tokens);
    Ok(Dataset { tokenizer, train, validation, evaluation: Vec::new(), source_names: names, train_tokens })
}

fn loader(config: &DataConfig, sources: Vec<WeightedSource>, tokenizer: &Tokenizer, identity: String) -> Loader {
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

/// The held-back rows: every pass gives the same batches, in the order of the text.
#[derive(Clone)]
pub struct ValidationSet {
    sources: Vec<(Arc<dyn RowSource>, u64)>,
    batch: usize,
    context: usize,
    pad: u32,
    /// Batches of a pass at most; 0 for all.
    limit: usize,
}

impl ValidationSet {
    /// One pass, lazily. The last batch may have fewer rows.
    pub fn batches(&self) -> impl Iterator<Item = Batch> + '_ {
        let rows = self.rows();
        let batches = rows.div_ceil(self.batch as u64);
        let limit = if self.limit == 0 { batches } else { batches.min(self.limit as u64) };
        (0..limit).map(move |number| {
            let first = number * self.batch as u64;
            let count = (rows - first).min(self.batch as u64) as usize;
            self.rows_from(first, count)
        })
    }

    /// Rows held back.
    pub fn rows(&self) -> u64 {
        self.sources.iter().map(|(_, rows)| rows).sum()
    }

    /// Bytes of text that a batch's counted targets stand for: for bits per byte.
    pub fn target_bytes(batch: &Batch, tokenizer: &Tokenizer) -> u64 {
        let lengths = tokenizer.byte_lengths();
        let counted = batch.targets.iter().filter(|target| **target != IGNORED);
        counted.map(|target| u64::from(lengths[*target as usize])).sum()
    }

    fn none(config: &DataConfig, tokenizer: &Tokenizer) -> Self {
        let (batch, context, pad) = (config.batch, config.context, pad_of(tokenizer));
        Self { sources: Vec::new(), batch, context, pad, limit: 0 }
    }

    fn of_runs(
        config: &DataConfig,
        tokenizer: &Tokenizer,
        runs: Vec<(String, TokenRun)>,
        limit: usize,
    ) -> Result<Self, DataError> {
        let mut set = Self { limit, ..Self::none(config, tokenizer) };
        let tokens: u64 = runs.iter().map(|(_, run)| run.len() as u64).sum();
        let name = runs
            .first()
            .map(|(name, _)| format!("the part of {name} held back by data.validation_fraction"))
            .unwrap_or_default();
        for (_, run) in runs {
            if let Some(rows) = WindowSource::in_order(run, config.context, tokenizer.bos()) {
                let count = rows.rows();
                set.sources.push((Arc::new(rows), count));
            }
        }
        if set.sources.is_empty() {
            let needed = WindowSource::needed(config.context, tokenizer.bos()) as u64;
            return Err(DataError::TooShort { name, tokens, context: config.context, needed });
        }
        Ok(set)
    }

    fn rows_from(&self, first: u64, count: usize) -> Batch {
        let positions = count * self.context;
        let mut made = Batch {
            ids: vec![self.pad; positions],
            targets: vec![IGNORED; positions],
            batch: count,
            seq: self.context,
            sources: Vec::with_capacity(count),
        };
        let rows = made.ids.chunks_exact_mut(self.context).zip(made.targets.chunks_exact_mut(self.context));
        for (row, (ids, targets)) in (first..).zip(rows) {
            let (mut source, mut row) = (0, row);
            while row >= self.sources[source].1 {
                row -= self.sources[source].1;
                source += 1;
            }
            self.sources[source].0.fill(row, ids, targets);
            made.sources.push(source as u32);
        }
        made
    }
}
