//! Training checkpoints: what is saved is what is read, damage is named, old ones go, the best one stays.

use std::fs;
use std::path::Path;

use mixtura_checkpoint::*;
use serde::{Deserialize, Serialize};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct State {
    step: u64,
    position: u64,
    learning_rate: f64,
}

fn state(step: u64) -> State {
    State { step, position: u64::MAX - step, learning_rate: 0.1 + 0.2 }
}

fn save(store: &CheckpointStore, step: u64, metric: Option<f64>) -> Result<std::path::PathBuf> {
    let weights: Vec<f32> = (0..5000).map(|i| i as f32 + step as f32).collect();
    store.save(CheckpointContents {
        step,
        metric,
        model: ModelOut {
            config_json: b"{}".to_vec(),
            tensors: vec![TensorOut::borrowed("layers.0.w", &[50, 100], &weights)],
        },
        train_state: TrainStateOut::new(&state(step), vec![TensorOut::borrowed("m.layers.0.w", &[5000], &weights)]),
        files: vec![("tokenizer.json".into(), b"bytes".to_vec())],
    })
}

fn keep(last: usize, best: bool) -> Retention {
    Retention { last, best }
}

#[test]
fn what_is_saved_is_read_back_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(&dir.path().join("checkpoints"), Retention::default()).unwrap();
    save(&store, 12, Some(1.5)).unwrap();

    let (checkpoint, damaged) = store.newest_loadable().unwrap();
    let checkpoint = checkpoint.unwrap();
    assert!(damaged.is_empty());
    assert_eq!((checkpoint.step(), checkpoint.manifest().metric), (12, Some(1.5)));
    assert_eq!(checkpoint.file("tokenizer.json").unwrap(), b"bytes");
    let training = checkpoint.train_state().unwrap();
    assert_eq!(training.state::<State>().unwrap(), state(12));
    assert_eq!(training.tensor("m.layers.0.w", &[5000]).unwrap()[4999], 5011.0);
    assert!(matches!(training.tensor("m.other", &[1]).unwrap_err(), CheckpointError::MissingTensor { .. }));
    assert!(matches!(training.tensor("m.layers.0.w", &[4]).unwrap_err(), CheckpointError::ShapeMismatch { .. }));
    let names: Vec<_> = fs::read_dir(checkpoint.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 5, "{names:?}");
}

#[test]
fn the_same_state_always_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(dir.path(), keep(0, false)).unwrap();
    let read = |dir: &Path| [MODEL_FILE, TRAIN_STATE_FILE, MANIFEST_FILE].map(|name| fs::read(dir.join(name)).unwrap());
    let first = read(&save(&store, 3, None).unwrap());
    let again = read(&save(&store, 3, None).unwrap());
    assert!(first == again);
}

#[test]
fn the_newest_and_the_best_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(dir.path(), keep(2, true)).unwrap();
    for (step, metric) in [(10, Some(3.0)), (20, Some(1.0)), (30, None), (100, Some(f64::NAN)), (110, Some(2.0))] {
        save(&store, step, metric).unwrap();
    }
    assert_eq!(store.steps().unwrap(), [20, 100, 110]);
    assert_eq!(store.best().unwrap(), Some(20));
    let store = CheckpointStore::open(dir.path(), keep(1, false)).unwrap();
    save(&store, 120, None).unwrap();
    assert_eq!(store.steps().unwrap(), [120]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn damage_is_found_and_named_and_the_one_before_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(dir.path(), keep(0, false)).unwrap();
    save(&store, 1, None).unwrap();
    let newest = save(&store, 2, None).unwrap();

    let path = newest.join(MODEL_FILE);
    let whole = fs::read(&path).unwrap();
    let mut bytes = whole.clone();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let error = store.open_step(2).unwrap_err();
    assert!(matches!(&error, CheckpointError::HashMismatch { what, .. } if what == "tensor `layers.0.w`"), "{error}");
    let (found, damaged) = store.newest_loadable().unwrap();
    assert_eq!((found.unwrap().step(), damaged.len()), (1, 1));

    fs::write(&path, &whole[..whole.len() - 40]).unwrap();
    let error = store.open_step(2).unwrap_err();
    assert!(matches!(&error, CheckpointError::Header { source: HeaderError::Truncated { .. }, .. }), "{error}");

    fs::remove_file(&path).unwrap();
    let error = store.open_step(2).unwrap_err();
    assert!(matches!(&error, CheckpointError::Manifest { .. }), "{error}");
    fs::write(&path, &whole).unwrap();
    store.open_step(2).unwrap();

    // Metadata is part of the header, and the header is hashed.
    let path = newest.join(TRAIN_STATE_FILE);
    let text = fs::read(&path).unwrap();
    let at = text.windows(11).position(|w| w == b"\\\"step\\\":2,").map(|at| at + 9).unwrap_or_else(|| {
        panic!("{}", String::from_utf8_lossy(&text[..300]));
    });
    let mut changed = text.clone();
    changed[at] = b'3';
    fs::write(&path, changed).unwrap();
    let error = store.open_step(2).unwrap_err();
    assert!(matches!(&error, CheckpointError::HashMismatch { what, .. } if what == "the header"), "{error}");
    fs::write(&path, text).unwrap();

    fs::write(newest.join("tokenizer.json"), b"bytez").unwrap();
    let error = store.open_step(2).unwrap_err();
    assert!(matches!(&error, CheckpointError::HashMismatch { what, .. } if what == "the file"), "{error}");

    fs::write(newest.join(MANIFEST_FILE), b"{").unwrap();
    assert!(matches!(store.open_step(2).unwrap_err(), CheckpointError::Format { .. }));
    assert!(matches!(store.open_step(9).unwrap_err(), CheckpointError::NotFound { .. }));
}

#[test]
fn unfinished_work_is_invisible_and_cleared() {
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(dir.path(), keep(0, false)).unwrap();
    save(&store, 1, None).unwrap();
    // As left by a writer killed while writing, and by one killed between the two renames of a replacement.
    fs::create_dir(dir.path().join(".unfinished-step-2-77")).unwrap();
    fs::rename(dir.path().join("step-1"), dir.path().join(".replaced-step-1")).unwrap();
    fs::create_dir(dir.path().join("step-5")).unwrap();
    assert!(store.steps().unwrap().is_empty());
    let store = CheckpointStore::open(dir.path(), keep(0, false)).unwrap();
    assert_eq!(store.steps().unwrap(), [1]);
    assert!(!dir.path().join(".unfinished-step-2-77").exists());
    assert_eq!(store.newest_loadable().unwrap().0.unwrap().step(), 1);
}

#[test]
fn two_runs_in_one_directory_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let held = RunLock::acquire(dir.path()).unwrap();
    let error = RunLock::acquire(dir.path()).unwrap_err();
    let process = format!("process {}", std::process::id());
    assert!(matches!(&error, CheckpointError::Locked { holder, .. } if holder.contains(&process)), "{error}");
    drop(held);
    RunLock::acquire(dir.path()).unwrap();
}

#[test]
fn a_directory_that_cannot_be_made_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, b"").unwrap();
    let error = CheckpointStore::open(&file.join("checkpoints"), Retention::default()).unwrap_err();
    assert!(matches!(&error, CheckpointError::Io { action: "create", .. }), "{error}");
    assert!(error.to_string().contains("checkpoints"));
}
