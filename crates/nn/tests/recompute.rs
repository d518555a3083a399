//! Recomputing activations on and off: the same routing, losses and gradients, bit for bit.

use burn::tensor::Device;
use mixtura_nn::{
    Decoder, Emit, ForwardContext, LayerRouting, ModelConfig, MoeConfig, MoeLayers, NamedParameters, QkNorm,
    SelectionCounts, SoftConfig,
};
use mixtura_ops::{Numerics, Precision, into_vec, with_slice};
use mixtura_routing::soft::merge::FirstSegment;
use mixtura_routing::{BalanceLoss, DropOrder, Noise, Policy, RouterConfig, SecondChoice};

const VOCAB: usize = 19;

fn config(change: impl FnOnce(&mut MoeConfig)) -> ModelConfig {
    let mut moe = MoeConfig {
        layers: MoeLayers::Counts(vec![6, 0, 4]),
        shared_experts: 1,
        shared_gate: true,
        ..MoeConfig::new(6, 2, 12)
    };
    (moe.balance.coefficient, moe.balance.z_loss) = (0.5, 0.1);
    change(&mut moe);
    ModelConfig {
        vocab: VOCAB,
        kv_heads: Some(2),
        qk_norm: QkNorm::PerHead,
        d_dense: Some(20),
        init_std: 0.3,
        moe: Some(moe),
        ..ModelConfig::new(16, 3, 4, 32)
    }
}

fn soft(soft: SoftConfig) -> ModelConfig {
    let moe = MoeConfig { shared_experts: 1, ..MoeConfig::soft(3, 12, soft) };
    ModelConfig { moe: Some(moe), ..config(|_| {}) }
}

/// Routers that draw noise, drop by capacity, draw drops, and count balance in their own ways; and every soft kind.
fn configs() -> Vec<(&'static str, ModelConfig)> {
    let tight = |router: RouterConfig| RouterConfig { capacity_factor: 0.7, capacity_min: 1, ..router };
    vec![
        ("top-k", config(|_| {})),
        (
            "noisy top-k, tight capacity",
            config(|moe| {
                moe.router = tight(RouterConfig::noisy_top_k());
                moe.balance.loss = BalanceLoss::ImportanceLoad;
            }),
        ),
        (
            "normal noise, random drops",
            config(|moe| {
                let noise = Noise::Normal { scale: 3.0 };
                moe.router = tight(RouterConfig { noise, drop_order: DropOrder::Random, ..RouterConfig::default() });
            }),
        ),
        (
            "jitter, random second expert",
            config(|moe| {
                let policy = Policy::Gshard { second: SecondChoice::Paper };
                moe.router =
                    tight(RouterConfig { noise: Noise::Jitter { eps: 0.3 }, policy, ..RouterConfig::default() });
            }),
        ),
        ("loss-free bias", config(|moe| moe.balance.bias_update = 0.5)),
        ("block-causal", soft(SoftConfig::BlockCausal { block: 3, slots_per_expert: 2 })),
        ("lory", soft(SoftConfig::Lory { segment: 3, first_segment: FirstSegment::Uniform, allow_future: false })),
        ("mixture of tokens", soft(SoftConfig::MixtureOfTokens { group: 2, temperature: 1.0, emit: Emit::Merge })),
        ("dense", ModelConfig { moe: None, tied: true, ..config(|_| {}) }),
    ]
}

fn ids(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * 97_003) >> 7) % VOCAB as u32).collect()
}

/// What one training pass gives, as bits.
#[derive(PartialEq)]
struct Step {
    loss: u32,
    routing: Vec<(Vec<u32>, Vec<u32>, Vec<u32>)>,
    counts: SelectionCounts,
    gradients: Vec<Option<Vec<u32>>>,
}

fn bits(values: &[f32]) -> Vec<u32> {
    // Adding zero makes the two zeros one.
    values.iter().map(|v| (v + 0.0).to_bits()).collect()
}

fn step(model: &Decoder, context: &ForwardContext) -> Step {
    let out = model.loss(&ids(24, 1), &ids(24, 2), 3, 8, context).unwrap();
    let mut counts = SelectionCounts::default();
    counts.add(&out.routing);
    let layer = |l: &LayerRouting| {
        let assignment = l.assignment();
        (assignment.token_of_row.clone(), assignment.row_offsets.clone(), bits(&l.routed.weight_n))
    };
    let routing = out.routing.iter().map(layer).collect();
    let loss = with_slice(&out.total, |v| v[0].to_bits());
    // Half the loss, as a micro-batch that is one of two: the auxiliary losses' slopes must come through too.
    let gradients = model.take_gradients(&mut out.total.mul_scalar(0.5).backward());
    let gradients = gradients.into_iter().map(|gradient| gradient.map(|g| bits(&into_vec(g)))).collect();
    Step { loss, routing, counts, gradients }
}

#[test]
fn recomputing_changes_no_bit_of_losses_routing_or_gradients() {
    for (name, config) in configs() {
        let model = Decoder::new(&config, 11, &Device::default().autodiff()).unwrap();
        for precision in [Precision::F32, Precision::Bf16] {
            let off = ForwardContext::training(5, 3, Numerics::new(precision));
            let on = ForwardContext { recompute_activations: true, ..off.clone() };
            let (off, on) = (step(&model, &off), step(&model, &on));
            assert!(off.loss == on.loss, "{name} {precision}: loss");
            assert!(off.routing == on.routing && off.counts == on.counts, "{name} {precision}: routing");
            for (info, (off, on)) in model.parameter_infos().iter().zip(off.gradients.iter().zip(&on.gradients)) {
                assert!(off == on, "{name} {precision}: gradient of {}", info.name);
                let constant = info.name.ends_with("router.bias");
                assert_eq!(off.is_some(), !constant, "{name}: {}", info.name);
            }
        }
    }
}

#[test]
fn the_second_pass_takes_the_first_ones_decision_and_does_not_decide_again() {
    // A kept decision that no router would make: it must be obeyed as it is.
    let (_, config) = configs().remove(0);
    let model = Decoder::new(&config, 11, &Device::default()).unwrap();
    let context = ForwardContext::training(5, 3, Numerics::default());
    let routed = |seed| model.logits(&ids(24, seed), 3, 8, &context).unwrap().1;
    let (own, other) = (routed(1), routed(7));
    assert_ne!(own[0].routed.choices, other[0].routed.choices);
    let mixtura_nn::Feedforward::Moe(moe) = &model.layers[0].ffn else { panic!("layer 0 has experts") };
    let x_td = burn::tensor::Tensor::ones([24, 16], &Device::default());
    let kept = ForwardContext { kept: Some(other[0].routed.clone()), ..context.clone() };
    let out = moe.forward(x_td.clone(), &kept).unwrap();
    assert_eq!(out.routing.routed, other[0].routed);
    assert_eq!(with_slice(&out.routing.weight_n, |w| w.to_vec()), other[0].routed.weight_n);
    assert_ne!(moe.forward(x_td, &context).unwrap().routing.routed.choices, other[0].routed.choices);
}

#[test]
fn parameters_are_still_updated_in_place_and_the_loss_falls() {
    let (_, config) = configs().remove(1);
    let mut model = Decoder::new(&config, 11, &Device::default().autodiff()).unwrap();
    let (tokens, targets) = (ids(32, 1), ids(32, 2));
    let (mut losses, mut addresses) = (Vec::new(), Vec::new());
    for step in 0..30 {
        let context = ForwardContext::training(5, step, Numerics::default());
        let context = ForwardContext { recompute_activations: true, ..context };
        let out = model.loss(&tokens, &targets, 4, 8, &context).unwrap();
        losses.push(with_slice(&out.ce, |v| v[0]));
        let gradients = model.take_gradients(&mut out.total.backward());
        drop(out);
        let mut now = Vec::new();
        model.for_each_parameter_mut(|i, _, values| {
            let gradient = gradients[i].as_ref().unwrap();
            with_slice(gradient, |g| values.iter_mut().zip(g).for_each(|(w, g)| *w -= 0.2 * g));
            now.push(values.as_ptr() as usize);
        });
        if step == 1 {
            addresses = now;
        } else if step > 1 {
            assert!(now == addresses, "a parameter moved in step {step}");
        }
    }
    assert!(losses[29] < 0.6 * losses[0], "{losses:?}");
}
