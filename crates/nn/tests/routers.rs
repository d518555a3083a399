//! Every router in a layer: gradients against finite differences, and no randomness in evaluation.

mod common;

use burn::tensor::{Device, Tensor};
use common::routers::routers;
use common::{Pass, disagreements, noise, value};
use mixtura_nn::{ForwardContext, MoeLayer, MoeLayerConfig, NamedParameters, SoftMoeConfig, SoftMoeLayer};
use mixtura_ops::{Numerics, into_vec, tensor_from_vec, with_slice};
use mixtura_routing::soft::soft_moe::{Mixing, SoftMoe};
use mixtura_routing::{BalanceLoss, Noise, Policy, RouterConfig};

const TOKENS: usize = 12;
const D: usize = 8;
const E: usize = 4;

fn layer(top_k: usize, router: RouterConfig, device: &Device) -> MoeLayer {
    let mut config = MoeLayerConfig { router, init_std: 0.5, out_init_std: 0.5, ..MoeLayerConfig::new(D, E, top_k, 6) };
    (config.balance.coefficient, config.balance.z_loss) = (0.2, 0.05);
    if matches!(config.router.noise, Noise::Softplus { .. }) {
        config.balance.loss = BalanceLoss::ImportanceLoad;
    }
    let mut layer = MoeLayer::new(&config, 3, device).unwrap();
    // A gate that starts at zero is all ties: move it away, as training would.
    layer.for_each_parameter_mut(|_, info, values| {
        if info.name == "router.weight" && values.iter().all(|v| *v == 0.0) {
            values.iter_mut().zip(noise(D * E, 5)).for_each(|(w, n)| *w = 0.5 * n);
        }
        if info.name == "router.thresholds" {
            values.fill(0.2);
        }
    });
    layer
}

fn context() -> ForwardContext {
    let ids = (0..TOKENS as u32).map(|i| i * 7 % 5).collect();
    ForwardContext { ids: Some(ids), ..ForwardContext::training(1, 2, Numerics::default()) }
}

/// A scalar of the layer's output and losses, and the choices that must not change.
fn objective(layer: &MoeLayer, x: &[f32], device: &Device, with_thresholds: bool) -> (Tensor<2>, Tensor<1>, Vec<u32>) {
    let x_td = tensor_from_vec(x.to_vec(), [TOKENS, D], device).require_grad();
    let out = layer.forward(x_td.clone(), &context()).unwrap();
    let weights = tensor_from_vec(noise(TOKENS * D, 9), [TOKENS, D], device);
    // The loss of batchwise thresholds takes its masks and the probabilities as constants, so differences would disagree.
    let auxiliary = out.routing.losses.total.clone();
    let auxiliary =
        if layer.router.thresholds.is_some() && !with_thresholds { auxiliary.mul_scalar(0.0) } else { auxiliary };
    let loss = (out.y_td * weights).sum() + auxiliary;
    let assignment = out.routing.assignment();
    let rows = [&assignment.token_of_row, &assignment.row_offsets, &assignment.choice_of_row];
    (x_td, loss, rows.into_iter().flatten().copied().collect())
}

#[test]
fn every_router_has_the_gradient_of_finite_differences() {
    let device = Device::default().autodiff();
    let mut failures = Vec::new();
    for (name, top_k, router) in routers() {
        let mut layer = layer(top_k, router, &device);
        // Batchwise thresholds learn from a loss whose masks change with them; a bias learns from counts.
        let skipped = ["router.thresholds", "router.bias"];
        failures.extend(disagreements(name, &mut layer, &noise(TOKENS * D, 4), &skipped, |layer, x| {
            let (x_td, loss, choices) = objective(layer, x, &device, false);
            Pass { x_td: Some(x_td), loss, choices }
        }));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn evaluation_draws_nothing_whatever_the_router() {
    let device = Device::default();
    for (name, top_k, router) in routers() {
        let layer = layer(top_k, router, &device);
        let x_td = tensor_from_vec(noise(TOKENS * D, 4), [TOKENS, D], &device);
        let run = |training, seed, step| {
            let context = ForwardContext { training, seed, step, ..context() };
            into_vec(layer.forward(x_td.clone(), &context).unwrap().y_td)
        };
        assert_eq!(run(false, 1, 1), run(false, 99, 7), "{name}");
        assert_eq!(run(true, 5, 3), run(true, 5, 3), "{name}");
    }
}

#[test]
fn every_router_can_be_written_in_a_file_and_read_back() {
    for (name, _, router) in routers() {
        let text = toml::to_string(&router).unwrap();
        assert_eq!(toml::from_str::<RouterConfig>(&text).unwrap(), router, "{name}:\n{text}");
    }
}

#[test]
fn batchwise_thresholds_move_towards_the_training_mask() {
    let device = Device::default().autodiff();
    let (_, top_k, router) = routers().into_iter().find(|(name, ..)| *name == "batchwise").unwrap();
    let mut layer = layer(top_k, router, &device);
    let x = noise(TOKENS * D, 4);
    let kept_in_evaluation = |layer: &MoeLayer| {
        let x_td = tensor_from_vec(x.clone(), [TOKENS, D], &device);
        let out = layer.forward(x_td, &ForwardContext { training: false, ..context() }).unwrap();
        out.routing.assignment().rows()
    };
    layer.for_each_parameter_mut(|_, info, values| {
        if info.name == "router.thresholds" {
            values.fill(0.0);
        }
    });
    assert_eq!(kept_in_evaluation(&layer), TOKENS * E);
    for _ in 0..200 {
        let (_, loss, _) = objective(&layer, &x, &device, true);
        let gradients = layer.take_gradients(&mut loss.backward());
        layer.for_each_parameter_mut(|i, info, values| {
            if info.name == "router.thresholds" {
                let gradient = gradients[i].clone().map(into_vec).unwrap();
                values.iter_mut().zip(gradient).for_each(|(t, g)| *t -= 0.01 * g);
            }
        });
    }
    let kept = kept_in_evaluation(&layer);
    assert!(kept.abs_diff(TOKENS * 2) <= 2, "{kept} rows, {} in training", TOKENS * 2);
}

#[test]
fn a_hash_layer_without_token_ids_says_what_it_needs() {
    let device = Device::default();
    let layer = layer(1, RouterConfig { policy: Policy::Hash, ..RouterConfig::default() }, &device);
    assert!(layer.router.weight.is_none());
    let x_td = Tensor::ones([2, D], &device);
    let error = layer.forward(x_td, &ForwardContext::evaluation(Numerics::default())).unwrap_err().to_string();
    assert!(error.contains("token ids"), "{error}");
}

#[test]
fn soft_moe_is_the_reference_and_every_parameter_has_its_gradient() {
    for mixing in [Mixing::Soft, Mixing::Uniform, Mixing::UniformDispatch, Mixing::UniformCombine, Mixing::Identity] {
        let device = Device::default().autodiff();
        let config = SoftMoeConfig { slots_per_expert: 2, mixing, init_std: 0.5, ..SoftMoeConfig::new(D, 3, 6) };
        let mut layer = SoftMoeLayer::new(&config, 3, &device).unwrap();
        let x = noise(2 * 5 * D, 4);
        let weights = tensor_from_vec(noise(2 * 5 * D, 9), [2, 5, D], &device);
        let run = |layer: &SoftMoeLayer| {
            let out = layer.forward(tensor_from_vec(x.clone(), [2, 5, D], &device), Numerics::default());
            let loss: Tensor<1> = (out.y_btd.clone() * weights.clone()).sum();
            (out, loss)
        };

        // The reference on the second sequence, its experts taken from the layer itself.
        let (out, loss) = run(&layer);
        let phi: Vec<f64> = with_slice(&layer.phi.val(), |phi| phi.iter().map(|v| f64::from(*v)).collect());
        let reference = SoftMoe { phi_ds: &phi, slots: 6, per_expert: 2, scale: 1.0, epsilon: 1e-6 };
        let second: Vec<f64> = x[5 * D..].iter().map(|v| f64::from(*v)).collect();
        let (gate_up, down) = (into_vec(layer.experts.gate_up.val()), into_vec(layer.experts.down.val()));
        let expected = reference.forward(&second, D, mixing, |e, x| expert(&gate_up, &down, e, x)).y_td;
        let found = into_vec(out.y_btd);
        for (found, expected) in found[5 * D..].iter().zip(expected) {
            assert!((f64::from(*found) - expected).abs() < 1e-4, "{mixing:?}: {found} vs {expected}");
        }

        let gradients = layer.take_gradients(&mut loss.backward());
        let learned_mixtures = !matches!(mixing, Mixing::Uniform | Mixing::Identity);
        for (target, info) in layer.parameter_infos().iter().enumerate() {
            if !learned_mixtures && (info.name == "phi" || info.name == "scale") {
                continue;
            }
            let gradient = into_vec(gradients[target].clone().unwrap());
            let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let mut at = |h: f64| {
                let mut before = Vec::new();
                layer.for_each_parameter_mut(|i, _, values| {
                    if i == target {
                        before = values.to_vec();
                        let step = |(v, g): (&mut f32, &f32)| *v += (h * f64::from(*g) / norm) as f32;
                        values.iter_mut().zip(&gradient).for_each(step);
                    }
                });
                let loss = value(&run(&layer).1);
                layer.for_each_parameter_mut(|i, _, values| {
                    if i == target {
                        values.copy_from_slice(&before);
                    }
                });
                loss
            };
            let slope = (at(0.01) - at(-0.01)) / 0.02;
            assert!((slope - norm).abs() < 0.01 * norm + 2e-3, "{mixing:?} {}: {slope} vs {norm}", info.name);
        }
    }
}

/// SwiGLU expert `e` in plain f64.
fn expert(gate_up: &[f32], down: &[f32], e: usize, x: &[f64]) -> Vec<f64> {
    let f = 6;
    let into = |column: usize| -> f64 {
        x.iter().enumerate().map(|(d, x)| x * f64::from(gate_up[(e * D + d) * 2 * f + column])).sum()
    };
    let silu = |z: f64| z / (1.0 + (-z).exp());
    let hidden: Vec<f64> = (0..f).map(|i| silu(into(i)) * into(f + i)).collect();
    (0..D).map(|d| hidden.iter().enumerate().map(|(i, h)| h * f64::from(down[(e * f + i) * D + d])).sum()).collect()
}
