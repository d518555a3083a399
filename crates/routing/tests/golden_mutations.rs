//! A golden-vector file is outside data: no change to any of its values may make the checker panic or run away.

use mixtura_routing::reference::golden::GoldenFile;
use serde_json::{Value, json};

const TEXT: &str = include_str!("../../../fixtures/golden.json");

/// Every place in `value`, as JSON pointers; of long lists the first two entries.
fn places(value: &Value, at: String, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            map.iter()
                .for_each(|(key, v)| places(v, format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")), found));
        }
        Value::Array(list) => list.iter().take(2).enumerate().for_each(|(i, v)| places(v, format!("{at}/{i}"), found)),
        _ => {}
    }
    found.push(at);
}

#[test]
fn no_changed_value_makes_the_checker_panic() {
    let root: Value = serde_json::from_str(TEXT).unwrap();
    let fixture = root["cases"].as_array().unwrap().iter().find(|c| c["id"] == "F1").unwrap().clone();
    let replacements = [
        json!(null),
        json!(0),
        json!(-1),
        json!(7),
        json!(0.5),
        json!(1e308),
        json!("x"),
        json!([]),
        json!([[]]),
        json!({}),
    ];
    let mut runs = 0;
    for case in root["cases"].as_array().unwrap() {
        // The causality trials have no inputs to change.
        if case["id"] == "D7.causality" {
            continue;
        }
        let mut pointers = Vec::new();
        places(&case["inputs"], "/inputs".to_string(), &mut pointers);
        for pointer in pointers {
            for replacement in &replacements {
                let mut changed = case.clone();
                *changed.pointer_mut(&pointer).unwrap() = replacement.clone();
                let mut cases = vec![changed];
                if case["id"] != "F1" {
                    cases.push(fixture.clone());
                }
                let file = GoldenFile::parse(&json!({ "cases": cases }).to_string()).unwrap();
                let report = file.check_case(case["id"].as_str().unwrap()).unwrap();
                assert_eq!(report.passed + report.failed + report.skipped, 1);
                runs += 1;
            }
        }
    }
    assert!(runs > 2000, "{runs}");
}

#[test]
fn no_change_to_the_shared_fixture_makes_the_checker_panic() {
    for (pointer, replacement) in [
        ("/Z", json!([])),
        ("/Z", json!([[]])),
        ("/Z", json!([[1.0]])),
        ("/Z", json!([[1e308, -1e308], [0.0, 1.0]])),
        ("/Z", json!([[0.0, 0.0, 0.0, 0.0]])),
        ("/X", json!([])),
        ("/X", json!([[], [], [], [], []])),
        ("/X", json!([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])),
        ("/expert_scale", json!([])),
        ("/expert_scale", json!("four")),
    ] {
        let mut root: Value = serde_json::from_str(TEXT).unwrap();
        let cases = root["cases"].as_array_mut().unwrap();
        cases.retain(|c| c["id"] != "D7.causality");
        let fixture = cases.iter_mut().find(|c| c["id"] == "F1").unwrap();
        *fixture["inputs"].pointer_mut(pointer).unwrap() = replacement;
        let report = GoldenFile::parse(&root.to_string()).unwrap().check();
        assert_eq!(report.passed + report.failed + report.skipped, 54);
        assert!(report.failed > 0);
    }
}
