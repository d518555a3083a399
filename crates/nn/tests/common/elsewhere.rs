//! Every kind of layer somewhere else than in f32 on Flex, held against f32 on Flex: output, losses, routing, every gradient, an
//! optimizer's step and the loss after it.
//!
//! Elsewhere the layers run the portable twins of the ops and the host does the routing, so this is where a path that takes Flex for
//! granted shows.

use burn::module::{Module, ModuleMapper, Param};
use burn::optim::{AdamConfig, GradientsParams};
use burn::tensor::{DType, Device, FloatDType, Tensor};
use mixtura_kernels::adamw::{AdamWParams, adamw_step};
use mixtura_nn::{
    Decoder, Emit, ForwardContext, ModelConfig, MoeLayer, MoeLayerConfig, NamedParameters, SoftConfig, SoftLayer,
    SoftLayerConfig,
};
use mixtura_ops::{Isa, Numerics, into_vec, tensor_like, with_slice};
use mixtura_routing::catalogue::explain;
use mixtura_routing::soft::merge::FirstSegment;
use mixtura_routing::soft::soft_moe::Mixing;
use mixtura_routing::{BalanceLoss, Noise};

use crate::common::noise;
use crate::common::routers::routers;

/// Where a model lives, and in which float type.
#[derive(Clone)]
pub struct Place {
    pub device: Device,
    pub dtype: DType,
}

impl Place {
    fn home() -> Self {
        Self { device: Device::flex(), dtype: DType::F32 }
    }

    /// A module made on this device, its parameters in this type.
    fn of<M: Module>(&self, module: M) -> M {
        if self.dtype == DType::F32 { module } else { module.map(&mut Cast(FloatDType::from(self.dtype))) }
    }

    fn tensor<const D: usize>(&self, values: Vec<f32>, shape: [usize; D]) -> Tensor<D> {
        tensor_like(values, shape, &Tensor::<1>::zeros([1], (&self.device.clone().autodiff(), self.dtype)))
    }
}

/// Parameters in another float type, leaves as they were.
struct Cast(FloatDType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, tensor, mapper) = param.consume();
        let (autodiff, learned) = (tensor.is_autodiff(), tensor.is_require_grad());
        let tensor = tensor.inner().cast(self.0);
        let tensor = if autodiff { tensor.autodiff().set_require_grad(learned) } else { tensor };
        Param::from_mapped_value(id, tensor, mapper)
    }
}

/// Named numbers that must agree.
type Found = Vec<(String, Vec<f32>)>;

fn assert_close(what: &str, found: &Found, expected: &Found) {
    let names = |of: &Found| of.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(found), names(expected), "{what}");
    for ((name, found), (_, expected)) in found.iter().zip(expected) {
        assert_eq!(found.len(), expected.len(), "{what}: {name}");
        let largest = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        for (at, (x, y)) in found.iter().zip(expected).enumerate() {
            // Sums of a few hundred products in f32, in another order.
            assert!(
                (x - y).abs() <= 1e-4 * largest + 2e-6,
                "{what}: {name}[{at}] is {x}, on Flex {y} (largest {largest})"
            );
        }
    }
}

fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    with_slice(tensor, |values| values.to_vec())
}

/// The gradients by parameter; a parameter without one has an empty list.
fn gradients_of<M: NamedParameters>(model: &M, graph: &mut burn::tensor::Gradients) -> Found {
    let gradients = model.take_gradients(graph).into_iter().map(|gradient| gradient.map_or_else(Vec::new, into_vec));
    let names = model.parameter_infos().into_iter().map(|info| format!("gradient of {}", info.name));
    names.zip(gradients).collect()
}

/// One step of AdamW, in place on the host as `mixtura train` makes it. A large epsilon, since the sign of a gradient that is zero but
/// for rounding means nothing.
fn optimize<M: NamedParameters>(model: &mut M, gradients: &Found) {
    let hyper = AdamWParams::at_step(0.01, 0.9, 0.95, 1e-2, 0.1, 1, 1.0);
    model.for_each_parameter_mut(|i, _, values| {
        let gradient = &gradients[i].1;
        if !gradient.is_empty() {
            let (mut m, mut v) = (vec![0.0; values.len()], vec![0.0; values.len()]);
            adamw_step(Isa::current(), &hyper, values, gradient, &mut m, &mut v);
        }
    });
}

fn parameters<M: NamedParameters>(model: &M) -> Found {
    let mut found = Vec::new();
    model.for_each_parameter(|info, values| found.push((format!("{} after a step", info.name), values.to_vec())));
    found
}

/// A gate that starts at zero is all ties, where the last bit decides.
fn move_gates<M: NamedParameters>(model: &mut M) {
    let mut index = 0;
    model.for_each_parameter_mut(|_, info, values| {
        index += 1;
        if info.name.ends_with("router.thresholds") {
            values.fill(0.2);
        } else if info.name.contains("router") && !info.name.ends_with("table") && values.iter().all(|v| *v == 0.0) {
            values.iter_mut().zip(noise(info.len(), 50 + index)).for_each(|(w, n)| *w = 0.3 * n);
        }
    });
}

const TOKENS: usize = 12;
const D: usize = 8;

fn sparse_layer(config: &MoeLayerConfig, place: &Place) -> Found {
    let mut layer = place.of(MoeLayer::new(config, 3, &place.device.clone().autodiff()).unwrap());
    move_gates(&mut layer);
    let ids = (0..TOKENS as u32).map(|i| i * 7 % 5).collect();
    let context = ForwardContext { ids: Some(ids), ..ForwardContext::training(1, 2, Numerics::default()) };
    let pass = |layer: &MoeLayer| {
        let x_td = place.tensor(noise(TOKENS * D, 4), [TOKENS, D]).require_grad();
        let out = layer.forward(x_td.clone(), &context).unwrap();
        assert_eq!((out.y_td.dtype(), out.y_td.device()), (place.dtype, place.device.clone()));
        let loss = (out.y_td.clone() * place.tensor(noise(TOKENS * D, 9), [TOKENS, D])).sum();
        (x_td, loss + out.routing.losses.total.clone(), out)
    };
    let (x_td, loss, out) = pass(&layer);
    let assignment = out.routing.assignment();
    let rows = |rows: &[u32]| rows.iter().map(|row| *row as f32).collect();
    let mut found = vec![
        ("rows of experts".into(), rows(&assignment.row_offsets)),
        ("tokens of rows".into(), rows(&assignment.token_of_row)),
        ("y".into(), values(&out.y_td)),
        ("logits".into(), values(&out.routing.logits_te)),
        ("weights".into(), values(&out.routing.weight_n)),
        ("loss".into(), values(&loss)),
    ];
    let mut graph = loss.backward();
    found.push(("gradient of x".into(), into_vec(x_td.grad(&graph).unwrap())));
    let gradients = gradients_of(&layer, &mut graph);
    optimize(&mut layer, &gradients);
    found.extend(gradients);
    found.extend(parameters(&layer));
    found.push(("loss after a step".into(), values(&pass(&layer).1)));
    found
}

/// Every router in a layer.
pub fn check_routers(place: &Place) {
    let mut policies: Vec<_> =
        explain::all().into_iter().filter_map(|entry| Some(entry.recipe.router?.policy)).collect();
    for (name, top_k, router) in routers() {
        policies.retain(|policy| std::mem::discriminant(policy) != std::mem::discriminant(&router.policy));
        let mut config =
            MoeLayerConfig { router, init_std: 0.5, out_init_std: 0.5, ..MoeLayerConfig::new(D, 4, top_k, 6) };
        (config.balance.coefficient, config.balance.z_loss) = (0.2, 0.05);
        if matches!(config.router.noise, Noise::Softplus { .. }) {
            config.balance.loss = BalanceLoss::ImportanceLoad;
        }
        assert_close(name, &sparse_layer(&config, place), &sparse_layer(&config, &Place::home()));
    }
    assert!(policies.is_empty(), "no layer was tried with {policies:?}");
}

/// The module in a model of somebody else's, trained by Burn's own optimizer.
pub fn check_burns_optimizer(place: &Place) {
    let train = |place: &Place| {
        let config =
            MoeLayerConfig { d_shared: 4, shared_gate: true, init_std: 0.5, ..MoeLayerConfig::new(D, 4, 2, 6) };
        let mut layer = place.of(MoeLayer::new(&config, 3, &place.device.clone().autodiff()).unwrap());
        let mut optimizer = AdamConfig::new().with_epsilon(1e-2).init();
        let mut losses = Vec::new();
        for step in 0..3 {
            let x_td = place.tensor(noise(TOKENS * D, 4), [TOKENS, D]);
            let context = ForwardContext::training(7, step, Numerics::default());
            let out = layer.forward(x_td.clone(), &context).unwrap();
            let loss = (out.y_td - x_td.sin()).square().mean() + out.routing.losses.total.clone();
            losses.extend(values(&loss));
            let gradients = GradientsParams::from_grads(loss.backward(), &layer);
            layer = optimizer.step(0.01, layer, gradients);
        }
        assert!(losses[2] < losses[0], "{losses:?}");
        [parameters(&layer), vec![("losses".into(), losses)]].concat()
    };
    assert_close("Burn's Adam", &train(place), &train(&Place::home()));
}

/// Every soft layer, sequences and lengths that divide nothing evenly.
pub fn check_soft_layers(place: &Place) {
    let soft_moe = |mixing| SoftConfig::SoftMoe { slots_per_expert: 2, mixing, allow_future: true };
    let lory = |first_segment| SoftConfig::Lory { segment: 3, first_segment, allow_future: true };
    for soft in [
        soft_moe(Mixing::Soft),
        soft_moe(Mixing::Uniform),
        soft_moe(Mixing::UniformDispatch),
        soft_moe(Mixing::UniformCombine),
        soft_moe(Mixing::Identity),
        SoftConfig::Smear { allow_future: true },
        lory(FirstSegment::Uniform),
        lory(FirstSegment::OwnMean),
        SoftConfig::MixtureOfTokens { group: 2, temperature: 0.5, emit: Emit::Merge },
        SoftConfig::MixtureOfTokens { group: 2, temperature: 1.0, emit: Emit::Experts },
        SoftConfig::BlockCausal { block: 3, slots_per_expert: 2 },
    ] {
        let run = |place: &Place| {
            let config = SoftLayerConfig {
                d_shared: 4,
                shared_gate: true,
                init_std: 0.5,
                ..SoftLayerConfig::new(D, 3, 5, soft)
            };
            let mut layer = place.of(SoftLayer::new(&config, 3, &place.device.clone().autodiff()).unwrap());
            let pass = |layer: &SoftLayer| {
                let x_td = place.tensor(noise(3 * 8 * D, 4), [3 * 8, D]).require_grad();
                let y_td = layer.forward(x_td.clone(), 3, 8, Numerics::default());
                assert_eq!((y_td.dtype(), y_td.device()), (place.dtype, place.device.clone()));
                (x_td, (y_td.clone() * place.tensor(noise(3 * 8 * D, 9), [3 * 8, D])).sum(), y_td)
            };
            let (x_td, loss, y_td) = pass(&layer);
            let mut found = vec![("y".into(), values(&y_td)), ("loss".into(), values(&loss))];
            let mut graph = Tensor::<1>::backward(&loss);
            found.push(("gradient of x".into(), into_vec(x_td.grad(&graph).unwrap())));
            let gradients = gradients_of(&layer, &mut graph);
            optimize(&mut layer, &gradients);
            found.extend(gradients);
            found.extend(parameters(&layer));
            found.push(("loss after a step".into(), values(&pass(&layer).1)));
            found
        };
        assert_close(&format!("{soft:?}"), &run(place), &run(&Place::home()));
    }
}

/// `[model.moe]` tables of every layer that is more than a router and equal experts, and model keys beside them.
const MODELS: &[(&str, &str, &str)] = &[
    ("plain", "", "experts = 4\ntop_k = 2\nd_expert = 12"),
    ("tied, full qk-norm", "tied = true\nqk_norm = \"full\"", "experts = 4\ntop_k = 2\nd_expert = 12"),
    (
        "grouped heads, qk-norm per head",
        "kv_heads = 1\nqk_norm = \"per_head\"",
        "experts = 4\ntop_k = 2\nd_expert = 12",
    ),
    ("shared experts", "", "experts = 4\ntop_k = 2\nd_expert = 12\nshared_experts = 1\nshared_gate = true"),
    ("loss-free balancing", "", "experts = 4\ntop_k = 2\nd_expert = 12\n[moe.balance]\nbias_update = 0.01"),
    (
        "two levels",
        "",
        "experts = 6\ntop_k = 4\nd_expert = 12\n[moe.router]\npolicy = { hierarchical = { groups = 3, keep = 2 } }\nactivation = \"softmax_selected\"",
    ),
    (
        "experts without a network",
        "",
        "experts = 4\ntop_k = 2\nd_expert = 12\nrouter = { normalize = false }\n[moe.zero_computation]\ngamma = 0.9",
    ),
    (
        "copies only",
        "",
        "experts = 4\ntop_k = 2\nd_expert = 12\nrouter = { normalize = false }\n[moe.zero_computation]\nconstant = 0\ncopy = 2\ngating_residual = false",
    ),
    (
        "pyramid",
        "d_dense = 8",
        "experts = 4\ntop_k = 2\nd_expert = 12\nlayers = [4, 0, 6]\nrouter = { normalize = false }\n[moe.zero_computation]\nbeta = 0.1",
    ),
    (
        "widths",
        "",
        "experts = 5\ntop_k = 2\nd_expert_each = [6, 10, 6, 14, 10]\n[moe.balance]\nloss = \"parameter_penalty\"\ncoefficient = 0.1\nentropy = 0.03",
    ),
    (
        "residual",
        "",
        "experts = 4\ntop_k = 1\nd_expert = 12\nresidual = \"coefficient\"\n[moe.router]\npolicy = \"switch\"\nnormalize = false",
    ),
    (
        "hash table",
        "",
        "experts = 4\ntop_k = 2\nd_expert = 12\nrouter = { policy = \"hash\", hash_table = \"random\" }",
    ),
    (
        "soft",
        "",
        "experts = 3\nd_expert = 6\nshared_experts = 1\n[moe.soft]\nkind = \"block_causal\"\nblock = 2\nslots_per_expert = 2",
    ),
    ("lory", "", "experts = 3\nd_expert = 6\n[moe.soft]\nkind = \"lory\"\nsegment = 3"),
];

const VOCAB: usize = 19;

fn model_config(keys: &str, moe: &str) -> ModelConfig {
    let text = format!(
        "vocab = {VOCAB}\nd_model = 16\nlayers = 3\nheads = 2\ncontext = 24\ninit_std = 0.3\n{keys}\n[moe]\n{moe}\n"
    );
    let config: ModelConfig = toml::from_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    config.validate().unwrap_or_else(|error| panic!("{error}\n{text}"));
    config
}

/// Whole decoders: loss, gradients, a step of AdamW, the loss after it, and the same with recomputed activations.
pub fn check_decoders(place: &Place) {
    for &(name, keys, moe) in MODELS {
        let config = model_config(keys, moe);
        for recompute_activations in [false, true] {
            let run = |place: &Place| whole_step(&config, recompute_activations, place);
            assert_close(&format!("{name}, {recompute_activations}"), &run(place), &run(&Place::home()));
        }
    }
}

fn whole_step(config: &ModelConfig, recompute_activations: bool, place: &Place) -> Found {
    let mut model = place.of(Decoder::new(config, 11, &place.device.clone().autodiff()).unwrap());
    move_gates(&mut model);
    let ids: Vec<u32> = (0..16).map(|i| (i * i + 3 * i + 1) % VOCAB as u32).collect();
    let mut targets: Vec<u32> = ids[1..].to_vec();
    targets.push(mixtura_ops::IGNORED);
    let context = ForwardContext { recompute_activations, ..ForwardContext::training(5, 3, Numerics::default()) };
    let pass = |model: &Decoder| model.loss(&ids, &targets, 2, 8, &context).unwrap();
    let out = pass(&model);
    let mut found = vec![("loss".into(), values(&out.total)), ("cross-entropy".into(), values(&out.ce))];
    let choices = |layer: &mixtura_nn::LayerRouting| layer.assignment().token_of_row.clone();
    found.push(("choices".into(), out.routing.iter().flat_map(choices).map(|token| token as f32).collect()));
    let gradients = gradients_of(&model, &mut out.total.backward());
    optimize(&mut model, &gradients);
    found.extend(gradients);
    found.extend(parameters(&model));
    found.push(("loss after a step".into(), values(&pass(&model).total)));
    found
}

/// The model after a save and a load, evaluated and decoding token by token.
pub fn check_decoding(place: &Place) {
    for &(name, keys, moe) in MODELS {
        let config = model_config(keys, moe);
        let run = |place: &Place| {
            let mut model = Decoder::new(&config, 11, &place.device).unwrap();
            move_gates(&mut model);
            let mut saved = Vec::new();
            model.for_each_parameter(|info, values| {
                saved.push((info.name.clone(), info.shape.clone(), std::borrow::Cow::Owned(values.to_vec())));
            });
            let mut loaded = Decoder::new(&config, 12, &place.device).unwrap();
            loaded.load_named(saved).unwrap();
            let loaded = place.of(loaded);
            let ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3];
            let context = ForwardContext::evaluation(Numerics::default());
            let whole = values(&loaded.logits(&ids, 1, ids.len(), &context).unwrap().0);
            let mut cache = loaded.cache(ids.len());
            let mut decoded = values(&loaded.decode(&ids[..4], &mut cache, &context).unwrap().logits);
            for id in &ids[4..] {
                decoded.extend(values(&loaded.decode(&[*id], &mut cache, &context).unwrap().logits));
            }
            vec![("logits".to_string(), whole), ("decoded".to_string(), decoded)]
        };
        assert_close(name, &run(place), &run(&Place::home()));
    }
}
