//! BASE layers (Lewis et al. 2021): the assignment of exactly T/E tokens to every expert with the largest total affinity.
//!
//! Exact, by augmenting paths: tokens enter one after another; each takes the best path of displacements (token to expert,
//! displaced token to the next, ...) to an expert with room. A token costs one search over experts, O(E^2) per round and
//! seldom more than a few of at most E rounds, and O(T) to find the next candidates of the experts on its path: O(T (E^3 + T E)) at
//! worst, 0.2 s at T4096 E64. For layers of a few thousand tokens, in training only. If E does not divide T the first T mod E
//! experts take one token more.

/// The expert of every token. NaN affinities count as the smallest finite one.
pub fn assign(affinity_te: &[f64], experts: usize) -> Vec<u32> {
    let tokens = affinity_te.len() / experts.max(1);
    let lowest = affinity_te.iter().copied().filter(|a| a.is_finite()).fold(f64::INFINITY, f64::min);
    let lowest = if lowest.is_finite() { lowest } else { 0.0 };
    let affinity: Vec<f64> = affinity_te.iter().map(|&a| if a.is_finite() { a } else { lowest }).collect();
    let room = |e: usize| tokens / experts + usize::from(e < tokens % experts);
    let mut state = State { affinity: &affinity, experts, members: vec![Vec::new(); experts], best: Vec::new() };
    state.best = vec![None; experts * experts];
    for token in 0..tokens {
        let path = state.best_path(token, &room);
        state.apply(token, &path);
    }
    let mut assigned = vec![0; tokens];
    for (e, members) in state.members.iter().enumerate() {
        members.iter().for_each(|&t| assigned[t as usize] = e as u32);
    }
    assigned
}

/// Total affinity of an assignment.
pub fn total(affinity_te: &[f64], experts: usize, assigned: &[u32]) -> f64 {
    assigned.iter().enumerate().map(|(t, &e)| affinity_te[t * experts + e as usize]).sum()
}

struct State<'a> {
    affinity: &'a [f64],
    experts: usize,
    members: Vec<Vec<u32>>,
    /// Best member of expert i to move to j, with its gain; `[E, E]`.
    best: Vec<Option<(f64, u32)>>,
}

impl State<'_> {
    /// Experts from the one `token` enters to one with room, maximising the total gain.
    fn best_path(&self, token: usize, room: &impl Fn(usize) -> usize) -> Vec<usize> {
        let experts = self.experts;
        let mut gain: Vec<f64> = self.affinity[token * experts..(token + 1) * experts].to_vec();
        let mut from = vec![usize::MAX; experts];
        // Bellman and Ford; a strict margin keeps rounding from walking in circles of equal gain.
        for _ in 1..experts {
            let mut changed = false;
            for i in 0..experts {
                for j in 0..experts {
                    if let Some((step, _)) = self.best[i * experts + j]
                        && gain[i] + step > gain[j] + 1e-12 * (1.0 + gain[j].abs())
                    {
                        gain[j] = gain[i] + step;
                        from[j] = i;
                        changed = true;
                    }
                }
            }
            if !changed {
                break;
            }
        }
        let open = (0..experts).filter(|&e| self.members[e].len() < room(e));
        let mut end = open.fold(usize::MAX, |b, e| if b == usize::MAX || gain[e] > gain[b] { e } else { b });
        let mut path = Vec::new();
        while end != usize::MAX && path.len() < experts {
            path.push(end);
            end = from[end];
        }
        path.reverse();
        path
    }

    fn apply(&mut self, token: usize, path: &[usize]) {
        let moves: Vec<u32> =
            path.windows(2).filter_map(|w| self.best[w[0] * self.experts + w[1]].map(|(_, t)| t)).collect();
        let mut entering = token as u32;
        for (i, &e) in path.iter().enumerate() {
            self.members[e].push(entering);
            if let Some(&leaving) = moves.get(i) {
                self.members[e].retain(|&t| t != leaving);
                entering = leaving;
            }
        }
        for &e in path {
            self.refresh(e);
        }
    }

    fn refresh(&mut self, i: usize) {
        let experts = self.experts;
        for j in 0..experts {
            let gain = |t: u32| self.affinity[t as usize * experts + j] - self.affinity[t as usize * experts + i];
            let better = |best: Option<(f64, u32)>, &t: &u32| match best {
                Some((g, u)) if g > gain(t) || (g == gain(t) && u < t) => Some((g, u)),
                _ => Some((gain(t), t)),
            };
            self.best[i * experts + j] = if i == j { None } else { self.members[i].iter().fold(None, better) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every balanced assignment of up to six tokens to two or three experts, by exhaustion.
    fn exhaustive(affinity: &[f64], experts: usize) -> f64 {
        let tokens = affinity.len() / experts;
        let mut best = f64::NEG_INFINITY;
        for code in 0..experts.pow(tokens as u32) {
            let assigned: Vec<u32> = (0..tokens).map(|t| (code / experts.pow(t as u32) % experts) as u32).collect();
            let balanced = (0..experts).all(|e| {
                let count = assigned.iter().filter(|a| **a == e as u32).count();
                count == tokens / experts + usize::from(e < tokens % experts)
            });
            if balanced {
                best = best.max(total(affinity, experts, &assigned));
            }
        }
        best
    }

    #[test]
    fn the_assignment_is_optimal_and_balanced() {
        let mut state = 9u64;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f64 / 1e6
        };
        for trial in 0..200 {
            let experts = 2 + trial % 2;
            let tokens = 4 + trial % 4;
            let affinity: Vec<f64> = (0..tokens * experts).map(|_| draw()).collect();
            let assigned = assign(&affinity, experts);
            let found = total(&affinity, experts, &assigned);
            assert!((found - exhaustive(&affinity, experts)).abs() < 1e-9, "trial {trial}");
        }
    }

    #[test]
    fn equal_and_missing_affinities_still_balance() {
        let assigned = assign(&[f64::NAN; 36], 3);
        assert!((0..3).all(|e| assigned.iter().filter(|a| **a == e).count() == 4));
    }
}
