//! What cannot be run is refused in one paragraph that names it, with exit code 2 (or 1 where it failed while running), and
//! leaves nothing half-written.

mod common;

use common::{Place, Ran, TEXT_RUN, text};

/// Runs `args`; expects `code`, every one of `words` in a single paragraph on stderr, and an empty directory `untouched`.
fn check(place: &Place, args: &[&str], code: i32, words: &[&str], untouched: Option<&str>) {
    let ran = place.run(args);
    assert_eq!(ran.code, Some(code), "mixtura {args:?}\n{}", ran.stderr);
    let error = ran.stderr.split("error: ").nth(1).unwrap_or_else(|| panic!("no error on stderr: {}", ran.stderr));
    assert!(!error.trim().contains("\n\n"), "more than one paragraph:\n{error}");
    assert!(!error.contains("panicked"), "{error}");
    for word in words {
        assert!(error.contains(word), "mixtura {args:?}: expected {word:?} in:\n{error}");
    }
    if let Some(name) = untouched {
        assert!(!place.path(name).join("config.toml").exists(), "{name} holds a config of a run that never was");
    }
}

fn check_set(set: &str, words: &[&str]) {
    let place = Place::new();
    check(&place, &["train", "--out", "run", "--set", set], 2, words, Some("run"));
}

#[test]
fn an_unknown_key_comes_with_the_nearest_valid_one() {
    check_set("model.moe.topk=2", &["--set model.moe.topk=2", "unknown key `topk`", "did you mean `top_k`"]);
    check_set("optimiser.lr=1", &["unknown key `optimiser`", "did you mean `optimizer`"]);
    let place = Place::new();
    std::fs::write(place.path("run.toml"), "[model]\nd_model = 64\nlayer = 2\nheads = 2\ncontext = 8\n").unwrap();
    check(&place, &["train", "run.toml", "--out", "run"], 2, &["run.toml, line 3", "`layer`", "`layers`"], Some("run"));
}

#[test]
fn an_impossible_value_names_its_key_and_what_it_depends_on() {
    check_set("model.moe.top_k=1000", &["model.moe.top_k", "1000"]);
    check_set("model.heads=7", &["model.heads", "7", "d_model"]);
    check_set("model.moe.router.capacity_factor=-1", &["capacity_factor", "-1"]);
    check_set("data.context=100000", &["data.context", "100000", "model.context"]);
    check_set("train.precision=f16", &["f16", "bf16"]);
    check_set("optimizer.beta2=1.5", &["optimizer.beta2", "1.5"]);
    check_set("schedule.kind=cosin", &["cosin", "cosine"]);
    check_set("data.batch=0", &["data.batch", "0"]);
}

#[test]
fn numbers_at_the_ends_of_their_ranges_are_refused_with_the_reason() {
    for (set, words) in [
        ("optimizer.eps=0", &["optimizer.eps", "divided by 0"][..]),
        ("optimizer.eps=1e-60", &["optimizer.eps", "1e-37"]),
        ("optimizer.eps=nan", &["optimizer.eps", "NaN"]),
        ("optimizer.lr=-1e-3", &["optimizer.lr", "-0.001"]),
        ("optimizer.lr=1e300", &["optimizer.lr", "f32"]),
        ("optimizer.lr=inf", &["optimizer.lr", "inf"]),
        ("optimizer.beta1=0.99999999999", &["optimizer.beta1", "0.9999999"]),
        ("optimizer.weight_decay=-0.1", &["optimizer.weight_decay", "-0.1"]),
        ("optimizer.clip=-1", &["optimizer.clip", "-1"]),
        ("train.steps=0", &["train.steps", "found 0"]),
        ("train.steps=9223372036854775807", &["train.steps", "9223372036854775807"]),
        ("train.accumulation=9223372036854775807", &["train.accumulation", "65536"]),
        ("train.keep_last=0", &["train.keep_last", "at least 1"]),
        ("data.validation_batches=9223372036854775807", &["data.validation_batches", "2^24"]),
        ("data.propositions.evaluation_items=9223372036854775807", &["evaluation_items", "1000000"]),
        ("data.validation_fraction=nan", &["data.validation_fraction", "NaN"]),
        ("data.context=9223372036854775807", &["data.context", "2^24"]),
        ("data.batch=9223372036854775807", &["data.batch", "2^31"]),
        ("data.prefetch=100000", &["data.prefetch", "1024"]),
        ("model.norm_eps=1e-60", &["model.norm_eps", "1e-30"]),
        ("model.norm_eps=nan", &["model.norm_eps", "NaN"]),
        ("model.rope_theta=0", &["model.rope_theta"]),
        ("model.init_std=inf", &["model.init_std", "inf"]),
        ("model.clip_qkv=0", &["model.clip_qkv"]),
        ("schedule.decay=nan", &["schedule.decay", "NaN"]),
        ("train.seed=-1", &["train.seed", "-1"]),
        ("train.seed=18446744073709551615", &["train.seed", "9223372036854775807"]),
    ] {
        check_set(set, words);
    }
}

#[test]
fn more_threads_than_can_be_started_are_refused_at_once() {
    let place = Place::new();
    for threads in ["0", "100000", "18446744073709551615"] {
        check(&place, &["doctor", "--threads", threads], 2, &[threads, "one per core"], None);
    }
    let output = place.command(&["doctor"]).env("RAYON_NUM_THREADS", "100000").output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(2) && stderr.contains("RAYON_NUM_THREADS = 100000"), "{stderr}");
    check(&place, &["bench", "--seconds", "inf"], 2, &["--seconds inf"], None);
}

#[test]
fn usage_errors_help_and_version_are_one_document_under_json() {
    let place = Place::new();
    for (args, words) in [
        (&["--json", "trian"][..], &["trian", "train"][..]),
        (&["train", "--json", "--stepz", "3"], &["--stepz", "--steps"]),
        (&["train", "--json", "--steps", "many"], &["many", "--steps"]),
        (&["train", "--steps", "--json"], &["--steps"]),
        (&["logits", "x", "--json"], &["--ids"]),
        (&["train", "--resume", "a", "--seed", "1", "--json"], &["--seed", "--resume"]),
        (&["train", "--json", "--seed", "18446744073709551615"], &["--seed", "9223372036854775807"]),
        (&["--json"], &["subcommand", "train"]),
        (&["route", "--json"], &["subcommand", "explain"]),
    ] {
        let ran = place.run(args);
        assert_eq!(ran.code, Some(2), "{args:?}");
        let document = ran.json();
        assert_eq!(
            (common::keys(&document), &document["exit_code"]),
            (vec!["error", "exit_code"], &2.into()),
            "{args:?}"
        );
        let error = document["error"].as_str().unwrap();
        words.iter().for_each(|word| assert!(error.contains(word), "{args:?}: {error}"));
        assert!(!error.contains('\n') && !error.starts_with("error") && !ran.stderr.is_empty(), "{args:?}: {error}");
    }
    let version = place.ok(&["--json", "--version"]).json();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    assert!(place.ok(&["eval", "--help", "--json"]).json()["help"].as_str().unwrap().contains("--stride"));
    // Without --json nothing but an asked-for help goes to stdout; behind -- it is no flag.
    assert!(place.run(&["trian"]).stdout.is_empty());
    assert!(place.run(&["trian", "--", "--json"]).stdout.is_empty());
    assert!(place.ok(&["--help"]).stdout.contains("Usage: mixtura"));
    assert!(place.ok(&["train", "--version"]).stdout.contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_capacity_that_rounds_to_nothing_is_refused_before_the_run() {
    let place = Place::new();
    let args = [
        "train",
        "--out",
        "run",
        "--set",
        "model.moe.router.capacity_factor=1e-20",
        "--set",
        "model.moe.router.capacity_min=0",
    ];
    check(&place, &args, 2, &["capacity"], Some("run"));
}

#[test]
fn a_router_that_fails_in_training_or_evaluation_is_a_failure_of_the_run_and_not_of_the_config() {
    // Weights that are finite and so large that scores are not.
    let set = ["optimizer.lr=1e36", "optimizer.weight_decay=0", "schedule.warmup=0", "schedule.kind=constant"];
    for (steps, words) in [("3", "step 2: router of layer 0"), ("1", "the evaluation after step 1: router of layer 0")]
    {
        let place = Place::new();
        std::fs::write(place.path("tiny.toml"), TEXT_RUN).unwrap();
        std::fs::write(place.path("small.txt"), text(1)).unwrap();
        let mut args = vec!["train", "tiny.toml", "--out", "run", "--steps", steps];
        set.iter().for_each(|set| args.extend(["--set", *set]));
        check(&place, &args, 1, &[words, "must be finite"], None);
        assert!(!place.path("run/final").exists());
    }
    let never = ["model.moe.router.eval_capacity_factor=1e-20", "--set", "model.moe.router.capacity_min=0"];
    let place = Place::new();
    let args = [&["train", "--out", "run", "--set"], &never[..]].concat();
    check(&place, &args, 2, &["eval_capacity_factor"], Some("run"));
}

#[test]
fn a_config_that_is_not_there_or_not_toml_is_named() {
    let place = Place::new();
    check(&place, &["train", "nowhere.toml"], 2, &["nowhere.toml"], None);
    std::fs::write(place.path("broken.toml"), "[model\n").unwrap();
    check(&place, &["train", "broken.toml"], 2, &["broken.toml, line 1", "not valid TOML"], None);
    let utf16: Vec<u8> = "\u{feff}[model]".encode_utf16().flat_map(u16::to_le_bytes).collect();
    std::fs::write(place.path("utf16.toml"), utf16).unwrap();
    check(&place, &["train", "utf16.toml"], 2, &["utf16.toml", "UTF-16", "iconv"], None);
    std::fs::write(place.path("marked.toml"), "\u{feff}[model]\nd_model = 64\nlayer = 2\n").unwrap();
    check(&place, &["train", "marked.toml"], 2, &["marked.toml, line 3", "`layer`"], None);
    std::fs::write(place.path("binary.toml"), [0u8, 255, 254]).unwrap();
    check(&place, &["train", "binary.toml"], 2, &["binary.toml", "UTF-8"], None);
}

#[test]
fn data_that_is_missing_empty_or_binary_is_named() {
    let place = Place::new();
    let text_run = |path: &str| {
        let config = format!(
            "[model]\nd_model = 32\nlayers = 1\nheads = 2\ncontext = 16\nd_dense = 32\n\
             [data]\nkind = \"text\"\npaths = [\"{path}\"]\ncontext = 16\n[train]\nsteps = 60\n"
        );
        std::fs::write(place.path("text.toml"), config).unwrap();
    };
    std::fs::write(place.path("empty.txt"), "").unwrap();
    std::fs::write(place.path("binary.txt"), (0..=255u8).cycle().take(5000).collect::<Vec<_>>()).unwrap();
    for (path, word) in [("gone.txt", "does not exist"), ("empty.txt", "empty"), ("binary.txt", "UTF-8")] {
        text_run(path);
        check(&place, &["train", "text.toml", "--out", "run"], 2, &[path, word], Some("run"));
    }
}

#[test]
fn a_run_directory_that_cannot_be_written_is_named() {
    let place = Place::new();
    std::fs::write(place.path("file"), "x").unwrap();
    check(&place, &["train", "--out", "file"], 2, &["file", "directory"], None);
    check(&place, &["train", "--out", "/proc/mixtura-run"], 1, &["/proc/mixtura-run"], None);
    check(&place, &["train", "--resume", "nothing"], 2, &["nothing", "resume"], None);
}

#[test]
fn a_model_that_is_not_there_is_named() {
    let place = Place::new();
    for command in [
        &["eval", "gone"][..],
        &["inspect", "gone"],
        &["logits", "gone", "--ids", "1"],
        &["generate", "gone", "--prompt", "a"],
    ] {
        check(&place, command, 2, &["gone"], None);
    }
}

#[test]
fn wrong_usage_ends_with_two() {
    let place = Place::new();
    for args in [
        &["trian"][..],
        &["train", "--steps", "many"],
        &["logits", "x"],
        &["train", "--resume", "a", "--seed", "1"],
        &[],
    ] {
        assert_eq!(place.run(args).code, Some(2), "{args:?}");
    }
    check(&place, &["doctor", "--threads", "0"], 2, &["--threads 0"], None);
}

#[test]
fn an_instruction_set_that_this_machine_lacks_is_refused() {
    let place = Place::new();
    let output = place.command(&["doctor"]).env("MIXTURA_ISA", "sse9").output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("sse9") && stderr.contains("avx512bf16"), "{stderr}");
}

#[test]
fn an_instruction_set_or_a_way_that_is_none_is_refused_by_every_command_that_computes() {
    let place = Place::new();
    let commands: [&[&str]; 4] = [&["train", "--out", "run"], &["doctor"], &["bench", "gemm"], &["eval", "nothing"]];
    for args in commands {
        let ran = Ran::from(place.command(args).env("MIXTURA_ISA", "sse9").output().unwrap());
        assert_eq!(ran.code, Some(2), "mixtura {args:?}\n{}", ran.stderr);
        assert!(ran.stderr.contains("sse9") && ran.stderr.contains("avx512"), "{}", ran.stderr);
        let ran = Ran::from(place.command(args).env("MIXTURA_WAY", "gpu").output().unwrap());
        assert_eq!(ran.code, Some(2), "mixtura {args:?}\n{}", ran.stderr);
        assert!(ran.stderr.contains("MIXTURA_WAY") && ran.stderr.contains("vdpbf16ps"), "{}", ran.stderr);
        let lacking = [("MIXTURA_ISA", "scalar"), ("MIXTURA_WAY", "amx")];
        let ran = Ran::from(place.command(args).envs(lacking).output().unwrap());
        assert_eq!(ran.code, Some(2), "mixtura {args:?}\n{}", ran.stderr);
        assert!(ran.stderr.contains("has no amx; it has fma"), "{}", ran.stderr);
    }
    assert!(!place.path("run").exists());
}
