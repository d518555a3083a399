//! Reading a proposition or a whole question back: the inverse of `text` and `question`, for prompts typed by hand.
//!
//! Recursive descent over the sentence. Nesting is limited, so that hostile input cannot exhaust the stack.

use super::formula::{Atom, Connective, Formula, Modality, Proposition, QUESTION_END, QUESTION_START};
use super::world::{Subject, number_from_word};

/// Deeper nesting than this is refused.
pub const MAX_DEPTH: usize = 16;

/// Why a text is not a proposition of the world, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a proposition of this world: expected {expected} at byte {offset}, found {found:?}")]
pub struct PropositionError {
    /// Byte offset in the text given.
    pub offset: usize,
    /// What would have been right there.
    pub expected: String,
    /// The text found there, shortened.
    pub found: String,
}

impl Proposition {
    /// Reads a sentence (`Earth has exactly ... .`) or a question (`Is the following proposition true: "..."`).
    pub fn parse(text: &str) -> Result<Self, PropositionError> {
        let mut parser = Parser { text, at: 0 };
        let quoted = parser.take(QUESTION_START);
        let modality = Modality::ALL.into_iter().skip(1).find(|m| parser.take(m.phrase())).unwrap_or(Modality::Plain);
        let body = parser.formula(0)?;
        parser.expect(".")?;
        if quoted {
            parser.expect(QUESTION_END)?;
        }
        match parser.rest() {
            "" => Ok(Self { modality, body }),
            _ => Err(parser.error("the end of the text")),
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn formula(&mut self, depth: usize) -> Result<Formula, PropositionError> {
        if depth > MAX_DEPTH {
            return Err(self.error(&format!("at most {MAX_DEPTH} levels of parentheses")));
        }
        for connective in [Connective::Xor, Connective::Implies, Connective::Nor] {
            let [before, between, after] = connective.phrases();
            if self.take(before) {
                let left = self.operand(depth)?;
                self.expect(between)?;
                let right = self.operand(depth)?;
                self.expect(after)?;
                return Ok(Formula::node(connective, left, right));
            }
        }
        let left = self.operand(depth)?;
        for connective in [Connective::And, Connective::Or, Connective::Iff] {
            if self.take(connective.phrases()[1]) {
                return Ok(Formula::node(connective, left, self.operand(depth)?));
            }
        }
        match left {
            // `(A).`: parentheses around nothing but an operand are not of the language.
            Formula::Node(..) => Err(self.error("AND, OR or if and only if")),
            atom => Ok(atom),
        }
    }

    fn operand(&mut self, depth: usize) -> Result<Formula, PropositionError> {
        if !self.take("(") {
            return self.atom().map(Formula::Atom);
        }
        let start = self.at;
        let inner = self.formula(depth + 1)?;
        if inner.depth() == 0 {
            self.at = start;
            return Err(self.error("a compound inside the parentheses"));
        }
        self.expect(")")?;
        Ok(inner)
    }

    fn atom(&mut self) -> Result<Atom, PropositionError> {
        let named = |subject: &Subject| {
            self.rest().strip_prefix(subject.name()).is_some_and(|rest| rest.starts_with(HAS_EXACTLY))
        };
        let Some(subject) = Subject::all().find(named) else {
            return Err(self.error("\"<subject> has exactly\" with a subject of the world, or an opening parenthesis"));
        };
        self.at += subject.name().len() + HAS_EXACTLY.len();
        let word_length = self.rest().find(' ').unwrap_or(self.rest().len());
        let Some(count) = number_from_word(&self.rest()[..word_length]) else {
            return Err(self.error("a count from zero to twenty in words"));
        };
        self.at += word_length;
        let unit = format!(" {}", subject.unit(count));
        self.expect(&unit)?;
        Ok(Atom { subject, count })
    }

    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn take(&mut self, literal: &str) -> bool {
        let found = self.rest().starts_with(literal);
        if found {
            self.at += literal.len();
        }
        found
    }

    fn expect(&mut self, literal: &str) -> Result<(), PropositionError> {
        if self.take(literal) { Ok(()) } else { Err(self.error(&format!("{literal:?}"))) }
    }

    fn error(&self, expected: &str) -> PropositionError {
        let found = self.rest().chars().take(24).collect();
        PropositionError { offset: self.at, expected: expected.into(), found }
    }
}

const HAS_EXACTLY: &str = " has exactly ";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_outside_the_language_is_refused_where_it_leaves_it() {
        for (text, offset) in [
            ("", 0),
            ("Earth has exactly two natural satellites", 40),
            ("Earth has exactly one natural satellites.", 39),
            ("Pluto has exactly one natural satellite.", 0),
            ("Earth has exactly 2 natural satellites.", 18),
            ("(Earth has exactly two natural satellites).", 1),
            ("Is the following proposition true: \"Earth has exactly two natural satellites.", 77),
            ("Earth has exactly two natural satellites. ", 41),
        ] {
            let error = Proposition::parse(text).unwrap_err();
            assert_eq!(error.offset, offset, "{text}: {error}");
        }
    }

    #[test]
    fn hostile_nesting_is_an_error_and_not_a_stack_overflow() {
        let error = Proposition::parse(&"(".repeat(100_000)).unwrap_err();
        assert!(error.expected.contains("levels of parentheses"), "{error}");
    }
}
