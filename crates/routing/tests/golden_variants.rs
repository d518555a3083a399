//! Other numbers under the same ids: files whose expected values come from the plain formulas in `variants/`, which know nothing
//! of the crate. Every case must pass, and must fail when any single expected value is changed, left out or added to.

#[path = "variants/plain.rs"]
mod plain;
#[path = "variants/token_choice.rs"]
mod token_choice;
#[path = "variants/soft_and_modern.rs"]
mod soft_and_modern;
#[path = "variants/theory.rs"]
mod theory;

use mixtura_routing::reference::golden::{GoldenFile, Status};
use plain::Rng;
use serde_json::{Value, json};
use token_choice::Fixture;

const FILES: u64 = 6;

/// A file of other numbers and other sizes.
fn file(seed: u64) -> Value {
    let mut rng = Rng(seed * 7919 + 3);
    let (tokens, experts, width) = (5 + seed as usize % 3 * 2, 4 + seed as usize % 3, 2 + seed as usize % 2);
    let fixture = Fixture::new(&mut rng, tokens, experts, width);
    let mut cases = token_choice::cases(&mut rng, &fixture);
    cases.extend(soft_and_modern::cases(&mut rng, &fixture));
    cases.extend(theory::cases(&mut rng, &fixture));
    // Every id of the published file that this crate computes, but the causality trials, which have no numbers.
    assert_eq!(cases.len(), 47);
    let entry = |(id, inputs, expected): (&str, Value, Value)| json!({"id": id, "section": "", "desc": "", "tol": 1e-8, "inputs": inputs, "expected": expected});
    json!({ "cases": cases.into_iter().map(entry).collect::<Vec<_>>() })
}

#[test]
fn other_numbers_under_the_same_ids_pass() {
    for seed in 0..FILES {
        let report = GoldenFile::parse(&file(seed).to_string()).unwrap().check();
        for case in &report.cases {
            assert_eq!(case.status, Status::Passed, "file {seed}, {}: {}", case.id, case.message);
        }
    }
}

/// Every place below `value`, as JSON pointers.
fn places(value: &Value, at: String, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            map.iter().for_each(|(k, v)| places(v, format!("{at}/{}", k.replace('~', "~0").replace('/', "~1")), found));
        }
        Value::Array(list) => list.iter().enumerate().for_each(|(i, v)| places(v, format!("{at}/{i}"), found)),
        _ => {}
    }
    found.push(at);
}

/// A value that is wrong, whatever was right.
fn perturbed(value: &Value) -> Value {
    match value {
        Value::Number(n) => json!(n.as_f64().unwrap() + 1e-3 * n.as_f64().unwrap().abs().max(1.0)),
        Value::Bool(b) => json!(!b),
        Value::String(s) => json!(format!("{s}!")),
        Value::Array(list) => list.iter().cloned().chain([json!(0)]).collect(),
        Value::Object(map) => {
            map.iter().map(|(k, v)| (k.clone(), v.clone())).chain([("more".into(), json!(1))]).collect()
        }
        Value::Null => json!(1),
    }
}

#[test]
fn no_wrong_expected_value_passes() {
    let root = file(1);
    let fixture = root["cases"][0].clone();
    let mut wrong = 0;
    for case in root["cases"].as_array().unwrap() {
        let mut pointers = Vec::new();
        places(&case["expected"], "/expected".to_string(), &mut pointers);
        for pointer in pointers {
            let mut changed = case.clone();
            let value = changed.pointer_mut(&pointer).unwrap();
            *value = perturbed(value);
            let mut cases = vec![changed];
            if case["id"] != "F1" {
                cases.push(fixture.clone());
            }
            let file = GoldenFile::parse(&json!({ "cases": cases }).to_string()).unwrap();
            let report = file.check_case(case["id"].as_str().unwrap()).unwrap();
            assert_eq!(report.cases[0].status, Status::Failed, "{} {pointer}", case["id"]);
            wrong += 1;
        }
        for key in case["expected"].as_object().unwrap().keys() {
            let mut changed = case.clone();
            changed["expected"].as_object_mut().unwrap().remove(key);
            let file = GoldenFile::parse(&json!({ "cases": [changed, fixture] }).to_string());
            // F1 stands twice in its own file, which is refused as such.
            let Ok(file) = file else { continue };
            let report = file.check_case(case["id"].as_str().unwrap()).unwrap();
            assert_eq!(report.cases[0].status, Status::Failed, "{} without {key}", case["id"]);
        }
    }
    assert!(wrong > 1000, "{wrong}");
}
