//! How a command line ends that names no command to run: help, version, or an error of usage.

use std::io::Write;
use std::process::ExitCode;

use clap::error::ErrorKind;

/// Prints what clap has to say and returns its exit code: 0 for help and version, 2 for wrong usage. Under `--json` a document goes to
/// stdout: `{"help"}`, `{"version"}`, or `{"error", "exit_code"}` as every command's errors.
pub fn end(error: &clap::Error) -> ExitCode {
    let asks_for_json = std::env::args_os().skip(1).take_while(|arg| arg != "--").any(|arg| arg == "--json");
    let code = u8::try_from(error.exit_code()).unwrap_or(2);
    let said = error.render().to_string();
    // A reader that went away changes nothing about how this ends.
    if asks_for_json {
        let document = match error.kind() {
            ErrorKind::DisplayHelp => serde_json::json!({ "help": said.trim_end() }),
            ErrorKind::DisplayVersion => serde_json::json!({ "version": env!("CARGO_PKG_VERSION") }),
            _ => serde_json::json!({ "error": message(&said), "exit_code": code }),
        };
        let _ = writeln!(std::io::stdout(), "{document}");
    }
    if !asks_for_json || error.use_stderr() {
        let _ = error.print();
    }
    ExitCode::from(code)
}

/// Clap's first paragraph without its label, and the tips behind it; the usage and the hint at `--help` are for people.
fn message(said: &str) -> String {
    let told = said.split("\nUsage:").next().unwrap_or(said).split("\nFor more information").next().unwrap_or(said);
    let lines: Vec<&str> = told.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let joined = lines.join(" ");
    joined.strip_prefix("error: ").unwrap_or(&joined).to_string()
}
