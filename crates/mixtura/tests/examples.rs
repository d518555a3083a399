//! Every command that a help text or a document shows is run, with the real binary, in a directory with small stand-ins for models and
//! data. What the test does not know how to run fails it, so nothing is left out in silence.
//!
//! To keep up with a new command: a file that its examples name goes into [`stand_ins`], what would take long gets more arguments in
//! [`MORE`], and a program that is not `mixtura` a line in [`other_program`].

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::Place;

/// Appended to a command, by its first word, so that it ends within a second or two. An argument that the example gives itself wins over
/// the one here.
const MORE: &[(&str, &[&str])] = &[
    ("train", SMALL),
    ("eval", &["--questions", "2"]),
    ("generate", &["--max-tokens", "8"]),
    ("chat", &["--max-tokens", "8"]),
    ("bench", &["--seconds", "0.001", "--shrink", "32"]),
];

/// Makes any config small. Not with `--resume`, which takes the config of the run.
const SMALL: &[&str] = &[
    "--stop-after",
    "2",
    "--set",
    "model.d_model=32",
    "--set",
    "model.layers=2",
    "--set",
    "model.heads=2",
    "--set",
    "data.batch=2",
    "--set",
    "data.validation_batches=1",
    "--set",
    "data.propositions.evaluation_items=2",
    "--set",
    "train.questions=2",
];

/// Words in capitals that stand for something of the reader's.
const PLACEHOLDERS: &[(&str, &str)] = &[("NAME", "top_k"), ("MODEL", "runs/quickstart"), ("TEXTS", "input.txt")];

/// Documents that are records of a day, not instructions.
const RECORDS: &[&str] = &["docs/LOG.md", "bench/results"];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// What the examples find around them: the repository's configs and fixtures, texts, and runs that were short.
fn stand_ins(place: &Place) {
    let text =
        "To be, or not to be: that is the question.\nROMEO: Mars has exactly two natural satellites.\n".repeat(300);
    for file in ["tinyshakespeare.txt", "input.txt", "other.txt"] {
        std::fs::write(place.path(file), &text).unwrap();
    }
    for file in ["question.txt", "questions.txt", "prompt.txt"] {
        std::fs::write(place.path(file), "To be, or not to be").unwrap();
    }
    std::fs::create_dir(place.path("books")).unwrap();
    std::fs::write(place.path("books/one.txt"), &text).unwrap();
    let lines =
        "{\"text\": \"To be\", \"content\": \"or not\", \"body\": \"to be: that is the question.\"}\n".repeat(300);
    for file in ["pages.jsonl", "other.jsonl"] {
        std::fs::write(place.path(file), &lines).unwrap();
    }
    std::fs::create_dir(place.path("configs")).unwrap();
    for entry in std::fs::read_dir(repository().join("configs")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, place.path("configs").join(path.file_name().unwrap())).unwrap();
    }
    std::fs::create_dir(place.path("fixtures")).unwrap();
    for copy in ["golden.json", "fixtures/golden.json"] {
        std::fs::copy(repository().join("fixtures/golden.json"), place.path(copy)).unwrap();
    }
    // A home with bash-completion.
    std::fs::create_dir_all(place.path(".local/share/bash-completion/completions")).unwrap();
    // A finished run whose model is there under every name that a model has in an example, and two that can go on.
    place.tiny_model("runs/quickstart", "2");
    copy_directory(&place.path("runs/quickstart"), &place.path("runs/tiny"));
    copy_directory(&place.path("runs/quickstart/final"), &place.path("model"));
    copy_directory(&place.path("runs/quickstart/final"), &place.path("olmoe"));
    let template = "{% for message in messages %}{{ message.content }}\n{% endfor %}";
    std::fs::write(place.path("model/chat_template.jinja"), template).unwrap();
    std::fs::copy(place.path("model/tokenizer.json"), place.path("tokenizer.json")).unwrap();
    place.ok(&place.train_args(&["--steps", "4", "--stop-after", "1", "--out", "runs/k4"]));
    copy_directory(&place.path("runs/k4"), &place.path("runs/shakespeare"));
}

/// Programs of the repository that are not run here: what the line names must exist. `None` for a program nobody knows.
fn other_program(line: &str) -> Option<Vec<PathBuf>> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let after = |flag: &str| words.iter().position(|word| *word == flag).and_then(|at| words.get(at + 1));
    let package = || after("-p").map(|name| PathBuf::from("crates").join(name.trim_start_matches("mixtura-")));
    Some(match words[..] {
        ["cargo", "test", "--workspace"] => vec!["Cargo.toml".into()],
        ["cargo", "test", "--workspace", ..] => {
            let file = format!("{}.rs", after("--test")?);
            let crates = std::fs::read_dir(repository().join("crates")).ok()?;
            let tests = crates
                .filter_map(|entry| Some(Path::new("crates").join(entry.ok()?.file_name()).join("tests").join(&file)));
            vec![tests.into_iter().find(|path| repository().join(path).exists())?]
        }
        ["cargo", "test", ..] => vec![package()?.join("tests").join(format!("{}.rs", after("--test")?))],
        ["cargo", "run", ..] => vec![package()?.join("examples").join(format!("{}.rs", after("--example")?))],
        [".ci/run"] => vec![".ci/run".into()],
        ["bench/compare", ..] => vec!["bench/compare".into()],
        ["fuzz/run", ..] => vec!["fuzz/run".into()],
        _ => return None,
    })
}

/// A command as it is shown, and where.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Example {
    line: String,
    place: String,
    /// What is shown to be printed, `...` aside.
    printed: Vec<String>,
}

#[test]
fn every_command_that_is_shown_runs() {
    let place = Place::new();
    stand_ins(&place);
    let shims = place.path("bin");
    write_shims(&shims);
    let mut mentions = BTreeSet::new();
    let mut examples = documented(&mut mentions);
    examples.extend(helped(&place, &mut mentions));
    assert!(examples.len() > 30, "only {} examples were found: is a document written in another way?", examples.len());

    let mut failures = Vec::new();
    let mut seen = BTreeSet::new();
    let mut fresh = 0;
    for example in &examples {
        if !is_ours(&example.line) {
            match other_program(&example.line) {
                None => failures.push(format!("{}: nobody knows how to run `{}`", example.place, example.line)),
                Some(files) => {
                    failures.extend(files.into_iter().filter(|file| !repository().join(file).exists()).map(|file| {
                        format!("{}: `{}` needs {}, which does not exist", example.place, example.line, file.display())
                    }))
                }
            }
            continue;
        }
        if !seen.insert((example.line.clone(), example.printed.clone())) {
            continue;
        }
        fresh += 1;
        let scratch = place.path(&format!("scratch-{fresh}"));
        for part in ["configs", "fixtures", "runs", "model", "olmoe", "books", ".local"] {
            copy_directory(&place.path(part), &scratch.join(part));
        }
        for entry in std::fs::read_dir(place.root()).unwrap().map(Result::unwrap) {
            if entry.path().is_file() {
                std::fs::copy(entry.path(), scratch.join(entry.file_name())).unwrap();
            }
        }
        if starts_a_run(&example.line) {
            std::fs::remove_dir_all(scratch.join("runs")).unwrap();
        }
        failures.extend(run(example, &scratch, &shims).err());
    }
    failures.extend(mentions.iter().filter_map(|mention| check_mention(&place, mention).err()));
    assert!(failures.is_empty(), "{} of {fresh} examples fail:\n\n{}", failures.len(), failures.join("\n\n"));
}

/// Runs the line in a shell, as a reader would who pastes it.
fn run(example: &Example, scratch: &Path, shims: &Path) -> Result<(), String> {
    let line = PLACEHOLDERS.iter().fold(example.line.clone(), |line, (word, value)| {
        line.split(' ').map(|part| if part == *word { value } else { part }).collect::<Vec<_>>().join(" ")
    });
    let path = format!("{}:{}", shims.display(), std::env::var("PATH").unwrap());
    // -e: of several commands on a line, none may fail.
    let Output { status, stdout, stderr } = Command::new("sh")
        .args(["-e", "-c", &line])
        .current_dir(scratch)
        .env("PATH", path)
        .env("HOME", scratch)
        .env_remove("MIXTURA_ISA")
        .output()
        .unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    let place = &example.place;
    if !status.success() {
        return Err(format!("{place}: `{line}` ends with {status}\n{stdout}{stderr}"));
    }
    if line.split_whitespace().any(|word| word == "--json") && !line.contains('|') && !line.contains('>') {
        serde_json::from_str::<serde_json::Value>(&stdout)
            .map_err(|error| format!("{place}: `{line}` prints no single JSON document: {error}\n{stdout}"))?;
    }
    let printed: BTreeSet<&str> = stdout.lines().map(str::trim_end).collect();
    match example.printed.iter().find(|line| !printed.contains(line.as_str())) {
        Some(missing) => Err(format!("{place}: `{line}` does not print\n{missing}\nbut\n{stdout}")),
        None => Ok(()),
    }
}

/// `mixtura` and, for `cargo run --release -- ...`, `cargo`: the binary under test, with [`MORE`] arguments.
fn write_shims(directory: &Path) {
    let quote = |word: &str| format!("'{word}'");
    let mut cases = String::new();
    for (command, more) in MORE {
        // Every option here has a value. Only `--set` may be given again.
        let mut adds = String::new();
        for pair in more.chunks(2) {
            let given = if pair[0] == "--set" { "false".to_string() } else { format!("given {}", quote(pair[0])) };
            let words: Vec<String> = pair.iter().map(|word| quote(word)).collect();
            adds += &format!("    {given} \"$@\" || set -- \"$@\" {}\n", words.join(" "));
        }
        let unless = if *command == "train" { "given '--resume' \"$@\" || {\n" } else { "{\n" };
        cases += &format!("  {command})\n    {unless}{adds}    }}\n    ;;\n");
    }
    let script = format!(
        "#!/bin/sh\ngiven() {{ option=$1; shift; for word in \"$@\"; do [ \"$word\" = \"$option\" ] && return 0; done; return 1; }}\n\
         case \"$1\" in\n{cases}esac\nexec '{}' \"$@\"\n",
        env!("CARGO_BIN_EXE_mixtura")
    );
    let cargo = "#!/bin/sh\n# run --release -- ARGS\n[ \"$1 $2 $3\" = 'run --release --' ] || exit 99\nshift 3\nexec mixtura \"$@\"\n";
    std::fs::create_dir(directory).unwrap();
    for (name, script) in [("mixtura", script.as_str()), ("cargo", cargo)] {
        std::fs::write(directory.join(name), script).unwrap();
        let status = Command::new("chmod").arg("+x").arg(directory.join(name)).status().unwrap();
        assert!(status.success());
    }
}

/// Whether the line runs the binary: alone, through cargo, or at the end of a pipe.
fn is_ours(line: &str) -> bool {
    let commands = line.split(['|', ';']).map(str::trim);
    commands.clone().any(|command| command.starts_with("mixtura ") || command == "mixtura")
        || line.starts_with("cargo run --release -- ")
}

fn starts_a_run(line: &str) -> bool {
    (line.starts_with("mixtura train") || line.starts_with("cargo run --release -- train"))
        && !line.contains("--resume")
}

/// Every example of `--help`, of the command and of each of its commands however deep.
fn helped(place: &Place, mentions: &mut BTreeSet<Example>) -> Vec<Example> {
    let mut examples = Vec::new();
    let mut commands = vec![Vec::<String>::new()];
    let mut found = 0;
    while let Some(command) = commands.pop() {
        let words: Vec<&str> = command.iter().map(String::as_str).chain(["--help"]).collect();
        // Wide enough that no example is wrapped.
        let output = place.command(&words).env("COLUMNS", "1000").output().unwrap();
        let help = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && !help.is_empty(), "mixtura {words:?}");
        found += 1;
        let title = format!("mixtura {} --help", command.join(" "));
        let mut section = "";
        for line in help.lines() {
            if !line.starts_with(' ') {
                section = line.trim();
            }
            inline(line, &title, &mut examples, mentions);
            // "for example model.moe.top_k=4;" in the help of an option.
            let shown = line.split("for example ").skip(1).filter_map(|rest| rest.split([' ', ';', ',']).next());
            examples.extend(shown.map(|word| {
                let line = if word.contains('=') { format!("mixtura train --set '{word}'") } else { word.to_string() };
                Example { line, place: title.clone(), printed: Vec::new() }
            }));
            let Some(item) = line.strip_prefix("  ").map(str::trim_end).filter(|item| !item.is_empty()) else {
                continue;
            };
            match section {
                // A subcommand begins at the third column; its help goes on further right.
                "Commands:" if !item.starts_with(' ') => {
                    let name = item.split_whitespace().next().unwrap().to_string();
                    if name != "help" {
                        commands.push([&command[..], &[name]].concat());
                    }
                }
                "Example:" | "Examples:" | "Start with:" => {
                    // Three spaces and more set an explanation apart.
                    let line = item.split("   ").next().unwrap().trim().to_string();
                    examples.push(Example { line, place: title.clone(), printed: Vec::new() });
                }
                _ => {}
            }
        }
    }
    assert!(found > 10, "{found} help texts");
    examples
}

/// Every example of the documents and of the comments in configs.
fn documented(mentions: &mut BTreeSet<Example>) -> Vec<Example> {
    let mut examples = Vec::new();
    for file in documents() {
        let name = file.strip_prefix(repository()).unwrap().display().to_string();
        let text = std::fs::read_to_string(&file).unwrap();
        if name.ends_with(".toml") {
            let lines = text.lines().filter_map(|line| line.strip_prefix('#')).map(str::trim);
            let commands = lines.filter(|line| is_ours(line));
            examples.extend(commands.map(|line| Example { line: line.into(), place: name.clone(), printed: vec![] }));
            continue;
        }
        let mut fence: Option<String> = None;
        for (number, line) in text.lines().enumerate() {
            let place = format!("{name}:{}", number + 1);
            if let Some(language) = line.trim_start().strip_prefix("```") {
                fence = if fence.is_some() { None } else { Some(language.trim().to_string()) };
                continue;
            }
            let add = |examples: &mut Vec<Example>, line: &str| {
                // A word that begins with # begins a comment, in a document as in a shell.
                let line = line.find(" #").map_or(line, |at| &line[..at]).trim().to_string();
                if !line.is_empty() && !line.starts_with('#') {
                    examples.push(Example { line, place: place.clone(), printed: Vec::new() });
                }
            };
            match fence.as_deref() {
                Some("sh" | "bash" | "shell") => add(&mut examples, line),
                // A session: what is typed after a $, what is printed below.
                Some("console" | "text" | "") => match line.strip_prefix("$ ") {
                    Some(typed) => add(&mut examples, typed),
                    None => match examples.last_mut() {
                        Some(last)
                            if last.place.starts_with(&format!("{name}:")) && !line.is_empty() && line != "..." =>
                        {
                            let in_session = text.lines().take(number).collect::<Vec<_>>();
                            let opened = in_session.iter().rposition(|line| line.starts_with("```")).unwrap();
                            if in_session[opened..].iter().any(|line| line.starts_with("$ ")) {
                                last.printed.push(line.trim_end().to_string());
                            }
                        }
                        _ => {}
                    },
                },
                Some(_) => {}
                None if line.starts_with("    ") && (is_ours(line.trim()) || other_program(line.trim()).is_some()) => {
                    add(&mut examples, line);
                }
                None => inline(line, &place, &mut examples, mentions),
            }
        }
        assert!(fence.is_none(), "{name}: a code block is not closed");
    }
    examples
}

/// Markdown files and configs of the repository, records excepted.
fn documents() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for directory in [".", "docs", "bench", "configs", "fixtures", "crates/mixtura"] {
        let Ok(entries) = std::fs::read_dir(repository().join(directory)) else { continue };
        let paths = entries.map(|entry| entry.unwrap().path());
        found.extend(paths.filter(|path| {
            let relative = path.strip_prefix(repository()).unwrap().display().to_string();
            let shown = relative.ends_with(".md") || (directory == "configs" && relative.ends_with(".toml"));
            shown && !RECORDS.iter().any(|record| relative.trim_start_matches("./").starts_with(record))
        }));
    }
    found.sort();
    assert!(found.len() > 15, "{found:?}");
    found
}

/// Commands in backticks. One that has only names of commands and options is a mention; others are examples.
fn inline(line: &str, place: &str, examples: &mut Vec<Example>, mentions: &mut BTreeSet<Example>) {
    let ours =
        |code: &&str| code.starts_with("mixtura ") || code.starts_with("cargo ") || code.starts_with("fuzz/run ");
    for code in line.split('`').skip(1).step_by(2).filter(ours) {
        let example = Example { line: code.to_string(), place: place.to_string(), printed: Vec::new() };
        let mut words = code.split_whitespace().skip(1);
        let is_name = |word: &str| word.trim_start_matches("--").chars().all(|c| c.is_ascii_lowercase() || c == '-');
        if code.starts_with("mixtura ") && words.all(is_name) {
            mentions.insert(example);
        } else {
            examples.push(example);
        }
    }
}

/// A mention names a command that exists and options that it has. Its last words may be values: `mixtura bench scaling`.
fn check_mention(place: &Place, mention: &Example) -> Result<(), String> {
    let words: Vec<&str> = mention.line.split_whitespace().skip(1).collect();
    let names: Vec<&str> = words.iter().copied().take_while(|word| !word.starts_with('-')).collect();
    let help = place.run(&[&names[..], &["--help"]].concat());
    let text = format!("{}: `{}`", mention.place, mention.line);
    if help.code != Some(0) {
        return Err(format!("{text} names no command: {}", help.stderr));
    }
    for word in words {
        let known = if names.first() == Some(&word) { true } else { help.stdout.contains(word) };
        if !known {
            return Err(format!("{text}: the help of that command does not know {word}"));
        }
    }
    Ok(())
}

fn copy_directory(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            copy_directory(&entry.path(), &to.join(entry.file_name()));
        } else {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}
