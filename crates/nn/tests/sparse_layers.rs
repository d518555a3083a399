//! Layers that are more than a router and equal experts: hash tables, two levels, experts without a network, experts of
//! different widths, a dense branch beside the experts. Each in a decoder read from a file: gradients, decoding, saving.

mod common;

use burn::tensor::Device;
use common::{Pass, disagreements, noise};
use mixtura_nn::{Decoder, ForwardContext, ModelConfig, NamedParameters};
use mixtura_ops::{Numerics, into_vec};
use mixtura_routing::{ReluController, policy::hash};

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
        let out = model.loss(&tokens, &targets, 2, 10, &training()).unwrap();
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

    let logits = |model: &Decoder, seed| into_vec(model.logits(&tokens, 1, 20, &evaluation(seed)).unwrap().0);
    let whole = logits(&decoder, 1);
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
            assert!(!info.decay);
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
