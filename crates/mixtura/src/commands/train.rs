//! `mixtura train`: starts or resumes a run and prints how it ended.

use std::fmt::Write;

use mixtura_train::config::RunConfig;
use mixtura_train::interrupt::Interrupt;
use mixtura_train::run::{self, RunOptions, RunReport, Status};
use mixtura_train::table::{Table, duration, grouped};

use crate::cli::TrainArgs;
use crate::commands::prepare;
use crate::failure::Failure;
use crate::output::Output;

/// What `mixtura train` without CONFIG runs.
const QUICKSTART: &str = include_str!("../../../../configs/quickstart.toml");

/// Trains.
pub fn run(args: &TrainArgs, output: &Output) -> Result<(), Failure> {
    prepare(&args.threads)?;
    let interrupt = Interrupt::on_signals().map_err(|e| Failure::running(format!("cannot listen for signals: {e}")))?;
    let options = RunOptions { stop_after: args.stop_after, verbosity: output.verbosity, interrupt, force: args.force };
    if args.stop_after == Some(0) {
        return Err(Failure::usage("--stop-after 0: expected at least 1"));
    }
    let report = match &args.resume {
        Some(dir) => run::resume(dir, args.steps, &options)?,
        None => {
            let config = read_config(args)?;
            warn_of_leaks(&config, output);
            run::start(config, args.out.as_deref(), &options)?
        }
    };
    output.result(&report, || text(&report))?;
    match report.status {
        Status::Interrupted => Err(Failure::silent(130)),
        Status::Done | Status::Stopped => Ok(()),
    }
}

/// A router that is not causal shows a language model the tokens it has to predict. Researchers compare such routers, so they are
/// trained, and named. (A soft layer with a leak must be allowed in the config.)
fn warn_of_leaks(config: &RunConfig, output: &Output) {
    let Some(moe) = config.model.moe.as_ref().filter(|moe| moe.soft.is_none()) else { return };
    if let Some(leak) = moe.router.leak(true, moe.top_k, moe.zero_computation.as_ref()) {
        output.warn(&format!(
            "this router is not causal: {leak}. The loss of a language model trained with it is too good, and what it \
             generates is worse than its loss says"
        ));
    }
}

/// The config file, or the quickstart, with what the command line overrides.
fn read_config(args: &TrainArgs) -> Result<RunConfig, Failure> {
    let mut overrides = args.set.clone();
    overrides.extend(args.steps.map(|n| format!("train.steps={n}")));
    overrides.extend(args.precision.map(|p| format!("train.precision=\"{}\"", mixtura_ops::Precision::from(p))));
    if let Some(seed) = args.seed {
        overrides.extend([format!("train.seed={seed}"), format!("data.seed={seed}")]);
    }
    let Some(path) = &args.config else {
        return Ok(RunConfig::parse(QUICKSTART, "quickstart.toml (built in)", &overrides)?);
    };
    let bytes =
        std::fs::read(path).map_err(|e| Failure::usage(format!("cannot read the config {}: {e}", path.display())))?;
    let text = mixtura_data::corpus::utf8(bytes)
        .map_err(|what| Failure::usage(format!("{}: a config is UTF-8 text, this is {what}", path.display())))?;
    let mut config = RunConfig::parse(&text, &path.display().to_string(), &overrides)?;
    if config.name == "run" {
        // A config without a name is called after its file.
        config.name = path.file_stem().map_or(config.name, |stem| stem.to_string_lossy().into_owned());
    }
    Ok(config)
}

/// The end of a run as a person reads it.
fn text(report: &RunReport) -> String {
    let run = report.run.display();
    let mut text = match report.status {
        Status::Done => format!("{run}: {} steps done\n", report.step),
        Status::Stopped => format!("{run}: stopped after step {}; go on with --resume {run}\n", report.step),
        Status::Interrupted if report.finished => {
            format!("{run}: {} steps done; interrupted while answering questions, go on with eval {run}\n", report.step)
        }
        Status::Interrupted => {
            format!("{run}: interrupted, saved after step {}; go on with --resume {run}\n", report.step)
        }
    };
    let mut table = Table::new(["", ""]);
    let mut row = |name: &str, value: String| {
        table.row([name.to_string(), value]);
    };
    row(
        "parameters",
        format!(
            "{}, {} active per token",
            grouped(report.parameters.total as u64),
            grouped(report.parameters.active as u64)
        ),
    );
    row("tokens read", grouped(report.tokens));
    if report.training_seconds > 0.0 {
        row("training time", duration(report.training_seconds));
        row("speed", format!("{} tokens/s", grouped(report.tokens_per_second as u64)));
    }
    if let Some(loss) = report.loss {
        row("last loss", format!("{loss:.4}"));
    }
    if let Some(eval) = &report.eval {
        let bits = eval.bits_per_byte.map_or(String::new(), |bits| format!(", {bits:.3} bits per byte"));
        row("validation", format!("loss {:.4}, perplexity {:.2}{bits}", eval.loss, eval.perplexity));
    }
    if let Some(accuracy) = &report.accuracy {
        row("verdicts right", format!("{:.1} %", 100.0 * accuracy.overall));
    }
    if let Some(bytes) = report.peak_memory {
        row("peak memory", format!("{} MiB", grouped(bytes >> 20)));
    }
    let body = table.to_string();
    // The two header lines are empty.
    body.lines().skip(2).for_each(|line| writeln!(text, "{line}").expect("writing to a String cannot fail"));
    if let Some(accuracy) = &report.accuracy {
        let _ = write!(text, "\n{}", accuracy.table());
    }
    for sample in &report.samples {
        let mark = if sample.right { "right" } else { "wrong" };
        let _ = write!(
            text,
            "\n{}\n{}\n  -> {mark}, the facts say {}\n",
            sample.prompt,
            indent(&sample.answer),
            sample.expected
        );
    }
    text
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}
