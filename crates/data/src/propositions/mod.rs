//! Propositions whose truth is known: a generated world of facts, nested formulas over it, questions and worked answers.
//!
//! A model is asked `Is the following proposition true: "..."`, works out every part, and gives a verdict (`true`, `false` or
//! `undetermined`). Everything is generated: the items of a split are pure functions of a seed and an index, and the splits are apart
//! by construction (see [`Split`]).

mod world;
mod formula;
mod parse;
mod answer;
mod generate;
mod specified;
mod vocabulary;
mod source;

pub use answer::{Grade, grade, parse_verdict};
pub use formula::{Atom, Connective, Formula, Modality, Proposition, QUESTION_END, QUESTION_START, Verdict};
pub use generate::{DEEPEST, HELD_OUT_FORMS, Membership, Split, generate, pair_is_held_out};
pub use parse::{MAX_DEPTH, PropositionError};
pub use source::{
    Counted, EvaluationItem, Packing, PropositionsConfig, PropositionsSource, evaluation_items, tokenize_item,
};
pub use specified::{SpecifiedItem, SpecifiedItems};
pub use vocabulary::pieces;
pub use world::{Kind, Subject, WORLD, number_from_word, number_word};
