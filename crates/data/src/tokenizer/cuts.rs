//! Where a long text may be cut so that its parts, each encoded alone, give the ids of the whole.
//!
//! A cut lies in front of a single space between two plain letters or digits, or behind a line's end in front of one. Whether
//! that is safe follows from the tokenizer's own stages, of which every kind is listed here; a stage that is not listed makes the
//! text one part. The argument, stage by stage:
//!
//! - *Added tokens* are found by matching: no token may reach over the cut or look at its neighbours.
//! - *Normalizers* that go character by character, or by canonical composition, have nothing to compose across a space or a line's end.
//! - *Pre-tokenizers* without look-behind scan from the left: once a boundary lies at the cut, what is on its right does not know of
//!   the left, and no listed pattern looks further than one character past a word, which is the space or line's end itself.
//! - *Models* see one pre-token at a time. Where nothing splits (Llama), BPE merges inside words only if no token of the vocabulary
//!   has the space mark behind another character; then the text falls apart at every space in front of which no space stands.

use serde_json::Value;
use tokenizers::models::ModelWrapper;
use tokenizers::{Model, Tokenizer as HfTokenizer};

/// Which cuts are safe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cuts {
    /// In front of a space.
    space: bool,
    /// The space itself is left out: the normalizer puts one in front of every text.
    without_the_space: bool,
    /// Behind a line's end.
    line_end: bool,
}

/// Patterns of published byte-level vocabularies, for which the argument above was gone through.
const WORD_PATTERNS: [&str; 6] = [
    // GPT-2, in both spellings.
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    // Llama 3 (cl100k) and Qwen 2.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // o200k, as gpt-oss and Llama 4 have it.
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    // DeepSeek V3, behind its splitting of digits and of CJK.
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

/// Patterns that take runs of one class out and never see a space or a line's end.
const CLASS_PATTERNS: [&str; 3] = [r"\p{N}{1,3}", r"\p{N}", "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+"];

impl Cuts {
    /// The text is one part.
    pub const NONE: Self = Self { space: false, without_the_space: false, line_end: false };

    pub fn of(tokenizer: &HfTokenizer) -> Self {
        let found = Stages::of(tokenizer).and_then(|stages| stages.cuts(tokenizer));
        let Some(mut cuts) = found else { return Self::NONE };
        for token in tokenizer.get_added_tokens_decoder().values().filter(|token| !token.special) {
            // What a normalizer makes of such a token is not looked into; behind one, a text begins anew for a normalizer that
            // puts something in front.
            let normalized = token.normalized && tokenizer.get_normalizer().is_some() && !token.content.is_ascii();
            let looks_around = token.single_word || token.lstrip || token.rstrip;
            if looks_around || normalized || cuts.without_the_space {
                return Self::NONE;
            }
            let characters: Vec<char> = token.content.chars().collect();
            for pair in characters.windows(2) {
                cuts.space &= (pair[0] == ' ') == (pair[1] == ' ');
                cuts.line_end &= pair[0] != '\n' || pair[1].is_whitespace();
            }
        }
        cuts
    }

    /// The first cut at or behind `from`: where the part ends and where the next begins.
    pub fn find(self, text: &str, from: usize) -> Option<(usize, usize)> {
        let bytes = text.as_bytes();
        (from.max(1)..text.len()).find_map(|at| match bytes[at] {
            b' ' if self.space && before(text, at).is_some_and(plain) && behind(text, at + 1).is_some_and(plain) => {
                Some((at, at + usize::from(self.without_the_space)))
            }
            b'\n'
                if self.line_end
                    && before(text, at).is_some_and(|c| !c.is_whitespace())
                    && behind(text, at + 1).is_some_and(plain) =>
            {
                Some((at + 1, at + 1))
            }
            _ => None,
        })
    }
}

fn before(text: &str, at: usize) -> Option<char> {
    text.get(..at)?.chars().next_back()
}

fn behind(text: &str, at: usize) -> Option<char> {
    text.get(at..)?.chars().next()
}

/// Letters and digits that no normalizer joins with a neighbour: Latin, Cyrillic, kana, Han, Hangul syllables.
fn plain(c: char) -> bool {
    matches!(c, '0'..='9' | 'a'..='z' | 'A'..='Z' | '\u{c0}'..='\u{24f}' | '\u{400}'..='\u{481}' | '\u{3041}'..='\u{3096}'
        | '\u{4e00}'..='\u{9fff}' | '\u{ac00}'..='\u{d7a3}')
}

/// What normalizer and pre-tokenizer do around a cut.
#[derive(Default)]
struct Stages {
    /// The normalizer puts this in front of every text.
    prepended: Option<String>,
    /// What a space becomes.
    mark: Option<String>,
    /// A pre-tokenizer splits at every cut.
    splits: bool,
    /// A part that begins with a letter would get a space in front of it.
    prefixes: bool,
}

impl Stages {
    fn of(tokenizer: &HfTokenizer) -> Option<Self> {
        let mut stages = Self::default();
        let normalizer = tokenizer.get_normalizer().map(serde_json::to_value).transpose().ok()?;
        for part in flat(normalizer.as_ref(), "normalizers") {
            stages.normalizer(part)?;
        }
        let pre_tokenizer = tokenizer.get_pre_tokenizer().map(serde_json::to_value).transpose().ok()?;
        for part in flat(pre_tokenizer.as_ref(), "pretokenizers") {
            stages.pre_tokenizer(part)?;
        }
        Some(stages)
    }

    fn normalizer(&mut self, part: &Value) -> Option<()> {
        match text(part, "/type")? {
            "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" | "StripAccents" | "Nmt" | "BertNormalizer"
            | "Precompiled" => {}
            "Prepend" => self.prepended = Some(text(part, "/prepend")?.to_string()),
            "Replace" => {
                let mut pattern = text(part, "/pattern/String")?.chars();
                let (first, more) = (pattern.next()?, pattern.next());
                if more.is_some() || plain(first) || first == '\n' {
                    return None;
                }
                if first == ' ' {
                    self.mark = Some(text(part, "/content")?.to_string());
                }
            }
            _ => return None,
        }
        Some(())
    }

    fn pre_tokenizer(&mut self, part: &Value) -> Option<()> {
        let flag = |key: &str| part.get(key).and_then(Value::as_bool);
        // The word patterns know of spaces, not of what a normalizer made of them.
        let spaces = self.mark.is_none();
        match text(part, "/type")? {
            "ByteLevel" => {
                self.prefixes |= flag("add_prefix_space") != Some(false) && !self.splits;
                self.splits |= flag("use_regex") != Some(false) && spaces;
            }
            "Split" => match text(part, "/pattern/Regex") {
                Some(pattern) if WORD_PATTERNS.contains(&pattern) && spaces => {
                    let inverted = flag("invert") == Some(true);
                    let whole_words = match text(part, "/behavior")? {
                        "Isolated" => true,
                        "Removed" => inverted,
                        _ => false,
                    };
                    if !whole_words {
                        return None;
                    }
                    self.splits = true;
                }
                Some(pattern) if CLASS_PATTERNS.contains(&pattern) && text(part, "/behavior")? == "Isolated" => {}
                // Gemma splits at spaces that its normalizer has replaced.
                None if text(part, "/pattern/String") == Some(" ") && !spaces => {}
                _ => return None,
            },
            "Digits" | "Punctuation" => {}
            "Whitespace" | "WhitespaceSplit" | "BertPreTokenizer" if spaces => self.splits = true,
            "Metaspace" if spaces => {
                self.mark = Some(text(part, "/replacement")?.to_string());
                self.prefixes = true;
                self.splits |= flag("split") != Some(false);
            }
            _ => return None,
        }
        Some(())
    }

    fn cuts(&self, tokenizer: &HfTokenizer) -> Option<Cuts> {
        if let Some(prepended) = &self.prepended {
            // Llama: a mark in front of the text, spaces to marks, and BPE over the whole.
            let pre_tokenized = tokenizer.get_pre_tokenizer().is_some();
            if pre_tokenized || self.mark.as_ref() != Some(prepended) {
                return None;
            }
        }
        if !self.splits && !words_fall_apart(tokenizer, self.mark.as_deref()?) {
            return None;
        }
        Some(Cuts {
            space: true,
            without_the_space: self.prepended.is_some(),
            line_end: self.splits && !self.prefixes && self.mark.is_none(),
        })
    }
}

/// Whether BPE over a whole text never merges across the front of a space mark.
fn words_fall_apart(tokenizer: &HfTokenizer, mark: &str) -> bool {
    let ModelWrapper::BPE(bpe) = tokenizer.get_model() else { return false };
    let plain_bpe = bpe.dropout.is_none_or(|dropout| dropout == 0.0)
        && !bpe.ignore_merges
        && bpe.continuing_subword_prefix.as_ref().is_none_or(String::is_empty)
        && bpe.end_of_word_suffix.as_ref().is_none_or(String::is_empty);
    let mut characters = mark.chars();
    let (Some(mark), None) = (characters.next(), characters.next()) else { return false };
    let inside = |token: &String| {
        let behind = token.trim_start_matches(mark);
        behind.contains(mark)
    };
    plain_bpe && bpe.token_to_id(&mark.to_string()).is_some() && !bpe.get_vocab().keys().any(inside)
}

/// The parts of a `Sequence`, in order, or the one stage.
fn flat<'a>(stage: Option<&'a Value>, key: &str) -> Vec<&'a Value> {
    let Some(stage) = stage else { return Vec::new() };
    match stage.get(key).and_then(Value::as_array) {
        Some(stages) => stages.iter().flat_map(|stage| flat(Some(stage), key)).collect(),
        None => vec![stage],
    }
}

fn text<'a>(value: &'a Value, at: &str) -> Option<&'a str> {
    value.pointer(at).and_then(Value::as_str)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::Tokenizer;

    #[test]
    fn a_long_text_in_parts_side_by_side_has_the_ids_of_the_whole() {
        let text = "The quick brown fox jumps over the lazy dog. Don't stop!\nEvery expert takes some of 12 tokens.\n";
        let text = text.repeat(300);
        for name in ["llama", "metaspace", "yi", "llama3", "bert", "unigram", "suffix"] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/hf/tokenizers").join(name);
            let tokenizer = Tokenizer::from_file(&folder.join("tokenizer.json")).unwrap();
            let whole = tokenizer.encode_by_library(&text).unwrap();
            for part in [1, 100, 5000] {
                assert!(tokenizer.cuts.find(&text, part).is_some(), "{name}");
                assert!(tokenizer.encode_in_parts(&text, part).unwrap() == whole, "{name} in parts of {part}");
            }
        }
    }
}
