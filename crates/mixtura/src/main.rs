//! The `mixtura` command: reads the command line, runs one command, ends with its exit code.
//!
//! 0 done, 1 failed while running, 2 wrong usage or config, 130 interrupted after saving a checkpoint.

mod cli;
mod commands;
mod failure;
mod model_dir;
mod output;
mod usage;

use std::process::ExitCode;

use clap::Parser;
use mixtura_kernels::aligned::HugePages;
use mixtura_train::progress::{self, Verbosity};

use crate::cli::{Cli, Command};
use crate::output::Output;

/// Weights, gradients and moments are large, are touched whole, and are allocated by many hands.
#[global_allocator]
static MEMORY: HugePages = HugePages;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage::end(&error),
    };
    let verbosity = match (cli.quiet, cli.verbose) {
        (true, _) => Verbosity::Quiet,
        (_, true) => Verbosity::Verbose,
        _ => Verbosity::Normal,
    };
    let output = Output { json: cli.json, verbosity };
    let done = match &cli.command {
        Command::Train(args) => commands::train::run(args, &output),
        Command::Eval(args) => commands::eval::run(args, &output),
        Command::Generate(args) => commands::generate::run(args, &output),
        Command::Chat(args) => commands::chat::run(args, &output),
        Command::Tokenize(args) => commands::tokenize::run(args, &output),
        Command::Logits(args) => commands::logits::run(args, &output),
        Command::Inspect(args) => commands::inspect::run(args, &output),
        Command::Route(args) => commands::route::run(args, &output),
        Command::Bench(args) => commands::bench::run(args, &output),
        Command::Doctor(args) => commands::doctor::run(args, &output),
        Command::Completions(args) => commands::completions::run(args, &output),
    };
    let Err(failure) = done else { return ExitCode::SUCCESS };
    if let Some(message) = &failure.message {
        if output.json {
            // A script that asked for JSON gets one document whatever happens.
            let _ = output.print(&format!("{}\n", serde_json::json!({ "error": message, "exit_code": failure.code })));
        }
        progress::line(&format!("error: {message}"));
    }
    ExitCode::from(failure.code)
}
