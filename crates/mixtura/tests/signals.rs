//! Being asked to stop at any moment, and not being heard any more: what was made stays, nothing is half-written, and the exit code
//! is 130 for every signal.
#![cfg(unix)]

mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Place, Ran, TEXT_RUN, metrics, text};

const SIGNALS: [&str; 3] = ["-INT", "-TERM", "-HUP"];

fn spawn(place: &Place, args: &[&str]) -> Child {
    place.command(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn send(child: &Child, signal: &str) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

/// Waits for the end, which must come within a time that no step, evaluation or tokenizer here would leave.
fn ended(mut child: Child, within: u64) -> Ran {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > Duration::from_secs(within) {
            child.kill().unwrap();
            panic!("still running {within} s after the signal");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ran::from(child.wait_with_output().unwrap())
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < Duration::from_secs(120), "not in two minutes: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn lines(run: &Path) -> usize {
    std::fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count())
}

/// Waits until the process listens for SIGTERM. Linux tells; elsewhere a second must do.
fn wait_for_handlers(child: &Child) {
    if cfg!(not(target_os = "linux")) {
        return std::thread::sleep(Duration::from_secs(1));
    }
    wait_until("handlers", || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        caught.is_some_and(|mask| u64::from_str_radix(mask.trim(), 16).unwrap() >> 14 & 1 == 1)
    });
}

#[test]
fn the_first_signal_while_data_is_opened_ends_the_command_with_nothing_written() {
    let place = Place::new();
    std::fs::write(place.path("tiny.toml"), TEXT_RUN).unwrap();
    assert!(Command::new("mkfifo").arg(place.path("pipe")).status().unwrap().success());
    for signal in SIGNALS {
        // Nobody ever writes into the pipe: the run is reading its text.
        let child = spawn(&place, &["train", "tiny.toml", "--out", "run", "--set", "data.paths=pipe"]);
        wait_for_handlers(&child);
        send(&child, signal);
        assert_eq!(ended(child, 20).code, Some(130), "{signal}");
        assert!(!place.path("run").exists(), "{signal}");
    }
}

#[test]
fn the_first_signal_while_a_tokenizer_is_trained_ends_the_command() {
    let place = Place::new();
    std::fs::write(place.path("tiny.toml"), TEXT_RUN).unwrap();
    // Words without end, each another: minutes of merges.
    let words: String = (0u64..400_000).map(|i| format!("{:x} ", i.wrapping_mul(0x9E37_79B9_7F4A_7C15))).collect();
    std::fs::write(place.path("small.txt"), words).unwrap();
    let bpe = ["--set", "data.tokenizer=bpe", "--set", "data.bpe_vocab=60000"];
    let child = spawn(&place, &[&["train", "tiny.toml", "--out", "run"], &bpe[..]].concat());
    wait_for_handlers(&child);
    std::thread::sleep(Duration::from_secs(2));
    send(&child, "-INT");
    assert_eq!(ended(child, 20).code, Some(130));
    assert!(!place.path("run").exists());
}

#[test]
fn every_signal_saves_a_run_that_goes_on_to_the_same_end() {
    let place = Place::new();
    let args = |out: &'static str| {
        let mut args = place.train_args(&["--steps", "30", "--out", out, "--set", "train.checkpoint_every=0"]);
        args.extend(["--set", "train.questions=0"]);
        args
    };
    place.ok(&args("whole"));
    let child = spawn(&place, &args("run"));
    for (number, signal) in SIGNALS.into_iter().enumerate() {
        let child = if number == 0 { spawn(&place, &args("again")) } else { spawn(&place, &resume("again")) };
        wait_until("steps", || lines(&place.path("again")) > 4 * (number + 1));
        send(&child, signal);
        let ran = ended(child, 60);
        assert_eq!(ran.code, Some(130), "{signal}: {}", ran.stderr);
        assert_eq!(ran.json()["status"], "interrupted", "{signal}");
    }
    assert_eq!(ended(child, 120).code, Some(0));
    place.ok(&resume("again"));
    assert_eq!(metrics(&place.path("again")), metrics(&place.path("whole")));
}

fn resume(run: &str) -> [&str; 4] {
    ["train", "--json", "--resume", run]
}

#[cfg(target_os = "linux")]
#[test]
fn under_nohup_a_hangup_changes_nothing() {
    let place = Place::new();
    let mut args = place.train_args(&["--out", "run", "--steps", "100000"]);
    args.insert(0, env!("CARGO_BIN_EXE_mixtura"));
    let mut command = Command::new("nohup");
    command.current_dir(place.root()).args(&args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let run = place.path("run");
    wait_until("a step", || lines(&run) > 0);
    send(&child, "-HUP");
    let then = lines(&run);
    wait_until("more steps", || lines(&run) > then + 3);
    send(&child, "-TERM");
    assert_eq!(ended(child, 60).code, Some(130));
}

#[test]
fn the_second_signal_ends_the_run_at_once_and_leaves_no_half_of_a_checkpoint() {
    let place = Place::new();
    // A step of thousands of micro-batches takes minutes.
    let long = ["--set", "train.accumulation=20000", "--set", "data.prefetch=1"];
    let child = spawn(&place, &place.train_args(&[&["--out", "run", "--steps", "3"], &long[..]].concat()));
    wait_until("the run directory", || place.path("run/metrics.jsonl").exists());
    std::thread::sleep(Duration::from_millis(300));
    send(&child, "-INT");
    std::thread::sleep(Duration::from_millis(300));
    send(&child, "-TERM");
    assert_eq!(ended(child, 10).code, Some(130));
    assert_eq!(std::fs::read_dir(place.path("run/checkpoints")).unwrap().count(), 0);
    assert!(place.path("run/config.toml").exists());
}

#[test]
fn a_signal_in_an_evaluation_keeps_the_step_and_the_evaluation_is_made_up_for() {
    let place = Place::new();
    // Evaluations of seconds, so that the signal meets one; the last of them is that of the last step.
    let slow = ["--steps", "4", "--set", "train.eval_every=2", "--set", "data.validation_batches=150"];
    let slow = [&slow[..], &["--set", "train.questions=0", "--set", "train.checkpoint_every=0"]].concat();
    place.ok(&place.train_args(&[&slow[..], &["--out", "whole"]].concat()));
    let started = place.train_args(&[&slow[..], &["--out", "run"]].concat());
    for before in [1, 3] {
        let child = spawn(&place, if before == 1 { &started } else { &["train", "--json", "--resume", "run"] });
        wait_until("the step before", || lines(&place.path("run")) == before);
        std::thread::sleep(Duration::from_millis(300));
        send(&child, "-TERM");
        let ran = ended(child, 30);
        assert_eq!((ran.code, ran.json()["step"].as_u64()), (Some(130), Some(before as u64 + 1)), "{}", ran.stderr);
        let last = metrics(&place.path("run")).pop().unwrap();
        assert!(last.get("eval").is_none(), "the signal did not meet the evaluation: {last}");
        assert!(!place.path("run/final").exists());
    }
    let done = place.ok(&["train", "--json", "--resume", "run"]).json();
    assert_eq!(metrics(&place.path("run")), metrics(&place.path("whole")));
    assert!(done["eval"]["loss"].is_f64());
}

#[test]
fn a_signal_while_questions_are_answered_keeps_the_model_and_the_answers() {
    let place = Place::new();
    let many = ["--set", "data.propositions.evaluation_items=3000", "--set", "train.questions=3000"];
    let mut child = spawn(&place, &place.train_args(&[&["--out", "run", "--steps", "2"], &many[..]].concat()));
    let mut stderr = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(stderr.any(|line| line.unwrap().contains("answering questions")));
    std::thread::sleep(Duration::from_secs(4));
    send(&child, "-INT");
    let ran = ended(child, 20);
    assert_eq!(ran.code, Some(130), "{}", ran.stderr);
    let document = ran.json();
    assert_eq!((document["status"].as_str(), document["step"].as_u64()), (Some("interrupted"), Some(2)));
    assert!(document["eval"]["loss"].is_f64() && place.path("run/final/model.safetensors").exists());
    let asked = |document: &serde_json::Value| {
        let groups = document["accuracy"]["groups"].as_array().cloned().unwrap_or_default();
        groups.iter().map(|group| group["items"].as_u64().unwrap()).sum::<u64>()
    };
    assert!(asked(&document) > 0, "no answer in four seconds");

    // `eval` has its loss by then, and prints it.
    let mut child = spawn(&place, &["eval", "run", "--json", "--questions", "3000"]);
    let mut stderr = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(stderr.any(|line| line.unwrap().contains("answering questions")));
    std::thread::sleep(Duration::from_secs(4));
    send(&child, "-INT");
    let ran = ended(child, 20);
    assert_eq!(ran.code, Some(130), "{}", ran.stderr);
    assert_eq!(ran.json()["loss"], document["eval"]["loss"]);
    assert!(asked(&ran.json()) > 0, "no answer in four seconds");
}

#[test]
fn a_run_goes_on_when_nobody_reads_what_it_says() {
    let place = Place::new();
    let args =
        place.train_args(&["-v", "--steps", "12", "--set", "train.checkpoint_every=1", "--set", "train.eval_every=2"]);
    place.ok(&[&args[..], &["--out", "heard"]].concat());
    let mut child = spawn(&place, &[&args[..], &["--out", "unheard"]].concat());
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(metrics(&place.path("unheard")), metrics(&place.path("heard")));
    let weights = |run: &str| std::fs::read(place.path(run).join("final/model.safetensors")).unwrap();
    assert!(weights("unheard") == weights("heard"));
    // Warnings and errors go the same way.
    std::fs::write(place.path("unheard/metrics.jsonl"), "not ours\n").unwrap();
    std::fs::remove_dir_all(place.path("unheard/final")).unwrap();
    for (args, code) in [(&["train", "--resume", "unheard"][..], 0), (&["train", "--resume", "unheard", "--json"], 2)] {
        let mut child = spawn(&place, args);
        drop((child.stdout.take(), child.stderr.take()));
        assert_eq!(child.wait().unwrap().code(), Some(code), "{args:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_log_on_a_full_disk_costs_no_step() {
    let place = Place::new();
    std::fs::write(place.path("tiny.toml"), TEXT_RUN).unwrap();
    std::fs::write(place.path("small.txt"), text(1)).unwrap();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let status =
        place.command(&["train", "tiny.toml", "-v", "--out", "run"]).stderr(full).stdout(Stdio::null()).status();
    assert_eq!(status.unwrap().code(), Some(0));
    assert_eq!(metrics(&place.path("run")).len(), 10);
}
