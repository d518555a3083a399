//! Token shards: tokens made once, read by memory map.
//!
//! ```text
//! offset  bytes
//!      0      8   magic "MIXTOKEN"
//!      8      4   version, little endian: 1, or 2 where the tokenizer is named
//!     12      4   bytes per token: 2 or 4
//!     16      8   number of tokens
//!     24      8   vocabulary size the tokens were made with
//!     32     32   blake3 of the tokens' bytes
//!     64     32   version 2 only: fingerprint of the tokenizer that made the tokens
//!     64 or 96    the tokens, little endian
//! ```
//!
//! Opening checks the header against the file's length and all tokens against the vocabulary; `verify` recomputes the hash.

// One memory map is opened here: the file's length was checked, and the reader never hands out a reference that outlives the map.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use super::foreign::what_it_is;
use crate::error::DataError;
use crate::tokenizer::Tokenizer;

const MAGIC: &[u8; 8] = b"MIXTOKEN";
/// Bytes in front of the tokens, in version 1.
const HEADER: usize = 64;
/// The same in version 2.
const NAMED_HEADER: usize = HEADER + 32;

/// Bytes per token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenWidth {
    /// Vocabularies of up to 65536.
    U16,
    /// All others.
    U32,
}

impl TokenWidth {
    /// The narrowest that holds every id of a vocabulary.
    pub fn for_vocab(vocab: usize) -> Self {
        if vocab <= 1 << 16 { Self::U16 } else { Self::U32 }
    }

    /// 2 or 4.
    pub fn bytes(self) -> usize {
        match self {
            Self::U16 => 2,
            Self::U32 => 4,
        }
    }
}

/// What stands in front of the tokens, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardHeader {
    /// Bytes per token.
    pub width: TokenWidth,
    /// Number of tokens.
    pub tokens: u64,
    /// Every token is below this.
    pub vocab: u64,
    /// blake3 of the tokens' bytes.
    pub hash: [u8; 32],
    /// [`Tokenizer::fingerprint`] of the tokenizer that made them, where it was recorded.
    pub tokenizer: Option<[u8; 32]>,
}

impl ShardHeader {
    /// Bytes in front of the tokens.
    pub fn bytes(&self) -> usize {
        if self.tokenizer.is_some() { NAMED_HEADER } else { HEADER }
    }

    /// Reads a header from the start of a file of `file_length` bytes; the reason where it is not one.
    pub fn parse(bytes: &[u8], file_length: u64) -> Result<Self, String> {
        if let Some(what) = what_it_is(bytes).filter(|_| !bytes.starts_with(MAGIC)) {
            return Err(format!("it is {what}"));
        }
        let Some(header) = bytes.first_chunk::<HEADER>() else {
            return Err(format!("{} bytes are too few for the header of {HEADER}", bytes.len()));
        };
        if &header[..8] != MAGIC {
            return Err(format!("it starts with {:?}, expected \"MIXTOKEN\"", String::from_utf8_lossy(&header[..8])));
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let long = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        let tokenizer = match word(8) {
            1 => None,
            2 => match bytes.get(HEADER..NAMED_HEADER) {
                Some(fingerprint) => Some(fingerprint.try_into().expect("thirty-two bytes")),
                None => return Err(format!("{} bytes are too few for the header of {NAMED_HEADER}", bytes.len())),
            },
            other => return Err(format!("version {other}, this program reads versions 1 and 2")),
        };
        let header_bytes = if tokenizer.is_some() { NAMED_HEADER } else { HEADER };
        let width = match word(12) {
            2 => TokenWidth::U16,
            4 => TokenWidth::U32,
            other => return Err(format!("{other} bytes per token, expected 2 or 4")),
        };
        let (tokens, vocab) = (long(16), long(24));
        let expected = tokens.checked_mul(width.bytes() as u64).and_then(|data| data.checked_add(header_bytes as u64));
        if expected != Some(file_length) {
            let promised = expected.map_or("more bytes than a file can have".into(), |bytes| format!("{bytes} bytes"));
            return Err(format!("its header promises {tokens} tokens ({promised}), the file has {file_length} bytes"));
        }
        let hash = header[32..].try_into().expect("thirty-two bytes");
        Ok(Self { width, tokens, vocab, hash, tokenizer })
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&(1 + u32::from(self.tokenizer.is_some())).to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.width.bytes() as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.tokens.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.vocab.to_le_bytes());
        bytes[32..].copy_from_slice(&self.hash);
        bytes.extend(self.tokenizer.iter().flatten());
        bytes
    }
}

/// Writes a shard; the file appears under its name only once it is complete.
///
/// ```
/// use mixtura_data::corpus::{ShardReader, ShardWriter};
/// let path = std::env::temp_dir().join(format!("doc-{}.tokens", std::process::id()));
/// let mut writer = ShardWriter::create(&path, 300).unwrap();
/// writer.push(&[1, 2, 299]).unwrap();
/// writer.finish().unwrap();
/// let shard = ShardReader::open(&path).unwrap();
/// assert_eq!((shard.len(), shard.get(2)), (3, 299));
/// shard.verify().unwrap();
/// # std::fs::remove_file(path).unwrap();
/// ```
pub struct ShardWriter {
    path: PathBuf,
    unfinished: PathBuf,
    file: BufWriter<File>,
    header: ShardHeader,
    hash: blake3::Hasher,
}

impl ShardWriter {
    /// Starts a shard of tokens below `vocab`, made by whatever made them.
    pub fn create(path: &Path, vocab: usize) -> Result<Self, DataError> {
        Self::start(path, vocab, None)
    }

    /// Starts a shard that remembers the tokenizer it is made with.
    pub fn create_with(path: &Path, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        Self::start(path, tokenizer.vocab_size(), Some(tokenizer.fingerprint()))
    }

    fn start(path: &Path, vocab: usize, tokenizer: Option<[u8; 32]>) -> Result<Self, DataError> {
        let unfinished = path.with_extension("tokens-unfinished");
        let io = |source| DataError::io(&unfinished, source);
        let mut file = BufWriter::new(File::create(&unfinished).map_err(io)?);
        let width = TokenWidth::for_vocab(vocab);
        let header = ShardHeader { width, tokens: 0, vocab: vocab as u64, hash: [0; 32], tokenizer };
        file.write_all(&header.to_bytes()).map_err(io)?;
        Ok(Self { path: path.into(), unfinished, file, header, hash: blake3::Hasher::new() })
    }

    /// Appends tokens.
    pub fn push(&mut self, ids: &[u32]) -> Result<(), DataError> {
        if let Some(id) = ids.iter().find(|id| u64::from(**id) >= self.header.vocab) {
            let reason = format!("token {id} is not below the vocabulary size {}", self.header.vocab);
            return Err(DataError::Shard { path: self.path.clone(), reason });
        }
        let bytes: Vec<u8> = match self.header.width {
            TokenWidth::U16 => ids.iter().flat_map(|id| (*id as u16).to_le_bytes()).collect(),
            TokenWidth::U32 => ids.iter().flat_map(|id| id.to_le_bytes()).collect(),
        };
        self.hash.update(&bytes);
        self.header.tokens += ids.len() as u64;
        self.file.write_all(&bytes).map_err(|source| DataError::io(&self.unfinished, source))
    }

    /// Tokens appended so far.
    pub fn tokens(&self) -> u64 {
        self.header.tokens
    }

    /// Removes what was written.
    pub fn abandon(self) {
        let _ = std::fs::remove_file(&self.unfinished);
    }

    /// Completes the header and gives the file its name.
    pub fn finish(mut self) -> Result<(), DataError> {
        self.header.hash = *self.hash.finalize().as_bytes();
        let io = |source| DataError::io(&self.unfinished, source);
        self.file.flush().map_err(io)?;
        let mut file = self.file.into_inner().map_err(|e| DataError::io(&self.unfinished, e.into_error()))?;
        file.seek(SeekFrom::Start(0)).map_err(io)?;
        file.write_all(&self.header.to_bytes()).map_err(io)?;
        file.sync_all().map_err(io)?;
        std::fs::rename(&self.unfinished, &self.path).map_err(|source| DataError::io(&self.path, source))
    }
}

/// A shard, memory mapped; clones share the map.
#[derive(Clone, Debug)]
pub struct ShardReader {
    path: PathBuf,
    header: ShardHeader,
    map: Arc<Mmap>,
}

impl ShardReader {
    /// Opens a shard and checks that the file is as long as its header says and that every token is below the vocabulary size.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let io = |source| DataError::io(path, source);
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        if length == 0 {
            return Err(DataError::Empty { path: path.into(), reason: "a token shard was expected".into() });
        }
        // SAFETY: the map is read-only and private to this reader. Should another process shorten the file meanwhile, reading past
        // the new end raises SIGBUS, which ends the program without touching memory; shards are renamed into place, never rewritten.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let shard = |reason| DataError::Shard { path: path.into(), reason };
        let header = ShardHeader::parse(&map, length).map_err(shard)?;
        let reader = Self { path: path.into(), header, map: Arc::new(map) };
        if reader.is_empty() {
            return Err(DataError::Empty { path: path.into(), reason: "the shard holds no tokens".into() });
        }
        let limit = reader.header.vocab;
        match (0..reader.len()).find(|at| u64::from(reader.get(*at)) >= limit) {
            Some(at) => {
                let reason =
                    format!("token {} at position {at} is not below its vocabulary size {limit}", reader.get(at));
                Err(DataError::Shard { path: path.into(), reason })
            }
            None => Ok(reader),
        }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.header.tokens as usize
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.header.tokens == 0
    }

    /// What the file says about itself.
    pub fn header(&self) -> &ShardHeader {
        &self.header
    }

    /// Refuses a tokenizer that the tokens were not made with, as far as the shard tells.
    pub fn check_tokenizer(&self, tokenizer: &Tokenizer) -> Result<(), DataError> {
        let (made_with, have) = (self.header.vocab, tokenizer.vocab_size() as u64);
        let refuse = |reason| Err(DataError::Shard { path: self.path.clone(), reason });
        if made_with > have {
            return refuse(format!("it was made with a vocabulary of {made_with}, the tokenizer has {have} entries"));
        }
        let found = tokenizer.fingerprint();
        match self.header.tokenizer {
            Some(expected) if expected != found => {
                let short = |hash: [u8; 32]| blake3::Hash::from_bytes(hash).to_hex()[..16].to_string();
                refuse(format!(
                    "it was made with a tokenizer of fingerprint {}, the one given has {}: its ids mean other words there. Give \
                     the tokenizer it was made with, or make it again (`mixtura tokenize`)",
                    short(expected),
                    short(found)
                ))
            }
            _ => Ok(()),
        }
    }

    /// The token at a position. Panics outside the shard.
    pub fn get(&self, at: usize) -> u32 {
        let data = &self.map[self.header.bytes()..];
        match self.header.width {
            TokenWidth::U16 => u32::from(u16::from_le_bytes(data[2 * at..2 * at + 2].try_into().expect("two bytes"))),
            TokenWidth::U32 => u32::from_le_bytes(data[4 * at..4 * at + 4].try_into().expect("four bytes")),
        }
    }

    /// Recomputes the hash over all tokens.
    pub fn verify(&self) -> Result<(), DataError> {
        let found = blake3::hash(&self.map[self.header.bytes()..]);
        if found.as_bytes() == &self.header.hash {
            return Ok(());
        }
        let expected = blake3::Hash::from_bytes(self.header.hash).to_hex();
        let reason = format!("its tokens hash to {}, its header says {expected}: it was damaged", found.to_hex());
        Err(DataError::Shard { path: self.path.clone(), reason })
    }
}
