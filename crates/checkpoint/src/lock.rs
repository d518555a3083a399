//! One run per directory.
//!
//! The lock is the operating system's lock on `DIR/.lock`, not the file's existence: it vanishes with its process, however
//! that ends, so there is nothing stale to clean up after a crash.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::Duration;

use crate::error::{CheckpointError, Result};

/// The lock file in a run directory.
pub const LOCK_FILE: &str = ".lock";

/// Held while a run works in a directory; dropping it gives the directory free.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

impl RunLock {
    /// Takes the directory (creating it if need be) or says who has it.
    pub fn acquire(dir: &Path) -> Result<Self> {
        crate::atomic::create_dir(dir)?;
        let path = dir.join(LOCK_FILE);
        let fail = |e| CheckpointError::io("lock", &path, e);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(fail)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = file.read_to_string(&mut holder);
                let holder = if holder.is_empty() { "an unknown process".into() } else { holder.trim().to_string() };
                // The holder wrote the file when it took the lock, and never since.
                let since = file.metadata().and_then(|file| file.modified()).ok().and_then(|at| at.elapsed().ok());
                let holder = since.map_or(holder.clone(), |since| format!("{holder}, for {}", span(since)));
                return Err(CheckpointError::Locked { path: dir.to_path_buf(), holder });
            }
            Err(TryLockError::Error(e)) => return Err(fail(e)),
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "process {}", std::process::id()))
            .map_err(fail)?;
        Ok(Self { _file: file })
    }
}

/// A span of time in its two largest units.
fn span(time: Duration) -> String {
    let seconds = time.as_secs();
    let units = [(seconds / 86_400, "d"), (seconds / 3600 % 24, "h"), (seconds / 60 % 60, "min"), (seconds % 60, "s")];
    let first = units.iter().position(|(count, _)| *count > 0).unwrap_or(units.len() - 1);
    let words = units[first..].iter().take(2).map(|(count, unit)| format!("{count} {unit}"));
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_of_time_has_its_two_largest_units() {
        let shown = [0, 59, 60, 3 * 3600 + 125, 2 * 86_400 + 3599].map(|s| span(Duration::from_secs(s)));
        assert_eq!(shown, ["0 s", "59 s", "1 min 0 s", "3 h 2 min", "2 d 0 h"]);
    }

    #[test]
    fn the_holder_of_a_lock_is_named_with_the_time_it_has_had_it() {
        let dir = tempfile::tempdir().unwrap();
        let _held = RunLock::acquire(dir.path()).unwrap();
        let file = OpenOptions::new().write(true).open(dir.path().join(LOCK_FILE)).unwrap();
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(7265)).unwrap();
        let error = RunLock::acquire(dir.path()).unwrap_err().to_string();
        let expected = format!("(process {}, for 2 h 1 min)", std::process::id());
        assert!(error.contains(&expected), "{error}");
    }
}
