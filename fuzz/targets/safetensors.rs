//! Safetensors headers and shard indices: any bytes are refused, or every tensor lies inside the file.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mixtura_checkpoint::{Manifest, ShardIndex, parse_header};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = parse_header(bytes) {
        let mut end = header.data_begin;
        for tensor in &header.tensors {
            assert!(tensor.begin == end && tensor.end >= tensor.begin);
            end = tensor.end;
        }
        assert_eq!(end, bytes.len());
    }
    if let Ok(index) = ShardIndex::parse(bytes) {
        assert!(index.shards().iter().all(|shard| !shard.contains('/')));
    }
    if let Ok(manifest) = Manifest::parse(bytes) {
        assert_eq!(Manifest::parse(&manifest.to_json()).as_ref(), Ok(&manifest));
    }
});
