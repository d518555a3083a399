//! One run per directory.
//!
//! The lock is the operating system's lock on `DIR/.lock`, not the file's existence: it vanishes with its process, however
//! that ends, so there is nothing stale to clean up after a crash.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

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
                return Err(CheckpointError::Locked { path: dir.to_path_buf(), holder });
            }
            Err(TryLockError::Error(e)) => return Err(fail(e)),
        }
        let started = std::time::SystemTime::UNIX_EPOCH.elapsed().map(|d| d.as_secs()).unwrap_or(0);
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "process {}, since {started} s after 1970", std::process::id()))
            .map_err(fail)?;
        Ok(Self { _file: file })
    }
}
