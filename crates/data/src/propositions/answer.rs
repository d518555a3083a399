//! The worked answer to a question, the verdict read from an answer, and its grade.
//!
//! An answer evaluates innermost first, one line per part, each line decided by what stands near it:
//!
//! ```text
//! Earth has one natural satellite, claimed two: false
//! Mars has two natural satellites, claimed one: false
//! false OR false is false
//! Verdict: false.
//! ```
//!
//! An atom's line recalls the fact, repeats the claim and compares them; a compound's line follows directly on its right operand; a
//! modality other than plain adds `not false is true`, `belief in false is undetermined` or `possibly false is undetermined`.

use super::formula::{Formula, Modality, Proposition, Verdict};
use super::world::number_word;

impl Proposition {
    /// The worked answer, one line per part, without a final newline. Each line starts with a newline, because it follows the question.
    pub fn answer(&self) -> String {
        let mut lines = String::new();
        work(&self.body, &mut lines);
        let body = self.body.truth();
        match self.modality {
            Modality::Plain => {}
            Modality::Negated => lines += &format!("\nnot {body} is {}", !body),
            Modality::Belief => lines += &format!("\nbelief in {body} is {}", self.verdict()),
            Modality::Possibly => lines += &format!("\npossibly {body} is {}", self.verdict()),
        }
        lines + &format!("{VERDICT_START}{}.", self.verdict())
    }
}

const VERDICT_START: &str = "\nVerdict: ";

fn work(formula: &Formula, lines: &mut String) {
    match formula {
        Formula::Atom(atom) => {
            let (subject, fact) = (atom.subject, atom.subject.count());
            *lines += &format!(
                "\n{} has {} {}, claimed {}: {}",
                subject.name(),
                number_word(fact),
                subject.unit(fact),
                number_word(atom.count),
                atom.truth()
            );
        }
        Formula::Node(connective, left, right) => {
            work(left, lines);
            work(right, lines);
            *lines += &format!("\n{} {} {} is {}", left.truth(), connective.name(), right.truth(), formula.truth());
        }
    }
}

/// The verdict that an answer ends with, if it states one: the word after the last `Verdict:`.
///
/// ```
/// use mixtura_data::propositions::{Verdict, parse_verdict};
/// assert_eq!(parse_verdict("... \nVerdict: false."), Some(Verdict::False));
/// assert_eq!(parse_verdict("I would rather not say."), None);
/// ```
pub fn parse_verdict(text: &str) -> Option<Verdict> {
    let (_, after) = text.rsplit_once("Verdict:")?;
    let word: String = after.trim_start().chars().take_while(|c| c.is_alphabetic()).collect();
    [Verdict::True, Verdict::False, Verdict::Undetermined].into_iter().find(|verdict| verdict.name() == word)
}

/// How an answer compares with the right one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grade {
    /// The verdict stated, if any.
    pub verdict: Option<Verdict>,
    /// Whether it is the right one.
    pub verdict_right: bool,
    /// Whether the whole worked answer is, word for word.
    pub reasoning_right: bool,
    /// Worked lines that agree with the right answer before the first that does not.
    pub lines_right: usize,
    /// Lines of the right answer.
    pub lines: usize,
}

/// Grades the text that a model wrote after the question (the question itself may precede it).
///
/// ```
/// use mixtura_data::propositions::{Proposition, grade};
/// let item = Proposition::canonical();
/// assert!(grade(&item, &item.answer()).reasoning_right);
/// assert!(!grade(&item, "\nVerdict: true.").verdict_right);
/// ```
pub fn grade(item: &Proposition, text: &str) -> Grade {
    let text = text.strip_prefix(item.question().as_str()).unwrap_or(text);
    let verdict = parse_verdict(text);
    let right = item.answer();
    let lines = right.trim_start().lines().count();
    let agree = |(a, b): &(&str, &str)| a.trim_end() == b.trim_end();
    let lines_right = right.trim_start().lines().zip(text.trim_start().lines()).take_while(agree).count();
    Grade {
        verdict,
        verdict_right: verdict == Some(item.verdict()),
        reasoning_right: text.trim() == right.trim(),
        lines_right,
        lines,
    }
}
