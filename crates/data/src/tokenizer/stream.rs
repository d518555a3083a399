//! Text out of ids that arrive one by one. The pieces together are the text of all ids, whatever the ids: nothing is given out
//! that a later id could change, and nothing is held back that it cannot.
//!
//! | decoder of `tokenizer.json` | what a later id can change | so |
//! | --- | --- | --- |
//! | `ByteLevel` | the last, unfinished character | bytes are collected, characters given out |
//! | by token, as `Metaspace`, `WordPiece`, Llama's sequence | with `ByteFallback`, the run of byte tokens at the end: one byte that is no UTF-8 makes every byte of its run a U+FFFD | a run waits for the token behind it |
//! | anything else (a `Replace` over the joined text) | everything | the text comes at the end |
//!
//! A decoder by token looks at the start of the text (it takes a space away there) and at most one token back, so the last tokens
//! with a visible text are kept as context: what they decode to is what is not given out again.

use serde_json::Value;
use tokenizers::Tokenizer as HfTokenizer;

use super::Tokenizer;

/// What has to be known of a decoder to stream it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decoding {
    /// Tokens are bytes, joined and read as UTF-8.
    Bytes,
    /// Token by token; `byte_runs` where `<0xE5>` is a byte.
    Tokens { byte_runs: bool },
    /// The text of the whole cannot be foretold from its parts.
    Whole,
}

impl Decoding {
    pub(super) fn of(tokenizer: &HfTokenizer) -> Self {
        // No decoder: tokens joined by spaces.
        let Some(decoder) = tokenizer.get_decoder() else { return Self::Tokens { byte_runs: false } };
        let Ok(decoder) = serde_json::to_value(decoder) else { return Self::Whole };
        let mut parts = Vec::new();
        flatten(&decoder, &mut parts);
        let kind = |part: &Value| part.get("type").and_then(Value::as_str).unwrap_or_default().to_string();
        let kinds: Vec<String> = parts.iter().map(|part| kind(part)).collect();
        if kinds.first().is_some_and(|first| first == "ByteLevel") && kinds[1..].iter().all(|kind| kind == "Fuse") {
            return Self::Bytes;
        }
        let (mut byte_runs, mut fused) = (false, false);
        for (index, (part, kind)) in parts.iter().zip(&kinds).enumerate() {
            let one_character = part
                .pointer("/pattern/String")
                .and_then(Value::as_str)
                .is_some_and(|pattern| pattern.chars().count() == 1);
            let fits = match kind.as_str() {
                // Byte tokens are told by their names, which nothing in front may have changed.
                "ByteFallback" => {
                    byte_runs = true;
                    !fused && kinds[..index].iter().all(|kind| kind == "Replace") && parts[..index].iter().all(single)
                }
                "Fuse" => {
                    fused = true;
                    true
                }
                "Strip" => !fused || part.get("stop").and_then(Value::as_u64) == Some(0),
                "Replace" => !fused || one_character,
                "Metaspace" | "WordPiece" => !fused,
                "BPEDecoder" => !fused && ends_words(tokenizer, part),
                "CTC" => !fused && !byte_runs,
                _ => false,
            };
            if !fits {
                return Self::Whole;
            }
        }
        Self::Tokens { byte_runs }
    }
}

/// Whether the suffix that becomes a space stands nowhere but at a token's end: inside, the space would come and go.
fn ends_words(tokenizer: &HfTokenizer, decoder: &Value) -> bool {
    let Some(suffix) = decoder.get("suffix").and_then(Value::as_str).filter(|suffix| !suffix.is_empty()) else {
        return false;
    };
    tokenizer.get_vocab(true).keys().all(|token| !token.strip_suffix(suffix).unwrap_or(token).contains(suffix))
}

fn single(part: &&Value) -> bool {
    let pattern = part.pointer("/pattern/String").and_then(Value::as_str);
    pattern.is_some_and(|pattern| pattern.chars().count() == 1)
}

/// The parts of a `Sequence`, in order, or the decoder itself.
fn flatten<'a>(decoder: &'a Value, parts: &mut Vec<&'a Value>) {
    match decoder.get("decoders").and_then(Value::as_array) {
        Some(decoders) => decoders.iter().for_each(|decoder| flatten(decoder, parts)),
        None => parts.push(decoder),
    }
}

/// Text out of ids that arrive one by one; see [`Tokenizer::stream`].
///
/// ```
/// let tokenizer = mixtura_data::Tokenizer::byte();
/// let mut stream = tokenizer.stream();
/// let printed: Vec<String> = tokenizer.encode("né").unwrap().into_iter().map(|id| stream.push(id)).collect();
/// assert_eq!(printed, ["n", "", "é"]);
/// ```
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Bytes that do not make a character yet.
    bytes: Vec<u8>,
    /// Context, and what has not been given out.
    ids: Vec<u32>,
    /// The text of the context.
    given: String,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, bytes: Vec::new(), ids: Vec::new(), given: String::new() }
    }

    /// The stream of what follows `prompt`, a text that has been shown: its characters are complete.
    pub(super) fn after(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Self {
        let mut stream = Self::new(tokenizer);
        match tokenizer.decoding {
            Decoding::Bytes => {}
            Decoding::Whole => {
                stream.ids = prompt.to_vec();
                stream.given = tokenizer.decode(prompt);
            }
            Decoding::Tokens { byte_runs } => {
                let visible = |id: &u32| tokenizer.visible(*id).is_some();
                stream.ids = prompt.iter().copied().filter(visible).collect();
                // What follows starts a run of bytes of its own.
                let is_byte = |id: &u32| tokenizer.visible(*id).is_some_and(|token| byte_token(&token).is_some());
                let had = !stream.ids.is_empty();
                while byte_runs && stream.ids.last().is_some_and(is_byte) {
                    stream.ids.pop();
                }
                if had && stream.ids.is_empty() {
                    stream.ids.extend(a_word(tokenizer));
                }
                stream.given = tokenizer.decode(&stream.ids);
                stream.forget();
            }
        }
        stream
    }

    /// The stream of what stands in the middle of some text.
    pub(super) fn inside(tokenizer: &'a Tokenizer) -> Self {
        let context: Vec<u32> = a_word(tokenizer).into_iter().collect();
        Self::after(tokenizer, &context)
    }

    /// The text that one more id completes; empty while a later id could still change it.
    pub fn push(&mut self, id: u32) -> String {
        // Special and unknown ids have no text and leave no trace in the decoder.
        let Some(token) = self.tokenizer.visible(id) else { return String::new() };
        match self.tokenizer.decoding {
            Decoding::Bytes => {
                self.tokenizer.push_bytes(id, &token, &mut self.bytes);
                take_characters(&mut self.bytes)
            }
            Decoding::Tokens { byte_runs } => {
                self.ids.push(id);
                if byte_runs && byte_token(&token).is_some() {
                    return String::new();
                }
                let new = self.new_text();
                self.given = self.tokenizer.decode(&self.ids);
                self.forget();
                new
            }
            Decoding::Whole => {
                self.ids.push(id);
                String::new()
            }
        }
    }

    /// What was held back, now that nothing follows.
    pub fn finish(self) -> String {
        match self.tokenizer.decoding {
            Decoding::Bytes => String::from_utf8_lossy(&self.bytes).into_owned(),
            _ => self.new_text(),
        }
    }

    /// What the ids say behind what was given out.
    fn new_text(&self) -> String {
        let text = self.tokenizer.decode(&self.ids);
        let same = text.char_indices().zip(self.given.chars()).take_while(|((_, a), b)| a == b).last();
        let start = same.map_or(0, |((at, c), _)| at + c.len_utf8());
        text[start..].to_string()
    }

    /// Keeps the fewest last ids that have a text: the space at the start of a text is taken from them, not from what follows.
    fn forget(&mut self) {
        for start in (0..self.ids.len()).rev() {
            let text = self.tokenizer.decode(&self.ids[start..]);
            if !text.is_empty() {
                self.ids.drain(..start);
                self.given = text;
                return;
            }
        }
    }
}

/// Any token with a text that is not a byte: it says that what follows is not the start of the text.
fn a_word(tokenizer: &Tokenizer) -> Option<u32> {
    let spoken = |id: &u32| {
        let token = tokenizer.visible(*id);
        token.is_some_and(|token| byte_token(&token).is_none()) && !tokenizer.decode(&[*id]).is_empty()
    };
    (0..tokenizer.vocab_size() as u32).find(spoken)
}

/// Takes the characters that are complete off the front, as `from_utf8_lossy` would read them.
fn take_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut done = 0;
    loop {
        match std::str::from_utf8(&bytes[done..]) {
            Ok(rest) => {
                text.push_str(rest);
                done = bytes.len();
                break;
            }
            Err(error) => {
                let valid = done + error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[done..valid]));
                done = valid;
                let Some(wrong) = error.error_len() else { break };
                text.push('\u{FFFD}');
                done += wrong;
            }
        }
    }
    bytes.drain(..done);
    text
}

/// The byte that a token of a vocabulary with byte fallback stands for.
pub(super) fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (token.len() == 6).then(|| u8::from_str_radix(digits, 16).ok())?
}
