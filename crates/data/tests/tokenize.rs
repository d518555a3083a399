//! Token shards made from text: the tokens that training would make, a block at a time, and the tokenizer remembered.

use std::path::PathBuf;

use mixtura_data::corpus::{ShardReader, Tokenized, tokenize_files};
use mixtura_data::{DataConfig, DataKind, Tokenizer, TokenizerChoice, open};

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn out(&self) -> PathBuf {
        self.0.path().join("out.tokens")
    }

    fn tokenize(&self, files: &[PathBuf], tokenizer: &Tokenizer) -> Result<Tokenized, mixtura_data::DataError> {
        tokenize_files(files, "text", tokenizer, &self.out(), |_, _| true).map(|made| made.unwrap())
    }

    fn tokens(&self) -> Vec<u32> {
        let shard = ShardReader::open(&self.out()).unwrap();
        shard.verify().unwrap();
        (0..shard.len()).map(|at| shard.get(at)).collect()
    }
}

fn llama() -> Tokenizer {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/hf/tokenizers/llama");
    Tokenizer::from_file(&folder.join("tokenizer.json")).unwrap()
}

#[test]
fn a_shard_holds_what_training_would_read_whatever_the_blocks() {
    let place = Place::new();
    // Five MiB are two blocks; the characters of two and four bytes meet the block's end somewhere.
    let text = "The quick brown fox é jumps 🦊 over the lazy dog.\nEvery expert takes some.\n".repeat(70_000);
    let file = place.write("a.txt", &text);
    for tokenizer in [Tokenizer::byte(), llama()] {
        let made = place.tokenize(std::slice::from_ref(&file), &tokenizer).unwrap();
        let mut expected = tokenizer.encode(&text).unwrap();
        expected.extend(tokenizer.eos());
        assert_eq!(made, Tokenized { documents: 1, tokens: expected.len() as u64, bytes: text.len() as u64 });
        assert!(place.tokens() == expected);
    }
}

#[test]
fn lines_of_json_are_documents_and_errors_name_the_line_of_the_file() {
    let place = Place::new();
    let tokenizer = Tokenizer::byte();
    let line = |i: usize| format!("{{\"id\": {i}, \"text\": \"document {i} é\"}}\n");
    // Five MB of lines, a byte order mark in front, a blank line and an empty document among them, no line's end at the end.
    let mut lines = String::from("\u{feff}");
    (0..130_000).for_each(|i| lines += &line(i));
    lines += "\n{\"text\": \"\"}\n{\"text\": \"last\"}";
    let file = place.write("a.jsonl", &lines);
    let made = place.tokenize(&[file], &tokenizer).unwrap();
    assert_eq!((made.documents, made.bytes), (130_001, lines.len() as u64));
    let tokens = place.tokens();
    let ends = tokens.iter().filter(|id| Some(**id) == tokenizer.eos()).count();
    assert_eq!(ends, 130_001);
    assert!(tokenizer.decode(&tokens).starts_with("document 0 édocument 1 é"));
    assert!(tokenizer.decode(&tokens).ends_with("document 129999 élast"));

    let wrong = lines.replace("\"text\": \"last\"", "\"body\": \"last\"");
    let error = place.tokenize(&[place.write("b.ndjson", wrong)], &tokenizer).unwrap_err().to_string();
    assert!(error.contains("b.ndjson, line 130003") && error.contains("\"body\""), "{error}");
}

#[test]
fn what_is_no_text_is_refused_and_leaves_nothing() {
    let place = Place::new();
    let tokenizer = Tokenizer::byte();
    let long = "word ".repeat(1 << 20);
    let with = |bytes: &[u8]| [long.as_bytes(), bytes].concat();
    for (bytes, words) in [
        (Vec::new(), "0 bytes"),
        (b" \n \n".to_vec(), "white space"),
        (with(b"\xff"), "byte 0xff at byte 5242880"),
        (with(b"a\x00"), "NUL byte (a binary file?) at byte 5242881"),
        (with("é".as_bytes().split_last().unwrap().1), "byte 0xc3 at byte 5242880"),
    ] {
        let error = place.tokenize(&[place.write("x.txt", bytes)], &tokenizer).unwrap_err().to_string();
        assert!(error.contains("x.txt") && error.contains(words), "{error}");
        let left: Vec<_> = std::fs::read_dir(place.0.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["x.txt"]);
    }
    let file = place.write("x.txt", &long);
    let stopped = tokenize_files(&[file], "text", &tokenizer, &place.out(), |_, _| false).unwrap();
    assert_eq!((stopped, place.out().exists()), (None, false));
}

#[test]
fn a_shard_trains_with_its_own_tokenizer_and_with_no_other() {
    let place = Place::new();
    let file = place.write("a.txt", "The quick brown fox jumps over the lazy dog.\n".repeat(200));
    let own = Tokenizer::train_bpe([std::fs::read_to_string(&file).unwrap()], 270).unwrap();
    let path = place.write("tokenizer.json", own.to_json());
    place.tokenize(&[file], &own).unwrap();
    let config = |tokenizer: TokenizerChoice| DataConfig {
        kind: DataKind::Shards,
        paths: vec![place.out()],
        tokenizer: Some(tokenizer),
        context: 32,
        batch: 2,
        ..DataConfig::default()
    };
    let mut data = open(&config(TokenizerChoice::File(path))).unwrap();
    let batch = data.train.next_batch();
    assert!(data.tokenizer.decode(&batch.ids[..batch.seq]).contains("fox"));

    // Of the same size, so that the vocabulary alone tells nothing.
    let other = Tokenizer::train_bpe(["she sells sea shells by the sea shore ".repeat(50)], 270).unwrap();
    let other = place.write("other.json", other.to_json());
    let error = open(&config(TokenizerChoice::File(other))).err().unwrap().to_string();
    assert!(
        error.contains("out.tokens") && error.contains("fingerprint") && error.contains("mixtura tokenize"),
        "{error}"
    );
    let error = open(&config(TokenizerChoice::Byte)).err().unwrap().to_string();
    assert!(error.contains("made with a vocabulary of"), "{error}");
}
