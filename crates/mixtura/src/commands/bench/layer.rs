//! An MoE layer with its router, forward and backward, through the same module that models use.

use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};
use mixtura_nn::{ForwardContext, MoeLayer, MoeLayerConfig, NamedParameters};
use mixtura_ops::{Numerics, host_function, recycle, with_slice};

use super::{Bench, Row, median};

/// T, d, f, E, k.
const SHAPES: [[usize; 5]; 3] = [[2048, 512, 1024, 16, 2], [2048, 512, 256, 64, 8], [4096, 1024, 2048, 8, 2]];

/// Two rows per shape.
pub fn rows(bench: &Bench, numerics: Numerics) -> Vec<Row> {
    SHAPES.into_iter().flat_map(|shape| measure(bench, numerics, shape)).collect()
}

/// Two rows per shape: 512 to 8192 tokens, then 8 to 128 experts that share the same 4096 rows. The time should be linear in the
/// tokens, and flat in the experts but for what each weight costs once: its gradient is written whatever the rows.
pub fn scaling_rows(bench: &Bench, numerics: Numerics) -> Vec<Row> {
    let tokens = [512, 1024, 2048, 4096, 8192].map(|t| [t, 512, 512, 16, 2]);
    let experts = [8, 16, 32, 64, 128].map(|e| [2048, 512, 256, e, 2]);
    tokens.into_iter().chain(experts).flat_map(|shape| measure(bench, numerics, shape)).collect()
}

fn measure(bench: &Bench, numerics: Numerics, [t, d, f, e, k]: [usize; 5]) -> [Row; 2] {
    let [t, d, f] = [t, d, f].map(|size| bench.size(size));
    let device = Device::default().autodiff();
    let config = MoeLayerConfig { init_std: (d as f64).powf(-0.5), ..MoeLayerConfig::new(d, e, k, f) };
    let layer = MoeLayer::new(&config, 0, &device).expect("the shapes are constants");
    let x_td = Tensor::<2>::random([t, d], Distribution::Normal(0.0, 1.0), &device);
    let context = ForwardContext::training(0, 0, numerics);
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    let started = Instant::now();
    while forward.len() < 6 || started.elapsed().as_secs_f64() < 2.0 * bench.seconds {
        let x_td = x_td.clone().require_grad();
        let mark = Instant::now();
        let out = layer.forward(x_td.clone(), &context).expect("random tokens can be routed");
        forward.push(mark.elapsed().as_secs_f64());
        let loss = mean_square(out.y_td) + out.routing.losses.total;
        let mark = Instant::now();
        let mut gradients = loss.backward();
        backward.push(mark.elapsed().as_secs_f64());
        // As the trainer does once the optimizer has read them: the next pass writes its gradients there.
        layer.take_gradients(&mut gradients).into_iter().flatten().for_each(recycle);
        x_td.grad_remove(&mut gradients).into_iter().for_each(recycle);
    }
    // The first call packs the weights, as the first of an optimizer step does.
    let (forward, backward) = (median(&mut forward[1..]), median(&mut backward[1..]));
    let (shape, flops) = (format!("T{t} d{d} f{f} E{e} k{k}"), (2 * 3 * t * k * d * f) as f64);
    let with_tokens = |row: Row, seconds: f64| Row { tokens_per_second: Some(t as f64 / seconds), ..row };
    [
        with_tokens(bench.arithmetic("layer_forward", &shape, numerics, forward, flops), forward),
        with_tokens(bench.arithmetic("layer_backward", &shape, numerics, backward, 2.0 * flops), backward),
    ]
}

/// The mean of the squares of `y_td` with one pass over memory each way, so that the layer is what is measured.
fn mean_square(y_td: Tensor<2>) -> Tensor<1> {
    let count = y_td.shape().num_elements() as f32;
    let kept = y_td.clone().inner();
    let value = with_slice(&kept, |y| y.iter().map(|y| y * y).sum::<f32>()) / count;
    host_function(y_td, vec![value], [1], move |dloss| {
        let factor = 2.0 * dloss[0] / count;
        with_slice(&kept, |y| y.iter().map(|y| factor * y).collect())
    })
}
