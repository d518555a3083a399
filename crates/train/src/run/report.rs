//! What a run says at its end.

use std::path::{Path, PathBuf};

use mixtura_nn::ParameterCounts;
use serde::{Serialize, Serializer};

use crate::evaluate::{Accuracy, LossReport, Sample};
use crate::memory::MemoryPlan;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// All steps made, final model written.
    Done,
    /// Stopped where `--stop-after` said.
    Stopped,
    /// Stopped by a signal, after saving.
    Interrupted,
}

/// What a run has to say at its end.
#[derive(Debug, Clone, Serialize)]
pub struct RunReport {
    /// The run directory.
    #[serde(serialize_with = "shown")]
    pub run: PathBuf,
    /// How it ended.
    pub status: Status,
    /// Optimizer steps made, in all.
    pub step: u64,
    /// Tokens read, in all.
    pub tokens: u64,
    /// Seconds of training steps in this process, evaluation and checkpoints left out.
    pub training_seconds: f64,
    /// Seconds of this process in all.
    pub seconds: f64,
    /// Tokens per second over the training steps of this process; 0 if it made none.
    pub tokens_per_second: f64,
    /// Loss of the last step; none if this process made none and metrics.jsonl has lost it.
    pub loss: Option<f64>,
    /// Parameters, all and active.
    pub parameters: ParameterCounts,
    /// Loss on the validation split, at the end of a whole run.
    pub eval: Option<LossReport>,
    /// Accuracy on propositions, at the end of a whole run on them.
    pub accuracy: Option<Accuracy>,
    /// Questions and answers, likewise.
    pub samples: Vec<Sample>,
    /// The memory that the run was reckoned to hold, part by part, in bytes.
    pub memory: MemoryPlan,
    /// Most memory held, in bytes.
    pub peak_memory: Option<u64>,
    /// Mean seconds per step spent on data, forward, backward, optimizer and the loop itself.
    pub step_seconds: StepSeconds,
    /// Whether the final model is there. An interrupted run has one if it was only answering questions.
    #[serde(skip)]
    pub finished: bool,
}

/// Where the time of a mean step went.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct StepSeconds {
    /// Waiting for data.
    pub data: f64,
    /// Forward.
    pub forward: f64,
    /// Backward.
    pub backward: f64,
    /// Norm, clipping, AdamW.
    pub optimizer: f64,
    /// Everything else: metrics, progress, bookkeeping.
    pub overhead: f64,
}

/// A path need not be UTF-8, a document must be.
fn shown<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}
