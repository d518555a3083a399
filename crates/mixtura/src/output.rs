//! Where words go: results to stdout, progress and logs to stderr; under `--json` exactly one document on stdout.

use std::io::{ErrorKind, Write};

use mixtura_train::json;
use mixtura_train::progress::{self, Verbosity};
use serde::Serialize;

/// How a command speaks.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// `--json`.
    pub json: bool,
    /// `-q`, `-v` or neither.
    pub verbosity: Verbosity,
}

impl Output {
    /// The JSON document under `--json`, else the text. Numbers that JSON lacks are words, see [`json`].
    pub fn result(&self, document: &impl Serialize, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        if self.json { self.print(&(json::to_string(document)? + "\n")) } else { self.print(&text()) }
    }

    /// Writes to stdout and flushes. A reader that went away (`| head`) is not an error.
    pub fn print(&self, text: &str) -> anyhow::Result<()> {
        self.print_while_read(text).map(|_| ())
    }

    /// As [`Output::print`]; `false` once the reader went away, so that nothing more need be computed.
    pub fn print_while_read(&self, text: &str) -> anyhow::Result<bool> {
        let mut out = std::io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(false),
            other => Ok(other.map(|()| true)?),
        }
    }

    /// A line on stderr unless `-q`.
    pub fn note(&self, line: &str) {
        if self.verbosity > Verbosity::Quiet {
            progress::line(line);
        }
    }

    /// A line on stderr that `-q` does not hide.
    pub fn warn(&self, words: &str) {
        progress::warn(words);
    }
}
