//! `mixtura route check`, `explain` and `losses`: the executable specification from the command line.

use std::path::Path;

use mixtura_routing::catalogue::dictionary::{self, Counts, DictionaryError, Layers, Row};
use mixtura_routing::catalogue::explain;
use mixtura_routing::reference::golden::{GoldenError, GoldenFile, Report, Status};
use mixtura_train::table::Table;
use serde::Serialize;

use crate::cli::{LossesArgs, RouteArgs, RouteCommand};
use crate::failure::Failure;
use crate::output::Output;

/// Checks, explains or compares.
pub fn run(args: &RouteArgs, output: &Output) -> Result<(), Failure> {
    match &args.command {
        RouteCommand::Check { file, case } => check(file, case.as_deref(), output),
        RouteCommand::Explain { policy } => explain(policy.as_deref(), output),
        RouteCommand::Losses(args) => losses(args, output),
    }
}

fn check(path: &Path, case: Option<&str>, output: &Output) -> Result<(), Failure> {
    let refuse = |error: &dyn std::fmt::Display| Failure::usage(format!("{}: {error}", path.display()));
    let bytes = std::fs::read(path).map_err(|e| refuse(&e))?;
    let text = mixtura_data::corpus::utf8(bytes)
        .map_err(|what| refuse(&format!("a golden-vector file is UTF-8 text, this is {what}")))?;
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

/// What `route losses` prints.
#[derive(Serialize)]
struct Losses {
    experts: usize,
    top_k: usize,
    layers: usize,
    losses: Vec<Row>,
    #[serde(skip_serializing_if = "Option::is_none")]
    conversion: Option<Conversion>,
}

/// Two coefficients that penalise equally loaded layers alike.
#[derive(Serialize)]
struct Conversion {
    from: String,
    coefficient: f64,
    to: String,
    equals: f64,
}

fn losses(args: &LossesArgs, output: &Output) -> Result<(), Failure> {
    let LossesArgs { experts, top_k, layers, from, to, coef } = args;
    let (experts, top_k, layers) = (*experts, *top_k, *layers);
    let refuse = |error: DictionaryError| Failure::usage(error.to_string());
    let conversion = match (from, to, coef) {
        (Some(from), Some(to), Some(coefficient)) => {
            if !(coefficient.is_finite() && *coefficient >= 0.0) {
                return Err(Failure::usage(format!("--coef {coefficient}: expected a finite number of at least 0")));
            }
            let equals = dictionary::convert(from, to, *coefficient, experts, top_k, layers).map_err(refuse)?;
            Some(Conversion { from: from.clone(), coefficient: *coefficient, to: to.clone(), equals })
        }
        _ => None,
    };
    let losses = dictionary::table(experts, top_k, layers).map_err(refuse)?;
    let document = Losses { experts, top_k, layers, losses, conversion };
    Ok(output.result(&document, || losses_text(&document))?)
}

fn losses_text(document: &Losses) -> String {
    let Losses { experts, top_k, layers, losses, conversion } = document;
    let mut table =
        Table::new(["library", "balance", "collapse", "layers cancel", "counts", "layers", "constant", "computed by"]);
    for Row { library, balance, collapse, cancel } in losses {
        let counts = match library.counts {
            Counts::All => "all k",
            Counts::First => "first",
        };
        let combined = match library.layers {
            Layers::Mean => "mean",
            Layers::Sum => "sum",
            Layers::Pooled => "pooled",
        };
        let numbers = [balance, collapse, cancel].map(|value| format!("{value:.4}"));
        let words = [counts, combined, library.constant, library.also].map(str::to_string);
        table.row([library.name.to_string()].into_iter().chain(numbers).chain(words));
    }
    let mut text = format!(
        "Balance losses of a model with E = {experts} experts, k = {top_k} and L = {layers} MoE layers, coefficient 1:\n\
         balance: every expert chosen equally often; collapse: all tokens to the same k experts;\n\
         layers cancel: even layers use one half of the experts, odd layers the other.\n\n{table}"
    );
    if let Some(Conversion { from, coefficient, to, equals }) = conversion {
        text.push_str(&format!(
            "\n{coefficient} in {from} penalises equally loaded layers as {equals} in {to} does.\n"
        ));
    }
    text
}
