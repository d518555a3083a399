//! What a file is that was taken for text: named by its first bytes, with what would make text of it.

/// UTF-8 byte order mark: some editors put it first. It is no part of the text.
pub(crate) const BOM: &[u8] = b"\xef\xbb\xbf";

/// First bytes of what people hand over instead of UTF-8 text. Longer beginnings come before shorter ones that they contain.
const BEGINNINGS: [(&[u8], &str); 18] = [
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; `git lfs pull` fetches it"),
    (b"\xff\xfe\x00\x00", "UTF-32 text; save it as UTF-8 (`iconv -f UTF-32 -t UTF-8`)"),
    (b"\x00\x00\xfe\xff", "UTF-32 text; save it as UTF-8 (`iconv -f UTF-32 -t UTF-8`)"),
    (b"\xff\xfe", "UTF-16 text; save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`)"),
    (b"\xfe\xff", "UTF-16 text; save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`)"),
    (b"\x1f\x8b", "gzip-compressed; decompress it first (`gunzip`)"),
    (b"\x28\xb5\x2f\xfd", "Zstandard-compressed; decompress it first (`zstd -d`)"),
    (b"\xfd7zXZ\x00", "xz-compressed; decompress it first (`xz -d`)"),
    (b"BZh", "bzip2-compressed; decompress it first (`bunzip2`)"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it first"),
    (b"PK\x03\x04", "a ZIP archive (or a format made of one, as .docx and .npz); unpack it first"),
    (b"PAR1", "a Parquet table; write its text column as JSON lines"),
    (b"ARROW1", "an Arrow file; write its text column as JSON lines"),
    (b"%PDF-", "a PDF document; extract its text first (`pdftotext`)"),
    (b"\x7fELF", "an executable"),
    (b"\x93NUMPY", "a NumPy array; write tokens as a token shard"),
    (b"MIXTOKEN", "a token shard; use kind = \"shards\", and the ending .tokens for `eval`"),
    (b"SQLite format 3\x00", "an SQLite database; write its text column as JSON lines"),
];

/// What the bytes are, if not text: half a sentence that follows "it is".
pub(crate) fn what_it_is(bytes: &[u8]) -> Option<&'static str> {
    if let Some((_, what)) = BEGINNINGS.iter().find(|(beginning, _)| bytes.starts_with(beginning)) {
        return Some(what);
    }
    // Latin letters in UTF-16 have a NUL in every pair of bytes.
    let start = &bytes[..bytes.len().min(64) / 2 * 2];
    let nul = |odd: usize| start.len() >= 4 && start.chunks_exact(2).all(|pair| pair[odd] == 0 && pair[1 - odd] != 0);
    (nul(0) || nul(1))
        .then_some("UTF-16 text without a byte order mark; save it as UTF-8 (`iconv -f UTF-16LE -t UTF-8`)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_text_is_named_by_its_first_bytes() {
        let utf16: Vec<u8> = "plain words".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let marked: Vec<u8> = "\u{feff}plain".encode_utf16().flat_map(u16::to_be_bytes).collect();
        for (bytes, word) in [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n".as_slice(), "git lfs pull"),
            (&utf16, "UTF-16"),
            (&marked, "UTF-16"),
            (b"\x1f\x8b\x08", "gzip"),
            (b"PAR1", "Parquet"),
            (b"\xff\xfe\x00\x00a\x00\x00\x00", "UTF-32"),
        ] {
            assert!(what_it_is(bytes).is_some_and(|what| what.contains(word)), "{word}");
        }
        for text in ["", "version two of a text", "BZ is a code", "a", "PARIS", "日本"] {
            assert_eq!(what_it_is(text.as_bytes()), None, "{text}");
        }
    }
}
