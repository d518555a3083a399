//! Every layer whose rows reach their experts in another way: the same bits, forward and backward.

mod common;

use burn::tensor::Device;
use common::noise;
use common::routers::routers;
use mixtura_nn::{Exchange, ForwardContext, MoeLayer, MoeLayerConfig, NamedParameters};
use mixtura_ops::{Numerics, Precision, into_vec, tensor_from_vec, with_slice};
use mixtura_routing::zero_cost::ZeroComputation;
use mixtura_routing::{BalanceLoss, Noise, Normalize, RouterConfig};

const TOKENS: usize = 40;
const D: usize = 8;

/// Output, loss, gradient of the input and of every parameter.
fn pass(config: &MoeLayerConfig, exchange: Exchange, precision: Precision) -> Vec<Option<Vec<f32>>> {
    let device = Device::default().autodiff();
    let mut layer = MoeLayer::new(config, 3, &device).unwrap().with_exchange(exchange);
    layer.for_each_parameter_mut(|_, info, values| {
        if info.name == "router.weight" && values.iter().all(|v| *v == 0.0) {
            values.iter_mut().zip(noise(info.len(), 5)).for_each(|(w, n)| *w = 0.5 * n);
        }
    });
    let ids = (0..TOKENS as u32).map(|i| i * 7 % 5).collect();
    let context = ForwardContext { ids: Some(ids), ..ForwardContext::training(1, 2, Numerics::new(precision)) };
    let x_td = tensor_from_vec(noise(TOKENS * D, 4), [TOKENS, D], &device).require_grad();
    let out = layer.forward(x_td.clone(), &context).unwrap();
    let y = with_slice(&out.y_td, |y| y.to_vec());
    let cotangent = tensor_from_vec(noise(TOKENS * D, 9), [TOKENS, D], &device);
    let loss = (out.y_td * cotangent).sum() + out.routing.losses.total;
    let value = with_slice(&loss, |loss| loss.to_vec());
    let mut graph = loss.backward();
    let dx = x_td.grad_remove(&mut graph).map(into_vec);
    let gradients = layer.take_gradients(&mut graph).into_iter().map(|gradient| gradient.map(into_vec));
    [Some(y), Some(value), dx].into_iter().chain(gradients).collect()
}

#[test]
fn rows_that_are_gathered_computed_and_combined_give_the_bits_of_the_fused_layer() {
    let layer = |router, top_k| MoeLayerConfig { router, init_std: 0.5, ..MoeLayerConfig::new(D, 4, top_k, 6) };
    let mut layers: Vec<(&str, MoeLayerConfig)> =
        routers().into_iter().map(|(name, top_k, router)| (name, layer(router, top_k))).collect();
    for (_, config) in &mut layers {
        if matches!(config.router.noise, Noise::Softplus { .. }) {
            config.balance.loss = BalanceLoss::ImportanceLoad;
        }
    }
    let plain = layer(RouterConfig::default(), 2);
    let raw = layer(RouterConfig { normalize: Normalize::Never, ..RouterConfig::default() }, 2);
    layers.extend([
        ("widths", MoeLayerConfig { d_expert_each: vec![6, 10, 6, 3], ..plain.clone() }),
        ("shared", MoeLayerConfig { d_shared: 5, shared_gate: true, ..plain }),
        ("without a network", MoeLayerConfig { zero_computation: Some(ZeroComputation::default()), ..raw }),
    ]);
    for (name, config) in layers {
        for precision in [Precision::F32, Precision::Bf16] {
            let [local, rows] = [Exchange::Local, Exchange::Rows].map(|exchange| pass(&config, exchange, precision));
            assert_eq!(local, rows, "{name} in {precision}");
            assert!(local.iter().flatten().flatten().all(|value| value.is_finite()), "{name}");
        }
    }
}
