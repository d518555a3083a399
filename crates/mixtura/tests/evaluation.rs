//! `mixtura eval`: every token counts once, in windows one can choose, and the loss is that of the logits; few tokens and other kinds
//! of files are evaluated or told what they need.

mod common;

use common::Place;
use serde_json::Value;

const BOS: u32 = 256;
const EOS: u32 = 257;

const CONFIG: &str = "[model]\nd_model = 32\nlayers = 1\nheads = 2\ncontext = 48\ntied = true\n\
     [model.moe]\nexperts = 4\ntop_k = 2\nd_expert = 16\n\
     [data]\nkind = \"text\"\npaths = [\"train.txt\"]\ncontext = 32\nbatch = 4\nvalidation_fraction = 0.1\n\
     [schedule]\nwarmup = 2\n[train]\nsteps = 4\n";

/// A run of a byte-level model, and some text that repeats nothing.
fn trained() -> Place {
    let place = Place::new();
    let text: String = (0..900).map(|i| format!("w{} ", (i * 7919) % 977)).collect();
    std::fs::write(place.path("train.txt"), &text).unwrap();
    std::fs::write(place.path("run.toml"), CONFIG).unwrap();
    place.ok(&["train", "run.toml", "--out", "run", "-q"]);
    place
}

fn eval(place: &Place, args: &[&str]) -> Value {
    place.ok(&[&["eval", "run", "--json", "--data"], args].concat()).json()
}

/// Mean cross-entropy of `tokens` from the logits command, window by window, by the definition: a token is predicted in the first
/// window that reaches it.
fn loss_by_logits(place: &Place, tokens: &[u32], context: usize, stride: usize) -> f64 {
    let reach = if stride < context { context - 1 } else { context };
    let (mut nats, mut counted, mut start) = (0.0, 0, 0);
    while counted < tokens.len() {
        let window = &tokens[start..(start + reach).min(tokens.len())];
        let mut ids = vec![BOS];
        ids.extend(&window[..window.len() - 1]);
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        let document = place.ok(&["logits", "run", "--json", "--ids", &ids.join(",")]).json();
        for (t, &target) in window.iter().enumerate().skip(counted - start) {
            let row: Vec<f64> = document["logits"][t].as_array().unwrap().iter().map(|z| z.as_f64().unwrap()).collect();
            let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            nats += most + row.iter().map(|z| (z - most).exp()).sum::<f64>().ln() - row[target as usize];
        }
        counted = start + window.len();
        start += stride;
    }
    nats / tokens.len() as f64
}

#[test]
fn every_token_counts_once_in_windows_of_any_stride_and_the_loss_is_that_of_the_logits() {
    let place = trained();
    let text = "Every expert takes some of the tokens, and the router decides which of them it is.";
    let mut tokens: Vec<u32> = text.bytes().map(u32::from).collect();
    tokens.push(EOS);
    std::fs::write(place.path("a.txt"), text).unwrap();
    for (context, stride) in [(32, 32), (32, 16), (24, 23), (9, 4), (48, 48)] {
        let (c, s) = (context.to_string(), stride.to_string());
        let found = eval(&place, &["a.txt", "--context", &c, "--stride", &s]);
        assert_eq!(found["tokens"], tokens.len(), "{context} by {stride}");
        assert_eq!((&found["context"], &found["stride"]), (&context.into(), &stride.into()));
        let (found, expected) = (found["loss"].as_f64().unwrap(), loss_by_logits(&place, &tokens, context, stride));
        assert!((found - expected).abs() < 1e-5 * expected, "{context} by {stride}: {found}, by the logits {expected}");
    }
    // Rows as trained, one after the other, when nothing is asked for.
    let as_trained = eval(&place, &["a.txt", "--context", "32", "--stride", "32"]);
    let plain = eval(&place, &["a.txt"]);
    assert_eq!((&plain["loss"], &plain["tokens"]), (&as_trained["loss"], &as_trained["tokens"]));
    assert_eq!(common::keys(&plain), ["bits_per_byte", "loss", "perplexity", "tokens"]);

    // The last byte is part of the text.
    std::fs::write(place.path("b.txt"), text.replace("it is.", "it is!")).unwrap();
    assert_ne!(eval(&place, &["a.txt"])["loss"], eval(&place, &["b.txt"])["loss"]);
    for length in [1, 2, 31, 32, 63, 64] {
        std::fs::write(place.path("cut.txt"), &text[..length]).unwrap();
        assert_eq!(eval(&place, &["cut.txt"])["tokens"], length + 1, "{length} bytes and the end of the text");
    }
}

#[test]
fn json_in_any_of_its_files_is_evaluated_as_the_text_it_holds() {
    let place = trained();
    let texts = ["The first document.", "The second, with \"quotes\".", "A third one."];
    let lines =
        |field: &str| -> String { texts.map(|t| serde_json::json!({ field: t, "n": 1 }).to_string() + "\n").concat() };
    let write = |name: &str, text: String| std::fs::write(place.path(name), text).unwrap();
    write("a.jsonl", lines("text"));
    write("a.ndjson", lines("text"));
    write("a.JSON", lines("text"));
    write("bom.jsonl", format!("\u{feff}{}", lines("text")));
    write("crlf.jsonl", lines("text").replace('\n', "\r\n"));
    write("nan.jsonl", lines("text").replace("\"n\":1", "\"n\":NaN"));
    let array: Vec<Value> = texts.iter().map(|t| serde_json::json!({ "text": t })).collect();
    write("array.json", serde_json::to_string_pretty(&array).unwrap());
    write("other.jsonl", lines("body"));
    let expected = eval(&place, &["a.jsonl"]);
    let bytes: usize = texts.iter().map(|t| t.len() + 1).sum();
    assert_eq!(expected["tokens"], bytes, "the documents and an end after each");
    for file in ["a.ndjson", "a.JSON", "bom.jsonl", "crlf.jsonl", "nan.jsonl", "array.json"] {
        assert_eq!(eval(&place, &[file]), expected, "{file}");
    }
    assert_eq!(eval(&place, &["other.jsonl", "--text-field", "body"]), expected);
    let refused = place.run(&["eval", "run", "--data", "other.jsonl"]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("--text-field body"), "{}", refused.stderr);
}

#[test]
fn what_a_run_held_back_is_evaluated_as_in_training_or_in_windows_of_choice() {
    let place = trained();
    let metrics = std::fs::read_to_string(place.path("run/metrics.jsonl")).unwrap();
    let last: Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
    let found = place.ok(&["eval", "run", "--json"]).json();
    assert_eq!(found["loss"], last["eval"]["loss"], "{last}");
    let bytes = std::fs::metadata(place.path("train.txt")).unwrap().len();
    let held = bytes - (bytes as f64 * 0.9).floor() as u64;
    assert_eq!(found["tokens"], held + 1, "the end of the text and its eos");
    let other = place.ok(&["eval", "run", "--json", "--context", "40", "--stride", "10"]).json();
    assert_eq!((&other["tokens"], &other["stride"]), (&found["tokens"], &10.into()));
    assert_ne!(other["loss"], found["loss"]);
}

#[test]
fn windows_that_cannot_be_are_refused_with_their_range() {
    let place = trained();
    std::fs::write(place.path("a.txt"), "some text").unwrap();
    std::fs::write(place.path("a.txt.gz"), b"\x1f\x8b\x08\x00\x00").unwrap();
    for (args, words) in [
        (&["--data", "a.txt", "--context", "49"][..], &["--context 49", "2 to 48"][..]),
        (&["--data", "a.txt", "--context", "1"], &["--context 1", "2 to 48"]),
        (&["--data", "a.txt", "--stride", "0"], &["--stride 0", "1 to 32"]),
        (&["--data", "a.txt", "--stride", "33"], &["--stride 33", "1 to 32"]),
        (&["--text-field", "body"], &["--text-field", "--data"]),
        (&["--data", "a.txt.gz"], &["a.txt.gz", "gzip"]),
    ] {
        let ran = place.run(&[&["eval", "run"], args].concat());
        assert_eq!(ran.code, Some(2), "{args:?}: {}", ran.stderr);
        words.iter().for_each(|word| assert!(ran.stderr.contains(word), "{args:?}: {}", ran.stderr));
    }
}
