//! The fixed vocabulary of the propositions world: whole phrases, with single bytes to fall back on.
//!
//! Words that carry content (subjects, counts, truth values) are one token each and never carry a space: the phrase before them
//! ends in it. So `Earth` is the same token after a quotation mark, after a parenthesis and at the start of a line, and the model has
//! one name to learn per thing.

use super::formula::{Connective, Modality, QUESTION_START, Verdict};
use super::world::{Subject, WORLD, number_word};

/// The phrases, longest first (as they are matched), each once.
pub fn pieces() -> Vec<String> {
    let mut pieces: Vec<String> = Vec::new();
    pieces.push(QUESTION_START.into());
    pieces.extend(Modality::ALL.iter().skip(1).map(|m| m.phrase().into()));
    for connective in Connective::ALL {
        pieces.extend(connective.phrases().iter().filter(|p| !p.is_empty()).map(|p| p.to_string()));
        pieces.push(format!(" {} ", connective.name()));
    }
    pieces.extend(Subject::all().map(|subject| subject.name().to_string()));
    let largest = WORLD.iter().flat_map(|kind| kind.counts).max().copied().unwrap_or(0);
    pieces.extend((0..=largest).map(|count| number_word(count).to_string()));
    pieces.extend(WORLD.iter().flat_map(|kind| kind.unit.iter().map(|unit| format!(" {unit}"))));
    pieces.extend([Verdict::True, Verdict::False, Verdict::Undetermined].map(|v| v.name().to_string()));
    let lines = [
        " has exactly ",
        " has ",
        ", claimed ",
        ": ",
        " is ",
        "not ",
        "belief in ",
        "possibly ",
        "Verdict: ",
        ".\"",
        "\n",
    ];
    pieces.extend(lines.map(String::from));
    pieces.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
    pieces.dedup();
    pieces.retain(|piece| piece.len() > 1);
    pieces
}
