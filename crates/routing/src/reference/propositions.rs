//! A generator of propositions with known truth over a closed world of facts, for probing whether experts follow logical
//! form or content.
//!
//! An item joins two atoms about different subjects. Its truth is drawn first, so it is independent of the connective; then
//! the atoms' truths uniformly among those that give it, the subjects, a wrong count per false atom, and a modality. SplitMix64,
//! draws by remainder in exactly this order. Labels are three-valued: belief is undetermined, and so is a possibility that is false.

/// SplitMix64 (Steele et al. 2014).
#[derive(Debug, Clone)]
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next_u64() % n.max(1) as u64) as usize
    }
}

/// How two atoms are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Connective {
    And,
    Or,
    Xor,
    Implies,
    Iff,
    Nor,
}

/// What is said about the joined proposition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Modality {
    Plain,
    Negated,
    Belief,
    Possibly,
}

/// `subject has exactly count natural satellites`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Atom {
    /// Index of the subject among the facts.
    pub subject: usize,
    /// The count claimed.
    pub count: u32,
    /// Whether it is the fact.
    pub truth: bool,
}

/// One proposition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// In words.
    pub text: String,
    /// How the atoms are joined.
    pub connective: Connective,
    /// What is said about it.
    pub modality: Modality,
    /// The two atoms.
    pub atoms: [Atom; 2],
    /// Truth of the joined proposition without its modality.
    pub body_truth: bool,
    /// "true", "false" or "undetermined".
    pub label: &'static str,
}

impl Connective {
    /// All, in drawing order.
    pub const ALL: [Self; 6] = [Self::And, Self::Or, Self::Xor, Self::Implies, Self::Iff, Self::Nor];

    /// Upper-case name.
    pub fn name(self) -> &'static str {
        ["AND", "OR", "XOR", "IMPLIES", "IFF", "NOR"][self as usize]
    }

    /// Truth of the joined proposition.
    pub fn truth(self, a: bool, b: bool) -> bool {
        match self {
            Self::And => a && b,
            Self::Or => a || b,
            Self::Xor => a != b,
            Self::Implies => !a || b,
            Self::Iff => a == b,
            Self::Nor => !a && !b,
        }
    }

    fn join(self, a: &str, b: &str) -> String {
        match self {
            Self::And => format!("{a} AND {b}"),
            Self::Or => format!("{a} OR {b}"),
            Self::Xor => format!("either {a} or {b}, but not both"),
            Self::Implies => format!("if {a}, then {b}"),
            Self::Iff => format!("{a} if and only if {b}"),
            Self::Nor => format!("neither {a} nor {b}"),
        }
    }
}

impl Modality {
    /// All, in drawing order.
    pub const ALL: [Self; 4] = [Self::Plain, Self::Negated, Self::Belief, Self::Possibly];

    /// Lower-case name.
    pub fn name(self) -> &'static str {
        ["plain", "negated", "belief", "possibly"][self as usize]
    }

    /// The item's label.
    pub fn label(self, body: bool) -> &'static str {
        match (self, body) {
            (Self::Plain, true) | (Self::Negated, false) | (Self::Possibly, true) => "true",
            (Self::Plain, false) | (Self::Negated, true) => "false",
            (Self::Belief, _) | (Self::Possibly, false) => "undetermined",
        }
    }

    fn prefix(self) -> &'static str {
        ["", "It is not the case that: ", "Someone believes that: ", "It is possible that: "][self as usize]
    }
}

/// Claims range over 0 to 3, or to the largest fact if that is more.
pub fn largest_count(facts: &[(String, u32)]) -> u32 {
    facts.iter().map(|f| f.1).max().unwrap_or(0).max(3)
}

/// Draws the next item. Needs at least two facts.
pub fn draw(rng: &mut SplitMix64, facts: &[(String, u32)]) -> Item {
    let connective = Connective::ALL[rng.below(6)];
    let body_truth = rng.below(2) == 1;
    let pairs: Vec<(bool, bool)> = [(false, false), (false, true), (true, false), (true, true)]
        .into_iter()
        .filter(|&(a, b)| connective.truth(a, b) == body_truth)
        .collect();
    let (a, b) = pairs[rng.below(pairs.len())];
    let first = rng.below(facts.len());
    let second = rng.below(facts.len() - 1);
    let second = second + usize::from(second >= first);
    let mut atom = |subject: usize, truth: bool| {
        let fact = facts[subject].1;
        let count = if truth {
            fact
        } else {
            let wrong: Vec<u32> = (0..=largest_count(facts)).filter(|c| *c != fact).collect();
            wrong[rng.below(wrong.len())]
        };
        Atom { subject, count, truth }
    };
    let atoms = [atom(first, a), atom(second, b)];
    let modality = Modality::ALL[rng.below(4)];
    let body = connective.join(&atom_text(&atoms[0], facts), &atom_text(&atoms[1], facts));
    let text = format!("{}{body}.", modality.prefix());
    Item { text, connective, modality, atoms, body_truth, label: modality.label(body_truth) }
}

/// The atom in words.
pub fn atom_text(atom: &Atom, facts: &[(String, u32)]) -> String {
    const WORDS: [&str; 11] = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"];
    let word = WORDS.get(atom.count as usize).map_or_else(|| atom.count.to_string(), |w| (*w).to_string());
    let plural = if atom.count == 1 { "" } else { "s" };
    format!("{} has exactly {word} natural satellite{plural}", facts[atom.subject].0)
}

/// Connectives times ordered pairs of subjects times pairs of claims.
pub fn distinct_bodies(facts: &[(String, u32)]) -> usize {
    let claims = largest_count(facts) as usize + 1;
    Connective::ALL.len() * facts.len() * facts.len().saturating_sub(1) * claims * claims
}
