//! The lower bound of the Switch loss, and the dictionary of balance losses.

mod common;

use common::numbers;
use mixtura_routing::activation::softmax_rows;
use mixtura_routing::dictionary::{DictionaryError, LIBRARIES, convert, table};
use mixtura_routing::theory::{infimum, infimum_for, switch_loss_of, top_k_family, witness};

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
