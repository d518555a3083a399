//! Text to token ids and back: bytes, trained BPE, any Hugging Face `tokenizer.json`, and the fixed vocabulary of the propositions.
//!
//! All four are a [`tokenizers`] tokenizer underneath and all four save themselves as a valid `tokenizer.json`, so a checkpoint is read
//! by the same loader whatever it was trained with, by us and by other programs. Text never yields a special token unless it is
//! asked to: `<|eos|>` typed by a user is seven characters.

mod builtin;
mod bpe;
mod special;
mod cuts;
mod stream;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use tokenizers::Tokenizer as HfTokenizer;

use self::builtin::{Shortcut, byte_of, longest_phrases, phrase_cut};
use self::cuts::Cuts;
use self::special::{SpecialIds, SpecialNames};
use self::stream::{Decoding, byte_token};
use crate::corpus::foreign::{BOM, what_it_is};
use crate::error::DataError;

pub use self::special::{BOS, EOS, PAD};
pub use self::stream::TextStream;

/// A larger id than this is a damaged file: the largest published vocabularies have a quarter of a million.
const LARGEST_ID: u32 = 1 << 24;

/// Longer texts are encoded in parts of about this many bytes where that gives the same ids: the tokenizer library keeps some
/// hundred bytes per character.
const PART: usize = 1 << 16;

/// Parts that are encoded side by side.
const PARTS_AT_ONCE: usize = 8;

/// A tokenizer with its special ids.
///
/// ```
/// use mixtura_data::Tokenizer;
/// let bytes = Tokenizer::byte();
/// let ids = bytes.encode("déjà").unwrap();
/// assert_eq!((ids.len(), bytes.vocab_size()), (6, 259));
/// assert_eq!(bytes.decode(&ids), "déjà");
///
/// let reloaded = Tokenizer::from_json(bytes.to_json().as_bytes()).unwrap();
/// assert_eq!(reloaded.encode("déjà").unwrap(), ids);
/// ```
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<HfTokenizer>,
    shortcut: Shortcut,
    special: Arc<SpecialIds>,
    /// What the files call the start of a text, whether or not it is put there.
    bos_name: Option<String>,
    decoding: Decoding,
    cuts: Cuts,
    /// Bytes of text per id, 0 for special tokens.
    byte_lengths: Arc<[u32]>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let SpecialIds { start, end, eos, pad, .. } = &*self.special;
        let size = self.vocab_size();
        write!(f, "Tokenizer {{ vocab_size: {size}, start: {start:?}, end: {end:?}, eos: {eos:?}, pad: {pad:?} }}")
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`, and `tokenizer_config.json` beside it where there is one.
    pub fn from_file(path: &Path) -> Result<Self, DataError> {
        let bytes = std::fs::read(path).map_err(|source| DataError::io(path, source))?;
        if bytes.is_empty() {
            return Err(DataError::Empty { path: path.into(), reason: "a tokenizer.json was expected".into() });
        }
        let names = SpecialNames::beside(path)?;
        Self::from_parts(&bytes, &names).map_err(|error| match error {
            DataError::Tokenizer { reason, .. } => DataError::Tokenizer { name: path.display().to_string(), reason },
            other => other,
        })
    }

    /// Reads the bytes of a `tokenizer.json`; whatever they are, the result is a tokenizer or an error.
    pub fn from_json(bytes: &[u8]) -> Result<Self, DataError> {
        Self::from_parts(bytes, &SpecialNames::default())
    }

    fn from_parts(bytes: &[u8], names: &SpecialNames) -> Result<Self, DataError> {
        let error = |reason: String| DataError::Tokenizer { name: "tokenizer.json".into(), reason };
        if let Some(what) = what_it_is(bytes) {
            return Err(error(format!("it is {what}")));
        }
        let bytes = bytes.strip_prefix(BOM).unwrap_or(bytes);
        let text = std::str::from_utf8(bytes).map_err(|e| error(format!("not UTF-8: {e}")))?;
        let value: Value = serde_json::from_str(text).map_err(|e| error(format!("not JSON: {e}")))?;
        if !value.get("model").is_some_and(Value::is_object) {
            return Err(error("expected an object with a \"model\" (the Hugging Face tokenizer.json format)".into()));
        }
        let mut inner = HfTokenizer::from_bytes(bytes).map_err(|e| error(format!("not understood: {e}")))?;
        inner.set_encode_special_tokens(true);
        // Truncation and padding belong to whoever batches, never to the vocabulary.
        inner.with_truncation(None).map_err(|e| error(e.to_string()))?.with_padding(None);
        names.apply(&mut inner);

        let vocab: BTreeMap<String, u32> = inner.get_vocab(true).into_iter().collect();
        let Some(largest) = vocab.values().copied().max() else {
            return Err(error("the vocabulary is empty".into()));
        };
        if largest >= LARGEST_ID {
            return Err(error(format!("token id {largest} is beyond the {LARGEST_ID} ids that are supported")));
        }
        let byte_lengths = byte_lengths(&vocab, &inner, largest);
        let special = Arc::new(SpecialIds::of(&inner, names, &vocab)?);
        let shortcut = Shortcut::of(&value, &inner, &vocab);
        let (decoding, cuts) = (Decoding::of(&inner), Cuts::of(&inner));
        let bos_name = names.bos.clone().filter(|name| vocab.contains_key(name));
        Ok(Self { inner: Arc::new(inner), shortcut, special, bos_name, decoding, cuts, byte_lengths })
    }

    /// The ids of a text, without special tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        match &self.shortcut {
            Shortcut::None => self.encode_in_parts(text, PART),
            Shortcut::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Shortcut::Phrases(by_first_byte) => Ok(longest_phrases(text, by_first_byte)),
        }
    }

    /// Whether long texts can be cut at all; otherwise they are encoded as a whole, in memory that grows with them.
    pub fn cuts(&self) -> bool {
        !matches!(self.shortcut, Shortcut::None) || self.cuts != Cuts::NONE
    }

    /// Where a long text can be cut so that both sides, encoded alone, give the ids of the whole: the end of the first part and the
    /// start of the second, at or behind byte `from`. `None` where no such place is known of.
    pub fn cut(&self, text: &str, from: usize) -> Option<(usize, usize)> {
        match &self.shortcut {
            Shortcut::None => self.cuts.find(text, from),
            Shortcut::Bytes => (from.max(1)..text.len()).find(|at| text.is_char_boundary(*at)).map(|at| (at, at)),
            Shortcut::Phrases(by_first_byte) => phrase_cut(text, by_first_byte, from).map(|at| (at, at)),
        }
    }

    fn encode_in_parts(&self, text: &str, part: usize) -> Result<Vec<u32>, DataError> {
        if text.len() <= part {
            return self.encode_by_library(text);
        }
        let mut ids = Vec::with_capacity(text.len() / 3);
        let (mut rest, mut parts) = (text, Vec::new());
        loop {
            let cut = self.cuts.find(rest, part);
            parts.push(&rest[..cut.map_or(rest.len(), |(end, _)| end)]);
            if cut.is_none() || parts.len() == PARTS_AT_ONCE {
                let encodings = self.inner.encode_batch_fast(std::mem::take(&mut parts), false);
                encodings.map_err(encoding_error)?.iter().for_each(|encoding| ids.extend(encoding.get_ids()));
            }
            let Some((_, next)) = cut else { return Ok(ids) };
            rest = &rest[next..];
        }
    }

    fn encode_by_library(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let encoding = self.inner.encode_fast(text, false).map_err(encoding_error)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of a text as a model was trained to see it: with what the post-processor puts in front of it and behind it, which is
    /// what transformers makes of the text.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, DataError> {
        if let Shortcut::None = self.shortcut {
            let encoding = self.inner.encode_fast(text, true).map_err(encoding_error)?;
            return Ok(encoding.get_ids().to_vec());
        }
        let SpecialIds { start, end, .. } = &*self.special;
        Ok([start.as_slice(), &self.encode(text)?, end].concat())
    }

    /// As [`Tokenizer::encode_prompt`], but a special token that is spelled out in the text is that token.
    ///
    /// ```
    /// let bytes = mixtura_data::Tokenizer::byte();
    /// assert_eq!(bytes.encode_prompt_with_special("a<|eos|>").unwrap(), [256, 97, 257]);
    /// assert_eq!(bytes.encode_prompt("a<|eos|>").unwrap().len(), 9);
    /// ```
    pub fn encode_prompt_with_special(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let encoding = self.with_special(false).encode_fast(text, true).map_err(encoding_error)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of a text that spells out all of its special tokens, as chat templates make it: none is added, and what is spelled out is
    /// that token where `is_special` says so of its bytes, else text.
    ///
    /// ```
    /// let bytes = mixtura_data::Tokenizer::byte();
    /// assert_eq!(bytes.encode_chat("<|eos|>a<|eos|>", |_| true).unwrap(), [257, 97, 257]);
    /// let first = |bytes: &std::ops::Range<usize>| bytes.start == 0;
    /// assert_eq!(bytes.encode_chat("<|eos|>a<|eos|>", first).unwrap()[..4], [257, 97, u32::from(b'<'), u32::from(b'|')]);
    /// ```
    pub fn encode_chat(&self, text: &str, is_special: impl Fn(&Range<usize>) -> bool) -> Result<Vec<u32>, DataError> {
        let encoding = self.with_special(false).encode(text, false).map_err(encoding_error)?;
        let added = self.inner.get_added_tokens_decoder();
        let spelled = |id: &u32| added.get(id).is_some_and(|token| token.special);
        let bytes = encoding.get_offsets().iter().map(|&(start, end)| start..end);
        let found: Vec<(u32, Range<usize>)> =
            encoding.get_ids().iter().copied().zip(bytes).filter(|(id, _)| spelled(id)).collect();
        if found.iter().all(|(_, bytes)| is_special(bytes)) {
            return Ok(encoding.get_ids().to_vec());
        }
        // A message spells out a token: the parts between the template's own are encoded as the text that they are.
        let plain = self.with_special(true);
        let (mut ids, mut done) = (Vec::new(), 0);
        let mut text_to = |ids: &mut Vec<u32>, end: usize, next: usize| {
            let part = std::mem::replace(&mut done, next)..end;
            let encoding = plain.encode_fast(&text[part], false).map_err(encoding_error)?;
            ids.extend_from_slice(encoding.get_ids());
            Ok::<(), DataError>(())
        };
        for (id, bytes) in found.into_iter().filter(|(_, bytes)| is_special(bytes)) {
            text_to(&mut ids, bytes.start, bytes.end)?;
            ids.push(id);
        }
        text_to(&mut ids, text.len(), text.len())?;
        Ok(ids)
    }

    /// How the special tokens are spelled, as text may spell them too.
    pub fn special_spellings(&self) -> Vec<String> {
        self.inner
            .get_added_tokens_decoder()
            .into_values()
            .filter(|token| token.special)
            .map(|token| token.content)
            .collect()
    }

    /// The tokenizer that reads special tokens in a text as text, or as what they are.
    fn with_special(&self, as_text: bool) -> HfTokenizer {
        let mut inner = (*self.inner).clone();
        inner.set_encode_special_tokens(as_text);
        inner
    }

    /// The text of ids; special and unknown ids are skipped, bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        if let Shortcut::Bytes = self.shortcut {
            let bytes: Vec<u8> = ids.iter().filter_map(|id| u8::try_from(*id).ok()).collect();
            return String::from_utf8_lossy(&bytes).into_owned();
        }
        // Some of the library's decoders panic on nothing.
        let visible: Vec<u32> = ids.iter().copied().filter(|id| self.visible(*id).is_some()).collect();
        if visible.is_empty() { String::new() } else { self.inner.decode(&visible, true).unwrap_or_default() }
    }

    /// A decoder for ids that arrive one by one.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }

    /// A decoder for the ids that follow those of a prompt, whose text has been shown.
    pub fn stream_after(&self, prompt: &[u32]) -> TextStream<'_> {
        TextStream::after(self, prompt)
    }

    /// What an id adds to a text that it stands in the middle of: the space in front of a word belongs to it.
    pub fn text_of(&self, id: u32) -> String {
        let mut stream = TextStream::inside(self);
        stream.push(id) + &stream.finish()
    }

    /// The token of an id that decoding does not skip.
    fn visible(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id).filter(|token| !self.inner.get_added_vocabulary().is_special_token(token))
    }

    /// The bytes of a visible token of a byte-level vocabulary.
    fn push_bytes(&self, id: u32, token: &str, bytes: &mut Vec<u8>) {
        match (&self.shortcut, u8::try_from(id)) {
            (Shortcut::Bytes, Ok(byte)) => bytes.push(byte),
            _ => match token.chars().map(byte_of).collect::<Option<Vec<u8>>>() {
                Some(found) => bytes.extend(found),
                None => bytes.extend(token.as_bytes()),
            },
        }
    }

    /// One more than the largest id: the rows of an embedding.
    pub fn vocab_size(&self) -> usize {
        self.byte_lengths.len()
    }

    /// The token that the post-processor puts in front of every text, and training in front of every row; none where it puts none
    /// there, whatever the vocabulary holds.
    pub fn bos(&self) -> Option<u32> {
        self.special.bos
    }

    /// Ends a document.
    pub fn eos(&self) -> Option<u32> {
        self.special.eos
    }

    /// Fills a row.
    pub fn pad(&self) -> Option<u32> {
        self.special.pad
    }

    /// The token of an id, as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Bytes of text that each id stands for, 0 for special tokens: for bits per byte.
    pub fn byte_lengths(&self) -> &[u32] {
        &self.byte_lengths
    }

    /// The `tokenizer.json` of this tokenizer, to be saved beside a checkpoint.
    pub fn to_json(&self) -> String {
        self.inner.to_string(false).expect("a tokenizer that was read can be written")
    }

    /// The `tokenizer_config.json` that goes with it: without one, transformers picks a class by the model's type, and that class
    /// adds special tokens of its own. `context` is the longest text the model takes.
    ///
    /// ```
    /// let config = mixtura_data::Tokenizer::byte().to_config_json(64);
    /// assert!(config.contains("\"bos_token\": \"<|bos|>\"") && config.contains("PreTrainedTokenizerFast"));
    /// ```
    pub fn to_config_json(&self, context: usize) -> String {
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context,
            "clean_up_tokenization_spaces": false,
            // As in training: text that spells a special token out is text.
            "split_special_tokens": true,
        });
        let bos = self.bos().and_then(|id| self.token(id)).or(self.bos_name.clone());
        let name = |id: Option<u32>| id.and_then(|id| self.token(id));
        for (key, token) in [("bos_token", bos), ("eos_token", name(self.eos())), ("pad_token", name(self.pad()))] {
            if let Some(token) = token {
                config[key] = json!(token);
            }
        }
        serde_json::to_string_pretty(&config).expect("maps with string keys always serialise") + "\n"
    }

    /// A hash of everything that decides which ids a text gets, hexadecimal: token shards remember it.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut document: Value = serde_json::from_str(&self.to_json()).expect("what was just written is JSON");
        if let Some(document) = document.as_object_mut() {
            // Neither how texts are decoded nor what is put around a prompt changes a corpus.
            ["version", "truncation", "padding", "post_processor", "decoder"].iter().for_each(|key| {
                document.remove(*key);
            });
        }
        let mut hasher = blake3::Hasher::new();
        hash_sorted(&document, &mut hasher);
        *hasher.finalize().as_bytes()
    }
}

/// JSON with its keys in one order: whether a map keeps that of the file depends on what else is built in.
fn hash_sorted(value: &Value, hasher: &mut blake3::Hasher) {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<&String, &Value> = map.iter().collect();
            hasher.update(b"{");
            for (key, value) in sorted {
                hasher.update(json!(key).to_string().as_bytes());
                hasher.update(b":");
                hash_sorted(value, hasher);
                hasher.update(b",");
            }
            hasher.update(b"}");
        }
        Value::Array(values) => {
            hasher.update(b"[");
            for value in values {
                hash_sorted(value, hasher);
                hasher.update(b",");
            }
            hasher.update(b"]");
        }
        other => {
            hasher.update(other.to_string().as_bytes());
        }
    }
}

fn encoding_error(error: tokenizers::Error) -> DataError {
    DataError::Tokenizer { name: "encode".into(), reason: error.to_string() }
}

fn byte_lengths(vocab: &BTreeMap<String, u32>, inner: &HfTokenizer, largest: u32) -> Arc<[u32]> {
    let added = inner.get_added_tokens_decoder();
    let byte_level = matches!(inner.get_decoder(), Some(tokenizers::DecoderWrapper::ByteLevel(_)));
    let mut lengths = vec![0u32; largest as usize + 1];
    for (token, id) in vocab {
        lengths[*id as usize] = match added.get(id) {
            Some(added) if added.special => 0,
            Some(added) => added.content.len() as u32,
            // One printable stand-in per byte.
            None if byte_level => token.chars().count() as u32,
            // SentencePiece: <0x0A> is one byte, a lower one eighth block one space.
            None if byte_token(token).is_some() => 1,
            None => token.replace('\u{2581}', " ").len() as u32,
        };
    }
    lengths.into()
}
