//! Writing safetensors files tensor by tensor, hashing the bytes on their way out.
//!
//! The whole file is never in memory: the header follows from names, types and shapes alone, and each tensor's values are
//! made when its turn comes. Data is laid out widest type first, then by name, as the `safetensors` crate does, so that
//! every tensor is aligned to its type and the same tensors always give the same bytes.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use crate::atomic::write_file;
use crate::error::Result;

/// The number type in which f32 values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StoredType {
    /// As they are.
    #[default]
    F32,
    /// Rounded to nearest even bf16: half the size, what most published checkpoints use.
    Bf16,
}

impl StoredType {
    pub(crate) fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
        }
    }

    /// The name in `config.json`'s `torch_dtype`.
    pub fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        }
    }
}

/// A tensor to be written. `values` is asked once, when its turn comes.
pub struct TensorOut<'a> {
    /// Full name.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// How to store it.
    pub stored: StoredType,
    values: Box<dyn Fn() -> Cow<'a, [f32]> + 'a>,
}

impl<'a> TensorOut<'a> {
    /// A tensor whose values lie in memory.
    pub fn borrowed(name: impl Into<String>, shape: &[usize], values: &'a [f32]) -> Self {
        Self::lazy(name, shape, StoredType::F32, move || Cow::Borrowed(values))
    }

    /// A tensor whose values are computed when it is written, for example by transposing a slice of a larger one.
    pub fn lazy(
        name: impl Into<String>,
        shape: &[usize],
        stored: StoredType,
        values: impl Fn() -> Cow<'a, [f32]> + 'a,
    ) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), stored, values: Box::new(values) }
    }

    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    pub(crate) fn byte_len(&self) -> usize {
        self.elements() * self.stored.dtype().bitsize() / 8
    }
}

/// What was written for one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenTensor {
    /// Full name.
    pub name: String,
    /// Stored type, as in the header.
    pub dtype: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// blake3 of the stored bytes, hexadecimal.
    pub blake3: String,
}

/// A finished file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenFile {
    /// Size of the file.
    pub bytes: u64,
    /// blake3 of length field and JSON header, hexadecimal.
    pub header_blake3: String,
    /// In the order of the data.
    pub tensors: Vec<WrittenTensor>,
}

/// Writes `tensors` to `path`, atomically. `__metadata__` is `metadata` plus `{"format": "pt"}`, which Hugging Face readers
/// insist on.
pub fn write_safetensors(
    path: &Path,
    tensors: Vec<TensorOut>,
    metadata: &BTreeMap<String, String>,
) -> Result<WrittenFile> {
    write_file(path, |out| write_to(out, tensors, metadata))
}

/// As [`write_safetensors`], to any writer.
///
/// # Panics
/// If two tensors have one name or a tensor's values do not fill its shape: both are mistakes of the caller.
pub fn write_to(
    out: &mut dyn Write,
    mut tensors: Vec<TensorOut>,
    metadata: &BTreeMap<String, String>,
) -> io::Result<WrittenFile> {
    tensors.sort_by(|a, b| b.stored.dtype().cmp(&a.stored.dtype()).then_with(|| a.name.cmp(&b.name)));
    let header = header_bytes(&tensors, metadata)?;
    out.write_all(&header)?;
    let mut bytes = header.len() as u64;
    let mut written = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let values = (tensor.values)();
        assert_eq!(
            values.len(),
            tensor.elements(),
            "tensor `{}` of shape {:?} was given {} values",
            tensor.name,
            tensor.shape,
            values.len()
        );
        let mut hasher = blake3::Hasher::new();
        write_values(out, &mut hasher, tensor.stored, &values)?;
        bytes += tensor.byte_len() as u64;
        written.push(WrittenTensor {
            dtype: tensor.stored.dtype().to_string(),
            shape: tensor.shape,
            name: tensor.name,
            blake3: hasher.finalize().to_hex().to_string(),
        });
    }
    Ok(WrittenFile { bytes, header_blake3: blake3::hash(&header).to_hex().to_string(), tensors: written })
}

fn header_bytes(tensors: &[TensorOut], metadata: &BTreeMap<String, String>) -> io::Result<Vec<u8>> {
    let mut metadata = metadata.clone();
    metadata.entry("format".into()).or_insert_with(|| "pt".into());
    let mut json = format!("{{\"__metadata__\":{}", serde_json::to_string(&metadata)?);
    let mut begin = 0;
    let mut names = BTreeSet::new();
    for t in tensors {
        assert!(names.insert(&t.name), "tensor `{}` is written twice", t.name);
        let end = begin + t.byte_len();
        let (name, dtype) = (serde_json::to_string(&t.name)?, serde_json::to_string(&t.stored.dtype())?);
        json += &format!(",{name}:{{\"dtype\":{dtype},\"shape\":{:?},\"data_offsets\":[{begin},{end}]}}", t.shape);
        begin = end;
    }
    json.push('}');
    // The format library must agree before a byte reaches the disk.
    serde_json::from_str::<Metadata>(&json)?;
    let padded = json.len().next_multiple_of(8);
    let mut header = Vec::with_capacity(8 + padded);
    header.extend_from_slice(&(padded as u64).to_le_bytes());
    header.extend_from_slice(json.as_bytes());
    header.resize(8 + padded, b' ');
    Ok(header)
}

/// 64 KiB at a time: the converted bytes stay in the second-level cache for the hash and the copy.
const CHUNK: usize = 16 * 1024;

fn write_values(
    out: &mut dyn Write,
    hasher: &mut blake3::Hasher,
    stored: StoredType,
    values: &[f32],
) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(4 * CHUNK);
    for chunk in values.chunks(CHUNK) {
        bytes.clear();
        match stored {
            StoredType::F32 => bytes.extend(chunk.iter().flat_map(|v| v.to_le_bytes())),
            StoredType::Bf16 => bytes.extend(chunk.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes())),
        }
        hasher.update(&bytes);
        out.write_all(&bytes)?;
    }
    Ok(())
}
