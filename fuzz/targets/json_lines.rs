//! JSON lines: any text is a list of documents or an error that names a line.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use mixtura_data::corpus::documents_of_jsonl;

fuzz_target!(|text: &str| {
    if let Ok(documents) = documents_of_jsonl(text, "text", Path::new("fuzz.jsonl")) {
        assert!(!documents.is_empty() && documents.iter().all(|document| !document.is_empty()));
    }
});
