//! What scripts rely on: exit codes and the keys of every JSON document.

mod common;

use common::{Place, Ran, keys};
use serde_json::Value;

#[test]
fn a_trained_model_can_be_evaluated_sampled_and_looked_into() {
    let place = Place::new();
    let document = place.tiny_model("run", "6");
    assert_eq!(
        keys(&document),
        [
            "accuracy",
            "eval",
            "loss",
            "memory",
            "parameters",
            "peak_memory",
            "run",
            "samples",
            "seconds",
            "status",
            "step",
            "step_seconds",
            "tokens",
            "tokens_per_second",
            "training_seconds"
        ]
    );
    let first = &document["samples"][0];
    assert_eq!(
        first["prompt"],
        "Is the following proposition true: \"Earth has exactly two natural satellites OR Mars has exactly one natural satellite.\""
    );
    assert_eq!(first["expected"], "false");
    for file in ["config.toml", "metrics.jsonl", "final/model.safetensors", "final/config.json", "final/tokenizer.json"]
    {
        assert!(place.path("run").join(file).exists(), "{file}");
    }

    let eval = place.ok(&["eval", "run", "--json", "--questions", "2"]).json();
    assert_eq!(keys(&eval), ["accuracy", "bits_per_byte", "loss", "perplexity", "tokens"]);
    assert_eq!(keys(&eval["accuracy"]), ["by_depth", "by_form", "by_split", "groups", "overall"]);
    assert_eq!(keys(&eval["accuracy"]["by_split"]), ["content", "depth", "form", "iid"]);
    assert_eq!(eval["loss"], document["eval"]["loss"], "the saved model is the one that was evaluated");

    std::fs::write(place.path("text.txt"), "Mars has exactly two natural satellites. ".repeat(200)).unwrap();
    let eval = place.ok(&["eval", "run", "--json", "--data", "text.txt"]).json();
    assert_eq!(keys(&eval), ["bits_per_byte", "loss", "perplexity", "tokens"]);

    let generate = [
        "generate",
        "run",
        "--prompt",
        "Is the following",
        "--max-tokens",
        "12",
        "--temperature",
        "0.9",
        "--seed",
        "5",
    ];
    let with_json = |args: &[&str]| place.ok(&[args, &["--json"]].concat()).json();
    let text = with_json(&generate);
    let expected =
        ["finish_detail", "finish_reason", "ids", "prompt", "prompt_tokens", "text", "tokens", "tokens_per_second"];
    assert_eq!(keys(&text), expected);
    assert_eq!(text["ids"], with_json(&generate)["ids"], "the same seed writes the same text");
    let plain = place.ok(&generate);
    assert_eq!(plain.stdout, format!("Is the following{}\n", text["text"].as_str().unwrap()));

    let inspect = place.ok(&["inspect", "run", "--json", "--data", "text.txt"]).json();
    assert_eq!(keys(&inspect), ["family", "layers", "load", "parameters", "path", "specialisation", "tensors"]);
    let load = &inspect["load"][0];
    assert_eq!(load["selections"].as_array().unwrap().len(), 4);
    // "Mars has exactly two natural satellites." again and again: few distinct tokens, each with both its choices.
    let top: Vec<&Value> = load["top_tokens"].as_array().unwrap().iter().flat_map(|e| e.as_array().unwrap()).collect();
    let shares: f64 = top.iter().filter(|token| token["text"] == "Mars").map(|t| t["share"].as_f64().unwrap()).sum();
    assert!((shares - 2.0).abs() < 1e-9, "both choices of Mars are listed: {top:?}");
    // Two layers, two places.
    let rows = inspect["specialisation"].as_array().unwrap();
    assert_eq!(rows.len(), 4);
    for row in rows {
        let expected = ["content", "form", "layer", "place", "same_content", "separates_form"];
        assert_eq!(keys(row), expected);
        assert!((0.0..=1.0).contains(&row["form"]["normalised"].as_f64().unwrap()));
    }
    let held_back = place.ok(&["inspect", "run", "--json", "--data"]).json();
    assert_eq!(held_back["specialisation"], inspect["specialisation"], "the probe brings its own propositions");
    assert_ne!(held_back["load"], inspect["load"]);
    let total: u64 = inspect["tensors"].as_array().unwrap().iter().map(|t| t["values"].as_u64().unwrap()).sum();
    assert_eq!(inspect["parameters"]["total"].as_u64(), Some(total));
}

#[test]
fn a_router_that_lets_tokens_see_later_ones_is_trained_and_named() {
    let place = Place::new();
    let train =
        |out, more: &[&str]| place.ok(&place.train_args(&[&["--steps", "1", "--out", out], more].concat())).stderr;
    let leaky = train("leaky", &["--set", "model.moe.router.policy=expert_choice"]);
    assert!(leaky.contains("not causal: experts take the best tokens of the whole batch"), "{leaky}");
    assert!(!train("causal", &[]).contains("not causal"));
}

#[test]
fn balance_losses_are_compared_and_coefficients_converted() {
    let place = Place::new();
    let page = include_str!("../../../docs/balance_losses.md");
    let printed = place.ok(&["route", "losses"]).stdout;
    assert!(page.contains(&printed), "docs/balance_losses.md shows something else than\n{printed}");

    // Hugging Face's Mixtral: 0.01 with k = 2 and 32 layers.
    let to = |library: &str| {
        let sizes = ["route", "losses", "--experts", "8", "--top-k", "2", "--layers", "32", "--from", "hf"];
        let document = place.ok(&[&sizes[..], &["--to", library, "--coef", "0.01", "--json"]].concat()).json();
        assert_eq!(keys(&document), ["conversion", "experts", "layers", "losses", "top_k"]);
        document["conversion"]["equals"].as_f64().unwrap()
    };
    assert!((to("megablocks") - 0.02).abs() < 1e-15);
    assert!((to("megatron") - 6.25e-4).abs() < 1e-15);

    let refused = place.run(&["route", "losses", "--from", "hf", "--to", "vmoe-load", "--coef", "0.01"]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("vmoe-load is a squared coefficient of variation"), "{}", refused.stderr);
    let refused = place.run(&["route", "losses", "--experts", "4", "--top-k", "5"]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("E = 4, k = 5"), "{}", refused.stderr);
}

#[test]
fn logits_come_with_what_the_routers_decided() {
    let place = Place::new();
    place.tiny_model("run", "2");
    let logits = place.ok(&["logits", "run", "--ids", "1,2,3", "--routing", "--json"]).json();
    assert_eq!(keys(&logits), ["ids", "logits", "routing"]);
    assert_eq!(logits["logits"].as_array().unwrap().len(), 3);
    let layers = logits["routing"].as_array().unwrap();
    assert_eq!((layers.len(), layers[1]["layer"].as_u64()), (2, Some(1)));
    assert_eq!(keys(&layers[0]), ["experts", "layer", "scores", "weights"]);
    for token in 0..3 {
        let of = |key: &str| {
            layers[0][key][token].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect::<Vec<_>>()
        };
        let (experts, weights, scores) = (of("experts"), of("weights"), of("scores"));
        assert_eq!((experts.len(), scores.len()), (2, 4));
        assert!(scores[experts[0] as usize] >= scores[experts[1] as usize]);
        assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-6);
    }
    // A token's logits depend on its past alone.
    let shorter = place.ok(&["logits", "run", "--ids", "1,2", "--json"]).json();
    assert_eq!(shorter["logits"][1], logits["logits"][1]);
    assert!(shorter.get("routing").is_none());

    let too_long = vec!["1"; 1000].join(",");
    for (ids, words) in [("999999", "vocabulary"), (too_long.as_str(), "1000")] {
        let ran = place.run(&["logits", "run", "--ids", ids, "--json"]);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(ran.stderr.contains(words), "{}", ran.stderr);
        assert_eq!(keys(&ran.json()), ["error", "exit_code"]);
    }
}

#[test]
fn golden_vectors_are_recomputed() {
    let place = Place::new();
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/golden.json");
    let report = place.ok(&["route", "check", golden, "--json"]).json();
    assert_eq!(keys(&report), ["cases", "failed", "passed", "skipped"]);
    assert_eq!(keys(&report["cases"][0]), ["id", "max_abs_diff", "message", "status"]);
    assert_eq!(report["failed"], 0);
    let one = place.ok(&["route", "check", golden, "--case", "F1", "--json"]).json();
    assert_eq!((one["passed"].as_u64(), one["cases"].as_array().unwrap().len()), (Some(1), 1));

    let changed = std::fs::read_to_string(golden).unwrap().replacen("0.64391", "0.74391", 1);
    std::fs::write(place.path("changed.json"), changed).unwrap();
    let ran = place.run(&["route", "check", "changed.json", "--json"]);
    assert_eq!((ran.code, ran.json()["failed"].as_u64().unwrap() > 0), (Some(1), true));

    let ran = place.run(&["route", "check", golden, "--case", "F2"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("F2"), "{}", ran.stderr);
}

#[test]
fn policies_are_explained() {
    let place = Place::new();
    let all = place.ok(&["route", "explain", "--json"]).json();
    let names: Vec<&str> = all.as_array().unwrap().iter().map(|e| e["name"].as_str().unwrap()).collect();
    assert!(names.contains(&"top_k"), "{names:?}");
    for name in names {
        assert!(place.ok(&["route", "explain", "--policy", name]).stdout.contains(name));
    }
    let ran = place.run(&["route", "explain", "--policy", "top_kk"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("top_k"), "{}", ran.stderr);
}

#[test]
fn doctor_and_completions_print_one_document() {
    let place = Place::new();
    let doctor = place.ok(&["doctor", "--json", "-q"]);
    assert_eq!(doctor.stderr, "");
    assert!(doctor.json()["isa_available"].as_array().unwrap().contains(&"scalar".into()));
    let forced = Ran::from(place.command(&["doctor", "--json"]).env("MIXTURA_ISA", "scalar").output().unwrap());
    assert_eq!(forced.json()["isa"], "scalar");
    for way in forced.json()["ways"].as_array().unwrap() {
        assert!(way["way"] == "fma" && way["reason"].as_str().unwrap().contains("no VDPBF16PS"), "{way}");
    }
    assert_eq!(forced.json()["fastest_precision"], "f32");
    for shell in ["bash", "zsh", "fish"] {
        assert!(place.ok(&["completions", shell]).stdout.contains("mixtura"));
    }
    assert_eq!(keys(&place.ok(&["completions", "bash", "--json"]).json()), ["script", "shell"]);
}

#[test]
fn benchmark_rows_have_the_fixed_keys() {
    let place = Place::new();
    let rows = place.ok(&["bench", "gemm", "--precision", "f32", "--seconds", "0.01", "--json"]).json();
    let names: Vec<&str> = rows.as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    for name in ["ceiling_amx", "ceiling_read", "gemm"] {
        assert!(names.contains(&name), "{names:?}");
    }
    for row in rows.as_array().unwrap() {
        assert_eq!(
            keys(row),
            [
                "batch",
                "ceiling",
                "gbps",
                "gflops",
                "ms",
                "name",
                "peak_mib",
                "precision",
                "shape",
                "share",
                "start_seconds",
                "tokens_per_second",
                "way"
            ]
        );
    }
}

#[test]
fn the_configs_of_the_repository_are_valid() {
    // All but the data files are there, so each is refused for its data and for nothing else; the quickstarts start.
    let place = Place::new();
    let configs = concat!(env!("CARGO_MANIFEST_DIR"), "/../../configs");
    for entry in std::fs::read_dir(configs).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_string();
        let ran = place.run(&[
            "train",
            path.to_str().unwrap(),
            "--set",
            "data.batch=1",
            "--steps",
            "100000",
            "--stop-after",
            "1",
            "-q",
        ]);
        match name.starts_with("quickstart") {
            true => assert_eq!(ran.code, Some(0), "{name}: {}", ran.stderr),
            false => assert!(ran.code == Some(2) && ran.stderr.contains("does not exist"), "{name}: {}", ran.stderr),
        }
    }
}
