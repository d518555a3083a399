//! From text to tokens and back at the command line: what is printed, where generation ends, what can be typed, and what is exported.

mod common;
#[path = "common/chain.rs"]
mod chain;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use chain::{chain, ends_with, saying, tokenizer};
use common::{Place, Ran};
use mixtura::data::Tokenizer;
use serde_json::Value;

#[test]
fn the_space_between_prompt_and_continuation_is_printed() {
    for (name, end) in [("llama", "</s>"), ("metaspace", "</s>"), ("yi", "<|endoftext|>"), ("unigram", "</s>")] {
        let place = Place::new();
        saying(&place, "m", name, "The quick brown fox", end, ends_with);
        // What stands behind the text (unigram) would be the last token of the prompt.
        let prompt = if name == "unigram" {
            let tokenizer = Tokenizer::from_file(&place.path("m/tokenizer.json")).unwrap();
            let ids: Vec<String> = tokenizer.encode("The quick").unwrap().iter().map(u32::to_string).collect();
            ["--ids".to_string(), ids.join(",")]
        } else {
            ["--prompt".to_string(), "The quick".to_string()]
        };
        let args = ["generate", "m", &prompt[0], &prompt[1], "--max-tokens", "40"];
        assert_eq!(place.ok(&args).stdout, "The quick brown fox\n", "{name}");
        let document = place.ok(&[&args[..], &["--json"]].concat()).json();
        assert_eq!(document["text"], " brown fox", "{name}");
        assert_eq!((&document["prompt"], &document["finish_reason"]), (&"The quick".into(), &"stop".into()), "{name}");
    }
}

#[test]
fn bytes_that_are_no_character_are_shown_at_the_end() {
    let place = Place::new();
    let tokenizer = tokenizer(&place, "m", "llama");
    let id = |token: &str| {
        (0..tokenizer.vocab_size() as u32).find(|id| tokenizer.token(*id).as_deref() == Some(token)).unwrap()
    };
    let the = *tokenizer.encode("the").unwrap().last().unwrap();
    let follow = BTreeMap::from([(the, id("<0xE5>")), (id("<0xE5>"), id("<0x8F>")), (id("<0x8F>"), id("</s>"))]);
    chain(&place, "m", tokenizer.vocab_size(), 64, &follow, ends_with(id("</s>")));
    let args = ["generate", "m", "--prompt", "the", "--max-tokens", "8"];
    assert_eq!(place.ok(&args).stdout, "the\u{FFFD}\u{FFFD}\n");
    assert_eq!(place.ok(&[&args[..], &["--json"]].concat()).json()["text"], "\u{FFFD}\u{FFFD}");
}

#[test]
fn the_ends_of_text_are_those_of_the_models_own_files() {
    let place = Place::new();
    let run = |model: &str, config: &str, generation: Option<&str>| {
        let path = place.path(model).join("config.json");
        let mut document: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        document["eos_token_id"] = serde_json::from_str(config).unwrap();
        std::fs::write(&path, document.to_string()).unwrap();
        let path = place.path(model).join("generation_config.json");
        match generation {
            Some(text) => std::fs::write(&path, text).unwrap(),
            None => drop(std::fs::remove_file(&path)),
        }
        let args = ["generate", model, "--prompt", "The quick", "--max-tokens", "20", "--json"];
        let document = place.ok(&args).json();
        (document["text"].as_str().unwrap().to_string(), document["finish_reason"].as_str().unwrap().to_string())
    };
    let stops = (" brown fox".to_string(), "stop".to_string());
    // The model says <|eot_id|>; the name that usually ends texts is <|end_of_text|>, id 1.
    let llama3 = saying(&place, "m", "llama3", "The quick brown fox", "<|eot_id|>", ends_with);
    assert_eq!(llama3.token(2).as_deref(), Some("<|eot_id|>"));
    assert_eq!(run("m", "2", None), stops);
    assert_eq!(run("m", "[1, 2]", None), stops);
    assert_eq!(run("m", "1", Some(r#"{"eos_token_id": [1, 2]}"#)), stops);
    assert_eq!(run("m", "2", Some(r#"{"eos_token_id": 1}"#)), stops);
    // Neither file names one: tokenizer_config.json says <|eot_id|>.
    assert_eq!(run("m", "null", None), stops);
    // Both name another: the model goes on, and starts again.
    let (text, reason) = run("m", "1", Some(r#"{"eos_token_id": 1}"#));
    assert!(text.starts_with(" brown foxThe quick brown") && reason == "length", "{text:?}");
    let refused = place.path("m/generation_config.json");
    std::fs::write(&refused, r#"{"eos_token_id": "<|eot_id|>"}"#).unwrap();
    let ran = place.run(&["generate", "m", "--prompt", "The quick"]);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("generation_config.json") && ran.stderr.contains("eos_token_id"), "{}", ran.stderr);
}

#[test]
fn a_text_gets_the_start_token_that_its_tokenizer_puts_there() {
    let place = Place::new();
    let ids = |name: &str| -> Vec<u32> {
        saying(&place, name, name, "The quick brown fox", "x", ends_with);
        let document = place.ok(&["logits", name, "--text", "The quick", "--json"]).json();
        serde_json::from_value(document["ids"].clone()).unwrap()
    };
    assert_eq!(ids("llama")[0], 1);
    for (name, start) in [("yi", 0), ("config-adds", 0), ("metaspace", 1)] {
        assert_ne!(ids(name)[0], start, "{name}");
    }
    for name in ["llama3", "own-names", "config-takes"] {
        assert_eq!(ids(name)[0], 0, "{name}");
    }
}

#[test]
fn a_prompt_can_be_ids_a_file_stdin_and_anything_that_is_typed() {
    let place = Place::new();
    saying(&place, "m", "own-names", "The quick brown fox", "[EOS]", ends_with);
    let json = |args: &[&str]| place.ok(&[&["generate", "m", "--max-tokens", "3", "--json"], args].concat()).json();
    let typed = json(&["--prompt", "- item"]);
    assert_eq!(typed["prompt"], "- item");
    assert_eq!(json(&["--prompt", "--json"])["prompt"], "--json");
    assert_eq!(json(&["--prompt", "-1"])["prompt_tokens"], 3);

    std::fs::write(place.path("prompt.txt"), "The\nquick").unwrap();
    let from_file = json(&["--prompt-file", "prompt.txt"]);
    assert_eq!(from_file["prompt"], "The\nquick");
    let mut child = place
        .command(&["generate", "m", "--prompt-file", "-", "--max-tokens", "3", "--json"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"The\nquick").unwrap();
    let from_stdin = Ran::from(child.wait_with_output().unwrap()).json();
    assert_eq!((&from_stdin["ids"], &from_stdin["prompt"]), (&from_file["ids"], &from_file["prompt"]));
    std::fs::write(place.path("prompt.txt"), b"caf\xe9").unwrap();
    let ran = place.run(&["generate", "m", "--prompt-file", "prompt.txt"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("prompt.txt is not UTF-8 text: byte 0xe9 at byte 3"), "{}", ran.stderr);
    let ran = place.run(&["logits", "m", "--text-file", "nowhere.txt"]);
    assert!(ran.code == Some(2) && ran.stderr.contains("nowhere.txt"), "{}", ran.stderr);

    // Special tokens are text unless they are asked for.
    let ids = |args: &[&str]| -> Vec<u32> {
        let document = place.ok(&[&["logits", "m", "--json"], args].concat()).json();
        serde_json::from_value(document["ids"].clone()).unwrap()
    };
    let the = ids(&["--text", "The"]);
    assert_eq!(ids(&["--text", "[EOS]The", "--special"]), [&[0, 1], &the[1..]].concat());
    assert!(!ids(&["--text", "[EOS]The"]).contains(&1));
    let line: Vec<String> = the.iter().map(u32::to_string).collect();
    let (from_ids, from_text) = (json(&["--ids", &line.join(",")]), json(&["--prompt", "The"]));
    for key in ["ids", "prompt", "text", "prompt_tokens"] {
        assert_eq!(from_ids[key], from_text[key], "{key}");
    }
    for (args, words) in [
        (&["--ids", "-1"][..], "'-1'"),
        (&["--ids", "1", "--prompt", "a"], "cannot be used with"),
        (&["--prompt", "a", "--temperature", "-1"], "--temperature -1: expected a number of at least 0"),
        (&["--prompt", "a", "--top-p", "-0.5"], "--top-p -0.5"),
        (&["--prompt", "a", "--max-tokens", "-3"], "'-3'"),
        (&["--prompt", "a", "--seed", "-3"], "'-3'"),
        (&["--ids", "100000"], "vocabulary"),
        (&[], "--prompt"),
    ] {
        let ran = place.run(&[&["generate", "m"], args].concat());
        assert_eq!(ran.code, Some(2), "{args:?}\n{}", ran.stderr);
        assert!(ran.stderr.contains(words), "{args:?}: expected {words:?} in\n{}", ran.stderr);
    }
}

#[test]
fn numbers_at_the_ends_of_their_ranges_are_taken_or_refused() {
    let place = Place::new();
    // It says the line again and again; [EOS] never comes.
    saying(&place, "m", "own-names", "The quick brown fox", "x", |_| ends_with(1));
    let most = u64::MAX.to_string();
    let args =
        ["generate", "m", "--prompt", "The", "--max-tokens", &most, "--seed", &most, "--temperature", "1", "--json"];
    let ran = place.ok(&args);
    let document = ran.json();
    assert_eq!(document["finish_reason"], "length");
    assert_eq!(document["finish_detail"], "ended because the model's context of 64 tokens is full");
    // The last token need not go through the model any more.
    assert_eq!(document["tokens"].as_u64().unwrap() + document["prompt_tokens"].as_u64().unwrap(), 65);
    assert!(ran.stderr.contains("context of 64 tokens is full"), "{}", ran.stderr);
    let document = place.ok(&["generate", "m", "--prompt", "The", "--max-tokens", "0", "--json"]).json();
    assert_eq!((&document["tokens"], &document["finish_detail"]), (&0.into(), &"ended by --max-tokens 0".into()));

    let seed = (1u64 << 63).to_string();
    let ran = place.run(&["train", "--seed", &seed]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains(&seed) && ran.stderr.contains("9223372036854775807"), "{}", ran.stderr);
    let ran = place.run(&["train", "--steps", "-5"]);
    assert!(ran.code == Some(2) && ran.stderr.contains("'-5'") && ran.stderr.contains("--steps"), "{}", ran.stderr);
}

#[test]
fn generation_ends_when_nobody_reads() {
    let place = Place::new();
    let tokenizer = tokenizer(&place, "m", "own-names");
    let the = *tokenizer.encode(" the").unwrap().last().unwrap();
    // " the" for ever, in a context of a million tokens.
    chain(&place, "m", tokenizer.vocab_size(), 1 << 20, &BTreeMap::from([(the, the)]), ends_with(1));
    let mut child = place
        .command(&["generate", "m", "--prompt", "in the", "--max-tokens", "18446744073709551615"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut start = [0; 26];
    child.stdout.take().unwrap().read_exact(&mut start).unwrap();
    assert_eq!(&start, b"in the the the the the the");
    let ran = ended(child);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
}

/// Waits a minute at most.
fn ended(mut child: Child) -> Ran {
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("it still runs after a minute without a reader");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ran::from(child.wait_with_output().unwrap())
}

const TEXT_RUN: &str = r#"
[model]
d_model = 32
layers = 1
heads = 2
context = 64
[model.moe]
experts = 4
top_k = 2
d_expert = 32
[data]
kind = "text"
paths = ["text.txt"]
context = 16
batch = 2
validation_batches = 2
[train]
steps = 4
precision = "f32"
eval_every = 0
checkpoint_every = 2
"#;

#[test]
fn an_export_says_what_training_did() {
    let place = Place::new();
    std::fs::write(place.path("text.txt"), "The quick brown fox jumps over the lazy dog.\n".repeat(60)).unwrap();
    std::fs::write(place.path("run.toml"), TEXT_RUN).unwrap();
    let llama = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/hf/tokenizers/llama/tokenizer.json");
    let own = format!("data.tokenizer=\"{}\"", llama.display());
    for (out, sets, bos, eos) in [
        ("byte", vec![], "<|bos|>", "<|eos|>"),
        ("bpe", vec!["data.tokenizer=\"bpe\"", "data.bpe_vocab=280"], "<|bos|>", "<|eos|>"),
        ("file", vec![own.as_str()], "<s>", "</s>"),
        ("olmoe", vec!["model.qk_norm=\"full\"", "model.moe.router.normalize=false"], "<|bos|>", "<|eos|>"),
    ] {
        let mut args = vec!["train", "run.toml", "--out", out, "--json"];
        sets.iter().for_each(|set| args.extend(["--set", set]));
        let ran = place.ok(&args);
        assert_eq!(ran.stderr.contains("training a BPE tokenizer of 280 entries"), out == "bpe", "{}", ran.stderr);
        for directory in [format!("{out}/final"), format!("{out}/checkpoints/step-2")] {
            let read = |file: &str| -> Value {
                serde_json::from_slice(&std::fs::read(place.path(&directory).join(file)).unwrap()).unwrap()
            };
            let tokenizer = Tokenizer::from_file(&place.path(&directory).join("tokenizer.json")).unwrap();
            let config = read("tokenizer_config.json");
            assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast");
            assert_eq!((&config["bos_token"], &config["eos_token"]), (&bos.into(), &eos.into()), "{directory}");
            assert_eq!(config["model_max_length"], 64);
            let (bos, eos) = (tokenizer.bos().unwrap(), tokenizer.eos().unwrap());
            let files: &[&str] = if directory.ends_with("final") {
                &["config.json", "generation_config.json"]
            } else {
                &["config.json"]
            };
            for file in files {
                let ids = read(file);
                assert_eq!(
                    (&ids["bos_token_id"], &ids["eos_token_id"]),
                    (&bos.into(), &eos.into()),
                    "{directory}/{file}"
                );
            }
            let document = place.ok(&["logits", &directory, "--text", "The quick", "--json"]).json();
            assert_eq!(document["ids"][0], bos, "{directory}: training rows begin with it");
        }
    }
}

#[test]
fn a_model_is_read_while_its_run_thins_its_checkpoints() {
    let place = Place::new();
    std::fs::write(place.path("text.txt"), "The quick brown fox jumps over the lazy dog.\n".repeat(60)).unwrap();
    std::fs::write(place.path("run.toml"), TEXT_RUN).unwrap();
    let mut run = place
        .command(&["train", "run.toml", "--out", "run", "--steps", "1000000", "-q"])
        .args(["--set", "train.checkpoint_every=1", "--set", "train.keep_last=1"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while !place.path("run/checkpoints/step-2").exists() && started.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let all: Vec<Ran> =
        (0..20).map(|_| place.run(&["generate", "run", "--prompt", "The", "--max-tokens", "2", "--json"])).collect();
    let running = run.try_wait().unwrap().is_none();
    run.kill().unwrap();
    let said = Ran::from(run.wait_with_output().unwrap()).stderr;
    assert!(running, "the run ended too soon: {said}");
    for ran in all {
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        assert!(!ran.stderr.contains("damaged"), "{}", ran.stderr);
    }
}

#[test]
fn tokenize_makes_a_shard_that_trains() {
    let place = Place::new();
    std::fs::write(place.path("a.txt"), "The quick brown fox jumps over the lazy dog.\n".repeat(60)).unwrap();
    std::fs::write(place.path("b.jsonl"), "{\"body\": \"Every expert takes some.\"}\n".repeat(20)).unwrap();
    let llama = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/hf/tokenizers/llama/tokenizer.json");
    let llama = llama.to_str().unwrap();
    let common = ["tokenize", "a.txt", "b.jsonl", "--text-field", "body", "--out", "corpus.tokens", "--tokenizer"];
    let receipt = place.ok(&[&common[..], &[llama, "--json"]].concat()).json();
    assert_eq!(
        common::keys(&receipt),
        ["bytes", "bytes_per_token", "documents", "out", "seconds", "tokenizer", "tokens", "vocab"]
    );
    assert_eq!(
        (&receipt["documents"], &receipt["vocab"], &receipt["bytes_per_token"]),
        (&21.into(), &400.into(), &2.into())
    );
    assert_eq!(receipt["tokenizer"].as_str().unwrap().len(), 64);

    std::fs::write(place.path("run.toml"), TEXT_RUN).unwrap();
    let train = |out: &str, tokenizer: &str| {
        let tokenizer = format!("data.tokenizer=\"{tokenizer}\"");
        let sets = ["data.kind=\"shards\"", "data.paths=[\"corpus.tokens\"]", &tokenizer];
        let sets = sets.iter().flat_map(|set| ["--set", set]).collect::<Vec<_>>();
        place.run(&[&["train", "run.toml", "--out", out, "--json"][..], &sets].concat())
    };
    let ran = train("run", llama);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let other = llama.replace("/llama/", "/metaspace/");
    let ran = train("other", &other);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("corpus.tokens") && ran.stderr.contains("fingerprint"), "{}", ran.stderr);

    // A run's own tokenizer is the one it was trained with.
    let again = place.ok(&[&common[..], &["run", "--json"]].concat()).json();
    assert_eq!((&again["tokenizer"], &again["tokens"]), (&receipt["tokenizer"], &receipt["tokens"]));
    let bytes = place.ok(&[&common[..], &["bytes"]].concat()).stdout;
    assert!(
        bytes.contains("corpus.tokens") && bytes.contains("21 documents") && bytes.contains("vocabulary 259"),
        "{bytes}"
    );

    for (args, words) in [
        (&["gone.txt", "--tokenizer", "byte", "--out", "x.tokens"][..], "gone.txt"),
        (&["a.txt", "--tokenizer", "gone.json", "--out", "x.tokens"], "gone.json"),
        (&["a.txt", "--tokenizer", "byte", "--out", "nowhere/x.tokens"], "nowhere does not exist"),
        (&["a.txt", "--tokenizer", "byte", "--out", "a.txt"], "one of the files to read"),
        (&["run", "--tokenizer", "byte", "--out", "x.tokens"], "directory"),
        (&["--tokenizer", "byte", "--out", "x.tokens"], "FILES"),
    ] {
        let ran = place.run(&[&["tokenize"], args].concat());
        assert_eq!(ran.code, Some(2), "{args:?}\n{}", ran.stderr);
        assert!(ran.stderr.contains(words), "{args:?}: {}", ran.stderr);
    }
    std::fs::write(place.path("binary.txt"), b"a\x00b").unwrap();
    let ran = place.run(&["tokenize", "binary.txt", "--tokenizer", "byte", "--out", "x.tokens"]);
    assert!(ran.code == Some(2) && ran.stderr.contains("NUL byte"), "{:?} {}", ran.code, ran.stderr);
    assert!(!place.path("x.tokens").exists() && !place.path("x.tokens-unfinished").exists());
}
