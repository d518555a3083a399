//! A disk that is really full, and one that is really read-only.
//!
//! Both need a small file system of our own. On Linux the test starts itself again in a private mount namespace with a tmpfs;
//! where that is not permitted it says so and passes, and the unit tests with an injected error remain.

use std::path::{Path, PathBuf};
use std::process::Command;

use mixtura_checkpoint::*;

const CHILD: &str = "MIXTURA_TEST_DISK";

#[test]
fn a_full_disk_is_an_error_that_keeps_the_checkpoints_there_are() {
    in_a_small_file_system("fill_the_disk", "true");
}

#[test]
fn a_read_only_directory_is_an_error() {
    in_a_small_file_system("write_to_a_read_only_disk", "mount -o remount,ro \"$1\"");
}

/// Runs the test `name` of this program with a 1 MiB tmpfs, after the shell command `prepare`.
fn in_a_small_file_system(name: &str, prepare: &str) {
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        "mount -t tmpfs -o size=1m none \"$1\" || exit 77; {prepare} || exit 77; exec \"$2\" --exact {name} --nocapture"
    );
    let shell = ["-c", &script, "sh"].map(std::ffi::OsString::from);
    let run = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh"])
        .args(shell)
        .arg(dir.path())
        .arg(std::env::current_exe().unwrap())
        .env(CHILD, dir.path())
        .output();
    match run {
        Ok(out) if out.status.success() => {
            assert!(String::from_utf8_lossy(&out.stdout).contains("1 passed"), "{out:?}");
        }
        Ok(out) if out.status.code() != Some(101) => {
            println!("skipped: no private file system here ({})", String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(out) => panic!("{}\n{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr)),
        Err(e) => println!("skipped: `unshare` cannot be started ({e})"),
    }
}

fn save(store: &CheckpointStore, step: u64, values: usize) -> Result<PathBuf> {
    let weights = vec![step as f32; values];
    store.save(CheckpointContents {
        step,
        metric: None,
        model: ModelOut { config_json: b"{}".to_vec(), tensors: vec![TensorOut::borrowed("w", &[values], &weights)] },
        train_state: TrainStateOut::new(&step, vec![]),
        files: vec![],
    })
}

#[test]
fn fill_the_disk() {
    let Some(root) = std::env::var_os(CHILD) else { return };
    let root = Path::new(&root);
    let store = CheckpointStore::open(&root.join("checkpoints"), Retention { last: 0, best: false }).unwrap();
    save(&store, 1, 100_000).unwrap();
    let error = save(&store, 2, 200_000).unwrap_err();
    assert!(matches!(&error, CheckpointError::DiskFull { .. }), "{error}");
    assert!(error.to_string().contains("no space left"), "{error}");
    let names: Vec<_> = std::fs::read_dir(store.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["step-1"]);
    assert_eq!(store.newest_loadable().unwrap().0.unwrap().step(), 1);
    // The space is free again.
    save(&store, 3, 50_000).unwrap();
}

#[test]
fn write_to_a_read_only_disk() {
    let Some(root) = std::env::var_os(CHILD) else { return };
    let error = CheckpointStore::open(&Path::new(&root).join("checkpoints"), Retention::default()).unwrap_err();
    assert!(matches!(&error, CheckpointError::ReadOnly { .. }), "{error}");
    let error = RunLock::acquire(Path::new(&root)).unwrap_err();
    assert!(matches!(&error, CheckpointError::ReadOnly { .. }), "{error}");
    let path = Path::new(&root).join("x.safetensors");
    let error = write_safetensors(&path, vec![], &Default::default()).unwrap_err();
    assert!(matches!(&error, CheckpointError::ReadOnly { .. }), "{error}");
}
