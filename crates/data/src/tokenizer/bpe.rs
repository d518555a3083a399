//! Training byte-level BPE, with time that grows as the text does.

use serde_json::Value;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::{AddedToken, TokenizerImpl};

use super::Tokenizer;
use super::special::{BOS, EOS, PAD, puts_first};
use crate::error::DataError;

/// Characters of one kind that the trainer may see in a row. It edits words in place, so a word of n characters costs n^2: a
/// megabyte of digits takes time with the square of its length. Words of languages are far shorter, and texts of words train to the same vocabulary.
const LONGEST_RUN: usize = 256;

impl Tokenizer {
    /// Trains byte-level BPE with `vocab` entries (bytes and special tokens included) on texts, split into words as GPT-2 does.
    /// Runs of more than 256 letters, digits, spaces or other characters are seen in pieces.
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
        let pieces = texts.iter().flat_map(|text| short_runs(text));
        inner.train(&mut trainer, pieces).map_err(|e| error(e.to_string()))?;
        let bos = inner.token_to_id(BOS).expect("the trainer was given bos");
        let json = inner.to_string(false).map_err(|e| error(e.to_string()))?;
        let mut document: Value = serde_json::from_str(&json).map_err(|e| error(e.to_string()))?;
        document["post_processor"] = puts_first(BOS, bos);
        Self::from_json(document.to_string().as_bytes())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Letter,
    Number,
    Space,
    Other,
}

fn kind(c: char) -> Kind {
    match c {
        _ if c.is_alphabetic() => Kind::Letter,
        _ if c.is_numeric() => Kind::Number,
        _ if c.is_whitespace() => Kind::Space,
        _ => Kind::Other,
    }
}

/// The text, cut where more than [`LONGEST_RUN`] characters of one kind follow one another; nearly always in one piece.
fn short_runs(text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    let (mut start, mut run, mut last) = (0, 0, None);
    for (at, c) in text.char_indices() {
        let kind = kind(c);
        if last != Some(kind) {
            (run, last) = (0, Some(kind));
        } else if run == LONGEST_RUN {
            pieces.push(&text[start..at]);
            (start, run) = (at, 0);
        }
        run += 1;
    }
    pieces.push(&text[start..]);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_long_runs_are_cut() {
        let prose = "One word, another; 12345 and so on.\n\n  Indented. ".repeat(100);
        assert_eq!(short_runs(&prose), [prose.as_str()]);
        let long = format!("{prose}{}{prose}", "ß".repeat(1000));
        let pieces = short_runs(&long);
        assert_eq!(pieces.concat(), long);
        assert_eq!(pieces.len(), 4);
    }

    #[test]
    fn a_megabyte_without_a_space_is_trained_on_in_seconds() {
        let started = std::time::Instant::now();
        let text: String =
            (0..1u64 << 20).map(|i| char::from(b'a' + (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 61) as u8)).collect();
        let tokenizer = Tokenizer::train_bpe([&text], 300).unwrap();
        assert!(tokenizer.encode(&text[..1000]).unwrap().len() < 700);
        // The limit leaves room for a busy machine without optimisation.
        assert!(started.elapsed().as_secs() < 120, "{:?}", started.elapsed());
    }
}
