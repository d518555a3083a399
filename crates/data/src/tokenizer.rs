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
    /// Ids are byte values: encoding needs no table.
    plain_bytes: bool,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    /// Bytes of text per id, 0 for special tokens.
    byte_lengths: Arc<[u32]>,
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
        // Longest phrase first, else one character, which the model splits into bytes.
        let alternatives: Vec<String> = pieces.iter().map(|piece| escape(piece)).collect();
        let pattern = format!("{}|[\\s\\S]", alternatives.join("|"));
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
        let plain_bytes = is_plain_bytes(&value, &vocab);
        Ok(Self { inner: Arc::new(inner), plain_bytes, bos, eos, pad, byte_lengths })
    }

    /// The ids of a text, without special tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        if self.plain_bytes {
            return Ok(text.bytes().map(u32::from).collect());
        }
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
        if self.plain_bytes {
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

fn is_plain_bytes(document: &Value, vocab: &BTreeMap<String, u32>) -> bool {
    let merges = document.pointer("/model/merges").and_then(Value::as_array).map(Vec::len);
    let byte_level = |at: &str| document.pointer(at).and_then(Value::as_str) == Some("ByteLevel");
    let prefix = document.pointer("/pre_tokenizer/add_prefix_space").and_then(Value::as_bool);
    merges == Some(0)
        && vocab.len() == 259
        && byte_level("/pre_tokenizer/type")
        && byte_level("/decoder/type")
        && prefix == Some(false)
        && document.get("normalizer").is_none_or(Value::is_null)
        && byte_chars().iter().enumerate().all(|(byte, c)| vocab.get(&c.to_string()) == Some(&(byte as u32)))
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
