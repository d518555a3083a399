//! What cannot be run is refused in one paragraph that names it, with exit code 2 (or 1 where it failed while running), and
//! leaves nothing half-written.

mod common;

use common::{Place, Ran};

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
fn a_config_that_is_not_there_or_not_toml_is_named() {
    let place = Place::new();
    check(&place, &["train", "nowhere.toml"], 2, &["nowhere.toml"], None);
    std::fs::write(place.path("broken.toml"), "[model\n").unwrap();
    check(&place, &["train", "broken.toml"], 2, &["broken.toml, line 1", "not valid TOML"], None);
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
