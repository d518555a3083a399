//! Specialisation of experts: information, its permutation test, overlap of expert sets.

use mixtura_routing::reference::propositions::{SplitMix64, draw};
use mixtura_routing::stats::specialisation::{
    Overlap, jaccard, normalised_information, overlap, pairs_of_one_content, specialisation,
};
use mixtura_routing::{Purpose, StepContext};

/// `n` labels uniform below `kinds`.
fn labels(which: u32, n: usize, kinds: u32) -> Vec<u32> {
    let stream = StepContext::training(7, 0, which).stream(Purpose::LogitNoise).unwrap();
    (0..n).map(|i| stream.bits(i, 0)[0] % kinds).collect()
}

/// The definition with a dense table: sum of p ln(p / (q r)), over half the sum of the entropies.
fn by_definition(a: &[u32], b: &[u32]) -> f64 {
    let n = a.len() as f64;
    let kinds = |v: &[u32]| *v.iter().max().unwrap() + 1;
    let p = |x: u32, y: u32| a.iter().zip(b).filter(|(i, j)| (**i, **j) == (x, y)).count() as f64 / n;
    let (mut information, mut entropies) = (0.0, 0.0);
    for x in 0..kinds(a) {
        let q: f64 = (0..kinds(b)).map(|y| p(x, y)).sum();
        entropies -= if q > 0.0 { q * q.ln() } else { 0.0 };
        for y in 0..kinds(b) {
            let r: f64 = (0..kinds(a)).map(|x| p(x, y)).sum();
            information += if p(x, y) > 0.0 { p(x, y) * (p(x, y) / (q * r)).ln() } else { 0.0 };
        }
    }
    for y in 0..kinds(b) {
        let r: f64 = (0..kinds(a)).map(|x| p(x, y)).sum();
        entropies -= if r > 0.0 { r * r.ln() } else { 0.0 };
    }
    2.0 * information / entropies
}

#[test]
fn information_equals_its_definition() {
    for trial in 0..20 {
        let (a, b) = (labels(trial, 150, 2 + trial % 5), labels(trial + 100, 150, 2 + trial % 7));
        // Half of the labels follow the expert.
        let b: Vec<u32> = a.iter().zip(b).enumerate().map(|(i, (x, y))| if i % 2 == 0 { x % 3 } else { y }).collect();
        assert!((normalised_information(&a, &b) - by_definition(&a, &b)).abs() < 1e-12, "trial {trial}");
    }
}

#[test]
fn a_renaming_is_complete_information_and_independence_none() {
    let a: Vec<u32> = (0..120).map(|i| i % 4).collect();
    // Ids are names: huge ones cost nothing.
    let renamed: Vec<u32> = a.iter().map(|x| u32::MAX - 7 * x).collect();
    let independent: Vec<u32> = (0..120).map(|i| i / 4 % 3).collect();
    let found = specialisation(&a, &renamed, 99, 1);
    assert!((found.normalised - 1.0).abs() < 1e-12 && (found.nats - 4f64.ln()).abs() < 1e-12);
    assert_eq!(found.p_value, 0.01);
    assert!((found.above_chance - 1.0).abs() < 1e-12 && found.by_chance < 0.2);
    let none = specialisation(&a, &independent, 99, 1);
    assert!(none.normalised < 1e-12 && none.p_value > 0.5 && none.above_chance < 0.0);
    assert_eq!(specialisation(&a, &[2; 120], 9, 1).p_value, 1.0, "a constant label tells nothing");
    assert_eq!(specialisation(&[], &[], 9, 1).normalised, 0.0);
}

#[test]
fn p_values_of_independent_labels_are_uniform() {
    let experts = labels(0, 80, 4);
    let mut below = [0usize; 2];
    for trial in 0..400 {
        let p = specialisation(&experts, &labels(trial + 1, 80, 3), 19, u64::from(trial)).p_value;
        below[0] += usize::from(p <= 0.1001);
        below[1] += usize::from(p <= 0.5001);
    }
    // Exact test: P(p <= alpha) = alpha at multiples of 1/20; four standard deviations.
    assert!((below[0] as f64 - 40.0).abs() < 4.0 * (400.0f64 * 0.1 * 0.9).sqrt(), "{below:?}");
    assert!((below[1] as f64 - 200.0).abs() < 4.0 * (400.0f64 * 0.25).sqrt(), "{below:?}");
}

#[test]
fn many_labels_look_informative_until_chance_is_taken_off() {
    let experts = labels(3, 300, 8);
    let (few, many) = (labels(4, 300, 3), labels(5, 300, 200));
    let (few, many) = (specialisation(&experts, &few, 50, 2), specialisation(&experts, &many, 50, 2));
    assert!(many.normalised > 0.3 && few.normalised < 0.05);
    assert!(many.above_chance.abs() < 0.05 && few.above_chance.abs() < 0.05, "{many:?} {few:?}");
}

/// Propositions whose expert is decided by the connective: form explains them, content does not.
#[test]
fn an_expert_per_connective_is_found_to_follow_form_and_not_content() {
    let facts: Vec<(String, u32)> =
        [("Mercury", 0), ("Venus", 0), ("Earth", 1), ("Mars", 2)].map(|(n, c)| (n.to_string(), c)).to_vec();
    let mut rng = SplitMix64(5);
    let items: Vec<_> = (0..600).map(|_| draw(&mut rng, &facts)).collect();
    let form: Vec<u32> = items.iter().map(|i| i.connective as u32 * 4 + i.modality as u32).collect();
    let content: Vec<u32> = items.iter().map(|i| 1 << i.atoms[0].subject | 1 << i.atoms[1].subject).collect();
    let expert: Vec<u32> = items.iter().map(|i| i.connective as u32 % 4).collect();
    let (by_form, by_content) = (specialisation(&expert, &form, 99, 3), specialisation(&expert, &content, 99, 3));
    assert!(by_form.above_chance > 0.4 && by_form.p_value == 0.01, "{by_form:?}");
    assert!(by_content.above_chance < 0.05 && by_content.p_value > 0.01, "{by_content:?}");
    // The same content under different forms meets in the same experts less often than chance would have it.
    let sets: Vec<[u32; 2]> = form.iter().map(|f| [f % 24, 24 + f % 24]).collect();
    let pairs = pairs_of_one_content(&content, &form);
    assert!(pairs.iter().all(|&(i, j)| content[i as usize] == content[j as usize] && i < j));
    let found = overlap(&sets, &pairs, 99, 4);
    assert!(found.mean < found.by_chance && found.p_lower == 0.01 && found.p_higher > 0.9, "{found:?}");
}

#[test]
fn overlap_of_expert_sets() {
    assert_eq!(jaccard(&[1, 2], &[2, 3]), 1.0 / 3.0);
    assert_eq!(jaccard(&[], &[]), 1.0);
    assert_eq!(jaccard(&[4], &[]), 0.0);
    let none = overlap::<[u32; 1]>(&[], &[], 3, 0);
    assert_eq!(none, Overlap { mean: 0.0, by_chance: 0.0, p_lower: 1.0, p_higher: 1.0 });
    assert_eq!(pairs_of_one_content(&[1, 1, 2, 1], &[0, 5, 0, 5]), [(0, 1)], "equal forms are no pair");
}

#[test]
fn the_same_seed_gives_the_same_bits_and_another_another() {
    let (a, b) = (labels(8, 60, 4), labels(9, 60, 4));
    assert_eq!(specialisation(&a, &b, 20, 1), specialisation(&a, &b, 20, 1));
    assert_ne!(specialisation(&a, &b, 20, 1).by_chance, specialisation(&a, &b, 20, 2).by_chance);
}
