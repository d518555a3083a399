//! Walks an expected and a computed JSON value together: numbers within a tolerance, everything else exactly.

use super::kind;
use serde_json::Value;

/// The outcome of one comparison.
pub struct Difference {
    /// Over all numbers compared.
    pub max_abs_diff: f64,
    /// The first thing out of tolerance, with its path; `None` if there is none.
    pub message: Option<String>,
}

/// Compares; every field of either side must be on both.
pub fn compare(expected: &Value, found: &Value, tol: f64) -> Difference {
    let mut difference = Difference { max_abs_diff: 0.0, message: None };
    walk("expected", expected, found, tol, &mut difference);
    difference
}

fn walk(path: &str, expected: &Value, found: &Value, tol: f64, out: &mut Difference) {
    let mut report = |message: String| {
        if out.message.is_none() {
            out.message = Some(format!("{path}: {message}"));
        }
    };
    match (expected, found) {
        (Value::Number(e), Value::Number(f)) => {
            let (e, f) = (e.as_f64().unwrap_or(f64::NAN), f.as_f64().unwrap_or(f64::NAN));
            let diff = (e - f).abs();
            // A tolerance of 0 in the file still allows the twelve digits it is printed with.
            let close = diff <= tol.max(1e-12 * e.abs().max(1.0));
            if !close {
                report(format!("expected {e}, computed {f} (difference {diff:.3e}, tolerance {tol:e})"));
            }
            if diff > out.max_abs_diff {
                out.max_abs_diff = diff;
            }
        }
        (Value::Array(e), Value::Array(f)) => {
            if e.len() != f.len() {
                report(format!("expected {} entries, computed {}", e.len(), f.len()));
            }
            for (i, (e, f)) in e.iter().zip(f).enumerate() {
                walk(&format!("{path}[{i}]"), e, f, tol, out);
            }
        }
        (Value::Object(e), Value::Object(f)) => {
            for key in f.keys().filter(|key| !e.contains_key(*key)) {
                report(format!("field {key} is missing from the file"));
            }
            for (key, e) in e {
                match f.get(key) {
                    None => {
                        if out.message.is_none() {
                            out.message = Some(format!("{path}.{key}: not a field this case computes"));
                        }
                    }
                    Some(f) => walk(&format!("{path}.{key}"), e, f, tol, out),
                }
            }
        }
        (e, f) if e == f => {}
        (e, f) => report(format!("expected {} ({e}), computed {} ({f})", kind(e), kind(f))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_first_difference_is_named_with_its_path() {
        let difference = compare(&json!({"a": [1.0, 2.0]}), &json!({"a": [1.0, 2.5]}), 1e-6);
        assert_eq!(difference.max_abs_diff, 0.5);
        assert!(difference.message.unwrap().starts_with("expected.a[1]: expected 2, computed 2.5"));
    }

    #[test]
    fn missing_and_extra_fields_and_not_a_number_are_differences() {
        assert!(compare(&json!({}), &json!({"a": 1}), 1.0).message.unwrap().contains("field a is missing"));
        assert!(compare(&json!({"b": 1}), &json!({}), 1.0).message.unwrap().contains("b: not a field"));
        assert!(compare(&json!([1.0]), &json!([f64::NAN]), 1.0).message.is_some());
        assert!(compare(&json!([1, 2]), &json!([1]), 1.0).message.unwrap().contains("2 entries, computed 1"));
    }
}
