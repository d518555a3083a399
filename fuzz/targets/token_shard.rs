//! The header of a token shard: a header that is accepted promises exactly the file's length.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mixtura_data::corpus::ShardHeader;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = ShardHeader::parse(bytes, bytes.len() as u64) {
        assert_eq!(header.bytes() as u64 + header.tokens * header.width.bytes() as u64, bytes.len() as u64);
    }
});
