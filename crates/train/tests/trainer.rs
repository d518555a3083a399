//! The step itself: what accumulation may and may not change, and what a step that fails leaves behind.

use mixtura_checkpoint::{CheckpointStore, Retention};
use mixtura_nn::NamedParameters;
use mixtura_train::config::RunConfig;
use mixtura_train::error::TrainError;
use mixtura_train::metrics::StepMetrics;
use mixtura_train::trainer::Trainer;

const TINY: &str = r#"
[model]
d_model = 32
layers = 2
heads = 2
context = 192
[model.moe]
experts = 4
top_k = 2
d_expert = 32
[data]
kind = "propositions"
context = 192
[optimizer]
lr = 1e-2
[schedule]
warmup = 0
[train]
steps = 20
"#;

fn trainer(overrides: &[&str]) -> Trainer {
    let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
    let mut config = RunConfig::parse(TINY, "tiny", &overrides).unwrap();
    let data = mixtura_data::open(&config.data).unwrap();
    config.fit_vocabulary(data.tokenizer.vocab_size()).unwrap();
    Trainer::new(&config, data.train).unwrap()
}

fn values(trainer: &Trainer) -> Vec<Vec<f32>> {
    let mut all = Vec::new();
    trainer.model.for_each_parameter(|_, values| all.push(values.to_vec()));
    all
}

/// AdamW's first moments after the first step: a tenth of the clipped gradient of every parameter.
fn moments(trainer: &Trainer) -> Vec<(String, Vec<f32>)> {
    let place = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(place.path(), Retention { last: 1, best: false }).unwrap();
    trainer.save(&store, None, &mixtura_data::Tokenizer::propositions()).unwrap();
    let saved = mixtura_checkpoint::newest_loadable(place.path()).unwrap().0.unwrap();
    let saved = saved.train_state().unwrap();
    let of = |info: mixtura_nn::ParameterInfo| {
        (info.name.clone(), saved.tensor(&format!("adamw.m.{}", info.name), &info.shape).unwrap())
    };
    trainer.model.parameter_infos().into_iter().map(of).collect()
}

/// Largest difference of two gradients, relative to the largest entry of the parameter's.
fn apart(a: &Trainer, b: &Trainer) -> f32 {
    let largest = |values: &mut dyn Iterator<Item = f32>| values.fold(0.0f32, |most, v| most.max(v.abs()));
    let both = moments(a).into_iter().zip(moments(b));
    let relative = |((_, a), (_, b)): ((String, Vec<f32>), (String, Vec<f32>))| {
        largest(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / largest(&mut a.iter().copied()).max(1e-12)
    };
    both.map(relative).fold(0.0, f32::max)
}

#[test]
fn micro_batches_make_the_step_of_one_large_batch() {
    // Losses over the whole step, however it is cut: with the coefficient 1 the balance loss is most of a router's gradient. Rows
    // of propositions are padded, so that the parts differ in counted targets but not in tokens.
    let relu = ["model.moe.router.policy=relu", "model.moe.balance.controller={ start = 1.0 }"];
    let zero = ["model.moe.zero_computation={ beta = 1.0, gamma = 0.0 }", "model.moe.router.normalize=false"];
    let jitter = ["model.moe.router.noise=jitter", "model.moe.balance.coefficient=1.0"];
    let penalty = ["model.moe.balance.loss=parameter_penalty", "model.moe.balance.coefficient=1.0"];
    let noisy = ["model.moe.router.noise=softplus", "model.moe.balance.coefficient=1.0"];
    let plain = ["model.moe.balance.coefficient=1.0", "model.moe.balance.z_loss=0.1"];
    for set in [plain, relu, zero, jitter, penalty, noisy, ["model.moe.balance.coefficient=0.0", "name=none"]] {
        let with = |more: &[&str]| trainer(&[&set[..], more].concat());
        let mut whole = with(&["data.batch=8"]);
        let mut parts = with(&["data.batch=2", "train.accumulation=4"]);
        let (w, _) = whole.step().unwrap();
        let (p, _) = parts.step().unwrap();
        assert_eq!(w.tokens, p.tokens);
        for (name, a, b) in [("ce", w.ce, p.ce), ("loss", w.loss, p.loss), ("norm", w.grad_norm, p.grad_norm)] {
            assert!((a - b).abs() < 1e-5 * a.abs(), "{set:?} {name}: {a} and {b}");
        }
        // Without a coefficient nothing is counted first: the figure shown is that of the micro-batches.
        let unused = |name: &str| set.contains(&"model.moe.balance.coefficient=0.0") && name == "balance";
        for (name, a) in w.aux.iter().filter(|(name, _)| !unused(name)) {
            let b = p.aux[name];
            assert!((a - b).abs() < 1e-6 * (1.0 + a.abs()), "{set:?} {name}: {a} and {b}");
        }
        let apart = apart(&whole, &parts);
        assert!(apart < 1e-4, "{set:?}: gradients differ by {apart}");
        let selections = |m: &StepMetrics| m.layers.iter().map(|l| l.load_cv).collect::<Vec<_>>();
        assert_eq!(selections(&w), selections(&p), "the same tokens choose the same experts");
    }
}

#[test]
fn counts_of_the_micro_batches_so_far_are_an_approximation_and_are_called_one() {
    let with = |set: &[&str]| trainer(&[&["model.moe.balance.coefficient=1.0"], set].concat());
    let parts = ["data.batch=2", "train.accumulation=4"];
    let mut whole = with(&["data.batch=8"]);
    let mut global = with(&parts);
    let mut running = with(&[&parts[..], &["model.moe.balance.scope=running"]].concat());
    let mut micro = with(&[&parts[..], &["model.moe.balance.scope=micro"]].concat());
    let balance = |trainer: &mut Trainer| trainer.step().unwrap().0.aux["balance"];
    let exact = balance(&mut whole);
    let found = [&mut global, &mut running, &mut micro].map(|trainer| (balance(trainer) - exact).abs());
    assert!(found[0] < 1e-12 && found[1] > 1e-6 && found[2] > found[1], "{found:?}");
    let found = [&global, &running, &micro].map(|trainer| apart(trainer, &whole));
    assert!(found[0] < 1e-4 && found[1] > 1e-3, "{found:?}");
    // With one micro-batch there is nothing else to count: the same bits.
    let mut one = with(&["data.batch=8", "model.moe.balance.scope=running"]);
    assert_eq!(balance(&mut one).to_bits(), exact.to_bits());
    assert_eq!(values(&one), values(&whole));
}

#[test]
fn equal_trainers_make_equal_steps_and_the_loss_falls() {
    let (mut a, mut b) = (trainer(&["data.batch=4"]), trainer(&["data.batch=4"]));
    let mut losses = Vec::new();
    for _ in 0..12 {
        let (found, _) = a.step().unwrap();
        assert_eq!(found.loss.to_bits(), b.step().unwrap().0.loss.to_bits());
        losses.push(found.ce);
    }
    assert_eq!(values(&a), values(&b));
    assert!(losses[11] < 0.8 * losses[0], "{losses:?}");
}

#[test]
fn packs_are_shared_where_each_is_used_once_and_kept_where_they_are_used_again() {
    let packed = |trainer: &Trainer| {
        let mut bytes = 0;
        trainer.model.for_each_cell(&mut |cell| bytes += cell.bytes());
        bytes
    };
    for checkpointing in ["train.checkpoint_activations=false", "train.checkpoint_activations=true"] {
        let (mut sharing, mut keeping) = (trainer(&["data.batch=4", checkpointing]), trainer(&["data.batch=4"]));
        keeping.model.keep_packs();
        for _ in 0..3 {
            let (shared, kept) = (sharing.step().unwrap().0, keeping.step().unwrap().0);
            assert_eq!((shared.loss.to_bits(), shared.grad_norm), (kept.loss.to_bits(), kept.grad_norm));
        }
        assert_eq!(values(&sharing), values(&keeping));
        assert_eq!(packed(&sharing), 0);
        assert!(packed(&keeping) > 0);
    }
    let mut accumulating = trainer(&["data.batch=2", "train.accumulation=2"]);
    accumulating.step().unwrap();
    assert!(packed(&accumulating) > 0);
}

/// Two steps, a checkpoint, a third step: by the trainer that goes on and by a new one that restores.
#[test]
fn a_restored_trainer_goes_on_bit_for_bit_with_its_controller_and_its_table() {
    let relu = [
        "model.moe.router.policy=relu",
        "model.moe.top_k=1",
        "model.moe.router.activation=relu",
        "model.moe.router.normalize=false",
        "model.moe.balance.z_loss=0.0",
        "model.moe.balance.controller={ start = 1e-3 }",
    ];
    let hash = ["model.moe.router.policy=hash", "model.moe.router.hash_table=balanced", "model.moe.balance.loss=none"];
    for set in [relu.as_slice(), hash.as_slice()] {
        let set: Vec<&str> = set.iter().copied().chain(["data.batch=2"]).collect();
        let place = tempfile::tempdir().unwrap();
        let store = CheckpointStore::open(place.path(), Retention { last: 1, best: false }).unwrap();
        let mut kept = trainer(&set);
        let first = kept.step().unwrap().0;
        let second = kept.step().unwrap().0;
        if set[0].ends_with("relu") {
            // About half of the gates are zero at the start, three quarters are wanted: the coefficient grows.
            let lambda = |m: &StepMetrics| m.aux["balance_coefficient"];
            assert_eq!((lambda(&first), lambda(&second)), (1e-3, 1e-3 * 1.2));
        }
        kept.save(&store, None, &mixtura_data::Tokenizer::propositions()).unwrap();
        let (newest, _) = mixtura_checkpoint::newest_loadable(place.path()).unwrap();
        let mut restored = trainer(&set);
        restored.restore(&newest.unwrap()).unwrap();
        let (a, b) = (kept.step().unwrap().0, restored.step().unwrap().0);
        assert_eq!(
            (a.loss.to_bits(), &a.aux, a.grad_norm.to_bits()),
            (b.loss.to_bits(), &b.aux, b.grad_norm.to_bits())
        );
        assert_eq!(values(&kept), values(&restored));
    }
}

#[test]
fn a_run_in_bf16_native_keeps_the_order_of_sums_it_began_with() {
    let weights = |overrides: &[&str]| {
        let mut trainer = trainer(&[&["data.batch=2"], overrides].concat());
        (0..3).for_each(|_| drop(trainer.step().unwrap()));
        values(&trainer)
    };
    let began = |way: &str| weights(&["train.precision=bf16-native", &format!("train.way={way}")]);
    let (tiles, fma) = (weights(&["train.precision=bf16"]), began("fma"));
    assert!(began("amx") == tiles, "tiles sum as bf16 does, here by whatever this machine has");
    assert!(began("vdpbf16ps") == fma, "one order, two ways");
    assert!(fma != tiles, "the case must tell the orders apart");
}

#[test]
fn auto_is_resolved_when_a_config_is_read_and_a_way_that_is_none_is_refused() {
    let parse = |set: &str| RunConfig::parse(TINY, "tiny", &[set.to_string()]);
    let config = parse("train.precision=auto").unwrap();
    assert_eq!(config.train.precision, mixtura_kernels::ways::fastest().0);
    assert!(!config.to_toml().contains("auto"));
    let error = parse("train.way=gpu").unwrap_err().to_string();
    assert!(error.contains("gpu") && error.contains("vdpbf16ps"), "{error}");
}

#[test]
fn a_balanced_hash_table_evens_the_load_that_a_modulo_table_inherits_from_the_text() {
    let worst = |table: &str| {
        let table = format!("model.moe.router.hash_table={table}");
        let set = [
            "model.moe.router.policy=hash",
            "model.moe.top_k=1",
            "model.moe.balance.loss=none",
            "data.batch=8",
            &table,
        ];
        let metrics = trainer(&set).step().unwrap().0;
        metrics.layers.iter().map(|layer| layer.max_over_mean).fold(0.0, f64::max)
    };
    let (balanced, modulo) = (worst("balanced"), worst("modulo"));
    assert!(balanced < 1.1 && balanced < modulo, "balanced {balanced}, modulo {modulo}");
}

#[test]
fn activation_checkpointing_repeats_no_decision_and_changes_no_bit_of_a_step() {
    // A second pass that drew or dropped anew would differ from the first, as would one that forgot the layer before.
    let noise = "model.moe.router.noise={ normal = { scale = 1.0 } }";
    let capacity = "model.moe.router.capacity_factor=0.75";
    let before = "model.moe.zero_computation={ gating_residual = true }";
    for set in [[noise, capacity], [noise, before]] {
        let set = [&set[..], &["data.batch=2"]].concat();
        let (mut off, mut on) = (trainer(&set), trainer(&[&set[..], &["train.checkpoint_activations=true"]].concat()));
        for _ in 0..2 {
            let (off, on) = (off.step().unwrap().0, on.step().unwrap().0);
            assert!(off.layers[0].dropped > 0, "capacity binds");
            assert_eq!((off.loss.to_bits(), off.grad_norm.to_bits()), (on.loss.to_bits(), on.grad_norm.to_bits()));
            let loads = |metrics: &StepMetrics| metrics.layers.iter().map(|layer| layer.load_cv).collect::<Vec<_>>();
            assert_eq!(loads(&off), loads(&on));
        }
        assert_eq!(values(&off), values(&on));
    }
}

#[test]
fn a_weight_that_is_no_number_is_named_and_nothing_is_applied() {
    let mut trainer = trainer(&["data.batch=2"]);
    trainer.step().unwrap();
    let mut poisoned = String::new();
    trainer.model.for_each_parameter_mut(|_, info, values| {
        if info.name.ends_with("experts.down") && poisoned.is_empty() {
            poisoned = info.name.clone();
            values[3] = f32::NAN;
        }
    });
    let before = values(&trainer);
    let error = trainer.step().unwrap_err();
    let TrainError::NonFinite(report) = &error else { panic!("{error}") };
    assert_eq!(report.step, 2);
    assert!(error.to_string().contains(&poisoned), "{error}");
    let bits = |all: Vec<Vec<f32>>| {
        all.into_iter().map(|p| p.into_iter().map(f32::to_bits).collect()).collect::<Vec<Vec<_>>>()
    };
    assert_eq!(bits(values(&trainer)), bits(before));
    assert_eq!(trainer.steps(), 1);
}
