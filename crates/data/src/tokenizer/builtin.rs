//! The two vocabularies that need no training, bytes and the phrases of the propositions world, and how to encode with them without
//! the library's general machinery, which spends some 100 us on a proposition and several on a word.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};
use tokenizers::Tokenizer as HfTokenizer;

use super::Tokenizer;
use super::special::{BOS, EOS, PAD, puts_first};
use crate::propositions;

impl Tokenizer {
    /// One id per byte (0 to 255), then bos, eos and pad.
    pub fn byte() -> Self {
        let vocab: serde_json::Map<String, Value> =
            byte_chars().iter().enumerate().map(|(byte, c)| (c.to_string(), json!(byte))).collect();
        let pre = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
        built(vocab, pre)
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
        built(vocab, pre)
    }
}

/// A byte-level vocabulary whose whole words need no merges, with the special tokens behind it and bos in front of every text.
fn built(vocab: serde_json::Map<String, Value>, pre_tokenizer: Value) -> Tokenizer {
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
        "pre_tokenizer": pre_tokenizer, "post_processor": puts_first(BOS, base as u32),
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
                  "vocab": vocab, "merges": []},
    });
    Tokenizer::from_json(document.to_string().as_bytes()).expect("a built-in vocabulary is well formed")
}

/// The printable stand-ins of the 256 bytes in byte-level vocabularies: printable Latin-1 as itself, the rest from U+0100 up.
pub(super) fn byte_chars() -> [char; 256] {
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

/// The byte that a printable stand-in means.
pub(super) fn byte_of(c: char) -> Option<u8> {
    let code = c as u32;
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// How to encode without the library. Both shortcuts give the ids that the library gives (tested).
#[derive(Clone)]
pub(super) enum Shortcut {
    /// The library does it.
    None,
    /// Ids are byte values.
    Bytes,
    /// The longest phrase at every position, else bytes; phrases by first byte, longest first.
    Phrases(Arc<[Vec<(String, u32)>]>),
}

impl Shortcut {
    /// The shortcut for a `tokenizer.json` that is one of the two built-in ones, and for no other.
    pub(super) fn of(document: &Value, inner: &HfTokenizer, vocab: &BTreeMap<String, u32>) -> Self {
        let text = |at: &str| document.pointer(at).and_then(Value::as_str);
        let null = |at: &str| document.pointer(at).is_none_or(Value::is_null);
        let no_merges = document.pointer("/model/merges").and_then(Value::as_array).is_some_and(Vec::is_empty);
        let chars = byte_chars();
        let bytes_first = chars.iter().enumerate().all(|(byte, c)| vocab.get(&c.to_string()) == Some(&(byte as u32)));
        // Another added token would be found in the text; special ones are not looked for.
        let all_special = inner.get_added_tokens_decoder().values().all(|token| token.special);
        let plain = no_merges && bytes_first && null("/normalizer") && all_special;
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

pub(super) fn longest_phrases(text: &str, by_first_byte: &[Vec<(String, u32)>]) -> Vec<u32> {
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

/// The first place at or behind `from` that no phrase of the text reaches over: the reading from the left cannot jump it.
pub(super) fn phrase_cut(text: &str, by_first_byte: &[Vec<(String, u32)>], from: usize) -> Option<usize> {
    let longest = by_first_byte.iter().flatten().map(|(phrase, _)| phrase.len()).max().unwrap_or(0);
    let reached_over = |at: usize| {
        (at.saturating_sub(longest)..at).filter(|start| text.is_char_boundary(*start)).any(|start| {
            let phrases = &by_first_byte[text.as_bytes()[start] as usize];
            phrases.iter().any(|(phrase, _)| start + phrase.len() > at && text[start..].starts_with(phrase.as_str()))
        })
    };
    (from.max(1)..text.len()).find(|at| text.is_char_boundary(*at) && !reached_over(*at))
}

/// Longest phrase first, else one character, which the model splits into bytes.
fn phrase_pattern(pieces: &[String]) -> String {
    let alternatives: Vec<String> = pieces.iter().map(|piece| escape(piece)).collect();
    format!("{}|[\\s\\S]", alternatives.join("|"))
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
        assert!((0..=255u8).all(|byte| byte_of(byte_chars()[byte as usize]) == Some(byte)) && byte_of('新').is_none());
        assert!(matches!(reread(json.clone()), Shortcut::Phrases(_)));
        assert!(matches!(reread(json.replacen("Mercury|", "Merkury|", 1)), Shortcut::None));
    }
}
