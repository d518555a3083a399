//! Sampling against Hugging Face transformers: the tokens that each option leaves and their probabilities; and what is promised of draws.
//!
//! `fixtures/hf/make_sampling.py` made the fixture; nothing here needs Python or a network.

use std::path::Path;

use mixtura_data::rng::SplitMix64;
use mixtura_infer::{Sampling, SamplingError, ScoredToken, top_log_probabilities};
use proptest::prelude::*;
use serde_json::Value;

const NEUTRAL: Sampling = Sampling { temperature: 1.0, ..Sampling::GREEDY };

struct Case {
    logits_v: Vec<f32>,
    seen: Vec<u32>,
    sampling: Sampling,
    kept: Vec<(u32, f64)>,
    log_probabilities_v: Vec<f64>,
}

fn cases() -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/hf/sampling.json");
    let fixture: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let numbers = |list: &Value| -> Vec<f64> {
        list.as_array().unwrap().iter().map(|z| z.as_f64().unwrap_or(f64::NEG_INFINITY)).collect()
    };
    let case = |case: &Value| {
        let option = |name: &str| case["options"][name].as_f64().unwrap();
        Case {
            logits_v: numbers(&case["logits"]).iter().map(|&z| z as f32).collect(),
            seen: serde_json::from_value(case["seen"].clone()).unwrap(),
            sampling: Sampling {
                temperature: option("temperature"),
                top_k: option("top_k") as usize,
                top_p: option("top_p"),
                min_p: option("min_p"),
                repetition_penalty: option("repetition_penalty"),
                seed: 5,
            },
            kept: serde_json::from_value(case["kept"].clone()).unwrap(),
            log_probabilities_v: numbers(&case["log_probabilities"]),
        }
    };
    fixture["cases"].as_array().unwrap().iter().map(case).collect()
}

#[test]
fn options_leave_the_tokens_and_probabilities_that_transformers_leaves() {
    for (number, case) in cases().iter().enumerate() {
        case.sampling.validate().unwrap();
        let candidates = case.sampling.candidates(&case.logits_v, &case.seen).unwrap();
        assert!(candidates.is_sorted_by(|a, b| a.probability >= b.probability), "case {number}");
        let mut kept: Vec<(u32, f64)> = candidates.iter().map(|c| (c.id, c.probability)).collect();
        kept.sort_by_key(|c| c.0);
        let ids = |kept: &[(u32, f64)]| kept.iter().map(|c| c.0).collect::<Vec<_>>();
        assert_eq!(ids(&kept), ids(&case.kept), "case {number}: {:?}", case.sampling);
        for (ours, theirs) in kept.iter().zip(&case.kept) {
            assert!((ours.1 - theirs.1).abs() < 1e-9, "case {number}: {ours:?} {theirs:?}");
        }
    }
}

#[test]
fn log_probabilities_are_those_of_the_model() {
    for case in cases() {
        let top = top_log_probabilities(&case.logits_v, usize::MAX).unwrap();
        let possible = case.log_probabilities_v.iter().filter(|p| p.is_finite()).count();
        assert_eq!(top.len(), possible);
        for token in top {
            assert!((token.log_probability - case.log_probabilities_v[token.id as usize]).abs() < 1e-12);
        }
        // Of a drawn token too, whatever the options made of the distribution.
        let token = case.sampling.next(&case.logits_v, &case.seen, 3).unwrap();
        assert!((token.log_probability - case.log_probabilities_v[token.id as usize]).abs() < 1e-12);
    }
}

#[test]
fn draws_follow_the_probabilities_of_the_candidates() {
    for (number, case) in cases().iter().enumerate() {
        let candidates = case.sampling.candidates(&case.logits_v, &case.seen).unwrap();
        let mut counts = vec![0.0; case.logits_v.len()];
        const DRAWS: u64 = 4000;
        (0..DRAWS).for_each(|p| counts[case.sampling.next(&case.logits_v, &case.seen, p).unwrap().id as usize] += 1.0);
        let mut expected_v = vec![0.0; counts.len()];
        candidates.iter().for_each(|c| expected_v[c.id as usize] = c.probability);
        for (count, p) in counts.iter().zip(&expected_v) {
            // Five standard deviations, some 2000 comparisons; nothing at all where nothing was left.
            let spread = (p * (1.0 - p) / DRAWS as f64).sqrt();
            assert!((count / DRAWS as f64 - p).abs() <= 5.0 * spread + 1e-12, "case {number}: {count} for {p}");
        }
    }
}

/// The draw of temperature, top_p and seed as it has been since the first release: sorts everything, one option after the other.
fn first_draw(sampling: &Sampling, logits_v: &[f32], position: u64) -> u32 {
    let max = logits_v.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let weight = |&z: &f32| ((z as f64 - max) / sampling.temperature).exp();
    let mut candidates: Vec<(u32, f64)> = (0..).zip(logits_v.iter().map(weight)).collect();
    let mut mass: f64 = candidates.iter().map(|c| c.1).sum();
    if sampling.top_p < 1.0 {
        candidates.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let mut kept = 0.0;
        let last = candidates.iter().position(|c| {
            kept += c.1;
            kept >= sampling.top_p * mass
        });
        candidates.truncate(last.map_or(candidates.len(), |last| last + 1));
        mass = candidates.iter().map(|c| c.1).sum();
    }
    let mut z = sampling.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = z.wrapping_add(position.wrapping_mul(0xD1B5_4A32_D192_ED03));
    z = SplitMix64::new(SplitMix64::new(z).next_u64()).next_u64();
    let mut left = (z >> 11) as f64 / (1u64 << 53) as f64 * mass;
    let drawn = candidates.iter().find(|c| {
        left -= c.1;
        left < 0.0
    });
    drawn.or(candidates.last()).unwrap().0
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn temperature_top_p_and_seed_draw_what_they_always_drew(
        // Rounded to eighths half of the time: ties.
        logits_v in prop::collection::vec(prop_oneof![-9.0f32..9.0, (-40i32..40).prop_map(|z| z as f32 / 8.0)], 1..1500),
        temperature in prop_oneof![Just(1.0), 0.05f64..3.0],
        top_p in prop_oneof![Just(1.0), 0.01f64..1.0, Just(1.0 - 1e-12)],
        seed: u64,
    ) {
        let sampling = Sampling { temperature, top_p, seed, ..NEUTRAL };
        for position in 0..20 {
            prop_assert_eq!(sampling.next(&logits_v, &[], position).unwrap().id, first_draw(&sampling, &logits_v, position));
        }
    }

    #[test]
    fn any_logits_and_options_are_a_token_or_an_error(
        bits in prop::collection::vec(prop_oneof![any::<u32>(), Just(0xff80_0000), Just(0x7fc0_0000), (0u32..9).prop_map(|z| (z as f32).to_bits())], 0..20),
        temperature in prop_oneof![Just(0.0), 0.0f64..2.0, any::<f64>()],
        top_k in 0usize..6,
        top_p in prop_oneof![Just(1.0), 0.0f64..1.0, any::<f64>()],
        min_p in prop_oneof![Just(0.0), 0.0f64..1.0, any::<f64>()],
        repetition_penalty in prop_oneof![Just(1.0), 0.0f64..200.0, any::<f64>()],
        seen: Vec<u32>,
        position: u64,
    ) {
        let logits_v: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let sampling = Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed: position };
        let good = !logits_v.iter().any(|z| z.is_nan() || *z == f32::INFINITY) && logits_v.iter().any(|z| z.is_finite());
        prop_assert_eq!(top_log_probabilities(&logits_v, 3).is_ok(), good);
        if sampling.validate().is_ok() {
            match sampling.next(&logits_v, &seen, position) {
                // What the model rules out is never drawn.
                Ok(token) => prop_assert!(good && logits_v[token.id as usize].is_finite() && token.log_probability <= 0.0),
                Err(SamplingError::Logits { .. }) => prop_assert!(!good),
                Err(other) => prop_assert!(false, "{}", other),
            }
            prop_assert_eq!(sampling.candidates(&logits_v, &seen).is_ok(), good);
        }
    }
}

#[test]
fn greedy_takes_the_lowest_of_the_likeliest_after_the_penalty() {
    let next = |sampling: Sampling, seen: &[u32]| sampling.next(&[0.0, 3.0, 3.0, 2.9], seen, 9).unwrap().id;
    assert_eq!(next(Sampling::GREEDY, &[1, 2]), 1);
    let penalty = Sampling { repetition_penalty: 1.5, ..Sampling::GREEDY };
    assert_eq!((next(penalty, &[]), next(penalty, &[1, 1, 99]), next(penalty, &[2, 1])), (1, 2, 3));
}

#[test]
fn the_likeliest_come_in_order_and_the_lower_id_first_of_equals() {
    let ids = |n| {
        top_log_probabilities(&[1.0, 2.0, f32::NEG_INFINITY, 2.0, 0.5], n)
            .unwrap()
            .iter()
            .map(|t| t.id)
            .collect::<Vec<_>>()
    };
    assert_eq!((ids(0), ids(1), ids(2), ids(9)), (vec![], vec![1], vec![1, 3], vec![1, 3, 0, 4]));
    let certain = top_log_probabilities(&[f32::NEG_INFINITY, -3.0], 1).unwrap();
    assert_eq!(certain, [ScoredToken { id: 1, log_probability: 0.0 }]);
}

#[test]
fn every_impossible_value_is_a_sentence() {
    let message = |sampling: Sampling| sampling.validate().unwrap_err().to_string();
    let cases = [
        (
            Sampling { temperature: -0.5, ..NEUTRAL },
            "temperature is -0.5, but it must be a number of at least 0 (0 takes the likeliest token)",
        ),
        (
            Sampling { temperature: f64::NAN, ..NEUTRAL },
            "temperature is NaN, but it must be a number of at least 0 (0 takes the likeliest token)",
        ),
        (
            Sampling { temperature: f64::INFINITY, ..NEUTRAL },
            "temperature is inf, but it must be a number of at least 0 (0 takes the likeliest token)",
        ),
        (
            Sampling { top_k: 1 << 40, ..NEUTRAL },
            "top_k is 1099511627776, but it must be a number of tokens below 2^32 (0 keeps all)",
        ),
        (
            Sampling { top_p: 0.0, ..NEUTRAL },
            "top_p is 0, but it must be a share above 0 and at most 1 (1 keeps everything)",
        ),
        (
            Sampling { top_p: 1.5, ..NEUTRAL },
            "top_p is 1.5, but it must be a share above 0 and at most 1 (1 keeps everything)",
        ),
        (Sampling { min_p: -0.1, ..NEUTRAL }, "min_p is -0.1, but it must be a share from 0 to 1 (0 keeps everything)"),
        (
            Sampling { min_p: f64::NAN, ..NEUTRAL },
            "min_p is NaN, but it must be a share from 0 to 1 (0 keeps everything)",
        ),
        (
            Sampling { repetition_penalty: 0.0, ..NEUTRAL },
            "repetition_penalty is 0, but it must be a factor from 0.01 to 100 (1 changes nothing)",
        ),
    ];
    for (sampling, expected) in cases {
        assert_eq!(message(sampling), expected);
    }
    NEUTRAL.validate().unwrap();
    Sampling::GREEDY.validate().unwrap();
}

#[test]
fn logits_that_are_no_distribution_say_what_they_are() {
    let message = |logits_v: &[f32]| Sampling::GREEDY.next(logits_v, &[], 0).unwrap_err().to_string();
    assert!(
        message(&[1.0, f32::NAN, f32::NAN])
            .contains("2 of 3 are not a number or infinite, the first is NaN for token 1")
    );
    assert!(
        message(&[1.0, f32::INFINITY]).contains("1 of 2 are not a number or infinite, the first is inf for token 1")
    );
    assert!(message(&[f32::NEG_INFINITY; 2]).contains("all 2 are minus infinity"));
    assert!(message(&[]).contains("there are none"));
}
