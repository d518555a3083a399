//! Deterministic numbers, the gradient check and the layers that several test files share.
#![allow(dead_code, reason = "each test file uses its own part of this")]

pub mod routers;

use burn::tensor::Tensor;
use mixtura_nn::NamedParameters;
use mixtura_ops::{into_vec, with_slice};

/// Values between -1 and 1.
pub fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mix =
        |i: u32| (i ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(40_503);
    (0..n as u32).map(|i| (mix(i) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// One forward pass of what is being checked.
pub struct Pass {
    /// The input, where its gradient is wanted too.
    pub x_td: Option<Tensor<2>>,
    /// The scalar that is differentiated.
    pub loss: Tensor<1>,
    /// What must not change for a difference to count: the routing.
    pub choices: Vec<u32>,
}

/// Compares the gradient of `run` for `x` and for every parameter but `skipped` with differences along that gradient (where
/// the slope is its norm), and returns what disagrees. `run` must depend on its arguments alone.
///
/// Steps of several lengths are tried, since long ones curve and short ones round; those that change the routing do not count.
/// Two step lengths cancel the third-order term.
pub fn disagreements<M: NamedParameters>(
    name: &str,
    model: &mut M,
    x: &[f32],
    skipped: &[&str],
    run: impl Fn(&M, &[f32]) -> Pass,
) -> Vec<String> {
    let mut failures = Vec::new();
    let Pass { x_td, loss, choices } = run(model, x);
    let mut graph = loss.backward();
    let mut gradients: Vec<Option<Vec<f32>>> = vec![x_td.and_then(|x_td| x_td.grad_remove(&mut graph)).map(into_vec)];
    gradients.extend(model.take_gradients(&mut graph).into_iter().map(|gradient| gradient.map(into_vec)));
    let names: Vec<String> = model.parameter_infos().into_iter().map(|info| info.name).collect();
    let names: Vec<String> = [vec!["x".to_string()], names].concat();
    for (target, gradient) in gradients.iter().enumerate() {
        if skipped.iter().any(|end| names[target].ends_with(end)) {
            continue;
        }
        let Some(gradient) = gradient else {
            failures.push(format!("{name}: {} has no gradient", names[target]));
            continue;
        };
        let norm = gradient.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let direction: Vec<f32> = gradient.iter().map(|g| (f64::from(*g) / norm.max(1e-12)) as f32).collect();
        let mut at = |h: f32| {
            let step = |values: &mut [f32]| values.iter_mut().zip(&direction).for_each(|(v, d)| *v += h * d);
            let mut x = x.to_vec();
            let mut before = Vec::new();
            if target == 0 {
                step(&mut x);
            }
            model.for_each_parameter_mut(|i, _, values| {
                if i + 1 == target {
                    before = values.to_vec();
                    step(values);
                }
            });
            let pass = run(model, &x);
            model.for_each_parameter_mut(|i, _, values| {
                if i + 1 == target {
                    values.copy_from_slice(&before);
                }
            });
            (pass.choices == choices).then(|| value(&pass.loss))
        };
        let mut slope = |h: f32| Some((at(h)? - at(-h)?) / (2.0 * f64::from(h)));
        let steps = [0.02, 0.01, 0.005, 0.0025, 0.001, 0.0004];
        let estimates = steps.into_iter().filter_map(|h| Some((4.0 * slope(h)? - slope(2.0 * h)?) / 3.0));
        let mut last = None;
        let agrees =
            estimates.inspect(|slope| last = Some(*slope)).any(|slope| (slope - norm).abs() < 0.01 * norm + 3e-3);
        match last {
            None => failures.push(format!("{name}: every step of {} changes the routing", names[target])),
            Some(slope) if !agrees => {
                failures.push(format!("{name}: {}: {slope} by differences, {norm} found", names[target]));
            }
            Some(_) => {}
        }
    }
    failures
}

/// The value of a tensor of one element.
pub fn value(tensor: &Tensor<1>) -> f64 {
    with_slice(tensor, |values| f64::from(values[0]))
}
