//! Which source each document of a batch comes from, so that similar sources are spread out: the deficit scheduler.
//!
//! Every draw takes the source furthest behind its share, `size_s (drawn + 1) / N - drawn_s`; ties to the source rarest in the
//! current batch, then to the lowest. Compared in exact integers. O(sources) per draw.
//!
//! At all times `drawn_s - expected_s < 1`: the deficits of a draw sum to 1, so the largest is positive. Behind its share a source
//! may fall by more than 1 (sizes 1, 40, 3, 8, 40, 1, 1, 1, 40: by 1.29), and a batch of B may hold more than `ceil(B size_s / N)` of
//! a source (sizes 1, 1, 3, 5 with B = 3: two of the third), though never `B size_s / N + 1 + lag`.

/// Batches of source indices; every source s appears `sizes[s]` times in all. The last batch may be short.
pub fn deficit_batches(sizes: &[usize], batch: usize) -> Vec<Vec<u32>> {
    let total: usize = sizes.iter().sum();
    let mut drawn = vec![0usize; sizes.len()];
    let mut batches: Vec<Vec<u32>> = Vec::new();
    for draw in 0..total {
        if batches.last().is_none_or(|b| b.len() >= batch.max(1)) {
            batches.push(Vec::new());
        }
        let Some(current) = batches.last_mut() else { break };
        let rank = |s: usize| {
            let deficit = (sizes[s] * (draw + 1)) as i128 - (drawn[s] * total) as i128;
            let here = current.iter().filter(|c| **c == s as u32).count();
            (deficit, std::cmp::Reverse(here), std::cmp::Reverse(s))
        };
        let open = (0..sizes.len()).filter(|&s| drawn[s] < sizes[s]);
        let Some(next) = open.max_by_key(|&s| rank(s)) else { break };
        drawn[next] += 1;
        current.push(next as u32);
    }
    batches
}
