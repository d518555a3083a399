//! Many texts at once, stop strings, log probabilities, routing and conversations at the command line.

mod common;
#[path = "common/chain.rs"]
mod chain;

use std::io::Write;
use std::process::Stdio;

use chain::{ends_with, saying};
use common::{Place, Ran};
use serde_json::{Value, json};

/// `mixtura` with something on stdin.
fn told(place: &Place, args: &[&str], stdin: &str) -> Ran {
    let mut command = place.command(args);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    Ran::from(child.wait_with_output().unwrap())
}

/// A document without what depends on the clock.
fn timeless(mut document: Value) -> Value {
    document.as_object_mut().unwrap().remove("tokens_per_second").unwrap();
    document
}

#[test]
fn texts_of_a_batch_are_those_that_they_are_alone() {
    let place = Place::new();
    place.tiny_model("run", "2");
    let texts = ["Is the following", "The", "Mars has exactly two natural satellites."];
    let options = ["--max-tokens", "6", "--temperature", "0.8", "--seed", "5", "--log-probabilities", "2", "--routing"];
    let run = |prompts: &[&str]| {
        let given: Vec<&str> = prompts.iter().flat_map(|prompt| ["--prompt", prompt]).collect();
        place.ok(&[&["generate", "run", "--json"], &options[..], &given].concat()).json()
    };
    let together = run(&texts);
    for (text, document) in texts.iter().zip(together.as_array().unwrap()) {
        assert_eq!(timeless(run(&[text])), timeless(document.clone()), "{text}");
        let routes = document["routing"].as_array().unwrap();
        let tokens = document["prompt_tokens"].as_u64().unwrap() + document["tokens"].as_u64().unwrap();
        // The last token has been through the model only where the model then ended the text.
        let through = tokens - u64::from(document["finish_reason"] == "length");
        assert_eq!(routes.len() as u64, through, "{document}");
        assert_eq!(routes[0]["layers"][0]["experts"].as_array().unwrap().len(), 2);
        assert_eq!(
            document["log_probabilities"].as_array().unwrap().len() as u64,
            document["tokens"].as_u64().unwrap()
        );
    }
    // The same prompt twice: two texts, the first of them the one that it gets alone.
    let twice = run(&["The", "The"]);
    assert_eq!(twice[0]["ids"], together[1]["ids"]);

    // From a file, with a byte order mark and a blank line; from JSON lines; from stdin.
    std::fs::write(place.path("p.txt"), format!("\u{feff}{}\n\n{}\n", texts[0], texts[1])).unwrap();
    std::fs::write(place.path("p.jsonl"), format!("{}\n{}\n", json!(texts[0]), json!({"prompt": texts[1]}))).unwrap();
    let expected: Vec<Value> = together.as_array().unwrap()[..2].iter().cloned().map(timeless).collect();
    for (file, stdin) in [("p.txt", ""), ("p.jsonl", ""), ("-", &*format!("{}\n{}", texts[0], texts[1]))] {
        let args = [&["generate", "run", "--json", "--prompts", file], &options[..]].concat();
        let found = told(&place, &args, stdin).json();
        assert_eq!(found.as_array().unwrap().iter().cloned().map(timeless).collect::<Vec<_>>(), expected, "{file}");
    }
    let bad = told(&place, &["generate", "run", "--prompts", "-"], "\n \n");
    assert!(bad.code == Some(2) && bad.stderr.contains("no prompt"), "{}", bad.stderr);
    let text =
        place.ok(&["generate", "run", "--prompt", "The", "--prompt", "Is", "--max-tokens", "3", "--routing"]).stdout;
    assert!(text.matches("===").count() == 2 && text.contains("layer 0"), "{text}");
}

#[test]
fn a_stop_string_ends_the_text_in_front_of_it() {
    for name in ["llama", "metaspace", "yi"] {
        let place = Place::new();
        let end = if name == "yi" { "<|endoftext|>" } else { "</s>" };
        saying(&place, "m", name, "The quick brown fox", end, ends_with);
        let said = |stop: &[&str]| {
            let stops: Vec<&str> = stop.iter().flat_map(|stop| ["--stop", stop]).collect();
            place.ok(&[&["generate", "m", "--prompt", "The quick", "--json"], &stops[..]].concat()).json()
        };
        for (stop, text, reason) in [
            (vec!["own f"], " br", "stop"),
            (vec!["fox jumps", "ox", "n fox"], " brow", "stop"),
            (vec!["fox!"], " brown fox", "stop"),
            (vec![" "], "", "stop"),
        ] {
            let document = said(&stop);
            let found = (document["text"].as_str().unwrap(), document["finish_reason"].as_str().unwrap());
            assert_eq!(found, (text, reason), "{name}, {stop:?}");
        }
        let streamed = place.ok(&["generate", "m", "--prompt", "The quick", "--stop", "own f"]).stdout;
        assert_eq!(streamed, "The quick br\n", "{name}");
        let refused = place.run(&["generate", "m", "--prompt", "The", "--stop", ""]);
        assert_eq!(refused.code, Some(2), "{}", refused.stderr);
    }
}

#[test]
fn logits_of_many_texts_are_those_of_each() {
    let place = Place::new();
    place.tiny_model("run", "2");
    let together = place.ok(&["logits", "run", "--text", "Mars has", "--text", "The", "--json"]).json();
    for (text, document) in ["Mars has", "The"].iter().zip(together.as_array().unwrap()) {
        assert_eq!(&place.ok(&["logits", "run", "--text", text, "--json"]).json(), document, "{text}");
    }
}

#[test]
fn a_conversation_goes_by_the_models_template() {
    let place = Place::new();
    saying(&place, "m", "llama", "The quick brown fox", "</s>", ends_with);
    let none = told(&place, &["chat", "m"], "The quick\n");
    assert!(none.code == Some(2) && none.stderr.contains("no chat template"), "{}", none.stderr);

    // What the model hears last is what it continues.
    let template = "{% for m in messages %}{{ bos_token }}[{{ m.role }}] {{ m.content }}{% endfor %}";
    std::fs::write(place.path("m/chat_template.jinja"), template).unwrap();
    let spoken = "The quick\n\nquick\n/clear\n brown\n";
    assert_eq!(told(&place, &["chat", "m"], spoken).stdout, " brown fox\n brown fox\n fox\n");
    let document =
        told(&place, &["chat", "m", "--json", "--system", "Be brief.", "--max-tokens", "1"], "The quick\nquick").json();
    let said = document["messages"].as_array().unwrap();
    let shown: Vec<(&str, &str)> =
        said.iter().map(|m| (m["role"].as_str().unwrap(), m["content"].as_str().unwrap())).collect();
    assert_eq!(
        shown,
        [
            ("system", "Be brief."),
            ("user", "The quick"),
            ("assistant", " bro"),
            ("user", "quick"),
            ("assistant", " bro")
        ]
    );
    assert_eq!(said[2]["finish_reason"], "length");

    std::fs::write(
        place.path("loop.jinja"),
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    )
    .unwrap();
    let endless = told(&place, &["chat", "m", "--template", "loop.jinja"], "The\n");
    assert!(endless.code == Some(2) && endless.stderr.lines().count() == 1, "{}", endless.stderr);
}
