//! Every parameter has a role, and weight decay of every parameter is what it was when the name decided it.

use std::path::Path;

use burn::tensor::Device;
use mixtura_nn::{
    Decoder, Emit, ModelConfig, MoeLayer, MoeLayerConfig, NamedParameters, ParameterInfo, Residual, Role, SoftConfig,
    SoftLayer, SoftLayerConfig, SoftMoeConfig, SoftMoeLayer, mixtral_8x7b, olmoe_1b_7b,
};
use mixtura_routing::soft::merge::FirstSegment;
use mixtura_routing::soft::soft_moe::Mixing;
use mixtura_routing::zero_cost::ZeroComputation;
use mixtura_routing::{HashTable, Policy, RouterConfig, Scorer};

/// The rule by names, as it was.
fn decayed_by_name(name: &str) -> bool {
    !name.split('.').any(|part| part.ends_with("norm") || part == "router" || part == "shared_gate")
}

/// What the names of this repository say.
fn role_by_name(name: &str) -> Role {
    let parts: Vec<&str> = name.split('.').collect();
    let has = |part: &str| parts.contains(&part);
    match parts[parts.len() - 1] {
        "table" => Role::Table,
        "shared_gate" => Role::Gate,
        "phi" | "scale" => Role::Mixture,
        _ if has("residual") => Role::Mixture,
        _ if has("router") => Role::Router,
        _ if parts.iter().any(|part| part.ends_with("norm")) => Role::Norm,
        _ if has("attention") => Role::Attention,
        _ if has("embed") || has("head") => Role::Embedding,
        _ if has("shared") || has("mlp") => Role::Dense,
        _ => Role::Expert,
    }
}

fn check(infos: &[ParameterInfo]) {
    assert!(!infos.is_empty());
    for info in infos {
        assert_eq!(info.decays(), decayed_by_name(&info.name), "{}", info.name);
        assert_eq!(info.role, role_by_name(&info.name), "{}", info.name);
    }
}

/// A layer alone, and after everything that Burn and this crate do with a module.
fn check_layer<L: NamedParameters>(mut layer: L) {
    let infos = layer.parameter_infos();
    check(&infos);
    assert_eq!(layer.clone().train().valid().parameter_infos(), infos);
    let mut seen = Vec::new();
    layer.for_each_parameter_mut(|_, info, values| {
        values.iter_mut().for_each(|value| *value += 1.0);
        seen.push(info.clone());
    });
    assert_eq!(seen, infos);
    let mut tensors = Vec::new();
    layer.for_each_parameter(|info, values| {
        tensors.push((info.name.clone(), info.shape.clone(), std::borrow::Cow::Owned(values.to_vec())));
    });
    layer.load_named(tensors).unwrap();
    assert_eq!(layer.parameter_infos(), infos);
}

fn soft_kinds() -> Vec<SoftConfig> {
    let lory = SoftConfig::Lory { segment: 4, first_segment: FirstSegment::Uniform, allow_future: false };
    vec![
        SoftConfig::SoftMoe { slots_per_expert: 1, mixing: Mixing::Soft, allow_future: true },
        SoftConfig::Smear { allow_future: true },
        lory,
        SoftConfig::MixtureOfTokens { group: 2, temperature: 1.0, emit: Emit::Merge },
        SoftConfig::BlockCausal { block: 4, slots_per_expert: 1 },
    ]
}

#[test]
fn every_shipped_configuration_decays_what_it_did() {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let mut pending = vec![configs];
    let mut models = vec![("olmoe".to_string(), olmoe_1b_7b()), ("mixtral".to_string(), mixtral_8x7b())];
    while let Some(dir) = pending.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "toml") {
                let file: toml::Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
                let Some(model) = file.get("model") else { continue };
                let model: ModelConfig = model.clone().try_into().unwrap();
                // Left for the tokenizer.
                models.push((path.display().to_string(), ModelConfig { vocab: model.vocab.max(16), ..model }));
            }
        }
    }
    assert!(models.len() > 5, "{models:?}");
    for (name, config) in models {
        println!("{name}");
        check(&Decoder::new(&config, 7, &Device::default()).unwrap().parameter_infos());
    }
}

#[test]
fn every_policy_and_scorer_does_in_a_layer_alone() {
    let (groups, keep) = (2, 1);
    let policies = [
        (Policy::TopK, 2),
        (Policy::Switch, 1),
        (Policy::NoisyTopK, 2),
        (Policy::GroupLimited { groups, keep }, 2),
        (Policy::Hierarchical { groups, keep: 2 }, 4),
        (Policy::Relu, 2),
        (Policy::ExpertChoice, 2),
        (Policy::Batchwise, 2),
        (Policy::Hash, 1),
        (Policy::Base, 1),
        (Policy::Sinkhorn, 1),
    ];
    let layer = |top_k, router| {
        let config = MoeLayerConfig { router, vocab: 16, ..MoeLayerConfig::new(8, 4, top_k, 12) };
        check_layer(MoeLayer::new(&config, 7, &Device::default()).unwrap());
    };
    for (policy, top_k) in policies {
        layer(top_k, RouterConfig::of(policy, top_k));
    }
    for scorer in [Scorer::Linear, Scorer::Cosine, Scorer::Mlp, Scorer::Fuzzy] {
        layer(2, RouterConfig { scorer, ..RouterConfig::of(Policy::TopK, 2) });
    }
    for hash_table in [HashTable::Random, HashTable::Balanced] {
        layer(1, RouterConfig { hash_table, ..RouterConfig::of(Policy::Hash, 1) });
    }
}

#[test]
fn every_part_of_a_layer_does() {
    let plain = || MoeLayerConfig { d_shared: 8, ..MoeLayerConfig::new(8, 4, 2, 12) };
    let layer = |config: MoeLayerConfig| check_layer(MoeLayer::new(&config, 7, &Device::default()).unwrap());
    layer(MoeLayerConfig { shared_gate: true, ..plain() });
    layer(MoeLayerConfig { residual: Some(Residual::Coefficient), ..plain() });
    layer(MoeLayerConfig { d_expert_each: vec![12, 8, 12, 4], ..plain() });
    let zero = ZeroComputation { constant: 1, copy: 1, zero: 1, ..ZeroComputation::default() };
    layer(MoeLayerConfig { zero_computation: Some(zero), previous_logits: 7, ..plain() });
    let mut biased = plain();
    biased.balance.bias_update = 0.001;
    layer(biased);
    for soft in soft_kinds() {
        let config = SoftLayerConfig { d_shared: 8, shared_gate: true, ..SoftLayerConfig::new(8, 4, 12, soft) };
        check_layer(SoftLayer::new(&config, 7, &Device::default()).unwrap());
    }
    check_layer(SoftMoeLayer::new(&SoftMoeConfig::new(8, 4, 12), 7, &Device::default()).unwrap());
}

#[test]
fn a_part_of_another_model_brings_its_roles() {
    let config = |moe: bool| ModelConfig {
        vocab: 16,
        moe: moe.then(|| mixtura_nn::MoeConfig::new(4, 2, 12)),
        ..ModelConfig::new(8, 2, 2, 8)
    };
    let model = |moe| Decoder::new(&config(moe), 7, &Device::default()).unwrap();
    let (mut dense, sparse) = (model(false), model(true));
    dense.layers[1].ffn = sparse.layers[0].ffn.clone();
    dense.layers.push(sparse.layers[1].clone());
    check(&dense.parameter_infos());
    dense.layers.remove(0);
    check(&dense.parameter_infos());
    let mut sparse = sparse;
    sparse.layers[0].ffn = model(false).layers.remove(0).ffn;
    check(&sparse.parameter_infos());
    check_layer(sparse);
}
