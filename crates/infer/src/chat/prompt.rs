//! The text of a conversation, and where in it a special token is spelled out by a message rather than written by the template.
//!
//! A message that says `<|im_end|>` must not end its turn. Before the template sees them, such spellings are put between two characters
//! of the private use area, as transformers does with `sanitize_control_tokens`; afterwards the marks are taken out and remembered as
//! ranges. Texts without such spellings reach the template untouched.

use std::ops::Range;

use minijinja::Value;
use minijinja::value::ValueKind;

const START: char = '\u{f0000}';
const END: char = '\u{f0001}';

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The text that the model continues.
    pub text: String,
    /// Bytes of it that spell a special token but are text; an empty range is a place that no token may span.
    pub spelled: Vec<Range<usize>>,
}

impl Prompt {
    /// Whether a special token found at these bytes was written by the template.
    pub fn is_special(&self, found: &Range<usize>) -> bool {
        !self.spelled.iter().any(|text| text.start < found.end && text.end > found.start)
    }

    /// Takes the marks out of what a template made of marked values.
    pub(super) fn of_marked(marked: &str) -> Self {
        let mut prompt = Self { text: String::with_capacity(marked.len()), spelled: Vec::new() };
        let mut open: Option<usize> = None;
        for c in marked.chars() {
            let here = prompt.text.len();
            match (c, open) {
                (START, _) => {
                    // A mark that the template tore from its other half still keeps its sides apart.
                    prompt.spelled.extend(open.map(|at| at..at));
                    open = Some(here);
                }
                (END, _) => prompt.spelled.push(open.take().unwrap_or(here)..here),
                (c, _) => prompt.text.push(c),
            }
        }
        prompt.spelled.extend(open.map(|at| at..at));
        prompt
    }
}

/// The value with every spelling of a token in its strings between marks; marks that were there before are gone.
pub(super) fn marked(value: &Value, tokens: &[&str]) -> Value {
    match value.kind() {
        ValueKind::String => marked_text(value.as_str().unwrap_or_default(), tokens).into(),
        ValueKind::Seq => value.try_iter().into_iter().flatten().map(|item| marked(&item, tokens)).collect(),
        ValueKind::Map => {
            let pairs = value.as_object().and_then(|object| object.try_iter_pairs());
            pairs.into_iter().flatten().map(|(key, item)| (key, marked(&item, tokens))).collect()
        }
        _ => value.clone(),
    }
}

fn marked_text(text: &str, tokens: &[&str]) -> String {
    let text = text.replace([START, END], "");
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(c) = rest.chars().next() {
        let found = tokens
            .iter()
            .filter(|token| !token.is_empty() && rest.starts_with(**token))
            .max_by_key(|token| token.len());
        let length = found.map_or(c.len_utf8(), |token| token.len());
        match found {
            Some(token) => out.extend([START.to_string().as_str(), token, END.to_string().as_str()]),
            None => out.push(c),
        }
        rest = &rest[length..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_come_out_as_the_ranges_that_went_in() {
        let tokens = ["<|end|>", "<|end|>x", "é"];
        let marked = marked_text("a<|end|>é<|end|>x\u{f0000}b<|en", &tokens);
        let prompt = Prompt::of_marked(&marked);
        assert_eq!(prompt, Prompt { text: "a<|end|>é<|end|>xb<|en".into(), spelled: vec![1..8, 8..10, 10..18] });
        assert!(!prompt.is_special(&(1..8)) && !prompt.is_special(&(0..2)) && prompt.is_special(&(18..22)));
    }

    #[test]
    fn a_torn_mark_keeps_its_sides_apart() {
        let prompt = Prompt::of_marked("<|e\u{f0001}nd|>\u{f0000}<|end|>");
        assert_eq!(prompt.text, "<|end|><|end|>");
        assert!(!prompt.is_special(&(0..7)));
        assert!(prompt.is_special(&(7..14)));
    }
}
