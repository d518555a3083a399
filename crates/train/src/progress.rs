//! What a person sees while a run is under way, on stderr: a bar on a terminal, else a plain line every few seconds.
//!
//! Nobody has to be listening: a stderr that was closed, or a terminal that is gone, costs the words and nothing else.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::table::duration;

/// Seconds between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// How much is said on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Verbosity {
    /// Warnings and errors only (`-q`).
    Quiet,
    /// Progress and what was written.
    #[default]
    Normal,
    /// Also what each part of a step took (`-v`).
    Verbose,
}

/// One line on stderr. `eprintln!` panics where nobody reads any more, and a run would die of it.
pub fn line(words: &str) {
    let _ = writeln!(std::io::stderr(), "{words}");
}

/// A line that `-q` does not hide: something is not as it should be, and the run goes on.
pub fn warn(words: &str) {
    line(&format!("warning: {words}"));
}

/// What changes from step to step on the bar.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reading {
    /// Optimizer steps done.
    pub step: u64,
    /// Loss, averaged over the last steps.
    pub loss: f64,
    /// Tokens per second, averaged over the steps of this process.
    pub tokens_per_second: f64,
    /// Arithmetic done over the measured peak, if a peak was measured.
    pub roofline: Option<f64>,
    /// The worst layer's busiest expert over the mean, if the model has experts.
    pub balance: Option<f64>,
}

impl Reading {
    fn words(&self) -> String {
        let mut words = format!("loss {:.4}  {:.0} tokens/s", self.loss, self.tokens_per_second);
        if let Some(share) = self.roofline {
            words.push_str(&format!("  {:.0} % of peak", 100.0 * share));
        }
        if let Some(balance) = self.balance {
            words.push_str(&format!("  busiest expert {balance:.2}x"));
        }
        words
    }
}

/// A bar, plain lines, or silence.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    verbosity: Verbosity,
    total: u64,
    first: u64,
    started: Instant,
    last_line: Option<Instant>,
}

impl Progress {
    /// Progress from step `first` to `total`, on stderr.
    pub fn new(first: u64, total: u64, verbosity: Verbosity) -> Self {
        let bar = (verbosity > Verbosity::Quiet && std::io::stderr().is_terminal()).then(|| {
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len}  {msg}  {elapsed} of {duration}")
                .expect("the template is a constant");
            let bar =
                ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(8)).with_style(style);
            bar.set_position(first);
            bar.reset_eta();
            bar
        });
        Self { bar, verbosity, total, first, started: Instant::now(), last_line: None }
    }

    /// Shows a step.
    pub fn update(&mut self, reading: &Reading) {
        if let Some(bar) = &self.bar {
            bar.set_position(reading.step);
            bar.set_message(reading.words());
            return;
        }
        let due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_EVERY) || reading.step == self.total;
        if self.verbosity > Verbosity::Quiet && due {
            self.last_line = Some(Instant::now());
            let elapsed = self.started.elapsed().as_secs_f64();
            let left = elapsed / (reading.step - self.first).max(1) as f64 * (self.total - reading.step) as f64;
            line(&format!("step {}/{}  {}  {} left", reading.step, self.total, reading.words(), duration(left)));
        }
    }

    /// Says one line without disturbing the bar.
    pub fn say(&self, words: &str) {
        match (&self.bar, self.verbosity) {
            (_, Verbosity::Quiet) => {}
            (Some(bar), _) => bar.suspend(|| line(words)),
            (None, _) => line(words),
        }
    }

    /// Says one line only under `-v`.
    pub fn detail(&self, words: &str) {
        if self.verbosity == Verbosity::Verbose {
            self.say(words);
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
