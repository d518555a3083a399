//! Expert Choice (Zhou et al. 2022): every expert takes its `m = T k / E` best tokens. Perfect load by construction, 0 to E
//! experts per token, and not causal: a token's experts depend on later tokens.
//!
//! The capped form bounds experts per token by an entropy-regularised assignment (KL-Dykstra on logarithms). With the paper's
//! lambda of 0.001 and 100 iterations it need not have converged (about gap / (lambda ln 2) iterations are needed), so the
//! result's violation is reported and what still exceeds the cap is repaired greedily. O(T E) per iteration, then O(T) for every
//! pick that the repair moves, or O(T E) where it has to exchange: 1 s at T4096 E64 k8. The plain form is O(T E).

use crate::activation::log_sum_exp;
use crate::assignment::Choices;
use crate::real::Real;

/// The paper's regulariser.
pub const LAMBDA: f64 = 1e-3;
/// The paper's iterations.
pub const ITERATIONS: usize = 100;

/// `floor(T k / E)`, at least 1, at most T.
pub fn tokens_per_expert(tokens: usize, experts: usize, k: usize) -> usize {
    (tokens * k / experts.max(1)).max(1).min(tokens)
}

/// Every expert's `each` best tokens, best first, ties to the lower token; `[E, each]`. O(T + each log each) per expert.
pub fn pick<S: Real>(scores_te: &[S], experts: usize, each: usize) -> Vec<u32> {
    let tokens = scores_te.len() / experts.max(1);
    let mut picks = Vec::with_capacity(experts * each);
    let mut order: Vec<u32> = Vec::with_capacity(tokens);
    for e in 0..experts {
        let score = |t: u32| scores_te[t as usize * experts + e];
        let better = |a: &u32, b: &u32| {
            let by_score = score(*b).partial_cmp(&score(*a)).unwrap_or(std::cmp::Ordering::Equal);
            by_score.then(a.cmp(b))
        };
        order.clear();
        order.extend(0..tokens as u32);
        if each < tokens && each > 0 {
            order.select_nth_unstable_by(each - 1, better);
        }
        order.truncate(each);
        order.sort_unstable_by(better);
        picks.extend_from_slice(&order);
    }
    picks
}

/// The same as choices of tokens, experts ascending; scores of minus infinity are never picked.
pub fn select<S: Real>(scores_te: &[S], experts: usize, each: usize) -> Choices {
    let tokens = scores_te.len() / experts.max(1);
    let picks = pick(scores_te, experts, each);
    choices_of(&picks, each, tokens, |t, e| scores_te[t * experts + e] != S::NEG_INFINITY)
}

/// Expert Choice with at most `cap` experts per token.
pub fn select_capped<S: Real>(scores_te: &[S], experts: usize, each: usize, cap: usize) -> Choices {
    let tokens = scores_te.len() / experts.max(1);
    if tokens == 0 {
        return Choices::ragged(Vec::<Vec<u32>>::new());
    }
    // Padding has score minus infinity; a finite stand-in below every real score keeps the iteration defined.
    let scores: Vec<f64> = scores_te.iter().map(|s| if *s == S::NEG_INFINITY { -1e3 } else { s.f64() }).collect();
    let plan = capped_plan(&scores, experts, each, cap, LAMBDA, ITERATIONS);
    let picks = repair(plan.pick(each), &plan, &scores, cap);
    let per_expert: Vec<Vec<u32>> = picks;
    let mut lists = vec![Vec::new(); tokens];
    for (e, list) in per_expert.iter().enumerate() {
        for &t in list.iter().filter(|&&t| scores_te[t as usize * experts + e] != S::NEG_INFINITY) {
            lists[t as usize].push(e as u32);
        }
    }
    Choices::ragged(lists)
}

/// An entropy-regularised assignment: rows (experts) sum to `each`, columns (tokens) to at most `cap`, entries in `[0, 1]`.
#[derive(Debug, Clone, PartialEq)]
pub struct CappedPlan {
    /// `[E, T]`.
    pub a_et: Vec<f64>,
    /// E.
    pub experts: usize,
    /// Largest excess over any of the three constraints after the last iteration: near 0 = converged.
    pub violation: f64,
}

/// `maximise <A, S> + lambda H(A)` under the constraints, by KL-Dykstra: `iterations` rounds of rows, columns, entries.
pub fn capped_plan(
    scores_te: &[f64],
    experts: usize,
    each: usize,
    cap: usize,
    lambda: f64,
    iterations: usize,
) -> CappedPlan {
    let tokens = scores_te.len() / experts.max(1);
    let mut log_a: Vec<f64> =
        (0..experts * tokens).map(|i| scores_te[i % tokens * experts + i / tokens] / lambda).collect();
    let mut columns_memory = vec![0.0; log_a.len()];
    let mut entries_memory = vec![0.0; log_a.len()];
    let (log_each, log_cap) = ((each as f64).ln(), (cap as f64).ln());
    for _ in 0..iterations {
        for row in log_a.chunks_exact_mut(tokens) {
            let excess = log_sum_exp(row) - log_each;
            row.iter_mut().for_each(|l| *l -= excess);
        }
        for t in 0..tokens {
            let column: Vec<f64> =
                (0..experts).map(|e| log_a[e * tokens + t] + columns_memory[e * tokens + t]).collect();
            let excess = (log_sum_exp(&column) - log_cap).max(0.0);
            for (e, y) in column.into_iter().enumerate() {
                log_a[e * tokens + t] = y - excess;
                columns_memory[e * tokens + t] = excess;
            }
        }
        for (l, memory) in log_a.iter_mut().zip(&mut entries_memory) {
            let y = *l + *memory;
            *l = y.min(0.0);
            *memory = y - *l;
        }
    }
    let a_et: Vec<f64> = log_a.into_iter().map(f64::exp).collect();
    let mut violation = 0.0f64;
    for row in a_et.chunks_exact(tokens.max(1)) {
        violation = violation.max((row.iter().sum::<f64>() - each as f64).abs());
    }
    for t in 0..tokens {
        let column: f64 = a_et.iter().skip(t).step_by(tokens).sum();
        violation = violation.max(column - cap as f64);
    }
    CappedPlan { a_et, experts, violation }
}

impl CappedPlan {
    /// Every expert's `each` largest entries, ties to the lower token; `[E][each]`.
    pub fn pick(&self, each: usize) -> Vec<Vec<u32>> {
        let tokens = self.a_et.len() / self.experts.max(1);
        let rows = self.a_et.chunks_exact(tokens.max(1));
        rows.map(|row| crate::select::order_descending(row).into_iter().take(each).collect()).collect()
    }
}

/// Makes picks respect `cap`: a token over it keeps its largest plan entries (ties: lower expert); every expert it leaves
/// takes its best remaining token with room, exchanging with another expert where only its own tokens have room.
pub fn repair(mut picks: Vec<Vec<u32>>, plan: &CappedPlan, scores_te: &[f64], cap: usize) -> Vec<Vec<u32>> {
    let experts = plan.experts;
    let tokens = plan.a_et.len() / experts.max(1);
    let mut users: Vec<Vec<u32>> = vec![Vec::new(); tokens];
    for (e, list) in picks.iter().enumerate() {
        list.iter().for_each(|&t| users[t as usize].push(e as u32));
    }
    let mut left = Vec::new();
    for (t, list) in users.iter_mut().enumerate() {
        list.sort_by(|&a, &b| {
            plan.a_et[b as usize * tokens + t].total_cmp(&plan.a_et[a as usize * tokens + t]).then(a.cmp(&b))
        });
        while list.len() > cap {
            if let Some(e) = list.pop() {
                picks[e as usize].retain(|&u| u as usize != t);
                left.push(e);
            }
        }
    }
    left.sort_unstable();
    for e in left {
        let score = |t: usize| scores_te[t * experts + e as usize];
        let free = (0..tokens).filter(|&t| users[t].len() < cap && !users[t].contains(&e));
        let best = free.fold(None, |best: Option<usize>, t| match best {
            Some(b) if score(b) >= score(t) => Some(b),
            _ => Some(t),
        });
        match best {
            Some(t) => {
                users[t].push(e);
                picks[e as usize].push(t as u32);
            }
            None => exchange(e, &mut picks, &mut users, scores_te, cap),
        }
    }
    picks
}

/// Every token with room already belongs to `e`: another expert hands one of its tokens to `e` and takes one with room.
fn exchange(e: u32, picks: &mut [Vec<u32>], users: &mut [Vec<u32>], scores_te: &[f64], cap: usize) {
    let experts = picks.len();
    let score = |t: u32, e: u32| scores_te[t as usize * experts + e as usize];
    let free: Vec<u32> = (0..users.len() as u32).filter(|t| users[*t as usize].len() < cap).collect();
    let mut best: Option<(f64, u32, u32, u32)> = None;
    for other in (0..experts as u32).filter(|o| *o != e) {
        let taken = free.iter().filter(|t| !users[**t as usize].contains(&other));
        let Some(&taken) = taken.max_by(|a, b| score(**a, other).total_cmp(&score(**b, other)).then(b.cmp(a))) else {
            continue;
        };
        for &given in picks[other as usize].iter().filter(|t| !users[**t as usize].contains(&e)) {
            let gain = score(given, e) - score(given, other) + score(taken, other);
            if best.is_none_or(|(g, ..)| gain > g) {
                best = Some((gain, other, given, taken));
            }
        }
    }
    if let Some((_, other, given, taken)) = best {
        picks[other as usize].retain(|t| *t != given);
        users[given as usize].retain(|o| *o != other);
        for (expert, token) in [(e, given), (other, taken)] {
            picks[expert as usize].push(token);
            users[token as usize].push(expert);
        }
    }
}

fn choices_of(picks: &[u32], each: usize, tokens: usize, valid: impl Fn(usize, usize) -> bool) -> Choices {
    let mut lists = vec![Vec::new(); tokens];
    for (i, &t) in picks.iter().enumerate() {
        let e = i / each.max(1);
        if valid(t as usize, e) {
            lists[t as usize].push(e as u32);
        }
    }
    Choices::ragged(lists)
}
