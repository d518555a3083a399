//! The lower bound of the Switch loss, and the dictionary of balance losses.

mod common;

use common::numbers;
use mixtura_routing::activation::softmax_rows;
use mixtura_routing::catalogue::dictionary::{DictionaryError, LIBRARIES, convert, table};
use mixtura_routing::losses::mean_probability_backward;
use mixtura_routing::reference::balance_bounds::{
    infimum, infimum_for, popular_family, popular_witness, rows_of_counts, switch_loss_of, top_k_bound, top_k_family,
    top_k_loss_of, top_k_witness, value_of_counts, witness, witness_for,
};
use mixtura_routing::select::arg_max;

#[test]
fn one_half_is_not_a_lower_bound_from_seven_experts_on() {
    let value = switch_loss_of(&witness(7, 4, 1e-9), 7);
    assert!(value < 0.5 && (value - 7.0 / 16.0).abs() < 1e-7, "{value}");
    assert_eq!(infimum(7), 7.0 / 16.0);
    assert!(infimum(6) >= 0.5);
    assert!(infimum(256) < 0.016);
}

#[test]
fn the_witness_approaches_the_infimum_and_random_routers_stay_above_it() {
    for experts in 3..=24_usize {
        let live = experts.div_ceil(2);
        let gap = switch_loss_of(&witness(experts, live, 1e-9), experts) - infimum(experts);
        assert!((0.0..1e-6).contains(&gap), "n={experts}: {gap}");
        assert!((infimum_for(experts, live) - infimum(experts)).abs() < 1e-12);
    }
    for seed in 0..2000u64 {
        let (experts, tokens) = (1 + (seed % 9) as usize, 1 + (seed % 7) as usize);
        let logits = numbers(seed + 1, experts * tokens, 6.0);
        let mut probs = vec![0.0; logits.len()];
        softmax_rows(&logits, experts, &mut probs, &mut vec![0.0; tokens]);
        let value = switch_loss_of(&probs, experts);
        assert!(value >= infimum_for(experts, tokens) - 1e-12, "n={experts} T={tokens}: {value}");
        assert!(infimum_for(experts, tokens) >= infimum(experts) - 1e-12);
    }
}

/// The claim in circulation is that 1/2 is the infimum for every number of experts.
#[test]
fn from_seven_experts_on_the_evaluated_witness_is_below_one_half() {
    for experts in 7..=128 {
        let rows = witness(experts, experts.div_ceil(2), 1e-6);
        assert!(rows.chunks(experts).all(|row| (row.iter().sum::<f64>() - 1.0).abs() < 1e-12));
        assert!(rows.iter().all(|p| *p >= 0.0));
        let value = switch_loss_of(&rows, experts);
        assert!(value < 0.5 && (value - infimum(experts)).abs() < 1e-3, "n={experts}: {value}");
    }
    // One decoy, the family of that claim, does stay above 1/2: n / (2 (n - 1)).
    for experts in 3..=128 {
        let one_decoy = switch_loss_of(&witness(experts, experts - 1, 1e-9), experts);
        assert!((one_decoy - experts as f64 / (2.0 * (experts - 1) as f64)).abs() < 1e-6 && one_decoy > 0.5);
    }
}

#[test]
fn the_infimum_has_its_published_values() {
    let published = [(1, 1.0), (2, 0.875), (3, 0.75), (4, 0.6667), (5, 0.5556), (6, 0.5), (7, 0.4375), (8, 0.4)];
    for (n, value) in published.into_iter().chain([(9, 0.36), (10, 0.3333), (16, 0.2222), (64, 0.0606), (256, 0.0155)])
    {
        assert!((infimum(n) - value).abs() < 6e-5, "n={n}");
    }
}

/// Every way to split `tokens` wins over `experts`, in descending order.
fn partitions(tokens: usize, experts: usize, most: usize) -> Vec<Vec<usize>> {
    if experts == 0 {
        return if tokens == 0 { vec![Vec::new()] } else { Vec::new() };
    }
    let mut all = Vec::new();
    for first in (0..=most.min(tokens)).rev() {
        for rest in partitions(tokens - first, experts - 1, first) {
            all.push([vec![first], rest].concat());
        }
    }
    all
}

/// The smallest mean of wins over the sets that contain `e`, by trying every set.
fn smallest_mean(wins: &[usize], e: usize) -> f64 {
    let sets = (0..1usize << wins.len()).filter(|set| set >> e & 1 == 1);
    let mean = |set: usize| {
        let members = (0..wins.len()).filter(|j| set >> j & 1 == 1);
        members.map(|j| wins[j]).sum::<usize>() as f64 / set.count_ones() as f64
    };
    sets.map(mean).fold(f64::INFINITY, f64::min)
}

#[test]
fn the_infimum_is_exact_over_every_count_vector() {
    for experts in 1..=8 {
        for tokens in 1..=if experts < 7 { 16 } else { 12 } {
            let t = tokens as f64;
            let mut best = f64::INFINITY;
            for wins in partitions(tokens, experts, tokens) {
                // The linear program's optimum is at a vertex: equal mass on a set that contains the winner.
                let value = experts as f64
                    * wins.iter().enumerate().map(|(e, &w)| w as f64 / t * smallest_mean(&wins, e) / t).sum::<f64>();
                assert!((value_of_counts(&wins) - value).abs() < 1e-12, "{wins:?}");
                best = best.min(value);
            }
            let closed = infimum_for(experts, tokens);
            assert!((best - closed).abs() < 1e-12, "n={experts} T={tokens}: {best} {closed}");
            let reached = switch_loss_of(&witness_for(experts, tokens, 1e-9), experts);
            assert!((reached - closed).abs() < 1e-6, "n={experts} T={tokens}: the witness has {reached}");
        }
    }
}

#[test]
fn no_router_with_given_wins_is_below_the_value_of_its_counts() {
    for trial in 0..2000u64 {
        let (experts, tokens) = (2 + (trial % 8) as usize, 1 + (trial % 11) as usize);
        // Small spreads keep many experts near the winner, which is where the bound is tight.
        let logits = numbers(trial, experts * tokens, [0.01, 0.3, 4.0][trial as usize % 3]);
        let mut probs = vec![0.0; logits.len()];
        softmax_rows(&logits, experts, &mut probs, &mut vec![0.0; tokens]);
        let mut wins = vec![0; experts];
        probs.chunks(experts).for_each(|row| wins[arg_max(row)] += 1);
        let (value, least) = (switch_loss_of(&probs, experts), value_of_counts(&wins));
        assert!(value >= least - 1e-12, "{wins:?}: {value} {least}");
        let reached = switch_loss_of(&rows_of_counts(&wins, 1e-9), experts);
        assert!((reached - least).abs() < 1e-6, "{wins:?}: {reached} {least}");
    }
}

#[test]
fn two_experts_are_special() {
    assert_eq!(value_of_counts(&[3, 1]), 0.875);
    assert!(value_of_counts(&[2, 2]) == 1.0 && value_of_counts(&[4, 0]) == 1.0);
    assert!((1..100).all(|t| infimum_for(2, t) >= 0.875 - 1e-12));
    assert!((1..25).all(|q| (infimum_for(2, 4 * q) - 0.875).abs() < 1e-12), "reached at three to one");
    let value = switch_loss_of(&witness_for(2, 4, 1e-9), 2);
    assert!((value - 0.875).abs() < 1e-8, "{value}");
}

#[test]
fn both_top_k_families_are_reached_by_their_witnesses() {
    for (experts, k) in [(8, 2), (16, 2), (16, 4), (64, 8), (5, 3), (4, 4), (60, 4)] {
        let decoys = (0..=experts - k)
            .map(|z| {
                let rows = top_k_witness(experts, k, z, 1e-10);
                assert!(rows.chunks(experts).all(|row| (row.iter().sum::<f64>() - 1.0).abs() < 1e-9));
                let value = top_k_loss_of(&rows, experts, k);
                let closed = (experts * k) as f64 / ((k + z) * (experts - z)) as f64;
                assert!((value - closed).abs() < 1e-6, "n={experts} k={k} z={z}: {value} {closed}");
                value
            })
            .fold(f64::INFINITY, f64::min);
        assert!((decoys - top_k_family(experts, k)).abs() < 1e-6);
        let popular = top_k_loss_of(&popular_witness(experts, k, 1e-9), experts, k);
        assert!((popular - popular_family(experts, k)).abs() < 1e-6, "n={experts} k={k}: {popular}");
        assert!((top_k_bound(experts, k) - popular.min(decoys)).abs() < 1e-6);
    }
    // The decoy family was the smallest published value for these; it is not the infimum.
    assert!(popular_family(8, 2) < 0.572 && top_k_family(8, 2) >= 0.64);
    assert!(popular_family(64, 8) < 0.141 && top_k_family(64, 8) > 0.395);
}

/// The least loss of routers in which token t selects `sets[t]`: mass on the least selected choice alone, or equal mass on the
/// choices and the least selected other experts. These are the vertices of the token's linear program.
fn value_of_selections(sets: &[Vec<usize>], experts: usize) -> f64 {
    let t = sets.len() as f64;
    let mut f = vec![0.0; experts];
    sets.iter().flatten().for_each(|&e| f[e] += 1.0 / t);
    let least = |set: &Vec<usize>| {
        let mut others: Vec<f64> = (0..experts).filter(|e| !set.contains(e)).map(|e| f[e]).collect();
        others.sort_by(f64::total_cmp);
        let (mut sum, mut n) = (set.iter().map(|&e| f[e]).sum::<f64>(), set.len() as f64);
        let mut best = set.iter().map(|&e| f[e]).fold(sum / n, f64::min);
        for other in others {
            sum += other;
            n += 1.0;
            best = best.min(sum / n);
        }
        best / t
    };
    experts as f64 / sets[0].len() as f64 * sets.iter().map(least).sum::<f64>()
}

#[test]
fn no_small_top_k_router_is_below_the_bound() {
    for (experts, k, most) in [(3, 2, 6), (4, 2, 5), (4, 3, 6), (5, 2, 4), (5, 4, 5), (5, 3, 4)] {
        let all: Vec<Vec<usize>> = (0..1usize << experts)
            .filter(|set| set.count_ones() as usize == k)
            .map(|set| (0..experts).filter(|e| set >> e & 1 == 1).collect())
            .collect();
        let mut best = f64::INFINITY;
        for tokens in 1..=most {
            // Tokens are interchangeable: non-decreasing sequences of sets.
            let mut at = vec![0; tokens];
            loop {
                let sets: Vec<Vec<usize>> = at.iter().map(|&i| all[i].clone()).collect();
                best = best.min(value_of_selections(&sets, experts));
                let Some(i) = (0..tokens).rev().find(|&i| at[i] + 1 < all.len()) else { break };
                let next = at[i] + 1;
                at[i..].fill(next);
            }
        }
        assert!(
            (best - top_k_bound(experts, k)).abs() < 1e-12,
            "n={experts} k={k}: {best} {}",
            top_k_bound(experts, k)
        );
    }
}

#[test]
fn a_decoy_is_pushed_up_but_a_popular_expert_is_not_pushed_down() {
    let (experts, eps) = (8, 1e-6);
    let gradient = |rows: &[f64], k: usize| {
        let mut f = vec![0.0; experts];
        let tokens = rows.len() / experts;
        let selected = mixtura_routing::select::top_k(rows, experts, k);
        selected.into_iter().for_each(|e| f[e as usize] += experts as f64 / (k * tokens) as f64);
        mean_probability_backward(&f, rows)
    };
    let decoy = gradient(&witness(experts, 4, eps), 1);
    assert!(decoy.chunks(experts).all(|row| row[4..].iter().all(|d| *d < -1e-3)), "logits of decoys rise");
    let rows = popular_witness(experts, 2, eps);
    assert!(gradient(&rows, 2).iter().all(|d| d.abs() < 1e-5), "nothing moves");
    // Every token selects expert 0, four times the mean load, and the loss calls it better than balance.
    assert!(top_k_loss_of(&rows, experts, 2) < 0.572);
}

#[test]
fn the_top_k_family_contains_the_top_1_bound() {
    assert!((3..64).all(|n| (top_k_family(n, 1) - infimum(n)).abs() < 1e-12));
    assert!((top_k_family(64, 8) - 0.395_061_728_395).abs() < 1e-9);
}

#[test]
fn the_dictionary_has_the_known_constants() {
    let rows = table(8, 2, 2).unwrap();
    let row = |name: &str| rows.iter().find(|r| r.library.name == name).unwrap();
    for (name, balance, cancel) in
        [("mixtura", 1.0, 2.0), ("hf", 2.0, 2.0), ("flaxformer", 4.0, 8.0), ("megatron", 2.0, 4.0)]
    {
        assert!((row(name).balance - balance).abs() < 0.02, "{name}: {}", row(name).balance);
        assert!((row(name).cancel - cancel).abs() < 0.06, "{name}: {}", row(name).cancel);
    }
    assert!(row("mixtura").collapse > 3.9 && row("hf").collapse > 7.8);
    assert!(row("vmoe-importance").balance < 1e-6 && row("vmoe-load").collapse > 2.9);
    for r in &rows {
        assert!((r.balance - r.library.at_balance(8, 2, 2)).abs() < 0.05, "{}", r.library.name);
    }
}

#[test]
fn coefficients_convert_as_measured() {
    // Mixtral's 0.01 in transformers: 0.02 in MegaBlocks, 6.25e-4 in Megatron (k = 2, 32 layers).
    assert!((convert("hf", "megablocks", 0.01, 8, 2, 32).unwrap() - 0.02).abs() < 1e-15);
    assert!((convert("hf", "megatron", 0.01, 8, 2, 32).unwrap() - 6.25e-4).abs() < 1e-15);
    for a in LIBRARIES.iter().filter(|l| l.at_balance(8, 2, 4) > 0.0) {
        let there = convert("mixtura", a.name, 0.3, 8, 2, 4).unwrap();
        assert!((convert(a.name, "mixtura", there, 8, 2, 4).unwrap() - 0.3).abs() < 1e-12);
    }
}

#[test]
fn what_cannot_be_converted_is_refused() {
    assert!(matches!(convert("hf", "megatronn", 1.0, 8, 2, 2), Err(DictionaryError::Unknown { .. })));
    assert!(matches!(convert("hf", "vmoe-load", 1.0, 8, 2, 2), Err(DictionaryError::NotProportional { .. })));
    assert!(matches!(convert("hf", "megatron", 1.0, 8, 9, 2), Err(DictionaryError::Sizes { .. })));
    assert!(matches!(table(0, 0, 1), Err(DictionaryError::Sizes { .. })));
}
