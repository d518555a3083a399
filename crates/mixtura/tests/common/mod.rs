//! Runs the `mixtura` binary in a directory of its own.
#![allow(dead_code, reason = "each test file uses its own part of this")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A model small enough for twenty steps a second in an unoptimised build, on the real data.
pub const TINY: &[&str] = &[
    "model.d_model=32",
    "model.layers=2",
    "model.heads=2",
    "model.moe.experts=4",
    "model.moe.d_expert=32",
    "data.batch=4",
    "train.eval_every=10",
    "data.validation_batches=1",
    "data.propositions.evaluation_items=2",
    "train.checkpoint_every=5",
    "train.questions=2",
    "schedule.warmup=5",
];

/// A directory that goes away with the test.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn root(&self) -> &Path {
        self.0.path()
    }

    /// The binary, started in this directory.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mixtura"));
        command.current_dir(self.0.path()).args(args).env_remove("MIXTURA_ISA").env_remove("MIXTURA_WAY");
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        Ran::from(self.command(args).output().unwrap())
    }

    /// A command that must succeed.
    pub fn ok(&self, args: &[&str]) -> Ran {
        let ran = self.run(args);
        assert_eq!(ran.code, Some(0), "mixtura {args:?}\n{}\n{}", ran.stdout, ran.stderr);
        ran
    }

    /// `train` of the tiny model with more arguments.
    pub fn train_args<'a>(&self, more: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec!["train", "--json"];
        TINY.iter().for_each(|set| args.extend(["--set", *set]));
        args.extend(more);
        args
    }

    /// Trains the tiny model for a few steps into `out`; returns the document.
    pub fn tiny_model(&self, out: &str, steps: &str) -> Value {
        self.ok(&self.train_args(&["--steps", steps, "--out", out])).json()
    }
}

/// A run of the tiny model on text: ten steps, a checkpoint and an evaluation after five.
pub const TEXT_RUN: &str = r#"
[model]
d_model = 32
layers = 2
heads = 2
context = 32
[model.moe]
experts = 4
top_k = 2
d_expert = 32
[data]
kind = "text"
paths = "small.txt"
context = 32
batch = 4
validation_fraction = 0.1
validation_batches = 2
[optimizer]
lr = 3e-3
[schedule]
warmup = 2
[train]
steps = 10
eval_every = 5
checkpoint_every = 5
"#;

/// A few kilobytes of text, another one for every salt and all of one length.
pub fn text(salt: usize) -> String {
    (0..600).map(|i| format!("word{:02} ", (i * 7919 + salt * 31 + i * i) % 97)).collect()
}

/// What a command left behind.
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    pub fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The one document on stdout.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|e| panic!("stdout is not one JSON document ({e}):\n{}", self.stdout))
    }
}

/// The lines of metrics.jsonl without what depends on the clock.
pub fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        value.as_object_mut().unwrap().remove("tokens_per_second").unwrap();
        value
    };
    text.lines().map(line).collect()
}

/// The keys of an object, sorted.
pub fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap_or_else(|| panic!("not an object: {value}")).keys().map(String::as_str).collect()
}
