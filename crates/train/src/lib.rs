//! The training loop: optimizer, schedules, evaluation, metrics, checkpoints, resume.
//!
//! [`run::start`] and [`run::resume`] carry a [`config::RunConfig`] from its first to its last file. Inside, [`trainer::Trainer`]
//! makes one optimizer step at a time and holds all that the next step depends on; a run that is resumed is, bit for bit,
//! the run that was never stopped.

pub mod config;
pub mod toml_file;
pub mod run;
pub mod run_dir;
pub mod trainer;
pub mod optimizer;
pub mod schedule;
pub mod non_finite;
pub mod evaluate;
pub mod probe;
pub mod metrics;
pub mod json;
pub mod progress;
pub mod interrupt;
pub mod cost;
pub mod memory;
pub mod table;
pub mod error;
