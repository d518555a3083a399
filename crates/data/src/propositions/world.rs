//! The closed world of facts: subjects, what is counted on them, and how many there are.
//!
//! One template for every fact, `<subject> has exactly <count> <unit>`, over six kinds of things. The planets and their counts 0..=3
//! are those of the specification (H2); divisors and letters are checked by code in the tests below; the others are settled enough
//! that nobody will revise them. Forty-two subjects give 861 pairs, so that pairs can be held out and still be many.

/// A kind of thing: what is counted on it and which counts a claim may name.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// A short name, for tables.
    pub name: &'static str,
    /// What is counted, singular then plural.
    pub unit: [&'static str; 2],
    /// The counts a claim may name, ascending; wrong claims are drawn from these.
    pub counts: &'static [u32],
    /// Subjects and their true counts.
    pub subjects: &'static [(&'static str, u32)],
}

/// The world, in the order in which subjects are numbered.
pub static WORLD: &[Kind] = &[
    Kind {
        name: "planets",
        unit: ["natural satellite", "natural satellites"],
        counts: &[0, 1, 2, 3],
        subjects: &[("Mercury", 0), ("Venus", 0), ("Earth", 1), ("Mars", 2)],
    },
    Kind {
        name: "polygons",
        unit: ["side", "sides"],
        counts: &[3, 4, 5, 6, 7, 8],
        subjects: &[
            ("a triangle", 3),
            ("a square", 4),
            ("a pentagon", 5),
            ("a hexagon", 6),
            ("a heptagon", 7),
            ("an octagon", 8),
        ],
    },
    Kind {
        name: "animals",
        unit: ["leg", "legs"],
        counts: &[0, 2, 4, 6, 8],
        subjects: &[
            ("a snake", 0),
            ("an ostrich", 2),
            ("a horse", 4),
            ("a frog", 4),
            ("an ant", 6),
            ("a bee", 6),
            ("a spider", 8),
            ("a scorpion", 8),
        ],
    },
    Kind {
        name: "instruments",
        unit: ["string", "strings"],
        counts: &[2, 3, 4, 5, 6, 8],
        subjects: &[
            ("an erhu", 2),
            ("a balalaika", 3),
            ("a violin", 4),
            ("a cello", 4),
            ("a ukulele", 4),
            ("a pipa", 4),
            ("a guitar", 6),
            ("a mandolin", 8),
        ],
    },
    Kind {
        name: "numbers",
        unit: ["divisor", "divisors"],
        counts: &[2, 3, 4, 5, 6],
        subjects: &[
            ("the number two", 2),
            ("the number four", 3),
            ("the number five", 2),
            ("the number six", 4),
            ("the number eight", 4),
            ("the number nine", 3),
            ("the number twelve", 6),
            ("the number sixteen", 5),
        ],
    },
    Kind {
        name: "words",
        unit: ["letter", "letters"],
        counts: &[3, 4, 5, 6, 7],
        subjects: &[
            ("the word sky", 3),
            ("the word sea", 3),
            ("the word moon", 4),
            ("the word tree", 4),
            ("the word river", 5),
            ("the word stone", 5),
            ("the word planet", 6),
            ("the word mixture", 7),
        ],
    },
];

const NUMBER_WORDS: [&str; 21] = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
];

/// The word for a count from 0 to 20. Panics beyond: the world has no such counts.
pub fn number_word(count: u32) -> &'static str {
    NUMBER_WORDS[count as usize]
}

/// The count that a word names, if it is one of zero to twenty.
pub fn number_from_word(word: &str) -> Option<u32> {
    NUMBER_WORDS.iter().position(|w| *w == word).map(|i| i as u32)
}

/// A thing of the world, by its number: facts are read through it.
///
/// ```
/// use mixtura_data::propositions::Subject;
/// let mars = Subject::named("Mars").unwrap();
/// assert_eq!((mars.count(), mars.unit(mars.count())), (2, "natural satellites"));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subject(u16);

impl Subject {
    /// Every subject, in order.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..Self::total() as u16).map(Self)
    }

    /// How many subjects the world has.
    pub fn total() -> usize {
        WORLD.iter().map(|kind| kind.subjects.len()).sum()
    }

    /// The subject with this name, as it stands in a sentence.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().find(|subject| subject.name() == name)
    }

    /// Its number, 0 to [`Subject::total`].
    pub fn index(self) -> usize {
        self.0 as usize
    }

    /// The subject with a number. Panics when there is none.
    pub fn from_index(index: usize) -> Self {
        assert!(index < Self::total(), "Subject::from_index: {index} of {}", Self::total());
        Self(index as u16)
    }

    /// Its kind.
    pub fn kind(self) -> &'static Kind {
        self.entry().0
    }

    /// Its name, with its article where it has one.
    pub fn name(self) -> &'static str {
        self.entry().1.0
    }

    /// The fact: how many there are.
    pub fn count(self) -> u32 {
        self.entry().1.1
    }

    /// What is counted, in the form that goes with a count.
    pub fn unit(self, count: u32) -> &'static str {
        self.kind().unit[usize::from(count != 1)]
    }

    fn entry(self) -> (&'static Kind, &'static (&'static str, u32)) {
        let mut index = self.index();
        for kind in WORLD {
            match kind.subjects.get(index) {
                Some(entry) => return (kind, entry),
                None => index -= kind.subjects.len(),
            }
        }
        unreachable!("a Subject is only made for an entry of the world")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisors_and_letters_are_what_code_counts() {
        for subject in Subject::all() {
            if let Some(word) = subject.name().strip_prefix("the number ") {
                let n = number_from_word(word).unwrap();
                let divisors = (1..=n).filter(|d| n.is_multiple_of(*d)).count() as u32;
                assert_eq!(subject.count(), divisors, "{}", subject.name());
            }
            if let Some(word) = subject.name().strip_prefix("the word ") {
                assert_eq!(subject.count(), word.chars().count() as u32, "{}", subject.name());
            }
        }
    }

    #[test]
    fn every_fact_is_among_the_counts_that_may_be_claimed_and_names_are_unique() {
        let mut names: Vec<&str> = Subject::all().map(|s| s.name()).collect();
        for subject in Subject::all() {
            assert!(subject.kind().counts.contains(&subject.count()), "{}", subject.name());
            assert!(subject.kind().counts.len() > 1);
            assert_eq!(Subject::named(subject.name()), Some(subject));
            assert_eq!(Subject::from_index(subject.index()), subject);
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Subject::total());
    }
}
