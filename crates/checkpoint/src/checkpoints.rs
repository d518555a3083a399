//! `checkpoints/step-N/` of a run: written whole or not at all, verified when read, thinned out by age and merit.
//!
//! ```text
//! step-N/config.json  model.safetensors  train_state.safetensors  tokenizer.json ...  manifest.json
//! ```
//!
//! A checkpoint is written into a temporary directory, every file flushed to the disk, the manifest last, and the directory is
//! then renamed. A process that dies at any moment leaves the earlier checkpoints as they were; a full disk likewise.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::atomic::{TEMPORARY_PREFIX, create_dir, create_synced, publish_dir, remove_leftovers, temporary_name};
use crate::error::{CheckpointError, Result};
use crate::manifest::{FileRecord, MANIFEST_FILE, Manifest};
use crate::store::MODEL_FILE;
use crate::train_state::{TRAIN_STATE_FILE, TrainState, TrainStateOut};
use crate::write::{TensorOut, write_to};

/// File name of the model's configuration.
pub const CONFIG_FILE: &str = "config.json";

/// Which checkpoints to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// How many of the newest; 0 keeps all.
    pub last: usize,
    /// Whether the one with the lowest metric is kept however old it is.
    pub best: bool,
}

impl Default for Retention {
    fn default() -> Self {
        Self { last: 3, best: true }
    }
}

/// A model on its way to the disk: the bytes of `config.json` and the tensors of `model.safetensors`.
pub struct ModelOut<'a> {
    /// `config.json`.
    pub config_json: Vec<u8>,
    /// The weights, under the names of their layout.
    pub tensors: Vec<TensorOut<'a>>,
}

/// Everything that one checkpoint holds.
pub struct CheckpointContents<'a> {
    /// Optimizer steps done.
    pub step: u64,
    /// Decides which is best, lower is better (usually the validation loss).
    pub metric: Option<f64>,
    /// The model.
    pub model: ModelOut<'a>,
    /// Optimizer, loader, schedule.
    pub train_state: TrainStateOut<'a>,
    /// Further files, such as `("tokenizer.json", bytes)`.
    pub files: Vec<(String, Vec<u8>)>,
}

/// The checkpoints directory of a run.
#[derive(Debug)]
pub struct CheckpointStore {
    root: PathBuf,
    retention: Retention,
    /// Tests let the disk be full after this many bytes.
    pub(crate) byte_limit: Option<u64>,
}

impl CheckpointStore {
    /// Opens (creating it if need be) the directory for writing and clears what a killed writer left there. Hold the run's
    /// [`RunLock`](crate::RunLock): two writers would clear each other's unfinished work.
    pub fn open(root: &Path, retention: Retention) -> Result<Self> {
        create_dir(root)?;
        remove_leftovers(root)?;
        Ok(Self { root: root.to_path_buf(), retention, byte_limit: None })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// Writes `step-N` and removes the checkpoints that [`Retention`] no longer keeps. On an error nothing has changed.
    pub fn save(&self, contents: CheckpointContents) -> Result<PathBuf> {
        let target = self.root.join(format!("step-{}", contents.step));
        let temporary = self.root.join(temporary_name(&target));
        let written = self
            .write_all(&temporary, contents)
            .and_then(|()| publish_dir(&temporary, &target).map_err(|e| CheckpointError::io("write", &target, e)));
        if let Err(e) = written {
            let _ = fs::remove_dir_all(&temporary);
            return Err(e);
        }
        self.thin_out()?;
        Ok(target)
    }

    fn write_all(&self, dir: &Path, contents: CheckpointContents) -> Result<()> {
        fs::create_dir_all(dir).map_err(|e| CheckpointError::io("create", dir, e))?;
        let mut left = self.byte_limit;
        let mut manifest = Manifest::new(contents.step, contents.metric.filter(|m| m.is_finite()));

        let mut plain = contents.files;
        plain.push((CONFIG_FILE.into(), contents.model.config_json));
        for (name, bytes) in plain {
            assert!(name != MANIFEST_FILE && !name.contains('/'), "`{name}` cannot be a file of a checkpoint");
            create(&dir.join(&name), &mut left, |out| out.write_all(&bytes).map(|()| ((), bytes.len() as u64)))?;
            manifest.files.insert(name, FileRecord::of(&bytes));
        }
        let state_metadata = contents.train_state.metadata();
        let tensor_files = [
            (MODEL_FILE, contents.model.tensors, BTreeMap::new()),
            (TRAIN_STATE_FILE, contents.train_state.tensors, state_metadata),
        ];
        for (name, tensors, metadata) in tensor_files {
            let written = create(&dir.join(name), &mut left, |out| {
                let file = write_to(out, tensors, &metadata)?;
                let bytes = file.bytes;
                Ok((file, bytes))
            })?;
            manifest.tensor_files.insert(name.into(), written.into());
        }
        let json = manifest.to_json();
        create(&dir.join(MANIFEST_FILE), &mut left, |out| out.write_all(&json).map(|()| ((), json.len() as u64)))
    }

    /// The complete checkpoints, oldest first.
    pub fn steps(&self) -> Result<Vec<u64>> {
        steps_in(&self.root)
    }

    /// Opens and verifies `step-N`.
    pub fn open_step(&self, step: u64) -> Result<Checkpoint> {
        Checkpoint::open(&self.root.join(format!("step-{step}")))
    }

    /// The newest checkpoint that passes verification, and the errors of newer ones that do not.
    pub fn newest_loadable(&self) -> Result<(Option<Checkpoint>, Vec<CheckpointError>)> {
        newest_loadable(&self.root)
    }

    /// The step with the lowest metric.
    pub fn best(&self) -> Result<Option<u64>> {
        let mut best: Option<(f64, u64)> = None;
        for step in self.steps()? {
            let manifest = Manifest::read(&self.root.join(format!("step-{step}")))?;
            if let Some(metric) = manifest.metric
                && best.is_none_or(|(b, _)| metric < b)
            {
                best = Some((metric, step));
            }
        }
        Ok(best.map(|(_, step)| step))
    }

    fn thin_out(&self) -> Result<()> {
        let steps = self.steps()?;
        if self.retention.last == 0 || steps.len() <= self.retention.last {
            return Ok(());
        }
        let best = if self.retention.best { self.best()? } else { None };
        for &step in &steps[..steps.len() - self.retention.last] {
            if Some(step) != best {
                let dir = self.root.join(format!("step-{step}"));
                // Renamed first: a checkpoint that is half deleted must not look like one.
                let doomed = self.root.join(format!("{TEMPORARY_PREFIX}removal-of-step-{step}"));
                fs::rename(&dir, &doomed)
                    .and_then(|()| fs::remove_dir_all(&doomed))
                    .map_err(|e| CheckpointError::io("remove", &dir, e))?;
            }
        }
        Ok(())
    }
}

/// Creates and flushes one file of the temporary directory, counting its bytes against the test's limit.
fn create<T>(
    path: &Path,
    left: &mut Option<u64>,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<(T, u64)>,
) -> Result<T> {
    let (value, bytes) = create_synced(path, *left, fill).map_err(|e| CheckpointError::io("write", path, e))?;
    if let Some(left) = left {
        *left -= bytes;
    }
    Ok(value)
}

/// The complete checkpoints of a directory, oldest first; an absent directory has none.
pub fn steps_in(root: &Path) -> Result<Vec<u64>> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(CheckpointError::io("read", root, e)),
    };
    let mut steps = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| CheckpointError::io("read", root, e))?;
        let name = entry.file_name();
        let step = name.to_str().and_then(|n| n.strip_prefix("step-")).and_then(|n| n.parse().ok());
        if let Some(step) = step
            && entry.path().join(MANIFEST_FILE).exists()
        {
            steps.push(step);
        }
    }
    steps.sort_unstable();
    Ok(steps)
}

/// The newest checkpoint of a directory that passes verification, and the errors of newer ones that do not. Reads only, beside a run
/// that is under way too: a checkpoint that the run removes meanwhile is not damaged, it has a successor.
pub fn newest_loadable(root: &Path) -> Result<(Option<Checkpoint>, Vec<CheckpointError>)> {
    let mut damaged: BTreeMap<u64, CheckpointError> = BTreeMap::new();
    'listing: loop {
        for step in steps_in(root)?.into_iter().rev().filter(|step| !damaged.contains_key(step)).collect::<Vec<_>>() {
            let dir = root.join(format!("step-{step}"));
            match Checkpoint::open(&dir) {
                Ok(checkpoint) => return Ok((Some(checkpoint), damaged.into_values().rev().collect())),
                Err(_) if !dir.join(MANIFEST_FILE).exists() => continue 'listing,
                Err(e) => damaged.insert(step, e),
            };
        }
        return Ok((None, damaged.into_values().rev().collect()));
    }
}

/// A verified checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    manifest: Manifest,
}

impl Checkpoint {
    /// Reads the manifest and compares every byte of the directory with it.
    pub fn open(dir: &Path) -> Result<Self> {
        let manifest = Manifest::read(dir)?;
        manifest.verify(dir)?;
        Ok(Self { dir: dir.to_path_buf(), manifest })
    }

    /// The directory; a model can be loaded from it.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// What it holds.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Optimizer steps done.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// The training state.
    pub fn train_state(&self) -> Result<TrainState> {
        TrainState::open(&self.dir.join(TRAIN_STATE_FILE))
    }

    /// One of the further files, such as `tokenizer.json`.
    pub fn file(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.dir.join(name);
        fs::read(&path).map_err(|e| CheckpointError::io("read", &path, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(step: u64, values: &[f32]) -> CheckpointContents<'_> {
        let tensors = || vec![TensorOut::borrowed("w", &[values.len()], values)];
        CheckpointContents {
            step,
            metric: None,
            model: ModelOut { config_json: b"{}".to_vec(), tensors: tensors() },
            train_state: TrainStateOut::new(&step, tensors()),
            files: vec![("tokenizer.json".into(), vec![7; 100])],
        }
    }

    #[test]
    fn a_disk_that_fills_up_at_any_byte_leaves_the_earlier_checkpoint_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = CheckpointStore::open(dir.path(), Retention { last: 1, best: false }).unwrap();
        let values = vec![1.0; 300];
        let first = store.save(contents(1, &values)).unwrap();
        let total: u64 = fs::read_dir(&first).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
        for limit in (0..total).step_by(97) {
            store.byte_limit = Some(limit);
            let error = store.save(contents(2, &values)).unwrap_err();
            assert!(matches!(error, CheckpointError::DiskFull { .. }), "{limit}: {error}");
            let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            assert_eq!(names, ["step-1"], "after {limit} bytes");
        }
        assert_eq!(store.newest_loadable().unwrap().0.unwrap().step(), 1);
        store.byte_limit = Some(total + 64);
        store.save(contents(2, &values)).unwrap();
        assert_eq!(store.steps().unwrap(), [2]);
    }
}
