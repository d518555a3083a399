//! JSON lines: one object per line, with the text under a configurable field. A JSON array of such objects is read as well.
//!
//! Blank lines, carriage returns and a byte order mark are passed over. Only the field that holds the text is read: what is in the
//! others need not even be standard JSON, since Python writes `NaN` and `Infinity` and halves of surrogate pairs. Of two fields of one
//! name the last counts, as in Python.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use crate::error::DataError;

/// Fields that other collections keep their text in: the first of these that is there is suggested.
const USUAL_FIELDS: [&str; 7] = ["text", "content", "body", "document", "story", "raw_content", "completion"];

/// The documents of JSON lines already in memory; `path` is for the error.
///
/// ```
/// use mixtura_data::corpus::documents_of_jsonl;
/// let documents = |text: &str| documents_of_jsonl(text, "text", "x.jsonl".as_ref());
/// let lines = "{\"text\": \"one\"}\n\n{\"score\": NaN, \"text\": \"two\"}\r\n";
/// assert_eq!(documents(lines).unwrap(), ["one", "two"]);
/// assert_eq!(documents("[{\"text\": \"one\"},\n {\"text\": \"two\"}]").unwrap(), ["one", "two"]);
/// let error = documents("{\"body\": \"one\"}").unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "x.jsonl, line 1: there is no field \"text\"; the fields are \"body\" (the field is named by data.text_field = \"body\" in a \
///      config, by --text-field body for eval and inspect)"
/// );
/// ```
pub fn documents_of_jsonl(text: &str, field: &str, path: &Path) -> Result<Vec<String>, DataError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let documents = if text.trim_start().starts_with('[') {
        documents_of_array(text, field, path)?
    } else {
        documents_of_lines(text, field, path)?
    };
    if documents.is_empty() {
        let reason = format!("no object has a non-empty string in field \"{field}\"");
        return Err(DataError::Empty { path: path.into(), reason });
    }
    Ok(documents)
}

fn documents_of_lines(text: &str, field: &str, path: &Path) -> Result<Vec<String>, DataError> {
    let mut documents = Vec::new();
    // Only a line feed ends a line: U+2028 and its like may stand in a JSON string.
    for (index, line) in text.split('\n').enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let error = |reason: String| DataError::JsonLine { path: path.into(), line: index + 1, reason };
        let element = parse(line, Element { field }).map_err(|e| error(not_json(&e, line, false)))?;
        documents.extend(element.document(field).map_err(error)?);
    }
    Ok(documents)
}

fn documents_of_array(text: &str, field: &str, path: &Path) -> Result<Vec<String>, DataError> {
    let elements = parse(text, Elements { field }).map_err(|e| {
        let reason = not_json(&e, text, true);
        DataError::JsonLine { path: path.into(), line: e.line().max(1), reason }
    })?;
    let mut documents = Vec::new();
    for (index, element) in elements.into_iter().enumerate() {
        let error = |reason: String| DataError::JsonElement { path: path.into(), element: index + 1, reason };
        documents.extend(element.document(field).map_err(error)?);
    }
    Ok(documents)
}

/// Parses as JSON, and if that fails as what Python writes.
fn parse<S, V>(text: &str, seed: S) -> Result<V, serde_json::Error>
where
    S: for<'de> DeserializeSeed<'de, Value = V> + Copy,
{
    let whole = |text: &str| {
        let mut deserializer = serde_json::Deserializer::from_str(text);
        let value = seed.deserialize(&mut deserializer)?;
        deserializer.end().map(|()| value)
    };
    whole(text).or_else(|error| match without_python_numbers(text) {
        Cow::Owned(text) => whole(&text),
        Cow::Borrowed(_) => Err(error),
    })
}

/// `NaN`, `Infinity` and `-Infinity` outside strings as zeros of the same length, so that columns stay what they are.
fn without_python_numbers(text: &str) -> Cow<'_, str> {
    let mut changed: Option<Vec<u8>> = None;
    let (bytes, mut at, mut in_string) = (text.as_bytes(), 0, false);
    while at < bytes.len() {
        match bytes[at] {
            b'\\' if in_string => at += 1,
            b'"' => in_string = !in_string,
            b'N' | b'I' if !in_string => {
                let rest = &bytes[at..];
                if let Some(word) = ["NaN", "Infinity"].into_iter().find(|word| rest.starts_with(word.as_bytes())) {
                    let changed = changed.get_or_insert_with(|| bytes.to_vec());
                    changed[at..at + word.len()].fill(b' ');
                    changed[at] = b'0';
                }
            }
            _ => {}
        }
        at += 1;
    }
    changed.map_or(Cow::Borrowed(text), |bytes| Cow::Owned(String::from_utf8(bytes).expect("ASCII became ASCII")))
}

/// Why a line or an array is no JSON, as far as a person can be helped.
fn not_json(error: &serde_json::Error, text: &str, is_array: bool) -> String {
    let said = error.to_string();
    let said = said.split(" at line ").next().unwrap_or(&said);
    let what = if is_array { "not a JSON array of objects" } else { "not JSON" };
    let help = if said.contains("surrogate") || said.contains("end of hex escape") {
        "; a \\u escape that is half of a surrogate pair stands for no character"
    } else if error.is_eof() && !is_array && text.trim_start().starts_with('{') {
        "; the object does not end on its line: the file was cut off, or its objects go over several lines (`jq -c .` puts each on one)"
    } else if text.trim_end().ends_with(',') {
        "; a comma follows the object, and JSON lines have none between them"
    } else {
        ""
    };
    format!("{what}: {said} at column {}{help}", error.column())
}

/// What a line or an element of an array turned out to be.
enum Found {
    /// An object with the field.
    Field(Value),
    /// An object without it, and its first fields.
    NoField(Vec<String>),
    /// Something else.
    NoObject(&'static str),
}

impl Found {
    /// The text, if there is any; else what is wrong.
    fn document(self, field: &str) -> Result<Option<String>, String> {
        match self {
            Self::Field(Value::String(text)) => Ok(Some(text).filter(|text| !text.is_empty())),
            Self::Field(other) => Err(format!("field \"{field}\" is {}, expected a string", kind(&other))),
            Self::NoObject(kind) => Err(format!("expected an object, found {kind}")),
            Self::NoField(fields) => {
                let listed: Vec<String> = fields.iter().take(8).map(|key| format!("{key:?}")).collect();
                let listed = if listed.is_empty() { "none".into() } else { listed.join(", ") };
                let usual = USUAL_FIELDS.iter().find(|usual| fields.iter().any(|field| field == *usual));
                let (given, typed) = usual.map_or((String::new(), "NAME"), |name| (format!(" = \"{name}\""), name));
                Err(format!(
                    "there is no field \"{field}\"; the fields are {listed} (the field is named by data.text_field{given} in a \
                     config, by --text-field {typed} for eval and inspect)"
                ))
            }
        }
    }
}

/// Reads one object, of which it keeps one field.
#[derive(Clone, Copy)]
struct Element<'a> {
    field: &'a str,
}

impl<'de> DeserializeSeed<'de> for Element<'_> {
    type Value = Found;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Found, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Element<'_> {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found, A::Error> {
        let (mut value, mut others) = (None, Vec::new());
        while let Some(key) = map.next_key::<String>()? {
            if key == self.field {
                value = Some(map.next_value()?);
                continue;
            }
            map.next_value::<IgnoredAny>()?;
            if others.len() < 64 {
                others.push(key);
            }
        }
        Ok(value.map_or(Found::NoField(others), Found::Field))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Found, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Found::NoObject("an array"))
    }

    fn visit_str<E>(self, _: &str) -> Result<Found, E> {
        Ok(Found::NoObject("a string"))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Found, E> {
        Ok(Found::NoObject("a boolean"))
    }

    fn visit_i64<E>(self, _: i64) -> Result<Found, E> {
        Ok(Found::NoObject("a number"))
    }

    fn visit_u64<E>(self, _: u64) -> Result<Found, E> {
        Ok(Found::NoObject("a number"))
    }

    fn visit_f64<E>(self, _: f64) -> Result<Found, E> {
        Ok(Found::NoObject("a number"))
    }

    fn visit_unit<E>(self) -> Result<Found, E> {
        Ok(Found::NoObject("null"))
    }
}

/// Reads an array of objects.
#[derive(Clone, Copy)]
struct Elements<'a> {
    field: &'a str,
}

impl<'de> DeserializeSeed<'de> for Elements<'_> {
    type Value = Vec<Found>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<Found>, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Elements<'_> {
    type Value = Vec<Found>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<Found>, A::Error> {
        let mut all = Vec::new();
        while let Some(found) = seq.next_element_seed(Element { field: self.field })? {
            all.push(found);
        }
        Ok(all)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(text: &str) -> Result<Vec<String>, String> {
        documents_of_jsonl(text, "text", "x.jsonl".as_ref()).map_err(|e| e.to_string())
    }

    #[test]
    fn fields_that_nobody_reads_may_hold_what_python_writes() {
        for other in ["NaN", "-Infinity", "[1, Infinity, {\"NaN\": NaN}]", "\"\\ud83d\"", "1e999", "\"\\\" NaN\""] {
            let line = format!("{{\"a\": {other}, \"text\": \"NaN stays, Infinity too\", \"b\": {other}}}");
            assert_eq!(documents(&line).as_deref(), Ok(&["NaN stays, Infinity too".to_string()][..]), "{line}");
        }
        assert!(documents("{\"text\": NaN}").unwrap_err().contains("a number, expected a string"));
        assert!(documents("{\"text\": \"x\", \"a\": nan}").unwrap_err().contains("not JSON"));
    }

    #[test]
    fn marks_line_ends_blanks_and_escapes_change_no_document() {
        let plain = documents("{\"text\": \"one\"}\n{\"text\": \"two\"}\n").unwrap();
        for text in [
            "\u{feff}{\"text\": \"one\"}\n{\"text\": \"two\"}\n",
            "{\"text\": \"one\"}\r\n\r\n{\"text\": \"two\"}\r\n",
            "{\"text\": \"one\"}\n   \n{\"text\": \"\"}\n{\"text\": \"two\"}",
            "{\"text\": \"zero\", \"text\": \"one\"}\n{\"te\\u0078t\": \"tw\\u006f\"}\n",
            "\u{feff} [{\"text\": \"one\"}, {\"text\": \"\"}, {\"text\": \"two\", \"x\": NaN}]\n",
            "[\n  {\n    \"text\": \"one\"\n  },\n  {\n    \"text\": \"two\"\n  }\n]",
        ] {
            assert_eq!(documents(text).unwrap(), plain, "{text}");
        }
        assert_eq!(documents("{\"text\": \"\\ud83d\\ude00 a\u{2028}b\"}").unwrap(), ["\u{1F600} a\u{2028}b"]);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place_and_a_way_out() {
        let content = &["\"content\", \"id\"", "data.text_field = \"content\"", "--text-field content"];
        for (text, words) in [
            ("{\"text\": \"x\"}\n{\"text\": null}", &["line 2", "null"][..]),
            ("{\"text\": [\"x\"]}", &["line 1", "an array"]),
            ("{\"content\": \"x\", \"id\": 1}", content),
            ("{\"messages\": []}", &["\"messages\"", "--text-field NAME"]),
            ("{\"text\": \"x\"},\n", &["line 1", "comma"]),
            ("{\"text\": \"x\"}\n{\"text\": \"y", &["line 2", "cut off"]),
            ("{\n\"text\": \"x\"\n}", &["line 1", "jq -c"]),
            ("{\"text\": \"\\ud83d here\"}", &["line 1", "surrogate"]),
            ("[{\"text\": \"x\"}, {\"id\": 1}]", &["element 2", "\"id\""]),
            ("[{\"text\": \"x\"},\n 3]", &["element 2", "a number"]),
            ("[{\"text\": \"x\"},\n", &["line", "array of objects"]),
            ("[{\"text\": \"x\"}]\n[{\"text\": \"y\"}]", &["line 2", "trailing"]),
            ("\"x\"", &["line 1", "a string"]),
            ("[]", &["empty", "non-empty string"]),
        ] {
            let error = documents(text).unwrap_err();
            words.iter().for_each(|word| assert!(error.contains(word), "{error} should say {word}"));
            assert!(!error.contains('\n'), "one paragraph: {error}");
        }
    }
}
