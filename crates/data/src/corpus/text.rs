//! Plain text files: reading, refusing what is not text, and encoding long documents piece by piece.

use std::path::Path;

use super::foreign::{BOM, what_it_is};
use crate::error::DataError;
use crate::tokenizer::Tokenizer;

/// Longer documents are encoded in pieces of about this many bytes: the tokenizer library keeps some hundred bytes per character.
const PIECE: usize = 1 << 18;

/// Reads a file that must be non-empty UTF-8 text without NUL bytes. A byte order mark at its start is no part of the text.
pub fn read_text(path: &Path) -> Result<String, DataError> {
    let mut bytes = std::fs::read(path).map_err(|source| DataError::io(path, source))?;
    if let Some(what) = what_it_is(&bytes) {
        return Err(DataError::Foreign { path: path.into(), what });
    }
    if bytes.starts_with(BOM) {
        bytes.drain(..BOM.len());
    }
    if bytes.is_empty() {
        return Err(DataError::Empty { path: path.into(), reason: "text was expected, the file has 0 bytes".into() });
    }
    let not_text = |offset, reason: String| DataError::NotText { path: path.into(), offset, reason };
    if let Some(offset) = bytes.iter().position(|byte| *byte == 0) {
        return Err(not_text(offset, "a NUL byte (a binary file?)".into()));
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let offset = e.utf8_error().valid_up_to();
        not_text(offset, format!("byte 0x{:02x}", e.as_bytes()[offset]))
    })?;
    if text.trim().is_empty() {
        return Err(DataError::Empty { path: path.into(), reason: "it holds nothing but white space".into() });
    }
    Ok(text)
}

/// The text of a file's bytes without a byte order mark, or what they are instead: half a sentence that follows "it is".
pub fn utf8(mut bytes: Vec<u8>) -> Result<String, String> {
    if let Some(what) = what_it_is(&bytes) {
        return Err(what.into());
    }
    if bytes.starts_with(BOM) {
        bytes.drain(..BOM.len());
    }
    String::from_utf8(bytes).map_err(|e| {
        let offset = e.utf8_error().valid_up_to();
        format!("something else (byte 0x{:02x} at {offset} is not UTF-8)", e.as_bytes()[offset])
    })
}

/// The ids of a document of any length. Long documents are cut after a line's end between two visible characters, where the word
/// splitters of byte-level vocabularies cut anyway.
pub fn encode_document(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, DataError> {
    let mut ids = Vec::with_capacity(text.len() / 3);
    let mut rest = text;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(cut(rest));
        ids.extend(tokenizer.encode(piece)?);
        rest = after;
    }
    Ok(ids)
}

fn cut(text: &str) -> usize {
    let bytes = text.as_bytes();
    let visible = |at: usize| bytes.get(at).is_some_and(|b| !b.is_ascii_whitespace());
    let at_line_end = |i: &usize| bytes[*i - 1] == b'\n' && visible(*i - 2) && visible(*i);
    if text.len() <= PIECE { text.len() } else { (PIECE..text.len()).find(at_line_end).unwrap_or(text.len()) }
}
