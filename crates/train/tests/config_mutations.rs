//! Mutations of the shipped configurations: any text is a run or an error of one paragraph, and a run is written and read back.
//!
//! What the fuzzing targets do for the small parsers, without coverage feedback: those that need the models' configuration
//! would have to build Burn a third time.

use mixtura_data::rng::SplitMix64;
use mixtura_train::config::RunConfig;

const SEEDS: [&str; 4] = [
    include_str!("../../../configs/quickstart.toml"),
    include_str!("../../../configs/quickstart_dense.toml"),
    include_str!("../../../configs/shakespeare.toml"),
    include_str!("../../../configs/olmoe-1b-7b.toml"),
];

/// What a value may be replaced by: edges of ranges, wrong types, things that look alike.
const VALUES: [&str; 24] = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "1e-300",
    "1e308",
    "inf",
    "nan",
    "-0.0",
    "9223372036854775807",
    "18446744073709551615",
    "\"\"",
    "\"top_k\"",
    "\"softmax\"",
    "true",
    "[]",
    "[1, 0]",
    "[0, 0, 0, 0]",
    "{}",
    "{ every = 0 }",
    "{ top_p = { mass = 2.0 } }",
    "{ group_limited = { groups = 3, keep = 1 } }",
    "1979-05-27",
];

const LINES: [&str; 12] = [
    "kv_heads = 3",
    "head_dim = 7",
    "d_dense = 0",
    "qk_norm = \"full\"",
    "[model.moe.router]",
    "capacity_factor = 1e-30",
    "policy = \"expert_choice\"",
    "scorer = \"cosine\"",
    "[model.moe.balance]",
    "bias_update = 0.1",
    "[data.propositions]",
    "shared_experts = 2",
];

fn mutated(rng: &mut SplitMix64) -> String {
    let seed = *rng.pick(&SEEDS);
    let mut lines: Vec<String> = seed.lines().map(str::to_string).collect();
    for _ in 0..1 + rng.below(4) {
        let at = rng.below(lines.len());
        match rng.below(6) {
            0 => {
                if let Some((key, _)) = lines[at].split_once('=') {
                    lines[at] = format!("{key}= {}", rng.pick(&VALUES));
                }
            }
            1 => drop(lines.remove(at)),
            2 => lines.insert(at, (*rng.pick(&LINES)).to_string()),
            3 => lines.insert(at, lines[at].clone()),
            4 => {
                let bytes: Vec<char> = lines[at].chars().collect();
                lines[at] = bytes[..rng.below(bytes.len() + 1)].iter().collect();
            }
            _ => {
                let other = rng.below(lines.len());
                lines.swap(at, other);
            }
        }
        if lines.is_empty() {
            break;
        }
    }
    lines.join("\n")
}

#[test]
fn any_text_is_a_run_or_an_error_of_one_paragraph() {
    let (mut runs, mut errors) = (0, 0);
    for i in 0..40_000 {
        let text = mutated(&mut SplitMix64::keyed(7, 0, i));
        match RunConfig::parse(&text, "some.toml", &[]) {
            Ok(config) => {
                runs += 1;
                // A value may be infinite where no limit is meant, never NaN: what is written must compare equal.
                let again = RunConfig::parse(&config.to_toml(), "again.toml", &[]);
                assert_eq!(again.unwrap_or_else(|e| panic!("{e}\nwas written for\n{text}")), config, "\n{text}");
            }
            Err(error) => {
                errors += 1;
                let message = error.to_string();
                assert!(!message.is_empty() && !message.contains("\n\n"), "{message}\nfor\n{text}");
            }
        }
    }
    assert!(runs > 4000 && errors > 4000, "{runs} runs and {errors} errors: the mutations reach one side only");
}

#[test]
fn any_override_is_taken_or_refused() {
    let keys =
        ["model.moe.top_k", "model.heads", "data.batch", "", ".", "a..b", "model", "model.moe.router.policy", "name"];
    for key in keys {
        for value in VALUES.iter().chain(&["", "=", "\u{0}", "'", "[["]) {
            if let Err(error) = RunConfig::parse(SEEDS[0], "some.toml", &[format!("{key}={value}")]) {
                assert!(!error.to_string().contains("\n\n"), "--set {key}={value}: {error}");
            }
        }
    }
    assert!(RunConfig::parse(SEEDS[0], "some.toml", &["no equals sign".into()]).is_err());
}
