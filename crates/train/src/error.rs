//! What can go wrong around a run, each with the thing it concerns.
//!
//! A [`TrainError`] knows the exit code that the command must return: 2 when what the person wrote cannot be run
//! (a key, a value, a file that is not there), 1 when a run that had started failed.

use std::path::{Path, PathBuf};

use mixtura_checkpoint::CheckpointError;
use mixtura_data::DataError;
use mixtura_infer::StepError;
use mixtura_infer::available::{Available, gib};

use crate::memory::MemoryPlan;

/// A config file, an override or a value in one of them that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{origin}: {message}")]
pub struct ConfigError {
    /// The file (with its line where known), or the override, that the message is about.
    pub origin: String,
    /// What was expected and what was found.
    pub message: String,
}

impl ConfigError {
    /// An error about `origin`.
    pub fn new(origin: impl Into<String>, message: impl Into<String>) -> Self {
        Self { origin: origin.into(), message: message.into() }
    }
}

/// Anything that ends a run, or keeps it from starting.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The config cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The model that the config describes cannot exist.
    #[error("the config's [model] cannot be built: {0}")]
    Model(String),
    /// The data cannot be read or does not fit the config.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A run directory that cannot take this run: taken, in use, or holding nothing to resume.
    #[error("run directory {}: {message}", path.display())]
    RunDirectory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it and what to do.
        message: String,
    },
    /// A model or checkpoint that cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A file operation that failed while the run was under way.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done, as a verb: "write", "create".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A forward pass that could not go on, for instance because a router got scores that are no numbers.
    #[error("{during}: {source}")]
    Forward {
        /// What was being done: "step 7", "the evaluation after step 10".
        during: String,
        /// What the model said.
        source: StepError,
    },
    /// The run would hold more memory than there is.
    #[error(
        "this run would hold about {} of memory ({plan}), and {} leaves {}. By the same reckoning {way_out}. \
         --force starts it all the same",
        gib(.plan.total), .available.bound, gib(.available.bytes)
    )]
    Memory {
        /// What it would hold.
        plan: MemoryPlan,
        /// What there is, besides what the process holds already.
        available: Available,
        /// What other configs would hold.
        way_out: String,
    },
    /// The loss or a gradient stopped being a number.
    #[error("{0}")]
    NonFinite(crate::non_finite::NonFinite),
}

impl TrainError {
    /// An I/O error on `path` while doing `action`.
    pub fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.to_path_buf(), source }
    }

    /// 2: what was asked for cannot be run. 1: it failed while running.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Model(_) | Self::Data(_) | Self::RunDirectory { .. } | Self::Memory { .. } => 2,
            Self::Checkpoint(CheckpointError::Architecture { .. } | CheckpointError::NotFound { .. }) => 2,
            Self::Checkpoint(_) | Self::Io { .. } | Self::Forward { .. } | Self::NonFinite(_) => 1,
        }
    }
}
