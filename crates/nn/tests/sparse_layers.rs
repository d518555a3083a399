//! Layers that are more than a router and equal experts: hash tables, two levels, experts without a network, experts of
//! different widths, a dense branch beside the experts. Each in a decoder read from a file: gradients, decoding, saving.

mod common;

use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use common::{Pass, disagreements, noise};
use mixtura_nn::{Decoder, Experts, ForwardContext, ModelConfig, MoeLayer, MoeLayerConfig, NamedParameters, Residual};
use mixtura_ops::{DispatchPlan, Numerics, into_vec, tensor_from_vec};
use mixtura_routing::zero_cost::{self, ZeroComputation};
use mixtura_routing::{Activation, Normalize, Policy, ReluController, RouterConfig, policy::hash, residual};

const VOCAB: usize = 19;

/// Three layers from the text of a `[model.moe]` table.
fn config(moe: &str) -> ModelConfig {
    let text = format!(
        "vocab = {VOCAB}\nd_model = 16\nlayers = 3\nheads = 2\ncontext = 24\nd_dense = 8\ninit_std = 0.3\n[moe]\n{moe}\n"
    );
    let config: ModelConfig = toml::from_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    config.validate().unwrap_or_else(|error| panic!("{error}\n{text}"));
    let again = toml::to_string(&config).unwrap();
    assert_eq!(toml::from_str::<ModelConfig>(&again).unwrap(), config, "{again}");
    config
}

fn ids(n: usize, seed: u32) -> Vec<u32> {
    noise(n, seed).iter().map(|v| ((v + 1.0) * 0.5 * VOCAB as f32) as u32 % VOCAB as u32).collect()
}

fn training() -> ForwardContext {
    ForwardContext::training(5, 3, Numerics::default())
}

fn evaluation(seed: u64) -> ForwardContext {
    ForwardContext { seed, step: seed, ..ForwardContext::evaluation(Numerics::default()) }
}

/// A trainable model from the text of its `[model.moe]` table, its gates away from ties.
fn model(moe: &str) -> Decoder {
    let mut model = Decoder::new(&config(moe), 11, &Device::default().autodiff()).unwrap();
    let mut index = 0;
    model.for_each_parameter_mut(|_, info, values| {
        index += 1;
        if info.name.contains("router") && !info.name.ends_with("table") && values.iter().all(|v| *v == 0.0) {
            values.iter_mut().zip(noise(info.len(), 50 + index)).for_each(|(w, n)| *w = 0.3 * n);
        }
    });
    model
}

/// Everything that must hold for a layer in a decoder: gradients, evaluation without randomness, decoding, counted parameters,
/// saving and loading.
fn check_model(name: &str, moe: &str, skipped: &[&str]) {
    let mut decoder = model(moe);
    let (tokens, targets) = (ids(20, 1), ids(20, 2));
    let failures = disagreements(name, &mut decoder, &[], &[&["x"], skipped].concat(), |model, _| {
        let out = model.loss(&tokens[..8], &targets[..8], 2, 4, &training()).unwrap();
        let rows = |layer: &mixtura_nn::LayerRouting| {
            let assignment = layer.assignment();
            [assignment.token_of_row.clone(), assignment.row_offsets.clone()].concat()
        };
        Pass { x_td: None, loss: out.total, choices: out.routing.iter().flat_map(rows).collect() }
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));

    let infos = decoder.parameter_infos();
    let counted = decoder.config().parameter_counts().unwrap();
    assert_eq!(infos.iter().map(|info| info.len()).sum::<usize>(), counted.total, "{name}");
    assert!(counted.active <= counted.total);

    // In training, too, a token does not change what is computed before it; without noise and drops it is evaluation.
    let trained = |tokens: &[u32]| into_vec(decoder.logits(tokens, 1, 20, &training()).unwrap().0);
    let changed = [&tokens[..19], &[(tokens[19] + 1) % VOCAB as u32]].concat();
    assert_eq!(trained(&tokens)[..19 * VOCAB], trained(&changed)[..19 * VOCAB], "{name}: not causal");
    assert_ne!(trained(&tokens), trained(&changed));

    let logits = |model: &Decoder, seed| into_vec(model.logits(&tokens, 1, 20, &evaluation(seed)).unwrap().0);
    let whole = logits(&decoder, 1);
    let plain = !moe.contains("noise") && (!moe.contains("zero_computation") || moe.contains("gamma = 0\n"));
    assert_eq!(trained(&tokens) == whole, plain, "{name}: training and evaluation");
    assert_eq!(whole, logits(&decoder, 99), "{name}: evaluation depends on the seed");

    // Saved, and loaded into a model of another seed on a device without autodiff.
    let mut saved = Vec::new();
    decoder.for_each_parameter(|info, values| {
        saved.push((info.name.clone(), info.shape.clone(), std::borrow::Cow::Owned(values.to_vec())));
    });
    let mut loaded = Decoder::new(decoder.config(), 12, &Device::default()).unwrap();
    loaded.load_named(saved).unwrap();
    assert_eq!(whole, logits(&loaded, 1), "{name}: saved and loaded");

    let mut cache = loaded.cache(20);
    let mut decoded = into_vec(loaded.decode(&tokens[..7], &mut cache, &evaluation(1)).unwrap().logits);
    for token in &tokens[7..] {
        decoded.extend(into_vec(loaded.decode(&[*token], &mut cache, &evaluation(1)).unwrap().logits));
    }
    assert_eq!(whole, decoded, "{name}: decoding");
}

#[test]
fn hash_layers_have_a_table_that_is_saved() {
    let moe = |table: &str| {
        format!("experts = 4\ntop_k = 2\nd_expert = 12\nrouter = {{ policy = \"hash\", hash_table = \"{table}\" }}")
    };
    check_model("modulo", &moe("modulo"), &[]);
    check_model("random", &moe("random"), &["router.table"]);
    check_model("balanced", &moe("balanced"), &["router.table"]);

    let frequency: Vec<f64> = (0..VOCAB).map(|id| 1.0 / (id + 1) as f64).collect();
    let mut decoder = model(&moe("balanced"));
    decoder.balance_hash_tables(&frequency);
    let (expected, _) = hash::balanced_table(&frequency, 4);
    let mut tables = 0;
    decoder.for_each_parameter(|info, values| {
        if info.name.ends_with("router.table") {
            assert_eq!(values.iter().map(|e| *e as u32).collect::<Vec<_>>(), expected);
            assert!(!info.decays());
            tables += 1;
        }
    });
    assert_eq!(tables, 3);
    let (_, routing) = decoder.logits(&[3, 18], 1, 2, &evaluation(1)).unwrap();
    let chosen = [expected[3], (expected[3] + 1) % 4, expected[18], (expected[18] + 1) % 4];
    assert!(routing.iter().all(|layer| layer.routed.choices.experts == chosen));
    // A table of another router is not touched.
    decoder = model(&moe("random"));
    let before = decoder.logits(&[3, 18], 1, 2, &evaluation(1)).unwrap().1[0].routed.choices.clone();
    decoder.balance_hash_tables(&frequency);
    assert_eq!(before, decoder.logits(&[3, 18], 1, 2, &evaluation(1)).unwrap().1[0].routed.choices);
}

#[test]
fn a_controller_steers_the_zero_gates_of_relu_routing_to_its_target() {
    let moe = "experts = 8\ntop_k = 2\nd_expert = 8\n[moe.router]\npolicy = \"relu\"\nactivation = \"relu\"\nnormalize = false\n[moe.balance]\nz_loss = 0\ncontroller = { start = 1e-3, alpha = 1.2 }";
    let mut decoder = model(moe);
    let control = decoder.config().moe.as_ref().unwrap().balance.controller.unwrap();
    let mut controller = ReluController::new(control);
    let (tokens, targets) = (ids(20, 1), ids(20, 2));
    let mut zeros = 0.0;
    for _ in 0..150 {
        let context = ForwardContext { balance_coefficient: Some(controller.lambda), ..training() };
        let out = decoder.loss(&tokens, &targets, 1, 20, &context).unwrap();
        out.routing.iter().for_each(|layer| controller.add(&layer.routed));
        let pairs: usize = out.routing.iter().map(|layer| layer.routed.choices.pairs()).sum();
        zeros = 1.0 - pairs as f64 / (3 * 20 * 8) as f64;
        let gradients = decoder.take_gradients(&mut out.total.backward());
        decoder.for_each_parameter_mut(|i, info, values| {
            if let (Some(gradient), true) = (&gradients[i], info.name.contains("router")) {
                let gradient: Vec<f32> = into_vec(gradient.clone());
                values.iter_mut().zip(gradient).for_each(|(w, g)| *w -= 0.05 * g);
            }
        });
        controller.update();
    }
    assert!((zeros - 0.75).abs() < 0.1, "{zeros} of all gates are zero");
    assert!(controller.lambda.is_finite() && controller.lambda > 1e-3, "{}", controller.lambda);
}

#[test]
fn two_levels_of_gates_train_and_decode() {
    let moe = "experts = 6\ntop_k = 4\nd_expert = 12\n[moe.router]\npolicy = { hierarchical = { groups = 3, keep = 2 } }\nactivation = \"softmax_selected\"\nnoise = { softplus = { floor = 0.01 } }\n[moe.balance]\nloss = \"importance_load\"\ncoefficient = 0.1";
    check_model("hierarchical", moe, &[]);
    let routing = model(moe).logits(&ids(20, 1), 1, 20, &evaluation(1)).unwrap().1;
    for layer in routing {
        assert_eq!(layer.logits_te.dims(), [20, 6 + 3]);
        for t in 0..20 {
            let chosen = layer.routed.choices.of_token(t);
            assert_eq!((chosen[0] / 2, chosen[2] / 2), (chosen[1] / 2, chosen[3] / 2), "two of each group: {chosen:?}");
        }
        assert!(layer.routed.weight_of_pair.chunks(4).all(|w| (w.iter().sum::<f32>() - 1.0).abs() < 1e-6));
    }
}

const ZERO: &str = "experts = 4\ntop_k = 2\nd_expert = 12\nrouter = { normalize = false }\n";

#[test]
fn experts_without_a_network_carry_their_logits_from_layer_to_layer() {
    check_model("moe++", &format!("{ZERO}[moe.zero_computation]\ngamma = 0\nbeta = 0.2"), &[]);
    check_model("renormalised", &format!("{ZERO}[moe.zero_computation]\nrenorm_after_zero = true\ngamma = 0.9"), &[]);
    check_model(
        "no constants",
        &format!("{ZERO}[moe.zero_computation]\nconstant = 0\ncopy = 2\ngating_residual = false"),
        &[],
    );
    // The second MoE layer has the logits of the first, across a dense layer and with another number of experts.
    let pyramid = format!("{ZERO}layers = [4, 0, 6]\n[moe.zero_computation]\ngamma = 0\nbeta = 0.1");
    check_model("pyramid", &pyramid, &[]);
    let mut decoder = model(&pyramid);
    let shape = |decoder: &Decoder, name: &str| {
        decoder.parameter_infos().into_iter().find(|info| info.name == name).map(|info| info.shape)
    };
    assert_eq!(shape(&decoder, "layers.0.moe.router.gating_residual"), None);
    assert_eq!(shape(&decoder, "layers.2.moe.router.gating_residual"), Some(vec![8, 10]));
    assert_eq!(shape(&decoder, "layers.2.moe.zero_computation.mix"), Some(vec![16, 4]));
    let second =
        |decoder: &Decoder| into_vec(decoder.logits(&ids(9, 1), 1, 9, &evaluation(1)).unwrap().1.remove(1).logits_te);
    let with = second(&decoder);
    decoder.for_each_parameter_mut(|_, info, values| {
        if info.name.ends_with("gating_residual") {
            values.fill(0.0);
        }
    });
    assert_ne!(with, second(&decoder));
}

/// Zero, copy and constant experts against the reference of the routing crate, token by token.
#[test]
fn a_layer_with_experts_without_a_network_is_the_reference() {
    let device = Device::default();
    let zero = ZeroComputation { constant: 2, gamma: 0.0, ..ZeroComputation::default() };
    let router = RouterConfig { normalize: Normalize::Never, ..RouterConfig::default() };
    let config =
        MoeLayerConfig { zero_computation: Some(zero), router, init_std: 0.5, ..MoeLayerConfig::new(8, 3, 2, 6) };
    let layer = MoeLayer::new(&config, 3, &device).unwrap();
    let plain =
        MoeLayer::new(&MoeLayerConfig { init_std: 0.5, ..MoeLayerConfig::new(8, 3, 2, 6) }, 3, &device).unwrap();
    let x = noise(40 * 8, 4);
    let x_td = tensor_from_vec(x.clone(), [40, 8], &device);
    let out = layer.forward(x_td.clone(), &training()).unwrap();
    let combine_te = out.routing.routed.combine_te();
    let y = into_vec(out.y_td);
    let learned = layer.zero_computation.as_ref().unwrap();
    let wide = |values: Vec<f32>| -> Vec<f64> { values.into_iter().map(f64::from).collect() };
    let (mix, value) =
        (into_vec(learned.mix.as_ref().unwrap().val()), wide(into_vec(learned.value.as_ref().unwrap().val())));
    // The networks alone: the same weights, every expert on every token.
    let dense: Vec<Vec<f64>> = (0..3)
        .map(|e| {
            let plan = DispatchPlan::new(
                40,
                (0..=3).map(|i| if i > e { 40 } else { 0 }).collect(),
                (0..40).collect(),
                (0..=40).collect(),
                (0..40).collect(),
            );
            let ones = Tensor::ones([40], &device);
            wide(into_vec(plain.experts.forward(x_td.clone(), ones, &Arc::new(plan), Numerics::default())))
        })
        .collect();
    let mut kinds = [0; 7];
    for t in 0..40 {
        let token = wide(x[t * 8..(t + 1) * 8].to_vec());
        let mut expected = vec![0.0; 8];
        for e in 0..7 {
            let weight = f64::from(combine_te[t * 7 + e]);
            kinds[e] += usize::from(weight != 0.0);
            let answer = match e {
                0..3 => dense[e][t * 8..(t + 1) * 8].to_vec(),
                3 | 4 => {
                    let column = |c: usize| (0..8).map(|d| f64::from(mix[d * 4 + c])).collect::<Vec<_>>();
                    let wc = [column(2 * (e - 3)), column(2 * (e - 3) + 1)].concat();
                    zero_cost::constant_expert(&token, &wc, &value[(e - 3) * 8..(e - 2) * 8])
                }
                5 => token.clone(),
                _ => vec![0.0; 8],
            };
            expected.iter_mut().zip(answer).for_each(|(sum, a)| *sum += weight * a);
        }
        for (found, expected) in y[t * 8..].iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-4, "token {t}: {found} vs {expected}");
        }
    }
    assert!(kinds.iter().all(|n| *n > 0), "{kinds:?}");
}

#[test]
fn experts_of_different_widths_run_as_one_block_per_width() {
    let widths = "experts = 5\ntop_k = 2\nd_expert_each = [6, 10, 6, 14, 10]\n[moe.balance]\nloss = \"parameter_penalty\"\ncoefficient = 0.1\nentropy = 0.03";
    check_model("hmoe", widths, &[]);
    check_model("hmoe with top-p", &format!("{widths}\n[moe.router]\npolicy = {{ top_p = {{ mass = 0.6 }} }}"), &[]);
    let decoder = model(widths);
    let shapes: Vec<Vec<usize>> = decoder
        .parameter_infos()
        .into_iter()
        .filter(|info| info.name.starts_with("layers.0.moe") && info.name.ends_with("down"))
        .map(|info| info.shape)
        .collect();
    assert_eq!(shapes, [[2, 6, 16], [2, 10, 16], [1, 14, 16]]);
    let counts = decoder.config().parameter_counts().unwrap();
    assert_eq!(counts.total - counts.active, 3 * 3 * 16 * (46 - 24), "a token uses at most the two widest");
}

/// The layer against its experts one by one.
#[test]
fn a_layer_of_different_widths_is_the_weighted_sum_of_its_experts() {
    let device = Device::default();
    let config = MoeLayerConfig { d_expert_each: vec![6, 10, 6], init_std: 0.5, ..MoeLayerConfig::new(8, 3, 2, 0) };
    let layer = MoeLayer::new(&config, 3, &device).unwrap();
    let x_td = tensor_from_vec(noise(20 * 8, 4), [20, 8], &device);
    let out = layer.forward(x_td.clone(), &training()).unwrap();
    let combine_te = out.routing.routed.combine_te();
    let (y, numerics) = (into_vec(out.y_td), Numerics::default());
    let one = |experts: &Experts, of: usize, index: usize| {
        let offsets = (0..=of).map(|i| if i > index { 20 } else { 0 }).collect();
        let plan = DispatchPlan::new(20, offsets, (0..20).collect(), (0..=20).collect(), (0..20).collect());
        into_vec(experts.forward(x_td.clone(), Tensor::ones([20], &device), &Arc::new(plan), numerics))
    };
    let answers = [one(&layer.experts, 2, 0), one(&layer.other_widths[0], 1, 0), one(&layer.experts, 2, 1)];
    for (at, y) in y.iter().enumerate() {
        let expected: f32 = (0..3).map(|e| combine_te[at / 8 * 3 + e] * answers[e][at]).sum();
        assert!((y - expected).abs() < 1e-5, "{y} vs {expected}");
    }
}

#[test]
fn a_residual_layer_mixes_its_experts_with_a_dense_network() {
    let moe = |residual: &str| {
        format!(
            "experts = 4\ntop_k = 1\nd_expert = 12\nresidual = \"{residual}\"\n[moe.router]\npolicy = \"switch\"\nnormalize = false"
        )
    };
    check_model("residual", &moe("coefficient"), &[]);
    check_model("residual sum", &moe("sum"), &[]);
    let device = Device::default();
    let config = MoeLayerConfig { d_shared: 6, init_std: 0.5, ..MoeLayerConfig::new(8, 3, 1, 6) };
    let layer = |residual| MoeLayer::new(&MoeLayerConfig { residual, ..config.clone() }, 3, &device).unwrap();
    let mixed = layer(Some(Residual::Coefficient));
    let x = noise(20 * 8, 4);
    let x_td = tensor_from_vec(x.clone(), [20, 8], &device);
    let alone = MoeLayer::new(&MoeLayerConfig { d_shared: 0, ..config.clone() }, 3, &device).unwrap();
    let experts = into_vec(alone.forward(x_td.clone(), &training()).unwrap().y_td);
    let dense = into_vec(mixed.shared.as_ref().unwrap().forward_dense(x_td.clone(), Numerics::default()));
    let gate = mixed.residual.as_ref().unwrap();
    let c = residual::coefficients(&x, &into_vec(gate.weight.val()), &into_vec(gate.bias.val()), 8);
    let found = into_vec(mixed.forward(x_td.clone(), &training()).unwrap().y_td);
    let sum = into_vec(layer(Some(Residual::Sum)).forward(x_td, &training()).unwrap().y_td);
    for at in 0..found.len() {
        let expected = c[at / 8 * 2] * experts[at] + c[at / 8 * 2 + 1] * dense[at];
        assert!((found[at] - expected).abs() < 1e-5, "{} vs {expected}", found[at]);
        assert!((sum[at] - experts[at] - dense[at]).abs() < 1e-5);
    }
}

#[test]
fn a_base_layer_keeps_what_its_weight_leaves_of_the_token() {
    let device = Device::default();
    let router = RouterConfig {
        policy: Policy::Base,
        activation: Activation::Sigmoid,
        normalize: Normalize::Never,
        ..RouterConfig::default()
    };
    let config = MoeLayerConfig { router, init_std: 0.5, ..MoeLayerConfig::new(8, 3, 1, 6) };
    let mut layer = MoeLayer::new(&config, 3, &device).unwrap();
    let x = noise(20 * 8, 4);
    let run = |layer: &MoeLayer| layer.forward(tensor_from_vec(x.clone(), [20, 8], &device), &training()).unwrap();
    let whole = run(&layer);
    let combine_te = whole.routing.routed.combine_te();
    let weight = |t: usize| combine_te[t * 3..(t + 1) * 3].iter().sum::<f32>();
    layer.for_each_parameter_mut(|_, info, values| {
        if info.name == "experts.down" {
            values.fill(0.0);
        }
    });
    let rest = into_vec(run(&layer).y_td);
    for (at, (rest, x)) in rest.iter().zip(&x).enumerate() {
        assert!((rest - (1.0 - weight(at / 8)) * x).abs() < 1e-6);
    }
    assert!((0..20).all(|t| weight(t) > 0.0 && weight(t) < 1.0));
}

#[test]
fn impossible_layers_are_refused_with_the_key_and_what_was_expected() {
    let refused = |moe: &str| -> String {
        let text = format!("vocab = 9\nd_model = 16\nlayers = 2\nheads = 2\ncontext = 8\n[moe]\n{moe}\n");
        match toml::from_str::<ModelConfig>(&text) {
            Ok(config) => config.validate().expect_err(moe).to_string(),
            Err(error) => error.to_string(),
        }
    };
    let base = "experts = 4\ntop_k = 2\n";
    for (text, expected) in [
        (
            format!("{base}d_expert_each = [4, 5, 6]"),
            "moe.d_expert_each = [4, 5, 6]: expected a positive width for each of the 4 experts",
        ),
        (format!("{base}d_expert = 4\nd_expert_each = [4, 5, 6, 7]"), "absent when moe.d_expert_each is given"),
        (base.to_string(), "moe.d_expert"),
        (format!("{base}d_expert = 4\n[moe.zero_computation]\ntau = 0"), "moe.zero_computation.tau = 0"),
        (format!("{base}d_expert = 4\n[moe.zero_computation]\nzeros = 1"), "zeros"),
        (format!("{base}d_expert = 4\n[moe.zero_computation]\nzero = 0\ncopy = 0\nconstant = 0"), "at least one of"),
        (
            format!("{base}d_expert = 4\nrouter = {{ capacity_factor = 1.0 }}\n[moe.zero_computation]\nzero = 1"),
            "moe.router.capacity_factor = 1: expected 0",
        ),
        (format!("{base}d_expert = 4\nresidual = \"coefficient\"\nshared_gate = true"), "moe.residual"),
        (format!("{base}d_expert = 4\nrouter = {{ hash_table = \"balanced\" }}"), "moe.router.hash_table = balanced"),
        (format!("{base}d_expert = 4\nbalance = {{ controller = {{}} }}"), "moe.balance.controller"),
        (
            format!("{base}d_expert = 4\nbalance = {{ controller = {{ alpha = 1.0 }} }}"),
            "moe.balance.controller.alpha = 1",
        ),
        (
            format!("{base}d_expert = 4\nrouter = {{ policy = {{ hierarchical = {{ groups = 2, keep = 2 }} }} }}"),
            "moe.router.policy.hierarchical.keep = 2",
        ),
    ] {
        let found = refused(&text);
        assert!(found.contains(expected), "{text}\n{found}");
    }
}
