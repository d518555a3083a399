//! `mixtura route check` and `mixtura route explain`: the executable specification from the command line.

use std::path::Path;

use mixtura_routing::explain;
use mixtura_routing::golden::{GoldenError, GoldenFile, Report, Status};
use mixtura_train::table::Table;

use crate::cli::{RouteArgs, RouteCommand};
use crate::failure::Failure;
use crate::output::Output;

/// Checks or explains.
pub fn run(args: &RouteArgs, output: &Output) -> Result<(), Failure> {
    match &args.command {
        RouteCommand::Check { file, case } => check(file, case.as_deref(), output),
        RouteCommand::Explain { policy } => explain(policy.as_deref(), output),
    }
}

fn check(path: &Path, case: Option<&str>, output: &Output) -> Result<(), Failure> {
    let refuse = |error: &dyn std::fmt::Display| Failure::usage(format!("{}: {error}", path.display()));
    let bytes = std::fs::read(path).map_err(|e| refuse(&e))?;
    let text = String::from_utf8(bytes).map_err(|_| refuse(&"not a golden-vector file: it is not UTF-8 text"))?;
    let file = GoldenFile::parse(&text).map_err(|e: GoldenError| refuse(&e))?;
    let report = match case {
        None => file.check(),
        Some(id) => file.check_case(id).map_err(|e| refuse(&e))?,
    };
    output.result(&report, || report_text(&report))?;
    if report.failed > 0 { Err(Failure::silent(1)) } else { Ok(()) }
}

fn report_text(report: &Report) -> String {
    let mut table = Table::new(["case", "status", "largest difference", "message"]);
    for case in &report.cases {
        let status = match case.status {
            Status::Passed => "passed",
            Status::Failed => "FAILED",
            Status::Skipped => "skipped",
        };
        let difference = case.max_abs_diff.map_or("-".to_string(), |d| format!("{d:.1e}"));
        table.row([case.id.clone(), status.to_string(), difference, case.message.clone()]);
    }
    format!("{table}\n{} passed, {} failed, {} skipped\n", report.passed, report.failed, report.skipped)
}

fn explain(policy: Option<&str>, output: &Output) -> Result<(), Failure> {
    let Some(name) = policy else {
        let all = explain::all();
        return Ok(output.result(&all, || {
            let mut table = Table::new(["policy", "what it does"]);
            all.iter().for_each(|e| {
                table.row([e.name, e.does]);
            });
            table.to_string()
        })?);
    };
    let found = explain::find(name).map_err(|e| Failure::usage(format!("--policy {name}: {e}")))?;
    Ok(output.result(&found, || found.to_string())?)
}
