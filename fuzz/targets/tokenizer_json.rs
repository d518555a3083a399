//! `tokenizer.json`: any bytes are a tokenizer or an error, and a tokenizer encodes, decodes and saves itself without a panic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mixtura_data::Tokenizer;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(tokenizer) = Tokenizer::from_json(bytes) {
        if let Ok(ids) = tokenizer.encode("Earth has 1 moon: \u{e9}\n") {
            assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()));
            let mut stream = tokenizer.stream();
            let pieces: String = ids.iter().map(|id| stream.push(*id)).collect();
            assert_eq!(pieces + &stream.finish(), tokenizer.decode(&ids));
        }
        tokenizer.to_json();
    }
});
