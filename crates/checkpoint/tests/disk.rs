//! A disk that is really full, and one that is really read-only.
//!
//! Both need a small file system of our own. On Linux the test starts itself again in a private mount namespace with a tmpfs;
//! where that is not permitted it says so and passes, and the unit tests with an injected error remain. Whatever else goes wrong before,
//! in or after the inner test fails the outer one: a skip has exactly two reasons, that `unshare` is refused or that `mount` is.

#![cfg(unix)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

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
    // 77 only where a tmpfs cannot be mounted at all; a `prepare` that fails is a failure.
    let script = format!(
        "echo {IN_NAMESPACE}; mount -t tmpfs -o size=1m none \"$1\" || exit 77; {prepare} || exit 78; \
         exec \"$2\" --exact {name} --nocapture"
    );
    let shell = ["-c", &script, "sh"].map(std::ffi::OsString::from);
    let run = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh"])
        .args(shell)
        .arg(dir.path())
        .arg(std::env::current_exe().unwrap())
        .env(CHILD, dir.path())
        .output();
    let out = match run {
        Ok(out) => out,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return println!("skipped: there is no `unshare` here ({e})");
        }
        Err(e) => panic!("`unshare` cannot be started: {e}"),
    };
    match outcome(&out) {
        Outcome::Passed => {}
        Outcome::Skipped(why) => println!("skipped: {why}"),
        Outcome::Failed => panic!("{out:?}"),
    }
}

/// Printed by the inner shell once it runs in its own namespace.
const IN_NAMESPACE: &str = "in a namespace of its own";

#[derive(Debug, PartialEq)]
enum Outcome {
    Passed,
    Skipped(String),
    Failed,
}

/// What the end of the inner process means.
fn outcome(out: &Output) -> Outcome {
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    match (out.status.code(), stdout.contains(IN_NAMESPACE)) {
        (Some(0), true) if stdout.contains("1 passed") => Outcome::Passed,
        (Some(77), true) => Outcome::Skipped(format!("a tmpfs cannot be mounted here ({})", stderr.trim())),
        (Some(1), false) if stderr.starts_with("unshare: ") => {
            Outcome::Skipped(format!("no namespace of its own here ({})", stderr.trim()))
        }
        _ => Outcome::Failed,
    }
}

#[test]
fn only_a_refused_namespace_or_mount_counts_as_skipped() {
    use std::os::unix::process::ExitStatusExt;
    let end = |status: i32, stdout: &str, stderr: &str| {
        let (stdout, stderr) = (stdout.as_bytes().to_vec(), stderr.as_bytes().to_vec());
        outcome(&Output { status: std::process::ExitStatus::from_raw(status), stdout, stderr })
    };
    let code = |code: i32| code << 8;
    let inside = format!("{IN_NAMESPACE}\n");
    assert_eq!(end(code(0), &format!("{inside}test result: ok. 1 passed"), ""), Outcome::Passed);
    assert!(matches!(end(code(77), &inside, "mount: permission denied"), Outcome::Skipped(_)));
    assert!(matches!(end(code(1), "", "unshare: unshare failed: Operation not permitted\n"), Outcome::Skipped(_)));
    for (status, stdout, stderr) in [
        (code(0), "test result: ok. 0 passed", ""),
        (code(101), "1 failed", "panicked"),
        (code(1), "", "sh: not found"),
        (code(2), "", "unshare: unrecognized option"),
        (code(78), "", "mount: remount failed"),
        (code(127), "", "exec: not found"),
        (11, "", ""), // killed by SIGSEGV
        (9, "", ""),  // killed by SIGKILL
    ] {
        assert_eq!(end(status, &format!("{inside}{stdout}"), stderr), Outcome::Failed, "{status}");
    }
    assert_eq!(end(code(77), "", ""), Outcome::Failed);
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
