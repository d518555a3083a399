//! MoE layers of rusting_brain, forward and backward: the work of `mixtura bench layer` in f32, one JSON object per measurement.
//!
//! FLOPs count the expert products only: 2 * 3 * T * k * d * f forward, twice that backward. The slope of the loss is given, as in the
//! PyTorch script beside this directory, and gradients are cleared between passes outside the measured time.

use std::time::Instant;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rusting_brain::{Layout, Matrix, MoeConfig, MoeLayer};

/// T, d, f, E, k.
const SHAPES: [[usize; 5]; 3] = [[2048, 512, 1024, 16, 2], [2048, 512, 256, 64, 8], [4096, 1024, 2048, 8, 2]];

fn main() {
    for shape in SHAPES {
        measure(shape);
    }
}

fn measure([t, d, f, e, k]: [usize; 5]) {
    let mut rng = StdRng::seed_from_u64(0);
    let mut layer = MoeLayer::new(d, MoeConfig::new(e, k, f), &mut rng).expect("the shapes are constants");
    let (x_td, dy_td) = (random(t, d, &mut rng), random(t, d, &mut rng));
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    // The first pass maps memory.
    for _ in 0..6 {
        layer.params_mut().into_iter().for_each(|param| param.zero_grad());
        let mark = Instant::now();
        let (y_td, cache) = layer.forward_train(&x_td, Layout::default()).expect("the widths agree");
        forward.push(mark.elapsed().as_secs_f64());
        let mark = Instant::now();
        let dx_td = layer.backward(&cache, &dy_td);
        backward.push(mark.elapsed().as_secs_f64());
        assert!(y_td.data.iter().chain(&dx_td.data).all(|x| x.is_finite()));
    }
    let flops = (2 * 3 * t * k * d * f) as f64;
    let shape = format!("T{t} d{d} f{f} E{e} k{k}");
    for (name, times, flops) in [("layer_forward", &mut forward, flops), ("layer_backward", &mut backward, 2.0 * flops)]
    {
        let times = &mut times[1..];
        times.sort_by(f64::total_cmp);
        let seconds = times[times.len() / 2];
        let row = serde_json::json!({
            "name": name,
            "shape": shape,
            "precision": "f32",
            "ms": seconds * 1e3,
            "gflops": flops / seconds / 1e9,
            "tokens_per_second": t as f64 / seconds,
        });
        println!("{row}");
    }
}

/// Between -1.7 and 1.7: variance 1, as in the other scripts.
fn random(rows: usize, columns: usize, rng: &mut StdRng) -> Matrix {
    let half = 3f32.sqrt();
    Matrix::from_vec(rows, columns, (0..rows * columns).map(|_| rng.gen_range(-half..half)).collect())
}
