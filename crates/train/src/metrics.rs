//! `metrics.jsonl`: one JSON object per optimizer step, each written whole or not at all.
//!
//! On resume the lines of steps after the checkpoint are taken out, so a run that was killed after logging a few more steps ends up with
//! one line per step all the same. They and an unfinished last line are all that is ever taken out, and the caller is told: people add
//! blank lines and notes to such files.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use mixtura_checkpoint::write_file;
use serde::{Deserialize, Serialize};

use crate::error::TrainError;
use crate::json;

/// How evenly one MoE layer spread its tokens in a step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerMetrics {
    /// Coefficient of variation of the tokens per expert.
    #[serde(deserialize_with = "json::real")]
    pub load_cv: f64,
    /// The busiest expert's tokens over the mean.
    #[serde(deserialize_with = "json::real")]
    pub max_over_mean: f64,
    /// Experts that no token chose.
    pub dead: u64,
    /// (token, choice) pairs over capacity.
    pub dropped: u64,
    /// Entropy of the load over that of an even one: 1 is balanced.
    #[serde(deserialize_with = "json::real")]
    pub entropy: f64,
    /// Mean squared log-sum-exp of the router's logits.
    #[serde(deserialize_with = "json::real")]
    pub z: f64,
}

/// An evaluation on the validation split.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    /// Mean cross-entropy per counted token, in nats.
    #[serde(deserialize_with = "json::real")]
    pub loss: f64,
    /// `exp(loss)`, infinite from a loss of 710 on.
    #[serde(deserialize_with = "json::real")]
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
    #[serde(deserialize_with = "json::real")]
    pub loss: f64,
    /// Cross-entropy per counted token, in nats.
    #[serde(deserialize_with = "json::real")]
    pub ce: f64,
    /// The auxiliary losses by name, means over MoE layers, before their coefficients.
    #[serde(deserialize_with = "json::reals")]
    pub aux: BTreeMap<String, f64>,
    /// Learning rate of the step.
    #[serde(deserialize_with = "json::real")]
    pub lr: f64,
    /// Global gradient norm before clipping.
    #[serde(deserialize_with = "json::real")]
    pub grad_norm: f64,
    /// Tokens read over the step's wall time. The one field that differs between two equal runs.
    #[serde(deserialize_with = "json::real")]
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
    last: Option<Line>,
    remarks: Vec<String>,
}

/// A line of the file.
#[derive(Debug)]
struct Line {
    bytes: Range<usize>,
    metrics: StepMetrics,
}

impl MetricsFile {
    /// Opens `path` to go on after `last_step`: the lines of later steps and an unfinished last line are taken out, nothing else.
    pub fn open(path: &Path, last_step: u64) -> Result<Self, TrainError> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(TrainError::io("read", path, e)),
        };
        let Kept { bytes: kept, last, remarks } = Kept::of(&bytes, last_step);
        if !bytes.starts_with(&kept) {
            write_file(path, |out| out.write_all(&kept))?;
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(|e| TrainError::io("open", path, e))?;
        let end = kept.len() as u64;
        file.set_len(end).map_err(|e| TrainError::io("truncate", path, e))?;
        file.seek(SeekFrom::Start(end)).map_err(|e| TrainError::io("seek in", path, e))?;
        Ok(Self { path: path.to_path_buf(), file, end, last, remarks })
    }

    /// What was taken out and what is odd about the rest, in whole sentences.
    pub fn remarks(&self) -> &[String] {
        &self.remarks
    }

    /// The line of the step that the run goes on after, if it is there.
    pub fn last(&self) -> Option<&StepMetrics> {
        self.last.as_ref().map(|line| &line.metrics)
    }

    /// Puts `metrics` in the place of the line that [`MetricsFile::last`] gave.
    ///
    /// # Panics
    /// If there is none.
    pub fn replace_last(&mut self, metrics: &StepMetrics) -> Result<(), TrainError> {
        let line = self.last.as_ref().expect("a line that was read");
        let mut bytes = std::fs::read(&self.path).map_err(|e| TrainError::io("read", &self.path, e))?;
        bytes.splice(line.bytes.clone(), text(metrics));
        write_file(&self.path, |out| out.write_all(&bytes))?;
        *self = Self::open(&self.path, metrics.step)?;
        Ok(())
    }

    /// Appends one line. If the disk refuses part of it, the part is removed again.
    pub fn write(&mut self, metrics: &StepMetrics) -> Result<(), TrainError> {
        let line = text(metrics);
        if let Err(error) = self.file.write_all(&line) {
            // A failure to cut is not reported: the reader takes an unfinished last line out anyway.
            let _ = self.file.set_len(self.end);
            return Err(TrainError::io("write", &self.path, error));
        }
        self.end += line.len() as u64;
        Ok(())
    }
}

fn text(metrics: &StepMetrics) -> Vec<u8> {
    (json::to_string(metrics).expect("metrics are plain numbers") + "\n").into_bytes()
}

/// What stays of a file.
struct Kept {
    bytes: Vec<u8>,
    last: Option<Line>,
    remarks: Vec<String>,
}

impl Kept {
    fn of(bytes: &[u8], last_step: u64) -> Self {
        /// All that decides whether a line stays.
        #[derive(Deserialize)]
        struct OfStep {
            step: u64,
        }
        let mut kept = Self { bytes: Vec::with_capacity(bytes.len()), last: None, remarks: Vec::new() };
        let (mut later, mut unfinished, mut unreadable) = (Vec::new(), false, Vec::new());
        for (number, line) in bytes.split_inclusive(|&byte| byte == b'\n').enumerate() {
            let whole = line.ends_with(b"\n");
            let start = kept.bytes.len();
            match serde_json::from_slice::<OfStep>(line) {
                Ok(OfStep { step }) if step > last_step => later.push(step),
                Ok(OfStep { step }) => {
                    kept.bytes.extend_from_slice(line);
                    if !whole {
                        kept.bytes.push(b'\n');
                    }
                    if let Ok(metrics) = serde_json::from_slice(line)
                        && step == last_step
                    {
                        kept.last = Some(Line { bytes: start..kept.bytes.len(), metrics });
                    }
                }
                Err(_) if !whole => unfinished = true,
                Err(_) => {
                    kept.bytes.extend_from_slice(line);
                    if !line.trim_ascii().is_empty() {
                        unreadable.push(number + 1);
                    }
                }
            }
        }
        if let (Some(first), Some(last)) = (later.iter().min(), later.iter().max()) {
            let range = if first == last { format!("step {first}") } else { format!("steps {first} to {last}") };
            let lines = if later.len() == 1 { "1 line".to_string() } else { format!("{} lines", later.len()) };
            kept.remarks.push(format!("cut {lines} ({range}): the checkpoint is of step {last_step}"));
        }
        if unfinished {
            kept.remarks.push("cut an unfinished last line".into());
        }
        if let Some(first) = unreadable.first() {
            let (count, plural) = (unreadable.len(), if unreadable.len() == 1 { "" } else { "s" });
            kept.remarks.push(format!("kept {count} line{plural} that cannot be read (the first is line {first})"));
        }
        if last_step > 0 && kept.last.is_none() {
            kept.remarks.push(format!("there is no line of step {last_step}, which the run goes on after"));
        }
        kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(step: u64) -> StepMetrics {
        StepMetrics { step, loss: 1.0 / step as f64, ..StepMetrics::default() }
    }

    fn line(step: u64) -> String {
        String::from_utf8(text(&at(step))).unwrap()
    }

    /// Reopens a file of this text after step 3; returns what is left and what is said.
    fn reopened(before: &str) -> (String, String) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        std::fs::write(&path, before).unwrap();
        let mut file = MetricsFile::open(&path, 3).unwrap();
        let said = file.remarks().join("; ");
        let left = std::fs::read_to_string(&path).unwrap();
        file.write(&at(4)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), left.clone() + &line(4));
        (left, said)
    }

    #[test]
    fn later_steps_and_an_unfinished_line_are_cut_and_nothing_else() {
        let history = || (1..=3).map(line).collect::<String>();
        assert_eq!(reopened(&history()), (history(), String::new()));
        let (left, said) = reopened(&(history() + &line(4) + &line(5) + "{\"step\": 6, \"tok"));
        assert_eq!(left, history());
        assert_eq!(said, "cut 2 lines (steps 4 to 5): the checkpoint is of step 3; cut an unfinished last line");
    }

    #[test]
    fn what_a_person_added_stays_and_cuts_nothing() {
        let edited = format!("\n{}\n{}# lr halved here\r\n{}\n", line(1), line(2), line(3));
        let (left, said) = reopened(&format!("{edited}{}", line(4)));
        assert_eq!(left, edited);
        assert!(
            said.contains("cut 1 line (step 4)") && said.contains("kept 1 line") && said.contains("line 5"),
            "{said}"
        );
        // A later step in front of an earlier one goes alone.
        let (left, _) = reopened(&format!("{}{}\n{}", line(1), line(9), line(3)));
        assert_eq!(left, format!("{}\n{}", line(1), line(3)));
        // An editor that leaves out the last line's end.
        let (left, said) = reopened((1..=3).map(line).collect::<String>().trim_end());
        assert_eq!((left, said.as_str()), ((1..=3).map(line).collect(), ""));
    }

    #[test]
    fn history_that_is_gone_is_said() {
        assert!(reopened("").1.contains("no line of step 3"));
    }

    #[test]
    fn the_last_line_can_be_completed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        std::fs::write(&path, format!("{}{}\n", line(1), line(2))).unwrap();
        let mut file = MetricsFile::open(&path, 2).unwrap();
        let eval = EvalMetrics { loss: 800.0, perplexity: f64::INFINITY, tokens: 5 };
        let complete = StepMetrics { eval: Some(eval), ..file.last().unwrap().clone() };
        file.replace_last(&complete).unwrap();
        assert_eq!(file.last(), Some(&complete));
        file.write(&at(3)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let kept: Vec<&str> = text.lines().collect();
        assert_eq!((kept.len(), kept[0], kept[2]), (4, line(1).trim_end(), ""));
        assert_eq!(serde_json::from_str::<StepMetrics>(kept[1]).unwrap(), complete);
    }

    #[test]
    fn numbers_that_json_lacks_are_written_and_read_back() {
        let odd = StepMetrics {
            loss: f64::INFINITY,
            aux: [("z".to_string(), f64::INFINITY)].into(),
            layers: vec![LayerMetrics { z: f64::NEG_INFINITY, ..LayerMetrics::default() }],
            ..at(1)
        };
        let line = String::from_utf8(text(&odd)).unwrap();
        serde_json::from_str::<serde_json::Value>(&line).unwrap();
        assert_eq!(serde_json::from_str::<StepMetrics>(&line).unwrap(), odd);
        // As it was written once.
        let old: StepMetrics = serde_json::from_str(&line.replace("\"Infinity\"", "null")).unwrap();
        assert!(old.loss.is_nan());
    }
}
