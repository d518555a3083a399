//! The files that a run reads: where they lie, and what they held.
//!
//! A config may name its files as one types them; a run names them from the root of the file system, so that they are the same files
//! from anywhere. What a file held is a hash: a file of the same name, or of the same length, is not the same file, and one that was
//! moved is. Text is hashed as it is read. Shards are large and mapped: they are hashed once, and again only if size, times or inode
//! differ from those under which the hash was taken.

use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::config::{DataConfig, TokenizerChoice};
use crate::corpus::ShardReader;
use crate::error::DataError;

/// A file whose times are younger than this when it is hashed may change once more without their changing: clocks of file systems
/// tick every few milliseconds, those of FAT every two seconds.
const SETTLED: Duration = Duration::from_secs(3);

/// What a data file held when it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileContent {
    /// The file.
    #[serde(with = "path_text")]
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// blake3 of its bytes, hexadecimal; of a shard, that of its tokens.
    pub blake3: String,
    /// Size, times and inode under which the hash holds without reading the file again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stamp: Option<String>,
}

impl FileContent {
    /// What a text file held.
    pub(crate) fn of_text(path: &Path, text: &str) -> Self {
        let blake3 = blake3::hash(text.as_bytes()).to_hex().to_string();
        Self { path: path.into(), bytes: text.len() as u64, blake3, stamp: None }
    }

    /// What a shard holds: taken from `known` where the file is the one hashed then, else hashed (which finds damage).
    pub(crate) fn of_shard(path: &Path, shard: &ShardReader, known: &[Self]) -> Result<Self, DataError> {
        let before = std::fs::metadata(path).map_err(|source| DataError::io(path, source))?;
        let stamp = stamp(&before);
        if let Some(same) = known.iter().find(|old| old.path == path && old.stamp.is_some() && old.stamp == stamp) {
            return Ok(same.clone());
        }
        shard.verify()?;
        let blake3 = blake3::Hash::from_bytes(shard.header().hash).to_hex().to_string();
        Ok(Self { path: path.into(), bytes: before.len(), blake3, stamp })
    }

    /// Without its directory and its times: for what leaves the run, such as an exported model.
    pub fn name_only(&self) -> Self {
        Self { path: name_of(&self.path), stamp: None, ..self.clone() }
    }

    /// Refuses files that hold something else than `recorded`; `was` says what the record belongs to.
    pub fn check(recorded: &[Self], found: &[Self], was: &str) -> Result<(), DataError> {
        match recorded.iter().zip(found).find(|(old, new)| (old.bytes, &old.blake3) != (new.bytes, &new.blake3)) {
            None => Ok(()),
            Some((old, new)) => Err(DataError::Changed {
                path: new.path.clone(),
                was: was.into(),
                recorded: old.content(),
                found: new.content(),
            }),
        }
    }

    /// Size and hash, for comparisons and messages.
    pub(crate) fn content(&self) -> String {
        format!("{} bytes, blake3 {}", self.bytes, &self.blake3[..self.blake3.len().min(16)])
    }
}

/// What changes with the file's content, unless someone takes great care; `None` where it may change again without this changing.
fn stamp(file: &Metadata) -> Option<String> {
    let modified = file.modified().ok()?;
    let settled = SystemTime::now().duration_since(modified).is_ok_and(|age| age > SETTLED);
    let modified = modified.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_nanos();
    #[cfg(unix)]
    let rest = {
        use std::os::unix::fs::MetadataExt;
        // The change time cannot be set by a program, so `touch` and `cp -p` do not hide an edit.
        format!("{}.{:09} {}", file.ctime(), file.ctime_nsec(), file.ino())
    };
    #[cfg(not(unix))]
    let rest = "";
    settled.then(|| format!("{} {modified} {rest}", file.len()))
}

impl DataConfig {
    /// The same files, named from the root of the file system.
    pub fn with_absolute_paths(mut self) -> Result<Self, DataError> {
        for path in self.files_mut() {
            if path.as_os_str().is_empty() {
                let expected = "the name of a file is needed".into();
                return Err(DataError::Config { key: "paths".into(), found: "\"\"".into(), expected });
            }
            *path = std::path::absolute(&*path).map_err(|source| DataError::io(path, source))?;
        }
        Ok(self)
    }

    /// The files' names without their directories: for what leaves the run, such as an exported model.
    pub fn with_names_only(mut self) -> Self {
        self.files_mut().for_each(|path| *path = name_of(path));
        self
    }

    /// Every file that the config names.
    fn files_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let tokenizer = match &mut self.tokenizer {
            Some(TokenizerChoice::File(path)) => Some(path),
            _ => None,
        };
        self.paths.iter_mut().chain(self.sources.iter_mut().map(|source| &mut source.path)).chain(tokenizer)
    }
}

fn name_of(path: &Path) -> PathBuf {
    path.file_name().map_or_else(|| path.into(), PathBuf::from)
}

/// A path as text and back. Text formats are UTF-8 and paths need not be: such a path is written as a `file:` URL, its odd bytes
/// as `%FF`.
pub(crate) mod path_text {
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serializer};

    const SCHEME: &str = "file:";

    /// The path itself where it is UTF-8, else a `file:` URL.
    pub fn to_text(path: &Path) -> String {
        match path.to_str() {
            // A name that looks like the URL form must not be taken for it.
            Some(text) if !text.starts_with(SCHEME) => text.into(),
            _ => {
                let byte = |&byte: &u8| match byte {
                    b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' => char::from(byte).to_string(),
                    other => format!("%{other:02X}"),
                };
                SCHEME.to_string() + &path.as_os_str().as_encoded_bytes().iter().map(byte).collect::<String>()
            }
        }
    }

    /// The path that a text means.
    pub fn from_text(text: &str) -> PathBuf {
        let Some(url) = text.strip_prefix(SCHEME) else { return text.into() };
        // `file:///a` and `file:/a` are the same file.
        let url = if url.starts_with("///") { &url[2..] } else { url };
        let (mut bytes, mut rest) = (Vec::new(), url.as_bytes());
        while let Some((&first, after)) = rest.split_first() {
            let code = after.get(..2).and_then(|two| std::str::from_utf8(two).ok());
            match code.and_then(|two| u8::from_str_radix(two, 16).ok()).filter(|_| first == b'%') {
                Some(byte) => (bytes.push(byte), rest = &after[2..]).1,
                None => (bytes.push(first), rest = after).1,
            }
        }
        of_bytes(bytes)
    }

    #[cfg(unix)]
    fn of_bytes(bytes: Vec<u8>) -> PathBuf {
        let path: std::ffi::OsString = std::os::unix::ffi::OsStringExt::from_vec(bytes);
        path.into()
    }

    #[cfg(not(unix))]
    fn of_bytes(bytes: Vec<u8>) -> PathBuf {
        String::from_utf8_lossy(&bytes).into_owned().into()
    }

    pub fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&to_text(path))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
        Ok(from_text(&String::deserialize(deserializer)?))
    }
}

/// A list of paths that may be written as one plain string.
pub(crate) mod paths_text {
    use std::fmt;
    use std::path::PathBuf;

    use serde::de::{SeqAccess, Visitor};
    use serde::{Deserializer, Serializer};

    use super::path_text::{from_text, to_text};

    pub fn serialize<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(paths.iter().map(|path| to_text(path)))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
        deserializer.deserialize_any(OneOrMany)
    }

    struct OneOrMany;

    impl<'de> Visitor<'de> for OneOrMany {
        type Value = Vec<PathBuf>;

        fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
            f.write_str("a file name or a list of file names")
        }

        fn visit_str<E: serde::de::Error>(self, path: &str) -> Result<Self::Value, E> {
            Ok(vec![from_text(path)])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut paths = Vec::new();
            while let Some(path) = list.next_element::<String>()? {
                paths.push(from_text(&path));
            }
            Ok(paths)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::path_text::{from_text, to_text};
    use super::*;

    #[test]
    fn every_path_comes_back_from_its_text() {
        for plain in ["a.txt", "/x/y z.txt", "50%.txt", "/d/é"] {
            assert_eq!(to_text(plain.as_ref()), plain);
            assert_eq!(from_text(plain), Path::new(plain));
        }
        assert_eq!(from_text(&to_text("file:a%20b".as_ref())), Path::new("file:a%20b"));
        assert_eq!(from_text("file:///a%20b"), Path::new("/a b"));
        #[cfg(unix)]
        for odd in [&b"/run\xff/a b.txt"[..], b"\xc3.txt", b"/%FF\xfe"] {
            let name: std::ffi::OsString = std::os::unix::ffi::OsStringExt::from_vec(odd.to_vec());
            let path = PathBuf::from(name);
            assert!(to_text(&path).starts_with("file:"), "{}", to_text(&path));
            assert_eq!(from_text(&to_text(&path)), path);
        }
    }

    #[test]
    fn a_shard_is_hashed_once_and_again_when_its_file_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tokens");
        let write = |token: u32, age: u64| {
            let mut writer = crate::corpus::ShardWriter::create(&path, 259).unwrap();
            writer.push(&[token; 100]).unwrap();
            writer.finish().unwrap();
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
        };
        let content =
            |known: &[FileContent]| FileContent::of_shard(&path, &ShardReader::open(&path).unwrap(), known).unwrap();
        write(7, 60);
        let first = content(&[]);
        // What is remembered is taken without a look at the tokens.
        let marked = FileContent { blake3: "remembered".into(), ..first.clone() };
        assert_eq!(content(std::slice::from_ref(&marked)), marked);
        // Another file of equal size and modification time has another inode and change time.
        write(8, 60);
        let second = content(&[marked]);
        assert_ne!(first.blake3, second.blake3);
        let error = FileContent::check(&[first], &[second], "the run").unwrap_err().to_string();
        assert!(error.contains("a.tokens") && error.contains("the run"), "{error}");
        // A file that was just written may be written again within one tick of the clock: nothing is remembered.
        write(9, 0);
        assert_eq!(content(&[]).stamp, None);
    }
}
