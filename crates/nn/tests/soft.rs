//! Every soft layer against the f64 functions of mixtura-routing: outputs, and the gradient of every number by differences of
//! the f64 reference.

use std::collections::BTreeMap;

use burn::tensor::Device;
use mixtura_nn::{Emit, NamedParameters, SoftConfig, SoftLayer, SoftLayerConfig};
use mixtura_ops::{Numerics, into_vec, tensor_from_vec};
use mixtura_routing::soft::merge::{FirstSegment, merged_forward, segment_weights, shifted_weights};
use mixtura_routing::soft::soft_moe::{Mixing, NORM_EPSILON, SoftMoe};
use mixtura_routing::soft::{block_causal, mixture_of_tokens};

const D: usize = 8;
const E: usize = 3;
const F: usize = 5;
const SHARED: usize = 4;

/// Values between -1 and 1.
fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mix =
        |i: u32| (i ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(40_503);
    (0..n as u32).map(|i| (mix(i) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// Every kind and option, with sizes that divide nothing evenly: (layer, sequences, tokens of one).
fn cases() -> Vec<(SoftConfig, usize, usize)> {
    let soft_moe = |mixing| SoftConfig::SoftMoe { slots_per_expert: 2, mixing, allow_future: true };
    let lory = |first_segment| SoftConfig::Lory { segment: 3, first_segment, allow_future: true };
    let tokens = |group, temperature, emit| SoftConfig::MixtureOfTokens { group, temperature, emit };
    vec![
        (soft_moe(Mixing::Soft), 2, 5),
        (soft_moe(Mixing::UniformDispatch), 2, 5),
        (soft_moe(Mixing::UniformCombine), 2, 5),
        (SoftConfig::Smear { allow_future: true }, 2, 5),
        (lory(FirstSegment::Uniform), 2, 8),
        (lory(FirstSegment::OwnMean), 2, 8),
        (lory(FirstSegment::Uniform), 2, 2),
        (tokens(2, 1.0, Emit::Merge), 3, 4),
        (tokens(3, 0.5, Emit::Experts), 4, 3),
        (tokens(4, 1.0, Emit::Merge), 1, 4),
        (SoftConfig::BlockCausal { block: 3, slots_per_expert: 2 }, 2, 8),
        (SoftConfig::BlockCausal { block: 1, slots_per_expert: 1 }, 2, 4),
        (SoftConfig::BlockCausal { block: 4, slots_per_expert: 1 }, 1, 12),
    ]
}

type Parameters = BTreeMap<String, Vec<f64>>;

/// One SwiGLU network: gate_up `[D, 2F]`, down `[F, D]`.
fn network(gate_up: &[f64], down: &[f64], x: &[f64]) -> Vec<f64> {
    let f = down.len() / D;
    let into = |column: usize| -> f64 { x.iter().enumerate().map(|(d, x)| x * gate_up[d * 2 * f + column]).sum() };
    let silu = |z: f64| z / (1.0 + (-z).exp());
    let hidden: Vec<f64> = (0..f).map(|i| silu(into(i)) * into(f + i)).collect();
    (0..D).map(|d| hidden.iter().enumerate().map(|(i, h)| h * down[i * D + d]).sum()).collect()
}

fn parameter<'a>(p: &'a Parameters, end: &str) -> &'a [f64] {
    p.iter().find(|(name, _)| name.ends_with(end)).map(|(_, values)| values.as_slice()).unwrap()
}

/// The layer in f64. `frozen`, one set of weights per sequence, stands for what the gradient is stopped at.
fn reference(case: &(SoftConfig, usize, usize), p: &Parameters, x: &[f64], frozen: Option<&[Vec<f64>]>) -> Vec<f64> {
    let &(soft, batch, seq) = case;
    let (gate_up, down) = (parameter(p, ".experts.gate_up"), parameter(p, ".experts.down"));
    let expert = |e: usize, x: &[f64]| {
        network(&gate_up[e * D * 2 * F..(e + 1) * D * 2 * F], &down[e * F * D..(e + 1) * F * D], x)
    };
    let slots = |per_expert: usize| SoftMoe {
        phi_ds: parameter(p, ".phi"),
        slots: E * per_expert,
        per_expert,
        scale: parameter(p, ".scale")[0],
        epsilon: NORM_EPSILON,
    };
    let joined: Vec<f64> = (0..E)
        .flat_map(|e| [&gate_up[e * D * 2 * F..(e + 1) * D * 2 * F], &down[e * F * D..(e + 1) * F * D]].concat())
        .collect();
    let merged = |x: &[f64], length: usize, weights: &[f64]| {
        let apply = |theta: &[f64], x: &[f64]| network(&theta[..D * 2 * F], &theta[D * 2 * F..], x);
        merged_forward(x, D, length, weights, &joined, E, apply)
    };
    let sequences = || x.chunks(seq * D).enumerate();
    let mut y: Vec<f64> = match soft {
        SoftConfig::SoftMoe { slots_per_expert, mixing, .. } => {
            sequences().flat_map(|(_, x)| slots(slots_per_expert).forward(x, D, mixing, expert).y_td).collect()
        }
        SoftConfig::BlockCausal { block, slots_per_expert } => sequences()
            .flat_map(|(_, x)| block_causal::forward(&slots(slots_per_expert), x, D, block, expert).y_td)
            .collect(),
        SoftConfig::Smear { .. } => sequences()
            .flat_map(|(_, x)| merged(x, seq, &segment_weights(x, parameter(p, ".router"), D, seq)))
            .collect(),
        SoftConfig::Lory { segment, first_segment, .. } => sequences()
            .flat_map(|(b, x)| {
                let own = segment_weights(x, parameter(p, ".router"), D, segment);
                let mut used = shifted_weights(&own, E, first_segment);
                if let Some(frozen) = frozen {
                    used[..E].copy_from_slice(&frozen[b]);
                }
                merged(x, segment, &used)
            })
            .collect(),
        SoftConfig::MixtureOfTokens { group, temperature, emit } => {
            let mut y = vec![0.0; x.len()];
            for first in (0..batch).step_by(group) {
                for position in 0..seq {
                    let members: Vec<usize> =
                        (first..(first + group).min(batch)).map(|b| (b * seq + position) * D).collect();
                    let group: Vec<f64> = members.iter().flat_map(|&at| x[at..at + D].to_vec()).collect();
                    let router = parameter(p, ".router");
                    let (weights, mut out) = mixture_of_tokens::group_forward(&group, router, D, temperature, expert);
                    if emit == Emit::Experts {
                        out = emitted_over_experts(&group, &weights, router, temperature, expert);
                    }
                    for (i, at) in members.into_iter().enumerate() {
                        y[at..at + D].copy_from_slice(&out[i * D..(i + 1) * D]);
                    }
                }
            }
            y
        }
    };
    let gate = parameter(p, "shared_gate");
    for (y, x) in y.chunks_mut(D).zip(x.chunks(D)) {
        let z: f64 = x.iter().zip(gate).map(|(x, g)| x * g).sum();
        let shared = network(parameter(p, "shared.gate_up"), parameter(p, "shared.down"), x);
        y.iter_mut().zip(shared).for_each(|(y, s)| *y += s / (1.0 + (-z).exp()));
    }
    y
}

/// Mixture of Tokens whose answers return with a softmax over experts.
fn emitted_over_experts(
    x: &[f64],
    merge_ge: &[f64],
    router: &[f64],
    temperature: f64,
    expert: impl Fn(usize, &[f64]) -> Vec<f64>,
) -> Vec<f64> {
    let mut y = vec![0.0; x.len()];
    let answers: Vec<Vec<f64>> = (0..E)
        .map(|e| {
            let mut mixed = vec![0.0; D];
            for (x, w) in x.chunks(D).zip(merge_ge.chunks(E)) {
                mixed.iter_mut().zip(x).for_each(|(m, x)| *m += w[e] * x);
            }
            expert(e, &mixed)
        })
        .collect();
    for (x, y) in x.chunks(D).zip(y.chunks_mut(D)) {
        let logit = |e: usize| x.iter().enumerate().map(|(d, x)| x * router[d * E + e]).sum::<f64>() / temperature;
        let exps: Vec<f64> = (0..E).map(|e| logit(e).exp()).collect();
        let total: f64 = exps.iter().sum();
        for (answer, exp) in answers.iter().zip(exps) {
            y.iter_mut().zip(answer).for_each(|(y, a)| *y += exp / total * a);
        }
    }
    y
}

fn layer(soft: SoftConfig, device: &Device) -> SoftLayer {
    let config = SoftLayerConfig {
        d_shared: SHARED,
        shared_gate: true,
        init_std: 0.5,
        out_init_std: 0.5,
        ..SoftLayerConfig::new(D, E, F, soft)
    };
    SoftLayer::new(&config, 3, device).unwrap()
}

fn parameters(layer: &SoftLayer) -> Parameters {
    let mut found = Parameters::new();
    layer.for_each_parameter(|info, values| {
        found.insert(info.name.clone(), values.iter().map(|v| f64::from(*v)).collect());
    });
    found
}

#[test]
fn every_soft_layer_is_its_f64_reference_and_so_is_the_gradient_of_every_number() {
    let device = Device::default().autodiff();
    for case in cases() {
        let (soft, batch, seq) = case;
        let layer = layer(soft, &device);
        let x = noise(batch * seq * D, 4);
        let weights = noise(batch * seq * D, 9);
        let shape = [batch * seq, D];
        let x_td = tensor_from_vec(x.clone(), shape, &device).require_grad();
        let y_td = layer.forward(x_td.clone(), batch, seq, Numerics::default());
        let found = into_vec(y_td.clone());

        let p = parameters(&layer);
        let wide = |values: &[f32]| -> Vec<f64> { values.iter().map(|v| f64::from(*v)).collect() };
        let (x, weights_wide) = (wide(&x), wide(&weights));
        let frozen: Option<Vec<Vec<f64>>> = match soft {
            SoftConfig::Lory { segment, first_segment: FirstSegment::OwnMean, .. } => Some(
                x.chunks(seq * D)
                    .map(|x| segment_weights(x, parameter(&p, ".router"), D, segment)[..E].to_vec())
                    .collect(),
            ),
            _ => None,
        };
        for (found, expected) in found.iter().zip(reference(&case, &p, &x, None)) {
            assert!((f64::from(*found) - expected).abs() < 1e-5, "{soft:?}: {found} vs {expected}");
        }

        let loss = (y_td * tensor_from_vec(weights, shape, &device)).sum();
        let mut graph = loss.backward();
        let mut gradients = vec![("x".to_string(), into_vec(x_td.grad_remove(&mut graph).unwrap()))];
        for (info, gradient) in layer.parameter_infos().into_iter().zip(layer.take_gradients(&mut graph)) {
            let values = info.len();
            gradients.push((info.name, gradient.map_or_else(|| vec![0.0; values], into_vec)));
        }
        let objective = |p: &Parameters, x: &[f64]| -> f64 {
            reference(&case, p, x, frozen.as_deref()).iter().zip(&weights_wide).map(|(y, w)| y * w).sum()
        };
        for (name, gradient) in gradients {
            let largest = gradient.iter().fold(0.0f64, |most, g| most.max(f64::from(g.abs())));
            for (i, found) in gradient.iter().enumerate() {
                let at = |h: f64| {
                    let (mut p, mut x) = (p.clone(), x.clone());
                    match p.get_mut(&name) {
                        Some(values) => values[i] += h,
                        None => x[i] += h,
                    }
                    objective(&p, &x)
                };
                let slope = (at(1e-4) - at(-1e-4)) / 2e-4;
                let allowed = 2e-5 * largest.max(1.0);
                assert!((f64::from(*found) - slope).abs() < allowed, "{soft:?} {name}[{i}]: {found} vs {slope}");
            }
            // One segment or one block in all: nothing was decided, or nothing was mixed, so there is nothing to learn.
            let one_piece = matches!(soft, SoftConfig::Lory { segment, .. } if segment >= seq);
            let alone = matches!(soft, SoftConfig::MixtureOfTokens { .. } if batch == 1);
            let decides = name.ends_with("router") || name.ends_with("phi") || name.ends_with("scale");
            assert!(largest > 1e-5 || (decides && (one_piece || alone)), "{soft:?} {name}: largest {largest}");
        }
    }
}

#[test]
fn parameters_are_named_after_the_kind_and_routers_do_not_decay() {
    let names = |soft| -> Vec<(String, bool)> {
        layer(soft, &Device::default())
            .parameter_infos()
            .into_iter()
            .map(|info| {
                let decays = info.decays();
                (info.name, decays)
            })
            .collect()
    };
    let found = names(SoftConfig::Lory { segment: 4, first_segment: FirstSegment::Uniform, allow_future: false });
    let expected = [
        ("merged.router", false),
        ("merged.experts.gate_up", true),
        ("merged.experts.down", true),
        ("shared.gate_up", true),
        ("shared.down", true),
        ("shared_gate", false),
    ];
    assert_eq!(found, expected.map(|(name, decay)| (name.to_string(), decay)));
    let found = names(SoftConfig::BlockCausal { block: 4, slots_per_expert: 1 });
    assert_eq!(found[..2], [("blocks.phi".to_string(), true), ("blocks.scale".to_string(), true)]);
}

#[test]
fn a_block_without_a_past_gets_nothing_from_the_slots_and_needs_a_shared_network() {
    let soft = SoftConfig::BlockCausal { block: 8, slots_per_expert: 1 };
    let error = SoftLayer::new(&SoftLayerConfig::new(D, E, F, soft), 1, &Device::default()).unwrap_err();
    assert_eq!(error.key, "moe.shared_experts", "{error}");
    let layer = layer(soft, &Device::default());
    let x_td = tensor_from_vec(noise(6 * D, 1), [6, D], &Device::default());
    let y = into_vec(layer.forward(x_td.clone(), 1, 6, Numerics::default()));
    let p = parameters(&layer);
    let zero = |name: &str| p.get(name).unwrap().iter().all(|v| *v == 0.0);
    assert!(!zero("blocks.phi") && y.iter().any(|v| *v != 0.0));
    // With the shared network's way out at zero nothing is left.
    let mut layer = layer;
    layer.for_each_parameter_mut(|_, info, values| {
        if info.name == "shared.down" {
            values.fill(0.0);
        }
    });
    assert!(into_vec(layer.forward(x_td, 1, 6, Numerics::default())).iter().all(|v| *v == 0.0));
}

#[test]
fn logits_of_a_thousand_neither_overflow_nor_lose_the_past() {
    // A running softmax whose reference jumps by hundreds from block to block, forwards and backwards.
    let device = Device::default().autodiff();
    let case = (SoftConfig::BlockCausal { block: 2, slots_per_expert: 1 }, 1, 10);
    let mut layer = layer(case.0, &device);
    layer.for_each_parameter_mut(|_, info, values| {
        if info.name == "blocks.scale" {
            values[0] = 1000.0;
        }
    });
    let x = noise(10 * D, 6);
    let x_td = tensor_from_vec(x.clone(), [10, D], &device).require_grad();
    let y_td = layer.forward(x_td.clone(), 1, 10, Numerics::default());
    let x: Vec<f64> = x.into_iter().map(f64::from).collect();
    let expected = reference(&case, &parameters(&layer), &x, None);
    for (found, expected) in into_vec(y_td.clone()).iter().zip(expected) {
        assert!((f64::from(*found) - expected).abs() < 2e-3, "{found} vs {expected}");
    }
    let mut graph = y_td.sum().backward();
    assert!(into_vec(x_td.grad_remove(&mut graph).unwrap()).iter().all(|g| g.is_finite()));
}
