//! One safetensors file, memory mapped: names, shapes, raw bytes, and values converted to f32.
//!
//! Opening reads and checks the header only; a tensor's bytes are paged in when they are asked for. F32 passes through,
//! BF16 and F16 widen exactly, F64 rounds to nearest. Everything else is [`CheckpointError::WrongDtype`].

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;

use crate::error::{CheckpointError, Result};
use crate::header::{Header, TensorInfo, parse_header};
use crate::mmap::MappedFile;

/// An open safetensors file.
#[derive(Debug)]
pub struct SafetensorsFile {
    map: MappedFile,
    header: Header,
    index: BTreeMap<String, usize>,
}

impl SafetensorsFile {
    /// Maps the file and checks its header against its size.
    pub fn open(path: &Path) -> Result<Self> {
        let map = MappedFile::open(path)?;
        let header =
            parse_header(&map).map_err(|source| CheckpointError::Header { path: path.to_path_buf(), source })?;
        let index = header.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(Self { map, header, index })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        self.map.path()
    }

    /// The tensors in the order of their data.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.header.tensors
    }

    /// The strings under `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// The bytes in front of the tensor data: length field and JSON.
    pub fn header_bytes(&self) -> &[u8] {
        &self.map[..self.header.data_begin]
    }

    /// The description of one tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&i| &self.header.tensors[i])
    }

    /// A tensor's bytes as stored.
    pub fn bytes(&self, tensor: &TensorInfo) -> &[u8] {
        &self.map[tensor.begin..tensor.end]
    }

    /// A tensor's values as f32, in row-major order. The caller knows its shape from [`Self::info`].
    pub fn read_f32(&self, tensor: &TensorInfo) -> Result<Vec<f32>> {
        let mut out = vec![0.0; tensor.elements()];
        self.read_range_f32(tensor, 0, &mut out)?;
        Ok(out)
    }

    /// Converts `out.len()` elements starting at element `first`, for readers that need a part of a large tensor.
    ///
    /// # Panics
    /// If the range leaves the tensor.
    pub fn read_range_f32(&self, tensor: &TensorInfo, first: usize, out: &mut [f32]) -> Result<()> {
        self.readable(tensor)?;
        assert!(first + out.len() <= tensor.elements(), "range of `{}` leaves its {:?}", tensor.name, tensor.shape);
        let width = tensor.dtype.bitsize() / 8;
        let bytes = &self.bytes(tensor)[first * width..(first + out.len()) * width];
        widen(tensor.dtype, bytes, out);
        Ok(())
    }

    /// Whether [`Self::read_f32`] would work, without touching the data.
    pub fn readable(&self, tensor: &TensorInfo) -> Result<()> {
        match tensor.dtype {
            Dtype::F32 | Dtype::BF16 | Dtype::F16 | Dtype::F64 => Ok(()),
            other => Err(CheckpointError::WrongDtype {
                path: self.path().to_path_buf(),
                tensor: tensor.name.clone(),
                found: other.to_string(),
            }),
        }
    }
}

/// Little-endian bytes of a readable type to f32.
fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => each(bytes, out, f32::from_le_bytes),
        Dtype::BF16 => each(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
        Dtype::F16 => each(bytes, out, |b| half::f16::from_le_bytes(b).to_f32()),
        Dtype::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
        other => unreachable!("`readable` refuses {other}"),
    }
}

fn each<const W: usize>(bytes: &[u8], out: &mut [f32], convert: impl Fn([u8; W]) -> f32) {
    let (words, rest) = bytes.as_chunks::<W>();
    debug_assert!(rest.is_empty() && words.len() == out.len());
    for (o, &w) in out.iter_mut().zip(words) {
        *o = convert(w);
    }
}
