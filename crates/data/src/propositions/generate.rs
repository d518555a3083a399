//! Drawing propositions, and the splits that keep training and evaluation apart.
//!
//! An item is a pure function of (world, seed, split, index). As in the specification the target truth is drawn before the operands,
//! so that truth does not depend on the connective; nested bodies repeat the rule at every connective. All subjects of an item differ.
//!
//! The splits are decided by predicates on the item alone ([`Membership`]), so an item can be in one of them only:
//!
//! | split | form cell held out | subject pair held out | reserved by hash | depth |
//! | --- | --- | --- | --- | --- |
//! | train | no | no | no | training depths |
//! | iid | no | no | yes | training depths |
//! | form | yes | no | any | training depths |
//! | content | no | yes | any | training depths |
//! | depth | no | no | any | the other depths |

use serde::{Deserialize, Serialize};

use super::formula::{Atom, Connective, Formula, Modality, Proposition};
use super::world::Subject;
use crate::rng::{SplitMix64, mix};

/// Deepest nesting that is generated.
pub const DEEPEST: usize = 3;

/// The cells of (outermost connective, modality) that no training item has: every connective and every modality occurs in training,
/// these combinations do not.
pub const HELD_OUT_FORMS: [(Connective, Modality); 4] = [
    (Connective::Iff, Modality::Plain),
    (Connective::Nor, Modality::Negated),
    (Connective::Implies, Modality::Belief),
    (Connective::Xor, Modality::Possibly),
];

/// One pair of subjects in this many is held out.
const HELD_OUT_PAIRS: u64 = 8;
/// One item in this many is reserved for the IID split.
const RESERVED_ITEMS: u64 = 8;

/// Where an item may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// Training.
    Train,
    /// Fresh items of the training distribution.
    Iid,
    /// Combinations of outermost connective and modality that training never shows.
    Form,
    /// Pairs of subjects that training never shows together.
    Content,
    /// Nesting depths that training never shows.
    Depth,
}

impl Split {
    /// The four splits that evaluate.
    pub const EVALUATION: [Self; 4] = [Self::Iid, Self::Form, Self::Content, Self::Depth];

    /// Its name, as in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Iid => "iid",
            Self::Form => "form",
            Self::Content => "content",
            Self::Depth => "depth",
        }
    }
}

/// What decides an item's split: three predicates on the item alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Membership {
    /// Its (outermost connective, modality) is one of [`HELD_OUT_FORMS`].
    pub held_out_form: bool,
    /// Two of its subjects are a held-out pair.
    pub held_out_content: bool,
    /// Its hash reserves it for the IID split.
    pub reserved: bool,
}

impl Membership {
    /// The predicates of an item.
    pub fn of(item: &Proposition) -> Self {
        let held_out_form = match &item.body {
            Formula::Node(connective, ..) => HELD_OUT_FORMS.contains(&(*connective, item.modality)),
            Formula::Atom(_) => false,
        };
        let subjects: Vec<Subject> = item.body.atoms().iter().map(|atom| atom.subject).collect();
        let held_out_content =
            subjects.iter().enumerate().any(|(i, a)| subjects[i + 1..].iter().any(|b| pair_is_held_out(*a, *b)));
        let hash = blake3::hash(item.text().as_bytes());
        Self { held_out_form, held_out_content, reserved: u64::from(hash.as_bytes()[0]) % RESERVED_ITEMS == 0 }
    }

    /// Whether an item of these predicates and this depth belongs to a split, given the depths that training uses.
    pub fn belongs(self, split: Split, depth: usize, training_depths: &[usize]) -> bool {
        let trained_depth = training_depths.contains(&depth);
        match split {
            Split::Train => trained_depth && !self.held_out_form && !self.held_out_content && !self.reserved,
            Split::Iid => trained_depth && !self.held_out_form && !self.held_out_content && self.reserved,
            Split::Form => trained_depth && self.held_out_form && !self.held_out_content,
            Split::Content => trained_depth && !self.held_out_form && self.held_out_content,
            Split::Depth => !trained_depth && !self.held_out_form && !self.held_out_content,
        }
    }
}

/// Whether two subjects never meet in a training item. Earth and Mars, the pair of the canonical item, are held out on purpose: the
/// answer that the quickstart shows was never trained on.
pub fn pair_is_held_out(a: Subject, b: Subject) -> bool {
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    let canonical = (low.name(), high.name()) == ("Earth", "Mars");
    canonical || mix((low.index() as u64) << 16 | high.index() as u64 | 1 << 40).is_multiple_of(HELD_OUT_PAIRS)
}

/// The item number `index` of a split. Panics when a depth is not in 1..=3 or no depth or modality fits the split.
///
/// ```
/// use mixtura_data::propositions::{Modality, Split, generate};
/// let item = generate(7, Split::Content, &[1, 2], &[1, 2], &Modality::ALL, 0);
/// assert_eq!(item, generate(7, Split::Content, &[1, 2], &[1, 2], &Modality::ALL, 0));
/// assert!((1..=2).contains(&item.depth()));
/// ```
pub fn generate(
    seed: u64,
    split: Split,
    depths: &[usize],
    training_depths: &[usize],
    modalities: &[Modality],
    index: u64,
) -> Proposition {
    assert!(!depths.is_empty() && !modalities.is_empty(), "generate: no depth or no modality to draw from");
    for depth in depths {
        assert!((1..=DEEPEST).contains(depth), "generate: depth {depth} is not in 1..={DEEPEST}");
    }
    let mut rng = SplitMix64::keyed(seed, 0x7072_6f70_6f73 + split as u64, index);
    // Of the draws about one in two fits its split (one in eight for iid), so this bound is never met unless no item can fit.
    for _ in 0..20_000 {
        let depth = *rng.pick(depths);
        let item = draw(&mut rng, depth, modalities, split);
        if Membership::of(&item).belongs(split, depth, training_depths) {
            return item;
        }
    }
    panic!("generate: no item of split {} has depths {depths:?} and modalities {modalities:?}", split.name());
}

fn draw(rng: &mut SplitMix64, depth: usize, modalities: &[Modality], split: Split) -> Proposition {
    let target = rng.below(2) == 1;
    let mut body = draw_shape(rng, depth, target);
    let subjects = draw_subjects(rng, count_slots(&body), split == Split::Content);
    let mut next = subjects.into_iter();
    Proposition { modality: *rng.pick(modalities), body: fill(rng, &mut body, &mut next) }
}

/// A body whose atoms still lack subjects: only their truth is settled.
enum Shape {
    Atom(bool),
    Node(Connective, Box<Shape>, Box<Shape>),
}

/// One operand reaches the full depth, the other any depth below or up to it.
fn draw_shape(rng: &mut SplitMix64, depth: usize, target: bool) -> Shape {
    if depth == 0 {
        return Shape::Atom(target);
    }
    let connective = *rng.pick(&Connective::ALL);
    let (left_truth, right_truth) = *rng.pick(&connective.operands_giving(target));
    let other = rng.below(depth);
    let (left, right) = if rng.below(2) == 0 { (depth - 1, other) } else { (other, depth - 1) };
    let (left, right) = (draw_shape(rng, left, left_truth), draw_shape(rng, right, right_truth));
    Shape::Node(connective, Box::new(left), Box::new(right))
}

fn count_slots(shape: &Shape) -> usize {
    match shape {
        Shape::Atom(_) => 1,
        Shape::Node(_, left, right) => count_slots(left) + count_slots(right),
    }
}

/// Different subjects, no held-out pair among them; for the content split the draw is free and one held-out pair is put in first, so
/// that deep items need no luck either way.
fn draw_subjects(rng: &mut SplitMix64, count: usize, content: bool) -> Vec<Subject> {
    let total = Subject::total();
    'again: loop {
        let mut chosen: Vec<Subject> = Vec::with_capacity(count);
        let mut tries = 0;
        while chosen.len() < count {
            tries += 1;
            if tries > 200 {
                continue 'again;
            }
            let candidate = Subject::from_index(rng.below(total));
            let refused = |other: &Subject| *other == candidate || (!content && pair_is_held_out(*other, candidate));
            if chosen.iter().any(refused) || (content && chosen.len() == 1 && !pair_is_held_out(chosen[0], candidate)) {
                continue;
            }
            chosen.push(candidate);
        }
        // Fisher-Yates: the held-out pair of the content split may stand anywhere.
        for i in (1..count).rev() {
            chosen.swap(i, rng.below(i + 1));
        }
        return chosen;
    }
}

fn fill(rng: &mut SplitMix64, shape: &mut Shape, subjects: &mut impl Iterator<Item = Subject>) -> Formula {
    match shape {
        Shape::Atom(truth) => {
            let subject = subjects.next().expect("one subject was drawn per atom");
            let fact = subject.count();
            let count = if *truth {
                fact
            } else {
                let wrong: Vec<u32> = subject.kind().counts.iter().copied().filter(|c| *c != fact).collect();
                *rng.pick(&wrong)
            };
            Formula::Atom(Atom { subject, count })
        }
        Shape::Node(connective, left, right) => {
            let left = fill(rng, left, subjects);
            Formula::node(*connective, left, fill(rng, right, subjects))
        }
    }
}
