//! Whether a model's experts tell the form of a proposition from its content (specification H2).
//!
//! A grid of propositions in which every form meets every content once makes the two labels independent. One token of each item
//! is looked at, the same word in all of them, so that its experts can differ by what was read before and by nothing else:
//!
//! - `question`: the last token of the question, the whole proposition read;
//! - `verdict`: the last token before the verdict, the worked answer read too.
//!
//! The first choice of that token against each label gives the mutual information; the sets of all its experts give the overlap
//! between items of one content in different forms.

use std::collections::BTreeMap;

use mixtura_data::propositions::{Atom, Connective, Formula, Modality, Proposition, Subject, Verdict, tokenize_item};
use mixtura_data::{DataError, Tokenizer};
use mixtura_nn::{Decoder, ForwardContext, ForwardError};
use mixtura_ops::Numerics;
use mixtura_routing::stats::specialisation::{Overlap, Specialisation, overlap, pairs_of_one_content, specialisation};
use serde::Serialize;

/// Contents of the grid: as many as there are forms of depth 1, so that neither label has more values than the other.
const CONTENTS: usize = Connective::ALL.len() * Modality::ALL.len();
/// Items of the grid.
pub const ITEMS: usize = CONTENTS * CONTENTS;
/// Random permutations behind each p-value.
const SHUFFLES: usize = 499;
/// Distance of the two subjects of a content in the world's list.
const APART: usize = 7;
/// Items of one forward pass.
const BATCH: usize = 32;
/// A p-value below this counts.
const SIGNIFICANT: f64 = 0.05;

/// What the experts of one layer tell at one place.
#[derive(Debug, Clone, Serialize)]
pub struct ProbeRow {
    /// Layer of the model.
    pub layer: usize,
    /// `question` or `verdict`.
    pub place: &'static str,
    /// First choice against connective and modality.
    pub form: Specialisation,
    /// First choice against subjects and claimed counts.
    pub content: Specialisation,
    /// Expert sets of items of one content in different forms.
    pub same_content: Overlap,
    /// Whether the experts separate form from content here: more information about form than about content and than chance,
    /// and less overlap across forms than chance.
    pub separates_form: bool,
}

/// Why there is no probe.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The tokenizer has no ids for the propositions.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The longest item of the grid does not fit.
    #[error("the longest proposition of the probe has {found} tokens, the model's context {context}")]
    TooLong {
        /// Tokens of the item.
        found: usize,
        /// The model's context.
        context: usize,
    },
    /// The forward pass failed.
    #[error(transparent)]
    Forward(#[from] ForwardError),
}

/// Probes every layer that chooses experts.
pub fn probe(model: &Decoder, tokenizer: &Tokenizer, numerics: Numerics) -> Result<Vec<ProbeRow>, ProbeError> {
    let mut items = Vec::new();
    for item in grid() {
        let (ids, question) = tokenize_item(tokenizer, &item)?;
        let verdict = question + tokens_before_verdict(tokenizer, &item)?;
        items.push(Item { ids, places: [question - 1, verdict - 1] });
    }
    let longest = items.iter().map(|item| item.ids.len()).max().unwrap_or(0);
    let context = model.config().context;
    if longest > context {
        return Err(ProbeError::TooLong { found: longest, context });
    }
    let chosen = choices(model, &items, longest, numerics)?;

    let (form_n, content_n): (Vec<u32>, Vec<u32>) = labels();
    let pairs = pairs_of_one_content(&content_n, &form_n);
    let row = |((layer, place), sets): (&(usize, usize), &Vec<Vec<u32>>)| {
        // A token may choose nobody (ReLU routing): that is an answer too.
        let first_n: Vec<u32> = sets.iter().map(|set| set.first().copied().unwrap_or(u32::MAX)).collect();
        let form = specialisation(&first_n, &form_n, SHUFFLES, 1);
        let content = specialisation(&first_n, &content_n, SHUFFLES, 2);
        let same_content = overlap(sets, &pairs, SHUFFLES, 3);
        let separates_form = form.above_chance > content.above_chance
            && form.p_value < SIGNIFICANT
            && same_content.p_lower < SIGNIFICANT;
        ProbeRow { layer: *layer, place: PLACES[*place], form, content, same_content, separates_form }
    };
    Ok(chosen.iter().map(row).collect())
}

const PLACES: [&str; 2] = ["question", "verdict"];

struct Item {
    ids: Vec<u32>,
    places: [usize; 2],
}

/// Experts of each item at each (layer, place), first choice first.
fn choices(
    model: &Decoder,
    items: &[Item],
    seq: usize,
    numerics: Numerics,
) -> Result<BTreeMap<(usize, usize), Vec<Vec<u32>>>, ForwardError> {
    let context = ForwardContext::evaluation(numerics);
    let mut chosen: BTreeMap<(usize, usize), Vec<Vec<u32>>> = BTreeMap::new();
    for items in items.chunks(BATCH) {
        let mut ids = vec![0; items.len() * seq];
        for (row, item) in ids.chunks_exact_mut(seq).zip(items) {
            row[..item.ids.len()].copy_from_slice(&item.ids);
        }
        let out = model.forward(&ids, items.len(), seq, &context)?;
        for layer in &out.routing {
            for (i, item) in items.iter().enumerate() {
                for (place, &at) in item.places.iter().enumerate() {
                    let set = layer.routed.choices.of_token(i * seq + at).to_vec();
                    chosen.entry((layer.layer, place)).or_default().push(set);
                }
            }
        }
    }
    Ok(chosen)
}

/// Tokens of the worked answer before its verdict: as far as answers with other verdicts have the same ids.
fn tokens_before_verdict(tokenizer: &Tokenizer, item: &Proposition) -> Result<usize, DataError> {
    let answer = item.answer();
    let start = answer.rfind(':').map_or(answer.len(), |colon| colon + 1);
    let ids = tokenizer.encode(&answer)?;
    let mut shared = ids.len();
    for verdict in [Verdict::True, Verdict::False, Verdict::Undetermined] {
        if verdict != item.verdict() {
            let other = tokenizer.encode(&format!("{} {verdict}.", &answer[..start]))?;
            shared = shared.min(ids.iter().zip(&other).take_while(|(a, b)| a == b).count());
        }
    }
    Ok(shared)
}

/// Every content in every form, content by content.
fn grid() -> Vec<Proposition> {
    let form = |content: usize| {
        Modality::ALL.into_iter().flat_map(move |modality| {
            Connective::ALL.into_iter().map(move |connective| {
                let [left, right] = atoms(content).map(Formula::Atom);
                Proposition { modality, body: Formula::node(connective, left, right) }
            })
        })
    };
    (0..CONTENTS).flat_map(form).collect()
}

/// Form and content of the grid's items.
fn labels() -> (Vec<u32>, Vec<u32>) {
    (0..ITEMS).map(|i| ((i % CONTENTS) as u32, (i / CONTENTS) as u32)).unzip()
}

/// Two claims about different subjects; the four combinations of right and wrong take turns.
fn atoms(content: usize) -> [Atom; 2] {
    let total = Subject::total();
    let claim = |index: usize, right: bool| {
        let subject = Subject::from_index(index % total);
        let count = subject.count();
        let wrong = if count == 1 { 2 } else { 1 };
        Atom { subject, count: if right { count } else { wrong } }
    };
    [claim(content, content & 1 == 0), claim(content + APART, content & 2 == 0)]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_form_meets_every_content_once() {
        let grid = grid();
        let (form_n, content_n) = labels();
        let ids: BTreeSet<(String, String)> = grid.iter().map(|item| (item.form_id(), item.content_id())).collect();
        assert_eq!((grid.len(), ids.len()), (ITEMS, ITEMS));
        let names = |label: &[u32], id: fn(&Proposition) -> String| {
            let pairs: BTreeSet<(u32, String)> = label.iter().copied().zip(grid.iter().map(id)).collect();
            let distinct: BTreeSet<String> = grid.iter().map(id).collect();
            assert_eq!((pairs.len(), distinct.len()), (CONTENTS, CONTENTS), "a label is an identifier by another name");
        };
        names(&form_n, Proposition::form_id);
        names(&content_n, Proposition::content_id);
        let verdicts: BTreeSet<String> = grid.iter().map(|item| item.verdict().to_string()).collect();
        assert_eq!(verdicts.len(), 3);
    }

    #[test]
    fn the_places_are_the_same_word_in_every_item() {
        let tokenizer = Tokenizer::propositions();
        for item in grid() {
            let (ids, question) = tokenize_item(&tokenizer, &item).unwrap();
            let verdict = question + tokens_before_verdict(&tokenizer, &item).unwrap();
            assert_eq!(tokenizer.decode(&ids[..question]), item.question());
            let (before, after) = (tokenizer.decode(&ids[..verdict]), tokenizer.decode(&ids[verdict..]));
            assert!(before.trim_end().ends_with("Verdict:"), "{before}");
            assert_eq!(after.trim(), format!("{}.", item.verdict()));
        }
    }
}
