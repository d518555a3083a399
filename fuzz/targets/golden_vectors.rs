//! Golden-vector files: any text is refused or checked case by case, whatever the cases hold.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mixtura_routing::reference::golden::GoldenFile;

fuzz_target!(|text: &str| {
    if let Ok(file) = GoldenFile::parse(text) {
        file.check();
    }
});
