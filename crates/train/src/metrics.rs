//! `metrics.jsonl`: one JSON object per optimizer step, each written whole or not at all.
//!
//! On resume the file is cut back to the step of the checkpoint, so a run that was killed after logging a few more
//! steps ends up with one line per step all the same.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::TrainError;

/// How evenly one MoE layer spread its tokens in a step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerMetrics {
    /// Coefficient of variation of the tokens per expert.
    pub load_cv: f64,
    /// The busiest expert's tokens over the mean.
    pub max_over_mean: f64,
    /// Experts that no token chose.
    pub dead: u64,
    /// (token, choice) pairs over capacity.
    pub dropped: u64,
    /// Entropy of the load over that of an even one: 1 is balanced.
    pub entropy: f64,
    /// Mean squared log-sum-exp of the router's logits.
    pub z: f64,
}

/// An evaluation on the validation split.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    /// Mean cross-entropy per counted token, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Tokens counted.
    pub tokens: u64,
}

/// One line of the file.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Optimizer steps done, counted from 1.
    pub step: u64,
    /// Tokens read since the start of the run.
    pub tokens: u64,
    /// What was minimised: cross-entropy plus the weighted auxiliary losses.
    pub loss: f64,
    /// Cross-entropy per counted token, in nats.
    pub ce: f64,
    /// The auxiliary losses by name, means over MoE layers, before their coefficients.
    pub aux: BTreeMap<String, f64>,
    /// Learning rate of the step.
    pub lr: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens read over the step's wall time. The one field that differs between two equal runs.
    pub tokens_per_second: f64,
    /// The MoE layers, in order.
    pub layers: Vec<LayerMetrics>,
    /// The evaluation made after the step, if one was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval: Option<EvalMetrics>,
}

/// The open file.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
    end: u64,
}

impl MetricsFile {
    /// Opens `path` and keeps the lines up to and including `last_step`; later and damaged lines are cut off.
    pub fn open(path: &Path, last_step: u64) -> Result<Self, TrainError> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(|e| TrainError::io("open", path, e))?;
        let mut end = 0;
        let mut reader = BufReader::new(&file);
        let mut line = String::new();
        loop {
            line.clear();
            let read = reader.read_line(&mut line).map_err(|e| TrainError::io("read", path, e))?;
            let whole = line.ends_with('\n');
            match serde_json::from_str::<StepMetrics>(&line) {
                Ok(step) if whole && step.step <= last_step => end += read as u64,
                _ => break,
            }
        }
        file.set_len(end).map_err(|e| TrainError::io("truncate", path, e))?;
        file.seek(SeekFrom::Start(end)).map_err(|e| TrainError::io("seek in", path, e))?;
        Ok(Self { path: path.to_path_buf(), file, end })
    }

    /// Appends one line. If the disk refuses part of it, the part is removed again.
    pub fn write(&mut self, metrics: &StepMetrics) -> Result<(), TrainError> {
        let mut line = serde_json::to_vec(metrics).expect("metrics are plain numbers");
        line.push(b'\n');
        if let Err(error) = self.file.write_all(&line) {
            // A failure to cut is not reported: the reader skips a damaged last line anyway.
            let _ = self.file.set_len(self.end);
            return Err(TrainError::io("write", &self.path, error));
        }
        self.end += line.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(step: u64) -> StepMetrics {
        StepMetrics { step, loss: 1.0 / step as f64, ..StepMetrics::default() }
    }

    #[test]
    fn reopening_cuts_later_and_damaged_lines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let mut file = MetricsFile::open(&path, 0).unwrap();
        (1..=5).for_each(|step| file.write(&at(step)).unwrap());
        drop(file);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\": 6, \"tok").unwrap();
        let mut file = MetricsFile::open(&path, 3).unwrap();
        file.write(&at(4)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let steps: Vec<StepMetrics> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(steps, (1..=4).map(at).collect::<Vec<_>>());
    }

    #[test]
    fn a_loss_that_is_not_a_number_is_written_as_null_rather_than_as_broken_json() {
        let line = serde_json::to_string(&StepMetrics { loss: f64::NAN, ..at(1) }).unwrap();
        assert!(serde_json::from_str::<serde_json::Value>(&line).unwrap()["loss"].is_null());
    }
}
