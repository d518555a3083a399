//! Which documents of JSON lines are held back: a draw by the hash of the text, and what happens where the draw leaves a part empty.

use crate::error::DataError;

/// The draw of a document: uniform in 53 bits, which is what an f64 in [0, 1) can hold.
fn draw(document: &str) -> u64 {
    let hash = blake3::hash(document.as_bytes());
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes")) >> 11
}

/// Whether the draw holds a document back.
///
/// ```
/// let held = (0..1000).filter(|i| mixtura_data::corpus::held_back(&format!("document {i}"), 0.1)).count();
/// assert!((60..140).contains(&held));
/// ```
pub fn held_back(document: &str, fraction: f64) -> bool {
    (draw(document) as f64) < fraction * (1u64 << 53) as f64
}

/// For every document of every source, whether it is held back.
///
/// A draw over few documents can hold back all of a source or none at all. A source keeps the document that was drawn last of all
/// (the largest draw) to train on; where nothing is held back anywhere, the document with the smallest draw is, of the sources that
/// have another one. Both follow from the texts alone, so they survive reordering too.
pub(crate) fn hold_back(sources: &[&[String]], fraction: f64) -> Result<Vec<Vec<bool>>, DataError> {
    let draws: Vec<Vec<u64>> = sources.iter().map(|documents| documents.iter().map(|d| draw(d)).collect()).collect();
    let mut held: Vec<Vec<bool>> =
        sources.iter().map(|documents| documents.iter().map(|d| held_back(d, fraction)).collect()).collect();
    if fraction == 0.0 {
        return Ok(held);
    }
    for (held, draws) in held.iter_mut().zip(&draws) {
        if held.iter().all(|held| *held)
            && let Some(last) = draws.iter().max()
        {
            // Equal texts have one draw and stay together.
            held.iter_mut().zip(draws).for_each(|(held, draw)| *held = draw != last);
        }
    }
    if held.iter().flatten().any(|held| *held) {
        return Ok(held);
    }
    let candidates = draws.iter().filter(|draws| draws.iter().any(|draw| *draw != draws[0])).flatten();
    let Some(next) = candidates.min() else {
        let documents: usize = sources.iter().map(|documents| documents.len()).sum();
        return Err(DataError::NothingHeldBack { documents, fraction });
    };
    for (held, draws) in held.iter_mut().zip(&draws) {
        if draws.iter().any(|draw| draw != next) {
            held.iter_mut().zip(draws).for_each(|(held, draw)| *held = draw == next);
        }
    }
    Ok(held)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(count: usize, salt: usize) -> Vec<String> {
        (0..count).map(|i| format!("document {i} of set {salt}")).collect()
    }

    fn counts(sources: &[&[String]], fraction: f64) -> Vec<(usize, usize)> {
        let held = hold_back(sources, fraction).unwrap();
        held.iter().map(|held| (held.iter().filter(|h| **h).count(), held.iter().filter(|h| !**h).count())).collect()
    }

    #[test]
    fn few_documents_leave_something_on_both_sides_whatever_the_fraction() {
        for count in [2, 3, 8, 20, 50] {
            for salt in 0..40 {
                for fraction in [1e-9, 0.05, 0.5, 0.9] {
                    let (held, kept) = counts(&[&documents(count, salt)], fraction)[0];
                    assert!(held > 0 && kept > 0, "{count} documents, set {salt}, {fraction}: {held} and {kept}");
                }
            }
        }
    }

    #[test]
    fn where_the_draw_held_something_back_it_stands() {
        for salt in 0..40 {
            let documents = documents(60, salt);
            let drawn: Vec<bool> = documents.iter().map(|d| held_back(d, 0.2)).collect();
            assert_eq!(hold_back(&[&documents], 0.2).unwrap(), [drawn]);
        }
    }

    #[test]
    fn every_source_keeps_a_document_and_order_does_not_matter() {
        for salt in 0..40 {
            let (one, mut many) = (documents(1, salt), documents(6, 100 + salt));
            let before = counts(&[&one, &many], 0.5);
            assert!(before.iter().all(|(_, kept)| *kept > 0), "{before:?}");
            assert!(before.iter().any(|(held, _)| *held > 0), "{before:?}");
            let chosen = |documents: &[String]| {
                let held = hold_back(&[&one, documents], 0.01).unwrap();
                let mut texts: Vec<String> =
                    documents.iter().zip(&held[1]).filter(|(_, held)| **held).map(|(d, _)| d.clone()).collect();
                texts.sort();
                texts
            };
            let forwards = chosen(&many);
            many.reverse();
            assert_eq!(forwards, chosen(&many));
            assert_eq!(forwards.len(), 1);
        }
    }

    #[test]
    fn a_single_document_cannot_be_split_and_the_error_says_what_helps() {
        let error = hold_back(&[&documents(1, 0), &documents(1, 1)], 0.05).unwrap_err().to_string();
        for words in ["2 in all", "validation_fraction = 0", "kind = \"text\""] {
            assert!(error.contains(words), "{error}");
        }
        assert_eq!(hold_back(&[&documents(1, 0)], 0.0).unwrap(), [[false]]);
    }
}
