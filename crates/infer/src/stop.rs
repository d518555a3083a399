//! Stop strings over a stream of text: what may be given out now, and where the text ends.
//!
//! A stop string may lie across pieces, so text that may be the beginning of one is held back until it is decided. Of several, the one
//! that ends first wins; of those that end at the same place the one that starts first, and the text ends before it.

/// A stop string without characters, which would end every text before it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stop string {number} of {count} is empty and would end every text before it begins; leave it out")]
pub struct EmptyStopString {
    /// Which one, from 1.
    pub number: usize,
    /// How many there are.
    pub count: usize,
}

/// What a piece of text leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Text that can no longer belong to a stop string.
    pub text: String,
    /// Whether a stop string was found: the text ends with this piece.
    pub stopped: bool,
}

/// Looks for stop strings in a text that comes in pieces.
///
/// ```
/// use mixtura_infer::StopStrings;
/// let mut stop = StopStrings::new(["</answer>"])?;
/// assert_eq!(stop.push("42 <").text, "42 ");
/// assert_eq!(stop.push("b> ").text, "<b> ");
/// assert!(stop.push("</answer> and more").stopped);
/// # Ok::<(), mixtura_infer::EmptyStopString>(())
/// ```
#[derive(Debug, Clone)]
pub struct StopStrings {
    patterns: Vec<Pattern>,
    /// The end of the text so far that may be the beginning of a stop string.
    held: String,
    stopped: bool,
}

impl StopStrings {
    /// Looks for these; an empty list stops nowhere and holds nothing back.
    pub fn new<S: AsRef<str>>(list: impl IntoIterator<Item = S>) -> Result<Self, EmptyStopString> {
        let patterns: Vec<Pattern> = list.into_iter().map(|s| Pattern::new(s.as_ref())).collect();
        match patterns.iter().position(|p| p.bytes.is_empty()) {
            Some(empty) => Err(EmptyStopString { number: empty + 1, count: patterns.len() }),
            None => Ok(Self { patterns, held: String::new(), stopped: false }),
        }
    }

    /// Takes the next piece and gives out what can be given out. After a stop, nothing follows.
    pub fn push(&mut self, piece: &str) -> Piece {
        if self.stopped {
            return Piece { text: String::new(), stopped: true };
        }
        let mut text = std::mem::take(&mut self.held);
        let before = text.len();
        text.push_str(piece);
        for (at, &byte) in piece.as_bytes().iter().enumerate() {
            if let Some(length) = self.advance(byte) {
                text.truncate(before + at + 1 - length);
                self.stopped = true;
                return Piece { text, stopped: true };
            }
        }
        let begun = self.patterns.iter().map(|p| p.matched).max().unwrap_or(0);
        // A stop string begins with a whole character, so what equals its beginning does too.
        self.held = text.split_off(text.len() - begun);
        Piece { text, stopped: false }
    }

    /// The text has ended: gives out what was held back.
    pub fn finish(&mut self) -> String {
        self.patterns.iter_mut().for_each(|p| p.matched = 0);
        std::mem::take(&mut self.held)
    }

    /// One byte on; the length of the longest stop string that ends with it.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        let mut longest = None;
        for pattern in &mut self.patterns {
            if pattern.advance(byte) {
                longest = longest.max(Some(pattern.bytes.len()));
            }
        }
        longest
    }
}

/// A stop string and how much of it the end of the text equals (Knuth, Morris and Pratt 1977).
#[derive(Debug, Clone)]
struct Pattern {
    bytes: Vec<u8>,
    /// For each length, the longest shorter beginning that is also an end of that beginning.
    fallback: Vec<usize>,
    matched: usize,
}

impl Pattern {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes().to_vec();
        let mut fallback = vec![0; bytes.len() + 1];
        for length in 2..=bytes.len() {
            let mut border = fallback[length - 1];
            while border > 0 && bytes[border] != bytes[length - 1] {
                border = fallback[border];
            }
            fallback[length] = border + (bytes[border] == bytes[length - 1]) as usize;
        }
        Self { bytes, fallback, matched: 0 }
    }

    /// One byte on; whether the whole string ends with it.
    fn advance(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.fallback[self.matched];
        }
        self.matched += (self.bytes[self.matched] == byte) as usize;
        self.matched == self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The specification: the text before the match that ends first, the longest of those that end there.
    fn cut(text: &str, list: &[String]) -> Option<usize> {
        (1..=text.len()).find_map(|end| {
            let ends = list.iter().filter(|s| text.as_bytes()[..end].ends_with(s.as_bytes()));
            ends.map(|s| end - s.len()).min()
        })
    }

    /// Whether the end of `text` may be the beginning of a stop string, from byte `start` on.
    fn may_begin(text: &str, start: usize, list: &[String]) -> bool {
        list.iter().any(|s| s.len() > text.len() - start && s.as_bytes().starts_with(&text.as_bytes()[start..]))
    }

    fn text(longest: usize) -> impl Strategy<Value = String> {
        // Few letters, so that matches, near matches and overlaps are common; two of them share their first byte.
        prop::collection::vec(prop::sample::select(vec!['a', 'b', 'é', 'è', '🦊']), 1..=longest)
            .prop_map(|chars| chars.into_iter().collect())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_cutting_gives_the_text_before_the_first_match_and_holds_no_more_than_it_must(
            pieces in prop::collection::vec(prop_oneof![Just(String::new()), text(6)], 0..12),
            list in prop::collection::vec(text(5), 0..4),
        ) {
            let whole = pieces.concat();
            let mut stop = StopStrings::new(&list).unwrap();
            let (mut given, mut seen, mut stopped) = (String::new(), String::new(), false);
            for piece in &pieces {
                let out = stop.push(piece);
                given += &out.text;
                seen += piece;
                stopped = out.stopped;
                prop_assert_eq!(stopped, cut(&seen, &list).is_some());
                if !stopped {
                    // What is held back may begin a stop string; what is given out may not.
                    prop_assert!(given.len() == seen.len() || may_begin(&seen, given.len(), &list));
                    prop_assert!(!(0..given.len()).any(|start| may_begin(&seen, start, &list)));
                }
            }
            given += &stop.finish();
            match cut(&whole, &list) {
                Some(end) => prop_assert_eq!((given.as_str(), stopped), (&whole[..end], true)),
                None => prop_assert_eq!((given.as_str(), stopped), (whole.as_str(), false)),
            }
        }
    }

    #[test]
    fn of_overlapping_stop_strings_the_one_that_ends_first_wins_and_then_the_one_that_starts_first() {
        let push = |list: &[&str], piece| StopStrings::new(list).unwrap().push(piece);
        assert_eq!(push(&["abcd", "bc"], "xabcd"), Piece { text: "xa".into(), stopped: true });
        assert_eq!(push(&["bc", "abc"], "xabcd"), Piece { text: "x".into(), stopped: true });
        assert_eq!(push(&["aab"], "aaab"), Piece { text: "a".into(), stopped: true });
    }

    #[test]
    fn nothing_follows_a_stop() {
        let mut stop = StopStrings::new(["."]).unwrap();
        assert!(stop.push("a.b").stopped);
        assert_eq!(stop.push("c"), Piece { text: String::new(), stopped: true });
        assert_eq!(stop.finish(), "");
    }

    #[test]
    fn an_empty_stop_string_is_refused_by_its_number() {
        let message = StopStrings::new(["a", ""]).unwrap_err().to_string();
        assert_eq!(message, "stop string 2 of 2 is empty and would end every text before it begins; leave it out");
    }
}
