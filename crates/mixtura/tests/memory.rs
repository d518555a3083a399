//! What `mixtura train` says about memory before it starts, against what it held; and what it refuses.

mod common;

use common::{Place, Ran};
use serde_json::Value;

/// Two shapes by what their memory goes to: 27 million parameters for 2048 tokens, and 8192 tokens for 4 million parameters.
const STATE: &[&str] = &[];
const TOKENS: &[&str] = &["data.batch=64", "model.moe.experts=4", "model.moe.d_expert=256"];

/// The arguments that train a model of this shape for three steps, on a text written here.
fn arguments(place: &Place, shape: &[&str]) -> Vec<String> {
    std::fs::write(place.path("text.txt"), "Mars has exactly two natural satellites. ".repeat(5000)).unwrap();
    let config = "[model]\nd_model = 256\nlayers = 4\nheads = 4\ncontext = 128\nqk_norm = \"full\"\n\
        [model.moe]\nexperts = 16\ntop_k = 2\nd_expert = 512\n\
        [data]\nkind = \"text\"\npaths = [\"text.txt\"]\ntokenizer = \"byte\"\ncontext = 128\nbatch = 16\nvalidation_batches = 1\n\
        [train]\nsteps = 3\neval_every = 0\ncheckpoint_every = 0\n";
    std::fs::write(place.path("config.toml"), config).unwrap();
    let sets = shape.iter().flat_map(|set| ["--set", set]);
    ["train", "config.toml", "--json"].into_iter().chain(sets).map(String::from).collect()
}

fn train(place: &Place, shape: &[&str], more: &[&str]) -> Ran {
    let arguments = arguments(place, shape);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(more.iter().copied()).collect();
    place.run(&arguments)
}

#[test]
fn a_run_holds_about_what_it_said() {
    let with = |shape: &[&'static str], more: &[&'static str]| [shape, more].concat();
    let shapes = [
        with(STATE, &[]),
        with(STATE, &["train.precision=\"bf16\""]),
        // Every pack of every layer, twice.
        with(STATE, &["train.accumulation=2", "data.batch=8"]),
        with(TOKENS, &[]),
        with(TOKENS, &["train.checkpoint_activations=true"]),
    ];
    for shape in &shapes {
        let place = Place::new();
        let ran = train(&place, shape, &[]);
        assert_eq!(ran.code, Some(0), "{shape:?}: {}", ran.stderr);
        let document = ran.json();
        let said = document["memory"]["total"].as_f64().expect("a plan");
        let Some(held) = document["peak_memory"].as_f64() else {
            eprintln!("skipped: this system does not tell what a process held");
            return;
        };
        let parts = document["memory"].as_object().expect("parts").values().filter_map(Value::as_f64).sum::<f64>();
        assert_eq!(parts, 2.0 * said, "the total is the sum of the parts");
        eprintln!("{shape:?}: said {:.0} MiB, held {:.0} MiB: {:.3}", said / 1048576.0, held / 1048576.0, said / held);
        assert!((0.85..1.15).contains(&(said / held)), "{shape:?}: {} said, {held} held", document["memory"]);
        assert!(ran.stderr.contains("memory: about "), "{}", ran.stderr);
    }
}

#[test]
fn a_run_that_cannot_fit_is_refused_with_its_parts_and_a_way_out() {
    let place = Place::new();
    // 6 TB: no machine that runs tests has that.
    let shape = ["model.d_model=16384", "model.layers=64", "model.moe.d_expert=4096", "data.batch=2"];
    let ran = train(&place, &shape, &["--out", "run"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    for part in ["weights", "moments", "activations", "GiB", "a smaller model", "--force"] {
        assert!(ran.stderr.contains(part), "{part} is missing: {}", ran.stderr);
    }
    assert!(!place.path("run").exists(), "a refused run leaves nothing behind");
}

#[test]
fn force_starts_a_run_beyond_a_limit() {
    let place = Place::new();
    let arguments = arguments(&place, TOKENS).join(" ");
    // 600 MB of address space: the whole run takes more, with checkpointing less.
    let run = |more: &str| {
        let binary = env!("CARGO_BIN_EXE_mixtura");
        let limited = format!("ulimit -v 614400 && exec {binary} {arguments} --threads 1 --steps 1 --out run {more}");
        let output = std::process::Command::new("sh").arg("-c").arg(limited).current_dir(place.root()).output();
        Ran::from(output.expect("there is a shell"))
    };
    let refused = run("");
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
    for part in ["Max address space", "train.checkpoint_activations=true would take"] {
        assert!(refused.stderr.contains(part), "{part} is missing: {}", refused.stderr);
    }
    // Whether it then comes to its end is up to the limit.
    let forced = run("--force");
    assert!(forced.stderr.contains("memory: about"), "{}", forced.stderr);
}
