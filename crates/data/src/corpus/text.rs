//! Plain text files: reading, and refusing what is not text.

use std::path::Path;

use super::foreign::{BOM, what_it_is};
use crate::error::DataError;

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
