//! A Mixture-of-Experts layer inside an ordinary Burn model: two experts-worth of functions, learned by eight experts.
//!
//! The target is `sin(3a)` where the last input is positive and `a * b` where it is negative. A dense layer has to bend one
//! network around both; the router sends the two kinds of tokens to different experts. Run with
//! `cargo run --release -p mixtura-nn --example 02_moe_layer_in_burn`.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Tensor};
use mixtura_nn::{ForwardContext, MoeLayer, MoeLayerConfig};
use mixtura_ops::Numerics;

/// Width of the model.
const D: usize = 32;
/// Tokens per step.
const TOKENS: usize = 512;

/// Linear in, MoE layer beside a residual connection, linear out.
#[derive(Module, Debug)]
struct Regression {
    embed: Linear,
    moe: MoeLayer,
    head: Linear,
}

fn main() {
    let device = Device::default().autodiff();
    let layer = MoeLayerConfig { init_std: 0.1, out_init_std: 0.1, ..MoeLayerConfig::new(D, 8, 2, 32) };
    let mut model = Regression {
        embed: LinearConfig::new(3, D).init(&device),
        moe: MoeLayer::new(&layer, 7, &device).expect("a valid layer"),
        head: LinearConfig::new(D, 1).init(&device),
    };
    let mut optimizer = AdamWConfig::new().init();

    for step in 0..=400 {
        let inputs = Tensor::<2>::random([TOKENS, 3], Distribution::Uniform(-1.0, 1.0), &device);
        let targets = target(inputs.clone());

        let x_td = model.embed.forward(inputs);
        let context = ForwardContext::training(7, step, Numerics::default());
        let out = model.moe.forward(x_td.clone(), &context).expect("finite router logits");
        let error = (model.head.forward(x_td + out.y_td) - targets).powf_scalar(2.0).mean();
        // The balance and z losses come with the output, already weighted.
        let loss = error.clone() + out.routing.losses.total.clone();

        if step % 100 == 0 {
            let stats = out.routing.stats();
            println!(
                "step {step:3}  error {:.4}  rows per expert {:?}  load CV {:.2}",
                error.into_scalar::<f32>(),
                out.routing.assignment().load(),
                stats.load_cv
            );
        }
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(3e-3, model, gradients);
    }
}

/// `sin(3a)` where `c > 0`, `a b` elsewhere.
fn target(inputs: Tensor<2>) -> Tensor<2> {
    let column = |i: usize| inputs.clone().slice([0..TOKENS, i..i + 1]);
    let (a, b, c) = (column(0), column(1), column(2));
    let sine = a.clone().mul_scalar(3.0).sin();
    (a * b).mask_where(c.greater_elem(0.0), sine)
}
