//! How small the Switch loss can be: 1 is not a lower bound, and neither is 1/2.
//!
//! Top-1 over n experts and T tokens, `L = n sum f_i Pbar_i`, infimum over all routers. Experts that never win ("decoys") may
//! hold probability just below the winner's on every token. With z decoys and l = n - z live experts that win equally often,
//! `L = n / ((z + 1)(n - z))`, whose minimum over z is `n / floor((n + 1)^2 / 4)`, about 4/n: below 1/2 from n = 7 on. Two
//! experts are special: 7/8, at unequal counts. The loss still trains, because f is a constant in its gradient: a decoy's
//! logit is pushed up. It is a proxy; report max/mean load, CV and entropy instead.

/// Infimum over all token counts.
pub fn infimum(experts: usize) -> f64 {
    match experts {
        0 => 0.0,
        1 => 1.0,
        2 => 7.0 / 8.0,
        n => n as f64 / ((n + 1) * (n + 1) / 4) as f64,
    }
}

/// Infimum for exactly `tokens` tokens.
pub fn infimum_for(experts: usize, tokens: usize) -> f64 {
    let (n, t) = (experts as f64, tokens as f64);
    if tokens == 0 || experts == 0 {
        return 0.0;
    }
    if tokens == 1 || experts == 1 {
        return 1.0;
    }
    if experts == 2 {
        // c tokens at (1/2, 1/2) in the limit, the rest wholly with the other expert.
        let value = |c: usize| 2.0 / (t * t) * (c as f64 * t / 2.0 + (tokens - c) as f64 * (tokens - c) as f64);
        return (0..=tokens).map(value).fold(f64::INFINITY, f64::min);
    }
    let live = |l: usize| {
        let (q, r) = (tokens / l, tokens % l);
        let squares = r * (q + 1) * (q + 1) + (l - r) * q * q;
        n / (t * t * (experts - l + 1) as f64) * squares as f64
    };
    (1..=experts.min(tokens)).map(live).fold(f64::INFINITY, f64::min)
}

/// Probabilities `[l, n]` that approach the bound: token t is won by live expert t with `1/(z+1) + eps`, every decoy (the last
/// z = n - l experts) holds `1/(z+1) - eps/z`.
pub fn witness(experts: usize, live: usize, eps: f64) -> Vec<f64> {
    let decoys = experts - live;
    let share = 1.0 / (decoys + 1) as f64;
    let mut rows = vec![0.0; live * experts];
    for t in 0..live {
        let row = &mut rows[t * experts..(t + 1) * experts];
        row[t] = share + if decoys == 0 { 0.0 } else { eps };
        row[live..].fill(share - eps / decoys.max(1) as f64);
    }
    rows
}

/// `n sum_e f_e v_e`: the least Switch loss, in the limit, of routers with these wins per expert. `v_e` is the smallest mean
/// of f over any set of experts that contains e. 0 for no wins at all.
pub fn value_of_counts(wins: &[usize]) -> f64 {
    let tokens = wins.iter().sum::<usize>() as f64;
    if tokens == 0.0 {
        return 0.0;
    }
    let live = wins.iter().enumerate().filter(|(_, w)| **w > 0);
    wins.len() as f64 * live.map(|(e, &w)| w as f64 / tokens * best_set(wins, e).1 / tokens).sum::<f64>()
}

/// Probabilities `[T, n]` whose winners are as counted and whose loss tends to [`value_of_counts`] with `eps`: every winner
/// and its set share equally, the winner by `eps` above the others. Tokens in order of their winner.
pub fn rows_of_counts(wins: &[usize], eps: f64) -> Vec<f64> {
    let mut rows = Vec::with_capacity(wins.len() * wins.iter().sum::<usize>());
    for (e, &count) in wins.iter().enumerate().filter(|(_, w)| **w > 0) {
        let (others, _) = best_set(wins, e);
        let share = 1.0 / (others.len() + 1) as f64;
        let mut row = vec![0.0; wins.len()];
        row[e] = if others.is_empty() { 1.0 } else { share + eps };
        others.iter().for_each(|&j| row[j] = share - eps / others.len() as f64);
        (0..count).for_each(|_| rows.extend_from_slice(&row));
    }
    rows
}

/// Probabilities `[tokens, n]` whose loss tends to [`infimum_for`] with `eps`.
pub fn witness_for(experts: usize, tokens: usize, eps: f64) -> Vec<f64> {
    // One live expert to all of them, wins as even as they go; and for two experts, which are special, every split.
    let even = |l: usize| (0..experts).map(move |e| if e < l { tokens / l + usize::from(e < tokens % l) } else { 0 });
    let mut splits: Vec<Vec<usize>> = (1..=experts.min(tokens)).map(|l| even(l).collect()).collect();
    if experts == 2 {
        splits.extend((0..=tokens).map(|c| vec![c, tokens - c]));
    }
    let best = splits.into_iter().min_by(|a, b| value_of_counts(a).total_cmp(&value_of_counts(b)));
    best.map_or(Vec::new(), |wins| rows_of_counts(&wins, eps))
}

/// The other experts of the set around `e` with the smallest mean number of wins, and that mean.
fn best_set(wins: &[usize], e: usize) -> (Vec<usize>, f64) {
    let mut others: Vec<usize> = (0..wins.len()).filter(|&j| j != e).collect();
    others.sort_by_key(|&j| wins[j]);
    let (mut sum, mut taken) = (wins[e] as f64, 0);
    for &j in &others {
        if wins[j] as f64 >= sum / (taken + 1) as f64 {
            break;
        }
        sum += wins[j] as f64;
        taken += 1;
    }
    others.truncate(taken);
    (others, sum / (taken + 1) as f64)
}

/// The Switch loss of given probabilities, winners by arg-max (ties to the lower expert).
pub fn switch_loss_of(probs_te: &[f64], experts: usize) -> f64 {
    top_k_loss_of(probs_te, experts, 1)
}

/// `(n/k) sum f_i Pbar_i` of given probabilities, f from the k largest of every row (ties to the lower expert).
pub fn top_k_loss_of(probs_te: &[f64], experts: usize, k: usize) -> f64 {
    let tokens = probs_te.len() / experts.max(1);
    if tokens == 0 {
        return 0.0;
    }
    let (mut selected, mut mass) = (vec![0.0; experts], vec![0.0; experts]);
    crate::select::top_k(probs_te, experts, k).into_iter().for_each(|e| selected[e as usize] += 1.0);
    for row in probs_te.chunks_exact(experts) {
        mass.iter_mut().zip(row).for_each(|(m, p)| *m += p);
    }
    let t = tokens as f64;
    experts as f64 / k as f64 * selected.iter().zip(&mass).map(|(s, m)| s / t * (m / t)).sum::<f64>()
}

/// The smallest top-k loss known: the lower of the two families. For k >= 2 and n up to 5 an exhaustive search over all
/// selections finds nothing lower (tests); in general it is an upper bound on the infimum.
pub fn top_k_bound(experts: usize, k: usize) -> f64 {
    if k == 1 { infimum(experts) } else { top_k_family(experts, k).min(popular_family(experts, k)) }
}

/// `n / (k (n - k + 1))`: k - 1 experts that every token selects with probability near 0.
pub fn popular_family(experts: usize, k: usize) -> f64 {
    experts as f64 / (k * (experts + 1 - k)) as f64
}

/// Probabilities `[n - k + 1, n]` for [`popular_family`]: the first k - 1 experts hold `eps` on every token, expert k - 1 + t
/// the rest of token t, everybody else 0.
pub fn popular_witness(experts: usize, k: usize, eps: f64) -> Vec<f64> {
    let live = experts + 1 - k;
    let mut rows = vec![0.0; live * experts];
    for (t, row) in rows.chunks_exact_mut(experts).enumerate() {
        row[..k - 1].fill(eps);
        row[k - 1 + t] = 1.0 - eps * (k - 1) as f64;
    }
    rows
}

/// Probabilities `[n - z, n]` for [`top_k_family`] with z decoys, the last experts: token t selects the k live experts from
/// t on, each with `1/(k + z) + eps`, every decoy holds `1/(k + z) - eps k/z`.
pub fn top_k_witness(experts: usize, k: usize, decoys: usize, eps: f64) -> Vec<f64> {
    let live = experts - decoys;
    let share = 1.0 / (k + decoys) as f64;
    let mut rows = vec![0.0; live * experts];
    for (t, row) in rows.chunks_exact_mut(experts).enumerate() {
        (0..k).for_each(|j| row[(t + j) % live] = share + if decoys == 0 { 0.0 } else { eps });
        row[live..].fill(share - eps * k as f64 / decoys.max(1) as f64);
    }
    rows
}

/// The decoy family for top-k, `min_z n k / ((k + z)(n - z))`, about `4 n k / (n + k)^2`. For k >= 2 it is not the infimum, see
/// [`popular_family`].
pub fn top_k_family(experts: usize, k: usize) -> f64 {
    let value = |z: usize| (experts * k) as f64 / ((k + z) * (experts - z)) as f64;
    (0..=experts.saturating_sub(k.max(1))).map(value).fold(f64::INFINITY, f64::min)
}
