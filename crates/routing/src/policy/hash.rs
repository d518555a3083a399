//! Hash layers (Roller et al. 2021): the expert is a function of the token id alone. No gate, no gradient, causal by nature.
//! Looking up is O(T); a balanced table of V ids takes O(V (log V + E)) once.

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

/// Experts of token ids by a table; an id outside it goes to `id mod experts`.
pub fn lookup(token_ids: &[u32], table: &[u32], experts: usize) -> Vec<u32> {
    let of = |&id: &u32| table.get(id as usize).copied().unwrap_or(id % experts.max(1) as u32);
    token_ids.iter().map(of).collect()
}
