//! The ids that a model's own files give a meaning: `config.json`, and `generation_config.json` beside it.
//!
//! Chat models list several ends of text in `generation_config.json` and one in `config.json`, others the other way round, so the ends
//! are those of both. A number and a list are both written.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::checkpoints::CONFIG_FILE;
use crate::error::{CheckpointError, Result};
use crate::hf_keys::{Parsed, bad, object, pretty};

/// File name of what concerns generation alone.
pub const GENERATION_FILE: &str = "generation_config.json";

/// What a `config.json` carries besides the architecture.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenIds {
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`: all tokens that end a text.
    pub eos: Vec<u32>,
    /// `pad_token_id`.
    pub pad: Option<u32>,
}

impl TokenIds {
    /// The ids that the files in a model's directory name; a file that is not there names none.
    pub fn read(dir: &Path) -> Result<Self> {
        let mut ids = Self::default();
        for file in [GENERATION_FILE, CONFIG_FILE] {
            let path = dir.join(file);
            match fs::read(&path) {
                Ok(bytes) => ids.add(&bytes).map_err(|source| CheckpointError::Format { path, source })?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(CheckpointError::io("read", &path, error)),
            }
        }
        Ok(ids)
    }

    /// Adds what one of the two files says: ends of text to those there are, the others where none is known yet.
    pub fn add(&mut self, bytes: &[u8]) -> Parsed<()> {
        let map = object(bytes)?;
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        // Published files write -1 or null for "none".
        let single = |key: &str| map.get(key).and_then(id);
        self.bos = self.bos.or(single("bos_token_id"));
        self.pad = self.pad.or(single("pad_token_id"));
        let named = match map.get("eos_token_id") {
            None | Some(Value::Null) => &[],
            Some(Value::Array(list)) => list.as_slice(),
            Some(one) => std::slice::from_ref(one),
        };
        for value in named {
            let end = id(value).ok_or_else(|| bad("eos_token_id", value, "a token id, or a list of them"))?;
            if !self.eos.contains(&end) {
                self.eos.push(end);
            }
        }
        Ok(())
    }

    pub(crate) fn eos_json(&self) -> Value {
        match self.eos.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        }
    }

    /// `generation_config.json`, if there is something to say in it.
    pub fn generation_config(&self) -> Option<Vec<u8>> {
        let mut map = Map::new();
        for (key, value) in [("bos_token_id", json!(self.bos)), ("pad_token_id", json!(self.pad))] {
            if !value.is_null() {
                map.insert(key.into(), value);
            }
        }
        if !self.eos.is_empty() {
            map.insert("eos_token_id".into(), self.eos_json());
        }
        (!map.is_empty()).then(|| pretty(&Value::Object(map)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_of_both_files_count_and_numbers_and_lists_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let read = |config: &str, generation: Option<&str>| {
            fs::write(dir.path().join(CONFIG_FILE), config).unwrap();
            let path = dir.path().join(GENERATION_FILE);
            let _ = fs::remove_file(&path);
            generation.iter().for_each(|text| fs::write(&path, text).unwrap());
            TokenIds::read(dir.path())
        };
        let ends = |config: &str, generation: Option<&str>| read(config, generation).unwrap().eos;
        assert_eq!(ends("{}", None), [0u32; 0]);
        assert_eq!(ends(r#"{"eos_token_id": 2}"#, None), [2]);
        assert_eq!(ends(r#"{"eos_token_id": 2}"#, Some(r#"{"eos_token_id": [7, 2]}"#)), [7, 2]);
        assert_eq!(ends(r#"{"eos_token_id": [3, 4]}"#, Some(r#"{"eos_token_id": null}"#)), [3, 4]);
        assert_eq!(ends(r#"{"eos_token_id": null}"#, Some(r#"{"eos_token_id": 5}"#)), [5]);
        let ids = read(r#"{"bos_token_id": 1, "pad_token_id": -1}"#, None).unwrap();
        assert_eq!(ids, TokenIds { bos: Some(1), ..TokenIds::default() });
        for wrong in ["\"</s>\"", "[2, -1]", "1.5", "{}"] {
            let error = read(&format!("{{\"eos_token_id\": {wrong}}}"), None).unwrap_err().to_string();
            assert!(error.contains("config.json") && error.contains("eos_token_id"), "{error}");
        }
    }
}
