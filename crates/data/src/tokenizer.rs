//! Text to token ids and back: bytes, trained BPE, any Hugging Face `tokenizer.json`, and the fixed vocabulary of the propositions.
//!
//! All four are a [`tokenizers`] tokenizer underneath and all four save themselves as a valid `tokenizer.json`, so a checkpoint is read
//! by the same loader whatever it was trained with. Text never yields a special token: `<|eos|>` typed by a user is seven characters.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::{AddedToken, Tokenizer as HfTokenizer, TokenizerImpl};

use crate::corpus::foreign::{BOM, what_it_is};
use crate::error::DataError;
use crate::propositions;

/// Begins a row or a document in the vocabularies that this crate makes.
pub const BOS: &str = "<|bos|>";
/// Ends a document there.
pub const EOS: &str = "<|eos|>";
/// Fills a row there.
pub const PAD: &str = "<|pad|>";

/// Names under which published tokenizers keep the three, most telling first.
const BOS_NAMES: [&str; 5] = [BOS, "<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>"];
const EOS_NAMES: [&str; 7] = [EOS, "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|return|>"];
const PAD_NAMES: [&str; 5] = [PAD, "<pad>", "<|padding|>", "<|finetune_right_pad_id|>", "[PAD]"];

/// A larger id than this is a damaged file: the largest published vocabularies have a quarter of a million.
const LARGEST_ID: u32 = 1 << 24;

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
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    /// Bytes of text per id, 0 for special tokens.
    byte_lengths: Arc<[u32]>,
}

/// How to encode without the general machinery, which spends some 100 us on a proposition and several on a word: the two built-in
/// vocabularies are simple enough. Both shortcuts give the ids that the library gives (tested).
#[derive(Clone)]
enum Shortcut {
    /// The library does it.
    None,
    /// Ids are byte values.
    Bytes,
    /// The longest phrase at every position, else bytes; phrases by first byte, longest first.
    Phrases(Arc<[Vec<(String, u32)>]>),
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { bos, eos, pad, .. } = self;
        write!(f, "Tokenizer {{ vocab_size: {}, bos: {bos:?}, eos: {eos:?}, pad: {pad:?} }}", self.vocab_size())
    }
}

impl Tokenizer {
    /// One id per byte (0 to 255), then bos, eos and pad.
    pub fn byte() -> Self {
        let vocab: serde_json::Map<String, Value> =
            byte_chars().iter().enumerate().map(|(byte, c)| (c.to_string(), json!(byte))).collect();
        let pre = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
        Self::built(vocab, pre)
    }

    /// The fixed vocabulary of the propositions world: phrases, then bytes for everything else, then bos, eos and pad.
    ///
    /// ```
    /// use mixtura_data::{Tokenizer, propositions::Proposition};
    /// let tokenizer = Tokenizer::propositions();
    /// let item = Proposition::canonical();
    /// assert!(tokenizer.encode(&item.question()).unwrap().len() < 16);
    /// assert_eq!(tokenizer.decode(&tokenizer.encode("anything at all").unwrap()), "anything at all");
    /// ```
    pub fn propositions() -> Self {
        let chars = byte_chars();
        let mut vocab: serde_json::Map<String, Value> =
            chars.iter().enumerate().map(|(byte, c)| (c.to_string(), json!(byte))).collect();
        let pieces = propositions::pieces();
        for (i, piece) in pieces.iter().enumerate() {
            let key: String = piece.bytes().map(|byte| chars[byte as usize]).collect();
            vocab.insert(key, json!(256 + i));
        }
        let pattern = phrase_pattern(&pieces);
        let pre = json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        ]});
        Self::built(vocab, pre)
    }

    /// Trains byte-level BPE with `vocab` entries (bytes and special tokens included) on texts, split into words as GPT-2 does.
    ///
    /// ```
    /// let bpe = mixtura_data::Tokenizer::train_bpe(["low lower lowest ".repeat(40)], 270).unwrap();
    /// assert!(bpe.encode("lower lower").unwrap().len() <= 4);
    /// assert_eq!(bpe.decode(&bpe.encode("newest: 新").unwrap()), "newest: 新");
    /// ```
    pub fn train_bpe(texts: impl IntoIterator<Item = impl AsRef<str> + Send>, vocab: usize) -> Result<Self, DataError> {
        let error = |reason: String| DataError::Tokenizer { name: "bpe".into(), reason };
        if vocab < 259 {
            return Err(error(format!("a vocabulary of {vocab} cannot hold the 256 bytes and 3 special tokens (259)")));
        }
        let byte_level = || ByteLevel::new(false, false, true);
        let mut inner: TokenizerImpl<BPE, tokenizers::NormalizerWrapper, ByteLevel, ByteLevel, ByteLevel> =
            TokenizerImpl::new(BPE::default());
        inner.with_pre_tokenizer(Some(byte_level())).with_decoder(Some(byte_level()));
        let special = [BOS, EOS, PAD].map(|token| AddedToken::from(token, true)).to_vec();
        let mut trainer = BpeTrainer::builder()
            .show_progress(false)
            .vocab_size(vocab)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(special)
            .build();
        let texts: Vec<String> = texts.into_iter().map(|text| text.as_ref().to_string()).collect();
        inner.train(&mut trainer, texts.into_iter()).map_err(|e| error(e.to_string()))?;
        let json = inner.to_string(false).map_err(|e| error(e.to_string()))?;
        Self::from_json(json.as_bytes())
    }

    /// Reads a `tokenizer.json`.
    pub fn from_file(path: &Path) -> Result<Self, DataError> {
        let bytes = std::fs::read(path).map_err(|source| DataError::io(path, source))?;
        if bytes.is_empty() {
            return Err(DataError::Empty { path: path.into(), reason: "a tokenizer.json was expected".into() });
        }
        Self::from_json(&bytes).map_err(|error| match error {
            DataError::Tokenizer { reason, .. } => DataError::Tokenizer { name: path.display().to_string(), reason },
            other => other,
        })
    }

    /// Reads the bytes of a `tokenizer.json`; whatever they are, the result is a tokenizer or an error.
    pub fn from_json(bytes: &[u8]) -> Result<Self, DataError> {
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

        let vocab: BTreeMap<String, u32> = inner.get_vocab(true).into_iter().collect();
        let Some(largest) = vocab.values().copied().max() else {
            return Err(error("the vocabulary is empty".into()));
        };
        if largest >= LARGEST_ID {
            return Err(error(format!("token id {largest} is beyond the {LARGEST_ID} ids that are supported")));
        }
        let byte_lengths = byte_lengths(&vocab, &inner, largest);
        let special = |names: &[&str]| names.iter().find_map(|name| vocab.get(*name).copied());
        let (bos, eos, pad) = (special(&BOS_NAMES), special(&EOS_NAMES), special(&PAD_NAMES));
        let shortcut = Shortcut::of(&value, &vocab);
        Ok(Self { inner: Arc::new(inner), shortcut, bos, eos, pad, byte_lengths })
    }

    /// The ids of a text, without special tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        match &self.shortcut {
            Shortcut::None => self.encode_by_library(text),
            Shortcut::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Shortcut::Phrases(by_first_byte) => Ok(longest_phrases(text, by_first_byte)),
        }
    }

    fn encode_by_library(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let encoding = self.inner.encode_fast(text, false);
        let encoding = encoding.map_err(|e| DataError::Tokenizer { name: "encode".into(), reason: e.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids to start generating from: as [`Tokenizer::encode`], behind bos where the vocabulary has one, as in training rows.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let mut ids: Vec<u32> = self.bos.into_iter().collect();
        ids.extend(self.encode(text)?);
        Ok(ids)
    }

    /// The text of ids; special and unknown ids are skipped, bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        if let Shortcut::Bytes = self.shortcut {
            let bytes: Vec<u8> = ids.iter().filter_map(|id| u8::try_from(*id).ok()).collect();
            return String::from_utf8_lossy(&bytes).into_owned();
        }
        self.inner.decode(ids, true).unwrap_or_default()
    }

    /// A decoder for ids that arrive one by one.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream { tokenizer: self, ids: Vec::new(), printed: 0 }
    }

    /// One more than the largest id: the rows of an embedding.
    pub fn vocab_size(&self) -> usize {
        self.byte_lengths.len()
    }

    /// Begins a row or a document.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Ends a document.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Fills a row.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// Bytes of text that each id stands for, 0 for special tokens: for bits per byte.
    pub fn byte_lengths(&self) -> &[u32] {
        &self.byte_lengths
    }

    /// The `tokenizer.json` of this tokenizer, to be saved beside a checkpoint.
    pub fn to_json(&self) -> String {
        self.inner.to_string(false).expect("a tokenizer that was read can be written")
    }

    /// A byte-level vocabulary whose whole words need no merges, with the special tokens behind it.
    fn built(vocab: serde_json::Map<String, Value>, pre_tokenizer: Value) -> Self {
        let base = vocab.len();
        let added: Vec<Value> = [BOS, EOS, PAD]
            .iter()
            .enumerate()
            .map(|(i, token)| {
                json!({"id": base + i, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": true})
            })
            .collect();
        let document = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
            "pre_tokenizer": pre_tokenizer, "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
                      "vocab": vocab, "merges": []},
        });
        Self::from_json(document.to_string().as_bytes()).expect("a built-in vocabulary is well formed")
    }
}

/// Text out of ids that arrive one by one: a character is given out once all its bytes have come, at the latest by `finish`.
///
/// ```
/// let tokenizer = mixtura_data::Tokenizer::byte();
/// let mut stream = tokenizer.stream();
/// let printed: Vec<String> = tokenizer.encode("né").unwrap().into_iter().map(|id| stream.push(id)).collect();
/// assert_eq!(printed, ["n", "", "é"]);
/// ```
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    printed: usize,
}

impl TextStream<'_> {
    /// The text that one more id completes; empty while a character is unfinished.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids);
        if text.ends_with('\u{FFFD}') && self.ids.len() < 64 {
            return String::new();
        }
        let new = text.get(self.printed..).unwrap_or_default().to_string();
        // Decoders may look one token back (leading spaces), never further: the last id is kept as context.
        self.ids = vec![id];
        self.printed = self.tokenizer.decode(&self.ids).len();
        new
    }

    /// What was held back, should the ids end within a character.
    pub fn finish(self) -> String {
        self.tokenizer.decode(&self.ids).get(self.printed..).unwrap_or_default().to_string()
    }
}

/// The printable stand-ins of the 256 bytes in byte-level vocabularies: printable Latin-1 as itself, the rest from U+0100 up.
fn byte_chars() -> [char; 256] {
    let itself = |byte: u32| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 0x100;
    std::array::from_fn(|byte| {
        let byte = byte as u32;
        let code = if itself(byte) {
            byte
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).expect("all codes are below the surrogates")
    })
}

impl Shortcut {
    /// The shortcut for a `tokenizer.json` that is one of the two built-in ones, and for no other.
    fn of(document: &Value, vocab: &BTreeMap<String, u32>) -> Self {
        let text = |at: &str| document.pointer(at).and_then(Value::as_str);
        let null = |at: &str| document.pointer(at).is_none_or(Value::is_null);
        let no_merges = document.pointer("/model/merges").and_then(Value::as_array).is_some_and(Vec::is_empty);
        let chars = byte_chars();
        let bytes_first = chars.iter().enumerate().all(|(byte, c)| vocab.get(&c.to_string()) == Some(&(byte as u32)));
        let plain = no_merges && bytes_first && null("/normalizer") && null("/post_processor");
        let byte_level = |at: &str| {
            let flag = |key: &str| document.pointer(&format!("{at}/{key}")).and_then(Value::as_bool);
            text(&format!("{at}/type")) == Some("ByteLevel")
                && flag("add_prefix_space") == Some(false)
                && flag("use_regex") == Some(false)
        };
        if !plain || text("/decoder/type") != Some("ByteLevel") {
            return Self::None;
        }
        if byte_level("/pre_tokenizer") && vocab.len() == 259 {
            return Self::Bytes;
        }
        let pieces = propositions::pieces();
        let splits = text("/pre_tokenizer/pretokenizers/0/pattern/Regex") == Some(&phrase_pattern(&pieces))
            && text("/pre_tokenizer/pretokenizers/0/behavior") == Some("Isolated")
            && byte_level("/pre_tokenizer/pretokenizers/1")
            && null("/pre_tokenizer/pretokenizers/2");
        let whole_words = document.pointer("/model/ignore_merges").and_then(Value::as_bool) == Some(true);
        if !splits || !whole_words || vocab.len() != 259 + pieces.len() {
            return Self::None;
        }
        let mut by_first_byte = vec![Vec::new(); 256];
        for piece in pieces {
            let key: String = piece.bytes().map(|byte| chars[byte as usize]).collect();
            let Some(id) = vocab.get(&key) else { return Self::None };
            by_first_byte[piece.as_bytes()[0] as usize].push((piece, *id));
        }
        Self::Phrases(by_first_byte.into())
    }
}

fn longest_phrases(text: &str, by_first_byte: &[Vec<(String, u32)>]) -> Vec<u32> {
    let mut ids = Vec::with_capacity(text.len() / 4);
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let phrases = &by_first_byte[rest.as_bytes()[0] as usize];
        let (taken, after) = match phrases.iter().find(|(phrase, _)| rest.starts_with(phrase.as_str())) {
            Some((phrase, id)) => {
                ids.push(*id);
                rest.split_at(phrase.len())
            }
            None => {
                let (character, after) = rest.split_at(first.len_utf8());
                ids.extend(character.bytes().map(u32::from));
                (character, after)
            }
        };
        debug_assert!(!taken.is_empty(), "every step takes something");
        rest = after;
    }
    ids
}

/// Longest phrase first, else one character, which the model splits into bytes.
fn phrase_pattern(pieces: &[String]) -> String {
    let alternatives: Vec<String> = pieces.iter().map(|piece| escape(piece)).collect();
    format!("{}|[\\s\\S]", alternatives.join("|"))
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
            None if token.len() == 6 && token.starts_with("<0x") => 1,
            None => token.replace('\u{2581}', " ").len() as u32,
        };
    }
    lengths.into()
}

/// A literal as a regular expression, in the subset that every regex engine reads alike.
fn escape(literal: &str) -> String {
    let mut escaped = String::new();
    for c in literal.chars() {
        match c {
            '\n' => escaped.push_str("\\n"),
            '.' | '(' | ')' | '?' | '*' | '+' | '|' | '[' | ']' | '{' | '}' | '^' | '$' | '\\' => {
                escaped.push('\\');
                escaped.push(c);
            }
            _ => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn shortcuts_give_the_ids_of_the_library(text in "(\\PC|[ \n]|Earth|two| has exactly |, then |, but not both|\\.\"|the word ){0,40}") {
            static BOTH: std::sync::OnceLock<[Tokenizer; 2]> = std::sync::OnceLock::new();
            for tokenizer in BOTH.get_or_init(|| [Tokenizer::byte(), Tokenizer::propositions()]) {
                prop_assert!(!matches!(tokenizer.shortcut, Shortcut::None));
                prop_assert_eq!(tokenizer.encode(&text).unwrap(), tokenizer.encode_by_library(&text).unwrap());
            }
        }
    }

    #[test]
    fn items_are_encoded_as_the_library_does_and_a_changed_vocabulary_takes_no_shortcut() {
        let tokenizer = Tokenizer::propositions();
        let depths = [1, 2, 3];
        for index in 0..200 {
            let split = propositions::Split::Train;
            let item = propositions::generate(0, split, &depths, &depths, &propositions::Modality::ALL, index);
            let text = item.question() + &item.answer();
            assert_eq!(tokenizer.encode(&text).unwrap(), tokenizer.encode_by_library(&text).unwrap());
        }
        let json = tokenizer.to_json();
        let reread = |json: String| Tokenizer::from_json(json.as_bytes()).unwrap().shortcut;
        assert!(matches!(reread(json.clone()), Shortcut::Phrases(_)));
        assert!(matches!(reread(json.replacen("Mercury|", "Merkury|", 1)), Shortcut::None));
    }
}
