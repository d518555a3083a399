//! The name that was probably meant: one measure for keys, values, policies, cases and tensors.

/// The candidate with the fewest edits (insertions, deletions, replacements, swapped neighbours) away from `name`, the first in
/// alphabetical order of several; `None` if even that one takes edits to more than half of `name`.
///
/// ```
/// use mixtura_routing::names::nearest;
/// assert_eq!(nearest("gshart", ["switch", "gshard", "top_k"]), Some("gshard"));
/// assert_eq!(nearest("gshart", ["model.embed_tokens.weight"]), None);
/// ```
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |candidate: &'a str| (strsim::osa_distance(name, candidate), candidate);
    let (edits, candidate) = candidates.into_iter().map(distance).min()?;
    (edits <= name.chars().count().max(3) / 2).then_some(candidate)
}
