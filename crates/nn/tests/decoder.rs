//! The whole decoder: gradients against finite differences, and the promises about rows, batches, decoding and routing.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor};
use mixtura_nn::{
    Beyond, Decoder, ForwardContext, ForwardError, LoadError, LossOutput, ModelConfig, MoeConfig, MoeLayers,
    NamedParameters, QkNorm, SelectionCounts, olmoe_1b_7b,
};
use mixtura_ops::{Numerics, Precision, into_vec, with_slice};
use mixtura_routing::{BalanceLoss, Noise, Normalize, RouterConfig};

const VOCAB: usize = 19;

/// Two layers, the first dense, the second with six experts and a gated shared one, grouped heads, normalised queries.
fn config() -> ModelConfig {
    ModelConfig {
        vocab: VOCAB,
        kv_heads: Some(2),
        qk_norm: QkNorm::PerHead,
        d_dense: Some(20),
        init_std: 0.3,
        moe: Some(MoeConfig {
            layers: MoeLayers::Counts(vec![0, 6]),
            shared_experts: 1,
            shared_gate: true,
            ..MoeConfig::new(6, 2, 12)
        }),
        ..ModelConfig::new(16, 2, 4, 32)
    }
}

fn with_moe(change: impl FnOnce(&mut MoeConfig)) -> ModelConfig {
    let mut config = config();
    change(config.moe.as_mut().unwrap());
    config
}

fn model(config: &ModelConfig) -> Decoder {
    Decoder::new(config, 11, &Device::default()).unwrap()
}

fn trainable(config: &ModelConfig) -> Decoder {
    Decoder::new(config, 11, &Device::default().autodiff()).unwrap()
}

/// Pseudo-random ids.
fn ids(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * 97_003) >> 7) % VOCAB as u32).collect()
}

fn evaluation(precision: Precision) -> ForwardContext {
    ForwardContext::evaluation(Numerics::new(precision))
}

fn training() -> ForwardContext {
    ForwardContext::training(5, 3, Numerics::default())
}

fn logits(model: &Decoder, ids: &[u32], batch: usize, context: &ForwardContext) -> Vec<f32> {
    into_vec(model.logits(ids, batch, ids.len() / batch, context).unwrap().0)
}

fn value(tensor: &Tensor<1>) -> f32 {
    with_slice(tensor, |values| values[0])
}

#[test]
fn the_gradient_of_every_parameter_matches_finite_differences() {
    for config in [
        config(),
        ModelConfig { tied: true, qk_norm: QkNorm::Full, scaled_residual_init: true, ..config() },
        with_moe(|moe| {
            moe.router = RouterConfig { normalize: Normalize::Never, ..RouterConfig::default() };
            (moe.balance.coefficient, moe.balance.z_loss) = (0.5, 0.1);
        }),
    ] {
        let mut model = trainable(&config);
        let (tokens, targets) = (ids(14, 1), ids(14, 2));
        let run = |model: &Decoder| model.loss(&tokens, &targets, 2, 7, &training()).unwrap();
        let out = run(&model);
        let chosen = |out: &LossOutput| out.routing[0].routed.choices.experts.clone();
        let expected_choices = chosen(&out);
        let gradients = model.take_gradients(&mut out.total.backward());
        for (target, info) in model.parameter_infos().iter().enumerate() {
            let gradient =
                into_vec(gradients[target].clone().unwrap_or_else(|| panic!("{} has no gradient", info.name)));
            let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            assert!(norm > 1e-5, "{}: gradient norm {norm}", info.name);
            // Along the gradient the slope is its norm. The longest step that keeps every token's experts has the least
            // rounding; two step lengths cancel the third-order term.
            let untouched = snapshot(&model);
            let mut at = |h: f64| {
                model.for_each_parameter_mut(|i, _, values| {
                    if i == target {
                        let step = |(w, g): (&mut f32, &f32)| *w += (h * f64::from(*g) / norm) as f32;
                        values.iter_mut().zip(&gradient).for_each(step);
                    }
                });
                let out = run(&model);
                restore(&mut model, &untouched);
                (chosen(&out) == expected_choices).then(|| f64::from(value(&out.total)))
            };
            let mut slope = |h: f64| Some((at(h)? - at(-h)?) / (2.0 * h));
            let estimate =
                [0.01, 0.005, 0.0025, 0.001].into_iter().find_map(|h| Some((4.0 * slope(h)? - slope(2.0 * h)?) / 3.0));
            let estimate = estimate.unwrap_or_else(|| panic!("{}: every step changes the routing", info.name));
            assert!((estimate - norm).abs() < 0.01 * norm + 5e-4, "{}: {estimate} vs {norm}", info.name);
        }
    }
}

fn snapshot(model: &Decoder) -> Vec<Vec<f32>> {
    let mut values = Vec::new();
    model.for_each_parameter(|_, parameter| values.push(parameter.to_vec()));
    values
}

fn restore(model: &mut Decoder, values: &[Vec<f32>]) {
    model.for_each_parameter_mut(|i, _, parameter| parameter.copy_from_slice(&values[i]));
}

#[test]
fn a_later_token_does_not_change_earlier_logits() {
    let model = model(&config());
    for precision in [Precision::F32, Precision::Bf16] {
        let mut tokens = ids(12, 1);
        let before = logits(&model, &tokens, 1, &evaluation(precision));
        tokens[11] = (tokens[11] + 1) % VOCAB as u32;
        let after = logits(&model, &tokens, 1, &evaluation(precision));
        assert_eq!(before[..11 * VOCAB], after[..11 * VOCAB]);
        assert_ne!(before[11 * VOCAB..], after[11 * VOCAB..]);
    }
}

#[test]
fn a_sequence_gets_the_same_bits_whatever_it_is_batched_with() {
    let model = model(&config());
    for precision in [Precision::F32, Precision::Bf16, Precision::Bf16Native] {
        let alone = logits(&model, &ids(9, 4), 1, &evaluation(precision));
        let batch: Vec<u32> = [ids(9, 1), ids(9, 2), ids(9, 4), ids(9, 3), ids(9, 5)].concat();
        let together = logits(&model, &batch, 5, &evaluation(precision));
        assert_eq!(together[2 * 9 * VOCAB..3 * 9 * VOCAB], alone[..], "{precision}");
    }
}

#[test]
fn decoding_with_a_cache_gives_the_bits_of_the_whole_sequence() {
    for config in [config(), ModelConfig { tied: true, qk_norm: QkNorm::Full, kv_heads: None, ..config() }] {
        let model = model(&config);
        for precision in [Precision::F32, Precision::Bf16] {
            let (tokens, context) = (ids(14, 6), evaluation(precision));
            let whole = logits(&model, &tokens, 1, &context);
            let mut cache = model.cache(14);
            let mut found = Vec::new();
            for part in [0..5, 5..6, 6..7, 7..12, 12..14] {
                found.extend(into_vec(model.decode(&tokens[part], &mut cache, &context).unwrap().logits));
            }
            assert_eq!(found, whole);
            cache.truncate(13);
            assert_eq!(cache.len(), 13);
            let last = model.decode_last(&tokens[13..], &mut cache, &context).unwrap();
            assert_eq!(into_vec(last.logits), whole[13 * VOCAB..]);
        }
    }
}

#[test]
fn routing_without_noise_is_the_same_in_training_evaluation_and_decoding() {
    let config = config();
    let (model, trained) = (model(&config), trainable(&config));
    let tokens = ids(10, 3);
    let choices = |routing: &[mixtura_nn::LayerRouting]| -> Vec<(Vec<u32>, Vec<f32>)> {
        routing.iter().map(|l| (l.routed.choices.experts.clone(), l.routed.weight_of_pair.clone())).collect()
    };
    let evaluated = choices(&model.logits(&tokens, 1, 10, &evaluation(Precision::F32)).unwrap().1);
    let in_training = choices(&trained.loss(&tokens, &tokens, 1, 10, &training()).unwrap().routing);
    let decoded = choices(&model.decode(&tokens, &mut model.cache(10), &evaluation(Precision::F32)).unwrap().routing);
    assert_eq!(evaluated, in_training);
    assert_eq!(evaluated, decoded);
}

#[test]
fn noise_is_drawn_in_training_only_and_follows_seed_and_step() {
    for noise in [Noise::Normal { scale: 6.0 }, Noise::Jitter { eps: 0.3 }] {
        let model = model(&with_moe(|moe| moe.router.noise = noise));
        let tokens = ids(10, 3);
        let run = |training, seed, step| {
            let context = ForwardContext { training, ..ForwardContext::training(seed, step, Numerics::default()) };
            logits(&model, &tokens, 1, &context)
        };
        assert_eq!(run(false, 1, 1), run(false, 2, 9));
        assert_eq!(run(true, 1, 1), run(true, 1, 1));
        assert_ne!(run(true, 1, 1), run(true, 1, 2));
        assert_ne!(run(true, 1, 1), run(true, 2, 1));
        assert_ne!(run(true, 1, 1), run(false, 1, 1));
    }
}

#[test]
fn learned_noise_gets_a_gradient_from_the_task_and_from_the_load_loss() {
    let config = with_moe(|moe| {
        moe.router = RouterConfig::noisy_top_k();
        moe.balance.loss = BalanceLoss::ImportanceLoad;
    });
    let model = trainable(&config);
    let out = model.loss(&ids(24, 1), &ids(24, 2), 3, 8, &training()).unwrap();
    let gradients = model.take_gradients(&mut out.total.backward());
    let at = model.parameter_infos().iter().position(|info| info.name.ends_with("router.noise")).unwrap();
    let gradient = into_vec(gradients[at].clone().unwrap());
    assert!(gradient.iter().any(|g| *g != 0.0) && gradient.iter().all(|g| g.is_finite()));
}

#[test]
fn a_tight_capacity_drops_pairs_in_training_and_none_in_evaluation() {
    let config = with_moe(|moe| (moe.router.capacity_factor, moe.router.capacity_min) = (0.5, 1));
    let model = model(&config);
    let dropped = |context| {
        let (_, routing) = model.logits(&ids(24, 1), 3, 8, &context).unwrap();
        routing[0].stats().dropped
    };
    assert!(dropped(training()) > 0.0);
    assert_eq!(dropped(evaluation(Precision::F32)), 0.0);
}

#[test]
fn a_model_learns_and_its_parameters_are_updated_in_place() {
    let mut model = trainable(&config());
    let (tokens, targets) = (ids(32, 1), ids(32, 2));
    let mut losses = Vec::new();
    let mut addresses = BTreeMap::new();
    for step in 0..30 {
        let out = model.loss(&tokens, &targets, 4, 8, &training()).unwrap();
        losses.push(value(&out.ce));
        let gradients = model.take_gradients(&mut out.total.backward());
        drop(out);
        model.for_each_parameter_mut(|i, info, values| {
            let Some(gradient) = &gradients[i] else { return };
            with_slice(gradient, |g| values.iter_mut().zip(g).for_each(|(w, g)| *w -= 0.3 * g));
            let address = values.as_ptr() as usize;
            let first = *addresses.entry(info.name.clone()).or_insert(address);
            assert!(step < 2 || address == first, "{} moved in step {step}", info.name);
        });
    }
    assert!(losses[29] < 0.5 * losses[0], "{losses:?}");
}

#[test]
fn a_balance_loss_counts_the_micro_batches_that_it_is_told_of() {
    let config = with_moe(|moe| (moe.balance.coefficient, moe.balance.z_loss) = (1.0, 0.0));
    let model = model(&config);
    let tokens = ids(32, 8);
    let balance = |tokens: &[u32], context: &ForwardContext| {
        let batch = tokens.len() / 8;
        model.loss(tokens, tokens, batch, 8, context).unwrap()
    };
    let whole = balance(&tokens, &training());
    let first = balance(&tokens[..16], &training());
    let mut counts = SelectionCounts::default();
    counts.add(&first.routing);
    let second =
        balance(&tokens[16..], &ForwardContext { beyond: Some(Beyond::Earlier(counts.clone().into())), ..training() });
    counts.add(&second.routing);
    let demand: Vec<u64> = whole.routing[0].assignment().demand.iter().map(|&d| d.into()).collect();
    assert_eq!(counts.by_layer[1], demand);
    assert_eq!(counts.tokens, 32);
    // With f of the whole step the second half's loss is E/k <f_whole, P_second>.
    let probs = &second.routing[0].routed.probs_te;
    let mean = |e: usize| probs.iter().skip(e).step_by(6).map(|p| f64::from(*p)).sum::<f64>() / 16.0;
    let expected: f64 = (0..6).map(|e| demand[e] as f64 / 32.0 * mean(e)).sum::<f64>() * 6.0 / 2.0;
    assert!((second.balance - expected).abs() < 1e-6, "{} vs {expected}", second.balance);
}

#[test]
fn loss_free_balancing_moves_the_bias_and_gives_it_no_gradient() {
    let config = with_moe(|moe| moe.balance.bias_update = 0.5);
    let mut model = trainable(&config);
    let out = model.loss(&ids(24, 1), &ids(24, 2), 3, 8, &training()).unwrap();
    let mut counts = SelectionCounts::default();
    counts.add(&out.routing);
    let at = model.parameter_infos().iter().position(|info| info.name.ends_with("router.bias")).unwrap();
    assert!(model.take_gradients(&mut out.total.backward())[at].is_none());
    model.update_biases(&counts);
    let bias = snapshot(&model)[at].clone();
    let mean = counts.by_layer[1].iter().sum::<u64>() as f64 / 6.0;
    for (b, &count) in bias.iter().zip(&counts.by_layer[1]) {
        assert_eq!(*b, 0.5 * (mean - count as f64).signum() as f32);
    }
    let after = model.loss(&ids(24, 1), &ids(24, 2), 3, 8, &training()).unwrap();
    assert_ne!(after.routing[0].assignment().demand, out.routing[0].assignment().demand);
}

/// A parameter as a file holds it.
type Named = (String, Vec<usize>, Vec<f32>);

#[test]
fn parameters_have_stable_names_and_load_all_or_nothing() {
    let source = Decoder::new(&config(), 1, &Device::default()).unwrap();
    let mut target = model(&config());
    let mut tensors = Vec::new();
    source.for_each_parameter(|info, values| tensors.push((info.name.clone(), info.shape.clone(), values.to_vec())));
    let names: Vec<&str> = tensors.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "embed.weight",
            "layers.0.attention_norm.weight",
            "layers.0.attention.qkv",
            "layers.0.attention.out",
            "layers.0.attention.q_norm",
            "layers.0.attention.k_norm",
            "layers.0.ffn_norm.weight",
            "layers.0.mlp.gate_up",
            "layers.0.mlp.down",
            "layers.1.attention_norm.weight",
            "layers.1.attention.qkv",
            "layers.1.attention.out",
            "layers.1.attention.q_norm",
            "layers.1.attention.k_norm",
            "layers.1.ffn_norm.weight",
            "layers.1.moe.router.weight",
            "layers.1.moe.experts.gate_up",
            "layers.1.moe.experts.down",
            "layers.1.moe.shared.gate_up",
            "layers.1.moe.shared.down",
            "layers.1.moe.shared_gate",
            "norm.weight",
            "head.weight",
        ]
    );
    let lend = |tensors: &[Named]| -> Vec<_> {
        tensors.iter().map(|(name, shape, values)| (name.clone(), shape.clone(), values.clone().into())).collect()
    };
    let untouched = snapshot(&target);
    let mut refused = |change: &dyn Fn(&mut Vec<Named>)| {
        let mut tensors = tensors.clone();
        change(&mut tensors);
        let error = target.load_named(lend(&tensors)).unwrap_err();
        assert_eq!(snapshot(&target), untouched);
        error
    };
    let missing = refused(&|tensors| drop(tensors.remove(5)));
    assert_eq!(missing, LoadError::Missing { name: "layers.0.attention.k_norm".into(), shape: vec![4] });
    let unknown = refused(&|tensors| tensors[7].0 = "layers.0.mlp.gate_upp".into());
    assert!(unknown.to_string().ends_with("the nearest name is `layers.0.mlp.gate_up`"), "{unknown}");
    assert!(matches!(refused(&|tensors| tensors.push(tensors[3].clone())), LoadError::Twice { .. }));
    assert!(matches!(refused(&|tensors| tensors[0].1.reverse()), LoadError::Shape { .. }));
    assert!(matches!(refused(&|tensors| tensors[2].2.truncate(3)), LoadError::Shape { .. }));
    target.load_named(lend(&tensors)).unwrap();
    assert_eq!(snapshot(&target), snapshot(&source));
    let tokens = ids(8, 1);
    let context = evaluation(Precision::F32);
    assert_eq!(logits(&target, &tokens, 1, &context), logits(&source, &tokens, 1, &context));
}

#[test]
fn a_loaded_model_still_trains() {
    let mut model = trainable(&config());
    let values = snapshot(&Decoder::new(&config(), 2, &Device::default()).unwrap());
    let infos = model.parameter_infos();
    model.load_named(infos.into_iter().zip(values).map(|(info, v)| (info.name, info.shape, v.into()))).unwrap();
    let out = model.loss(&ids(16, 1), &ids(16, 2), 2, 8, &training()).unwrap();
    assert!(model.take_gradients(&mut out.total.backward()).iter().all(Option::is_some));
}

#[test]
fn counted_parameters_are_those_the_model_has_and_making_a_large_model_draws_nothing() {
    for config in [config(), ModelConfig { tied: true, qk_norm: QkNorm::Full, ..config() }, olmoe_1b_7b()] {
        let infos = Decoder::new(&config, 0, &Device::default()).unwrap().parameter_infos();
        assert_eq!(infos.iter().map(|info| info.len()).sum::<usize>(), config.parameter_counts().unwrap().total);
    }
}

#[test]
fn layers_may_differ_in_experts_and_widths() {
    let config = ModelConfig {
        layers: 3,
        ..with_moe(|moe| {
            moe.layers = MoeLayers::Counts(vec![4, 0, 8]);
            moe.d_expert = mixtura_nn::PerLayer::Each(vec![12, 1, 6]);
        })
    };
    let model = model(&config);
    let shape = |name: &str| model.parameter_infos().into_iter().find(|info| info.name == name).unwrap().shape;
    assert_eq!(shape("layers.0.moe.experts.down"), [4, 12, 16]);
    assert_eq!(shape("layers.1.mlp.down"), [1, 20, 16]);
    assert_eq!(shape("layers.2.moe.experts.gate_up"), [8, 16, 12]);
    let (_, routing) = model.logits(&ids(8, 1), 1, 8, &evaluation(Precision::F32)).unwrap();
    assert_eq!(routing.iter().map(|layer| layer.layer).collect::<Vec<_>>(), [0, 2]);
}

#[test]
fn input_that_does_not_fit_is_refused_with_the_evidence() {
    let model = model(&config());
    let context = evaluation(Precision::F32);
    let error = |ids: &[u32], batch, seq| model.forward(ids, batch, seq, &context).unwrap_err().to_string();
    assert_eq!(error(&[1, 2, 99], 1, 3), "token id 99 at position 2 is outside the vocabulary of 19");
    assert_eq!(error(&[1, 2, 3], 2, 2), "3 token ids for a batch of 2 sequences of 2 tokens");
    assert_eq!(error(&[1; 33], 1, 33), "a sequence of 33 tokens is longer than the model's context of 32");
    let mut cache = model.cache(4);
    let decoded = model.decode(&[1; 5], &mut cache, &context).unwrap_err();
    assert!(matches!(decoded, ForwardError::TooLong { found: 5, context: 4 }));
    assert!(cache.is_empty());
}

#[test]
fn a_router_logit_that_is_not_finite_is_an_error_that_names_the_layer() {
    let mut model = model(&config());
    model.for_each_parameter_mut(|_, info, values| {
        if info.name.ends_with("ffn_norm.weight") {
            values[0] = f32::NAN;
        }
    });
    let error = model.forward(&[1, 2], 1, 2, &evaluation(Precision::F32)).unwrap_err();
    assert!(error.to_string().starts_with("router of layer 1: "), "{error}");
}

#[test]
fn an_empty_batch_has_no_logits_and_no_loss() {
    let model = model(&config());
    let out = model.loss(&[], &[], 0, 8, &training()).unwrap();
    assert_eq!((value(&out.total), out.counted), (0.0, 0));
}
