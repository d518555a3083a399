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

/// The Switch loss of given probabilities, winners by arg-max (ties to the lower expert).
pub fn switch_loss_of(probs_te: &[f64], experts: usize) -> f64 {
    let tokens = probs_te.len() / experts.max(1);
    if tokens == 0 {
        return 0.0;
    }
    let (mut wins, mut mass) = (vec![0.0; experts], vec![0.0; experts]);
    for row in probs_te.chunks_exact(experts) {
        wins[crate::select::arg_max(row)] += 1.0;
        mass.iter_mut().zip(row).for_each(|(m, p)| *m += p);
    }
    let t = tokens as f64;
    experts as f64 * wins.iter().zip(&mass).map(|(w, m)| w / t * (m / t)).sum::<f64>()
}

/// The best of the same family for top-k, `min_z n k / ((k + z)(n - z))`: an upper bound on the infimum, not proved to be it.
pub fn top_k_family(experts: usize, k: usize) -> f64 {
    let value = |z: usize| (experts * k) as f64 / ((k + z) * (experts - z)) as f64;
    (0..=experts.saturating_sub(k.max(1))).map(value).fold(f64::INFINITY, f64::min)
}
