//! Hugging Face tokenizers of every type: the ids and the texts that transformers gives, text in pieces that is the text of the whole,
//! and documents in parts that are the ids of the whole.
//!
//! `fixtures/hf/make_tokenizers.py` made the fixtures; nothing here needs Python or a network.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use mixtura_data::{Tokenizer, TokenizerChoice};
use proptest::prelude::*;
use serde_json::Value;

const NAMES: [&str; 10] =
    ["llama", "metaspace", "yi", "llama3", "own-names", "config-adds", "config-takes", "bert", "unigram", "suffix"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/hf/tokenizers").join(name)
}

struct Fixture {
    name: &'static str,
    tokenizer: Tokenizer,
    expected: Value,
}

impl Fixture {
    fn lists(&self, key: &str) -> Vec<Vec<u32>> {
        serde_json::from_value(self.expected[key].clone()).unwrap()
    }

    fn texts(&self, key: &str) -> Vec<String> {
        serde_json::from_value(self.expected[key].clone()).unwrap()
    }
}

fn fixtures() -> &'static [Fixture] {
    static ALL: OnceLock<Vec<Fixture>> = OnceLock::new();
    let read = |name| Fixture {
        name,
        tokenizer: Tokenizer::from_file(&folder(name).join("tokenizer.json")).unwrap(),
        expected: serde_json::from_slice(&std::fs::read(folder(name).join("expected.json")).unwrap()).unwrap(),
    };
    ALL.get_or_init(|| NAMES.into_iter().map(read).collect())
}

/// The fixtures, our own vocabularies, and one whose decoder works on the joined text.
fn all() -> &'static [(String, Tokenizer)] {
    static ALL: OnceLock<Vec<(String, Tokenizer)>> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut all: Vec<(String, Tokenizer)> =
            fixtures().iter().map(|fixture| (fixture.name.to_string(), fixture.tokenizer.clone())).collect();
        let text =
            "the quick brown fox jumps over the lazy dog; the end of the matter is that foxes jump.\n".repeat(30);
        all.push(("byte".into(), Tokenizer::byte()));
        all.push(("propositions".into(), Tokenizer::propositions()));
        all.push(("bpe".into(), Tokenizer::train_bpe([text], 300).unwrap()));
        let mut joined: Value = serde_json::from_str(&fixtures()[0].tokenizer.to_json()).unwrap();
        joined["decoder"]["decoders"]
            .as_array_mut()
            .unwrap()
            .push(serde_json::json!({"type": "Replace", "pattern": {"String": "e qu"}, "content": "E-Q"}));
        all.push(("joined".into(), Tokenizer::from_json(joined.to_string().as_bytes()).unwrap()));
        all
    })
}

#[test]
fn texts_get_the_ids_that_transformers_gives() {
    for fixture in fixtures() {
        let (ids, special_ids) = (fixture.lists("ids"), fixture.lists("special_ids"));
        for (text, (ids, special_ids)) in fixture.texts("texts").iter().zip(ids.iter().zip(&special_ids)) {
            let name = fixture.name;
            assert_eq!(&fixture.tokenizer.encode_prompt(text).unwrap(), ids, "{name}: {text:?}");
            let found = fixture.tokenizer.encode_prompt_with_special(text).unwrap();
            assert_eq!(&found, special_ids, "{name}, special tokens read: {text:?}");
        }
    }
}

#[test]
fn ids_get_the_text_that_transformers_gives_whole_and_in_pieces() {
    for fixture in fixtures() {
        for (ids, text) in fixture.lists("sequences").iter().zip(fixture.texts("decoded")) {
            assert_eq!(fixture.tokenizer.decode(ids), text, "{}: {ids:?}", fixture.name);
            assert_eq!(in_pieces(&fixture.tokenizer, ids), text, "{} in pieces: {ids:?}", fixture.name);
        }
    }
}

#[test]
fn only_what_the_post_processor_adds_begins_a_text() {
    let bos: Vec<Option<u32>> = fixtures().iter().map(|fixture| fixture.tokenizer.bos()).collect();
    let names = |id: Option<u32>, tokenizer: &Tokenizer| id.and_then(|id| tokenizer.token(id));
    let named: Vec<Option<String>> =
        fixtures().iter().zip(bos).map(|(fixture, bos)| names(bos, &fixture.tokenizer)).collect();
    let some = |name: &str| Some(name.to_string());
    assert_eq!(
        named,
        [
            some("<s>"),
            None,
            None,
            some("<|begin_of_text|>"),
            some("[BOS]"),
            None,
            some("<s>"),
            some("[CLS]"),
            some("<s>"),
            None
        ]
    );
    // The end of a document: what tokenizer_config.json calls it, else what stands behind a text.
    let ends: Vec<Option<String>> =
        fixtures().iter().map(|fixture| names(fixture.tokenizer.eos(), &fixture.tokenizer)).collect();
    let expected =
        ["</s>", "</s>", "<|endoftext|>", "<|eot_id|>", "[EOS]", "</s>", "</s>", "[SEP]", "</s>", "<end>"].map(some);
    assert_eq!(ends, expected);
}

#[test]
fn what_is_saved_says_the_same_and_names_no_token_beyond_the_vocabulary() {
    for (name, tokenizer) in all() {
        let place = tempfile::tempdir().unwrap();
        std::fs::write(place.path().join("tokenizer.json"), tokenizer.to_json()).unwrap();
        std::fs::write(place.path().join("tokenizer_config.json"), tokenizer.to_config_json(64)).unwrap();
        let back = Tokenizer::from_file(&place.path().join("tokenizer.json")).unwrap();
        let text = "The quick né <s>brown</s> <|eos|>\n";
        assert_eq!(back.encode_prompt(text).unwrap(), tokenizer.encode_prompt(text).unwrap(), "{name}");
        assert_eq!((back.bos(), back.eos(), back.pad()), (tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), "{name}");
        assert_eq!((back.to_json(), back.fingerprint()), (tokenizer.to_json(), tokenizer.fingerprint()), "{name}");
        let config: Value = serde_json::from_str(&back.to_config_json(64)).unwrap();
        for key in ["bos_token", "eos_token", "pad_token"] {
            let known =
                |token: &Value| (0..back.vocab_size() as u32).any(|id| back.token(id).as_deref() == token.as_str());
            assert!(config.get(key).is_none_or(known), "{name}: {config}");
        }
    }
    let mut fingerprints: Vec<[u8; 32]> = all().iter().map(|(_, tokenizer)| tokenizer.fingerprint()).collect();
    fingerprints.sort();
    fingerprints.dedup();
    // config-takes has the vocabulary of config-adds, joined that of llama: the same ids for the same corpus.
    assert_eq!(fingerprints.len(), all().len() - 2);
}

fn in_pieces(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.stream();
    let pieces: String = ids.iter().map(|id| stream.push(*id)).collect();
    pieces + &stream.finish()
}

/// Ids of one tokenizer: of a text, and anything from the vocabulary and a little beyond it.
fn ids_of(tokenizer: &Tokenizer, parts: &[(String, Vec<u32>)]) -> Vec<u32> {
    let size = tokenizer.vocab_size() as u32 + 2;
    let one = |(text, random): &(String, Vec<u32>)| {
        let random = random.iter().map(move |id| id % size);
        tokenizer.encode(text).unwrap().into_iter().chain(random).collect::<Vec<u32>>()
    };
    parts.iter().flat_map(one).collect()
}

fn parts() -> impl Strategy<Value = Vec<(String, Vec<u32>)>> {
    // Long runs of low ids: bytes and special tokens stand there in most vocabularies.
    let random = prop::collection::vec(prop_oneof![0..300u32, any::<u32>()], 0..8);
    prop::collection::vec(("( |the|quick|\\PC|[ \n▁é🦊]){0,6}", random), 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn text_in_pieces_is_the_text_of_the_whole(parts in parts()) {
        for (name, tokenizer) in all() {
            let ids = ids_of(tokenizer, &parts);
            prop_assert_eq!(in_pieces(tokenizer, &ids), tokenizer.decode(&ids), "{}: {:?}", name, ids);
        }
    }

    /// A continuation is what the whole says behind the prompt, wherever the prompt ends between characters.
    #[test]
    fn a_continuation_is_what_the_whole_says_behind_the_prompt(
        prompt in "( |the|quick|\\PC|[ \n▁é🦊]){1,6}",
        parts in parts(),
    ) {
        for (name, tokenizer) in all() {
            let prompt = tokenizer.encode_prompt(&prompt).unwrap();
            let new = ids_of(tokenizer, &parts);
            let mut stream = tokenizer.stream_after(&prompt);
            let pieces: String = new.iter().map(|id| stream.push(*id)).collect();
            let pieces = pieces + &stream.finish();
            let (before, whole) = (tokenizer.decode(&prompt), tokenizer.decode(&[prompt.as_slice(), &new].concat()));
            // Bytes that follow bytes of the prompt are read on their own: what was shown cannot be taken back.
            if let Some(rest) = whole.strip_prefix(&before) {
                let bytes_meet = name == "llama" || name == "metaspace" || name == "joined";
                prop_assert!(pieces == rest || bytes_meet, "{}: {:?} then {:?}: {:?}, expected {:?}", name, prompt, new, pieces, rest);
            }
        }
    }

    #[test]
    fn a_document_in_parts_has_the_ids_of_the_whole(
        text in "((The|the|quick| router|  |\n|\n\n|\\. |,|'s|12345|é|日本|▁|🦊|\t|<s>|x y|x\ny| \n a|\\PC){0,12}(x y|x\ny|\\.\na)){1,8}",
        part in 1..40usize,
    ) {
        for (name, tokenizer) in all() {
            let whole = tokenizer.encode(&text).unwrap();
            let (mut ids, mut rest) = (Vec::new(), text.as_str());
            while let Some((end, next)) = tokenizer.cut(rest, part) {
                ids.extend(tokenizer.encode(&rest[..end]).unwrap());
                rest = &rest[next..];
            }
            ids.extend(tokenizer.encode(rest).unwrap());
            prop_assert_eq!(ids, whole, "{}: {:?} in parts of {}", name, text, part);
        }
    }
}

#[test]
fn every_kind_of_tokenizer_is_cut() {
    // Even joined: how ids are decoded does not matter here.
    assert!(all().iter().all(|(_, tokenizer)| tokenizer.cuts()));
}

#[test]
fn a_vocabulary_that_merges_across_spaces_is_not_cut() {
    let llama = std::fs::read_to_string(folder("llama").join("tokenizer.json")).unwrap();
    let across = llama.replacen("\"vocab\":{", "\"vocab\":{\"e\u{2581}\":9999,", 1);
    assert!(!Tokenizer::from_json(across.as_bytes()).unwrap().cuts());
    // A pre-tokenizer that nobody has looked into, and added tokens that look at their neighbours.
    let own = std::fs::read_to_string(folder("llama3").join("tokenizer.json")).unwrap();
    let other = own.replacen("|\\\\s+(?!\\\\S)|", "|\\\\s+x|", 1);
    assert_ne!(other, own);
    assert!(!Tokenizer::from_json(other.as_bytes()).unwrap().cuts());
    for token in [r#""content":"new york","lstrip":false"#, r#""content":"york","lstrip":true"#] {
        let added = format!(
            r#""added_tokens":[{{"id":9999,{token},"single_word":false,"rstrip":false,"normalized":false,"special":false}},"#
        );
        let added = own.replacen("\"added_tokens\":[", &added, 1);
        let tokenizer = Tokenizer::from_json(added.as_bytes()).unwrap();
        assert!(tokenizer.cut("in new york again", 1).is_none_or(|(end, _)| end == 2), "{token}");
    }
}

#[test]
fn a_choice_in_a_config_reads_the_special_tokens_beside_the_file() {
    let choice = TokenizerChoice::from(folder("own-names").join("tokenizer.json").display().to_string());
    let TokenizerChoice::File(path) = choice else { panic!("a path was expected") };
    assert_eq!(Tokenizer::from_file(&path).unwrap().eos(), Some(1));
}
