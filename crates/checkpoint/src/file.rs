//! One safetensors file, memory mapped: names, shapes, raw bytes, and values converted to f32.
//!
//! Opening reads and checks the header only; a tensor's bytes are paged in when they are asked for. F32 passes through,
//! BF16 and F16 widen exactly, F64 rounds to nearest. Everything else is [`CheckpointError::WrongDtype`].

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;
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
        Ok(self.values(tensor, 0, tensor.elements())?.into_f32().into_owned())
    }

    /// `len` elements from element `first` on, as they are stored where the kernels know the type (f32, bf16), widened to f32 otherwise.
    /// They are borrowed from the file where it holds them aligned.
    ///
    /// # Panics
    /// If the range leaves the tensor.
    pub fn values(&self, tensor: &TensorInfo, first: usize, len: usize) -> Result<Values<'_>> {
        self.readable(tensor)?;
        assert!(first + len <= tensor.elements(), "range of `{}` leaves its {:?}", tensor.name, tensor.shape);
        let width = tensor.dtype.bitsize() / 8;
        let bytes = &self.bytes(tensor)[first * width..(first + len) * width];
        Ok(match tensor.dtype {
            Dtype::BF16 => Values::Bf16(numbers(bytes, u16::from_le_bytes)),
            Dtype::F32 => Values::F32(numbers(bytes, f32::from_le_bytes)),
            Dtype::F16 => Values::F32(Cow::Owned(each(bytes, |b| half::f16::from_le_bytes(b).to_f32()))),
            Dtype::F64 => Values::F32(Cow::Owned(each(bytes, |b| f64::from_le_bytes(b) as f32))),
            other => unreachable!("`readable` refuses {other}"),
        })
    }

    /// Lets go of the memory that a tensor's bytes take in this process since they were read; they can be read again.
    pub fn release(&self, tensor: &TensorInfo) {
        self.map.release(tensor.begin..tensor.end);
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

/// Numbers of a file in a type that the kernels know.
#[derive(Debug, Clone)]
pub enum Values<'a> {
    /// f32, or a type that is none of ours, widened.
    F32(Cow<'a, [f32]>),
    /// The bits of bf16.
    Bf16(Cow<'a, [u16]>),
}

impl<'a> Values<'a> {
    /// The values in f32; bf16 widens exactly.
    pub fn into_f32(self) -> Cow<'a, [f32]> {
        match self {
            Self::F32(values) => values,
            Self::Bf16(bits) => Cow::Owned(bits.iter().map(|&bits| widened(bits)).collect()),
        }
    }

    /// The values, if they are f32.
    pub fn f32(&self) -> Option<&[f32]> {
        if let Self::F32(values) = self { Some(values) } else { None }
    }

    /// The bits, if they are bf16.
    pub fn bf16(&self) -> Option<&[u16]> {
        if let Self::Bf16(bits) = self { Some(bits) } else { None }
    }

    /// The first element that is not finite, and its value.
    pub fn first_non_finite(&self) -> Option<(usize, f32)> {
        match self {
            Self::F32(values) => first(values, |v| v.to_bits() & 0x7f80_0000 == 0x7f80_0000).map(|at| (at, values[at])),
            Self::Bf16(bits) => first(bits, |v| v & 0x7f80 == 0x7f80).map(|at| (at, widened(bits[at]))),
        }
    }
}

/// The first element with a property that hardly any has: whole blocks are asked without a branch, on all cores.
fn first<T: Copy + Sync>(values: &[T], is_one: impl Fn(T) -> bool + Sync) -> Option<usize> {
    const BLOCK: usize = 1 << 14;
    let any = |block: &[T]| block.iter().fold(false, |any, &v| any | is_one(v));
    let block = values.par_chunks(BLOCK).position_first(any)?;
    values[block * BLOCK..].iter().position(|&v| is_one(v)).map(|at| block * BLOCK + at)
}

/// Little-endian numbers where they lie, or a copy if they lie unaligned or this machine is big-endian.
fn numbers<T: bytemuck::AnyBitPattern, const W: usize>(bytes: &[u8], read: impl Fn([u8; W]) -> T) -> Cow<'_, [T]> {
    match bytemuck::try_cast_slice(bytes) {
        Ok(numbers) if cfg!(target_endian = "little") => Cow::Borrowed(numbers),
        _ => Cow::Owned(each(bytes, read)),
    }
}

/// The numbers that words of `W` bytes stand for.
fn each<T, const W: usize>(bytes: &[u8], read: impl Fn([u8; W]) -> T) -> Vec<T> {
    let (words, rest) = bytes.as_chunks::<W>();
    debug_assert!(rest.is_empty());
    words.iter().map(|&word| read(word)).collect()
}

/// bf16, exactly.
fn widened(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}
