//! The safetensors header: eight bytes of length, a JSON object, then the data of all tensors without gaps.
//!
//! [`parse_header`] is a pure function on bytes. It checks the header itself first, so that an error names the tensor and
//! the bytes, and then asks the `safetensors` crate, which has the last word on what the format allows.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::error::HeaderError;
use crate::foreign::what_it_is;

/// The format's limit on the JSON part; larger ones are refused before anything is allocated.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes of the length field.
const PREFIX: usize = 8;

/// One tensor as the header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Full name.
    pub name: String,
    /// Stored type.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// First byte, counted from the start of the file.
    pub begin: usize,
    /// One past the last byte, counted from the start of the file.
    pub end: usize,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A checked header: every offset lies in the file, no two tensors overlap, every size follows from its shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Tensors in the order of their data.
    pub tensors: Vec<TensorInfo>,
    /// `__metadata__`, empty where the file has none.
    pub metadata: BTreeMap<String, String>,
    /// Where the tensor data starts.
    pub data_begin: usize,
}

/// Reads and checks the header of a whole safetensors file given as bytes.
pub fn parse_header(file: &[u8]) -> Result<Header, HeaderError> {
    let json = header_json(file)?;
    let data_begin = PREFIX + json.len();
    let entries: Entries = serde_json::from_str(json).map_err(|e| HeaderError::NotJson { reason: e.to_string() })?;

    let mut metadata = BTreeMap::new();
    let mut tensors = Vec::with_capacity(entries.0.len());
    let mut seen = BTreeSet::new();
    for (name, value) in entries.0 {
        if !seen.insert(name.clone()) {
            return Err(HeaderError::Duplicate { tensor: name });
        }
        if name == "__metadata__" {
            metadata = string_map(value)?;
        } else {
            tensors.push(tensor_entry(name, value)?);
        }
    }
    tensors.sort_by_key(|t| (t.begin, t.end));
    check_layout(&tensors, file.len() - data_begin)?;
    SafeTensors::read_metadata(file).map_err(|e| HeaderError::Format { reason: e.to_string() })?;

    for t in &mut tensors {
        t.begin += data_begin;
        t.end += data_begin;
    }
    Ok(Header { tensors, metadata, data_begin })
}

fn header_json(file: &[u8]) -> Result<&str, HeaderError> {
    let Some((prefix, rest)) = file.split_first_chunk::<PREFIX>() else {
        return Err(HeaderError::TooShort { len: file.len() });
    };
    let declared = u64::from_le_bytes(*prefix);
    // A real file may begin like a pickle or a UTF-16 text, if its header has just that length; its JSON follows.
    if let Some(what) = what_it_is(file).filter(|_| rest.first() != Some(&b'{')) {
        return Err(HeaderError::Foreign { what });
    }
    if declared > MAX_HEADER_BYTES {
        return Err(HeaderError::TooLarge { declared, limit: MAX_HEADER_BYTES });
    }
    let bytes =
        rest.get(..declared as usize).ok_or(HeaderError::TruncatedHeader { declared, available: rest.len() })?;
    std::str::from_utf8(bytes).map_err(|e| HeaderError::NotUtf8 { valid_up_to: e.valid_up_to() })
}

fn string_map(value: Value) -> Result<BTreeMap<String, String>, HeaderError> {
    let map: Result<Option<BTreeMap<String, String>>, _> = serde_json::from_value(value);
    map.map(Option::unwrap_or_default).map_err(|e| HeaderError::BadMetadata { reason: e.to_string() })
}

/// Offsets in the result count from the start of the data.
fn tensor_entry(name: String, value: Value) -> Result<TensorInfo, HeaderError> {
    #[derive(Deserialize)]
    struct Entry {
        dtype: Dtype,
        shape: Vec<usize>,
        data_offsets: (usize, usize),
    }
    match serde_json::from_value::<Entry>(value) {
        Ok(e) => {
            Ok(TensorInfo { name, dtype: e.dtype, shape: e.shape, begin: e.data_offsets.0, end: e.data_offsets.1 })
        }
        Err(e) => Err(HeaderError::BadEntry { tensor: name, reason: e.to_string() }),
    }
}

/// `tensors` are sorted by offset; together they must cover `available` bytes exactly.
fn check_layout(tensors: &[TensorInfo], available: usize) -> Result<(), HeaderError> {
    let mut covered = 0;
    let mut previous = "the header";
    for t in tensors {
        let elements = t.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let Some(bits) = elements.and_then(|n| n.checked_mul(t.dtype.bitsize())) else {
            return Err(HeaderError::Overflow { tensor: t.name.clone(), shape: t.shape.clone() });
        };
        let tensor = t.name.clone();
        if t.begin < covered || t.end < t.begin {
            let other = previous.to_string();
            return Err(HeaderError::Overlap { tensor, begin: t.begin, end: t.end, other, other_end: covered });
        }
        if t.begin > covered {
            return Err(HeaderError::Gap { tensor, from: covered, to: t.begin });
        }
        let (expected, found) = (bits.div_ceil(8), t.end - t.begin);
        if expected != found {
            let dtype = t.dtype.to_string();
            return Err(HeaderError::SizeMismatch { tensor, dtype, shape: t.shape.clone(), expected, found });
        }
        if t.end > available {
            return Err(HeaderError::Truncated { tensor, end: t.end, available });
        }
        covered = t.end;
        previous = &t.name;
    }
    if covered != available {
        return Err(HeaderError::TrailingBytes { described: covered, available });
    }
    Ok(())
}

/// The header's object with every pair kept: a map type would silently drop one of two equal names.
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a JSON object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Entries(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}
