//! Writing so that a reader sees the old file or the new one, never a part.
//!
//! A file is written under a temporary name in the same directory, flushed to the disk and renamed; a directory likewise.
//! Whatever fails on the way, the temporary name is removed again and the old content stays. A process that is killed leaves
//! a name starting with [`TEMPORARY_PREFIX`], which no reader looks at and the next [`remove_leftovers`] clears.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::{CheckpointError, Result};

/// Names that start with this are unfinished work.
pub const TEMPORARY_PREFIX: &str = ".unfinished-";

/// Writes the file `path` through `fill`; returns what `fill` returns.
pub fn write_file<T>(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<T>) -> Result<T> {
    write_file_limited(path, None, fill)
}

/// As [`write_file`], with a disk that is full after `limit` bytes: how the tests fill a disk at every place.
pub(crate) fn write_file_limited<T>(
    path: &Path,
    limit: Option<u64>,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<T>,
) -> Result<T> {
    let dir = parent(path);
    let temporary = dir.join(temporary_name(path));
    let done = create_synced(&temporary, limit, fill)
        .and_then(|value| fs::rename(&temporary, path).map(|()| value))
        .and_then(|value| sync_dir(dir).map(|()| value));
    done.map_err(|e| {
        let _ = fs::remove_file(&temporary);
        CheckpointError::io("write", path, e)
    })
}

/// Creates `path` and flushes it to the disk; the caller renames.
pub(crate) fn create_synced<T>(
    path: &Path,
    limit: Option<u64>,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<T>,
) -> io::Result<T> {
    let file = File::create(path)?;
    let mut out = BufWriter::with_capacity(1 << 20, Limited { file, left: limit });
    let value = fill(&mut out)?;
    out.flush()?;
    out.get_ref().file.sync_all()?;
    Ok(value)
}

/// Moves the finished directory `temporary` to `target`, replacing an older one.
pub(crate) fn publish_dir(temporary: &Path, target: &Path) -> io::Result<()> {
    sync_dir(temporary)?;
    if target.exists() {
        // A directory cannot be renamed over a full one. The old one steps aside; `recover_replaced` puts it back if we
        // are killed between the two renames.
        let aside = parent(target).join(aside_name(target));
        if aside.exists() {
            fs::remove_dir_all(&aside)?;
        }
        fs::rename(target, &aside)?;
        fs::rename(temporary, target)?;
        sync_dir(parent(target))?;
        let _ = fs::remove_dir_all(&aside);
    } else {
        fs::rename(temporary, target)?;
        sync_dir(parent(target))?;
    }
    Ok(())
}

/// Clears what a killed writer left in `dir` and puts back a directory that was about to be replaced.
pub fn remove_leftovers(dir: &Path) -> Result<()> {
    let fail = |e| CheckpointError::io("clean", dir, e);
    for entry in fs::read_dir(dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name();
        // Names need not be UTF-8; a prefix of ASCII may be cut off all the same.
        let bytes = name.as_encoded_bytes();
        if let Some(target) = bytes.strip_prefix(REPLACED_PREFIX.as_bytes()) {
            let target = dir.join(os_string(target));
            if !target.exists() {
                fs::rename(entry.path(), &target).map_err(fail)?;
                continue;
            }
        } else if !bytes.starts_with(TEMPORARY_PREFIX.as_bytes()) {
            continue;
        }
        let removed =
            if entry.path().is_dir() { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) };
        removed.map_err(fail)?;
    }
    Ok(())
}

/// The temporary name under which `path` is written.
pub(crate) fn temporary_name(path: &Path) -> OsString {
    let mut name = OsString::from(TEMPORARY_PREFIX);
    name.push(file_name(path));
    name.push(format!("-{}", std::process::id()));
    name
}

const REPLACED_PREFIX: &str = ".replaced-";

fn aside_name(path: &Path) -> OsString {
    let mut name = OsString::from(REPLACED_PREFIX);
    name.push(file_name(path));
    name
}

fn file_name(path: &Path) -> &OsStr {
    path.file_name().unwrap_or(OsStr::new("file"))
}

/// A name from its bytes, which are UTF-8 everywhere but on Unix.
fn os_string(bytes: &[u8]) -> OsString {
    #[cfg(unix)]
    let name = std::os::unix::ffi::OsStringExt::from_vec(bytes.to_vec());
    #[cfg(not(unix))]
    let name = String::from_utf8_lossy(bytes).into_owned().into();
    name
}

pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// Makes renames and new names in `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    // Windows cannot open a directory as a file; its renames are journalled by the file system.
    if cfg!(windows) { Ok(()) } else { File::open(dir)?.sync_all() }
}

/// Creates `dir` and its parents.
pub(crate) fn create_dir(dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir).map_err(|e| CheckpointError::io("create", dir, e))?;
    Ok(dir.to_path_buf())
}

struct Limited {
    file: File,
    left: Option<u64>,
}

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(left) = &mut self.left {
            if (bytes.len() as u64) > *left {
                return Err(io::ErrorKind::StorageFull.into());
            }
            *left -= bytes.len() as u64;
        }
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        write_file(&path, |out| out.write_all(b"old")).unwrap();
        for limit in 0..3 {
            let error = write_file_limited(&path, Some(limit), |out| out.write_all(b"new")).unwrap_err();
            assert!(matches!(error, CheckpointError::DiskFull { .. }));
            assert_eq!(fs::read(&path).unwrap(), b"old");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        }
        write_file_limited(&path, Some(3), |out| out.write_all(b"new")).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[cfg(unix)]
    #[test]
    fn a_directory_whose_name_is_no_utf8_is_written_and_put_back() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join(os_string(b"model-\xff"));
        for content in ["old", "new"] {
            let temporary = root.path().join(temporary_name(&target));
            fs::create_dir(&temporary).unwrap();
            fs::write(temporary.join("file"), content).unwrap();
            publish_dir(&temporary, &target).unwrap();
            assert_eq!(fs::read_to_string(target.join("file")).unwrap(), content);
        }
        // Killed between the two renames of a replacement.
        fs::rename(&target, root.path().join(aside_name(&target))).unwrap();
        remove_leftovers(root.path()).unwrap();
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "new");
    }
}
