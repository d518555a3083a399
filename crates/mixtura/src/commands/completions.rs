//! `mixtura completions SHELL`.

use clap::CommandFactory;

use crate::cli::{Cli, CompletionsArgs};
use crate::failure::Failure;
use crate::output::Output;

/// Prints the script; under `--json` as `{"shell", "script"}`.
pub fn run(args: &CompletionsArgs, output: &Output) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "mixtura", &mut script);
    let script = String::from_utf8_lossy(&script).into_owned();
    let document = serde_json::json!({ "shell": args.shell.to_string(), "script": script });
    Ok(output.result(&document, || script.clone())?)
}
