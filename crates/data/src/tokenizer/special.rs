//! Which ids begin a text, end it and fill a row. Files say so, names do not: a vocabulary may hold `<|startoftext|>` and never use it.
//!
//! - What is put around a text is what `tokenizer.json`'s post-processor puts there. (`add_bos_token` in `tokenizer_config.json` speaks
//!   to programs that have no `tokenizer.json`; transformers does not listen to it beside one either.)
//! - The end of a document is the `eos_token` of `tokenizer_config.json`; without that file, what the post-processor puts behind
//!   a text; else a special token of the vocabulary that is called as the usual ones are. (Where a model's own files name the ids
//!   that end a text, those count in generation.)

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use tokenizers::{AddedToken, Tokenizer as HfTokenizer};

use crate::error::DataError;

/// Begins a row or a document in the vocabularies that this crate makes.
pub const BOS: &str = "<|bos|>";
/// Ends a document there.
pub const EOS: &str = "<|eos|>";
/// Fills a row there.
pub const PAD: &str = "<|pad|>";

/// What special tokens that end a document are called where no file says which it is.
const EOS_NAMES: [&str; 7] = [EOS, "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|return|>"];
/// The same for padding, which no target ever counts.
const PAD_NAMES: [&str; 5] = [PAD, "<pad>", "<|padding|>", "<|finetune_right_pad_id|>", "[PAD]"];

/// What `tokenizer_config.json` says of special tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SpecialNames {
    /// `bos_token`.
    pub bos: Option<String>,
    eos: Option<String>,
    pad: Option<String>,
    /// `unk_token` and the like: special, whatever `tokenizer.json` says.
    others: Vec<String>,
}

impl SpecialNames {
    /// Reads the files beside a `tokenizer.json`; where there are none, nothing is said.
    pub fn beside(tokenizer: &Path) -> Result<Self, DataError> {
        let mut names = Self::default();
        if tokenizer.file_name().is_none_or(|name| name != "tokenizer.json") {
            return Ok(names);
        }
        // The older of the two is asked only for what the newer does not say.
        for file in ["tokenizer_config.json", "special_tokens_map.json"] {
            let path = tokenizer.with_file_name(file);
            let bytes = match std::fs::read(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                other => other.map_err(|source| DataError::io(&path, source))?,
            };
            let value: Value = serde_json::from_slice(&bytes).map_err(|error| DataError::Tokenizer {
                name: path.display().to_string(),
                reason: format!("not JSON: {error}"),
            })?;
            names.add(&value);
        }
        Ok(names)
    }

    fn add(&mut self, config: &Value) {
        // A token is its text, or an object with its text and how it is matched.
        let token = |key: &str| {
            let value = config.get(key)?;
            value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_string)
        };
        self.bos = self.bos.take().or_else(|| token("bos_token"));
        self.eos = self.eos.take().or_else(|| token("eos_token"));
        self.pad = self.pad.take().or_else(|| token("pad_token"));
        self.others.extend(["unk_token", "sep_token", "cls_token", "mask_token"].iter().filter_map(|key| token(key)));
    }

    /// Makes the tokens that the configuration names special.
    pub fn apply(&self, tokenizer: &mut HfTokenizer) {
        let named = [&self.bos, &self.eos, &self.pad].into_iter().flatten().chain(&self.others);
        // A name that the vocabulary lacks would get an id that the model has no row for.
        let known: Vec<AddedToken> = named
            .filter(|name| tokenizer.token_to_id(name).is_some())
            .filter(|name| !tokenizer.get_added_vocabulary().is_special_token(name))
            .map(|name| AddedToken::from(name.as_str(), true))
            .collect();
        if !known.is_empty() {
            tokenizer.add_special_tokens(&known);
        }
    }
}

/// The post-processor of `tokenizer.json` that puts a token in front of every text.
pub(super) fn puts_first(token: &str, id: u32) -> Value {
    let (special, text) = (
        |kind: u32| json!({"SpecialToken": {"id": token, "type_id": kind}}),
        |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}}),
    );
    json!({
        "type": "TemplateProcessing",
        "single": [special(0), text("A", 0)],
        "pair": [special(0), text("A", 0), special(1), text("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    })
}

/// Ids with a meaning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct SpecialIds {
    /// Put in front of a text.
    pub start: Vec<u32>,
    /// Put behind a text.
    pub end: Vec<u32>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub pad: Option<u32>,
}

impl SpecialIds {
    /// Asks the tokenizer itself what it puts around a text.
    pub fn of(tokenizer: &HfTokenizer, names: &SpecialNames, vocab: &BTreeMap<String, u32>) -> Result<Self, DataError> {
        let failed = |reason: String| DataError::Tokenizer { name: "tokenizer.json".into(), reason };
        let (start, end) = around_a_text(tokenizer, vocab);
        let largest = vocab.values().copied().max().unwrap_or(0);
        if let Some(id) = start.iter().chain(&end).find(|id| **id > largest) {
            return Err(failed(format!("its post-processor adds token id {id}, which the vocabulary lacks")));
        }
        let named = |name: &Option<String>| name.as_ref().and_then(|name| vocab.get(name).copied());
        let called = |names: &[&str]| {
            let special = |name: &&&str| tokenizer.get_added_vocabulary().is_special_token(name);
            names.iter().filter(special).find_map(|name| vocab.get(*name).copied())
        };
        let bos = start.first().copied().filter(|_| start.len() == 1);
        let eos = named(&names.eos).or(end.last().copied()).or_else(|| called(&EOS_NAMES));
        let pad = named(&names.pad).or_else(|| called(&PAD_NAMES));
        Ok(Self { start, end, bos, eos, pad })
    }
}

/// What the post-processor puts in front of a text and behind it: the ends of an encoding that are marked as added.
fn around_a_text(tokenizer: &HfTokenizer, vocab: &BTreeMap<String, u32>) -> (Vec<u32>, Vec<u32>) {
    // Vocabularies without an unknown token have no ids for what they lack; one of their own tokens will do.
    let texts = ["a", " ", "1"].into_iter().chain(vocab.keys().map(String::as_str).take(1000));
    let encoding = texts
        .filter_map(|text| tokenizer.encode_fast(text, true).ok())
        .find(|encoding| encoding.get_special_tokens_mask().contains(&0));
    let Some(encoding) = encoding else { return (Vec::new(), Vec::new()) };
    let (ids, mask) = (encoding.get_ids(), encoding.get_special_tokens_mask());
    let before = mask.iter().take_while(|mask| **mask == 1).count();
    let after = mask.iter().rev().take_while(|mask| **mask == 1).count();
    (ids[..before].to_vec(), ids[ids.len() - after..].to_vec())
}
