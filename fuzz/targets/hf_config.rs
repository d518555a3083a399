//! `config.json`: any bytes are refused or give a configuration whose table of tensors can be laid out and written back.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mixtura_checkpoint::{HfConfig, StoredType, TokenIds, family_layout};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(config) = HfConfig::parse(bytes) {
        assert_eq!(HfConfig::parse(&config.to_json(StoredType::F32, &TokenIds::default())).as_ref(), Ok(&config));
        if config.layers * config.moe.as_ref().map_or(1, |moe| moe.experts) < 100 {
            family_layout(&config);
        }
    }
});
