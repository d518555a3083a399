//! The directory of one run: who may write into it, and where each file lies.
//!
//! ```text
//! runs/NAME/config.toml            resolved config; its files are named from the root of the file system
//! runs/NAME/data.json              what those files held
//! runs/NAME/metrics.jsonl          one object per step
//! runs/NAME/checkpoints/step-N/    model, tokenizer, optimizer and loader state
//! runs/NAME/final/                 the finished model alone
//! runs/NAME/final-step-N/          what final/ was before a finished run was made longer
//! runs/NAME/.lock                  held (flock) by the process that is writing
//! ```
//!
//! A directory takes one run and one writer. Both refusals happen before anything in it is touched.

use std::path::{Path, PathBuf};

use mixtura_checkpoint::{CheckpointError, LOCK_FILE, RunLock, remove_leftovers, write_file};

use crate::error::TrainError;
use crate::trainer::DATA_FILE;

/// An open run directory; the lock goes when it is dropped or the process dies.
#[derive(Debug)]
pub struct RunDir {
    root: PathBuf,
    _lock: RunLock,
}

impl RunDir {
    /// Starts a run in `out`, which must not hold one; without `out`, in the first free `runs/NAME`, `runs/NAME-2`, ...
    pub fn create(out: Option<&Path>, name: &str) -> Result<Self, TrainError> {
        let Some(out) = out else {
            let free =
                (1..).map(|n| PathBuf::from(if n == 1 { format!("runs/{name}") } else { format!("runs/{name}-{n}") }));
            for candidate in free {
                match Self::create(Some(&candidate), name) {
                    Err(TrainError::RunDirectory { .. }) => continue,
                    other => return other,
                }
            }
            unreachable!("the names never end");
        };
        let refuse = |message: &str| TrainError::RunDirectory { path: out.to_path_buf(), message: message.to_string() };
        if out.exists() && !out.is_dir() {
            return Err(refuse("this is a file; --out wants a directory"));
        }
        let lock = lock(out)?;
        if ["config.toml", "metrics.jsonl", "checkpoints", "final"].iter().any(|f| out.join(f).exists()) {
            return Err(refuse("it already holds a run; continue that one with --resume, or choose another --out"));
        }
        let others = std::fs::read_dir(out).map_err(|e| TrainError::io("read", out, e))?;
        if others.flatten().any(|entry| entry.file_name() != LOCK_FILE) {
            // The lock file was ours: leave the directory as it was found.
            let _ = std::fs::remove_file(out.join(LOCK_FILE));
            return Err(refuse("it is not empty and holds no run; choose another --out"));
        }
        Ok(Self { root: out.to_path_buf(), _lock: lock })
    }

    /// Opens the directory of a run that is to go on.
    pub fn reopen(path: &Path) -> Result<Self, TrainError> {
        let refuse =
            |message: &str| TrainError::RunDirectory { path: path.to_path_buf(), message: message.to_string() };
        if !path.is_dir() {
            return Err(refuse("there is no such directory to resume"));
        }
        if !path.join("config.toml").is_file() {
            let around = std::path::absolute(path).ok();
            let mut around = around.iter().flat_map(|path| path.ancestors().skip(1).take(2));
            let run = around.find(|run| run.join("config.toml").is_file() && run.join("checkpoints").is_dir());
            let hint = run.map_or(String::new(), |run| format!("; the run that it belongs to is {}", run.display()));
            return Err(refuse(&format!("there is no config.toml in it, so there is no run to resume{hint}")));
        }
        let lock = lock(path)?;
        // A process that was killed may have left an unfinished final/ of the model's size.
        remove_leftovers(path)?;
        Ok(Self { root: path.to_path_buf(), _lock: lock })
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// `config.toml`.
    pub fn config(&self) -> PathBuf {
        self.root.join("config.toml")
    }

    /// `metrics.jsonl`.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// `checkpoints/`.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// `data.json`.
    pub fn contents(&self) -> PathBuf {
        self.root.join(DATA_FILE)
    }

    /// `final/`.
    pub fn final_model(&self) -> PathBuf {
        self.root.join("final")
    }

    /// Gives `final/` another name, in place of what had it.
    pub fn set_final_aside(&self, name: &str) -> Result<(), TrainError> {
        let aside = self.root.join(name);
        if aside.exists() {
            std::fs::remove_dir_all(&aside).map_err(|e| TrainError::io("remove", &aside, e))?;
        }
        let from = self.final_model();
        std::fs::rename(&from, &aside).map_err(|e| TrainError::io("rename", &from, e))
    }
}

fn lock(directory: &Path) -> Result<RunLock, TrainError> {
    RunLock::acquire(directory).map_err(|error| match error {
        CheckpointError::Locked { path, holder } => TrainError::RunDirectory {
            path,
            message: format!("another run is writing here ({holder}); wait for it to end or choose another --out"),
        },
        other => other.into(),
    })
}

/// Writes `text` to `path` by way of a temporary file beside it: afterwards the old text is there, or the new one.
pub fn write_whole(path: &Path, text: &str) -> Result<(), TrainError> {
    Ok(write_file(path, |out| out.write_all(text.as_bytes()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_takes_one_writer_and_one_run() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("run");
        let first = RunDir::create(Some(&out), "x").unwrap();
        let error = RunDir::create(Some(&out), "x").unwrap_err();
        assert!(error.to_string().contains("another run is writing"), "{error}");
        write_whole(&first.config(), "a = 1\n").unwrap();
        drop(first);
        let error = RunDir::create(Some(&out), "x").unwrap_err();
        assert!(error.to_string().contains("already holds a run"), "{error}");
        assert_eq!(RunDir::reopen(&out).unwrap().root(), out);
    }

    #[test]
    fn a_directory_with_other_things_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("thesis.tex"), "x").unwrap();
        let error = RunDir::create(Some(directory.path()), "x").unwrap_err();
        assert!(error.to_string().contains("not empty"), "{error}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn resuming_nothing_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let error = RunDir::reopen(directory.path()).unwrap_err();
        assert!(error.to_string().ends_with("no run to resume"), "{error}");
        // A part of a run is answered with the run.
        let run = directory.path().join("run");
        for part in ["checkpoints/step-5", "final"] {
            std::fs::create_dir_all(run.join(part)).unwrap();
        }
        std::fs::write(run.join("config.toml"), "a = 1\n").unwrap();
        for part in ["checkpoints/step-5", "final"] {
            let error = RunDir::reopen(&run.join(part)).unwrap_err();
            assert!(error.to_string().ends_with(&format!("belongs to is {}", run.display())), "{error}");
        }
    }
}
