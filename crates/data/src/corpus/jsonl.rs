//! JSON lines: one object per line, with the text under a configurable field. Blank lines are allowed.

use std::path::Path;

use serde_json::Value;

use super::text::read_text;
use crate::error::DataError;

/// The documents of a JSON lines file.
pub fn read_jsonl(path: &Path, field: &str) -> Result<Vec<String>, DataError> {
    let text = read_text(path)?;
    documents_of_jsonl(&text, field, path)
}

/// The documents of JSON lines already in memory; `path` is for the error.
///
/// ```
/// use mixtura_data::corpus::documents_of_jsonl;
/// let lines = "{\"text\": \"one\"}\n\n{\"id\": 2, \"text\": \"two\"}\n";
/// assert_eq!(documents_of_jsonl(lines, "text", "x.jsonl".as_ref()).unwrap(), ["one", "two"]);
/// let error = documents_of_jsonl("{\"body\": \"one\"}", "text", "x.jsonl".as_ref()).unwrap_err();
/// assert_eq!(error.to_string(), "x.jsonl, line 1: there is no field \"text\"; the fields are \"body\" (set data.text_field)");
/// ```
pub fn documents_of_jsonl(text: &str, field: &str, path: &Path) -> Result<Vec<String>, DataError> {
    let mut documents = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let error = |reason: String| DataError::JsonLine { path: path.into(), line: index + 1, reason };
        let value: Value = serde_json::from_str(line).map_err(|e| error(format!("not JSON: {e}")))?;
        let Value::Object(mut object) = value else {
            return Err(error(format!("expected an object, found {}", kind(&value))));
        };
        match object.remove(field) {
            Some(Value::String(document)) if !document.is_empty() => documents.push(document),
            Some(Value::String(_)) => {}
            Some(other) => return Err(error(format!("field \"{field}\" is {}, expected a string", kind(&other)))),
            None => {
                let fields: Vec<String> = object.keys().take(8).map(|key| format!("{key:?}")).collect();
                let fields = if fields.is_empty() { "none".into() } else { fields.join(", ") };
                let reason = format!("there is no field \"{field}\"; the fields are {fields} (set data.text_field)");
                return Err(error(reason));
            }
        }
    }
    if documents.is_empty() {
        let reason = format!("no line has a non-empty string in field \"{field}\"");
        return Err(DataError::Empty { path: path.into(), reason });
    }
    Ok(documents)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
