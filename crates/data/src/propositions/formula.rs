//! Propositions as data: atoms, connectives, nested formulas, modalities, their truth, and their text.
//!
//! `text` writes them and `parse` (in `parse.rs`) reads the same language back. Operands that are themselves compound stand in
//! parentheses, so the text has one reading.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::world::{Subject, number_word};

/// A claim about one fact: `<subject> has exactly <count> <unit>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Atom {
    /// Whom the claim is about.
    pub subject: Subject,
    /// The count claimed, right or wrong.
    pub count: u32,
}

impl Atom {
    /// Whether the claim is the fact.
    pub fn truth(&self) -> bool {
        self.count == self.subject.count()
    }

    /// `Earth has exactly two natural satellites`.
    pub fn text(&self) -> String {
        format!("{} has exactly {} {}", self.subject.name(), number_word(self.count), self.subject.unit(self.count))
    }
}

/// A connective over two operands, in the order of the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Connective {
    /// Both.
    And,
    /// At least one.
    Or,
    /// Exactly one.
    Xor,
    /// Not (first true and second false).
    Implies,
    /// Both or none.
    Iff,
    /// None.
    Nor,
}

impl Connective {
    /// All six, in the order in which the generator draws them.
    pub const ALL: [Self; 6] = [Self::And, Self::Or, Self::Xor, Self::Implies, Self::Iff, Self::Nor];

    /// The truth table.
    pub fn apply(self, left: bool, right: bool) -> bool {
        match self {
            Self::And => left && right,
            Self::Or => left || right,
            Self::Xor => left != right,
            Self::Implies => !left || right,
            Self::Iff => left == right,
            Self::Nor => !(left || right),
        }
    }

    /// Its name in capitals, as it stands in a worked line.
    pub fn name(self) -> &'static str {
        match self {
            Self::And => "AND",
            Self::Or => "OR",
            Self::Xor => "XOR",
            Self::Implies => "IMPLIES",
            Self::Iff => "IFF",
            Self::Nor => "NOR",
        }
    }

    /// What stands before, between and after the two operands in a sentence.
    pub fn phrases(self) -> [&'static str; 3] {
        match self {
            Self::And => ["", " AND ", ""],
            Self::Or => ["", " OR ", ""],
            Self::Xor => ["either ", " or ", ", but not both"],
            Self::Implies => ["if ", ", then ", ""],
            Self::Iff => ["", " if and only if ", ""],
            Self::Nor => ["neither ", " nor ", ""],
        }
    }

    /// The pairs of operand truths that give `target`, in the order FF, FT, TF, TT.
    pub fn operands_giving(self, target: bool) -> Vec<(bool, bool)> {
        let all = [(false, false), (false, true), (true, false), (true, true)];
        all.into_iter().filter(|(left, right)| self.apply(*left, *right) == target).collect()
    }
}

/// A body: an atom, or a connective over two bodies.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Formula {
    /// A claim.
    Atom(Atom),
    /// A compound.
    Node(Connective, Box<Formula>, Box<Formula>),
}

impl Formula {
    /// A compound of two formulas.
    pub fn node(connective: Connective, left: Self, right: Self) -> Self {
        Self::Node(connective, Box::new(left), Box::new(right))
    }

    /// Whether it is true of the world.
    pub fn truth(&self) -> bool {
        match self {
            Self::Atom(atom) => atom.truth(),
            Self::Node(connective, left, right) => connective.apply(left.truth(), right.truth()),
        }
    }

    /// Connectives on the longest way down: 0 for an atom.
    pub fn depth(&self) -> usize {
        match self {
            Self::Atom(_) => 0,
            Self::Node(_, left, right) => 1 + left.depth().max(right.depth()),
        }
    }

    /// The atoms from left to right.
    pub fn atoms(&self) -> Vec<Atom> {
        match self {
            Self::Atom(atom) => vec![*atom],
            Self::Node(_, left, right) => {
                let mut atoms = left.atoms();
                atoms.extend(right.atoms());
                atoms
            }
        }
    }

    /// The sentence without its full stop; compound operands stand in parentheses.
    pub fn text(&self) -> String {
        match self {
            Self::Atom(atom) => atom.text(),
            Self::Node(connective, left, right) => {
                let [before, between, after] = connective.phrases();
                format!("{before}{}{between}{}{after}", left.operand_text(), right.operand_text())
            }
        }
    }

    /// The connectives alone: `OR(AND(_,_),_)`.
    pub fn skeleton(&self) -> String {
        match self {
            Self::Atom(_) => "_".into(),
            Self::Node(connective, left, right) => {
                format!("{}({},{})", connective.name(), left.skeleton(), right.skeleton())
            }
        }
    }

    fn operand_text(&self) -> String {
        match self {
            Self::Atom(atom) => atom.text(),
            Self::Node(..) => format!("({})", self.text()),
        }
    }
}

/// How the body is put forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Modality {
    /// The body itself.
    Plain,
    /// Its negation.
    Negated,
    /// Somebody's belief: says nothing about the world.
    Belief,
    /// Its possibility: what is the case is possible; what is not may be or not.
    Possibly,
}

impl Modality {
    /// All four, in the order in which the generator draws them.
    pub const ALL: [Self; 4] = [Self::Plain, Self::Negated, Self::Belief, Self::Possibly];

    /// Its name in small letters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Negated => "negated",
            Self::Belief => "belief",
            Self::Possibly => "possibly",
        }
    }

    /// What stands before the body.
    pub fn phrase(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Negated => "It is not the case that: ",
            Self::Belief => "Someone believes that: ",
            Self::Possibly => "It is possible that: ",
        }
    }

    /// The verdict on a body of known truth put forward in this way.
    pub fn verdict(self, body_truth: bool) -> Verdict {
        match (self, body_truth) {
            (Self::Plain, true) | (Self::Negated, false) | (Self::Possibly, true) => Verdict::True,
            (Self::Plain, false) | (Self::Negated, true) => Verdict::False,
            (Self::Belief, _) | (Self::Possibly, false) => Verdict::Undetermined,
        }
    }
}

/// What can be said of a proposition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It holds.
    True,
    /// It does not.
    False,
    /// The facts do not settle it.
    Undetermined,
}

impl Verdict {
    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            Self::True => "true",
            Self::False => "false",
            Self::Undetermined => "undetermined",
        }
    }
}

impl From<bool> for Verdict {
    fn from(truth: bool) -> Self {
        if truth { Self::True } else { Self::False }
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A proposition: a body and how it is put forward.
///
/// ```
/// use mixtura_data::propositions::{Proposition, Verdict};
/// let canonical = Proposition::canonical();
/// assert_eq!(canonical.text(), "Earth has exactly two natural satellites OR Mars has exactly one natural satellite.");
/// assert_eq!(canonical.verdict(), Verdict::False);
/// assert_eq!(Proposition::parse(&canonical.question()).unwrap(), canonical);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Proposition {
    /// How the body is put forward.
    pub modality: Modality,
    /// What is said.
    pub body: Formula,
}

impl Proposition {
    /// The item that the quickstart shows: false, because both its atoms are.
    pub fn canonical() -> Self {
        let atom = |name: &str, count| {
            let subject = Subject::named(name).expect("the world has Earth and Mars");
            Formula::Atom(Atom { subject, count })
        };
        Self { modality: Modality::Plain, body: Formula::node(Connective::Or, atom("Earth", 2), atom("Mars", 1)) }
    }

    /// The sentence, with its full stop.
    pub fn text(&self) -> String {
        format!("{}{}.", self.modality.phrase(), self.body.text())
    }

    /// `Is the following proposition true: "..."`: what a model is asked.
    pub fn question(&self) -> String {
        format!("{QUESTION_START}{}{QUESTION_END}", self.text())
    }

    /// The verdict, from the facts.
    pub fn verdict(&self) -> Verdict {
        self.modality.verdict(self.body.truth())
    }

    /// Connectives on the longest way down.
    pub fn depth(&self) -> usize {
        self.body.depth()
    }

    /// The logical form, without content: `plain:OR(_,_)`.
    pub fn form_id(&self) -> String {
        format!("{}:{}", self.modality.name(), self.body.skeleton())
    }

    /// The content, without form: subjects and claimed counts, sorted, `Earth=2|Mars=1`.
    pub fn content_id(&self) -> String {
        let mut atoms = self.body.atoms();
        atoms.sort_by_key(|atom| (atom.subject, atom.count));
        let mut id = String::new();
        for (i, atom) in atoms.iter().enumerate() {
            let separator = if i == 0 { "" } else { "|" };
            write!(id, "{separator}{}={}", atom.subject.name(), atom.count).expect("writing to a String cannot fail");
        }
        id
    }
}

/// What stands before a proposition in a question.
pub const QUESTION_START: &str = "Is the following proposition true: \"";
/// What stands after it.
pub const QUESTION_END: &str = "\"";
