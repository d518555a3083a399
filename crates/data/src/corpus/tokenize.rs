//! Files of text to one token shard, a few MiB at a time: what `mixtura tokenize` does.
//!
//! Documents are those that training reads, a text file or a line of JSON, each with the tokenizer's end of document behind it. A text
//! file is read piece by piece where the tokenizer can be shown to give the same ids for the pieces; else it is held whole.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::foreign::{BOM, what_it_is};
use super::jsonl::documents_of_jsonl;
use super::shards::ShardWriter;
use crate::config::{DataKind, kind_of};
use crate::error::DataError;
use crate::tokenizer::Tokenizer;

/// Bytes of text in memory at a time, and the least between two calls of `progress`.
const BLOCK: usize = 4 << 20;

/// What a shard was made of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tokenized {
    /// Documents, each with an end of document behind it where the tokenizer has one.
    pub documents: u64,
    /// Tokens written.
    pub tokens: u64,
    /// Bytes read.
    pub bytes: u64,
}

/// Encodes text files and JSON lines (`.jsonl`, `.ndjson`, `.json`; the text under `field`) into the shard `out`, which appears once it
/// is complete. `progress` is told how far it is and stops the work by returning `false`; then nothing is left and the result is `None`.
pub fn tokenize_files(
    files: &[PathBuf],
    field: &str,
    tokenizer: &Tokenizer,
    out: &Path,
    mut progress: impl FnMut(&Path, &Tokenized) -> bool,
) -> Result<Option<Tokenized>, DataError> {
    let mut writer = ShardWriter::create_with(out, tokenizer)?;
    let mut made = Tokenized::default();
    let mut all = || -> Result<bool, DataError> {
        for path in files {
            let lines = kind_of(path) == DataKind::Jsonl;
            let mut work = Work { path, tokenizer, writer: &mut writer, made: &mut made, progress: &mut progress };
            let goes_on = if lines { work.lines(field)? } else { work.text()? };
            if !goes_on {
                return Ok(false);
            }
        }
        Ok(true)
    };
    match all() {
        Ok(true) => {
            made.tokens = writer.tokens();
            writer.finish()?;
            Ok(Some(made))
        }
        Ok(false) => {
            writer.abandon();
            Ok(None)
        }
        Err(error) => {
            writer.abandon();
            Err(error)
        }
    }
}

/// One file on its way into the shard.
struct Work<'a> {
    path: &'a Path,
    tokenizer: &'a Tokenizer,
    writer: &'a mut ShardWriter,
    made: &'a mut Tokenized,
    progress: &'a mut dyn FnMut(&Path, &Tokenized) -> bool,
}

impl Work<'_> {
    /// One document of any length.
    fn text(&mut self) -> Result<bool, DataError> {
        let mut reader = TextReader::open(self.path)?;
        let (mut visible, mut wanted) = (false, BLOCK);
        loop {
            let last = !reader.fill(wanted)?;
            let text = reader.text.as_str();
            if last {
                visible |= !text.trim().is_empty();
                self.push(text)?;
                break;
            }
            let Some((end, next)) = self.tokenizer.cut(text, text.len() / 2) else {
                // No cut in sight: twice as much is looked at.
                wanted = 2 * text.len();
                continue;
            };
            visible |= !text[..next].trim().is_empty();
            self.push(&text[..end])?;
            reader.text.drain(..next);
            wanted = BLOCK;
            if !self.tell(&reader) {
                return Ok(false);
            }
        }
        if !visible {
            let reason = match reader.offset {
                0 => "text was expected, the file has 0 bytes",
                _ => "it holds nothing but white space",
            };
            return Err(DataError::Empty { path: self.path.into(), reason: reason.into() });
        }
        self.end_document()?;
        let goes_on = self.tell(&reader);
        self.made.bytes += reader.offset as u64;
        Ok(goes_on)
    }

    /// A document per line.
    fn lines(&mut self, field: &str) -> Result<bool, DataError> {
        let mut reader = TextReader::open(self.path)?;
        let (mut lines_before, mut wanted, before) = (0, BLOCK, self.made.documents);
        loop {
            let last = !reader.fill(wanted)?;
            if !last && reader.text.trim_start().starts_with('[') {
                // A JSON array: its objects are not lines, so it is read whole.
                wanted = usize::MAX;
                continue;
            }
            let end = if last { Some(reader.text.len()) } else { reader.text.rfind('\n').map(|at| at + 1) };
            let Some(end) = end else {
                wanted = 2 * reader.text.len();
                continue;
            };
            let block = &reader.text[..end];
            let documents = match documents_of_jsonl(block, field, self.path) {
                Ok(documents) => documents,
                Err(DataError::Empty { .. }) => Vec::new(),
                Err(DataError::JsonLine { path, line, reason }) => {
                    return Err(DataError::JsonLine { path, line: line + lines_before, reason });
                }
                Err(other) => return Err(other),
            };
            lines_before += block.matches('\n').count();
            for document in documents {
                self.push(&document)?;
                self.end_document()?;
            }
            reader.text.drain(..end);
            wanted = BLOCK;
            if last {
                break;
            }
            if !self.tell(&reader) {
                return Ok(false);
            }
        }
        if self.made.documents == before {
            let reason = format!("no line has a non-empty string in field \"{field}\"");
            return Err(DataError::Empty { path: self.path.into(), reason });
        }
        let goes_on = self.tell(&reader);
        self.made.bytes += reader.offset as u64;
        Ok(goes_on)
    }

    fn push(&mut self, text: &str) -> Result<(), DataError> {
        self.writer.push(&self.tokenizer.encode(text)?)
    }

    fn end_document(&mut self) -> Result<(), DataError> {
        self.made.documents += 1;
        self.writer.push(self.tokenizer.eos().as_slice())
    }

    fn tell(&mut self, reader: &TextReader) -> bool {
        let so_far = Tokenized {
            documents: self.made.documents,
            tokens: self.writer.tokens(),
            bytes: self.made.bytes + reader.offset as u64,
        };
        (self.progress)(self.path, &so_far)
    }
}

/// A file as text, refused where it is none.
struct TextReader<'a> {
    path: &'a Path,
    file: File,
    /// Read and not yet used.
    text: String,
    /// A character that the last block cut through.
    unfinished: Vec<u8>,
    /// Bytes of the file that were read.
    offset: usize,
}

impl<'a> TextReader<'a> {
    fn open(path: &'a Path) -> Result<Self, DataError> {
        let file = File::open(path).map_err(|source| DataError::io(path, source))?;
        Ok(Self { path, file, text: String::new(), unfinished: Vec::new(), offset: 0 })
    }

    /// Reads until `text` holds at least `bytes`; `false` at the end of the file.
    fn fill(&mut self, bytes: usize) -> Result<bool, DataError> {
        while self.text.len() < bytes {
            let mut block = std::mem::take(&mut self.unfinished);
            let start = self.offset - block.len();
            let io = |source| DataError::io(self.path, source);
            let read = Read::by_ref(&mut self.file).take(BLOCK as u64).read_to_end(&mut block).map_err(io)?;
            if self.offset == 0 {
                if let Some(what) = what_it_is(&block) {
                    return Err(DataError::Foreign { path: self.path.into(), what });
                }
                if block.starts_with(BOM) {
                    block.drain(..BOM.len());
                }
            }
            self.offset += read;
            let not_text = |at: usize, reason: String| {
                let (path, offset) = (self.path.to_path_buf(), start + at);
                DataError::NotText { path, offset, reason }
            };
            if let Some(at) = block.iter().position(|byte| *byte == 0) {
                return Err(not_text(at, "a NUL byte (a binary file?)".into()));
            }
            let valid = match std::str::from_utf8(&block) {
                Ok(_) => block.len(),
                Err(error) if error.error_len().is_none() && read > 0 => error.valid_up_to(),
                Err(error) => {
                    let at = error.valid_up_to();
                    return Err(not_text(at, format!("byte 0x{:02x}", block[at])));
                }
            };
            self.unfinished = block.split_off(valid);
            self.text.push_str(std::str::from_utf8(&block).expect("checked above"));
            if read == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
