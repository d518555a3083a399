//! The published vectors pass, other numbers under the same ids pass or fail for the right reason, bad files are refused.

use mixtura_routing::reference::golden::{GoldenError, GoldenFile, Status};
use serde_json::{Value, json};

const TEXT: &str = include_str!("../../../fixtures/golden.json");

#[test]
fn every_published_case_of_this_crate_passes() {
    let report = GoldenFile::parse(TEXT).unwrap().check();
    for case in &report.cases {
        println!("{:22} {:?} {:?} {}", case.id, case.status, case.max_abs_diff, case.message);
    }
    assert_eq!(report.failed, 0);
    assert_eq!((report.passed, report.skipped), (48, 7));
}

#[test]
fn a_report_serialises_to_the_documented_keys() {
    let report = GoldenFile::parse(TEXT).unwrap().check_case("E1.mixtral").unwrap();
    let value = serde_json::to_value(&report).unwrap();
    assert_eq!(value["passed"], 1);
    assert_eq!(value["cases"][0]["id"], "E1.mixtral");
    assert_eq!(value["cases"][0]["status"], "passed");
    assert_eq!(value["cases"][0]["message"], "");
    assert!(value["cases"][0]["max_abs_diff"].as_f64().unwrap() < 1e-9);
    let keys: Vec<&String> = value.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["cases", "failed", "passed", "skipped"]);
}

/// The file with one edit applied to its JSON.
fn edited(edit: impl Fn(&mut Value)) -> GoldenFile {
    let mut root: Value = serde_json::from_str(TEXT).unwrap();
    edit(&mut root);
    GoldenFile::parse(&root.to_string()).unwrap()
}

fn case_mut<'a>(root: &'a mut Value, id: &str) -> &'a mut Value {
    root["cases"].as_array_mut().unwrap().iter_mut().find(|c| c["id"] == id).unwrap()
}

fn message(file: &GoldenFile, id: &str) -> String {
    let report = file.check_case(id).unwrap();
    assert_eq!(report.cases[0].status, Status::Failed, "{id}");
    report.cases[0].message.clone()
}

#[test]
fn a_wrong_number_is_found_and_named() {
    let file = edited(|root| case_mut(root, "C2.switch")["expected"]["aux"] = json!(1.6));
    assert!(message(&file, "C2.switch").starts_with("expected.aux: expected 1.6, computed 1.5007"));
}

#[test]
fn other_inputs_give_other_results() {
    let file = edited(|root| case_mut(root, "F1")["inputs"]["Z"][0][0] = json!(-3.0));
    assert!(message(&file, "E14.olmoe").starts_with("expected.lbl"));
}

#[test]
fn missing_fields_and_wrong_kinds_are_reported_with_their_names() {
    let file = edited(|root| {
        case_mut(root, "E2.dropless")["inputs"].as_object_mut().unwrap().remove("block");
        case_mut(root, "E1.mixtral")["inputs"]["k"] = json!("two");
        case_mut(root, "C2.switch")["expected"].as_object_mut().unwrap().remove("f");
        case_mut(root, "E14.olmoe")["inputs"]["k"] = json!(9);
        case_mut(root, "B1.noisy_topk")["inputs"]["eps"][1] = json!([1.0]);
    });
    assert_eq!(message(&file, "E2.dropless"), "case E2.dropless: field inputs.block is missing");
    assert!(message(&file, "E1.mixtral").contains("inputs.k should be a whole number of at most 2^20, found \"two\""));
    assert!(message(&file, "C2.switch").contains("field f is missing"));
    assert!(message(&file, "E14.olmoe").contains("top_k = 9 is not possible with 4 experts"));
    assert!(message(&file, "B1.noisy_topk").contains("rows of 4"));
}

#[test]
fn an_unknown_id_fails_and_names_the_nearest() {
    let file = edited(|root| case_mut(root, "E1.mixtral")["id"] = json!("E1.mixtrall"));
    assert_eq!(message(&file, "E1.mixtrall"), "unknown case id; nearest known id is E1.mixtral");
    let error = file.check_case("E14.olmo").unwrap_err();
    assert_eq!(error, GoldenError::NoSuchCase { case: "E14.olmo".into(), nearest: Some("E14.olmoe".into()) });
}

#[test]
fn files_that_are_not_golden_vectors_are_refused() {
    for text in
        ["", "{", "[]", "{}", "{\"cases\": 3}", "{\"cases\": [{}]}", "{\"cases\": [{\"id\": \"F1\", \"tol\": 1}]}"]
    {
        assert!(GoldenFile::parse(text).is_err(), "{text}");
    }
    let twice =
        r#"{"cases": [{"id":"F1","tol":1,"inputs":{},"expected":{}}, {"id":"F1","tol":1,"inputs":{},"expected":{}}]}"#;
    assert_eq!(GoldenFile::parse(twice).unwrap_err(), GoldenError::Duplicate { case: "F1".into() });
}
