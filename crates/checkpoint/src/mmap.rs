//! A file mapped into memory, read only. The one place of this crate with `unsafe`.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

use crate::error::{CheckpointError, Result};

/// A whole file as `&[u8]`, paged in by the system as it is touched.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    /// `None` for an empty file, which cannot be mapped.
    map: Option<memmap2::Mmap>,
}

impl MappedFile {
    /// Maps `path`. An empty file gives an empty slice.
    pub fn open(path: &Path) -> Result<Self> {
        let fail = |source| CheckpointError::io("read", path, source);
        let file = File::open(path).map_err(fail)?;
        let info = file.metadata().map_err(fail)?;
        if info.is_dir() {
            return Err(fail(std::io::ErrorKind::IsADirectory.into()));
        }
        let map = if info.len() == 0 { None } else { Some(map_file(&file).map_err(fail)?) };
        Ok(Self { path: path.to_path_buf(), map })
    }

    /// Gives back the memory of the pages that lie wholly in `range`; they are read again from the file when they are touched.
    pub fn release(&self, range: Range<usize>) {
        const PAGE: usize = 4096;
        let (start, end) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
        if let Some(map) = &self.map
            && start < end
        {
            release(map, start, end - start);
        }
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.map.as_deref().unwrap_or(&[])
    }
}

/// It is a hint: where it cannot be taken, the pages stay.
#[cfg(unix)]
#[allow(unsafe_code)]
fn release(map: &memmap2::Mmap, start: usize, len: usize) {
    // SAFETY: the map is of a file, shared and read only; a page that was let go is read from the file again, with the same bytes.
    let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len) };
}

/// There is no such hint here.
#[cfg(not(unix))]
fn release(_: &memmap2::Mmap, _: usize, _: usize) {}

#[allow(unsafe_code)]
fn map_file(file: &File) -> std::io::Result<memmap2::Mmap> {
    // SAFETY: the map is private to this process and read only, and no file of this crate is ever changed in place: writers
    // create a new file and rename it over the old name, so the mapped inode keeps its bytes. A foreign program that
    // truncates the file under us can end the process with SIGBUS, as with every memory-mapped reader.
    unsafe { memmap2::Mmap::map(file) }
}
