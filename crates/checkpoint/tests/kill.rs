//! `kill -9` at any moment of writing leaves the newest finished checkpoint loadable.
//!
//! The test starts this same program as a child that writes checkpoints in a loop, kills it at random moments, and opens what
//! it left: every time, the newest checkpoint must verify, and none that was seen whole before may have gone backwards.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use mixtura_checkpoint::*;

const CHILD: &str = "MIXTURA_TEST_CHECKPOINT_WRITER";
/// Numbers in each of the two tensors of a checkpoint.
const VALUES: usize = 1 << 18;

#[test]
fn a_writer_killed_at_any_moment_leaves_the_last_checkpoint_whole() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("checkpoints");
    let (mut newest, mut unfinished, mut random) = (0, 0, 0x2545_f491_4f6c_dd1du64);
    let one_checkpoint = time_of_a_checkpoint(&dir.path().join("timing"));
    let start = Instant::now();
    let mut rounds = 0;
    // Five seconds; longer only on a machine so busy that no kill has yet struck as it should.
    while start.elapsed().as_secs() < 5 || ((newest < 2 || unfinished == 0) && start.elapsed().as_secs() < 60) {
        let mut child = start_writer(&root);
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        sleep(Duration::from_millis(20) + one_checkpoint * (random % 5000) as u32 / 1000);
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();

        unfinished += leftovers(&root);
        let (checkpoint, damaged) = newest_loadable(&root).unwrap();
        assert!(damaged.is_empty(), "{damaged:?}");
        let step = checkpoint.map_or(0, |c| {
            assert_eq!(c.train_state().unwrap().state::<u64>().unwrap(), c.step());
            c.step()
        });
        assert!(step >= newest, "step {newest} was complete, now the newest is {step}");
        newest = step;
        rounds += 1;
    }
    println!("{rounds} kills, {unfinished} of them in the middle of a checkpoint, newest step {newest}");
    assert!(newest > 1, "the writer never finished a checkpoint");
    assert!(unfinished > 0, "no kill struck while a checkpoint was being written");
}

fn time_of_a_checkpoint(root: &Path) -> Duration {
    let store = CheckpointStore::open(root, Retention::default()).unwrap();
    let weights = vec![0.0; VALUES];
    let start = Instant::now();
    store.save(contents(1, &weights)).unwrap();
    start.elapsed()
}

fn start_writer(root: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writer_process", "--nocapture"])
        .env(CHILD, root)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn leftovers(root: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(root) else { return 0 };
    entries.filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX)).count()
}

/// The child: does nothing unless it was started by the test above.
#[test]
fn writer_process() {
    let Some(root) = std::env::var_os(CHILD) else { return };
    let store = CheckpointStore::open(root.as_ref(), Retention { last: 2, best: false }).unwrap();
    let mut step = store.steps().unwrap().last().copied().unwrap_or(0);
    let weights = vec![step as f32; VALUES];
    loop {
        step += 1;
        store.save(contents(step, &weights)).unwrap();
    }
}

fn contents(step: u64, weights: &[f32]) -> CheckpointContents<'_> {
    let tensors = || vec![TensorOut::borrowed("w", &[2, VALUES / 2], weights)];
    CheckpointContents {
        step,
        metric: None,
        model: ModelOut { config_json: b"{}".to_vec(), tensors: tensors() },
        train_state: TrainStateOut::new(&step, tensors()),
        files: vec![],
    }
}
