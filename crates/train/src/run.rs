//! A run from its first to its last file: data, directory, steps, evaluations, checkpoints, and the report at the end.
//!
//! Order matters. Everything that can be refused (config, data, model) is looked at before the run directory is made; the directory
//! is locked before anything is written into it; the metrics line of a step is written before the checkpoint that claims it.

mod resume;
mod under_way;
mod report;

use std::path::Path;

use mixtura_data::{Dataset, FileContent, TokenizerChoice};
use mixtura_infer::available::{self, Available};
use mixtura_kernels::precision::Precision;
use mixtura_kernels::ways::Choice;

use crate::config::RunConfig;
use crate::error::TrainError;
use crate::interrupt::Interrupt;
use crate::memory::MemoryPlan;
use crate::progress::{self, Verbosity};
use crate::run_dir::{RunDir, write_whole};
use crate::trainer::Trainer;

pub use report::{RunReport, Status, StepSeconds};
pub use resume::resume;
use under_way::{HeldBack, Run};

/// What decides how a run is carried out, but not what it computes.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// Saves and stops after this many steps in all.
    pub stop_after: Option<u64>,
    /// How much is said on stderr.
    pub verbosity: Verbosity,
    /// Asks the run to save and stop.
    pub interrupt: Interrupt,
    /// Starts even if the memory that the run needs is not there.
    pub force: bool,
}

/// Starts a run in `out`, or in a fresh directory under `runs/`.
pub fn start(mut config: RunConfig, out: Option<&Path>, options: &RunOptions) -> Result<RunReport, TrainError> {
    config.data = config.data.with_absolute_paths()?;
    announce_tokenizer(&config, options);
    let Dataset { tokenizer, train, validation, evaluation, contents, .. } = mixtura_data::open(&config.data)?;
    config.fit_vocabulary(tokenizer.vocab_size())?;
    settle_way(&mut config);
    let memory = plan_memory(&config, options)?;
    let mut trainer = Trainer::new(&config, train)?;
    trainer.contents = contents;
    // From here on there are files to leave whole.
    options.interrupt.save_first();
    let dir = RunDir::create(out, &config.name)?;
    write_whole(&dir.config(), &config.to_toml())?;
    write_contents(&dir, &trainer.contents)?;
    let held_back = HeldBack { tokenizer, validation, evaluation };
    Run::new(config, dir, trainer, held_back, memory, options)?.carry_out(&[])
}

/// Writes down the way of `bf16-native`: on another machine the run keeps the order of its sums.
fn settle_way(config: &mut RunConfig) {
    let train = &mut config.train;
    if train.precision == Precision::Bf16Native && train.way.is_none() {
        train.way = Some(Choice::of(train.precision).way);
    }
}

/// What the run will hold, or the refusal of one that cannot be held. The data is in memory already.
fn plan_memory(config: &RunConfig, options: &RunOptions) -> Result<MemoryPlan, TrainError> {
    let held = available::held();
    let plan = MemoryPlan::of(config, held);
    match Available::now() {
        Some(available) if !options.force && plan.total.saturating_sub(held) > available.bytes => {
            let way_out = MemoryPlan::way_out(config, held, available.bytes);
            Err(TrainError::Memory { plan, available, way_out })
        }
        _ => Ok(plan),
    }
}

/// Training a tokenizer can take a minute, in which nothing else is heard.
fn announce_tokenizer(config: &RunConfig, options: &RunOptions) {
    if config.data.tokenizer == Some(TokenizerChoice::Bpe) && options.verbosity > Verbosity::Quiet {
        let entries = config.data.bpe_vocab;
        progress::line(&format!("training a BPE tokenizer of {entries} entries on the training text"));
    }
}

/// Remembers what the data files held, and by which size and time that can be told without reading them.
fn write_contents(dir: &RunDir, contents: &[FileContent]) -> Result<(), TrainError> {
    if contents.is_empty() {
        return Ok(());
    }
    let text = serde_json::to_string_pretty(contents).expect("paths and hashes are text");
    write_whole(&dir.contents(), &text)
}
