//! Propositions and questions typed by hand: what is read is written back as it was read.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mixtura_data::propositions::{Proposition, grade, parse_verdict};

fuzz_target!(|text: &str| {
    parse_verdict(text);
    grade(&Proposition::canonical(), text);
    if let Ok(item) = Proposition::parse(text) {
        assert!(item.text() == text || item.question() == text);
        assert!(grade(&item, &item.answer()).reasoning_right);
    }
});
