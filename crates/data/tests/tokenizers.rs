//! Tokenizers: any text survives, saved ones read back the same, and damaged files are refused.

use mixtura_data::{BOS, DataError, EOS, Tokenizer};
use proptest::prelude::*;

fn all() -> Vec<(&'static str, Tokenizer)> {
    let text = "the quick brown fox jumps over the lazy dog; the end of the matter is that foxes jump.\n".repeat(30);
    let bpe = Tokenizer::train_bpe([text], 300).unwrap();
    vec![("byte", Tokenizer::byte()), ("propositions", Tokenizer::propositions()), ("bpe", bpe)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text_survives(text in "(\\PC|[ \n\t\r]|Earth has exactly |<\\|eos\\|>){0,60}") {
        for (name, tokenizer) in all_once() {
            let ids = tokenizer.encode(&text).unwrap();
            prop_assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()));
            prop_assert_eq!(&tokenizer.decode(&ids), &text, "{}", name);
            let bytes: u32 = ids.iter().map(|id| tokenizer.byte_lengths()[*id as usize]).sum();
            prop_assert_eq!(bytes as usize, text.len(), "{}: bytes", name);
        }
    }

    #[test]
    fn streamed_text_is_the_text(text in "\\PC{0,40}") {
        for (name, tokenizer) in all_once() {
            let mut stream = tokenizer.stream();
            let mut printed: String = tokenizer.encode(&text).unwrap().into_iter().map(|id| stream.push(id)).collect();
            printed += &stream.finish();
            prop_assert_eq!(&printed, &text, "{}", name);
        }
    }

    #[test]
    fn any_bytes_are_a_tokenizer_or_an_error(bytes: Vec<u8>) {
        prop_assert!(Tokenizer::from_json(&bytes).is_err());
    }
}

fn all_once() -> &'static [(&'static str, Tokenizer)] {
    static ALL: std::sync::OnceLock<Vec<(&'static str, Tokenizer)>> = std::sync::OnceLock::new();
    ALL.get_or_init(all)
}

#[test]
fn saved_tokenizers_read_back_the_same() {
    for (name, tokenizer) in all_once() {
        let json = tokenizer.to_json();
        let back = Tokenizer::from_json(json.as_bytes()).unwrap();
        assert_eq!(back.to_json(), json, "{name}");
        let text = "the dog: Earth has exactly one natural satellite, 新\n\n  (x)";
        assert_eq!(back.encode(text).unwrap(), tokenizer.encode(text).unwrap(), "{name}");
        assert_eq!((back.bos(), back.eos(), back.pad()), (tokenizer.bos(), tokenizer.eos(), tokenizer.pad()), "{name}");
        assert!(tokenizer.bos().is_some() && tokenizer.eos().is_some() && tokenizer.pad().is_some(), "{name}");
    }
}

#[test]
fn special_tokens_in_text_are_text() {
    for (name, tokenizer) in all_once() {
        let ids = tokenizer.encode(&format!("{BOS}x{EOS}")).unwrap();
        assert!(!ids.contains(&tokenizer.eos().unwrap()) && !ids.contains(&tokenizer.bos().unwrap()), "{name}");
    }
}

#[test]
fn training_bpe_twice_gives_the_same_vocabulary() {
    let text = || "she sells sea shells by the sea shore ".repeat(50);
    let one = Tokenizer::train_bpe([text()], 290).unwrap().to_json();
    assert_eq!(Tokenizer::train_bpe([text()], 290).unwrap().to_json(), one);
}

#[test]
fn a_question_is_a_prefix_of_question_and_answer() {
    let tokenizer = Tokenizer::propositions();
    let item = mixtura_data::propositions::Proposition::canonical();
    let prompt = tokenizer.encode(&item.question()).unwrap();
    let whole = tokenizer.encode(&(item.question() + &item.answer())).unwrap();
    assert_eq!(whole[..prompt.len()], prompt);
}

#[test]
fn files_that_are_no_tokenizer_are_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let missing = Tokenizer::from_file(&path).unwrap_err();
    assert!(matches!(missing, DataError::Missing { .. }), "{missing}");
    let huge = Tokenizer::byte().to_json().replace("\"A\":65", "\"A\":4000000000");
    for (bytes, reason) in [
        (Vec::new(), "empty"),
        (b"{".to_vec(), "not JSON"),
        (b"[1, 2]".to_vec(), "\"model\""),
        (vec![0xc3, 0x28], "not UTF-8"),
        (vec![0xff, 0xfe], "UTF-16"),
        (b"{\"model\": {\"type\": \"GPT\"}}".to_vec(), "not understood"),
        (huge.into_bytes(), "4000000000"),
    ] {
        std::fs::write(&path, &bytes).unwrap();
        let error = Tokenizer::from_file(&path).unwrap_err().to_string();
        assert!(error.contains(reason) && error.contains("tokenizer.json"), "{error}");
    }
    let small = Tokenizer::train_bpe(["abc"], 100).unwrap_err().to_string();
    assert!(small.contains("259"), "{small}");
}
