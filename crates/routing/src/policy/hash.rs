//! Hash layers (Roller et al. 2021): the expert is a function of the token id alone. No gate, no gradient, causal by nature.
//! Looking up is O(T); a balanced table of V ids takes O(V (log V + E)) once.

use crate::rng::{Purpose, StepContext, Stream};

/// `id mod experts`.
pub fn modulo(token_ids: &[u32], experts: usize) -> Vec<u32> {
    token_ids.iter().map(|&id| id % experts.max(1) as u32).collect()
}

/// A table from token id to expert that balances training frequency: heaviest id first, to the lightest expert; ties to the
/// lower id and the lower expert. Returns the table and the load of each expert.
pub fn balanced_table(frequency: &[f64], experts: usize) -> (Vec<u32>, Vec<f64>) {
    let mut table = vec![0; frequency.len()];
    let mut load = vec![0.0f64; experts];
    for id in crate::select::order_descending(frequency) {
        let lightest = (0..experts).fold(0, |best, e| if load[e] < load[best] { e } else { best });
        table[id as usize] = lightest as u32;
        if let Some(l) = load.get_mut(lightest) {
            *l += frequency[id as usize];
        }
    }
    (table, load)
}

/// A table of `ids` entries drawn from the run's seed; the same for every layer with as many experts.
pub fn random_table(ids: usize, experts: usize, seed: u64) -> Vec<u32> {
    let stream = Stream::new(&StepContext::training(seed, 0, 0), Purpose::HashTable);
    let expert = |id: usize| (stream.uniform(id, 0) * experts as f64) as u32;
    (0..ids).map(|id| expert(id).min(experts.saturating_sub(1) as u32)).collect()
}

/// `k` experts for every id: `(table[id] + j) mod E` for choice j, ids outside the table from `id mod E`; `[T, k]`.
pub fn choices(token_ids: &[u32], table: &[u32], experts: usize, k: usize) -> Vec<u32> {
    let all = experts.max(1) as u32;
    let first = lookup(token_ids, table, experts);
    first.into_iter().flat_map(|e| (0..k as u32).map(move |j| if j == 0 { e } else { (e % all + j) % all })).collect()
}

/// Experts of token ids by a table; an id outside it goes to `id mod experts`.
pub fn lookup(token_ids: &[u32], table: &[u32], experts: usize) -> Vec<u32> {
    let of = |&id: &u32| table.get(id as usize).copied().unwrap_or(id % experts.max(1) as u32);
    token_ids.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balanced_table_evens_a_skewed_vocabulary_that_a_modulo_table_does_not() {
        let frequency: Vec<f64> = (0..1000).map(|id| 1.0 / (id + 1) as f64).collect();
        let (table, load) = balanced_table(&frequency, 4);
        assert_eq!(table[..4], [0, 1, 2, 3]);
        let total: f64 = load.iter().sum();
        let most = |load: &[f64]| load.iter().copied().fold(0.0, f64::max) * 4.0 / total;
        let mut modulo = vec![0.0; 4];
        (0..1000).for_each(|id| modulo[id % 4] += frequency[id]);
        assert!(most(&load) < 1.1 && most(&modulo) > 1.2, "{} and {}", most(&load), most(&modulo));
    }

    #[test]
    fn choices_of_an_id_differ_and_unknown_ids_have_some() {
        assert_eq!(choices(&[0, 2, 9], &[3, 1, 2], 4, 2), [3, 0, 2, 3, 1, 2]);
        let table = random_table(500, 4, 7);
        assert!(table == random_table(500, 4, 7) && table != random_table(500, 4, 8));
        assert!((0..4).all(|e| table.iter().filter(|t| **t == e).count() > 90));
    }
}
