//! A name means its recipe: every policy and system named alone in a config file, every shipped config and every example in the
//! documentation resolves to what `route explain` shows and trains a router that the task moves.
//!
//! The gradient is read from AdamW's first moment after two steps without any auxiliary loss, so that nothing but the task can
//! have moved it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mixtura_checkpoint::{CheckpointStore, Retention};
use mixtura_nn::{MoeConfig, NamedParameters};
use mixtura_routing::catalogue::explain::{self, Explanation};
use mixtura_routing::{Policy, Recipe};
use mixtura_train::config::RunConfig;
use mixtura_train::trainer::Trainer;

/// A model and data small enough for any router; `[model.moe]` is for the test to add.
const TINY: &str = "
[model]
d_model = 32
layers = 2
heads = 2
context = 320
[data]
kind = \"propositions\"
context = 320
batch = 2
[schedule]
warmup = 0
";

/// No auxiliary loss of any kind.
const TASK_ONLY: [&str; 4] = [
    "model.moe.balance.loss=none",
    "model.moe.balance.z_loss=0.0",
    "model.moe.balance.entropy=0.0",
    "model.moe.balance.bias_update=0.0",
];

fn parse(text: &str, overrides: &[&str]) -> Result<RunConfig, String> {
    let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
    let config = RunConfig::parse(text, "example.toml", &overrides).map_err(|e| e.to_string())?;
    let again = RunConfig::parse(&config.to_toml(), "written.toml", &[]).unwrap();
    assert_eq!(again, config, "what is written beside a run is the run");
    Ok(config)
}

/// The largest first moment of every parameter of a router after two steps, by name.
fn moments_of_routers(mut config: RunConfig) -> BTreeMap<String, f32> {
    let data = mixtura_data::open(&config.data).unwrap();
    config.fit_vocabulary(data.tokenizer.vocab_size()).unwrap();
    let mut trainer = Trainer::new(&config, data.train).unwrap();
    let losses = [trainer.step().unwrap().0.loss, trainer.step().unwrap().0.loss];
    assert!(losses.iter().all(|loss| loss.is_finite()), "{losses:?}");

    let place = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(place.path(), Retention { last: 1, best: false }).unwrap();
    trainer.save(&store, None, &data.tokenizer).unwrap();
    let saved = mixtura_checkpoint::newest_loadable(place.path()).unwrap().0.unwrap();
    let saved = saved.train_state().unwrap();
    let largest = |name: &str, shape: &[usize]| {
        let m: Vec<f32> = saved.tensor(&format!("adamw.m.{name}"), shape).unwrap();
        m.iter().fold(0.0f32, |most, m| most.max(m.abs()))
    };
    let decides = |name: &str| {
        let learned = !name.ends_with("router.bias") && !name.ends_with("router.table");
        learned && (name.contains("router") || name.contains("phi"))
    };
    let infos = trainer.model.parameter_infos();
    infos.iter().filter(|i| decides(&i.name)).map(|i| (i.name.clone(), largest(&i.name, &i.shape))).collect()
}

/// Trains and checks that the task moves every parameter of every router, in both layers.
fn check_that_the_task_moves_the_router(what: &str, config: RunConfig) {
    let moe = config.model.moe.clone().expect(what);
    let hash = moe.soft.is_none() && moe.router.policy == Policy::Hash;
    let sparse_layers = (0..config.model.layers).filter(|&l| config.model.moe_layer(l).unwrap().is_some()).count();
    let moments = moments_of_routers(config);
    if hash {
        // Documented: "Weight 1, no gate, no gradient". There is nothing to learn.
        assert!(moments.is_empty(), "{what}: {moments:?}");
        return;
    }
    assert!(moments.len() >= sparse_layers.max(1), "{what}: {moments:?}");
    assert!(moments.values().all(|m| *m > 0.0), "{what}: no gradient from the task: {moments:?}");
}

/// `[model.moe]` with a name and no more than a name cannot say: 32 experts are a multiple of every recipe's groups.
fn named_alone(name: &str) -> String {
    let open = if name == "top_k" { "top_k = 2\n" } else { "" };
    format!("{TINY}[model.moe]\nexperts = 32\nd_expert = 16\nrecipe = \"{name}\"\n{open}")
}

#[test]
fn every_name_alone_resolves_to_the_recipe_that_explain_shows() {
    for Explanation { name, recipe, .. } in explain::all() {
        let leaks = recipe.soft.is_some_and(|soft| soft.leak().is_some());
        let resolved = parse(&named_alone(name), &[]);
        if leaks {
            // Refused for its leak, with the key that accepts it; then it is the recipe.
            let error = resolved.unwrap_err();
            assert!(error.contains("allow_future = true"), "{name}: {error}");
            continue;
        }
        let moe = resolved.unwrap_or_else(|e| panic!("{name}: {e}")).model.moe.unwrap();
        assert_eq!(moe.top_k, if name == "top_k" { 2 } else { recipe.top_k.unwrap_or(0) }, "{name}");
        let MoeConfig { router, balance, zero_computation, residual, soft, shared_experts, .. } = moe.clone();
        assert_eq!(router, recipe.router.unwrap_or_default(), "{name}");
        assert_eq!(balance, recipe.balance.unwrap_or_default(), "{name}");
        assert_eq!(
            (zero_computation, residual, soft),
            (recipe.zero_computation, recipe.residual, recipe.soft),
            "{name}"
        );
        assert_eq!(shared_experts, recipe.shared_experts, "{name}");
        assert_eq!(moe.d_expert_each.is_empty(), recipe.relative_widths.is_none(), "{name}");
        if let Some(policy) = Policy::named(name) {
            // The policy's name in [model.moe.router] means the same.
            let open = if name == "top_k" { "top_k = 2\n" } else { "" };
            let by_policy = format!(
                "{TINY}[model.moe]\nexperts = 32\nd_expert = 16\n{open}[model.moe.router]\npolicy = \"{name}\"\n"
            );
            assert_eq!(parse(&by_policy, &[]).unwrap().model.moe.unwrap(), moe, "{name}");
            assert_eq!(moe.router.policy, policy);
        }
    }
}

#[test]
fn every_name_alone_trains_a_router_that_the_task_moves() {
    for Explanation { name, recipe, .. } in explain::all() {
        let text = named_alone(name);
        let config = match recipe.soft {
            None => parse(&text, &TASK_ONLY),
            // They have no auxiliary loss. Lory's segment is shorter than these rows; the leaking kinds are let.
            Some(soft) if soft.leak().is_none() => parse(&text, &[]),
            Some(soft) => {
                let allowed = format!("model.moe.soft={{ kind = \"{}\", allow_future = true }}", soft.kind());
                parse(&text, &[allowed.as_str()])
            }
        };
        check_that_the_task_moves_the_router(name, config.unwrap_or_else(|e| panic!("{name}: {e}")));
    }
}

/// What a config may say about a policy with one or two choices: it is refused, or the task moves the router.
#[test]
fn whatever_is_accepted_of_a_policy_and_its_normalisation_learns() {
    let (mut learned, mut refused) = (0, 0);
    for name in Policy::NAMES.iter().filter(|name| **name != "hierarchical") {
        for k in [1, 2] {
            for normalize in ["", "false", "true"] {
                let mut set = vec![format!("model.moe.router.policy={name}"), format!("model.moe.top_k={k}")];
                if !normalize.is_empty() {
                    set.push(format!("model.moe.router.normalize={normalize}"));
                }
                let set: Vec<&str> = set.iter().map(String::as_str).chain(TASK_ONLY).collect();
                let text = format!("{TINY}[model.moe]\nexperts = 8\nd_expert = 8\n");
                match parse(&text, &set) {
                    Ok(config) => {
                        check_that_the_task_moves_the_router(&format!("{set:?}"), config);
                        learned += 1;
                    }
                    Err(error) => {
                        assert!(error.contains("top_k") || error.contains("false"), "{set:?}: {error}");
                        refused += 1;
                    }
                }
            }
        }
    }
    assert!(learned > 40 && refused > 15, "{learned} learned, {refused} refused");
}

#[test]
fn a_key_that_contradicts_its_policy_is_refused_with_the_ways_out() {
    let refused = |router: &str, moe: &str, parts: &[&str]| {
        let text = format!("{TINY}[model.moe]\nexperts = 8\nd_expert = 8\n{moe}\n[model.moe.router]\n{router}\n");
        let error = parse(&text, &[]).expect_err(router);
        for part in parts {
            assert!(error.contains(part), "{router}: {error}");
        }
        assert!(!error.contains('\n'), "{error}");
    };
    let one = "top_k = 1";
    refused("normalize = true", one, &["router.normalize = true", "false, or top_k >= 2", "no gradient"]);
    refused("normalize = \"after_drop\"", one, &["after_drop", "false, or top_k >= 2"]);
    refused("activation = \"softmax_selected\"", one, &["\"softmax\" with normalize = false, or top_k >= 2"]);
    refused("activation = \"sigmoid\"\nnormalize = true", one, &["false, or top_k >= 2"]);
    refused(
        "policy = \"switch\"\nnormalize = true",
        "",
        &["normalize = true", "raw probabilities", "or policy = \"top_k\""],
    );
    refused("policy = \"switch\"\nactivation = \"sigmoid\"", "", &["router.activation = sigmoid", "\"softmax\""]);
    refused("policy = \"expert_choice\"\nnormalize = true", "", &["raw probabilities", "batchwise"]);
    refused("policy = \"noisy_top_k\"\nnoise = \"none\"", "", &["router.noise = none", "policy = \"top_k\""]);
    refused("policy = \"relu\"\nnormalize = true", "", &["positive logits"]);
    refused("policy = \"base\"\nactivation = \"softmax\"", "", &["\"sigmoid\""]);
    refused("policy = { sparse_mixer = { eps = 0.0 } }", "", &["above 0", "policy = \"top_k\""]);
    refused("policy = { top_p = { mass = 0.1 } }", "", &["policy.top_p.mass above 1/8"]);
    refused("policy = \"expert_choice_capped\"\nnormalize = true", "", &["raw probabilities"]);
    refused("", "top_k = 1\n[model.moe.zero_computation]\nrenorm_after_zero = true", &["renorm_after_zero = true"]);
    refused("policy = \"mixtral\"", "top_k = 2", &["recipe = \"mixtral\""]);
    refused("policy = \"swich\"", "", &["did you mean `switch`"]);
    refused("policy = \"gshard\"", "recipe = \"switch\"", &["\"switch\"", "\"gshard\"", "leave one of them out"]);
    refused("policy = \"top_k\"", "recipe = \"lory\"", &["soft layer"]);
    refused("", "recipe = \"mixtrall\"", &["nearest is mixtral"]);
    refused("", "recipe = \"lory\"\nsoft = { kind = \"smear\" }", &["\"lory\"", "\"smear\""]);
    // Soft layers whose decisions the task cannot reach.
    refused("", "soft = { kind = \"lory\", segment = 320 }", &["segment", "data.context"]);
    refused("", "shared_experts = 1\nsoft = { kind = \"block_causal\", block = 320 }", &["block", "data.context"]);
    refused("", "soft = { kind = \"mixture_of_tokens\", group = 1 }", &["group", "emit = \"experts\""]);
}

#[test]
fn given_keys_win_over_the_recipe_and_another_policy_may_take_a_systems_router() {
    let moe = |text: &str| {
        let text = format!("{TINY}[model.moe]\nexperts = 8\nd_expert = 32\n{text}\n");
        parse(&text, &[]).unwrap_or_else(|e| panic!("{text}: {e}")).model.moe.unwrap()
    };
    let plus = moe("recipe = \"moe_plus_plus\"\ntop_k = 3\n[model.moe.zero_computation]\ntau = 0.5");
    assert_eq!((plus.top_k, plus.zero_computation.unwrap().tau), (3, 0.5));
    assert_eq!(plus.router, Recipe::named("moe_plus_plus").unwrap().router.unwrap());
    let widths = moe("recipe = \"hmoe\"\n[model.moe.router]\npolicy = \"top_k\"");
    assert_eq!(widths.d_expert_each, [18, 22, 26, 30, 34, 38, 42, 46]);
    assert_eq!((widths.router.policy.clone(), widths.balance.entropy), (Policy::TopK, 0.03));
    let limited = moe("[model.moe.router]\npolicy = { group_limited = { groups = 4 } }\nweight_scale = 1.0");
    assert_eq!(limited.router.policy, Policy::GroupLimited { groups: 4, keep: 4 });
    assert_eq!((limited.router.weight_scale, limited.balance.bias_update), (1.0, 1e-3));
    // Coefficient and controller belong to a loss: a given one replaces both.
    let relu = moe("[model.moe.router]\npolicy = \"relu\"\n[model.moe.balance]\ncoefficient = 0.5");
    assert_eq!((relu.balance.coefficient, relu.balance.controller), (0.5, None));
    let choice = moe("[model.moe.router]\npolicy = \"expert_choice\"\n[model.moe.balance]\ncoefficient = 0.5");
    assert_eq!(choice.balance.loss, mixtura_routing::BalanceLoss::Switch);
}

/// What runs wrote before recipes existed: every key given, contradictions included. It loads, and says so when asked.
#[test]
fn the_resolved_config_of_an_older_run_loads_as_it_was() {
    let old = format!(
        "{TINY}[model.moe]\nexperts = 8\ntop_k = 1\nd_expert = 16\nshared_experts = 0\nshared_gate = false\nlayers = \"all\"\n\
         [model.moe.router]\nscorer = \"linear\"\nactivation = \"softmax\"\npolicy = \"switch\"\nnormalize = true\n\
         weight_scale = 1.0\nnoise = \"none\"\ncapacity_factor = 0.0\neval_capacity_factor = 0.0\ncapacity_min = 4\n\
         capacity_multiple = 1\ndrop_order = \"token_major\"\nhash_table = \"modulo\"\n\
         [model.moe.balance]\nloss = \"switch\"\ncoefficient = 0.01\nscope = \"global\"\nz_loss = 0.001\nentropy = 0.0\n\
         bias_update = 0.0\n"
    );
    let config = RunConfig::parse_saved(&old, "old.toml").unwrap();
    let moe = config.model.moe.as_ref().unwrap();
    assert_eq!(moe.router.normalize, mixtura_routing::Normalize::BeforeDrop);
    assert!(config.validate_training("old.toml").is_err());
    assert!(RunConfig::parse(&old, "old.toml", &[]).is_err());
    let relu =
        old.replace("\"softmax\"", "\"relu\"").replace("\"switch\"\nnormalize = true", "\"relu\"\nnormalize = false");
    let config = RunConfig::parse_saved(&relu, "old.toml").unwrap();
    assert_eq!(config.model.moe.unwrap().balance.controller, None, "no controller came along");
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn files(folder: &str, extension: &str) -> Vec<(PathBuf, String)> {
    let entries = std::fs::read_dir(repository().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = entries.filter(|p| p.extension().is_some_and(|e| e == extension)).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), std::fs::read_to_string(path).unwrap())).collect()
}

/// Shipped configs as they are, then with their sizes and data replaced: what is tested is their router, not their data.
#[test]
fn every_shipped_config_resolves_and_trains_a_router_that_the_task_moves() {
    let shipped: Vec<_> = [files("configs", "toml"), files("bench", "toml")].concat();
    assert!(shipped.len() >= 5, "{shipped:?}");
    for (path, text) in shipped {
        let what = path.display().to_string();
        let whole = parse(&text, &[]).unwrap_or_else(|e| panic!("{what}: {e}"));
        let small = [
            "model.d_model=32",
            "model.layers=2",
            "model.heads=2",
            "model.context=192",
            "model.vocab=0",
            "data={ kind = \"propositions\", context = 192, batch = 2 }",
            "train.accumulation=1",
            "train.precision=f32",
        ];
        let experts = ["model.moe.d_expert=16"];
        let sparse = whole.model.moe.is_some();
        let set: Vec<&str> = if sparse {
            [&small[..], &experts, &TASK_ONLY].concat()
        } else {
            [&small[..], &["model.d_dense=64"]].concat()
        };
        let config = parse(&text, &set).unwrap_or_else(|e| panic!("{what}: {e}"));
        match whole.model.moe {
            None => assert!(moments_of_routers(config).is_empty(), "{what}"),
            Some(moe) => {
                assert_eq!(config.model.moe.as_ref().unwrap().router, moe.router, "{what}");
                check_that_the_task_moves_the_router(&what, config);
            }
        }
    }
}

/// Every ```` ```toml ```` block of the documentation, put into a tiny run where it is a part of one.
#[test]
fn every_example_in_the_documentation_resolves_and_trains_a_router_that_the_task_moves() {
    let mut documents = files("docs", "md");
    documents.extend(files("", "md"));
    let mut examples = 0;
    for (path, text) in documents {
        for block in text.split("```toml\n").skip(1) {
            let block = block.split("```").next().unwrap();
            let what = format!("{}:\n{block}", path.display());
            let whole = block.contains("[model]");
            let text = if whole { block.to_string() } else { format!("{TINY}{block}") };
            let config = parse(&text, &[]).unwrap_or_else(|e| panic!("{what}\n{e}"));
            match &config.model.moe {
                None => drop(moments_of_routers(config)),
                Some(moe) if moe.soft.is_some() => check_that_the_task_moves_the_router(&what, config),
                Some(_) => check_that_the_task_moves_the_router(&what, parse(&text, &TASK_ONLY).unwrap()),
            }
            examples += 1;
        }
    }
    assert!(examples >= 6, "{examples} examples");
}
