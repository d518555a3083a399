//! Hugging Face checkpoints give Hugging Face's logits, and what we write is read back bit for bit.
//!
//! The fixtures were made by `fixtures/hf/make.py` with transformers; nothing here needs Python or a network.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use mixtura_checkpoint::*;
use mixtura_nn::{Decoder, ForwardContext, ModelConfig, MoeConfig, MoeLayers, NamedParameters, QkNorm};
use mixtura_ops::{Numerics, Precision};
use mixtura_routing::{Noise, Normalize, Policy, RouterConfig};

/// Directory and family.
const FIXTURES: [(&str, &str); 6] = [
    ("olmoe", "olmoe"),
    ("olmoe-clip", "olmoe"),
    ("mixtral", "mixtral"),
    ("mixtral-fused", "mixtral"),
    ("mixtral-tied", "mixtral"),
    ("llama", "llama"),
];

fn family(model_type: &str) -> Family {
    Family::from_model_type(model_type).unwrap()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/hf").join(name)
}

fn load(dir: &Path) -> Result<LoadedModel> {
    load_model(dir, &Device::default())
}

/// A copy of a fixture that a test may damage.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    dir
}

/// Every parameter's name and the bits of its values.
fn bits(decoder: &Decoder) -> Vec<(String, Vec<u32>)> {
    let mut all = Vec::new();
    decoder
        .for_each_parameter(|info, values| all.push((info.name.clone(), values.iter().map(|v| v.to_bits()).collect())));
    all
}

fn logits(decoder: &Decoder, ids: &[u32], batch: usize) -> Vec<f32> {
    let context = ForwardContext::evaluation(Numerics::new(Precision::F32));
    let (logits, _) = decoder.logits(ids, batch, ids.len() / batch, &context).unwrap();
    mixtura_ops::into_vec(logits)
}

/// Largest difference between our logits and those beside the fixture.
fn distance(dir: &Path, decoder: &Decoder) -> f32 {
    let about: serde_json::Value = serde_json::from_slice(&fs::read(dir.join("expected.json")).unwrap()).unwrap();
    let ids: Vec<Vec<u32>> = serde_json::from_value(about["ids"].clone()).unwrap();
    let file = SafetensorsFile::open(&dir.join("expected.safetensors")).unwrap();
    let expected = file.read_f32(file.info("logits").unwrap()).unwrap();
    let found = logits(decoder, &ids.concat(), ids.len());
    assert_eq!(found.len(), expected.len());
    found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn published_layouts_give_the_published_logits() {
    for (name, model_type) in FIXTURES {
        let (family, model) = (family(model_type), load(&fixture(name)).unwrap());
        assert_eq!((model.family, Family::of(&model.config)), (family, family), "{name}");
        let difference = distance(&fixture(name), &model.decoder);
        println!("{name}: largest difference {difference:.2e}");
        assert!(difference < 1e-5, "{name}: {difference}");
    }
}

#[test]
fn what_is_saved_is_read_back_bit_for_bit_in_every_layout() {
    for (name, model_type) in FIXTURES {
        let (family, model) = (family(model_type), load(&fixture(name)).unwrap());
        let dir = tempfile::tempdir().unwrap();
        for (to, shard) in [(family, usize::MAX), (family, 30_000), (Family::Mixtura, usize::MAX)] {
            let target = dir.path().join("model");
            let options = SaveOptions { max_shard_bytes: shard, ..SaveOptions::default() };
            save_model(&target, &model.decoder, to, &options).unwrap();
            let again = load(&target).unwrap();
            assert_eq!((again.family, &again.config), (to, &model.config), "{name}");
            assert!(bits(&again.decoder) == bits(&model.decoder), "{name} as {to}");
        }
    }
}

#[test]
fn every_kind_of_layer_survives_a_checkpoint() {
    use serde_json::json;
    let hash = |table: &str| json!({ "policy": "hash", "hash_table": table });
    let two_level =
        json!({ "policy": { "hierarchical": { "groups": 2, "keep": 2 } }, "activation": "softmax_selected" });
    for (name, mut moe) in [
        ("hash", json!({ "experts": 600, "d_expert": 2, "router": hash("random") })),
        ("balanced", json!({ "experts": 600, "d_expert": 2, "router": hash("balanced") })),
        ("two levels", json!({ "experts": 4, "top_k": 4, "d_expert": 6, "router": two_level })),
        ("no network", json!({ "experts": 4, "d_expert": 6, "zero_computation": { "gamma": 0.0 } })),
        ("widths", json!({ "experts": 3, "d_expert_each": [4, 6, 4] })),
        ("residual", json!({ "experts": 3, "d_expert": 6, "residual": "coefficient" })),
    ] {
        let top_k = moe["top_k"].as_u64().unwrap_or(2);
        moe["top_k"] = json!(top_k);
        let config = json!({ "vocab": 900, "d_model": 8, "layers": 2, "heads": 2, "context": 16, "moe": moe });
        let config: ModelConfig = serde_json::from_value(config).unwrap();
        let mut decoder = Decoder::new(&config, 3, &Device::default()).unwrap();
        decoder.balance_hash_tables(&(0..900).map(|id| f64::from(900 - id)).collect::<Vec<_>>());
        let dir = tempfile::tempdir().unwrap();
        for stored in [StoredType::F32, StoredType::Bf16] {
            let target = dir.path().join(format!("{stored:?}"));
            let options = SaveOptions { stored, ..SaveOptions::default() };
            save_model(&target, &decoder, Family::Mixtura, &options).unwrap();
            let again = load(&target).unwrap();
            assert_eq!(again.config, config, "{name}");
            let exact =
                |(parameter, _): &(String, Vec<u32>)| stored == StoredType::F32 || parameter.ends_with("router.table");
            let kept = |decoder: &Decoder| bits(decoder).into_iter().filter(exact).collect::<Vec<_>>();
            assert!(kept(&again.decoder) == kept(&decoder), "{name} as {stored:?}");
            assert_eq!(
                kept(&decoder).is_empty(),
                stored == StoredType::Bf16 && config.moe.as_ref().unwrap().experts != 600
            );
        }
        let refused = save_model(&dir.path().join("hf"), &decoder, family("mixtral"), &SaveOptions::default());
        assert!(matches!(refused, Err(CheckpointError::NotExpressible { .. })), "{name}");
    }
}

#[test]
fn saving_a_published_checkpoint_gives_its_tensors_byte_for_byte() {
    for (name, stored) in [("olmoe", StoredType::F32), ("mixtral", StoredType::F32), ("mixtral-tied", StoredType::Bf16)]
    {
        let model = load(&fixture(name)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let options = SaveOptions { stored, ..SaveOptions::default() };
        save_model(&dir.path().join("m"), &model.decoder, model.family, &options).unwrap();
        let (theirs, ours) =
            (TensorStore::open(&fixture(name)).unwrap(), TensorStore::open(&dir.path().join("m")).unwrap());
        assert_eq!(theirs.tensors().count(), ours.tensors().count());
        for tensor in theirs.tensors() {
            let (their_file, _) = theirs.find(&tensor.name).unwrap();
            let (our_file, ours) = ours.find(&tensor.name).unwrap_or_else(|| panic!("{} is not written", tensor.name));
            assert_eq!((&ours.shape, ours.dtype), (&tensor.shape, tensor.dtype), "{}", tensor.name);
            assert!(our_file.bytes(ours) == their_file.bytes(tensor), "{}", tensor.name);
        }
    }
}

#[test]
fn both_spellings_of_a_config_mean_the_same() {
    let old = r#"{"model_type": "olmoe", "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 3,
        "norm_topk_prob": false, "max_position_embeddings": 64, "vocab_size": 96, "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0, "rope_scaling": null, "router_aux_loss_coef": 0.01, "torch_dtype": "float32"}"#;
    let new = HfConfig::parse(&fs::read(fixture("olmoe").join("config.json")).unwrap()).unwrap();
    assert_eq!(HfConfig::parse(old.as_bytes()).unwrap(), new);
    let written = new.to_json(StoredType::F32, &TokenIds::default());
    assert_eq!(HfConfig::parse(&written).unwrap(), new);
    let text = String::from_utf8(written).unwrap();
    assert!(
        text.contains("\"rope_theta\": 10000.0")
            && text.contains("\"torch_dtype\"")
            && !text.contains("rope_parameters")
    );
}

/// Replaces one key of the fixture's config and loads.
fn with_key(name: &str, key: &str, value: serde_json::Value) -> CheckpointError {
    let dir = copy(name);
    let path = dir.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config[key] = value;
    fs::write(&path, config.to_string()).unwrap();
    load(dir.path()).expect_err(key)
}

#[test]
fn a_config_that_would_change_the_numbers_is_refused_by_key() {
    for (key, value) in [
        ("hidden_act", "gelu".into()),
        ("attention_bias", true.into()),
        ("quantization_config", serde_json::json!({"quant_method": "fp8"})),
        ("rope_parameters", serde_json::json!({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4})),
        ("rope_scaling", serde_json::json!({"type": "linear", "factor": 2.0})),
        ("sliding_window", 16.into()),
    ] {
        let error = with_key("olmoe", key, value);
        assert!(matches!(&error, CheckpointError::Unsupported { key: k, .. } if k == key), "{key}: {error}");
    }
    // Only OLMoE clamps; elsewhere a reader would pass the key over.
    let error = with_key("mixtral", "clip_qkv", 8.0.into());
    assert!(matches!(&error, CheckpointError::Unsupported { key, .. } if key == "clip_qkv"), "{error}");
    let error = with_key("olmoe", "clip_qkv", (-8.0).into());
    assert!(error.to_string().contains("positive"), "{error}");
    let error = with_key("olmoe", "model_type", "gpt2".into());
    assert!(matches!(&error, CheckpointError::Format { source: FormatError::UnknownFamily { .. }, .. }), "{error}");
    let error = with_key("olmoe", "hidden_size", serde_json::Value::Null);
    assert!(matches!(&error, CheckpointError::Format { source: FormatError::MissingKey { .. }, .. }), "{error}");
    let error = with_key("olmoe", "num_hidden_layers", (1u64 << 40).into());
    assert!(matches!(&error, CheckpointError::Format { source: FormatError::BadValue { .. }, .. }), "{error}");
    let error = with_key("olmoe", "num_experts_per_tok", 9.into());
    assert!(matches!(&error, CheckpointError::Config { .. }), "{error}");
}

#[test]
fn tensors_that_do_not_fit_the_config_are_named() {
    let error = with_key("olmoe", "intermediate_size", 24.into());
    assert!(
        matches!(&error, CheckpointError::ShapeMismatch { tensor, expected, found, .. }
            if tensor == "model.layers.0.mlp.experts.0.gate_proj.weight" && expected == &[24, 32] && found == &[16, 32]),
        "{error}"
    );
    let error = with_key("olmoe", "num_hidden_layers", 3.into());
    assert!(matches!(&error, CheckpointError::MissingTensor { tensor, .. } if tensor.contains("layers.2.")), "{error}");
    let error = with_key("olmoe", "num_hidden_layers", 1.into());
    assert!(matches!(&error, CheckpointError::ExtraTensor { tensor, .. } if tensor.contains("layers.1.")), "{error}");
    let error = with_key("olmoe", "tie_word_embeddings", true.into());
    assert!(matches!(&error, CheckpointError::ExtraTensor { tensor, .. } if tensor == "lm_head.weight"), "{error}");
    assert!(error.to_string().contains("`tie_word_embeddings`: true"), "{error}");
    let error = with_key("mixtral-tied", "tie_word_embeddings", false.into());
    assert!(matches!(&error, CheckpointError::MissingTensor { tensor, .. } if tensor == "lm_head.weight"), "{error}");
    assert!(error.to_string().contains("must say `tie_word_embeddings`: true"), "{error}");
    let error = with_key("llama", "model_type", "mixtral".into());
    assert!(matches!(&error, CheckpointError::Format { .. }), "{error}");
}

/// Copies a fixture's tensors to one file through `change` and loads.
fn with_tensors(name: &str, change: impl Fn(&mut Vec<(String, Vec<usize>, Vec<f32>)>)) -> CheckpointError {
    let dir = copy(name);
    let store = TensorStore::open(dir.path()).unwrap();
    let mut tensors: Vec<_> = store
        .tensors()
        .map(|t| (t.name.clone(), t.shape.clone(), store.find(&t.name).unwrap().0.read_f32(t).unwrap()))
        .collect();
    change(&mut tensors);
    let out = tensors.iter().map(|(name, shape, values)| TensorOut::borrowed(name, shape, values)).collect();
    write_safetensors(&dir.path().join(MODEL_FILE), out, &Default::default()).unwrap();
    load(dir.path()).unwrap_err()
}

#[test]
fn missing_extra_renamed_and_non_finite_tensors_are_named() {
    let gate = "model.layers.1.block_sparse_moe.experts.2.w3.weight";
    let at = |tensors: &[(String, Vec<usize>, Vec<f32>)], name: &str| tensors.iter().position(|t| t.0 == name).unwrap();

    let error = with_tensors("mixtral", |t| drop(t.remove(at(t, gate))));
    assert!(matches!(&error, CheckpointError::MissingTensor { tensor, missing: 1, .. } if tensor == gate), "{error}");

    let error = with_tensors("mixtral", |t| {
        let i = at(t, gate);
        t[i].0 = "model.layers.1.block_sparse_moe.experts.2.w3.weigth".into();
    });
    assert!(
        error.to_string().contains("the nearest name there is `model.layers.1.block_sparse_moe.experts.2.w3.weigth`"),
        "{error}"
    );

    let error =
        with_tensors("mixtral", |t| t.push(("model.layers.0.self_attn.q_proj.bias".into(), vec![48], vec![0.0; 48])));
    assert!(
        matches!(&error, CheckpointError::ExtraTensor { tensor, extra: 1, .. } if tensor.ends_with("q_proj.bias")),
        "{error}"
    );

    let error = with_tensors("mixtral", |t| {
        let i = at(t, gate);
        t[i].2[5] = f32::NAN;
    });
    assert!(matches!(&error, CheckpointError::NonFinite { tensor, index: 5, .. } if tensor == gate), "{error}");

    let error = with_tensors("mixtral", |t| {
        let i = at(t, gate);
        t[i].1.reverse();
    });
    assert!(matches!(&error, CheckpointError::ShapeMismatch { tensor, .. } if tensor == gate), "{error}");
}

#[test]
fn rotary_frequencies_and_a_repeated_embedding_are_no_extra_tensors() {
    let dir = copy("mixtral-tied");
    let store = TensorStore::open(dir.path()).unwrap();
    let read = |name: &str| store.find(name).map(|(file, t)| (t.shape.clone(), file.read_f32(t).unwrap())).unwrap();
    let mut tensors: Vec<_> = store.tensors().map(|t| (t.name.clone(), read(&t.name))).collect();
    tensors.push(("lm_head.weight".into(), read("model.embed_tokens.weight")));
    tensors.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), (vec![4], vec![1.0; 4])));
    let out = tensors.iter().map(|(name, (shape, values))| TensorOut::borrowed(name, shape, values)).collect();
    write_safetensors(&dir.path().join(MODEL_FILE), out, &Default::default()).unwrap();
    let model = load(dir.path()).unwrap();
    assert!(distance(dir.path(), &model.decoder) < 1e-5);
}

fn tiny() -> ModelConfig {
    ModelConfig { vocab: 40, moe: Some(MoeConfig::new(4, 2, 8)), ..ModelConfig::new(16, 2, 2, 32) }
}

fn with_router(router: RouterConfig) -> ModelConfig {
    ModelConfig { moe: Some(MoeConfig { router, ..MoeConfig::new(4, 2, 8) }), ..tiny() }
}

#[test]
fn a_family_is_chosen_only_if_it_computes_the_same() {
    let check = |config: ModelConfig, family| assert_eq!(Family::of(&config), family, "{config:?}");
    let raw = || RouterConfig { normalize: Normalize::Never, ..RouterConfig::default() };
    check(tiny(), family("mixtral"));
    check(ModelConfig { qk_norm: QkNorm::Full, ..tiny() }, family("olmoe"));
    check(ModelConfig { qk_norm: QkNorm::Full, clip_qkv: Some(4.0), ..tiny() }, family("olmoe"));
    check(ModelConfig { clip_qkv: Some(4.0), ..tiny() }, Family::Mixtura);
    check(ModelConfig { qk_norm: QkNorm::Full, ..with_router(raw()) }, family("olmoe"));
    check(ModelConfig { moe: None, d_dense: Some(8), ..tiny() }, family("llama"));
    check(
        with_router(RouterConfig {
            capacity_factor: 1.25,
            noise: Noise::Normal { scale: 1.0 },
            ..RouterConfig::default()
        }),
        family("mixtral"),
    );

    check(with_router(raw()), Family::Mixtura);
    check(ModelConfig { qk_norm: QkNorm::PerHead, ..tiny() }, Family::Mixtura);
    check(with_router(RouterConfig { eval_capacity_factor: 1.0, ..RouterConfig::default() }), Family::Mixtura);
    check(with_router(RouterConfig { weight_scale: 2.5, ..RouterConfig::default() }), Family::Mixtura);
    check(
        with_router(RouterConfig {
            noise: Noise::Softplus { floor: 0.0 },
            policy: Policy::NoisyTopK,
            ..RouterConfig::noisy_top_k()
        }),
        Family::Mixtura,
    );
    let mixed = MoeConfig { layers: MoeLayers::Counts(vec![4, 0]), ..MoeConfig::new(4, 2, 8) };
    check(ModelConfig { moe: Some(mixed), d_dense: Some(8), ..tiny() }, Family::Mixtura);
    let shared = MoeConfig { shared_experts: 1, ..MoeConfig::new(4, 2, 8) };
    check(ModelConfig { moe: Some(shared), ..tiny() }, Family::Mixtura);
}

#[test]
fn a_layout_that_cannot_hold_a_model_refuses_it() {
    let config = ModelConfig { qk_norm: QkNorm::PerHead, ..tiny() };
    let decoder = Decoder::new(&config, 1, &Device::default()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let error = save_model(&dir.path().join("m"), &decoder, family("mixtral"), &SaveOptions::default()).unwrap_err();
    assert!(matches!(&error, CheckpointError::NotExpressible { family, .. } if family == "mixtral"), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn what_only_concerns_training_survives_a_published_layout() {
    let router = RouterConfig { capacity_factor: 1.5, normalize: Normalize::AfterDrop, ..RouterConfig::default() };
    let mut config = with_router(router);
    config.init_std = 0.04;
    let decoder = Decoder::new(&config, 1, &Device::default()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("m");
    save_model(&target, &decoder, family("mixtral"), &SaveOptions::default()).unwrap();
    assert_eq!(load_config(&target).unwrap(), (config, family("mixtral")));
    // Another program resized the vocabulary and left our key alone.
    let path = target.join("config.json");
    let text = fs::read_to_string(&path).unwrap().replace("\"vocab_size\": 40", "\"vocab_size\": 48");
    fs::write(&path, text).unwrap();
    let error = load_config(&target).unwrap_err();
    assert!(
        matches!(&error, CheckpointError::Format { source: FormatError::BadValue { key, .. }, .. } if key == "mixtura (vocab_size)"),
        "{error}"
    );
}

#[test]
fn a_training_checkpoint_loads_as_a_model_and_resumes_only_its_own_architecture() {
    let decoder = Decoder::new(&tiny(), 5, &Device::default()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(dir.path(), Retention::default()).unwrap();
    let ids = TokenIds { eos: vec![3], ..TokenIds::default() };
    let model = model_out(&decoder, Family::of(&tiny()), StoredType::F32, &ids).unwrap();
    let train_state = TrainStateOut::new(&7u64, vec![]);
    let path = store.save(CheckpointContents { step: 7, metric: None, model, train_state, files: vec![] }).unwrap();

    assert!(bits(&load(&path).unwrap().decoder) == bits(&decoder));
    assert_eq!(load(&path).unwrap().ids, ids);
    let mut same = Decoder::new(&tiny(), 6, &Device::default().autodiff()).unwrap();
    load_weights(&path, &mut same).unwrap();
    assert!(bits(&same) == bits(&decoder));

    let wider = ModelConfig { moe: Some(MoeConfig::new(4, 2, 16)), ..tiny() };
    let mut other = Decoder::new(&wider, 6, &Device::default()).unwrap();
    let before = bits(&other);
    let error = load_weights(&path, &mut other).unwrap_err();
    assert!(matches!(&error, CheckpointError::Architecture { .. }), "{error}");
    assert!(bits(&other) == before);

    // One flipped bit in a weight: loading names the tensor and changes nothing.
    let file = path.join(MODEL_FILE);
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last - 1] ^= 1;
    fs::write(&file, bytes).unwrap();
    let before = bits(&same);
    assert!(matches!(load_weights(&path, &mut same).unwrap_err(), CheckpointError::HashMismatch { .. }));
    assert!(bits(&same) == before);
}

#[test]
fn a_missing_directory_and_a_file_in_its_place_say_so() {
    let error = load("does/not/exist".as_ref()).unwrap_err();
    assert!(matches!(&error, CheckpointError::NotFound { reason, .. } if reason.contains("does not exist")), "{error}");
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(load(dir.path()).unwrap_err(), CheckpointError::NotFound { .. }));
    fs::write(dir.path().join("config.json"), b"\x00\xff").unwrap();
    assert!(matches!(load(dir.path()).unwrap_err(), CheckpointError::Format { source: FormatError::Json { .. }, .. }));
}

#[test]
fn a_clamp_that_is_left_out_or_changed_changes_the_logits_and_is_another_architecture() {
    let dir = copy("olmoe-clip");
    let with = load(dir.path()).unwrap();
    assert_eq!(with.config.clip_qkv, Some(0.75));
    let path = dir.path().join("config.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"clip_qkv\": 0.75", "\"clip_qkv\": null")).unwrap();
    let without = load(dir.path()).unwrap();
    assert!(distance(dir.path(), &without.decoder) > 1e-2, "the fixture's clamp must bind");
    let mut decoder = Decoder::new(&with.config, 1, &Device::default()).unwrap();
    let error = load_weights(dir.path(), &mut decoder).unwrap_err();
    assert!(error.to_string().contains("clip_qkv"), "{error}");
}

#[test]
fn json_with_a_byte_order_mark_is_read_and_what_is_no_json_is_named() {
    let dir = copy("llama");
    let path = dir.path().join("config.json");
    let text = fs::read(&path).unwrap();
    fs::write(&path, [b"\xef\xbb\xbf", text.as_slice()].concat()).unwrap();
    assert_eq!(load(dir.path()).unwrap().config, load(&fixture("llama")).unwrap().config);
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n".as_slice();
    let utf16: Vec<u8> = "\u{feff}{}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (bytes, word) in [(pointer, "git lfs pull"), (&utf16, "UTF-16"), (b"<!doctype html>", "web page")] {
        fs::write(&path, bytes).unwrap();
        let error = load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains(word), "{error}");
    }
    fs::write(&path, &text).unwrap();
    for (bytes, word) in
        [(pointer, "git lfs pull"), (b"GGUF\x03\0\0\0\0\0\0\0", "llama.cpp"), (b"PK\x03\x04\0\0\0\0\0", "PyTorch")]
    {
        fs::write(dir.path().join(MODEL_FILE), bytes).unwrap();
        let error = load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("model.safetensors") && error.contains(word) && !error.contains("announces"), "{error}");
    }
}

#[test]
fn shards_may_be_named_from_here_and_a_tensor_in_two_of_them_is_named_with_both() {
    let dir = copy("mixtral");
    let path = dir.path().join(INDEX_FILE);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"model-", "\"./model-")).unwrap();
    assert!(distance(dir.path(), &load(dir.path()).unwrap().decoder) < 1e-5);
    for prefix in ["../", "/", "sub/", ".//", "./../"] {
        fs::write(&path, text.replace("\"model-", &format!("\"{prefix}model-"))).unwrap();
        let error = load(dir.path()).unwrap_err();
        assert!(
            matches!(&error, CheckpointError::Format { source: FormatError::UnsafePath { .. }, .. }),
            "{prefix}: {error}"
        );
    }
    fs::write(&path, &text).unwrap();
    // The first shard once more, under the name of the last.
    let last = dir.path().join("model-00004-of-00004.safetensors");
    fs::copy(dir.path().join("model-00001-of-00004.safetensors"), last).unwrap();
    let error = load(dir.path()).unwrap_err();
    assert!(matches!(&error, CheckpointError::InTwoShards { .. }), "{error}");
    let error = error.to_string();
    assert!(
        error.contains("model-00001-of") && error.contains("model-00004-of") && error.contains("tensor `"),
        "{error}"
    );
}
