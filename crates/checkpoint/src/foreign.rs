//! What a file is that was taken for JSON or safetensors: named by its first bytes.

/// UTF-8 byte order mark, which is no JSON.
const BOM: &[u8] = b"\xef\xbb\xbf";

/// First bytes of what lies where a model's files should.
const BEGINNINGS: [(&[u8], &str); 11] = [
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; `git lfs pull` in its repository fetches it"),
    (b"GGUF", "a GGUF file, of llama.cpp; use the model's safetensors files"),
    (b"PK\x03\x04", "a ZIP archive, as PyTorch saves; use the model's safetensors files"),
    (b"\x80\x02", "a Python pickle, as PyTorch saves; use the model's safetensors files"),
    (b"\x80\x04", "a Python pickle; use the model's safetensors files"),
    (b"\x1f\x8b", "gzip-compressed; decompress it first"),
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8"),
    (b"<!DOCTYPE", "a web page, as a failed download leaves behind; download the file again"),
    (b"<!doctype", "a web page, as a failed download leaves behind; download the file again"),
    (b"<html", "a web page, as a failed download leaves behind; download the file again"),
];

/// What the bytes are: half a sentence that follows "it is".
pub(crate) fn what_it_is(bytes: &[u8]) -> Option<&'static str> {
    BEGINNINGS.iter().find(|(beginning, _)| bytes.starts_with(beginning)).map(|(_, what)| *what)
}

/// The JSON in a file's bytes: without a byte order mark, or what the file is instead.
pub(crate) fn json(bytes: &[u8]) -> Result<&[u8], &'static str> {
    match what_it_is(bytes) {
        Some(what) => Err(what),
        None => Ok(bytes.strip_prefix(BOM).unwrap_or(bytes)),
    }
}
