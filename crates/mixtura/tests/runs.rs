//! Runs that stop, are stopped, and go on: the second half must be the one that would have been.

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Place, Ran, keys, metrics};

/// Two micro-batches per step, so that the order of the sum matters too.
const ACCUMULATE: &[&str] = &["--set", "train.accumulation=2", "--steps", "20"];

fn train(place: &Place, more: &[&str]) -> Ran {
    let mut args = place.train_args(ACCUMULATE);
    args.extend(more);
    Ran::from(place.command(&args).output().unwrap())
}

/// Metrics, weights and optimizer state of two finished runs are the same, bit for bit.
fn assert_same(place: &Place, a: &str, b: &str) {
    let (a, b) = (place.path(a), place.path(b));
    assert_eq!(metrics(&a), metrics(&b));
    for file in [
        "final/model.safetensors",
        "checkpoints/step-20/train_state.safetensors",
        "checkpoints/step-20/model.safetensors",
    ] {
        assert!(std::fs::read(a.join(file)).unwrap() == std::fs::read(b.join(file)).unwrap(), "{file} differs");
    }
}

#[test]
fn stopping_and_resuming_changes_no_bit() {
    let place = Place::new();
    let whole = train(&place, &["--out", "whole"]);
    assert_eq!(whole.code, Some(0), "{}", whole.stderr);
    let document = whole.json();
    assert_eq!((document["status"].as_str(), document["step"].as_u64()), (Some("done"), Some(20)));

    let half = train(&place, &["--out", "halves", "--stop-after", "10"]);
    assert_eq!(half.code, Some(0), "{}", half.stderr);
    assert_eq!((half.json()["status"].as_str(), half.json()["step"].as_u64()), (Some("stopped"), Some(10)));
    assert!(!place.path("halves/final").exists(), "a stopped run has no final model");
    // With another number of threads, too.
    let resumed = place.ok(&["train", "--json", "--resume", "halves", "--threads", "1"]);
    assert_eq!(resumed.json()["step"].as_u64(), Some(20));
    assert_same(&place, "whole", "halves");

    let lines = metrics(&place.path("whole"));
    assert_eq!(lines.iter().map(|l| l["step"].as_u64().unwrap()).collect::<Vec<_>>(), (1..=20).collect::<Vec<_>>());
    assert_eq!(keys(&lines[0]), ["aux", "ce", "grad_norm", "layers", "loss", "lr", "step", "tokens"]);
    assert_eq!(keys(&lines[0]["layers"][0]), ["dead", "dropped", "entropy", "load_cv", "max_over_mean", "z"]);
    assert_eq!(lines[0]["layers"].as_array().unwrap().len(), 2);
    assert!(lines[9]["eval"]["loss"].is_f64(), "an evaluation was due after step 10");
}

#[test]
fn a_directory_takes_one_run_at_a_time_and_one_in_all() {
    let place = Place::new();
    let first = start(&place, &["--out", "run", "--steps", "100000"]);
    wait_for_steps(&place.path("run"), 1);
    let second = place.run(&place.train_args(&["--out", "run", "--steps", "5"]));
    assert_eq!(second.code, Some(2), "{}", second.stderr);
    assert!(second.stderr.contains("another run is writing"), "{}", second.stderr);
    let resumed = place.run(&["train", "--resume", "run"]);
    assert_eq!(resumed.code, Some(2), "{}", resumed.stderr);
    let ended = end(first, "-TERM");
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    let third = place.run(&place.train_args(&["--out", "run", "--steps", "5"]));
    assert_eq!(third.code, Some(2));
    assert!(third.stderr.contains("already holds a run") && third.stderr.contains("--resume"), "{}", third.stderr);
}

#[test]
fn an_interrupt_saves_and_ends_with_130() {
    let place = Place::new();
    let running = start(&place, &["--out", "run", "--steps", "100000", "--set", "train.checkpoint_every=0"]);
    wait_for_steps(&place.path("run"), 3);
    let ended = end(running, "-INT");
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    let document = ended.json();
    let step = document["step"].as_u64().unwrap();
    assert_eq!(document["status"], "interrupted");
    assert!(place.path(&format!("run/checkpoints/step-{step}/manifest.json")).exists());
    let next = (step + 2).to_string();
    let resumed = place.ok(&["train", "--json", "--resume", "run", "--stop-after", &next]);
    assert_eq!(resumed.json()["step"].as_u64(), Some(step + 2));
    assert_eq!(metrics(&place.path("run")).len() as u64, step + 2);
}

#[test]
fn a_run_that_is_killed_again_and_again_ends_as_if_it_never_was() {
    let place = Place::new();
    let every = &["--set", "train.checkpoint_every=1"];
    let whole = train(&place, &[&["--out", "whole"], &every[..]].concat());
    assert_eq!(whole.code, Some(0), "{}", whole.stderr);
    let mut args = place.train_args(ACCUMULATE);
    args.extend(["--out", "killed"]);
    args.extend(every);
    // A checkpoint is written after every step, so most kills land in or next to a write.
    for (kill, after) in [3, 7, 12].into_iter().enumerate() {
        let args = if kill == 0 { args.clone() } else { vec!["train", "--json", "--resume", "killed"] };
        let child = place.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for_steps(&place.path("killed"), after);
        end(child, "-KILL");
    }
    let resumed = place.ok(&["train", "--json", "--resume", "killed"]);
    assert_eq!(resumed.json()["step"].as_u64(), Some(20));
    assert_same(&place, "whole", "killed");
}

#[test]
fn a_damaged_newest_checkpoint_gives_way_to_the_one_before() {
    let place = Place::new();
    let ran = train(&place, &["--out", "run", "--stop-after", "10"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let model = place.path("run/checkpoints/step-10/model.safetensors");
    let mut bytes = std::fs::read(&model).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&model, bytes).unwrap();
    // Even under -q, and whoever reads the run.
    let read = place.ok(&["inspect", "run", "-q"]);
    assert!(read.stderr.contains("damaged") && read.stderr.contains("step-10"), "{}", read.stderr);
    let resumed = place.ok(&["train", "--json", "--resume", "run", "-q"]);
    assert!(resumed.stderr.contains("damaged") && resumed.stderr.contains("step-10"), "{}", resumed.stderr);
    assert_eq!(metrics(&place.path("run")).len(), 20);
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_without_room_ends_the_run_and_leaves_nothing_half_written() {
    let place = Place::new();
    let mut args = place.train_args(&["--out", "run", "--steps", "6"]);
    args.insert(0, env!("CARGO_BIN_EXE_mixtura"));
    // No file may grow beyond 64 KiB: metrics fit, a model does not.
    let limited = ["-c", "trap '' XFSZ; ulimit -f 64; exec \"$@\"", "bash"];
    let output = Command::new("bash").current_dir(place.root()).args(limited).args(&args).output().unwrap();
    let ran = Ran::from(output);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("error: ") && ran.stderr.contains("step-5"), "{}", ran.stderr);
    let left: Vec<_> =
        std::fs::read_dir(place.path("run/checkpoints")).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_loss_that_is_no_number_stops_the_run_and_names_the_tensor() {
    let place = Place::new();
    let ran = place.run(&place.train_args(&[
        "--out",
        "run",
        "--steps",
        "20",
        "--set",
        "optimizer.lr=1e38",
        "--set",
        "schedule.warmup=0",
    ]));
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("first seen in") && ran.stderr.contains('`'), "{}", ran.stderr);
    assert!(!place.path("run/final").exists());
}

fn start(place: &Place, more: &[&str]) -> Child {
    let args = place.train_args(more);
    place.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until the run has logged `steps` steps.
fn wait_for_steps(run: &Path, steps: usize) {
    let started = Instant::now();
    let logged = || std::fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count());
    while logged() < steps {
        assert!(started.elapsed() < Duration::from_secs(120), "no {steps} steps in two minutes");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Sends a signal and waits for the end.
fn end(child: Child, signal: &str) -> Ran {
    let sent = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    Ran::from(child.wait_with_output().unwrap())
}

#[test]
fn the_way_of_bf16_native_is_said_written_into_the_run_and_followed() {
    let place = Place::new();
    let doctor = place.ok(&["doctor", "--json", "-q"]).json();
    let way = doctor["ways"].as_array().unwrap().iter().find(|way| way["precision"] == "bf16-native").unwrap().clone();
    let (way, reason) = (way["way"].as_str().unwrap(), way["reason"].as_str().unwrap());
    let ran = train(&place, &["--out", "run", "--precision", "bf16-native", "--stop-after", "2"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains(&format!("bf16-native by {way}, because {reason}")), "{}", ran.stderr);
    let file = place.path("run/config.toml");
    let config = std::fs::read_to_string(&file).unwrap();
    assert!(config.contains(&format!("way = \"{way}\"")), "{config}");
    // As if it had begun on a machine of the other kind: it goes on in that order, and says so.
    let (other, words) = if way == "amx" { ("fma", "began without AMX") } else { ("amx", "sums as AMX tiles do") };
    std::fs::write(&file, config.replace(&format!("way = \"{way}\""), &format!("way = \"{other}\""))).unwrap();
    let resumed = place.ok(&["train", "--json", "--resume", "run"]);
    assert!(resumed.stderr.contains(words), "{}", resumed.stderr);
}

#[test]
fn auto_becomes_the_fastest_precision_in_the_config_of_the_run() {
    let place = Place::new();
    let fastest = place.ok(&["doctor", "--json", "-q"]).json()["fastest_precision"].as_str().unwrap().to_string();
    let ran = train(&place, &["--out", "run", "--precision", "auto", "--stop-after", "1"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let config = std::fs::read_to_string(place.path("run/config.toml")).unwrap();
    assert!(config.contains(&format!("precision = \"{fastest}\"")), "{config}");
}
