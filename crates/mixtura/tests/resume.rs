//! Runs that are moved, edited, made longer and looked at from elsewhere: they mean the same files from anywhere, never take others
//! for theirs, lose no history, and say what changed.

mod common;

use std::path::Path;

use common::{Place, Ran, TEXT_RUN, keys, metrics, text};
use serde_json::Value;

/// A place with a config and its text.
fn place() -> Place {
    let place = Place::new();
    std::fs::write(place.path("tiny.toml"), TEXT_RUN).unwrap();
    std::fs::write(place.path("small.txt"), text(1)).unwrap();
    place
}

fn train(place: &Place, more: &[&str]) -> Ran {
    let args = [&["train", "tiny.toml", "--json"], more].concat();
    place.ok(&args)
}

/// The binary in another directory of the place.
fn from(place: &Place, directory: &str, args: &[&str]) -> Ran {
    Ran::from(place.command(args).current_dir(place.path(directory)).output().unwrap())
}

fn read(path: impl AsRef<Path>) -> Vec<u8> {
    std::fs::read(path.as_ref()).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

fn same_weights(place: &Place, a: &str, b: &str) -> bool {
    read(place.path(a).join("model.safetensors")) == read(place.path(b).join("model.safetensors"))
}

fn edit(place: &Place, file: &str, from: &str, to: &str) {
    let before = String::from_utf8(read(place.path(file))).unwrap();
    assert!(before.contains(from), "no {from:?} in {file}:\n{before}");
    std::fs::write(place.path(file), before.replace(from, to)).unwrap();
}

#[test]
fn a_run_means_the_same_files_from_anywhere() {
    let place = place();
    train(&place, &["--out", "whole"]);
    train(&place, &["--out", "run", "--stop-after", "5"]);
    std::fs::create_dir(place.path("elsewhere")).unwrap();
    std::fs::write(place.path("elsewhere/small.txt"), text(2)).unwrap();
    let resumed = from(&place, "elsewhere", &["train", "--resume", "../run", "--json"]);
    assert_eq!(resumed.code, Some(0), "{}", resumed.stderr);
    assert_eq!(metrics(&place.path("run")), metrics(&place.path("whole")));
    assert!(same_weights(&place, "run/final", "whole/final"));
    let here = place.ok(&["eval", "run", "--json"]).json();
    for model in ["../run", "../run/final", "../run/checkpoints/step-10"] {
        assert_eq!(from(&place, "elsewhere", &["eval", model, "--json"]).json(), here);
    }
    // The run itself knows the whole path; what may leave it knows none.
    let root = std::path::absolute(place.root()).unwrap().display().to_string();
    let file = |name: &str| String::from_utf8(read(place.path(name))).unwrap();
    assert!(file("run/config.toml").contains(&format!("{root}/small.txt")));
    for model in ["run/final", "run/checkpoints/step-10"] {
        for name in ["run.toml", "data.json"] {
            let text = file(&format!("{model}/{name}"));
            assert!(text.contains("\"small.txt\"") && !text.contains(&root), "{model}/{name}:\n{text}");
        }
    }
}

#[test]
fn a_model_that_left_its_run_is_evaluated_on_the_text_it_knows_or_not_at_all() {
    let place = place();
    train(&place, &["--out", "run"]);
    let expected = place.ok(&["eval", "run", "--json"]).json();
    for directory in ["moved", "empty"] {
        std::fs::create_dir(place.path(directory)).unwrap();
    }
    std::fs::rename(place.path("run/final"), place.path("moved/model")).unwrap();
    assert_eq!(place.ok(&["eval", "moved/model", "--json"]).json(), expected, "the file of that name is the same");
    let gone = from(&place, "empty", &["eval", "../moved/model"]);
    assert_eq!(gone.code, Some(2), "{}", gone.stderr);
    assert!(gone.stderr.contains("small.txt") && gone.stderr.contains("--data FILE"), "{}", gone.stderr);
    std::fs::write(place.path("empty/small.txt"), text(2)).unwrap();
    let other = from(&place, "empty", &["eval", "../moved/model"]);
    assert_eq!(other.code, Some(2), "{}", other.stderr);
    assert!(other.stderr.contains("is not the one") && other.stderr.contains("--data FILE"), "{}", other.stderr);
    let asked = from(&place, "empty", &["eval", "../moved/model", "--data", "small.txt"]);
    assert_eq!(asked.code, Some(0), "{}", asked.stderr);
}

#[test]
fn another_text_of_the_same_name_and_length_is_refused() {
    let place = place();
    train(&place, &["--out", "run", "--stop-after", "5"]);
    assert_eq!(text(1).len(), text(2).len());
    std::fs::write(place.path("small.txt"), text(2)).unwrap();
    for command in [&["train", "--resume", "run"][..], &["eval", "run"], &["inspect", "run", "--data"]] {
        let refused = place.run(command);
        assert_eq!(refused.code, Some(2), "{command:?}: {}", refused.stderr);
        assert!(refused.stderr.contains("small.txt") && refused.stderr.contains("blake3"), "{}", refused.stderr);
    }
    // Without the run's own record, the checkpoint still knows.
    std::fs::remove_file(place.path("run/data.json")).unwrap();
    let refused = place.run(&["train", "--resume", "run"]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("data.paths[0]"), "{}", refused.stderr);
    // The same text somewhere else is the same text.
    std::fs::write(place.path("copy.txt"), text(1)).unwrap();
    edit(&place, "run/config.toml", "small.txt", "copy.txt");
    assert_eq!(place.ok(&["train", "--resume", "run", "--json"]).json()["step"], 10);
}

#[test]
fn a_changed_key_is_named_with_both_values() {
    let place = place();
    train(&place, &["--out", "run", "--stop-after", "5"]);
    let original = read(place.path("run/config.toml"));
    for (from, to, words) in [
        ("batch = 4", "batch = 8", ["data.batch was 4", "is 8"]),
        ("validation_fraction = 0.1", "validation_fraction = 0.2", ["data.validation_fraction was 0.1", "is 0.2"]),
        ("d_model = 32", "d_model = 64", ["d_model is 32", "64"]),
    ] {
        edit(&place, "run/config.toml", from, to);
        let refused = place.run(&["train", "--resume", "run"]);
        assert_eq!(refused.code, Some(2), "{to}: {}", refused.stderr);
        for word in words {
            assert!(refused.stderr.contains(word), "{to}: expected {word:?} in {}", refused.stderr);
        }
        std::fs::write(place.path("run/config.toml"), &original).unwrap();
    }
    // What may change is said, even under -q.
    edit(&place, "run/config.toml", "lr = 0.003", "lr = 0.001");
    let resumed = place.ok(&["train", "--resume", "run", "-q"]);
    assert!(resumed.stderr.contains("optimizer.lr was 0.003 until step 5 and is 0.001"), "{}", resumed.stderr);
    let unchanged = place.run(&["train", "--resume", "run", "-q"]);
    assert!(!unchanged.stderr.contains("was"), "{}", unchanged.stderr);
}

/// metrics.jsonl without the evaluations, which depend on where a run ended.
fn steps(place: &Place, run: &str) -> Vec<Value> {
    let mut lines = metrics(&place.path(run));
    lines.iter_mut().for_each(|line| drop(line.as_object_mut().unwrap().remove("eval")));
    lines
}

#[test]
fn a_finished_run_can_be_made_longer_on_purpose() {
    let place = place();
    let constant = ["--set", "schedule.kind=constant"];
    train(&place, &[&["--out", "whole"], &constant[..]].concat());
    train(&place, &[&["--out", "run", "--steps", "6"], &constant[..]].concat());
    let first = read(place.path("run/final/model.safetensors"));
    for args in [&["train", "--resume", "run"][..], &["train", "--resume", "run", "--steps", "6"]] {
        let refused = place.run(args);
        assert_eq!(refused.code, Some(2), "{}", refused.stderr);
        assert!(refused.stderr.contains("6 steps"), "{}", refused.stderr);
    }
    assert!(place.run(&["train", "--resume", "run"]).stderr.contains("--steps N"));
    // Stopped on the way, and gone on with: the new length is the run's own.
    let longer = place.ok(&["train", "--resume", "run", "--steps", "10", "--stop-after", "8", "--json"]);
    for words in ["10 steps now instead of 6", "the learning rate goes on", "final-step-6"] {
        assert!(longer.stderr.contains(words), "{}", longer.stderr);
    }
    assert!(!place.path("run/final").exists() && read(place.path("run/final-step-6/model.safetensors")) == first);
    assert_eq!(place.ok(&["train", "--resume", "run", "--json"]).json()["status"], "done");
    assert_eq!(steps(&place, "run"), steps(&place, "whole"));
    assert!(same_weights(&place, "run/final", "whole/final"));
    place.ok(&["eval", "run/final-step-6"]);
    assert!(place.run(&["train", "--resume", "run"]).stderr.contains("all its 10 steps"));

    // A cosine had come down to its end: what becomes of the rate is said. Editing config.toml does and says the same.
    train(&place, &["--out", "cosine", "--steps", "6"]);
    edit(&place, "cosine/config.toml", "steps = 6", "steps = 12");
    let longer = place.ok(&["train", "--resume", "cosine", "--json"]);
    assert!(longer.stderr.contains("cosine schedule: the learning rate was"), "{}", longer.stderr);
    assert_eq!(longer.json()["step"], 12);
    let shorter = place.run(&["train", "--resume", "cosine", "--steps", "11"]);
    assert_eq!(shorter.code, Some(2), "{}", shorter.stderr);
}

#[test]
fn a_run_that_lacks_only_its_final_model_gets_it_without_another_step() {
    let place = place();
    let whole = train(&place, &["--out", "run"]).json();
    let kept = read(place.path("run/final/model.safetensors"));
    let lines = metrics(&place.path("run"));
    std::fs::remove_dir_all(place.path("run/final")).unwrap();
    let resumed = place.ok(&["train", "--resume", "run"]);
    assert!(!resumed.stdout.contains("NaN") && !resumed.stdout.contains("speed"), "{}", resumed.stdout);
    assert!(read(place.path("run/final/model.safetensors")) == kept);
    std::fs::remove_dir_all(place.path("run/final")).unwrap();
    let resumed = place.ok(&["train", "--resume", "run", "--json"]).json();
    assert_eq!((&resumed["loss"], &resumed["eval"]), (&whole["loss"], &whole["eval"]));
    assert_eq!((resumed["tokens_per_second"].as_f64(), metrics(&place.path("run"))), (Some(0.0), lines));
    // Even with its history gone: then there is no last loss to show.
    std::fs::remove_dir_all(place.path("run/final")).unwrap();
    std::fs::remove_file(place.path("run/metrics.jsonl")).unwrap();
    let resumed = place.ok(&["train", "--resume", "run", "--json"]);
    assert!(resumed.json()["loss"].is_null() && resumed.stderr.contains("no line of step 10"), "{}", resumed.stderr);
}

#[test]
fn a_metrics_file_edited_by_hand_keeps_its_history() {
    let place = place();
    train(&place, &["--out", "whole"]);
    train(&place, &["--out", "run", "--stop-after", "5"]);
    let path = place.path("run/metrics.jsonl");
    let lines = String::from_utf8(read(&path)).unwrap();
    let sixth = lines.lines().last().unwrap().replace("\"step\":5", "\"step\":6");
    let (first, rest) = lines.split_once('\n').unwrap();
    std::fs::write(&path, format!("{first}\n\n# a note\n{rest}{sixth}\n{{\"step\":7,")).unwrap();
    let resumed = place.ok(&["train", "--resume", "run", "--json"]);
    for words in ["metrics.jsonl: cut 1 line (step 6)", "cut an unfinished last line", "line 3"] {
        assert!(resumed.stderr.contains(words), "{}", resumed.stderr);
    }
    let text = String::from_utf8(read(&path)).unwrap();
    let kept: Vec<&str> = text.lines().collect();
    assert_eq!((kept.len(), kept[1], kept[2]), (12, "", "# a note"));
    std::fs::write(&path, text.replace("\n# a note", "").replace("\n\n", "\n")).unwrap();
    assert_eq!(metrics(&place.path("run")), metrics(&place.path("whole")));
}

#[test]
fn a_run_goes_on_with_its_own_tokenizer() {
    let place = place();
    let bpe = ["--set", "data.tokenizer=bpe", "--set", "data.bpe_vocab=280"];
    train(&place, &[&["--out", "bpe", "--steps", "1"], &bpe[..]].concat());
    train(&place, &["--out", "byte", "--steps", "1"]);
    let copy = |from: &str| std::fs::copy(place.path(from).join("final/tokenizer.json"), place.path("tok.json"));
    copy("bpe").unwrap();
    let file = ["--set", "data.tokenizer=tok.json"];
    train(&place, &[&["--out", "whole"], &file[..]].concat());
    for (run, then) in [("same", "unchanged"), ("other", "another"), ("gone", "gone")] {
        copy("bpe").unwrap();
        train(&place, &[&["--out", run, "--stop-after", "5"], &file[..]].concat());
        match then {
            "another" => drop(copy("byte").unwrap()),
            "gone" => std::fs::remove_file(place.path("tok.json")).unwrap(),
            _ => {}
        }
        let resumed = place.ok(&["train", "--resume", run, "-q"]);
        let said = resumed.stderr.contains("tok.json") && resumed.stderr.contains("its own copy");
        assert_eq!(said, then != "unchanged", "{then}: {}", resumed.stderr);
        assert!(same_weights(&place, &format!("{run}/final"), "whole/final"), "{then}");
    }
    // One that was trained on the text is not trained again.
    train(&place, &[&["--out", "bpe-whole"], &bpe[..]].concat());
    train(&place, &[&["--out", "bpe-half", "--stop-after", "5"], &bpe[..]].concat());
    place.ok(&["train", "--resume", "bpe-half", "-q"]);
    assert!(same_weights(&place, "bpe-half/final", "bpe-whole/final"));
}

#[test]
fn one_file_may_be_a_plain_string() {
    let place = place();
    std::fs::write(place.path("other.txt"), text(2)).unwrap();
    for (set, name) in
        [("data.paths=other.txt", "other.txt"), ("data.paths=[\"other.txt\", \"small.txt\"]", "small.txt")]
    {
        let out = format!("run-{name}");
        train(&place, &["--out", &out, "--steps", "1", "--set", set]);
        let config = String::from_utf8(read(place.path(&out).join("config.toml"))).unwrap();
        assert!(config.contains(&format!("/{name}\"")), "{config}");
    }
    let refused = place.run(&["train", "tiny.toml", "--out", "no", "--set", "data.paths=3"]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("a file name or a list of file names"), "{}", refused.stderr);
}

#[test]
fn a_number_that_json_lacks_is_written_and_survives_a_resume() {
    let place = place();
    let wild = [
        "--set",
        "optimizer.weight_decay=0.0",
        "--set",
        "optimizer.lr=30.0",
        "--set",
        "schedule.kind=constant",
        "--set",
        "schedule.warmup=0",
    ];
    train(
        &place,
        &[&["--out", "run", "--steps", "4", "--stop-after", "2", "--set", "train.eval_every=1"], &wild[..]].concat(),
    );
    let lines = metrics(&place.path("run"));
    assert_eq!(lines[1]["eval"]["perplexity"], "Infinity", "{}", lines[1]["eval"]);
    let resumed = place.ok(&["train", "--resume", "run", "--json"]);
    assert_eq!(resumed.json()["eval"]["perplexity"], "Infinity");
    assert_eq!((metrics(&place.path("run")).len(), &metrics(&place.path("run"))[..2]), (4, &lines[..]));
    let eval = place.ok(&["eval", "run", "--json"]).json();
    assert_eq!(eval["perplexity"], "Infinity");
    assert!(eval["loss"].as_f64().unwrap() > 710.0);
}

#[cfg(target_os = "linux")]
#[test]
fn a_path_that_is_no_utf8_works_everywhere() {
    use std::os::unix::ffi::OsStrExt;
    let odd = |bytes: &'static [u8]| std::ffi::OsStr::from_bytes(bytes);
    let place = Place::new();
    let here = place.root().join(odd(b"d\xfe"));
    std::fs::create_dir(&here).unwrap();
    std::fs::write(here.join("tiny.toml"), TEXT_RUN).unwrap();
    std::fs::write(here.join(odd(b"tiny\xfd.toml")), TEXT_RUN).unwrap();
    std::fs::write(here.join("small.txt"), text(1)).unwrap();
    let out = odd(b"run\xff");
    let ran = |first: &[&str], path: &std::ffi::OsStr, rest: &[&str]| {
        let mut command = place.command(first);
        let ran = Ran::from(command.arg(path).args(rest).current_dir(&here).output().unwrap());
        assert_eq!(ran.code, Some(0), "{first:?} {path:?} {rest:?}: {}", ran.stderr);
        ran
    };
    let document = ran(&["train", "tiny.toml", "--json", "--stop-after", "5", "--out"], out, &[]).json();
    assert!(document["run"].as_str().unwrap().starts_with("run"), "{document}");
    assert_eq!(ran(&["train", "--json", "--resume"], out, &[]).json()["step"], 10);
    ran(&["train", "--resume"], out, &["--steps", "12"]);
    ran(&["train", "--out", "named-config", "--steps", "1"], odd(b"tiny\xfd.toml"), &[]);
    let eval = ran(&["eval"], out, &["--json"]).json();
    assert_eq!(keys(&eval), ["bits_per_byte", "loss", "perplexity", "tokens"]);
    ran(&["eval"], out, &["--data", "small.txt"]);
    ran(&["inspect"], out, &["--json", "--data"]).json();
    ran(&["generate"], out, &["--json", "--prompt", "a", "--max-tokens", "3"]).json();
    ran(&["logits"], out, &["--json", "--text", "a"]).json();
    std::fs::rename(here.join("small.txt"), here.join(odd(b"text\xf0"))).unwrap();
    ran(&["eval", "named-config/final", "--json", "--data"], odd(b"text\xf0"), &[]).json();
}
