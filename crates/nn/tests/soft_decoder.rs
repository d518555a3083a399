//! Soft layers inside a decoder: what is refused, causality, independence of the batch, decoding with a cache, parameters.

use burn::tensor::Device;
use mixtura_nn::{
    Decoder, Emit, ForwardContext, ForwardError, KvCache, ModelConfig, MoeConfig, NamedParameters, SelectionCounts,
    SoftConfig,
};
use mixtura_ops::{Numerics, Precision, into_vec, with_slice};
use mixtura_routing::soft::merge::FirstSegment;
use mixtura_routing::soft::soft_moe::Mixing;

const VOCAB: usize = 19;
const UNIFORM: FirstSegment = FirstSegment::Uniform;

fn causal() -> Vec<SoftConfig> {
    vec![
        SoftConfig::BlockCausal { block: 4, slots_per_expert: 2 },
        SoftConfig::BlockCausal { block: 1, slots_per_expert: 1 },
        SoftConfig::Lory { segment: 4, first_segment: UNIFORM, allow_future: false },
        SoftConfig::MixtureOfTokens { group: 4, temperature: 1.0, emit: Emit::Merge },
        SoftConfig::MixtureOfTokens { group: 2, temperature: 0.7, emit: Emit::Experts },
    ]
}

fn leaking(allow_future: bool) -> Vec<SoftConfig> {
    vec![
        SoftConfig::SoftMoe { slots_per_expert: 1, mixing: Mixing::Soft, allow_future },
        SoftConfig::SoftMoe { slots_per_expert: 1, mixing: Mixing::UniformDispatch, allow_future },
        SoftConfig::SoftMoe { slots_per_expert: 1, mixing: Mixing::UniformCombine, allow_future },
        SoftConfig::SoftMoe { slots_per_expert: 1, mixing: Mixing::Identity, allow_future },
        SoftConfig::Smear { allow_future },
        SoftConfig::Lory { segment: 4, first_segment: FirstSegment::OwnMean, allow_future },
    ]
}

/// Two layers, both soft, with a gated shared network.
fn config(soft: SoftConfig) -> ModelConfig {
    ModelConfig {
        vocab: VOCAB,
        kv_heads: Some(2),
        d_dense: None,
        init_std: 0.3,
        moe: Some(MoeConfig { shared_experts: 1, shared_gate: true, ..MoeConfig::soft(3, 12, soft) }),
        ..ModelConfig::new(16, 2, 4, 32)
    }
}

fn model(soft: SoftConfig) -> Decoder {
    Decoder::new(&config(soft), 11, &Device::default()).unwrap()
}

fn ids(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * 97_003) >> 7) % VOCAB as u32).collect()
}

fn evaluation(precision: Precision) -> ForwardContext {
    ForwardContext::evaluation(Numerics::new(precision))
}

fn logits(model: &Decoder, ids: &[u32], batch: usize, context: &ForwardContext) -> Vec<f32> {
    into_vec(model.logits(ids, batch, ids.len() / batch, context).unwrap().0)
}

#[test]
fn a_later_token_changes_no_bit_of_earlier_logits_for_the_causal_kinds() {
    for soft in causal() {
        let model = model(soft);
        for precision in [Precision::F32, Precision::Bf16] {
            let context = evaluation(precision);
            for trial in 0..20 {
                let tokens = ids(2 * 13, trial);
                let at = 1 + trial as usize % 12;
                let mut changed = tokens.clone();
                (at..13).for_each(|t| changed[t] = (changed[t] + 1 + trial % 7) % VOCAB as u32);
                let (before, after) = (logits(&model, &tokens, 2, &context), logits(&model, &changed, 2, &context));
                assert!(before[..at * VOCAB] == after[..at * VOCAB], "{soft:?} at {at}");
                assert!(before[at * VOCAB..13 * VOCAB] != after[at * VOCAB..13 * VOCAB], "{soft:?} at {at}");
            }
        }
    }
}

#[test]
fn the_other_kinds_do_leak() {
    for soft in leaking(true) {
        let model = model(soft);
        let context = evaluation(Precision::F32);
        let mut tokens = ids(4, 1);
        let before = logits(&model, &tokens, 1, &context);
        tokens[3] = (tokens[3] + 1) % VOCAB as u32;
        assert_ne!(before[..3 * VOCAB], logits(&model, &tokens, 1, &context)[..3 * VOCAB], "{soft:?}");
    }
}

#[test]
fn all_kinds_but_mixture_of_tokens_give_a_sequence_the_same_bits_whatever_it_is_batched_with() {
    for soft in causal() {
        let model = model(soft);
        let context = evaluation(Precision::Bf16);
        let alone = logits(&model, &ids(9, 4), 1, &context);
        let batch: Vec<u32> = [ids(9, 1), ids(9, 4), ids(9, 3)].concat();
        let together = logits(&model, &batch, 3, &context);
        let mixes_sequences = matches!(soft, SoftConfig::MixtureOfTokens { .. });
        assert_eq!(together[9 * VOCAB..18 * VOCAB] != alone[..], mixes_sequences, "{soft:?}");
    }
}

#[test]
fn decoding_with_a_cache_gives_the_bits_of_the_whole_sequence() {
    for soft in causal() {
        let model = model(soft);
        for precision in [Precision::F32, Precision::Bf16] {
            let (tokens, context) = (ids(18, 6), evaluation(precision));
            let whole = logits(&model, &tokens, 1, &context);
            let decode = |range: std::ops::Range<usize>, cache: &mut KvCache| {
                into_vec(model.decode(&tokens[range], cache, &context).unwrap().logits)
            };
            let mut cache = model.cache(18);
            let mut found = Vec::new();
            for part in [0..2, 2..3, 3..9, 9..10, 10..11, 11..12, 12..18] {
                found.extend(decode(part, &mut cache));
            }
            assert!(found == whole, "{soft:?} {precision}");
            // Back into the same block, into an earlier one, and to a boundary; each time with other tokens in between.
            for keep in [17, 15, 9, 8, 3, 0] {
                cache.truncate(keep);
                model.decode(&ids(18 - keep, 50 + keep as u32), &mut cache, &context).unwrap();
                cache.truncate(keep);
                let mut found = Vec::new();
                for t in keep..18 {
                    found.extend(decode(t..t + 1, &mut cache));
                }
                assert!(found == whole[keep * VOCAB..], "{soft:?} {precision} from {keep}");
            }
        }
    }
}

#[test]
fn a_kind_that_sees_the_future_is_refused_with_the_leak_and_the_alternatives() {
    for soft in leaking(false) {
        let error = config(soft).validate().unwrap_err();
        assert_eq!((error.key.as_str(), error.value.as_str()), ("moe.soft.kind", soft.kind()));
        let text = error.to_string();
        for part in
            [soft.leak().unwrap(), "\"block_causal\"", "\"lory\"", "\"mixture_of_tokens\"", "allow_future = true"]
        {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains('\n'), "{text}");
    }
    for soft in leaking(true) {
        config(soft).validate().unwrap();
        let model = model(soft);
        let error = model.decode(&[1, 2], &mut model.cache(4), &evaluation(Precision::F32)).unwrap_err();
        assert!(matches!(error, ForwardError::Future { layer: 0, .. }), "{error}");
    }
}

#[test]
fn soft_layers_are_read_from_a_file_and_what_has_no_effect_is_refused() {
    const MODEL: &str = "vocab = 19\nd_model = 16\nlayers = 2\nheads = 2\ncontext = 8\nd_dense = 8\n[moe]\nexperts = 3\n\
                         d_expert = 12\nshared_experts = 1\nevery = 2\n";
    let parse = |moe: &str, soft: &str| -> Result<ModelConfig, String> {
        let text = format!("{MODEL}{moe}\n[moe.soft]\n{soft}\n");
        let config: ModelConfig = toml::from_str(&text).map_err(|e| e.to_string())?;
        config.validate().map_err(|e| e.to_string())?;
        let again: ModelConfig = toml::from_str(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
        Ok(config)
    };
    let soft = |text: &str| parse("", text).unwrap().moe.unwrap().soft.unwrap();
    assert_eq!(
        soft("kind = \"lory\"\nsegment = 4"),
        SoftConfig::Lory { segment: 4, first_segment: UNIFORM, allow_future: false }
    );
    assert_eq!(
        soft("kind = \"mixture_of_tokens\"\ngroup = 4\ntemperature = 2"),
        SoftConfig::MixtureOfTokens { group: 4, temperature: 2.0, emit: Emit::Merge }
    );
    assert_eq!(soft("kind = \"block_causal\"\nblock = 16"), SoftConfig::BlockCausal { block: 16, slots_per_expert: 1 });
    assert_eq!(soft("kind = \"smear\"\nallow_future = true"), SoftConfig::Smear { allow_future: true });
    let block = "kind = \"block_causal\"\nblock = 16";
    for (moe, soft, part) in [
        ("", "kind = \"smear\"", "moe.soft.kind = smear"),
        ("", "kind = \"soft_moe\"\nmixing = \"identity\"", "moe.soft.kind = soft_moe"),
        ("", "kind = \"lory\"\nfirst_segment = \"own_mean\"", "moe.soft.kind = lory"),
        ("", "kind = \"lori\"", "lori"),
        ("", "kind = \"block_causal\"\nblok = 16", "blok"),
        ("", "kind = \"block_causal\"\nblock = 16\nallow_future = true", "allow_future"),
        ("", "kind = \"block_causal\"\nblock = 0", "moe.soft.block = 0"),
        ("", "kind = \"lory\"\nsegment = 0", "moe.soft.segment = 0"),
        ("", "kind = \"mixture_of_tokens\"\ngroup = 0", "moe.soft.group = 0"),
        ("", "kind = \"mixture_of_tokens\"\ngroup = 2\ntemperature = 0", "moe.soft.temperature = 0"),
        ("top_k = 2", block, "moe.top_k = 2"),
        ("[moe.router]\npolicy = \"switch\"", block, "moe.router"),
        ("[moe.balance]\ncoefficient = 0.5", block, "moe.balance"),
    ] {
        let error = parse(moe, soft).unwrap_err();
        assert!(error.contains(part), "{moe} {soft}: {error}");
    }
    let mut alone = config(SoftConfig::BlockCausal { block: 4, slots_per_expert: 1 });
    let moe = alone.moe.as_mut().unwrap();
    (moe.shared_experts, moe.shared_gate) = (0, false);
    assert_eq!(alone.validate().unwrap_err().key, "moe.shared_experts");
}

#[test]
fn counted_parameters_are_those_the_model_has_and_all_of_them_are_active() {
    for soft in [causal(), leaking(true)].concat() {
        let config = config(soft);
        let infos = Decoder::new(&config, 0, &Device::default()).unwrap().parameter_infos();
        let counts = config.parameter_counts().unwrap();
        assert_eq!(infos.iter().map(|info| info.len()).sum::<usize>(), counts.total, "{soft:?}");
        assert_eq!(counts.active, counts.total);
    }
}

#[test]
fn a_model_saves_loads_and_learns_and_routes_nothing() {
    for soft in [causal(), leaking(true)].concat() {
        let device = Device::default().autodiff();
        let source = Decoder::new(&config(soft), 1, &Device::default()).unwrap();
        let mut model = Decoder::new(&config(soft), 11, &device).unwrap();
        let mut tensors = Vec::new();
        source.for_each_parameter(|info, values| {
            tensors.push((info.name.clone(), info.shape.clone(), values.to_vec().into()));
        });
        let names: Vec<&str> = tensors.iter().map(|(name, ..)| name.as_str()).collect();
        assert!(names.contains(&"layers.1.soft.shared.down"), "{names:?}");
        model.load_named(tensors).unwrap();
        let (tokens, targets) = (ids(32, 1), ids(32, 2));
        let context = ForwardContext::training(5, 3, Numerics::default());
        assert!(logits(&model, &tokens, 4, &context) == logits(&source, &tokens, 4, &context), "{soft:?}");
        let mut losses = Vec::new();
        for _ in 0..30 {
            let out = model.loss(&tokens, &targets, 4, 8, &context).unwrap();
            assert!(out.routing.is_empty() && out.balance == 0.0 && out.z == 0.0);
            let mut counts = SelectionCounts::default();
            counts.add(&out.routing);
            model.update_biases(&counts);
            let value = with_slice(&out.total, |v| v[0]);
            assert_eq!(value, with_slice(&out.ce, |v| v[0]));
            losses.push(value);
            let gradients = model.take_gradients(&mut out.total.backward());
            // Identity mixing learns no slots.
            let fixed = matches!(soft, SoftConfig::SoftMoe { mixing: Mixing::Identity, .. });
            assert!(fixed || gradients.iter().all(Option::is_some), "{soft:?}");
            model.for_each_parameter_mut(|i, _, values| {
                let Some(gradient) = &gradients[i] else { return };
                with_slice(gradient, |g| values.iter_mut().zip(g).for_each(|(w, g)| *w -= 0.3 * g));
            });
        }
        assert!(losses[29] < 0.5 * losses[0], "{soft:?}: {losses:?}");
    }
}

#[test]
fn an_empty_batch_has_no_logits_and_no_loss() {
    for soft in causal() {
        let out = model(soft).loss(&[], &[], 0, 8, &ForwardContext::training(5, 3, Numerics::default())).unwrap();
        assert_eq!(with_slice(&out.total, |v| v[0]), 0.0);
    }
}
