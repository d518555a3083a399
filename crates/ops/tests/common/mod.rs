//! One helper that holds a fused op against its portable twin in f64, and the twin's gradient against finite differences.

#![allow(dead_code, reason = "each test file uses its own part of this")]

use burn::tensor::{DType, Device, Tensor, TensorData};
use mixtura_ops::{DispatchPlan, Precision};

/// A tensor of a test: every op here is a function of a few of these.
pub struct Input {
    pub values: Vec<f64>,
    pub shape: Vec<usize>,
}

/// Normal-looking numbers that are the same on every machine: sums of twelve uniforms from a multiplicative generator.
pub fn noise(seed: u64, count: usize, scale: f64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..count).map(|_| ((0..12).map(|_| uniform()).sum::<f64>() - 6.0) * scale).collect()
}

/// `count` ids below `below`.
pub fn ids(seed: u64, count: usize, below: u32) -> Vec<u32> {
    noise(seed, count, 1e6).iter().map(|v| (v.abs() as u32) % below).collect()
}

pub fn input<const D: usize>(seed: u64, shape: [usize; D], scale: f64) -> Input {
    // Rounded to f32, so that both precisions see the same numbers.
    let values = noise(seed, shape.iter().product(), scale).iter().map(|&v| f64::from(v as f32)).collect();
    Input { values, shape: shape.to_vec() }
}

/// An op under test: flat leaves in (each reshaped to its own shape by [`shaped`]), any tensor out, flattened.
pub type Op<'a> = &'a dyn Fn(&[Tensor<1>]) -> Tensor<1>;

pub fn shaped<const D: usize>(leaf: &Tensor<1>, input: &Input) -> Tensor<D> {
    let shape: [usize; D] = input.shape.clone().try_into().expect("an input of another rank");
    leaf.clone().reshape(shape)
}

/// Values of the result, and the gradients of `sum(result * cotangent)`.
pub fn run(inputs: &[Input], op: Op, dtype: DType) -> (Vec<f64>, Vec<Vec<f64>>) {
    let device = Device::default().autodiff();
    let leaves = leaves(inputs, &device, dtype);
    let y = op(&leaves);
    let values = to_f64(y.clone());
    let cotangent = TensorData::new(noise(99, values.len(), 1.0), [values.len()]).convert_dtype(dtype);
    let gradients = (y * Tensor::<1>::from_data(cotangent, (&device, dtype))).sum().backward();
    let gradients = leaves.iter().map(|leaf| leaf.grad(&gradients).map(to_f64).expect("every input has a gradient"));
    (values, gradients.collect())
}

fn leaves(inputs: &[Input], device: &Device, dtype: DType) -> Vec<Tensor<1>> {
    let leaf = |input: &Input| {
        let data = TensorData::new(input.values.clone(), [input.values.len()]).convert_dtype(dtype);
        Tensor::<1>::from_data(data, (device, dtype)).set_require_grad(device.is_autodiff())
    };
    inputs.iter().map(leaf).collect()
}

fn to_f64<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().convert_dtype(DType::F64).try_to_vec().expect("converted to f64")
}

/// The fused op in f32 equals its twin in f64 up to `tolerance` of the largest element: value and every gradient. And the
/// twin's gradients are right: along a random direction they give the slope that central differences give.
pub fn check(inputs: &[Input], fused: Op, portable: Op, tolerance: f64) {
    let (value, gradients) = run(inputs, fused, DType::F32);
    let (expected_value, expected_gradients) = run(inputs, portable, DType::F64);
    assert_close("value", &value, &expected_value, tolerance);
    for (i, (gradient, expected)) in gradients.iter().zip(&expected_gradients).enumerate() {
        assert_close(&format!("gradient of input {i}"), gradient, expected, tolerance);
        let slope = finite_difference(inputs, portable, i);
        let direction = noise(7, expected.len(), 1.0);
        let expected_slope: f64 = expected.iter().zip(&direction).map(|(g, v)| g * v).sum();
        let bound = 1e-5 * (expected_slope.abs() + expected.iter().map(|g| g.abs()).sum::<f64>() + 1e-6);
        assert!((slope - expected_slope).abs() < bound, "input {i}: slope {slope}, autodiff says {expected_slope}");
    }
}

/// The slope of `sum(op * cotangent)` along a random direction of input `i`, by central differences in f64.
fn finite_difference(inputs: &[Input], op: Op, i: usize) -> f64 {
    let direction = noise(7, inputs[i].values.len(), 1.0);
    let step = 1e-5;
    let at = |sign: f64| {
        let moved: Vec<Input> = inputs
            .iter()
            .enumerate()
            .map(|(j, input)| {
                let shift = if i == j { sign * step } else { 0.0 };
                let pairs = input.values.iter().zip(direction.iter().cycle());
                Input { values: pairs.map(|(x, v)| x + shift * v).collect(), shape: input.shape.clone() }
            })
            .collect();
        let y = to_f64(op(&leaves(&moved, &Device::default(), DType::F64)));
        y.iter().zip(noise(99, y.len(), 1.0)).map(|(y, c)| y * c).sum::<f64>()
    };
    (at(1.0) - at(-1.0)) / (2.0 * step)
}

pub fn assert_close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}: another number of elements");
    let scale = expected.iter().fold(1e-3, |most: f64, x| most.max(x.abs()));
    for (at, (x, y)) in found.iter().zip(expected).enumerate() {
        assert!((x - y).abs() <= tolerance * scale, "{what}[{at}]: found {x}, expected {y} (largest {scale})");
    }
}

/// f32 tightly, both bf16 precisions with the rounding of 8-bit mantissas.
pub const PRECISIONS: [(Precision, f64); 3] =
    [(Precision::F32, 2e-5), (Precision::Bf16, 3e-2), (Precision::Bf16Native, 3e-2)];

pub fn flat<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let elements = tensor.shape().num_elements();
    tensor.reshape([elements])
}

/// Rows of three experts for `tokens` tokens, two choices each; expert 1 gets nothing, token 0 no expert at all.
pub fn plan(tokens: usize) -> DispatchPlan {
    let choices: Vec<Vec<u32>> =
        (0..tokens).map(|t| if t == 0 { vec![] } else { vec![2 * (t as u32 % 2), 2 - 2 * (t as u32 % 2)] }).collect();
    let (mut row_offsets, mut token_of_row) = (vec![0], vec![]);
    let mut row_of = vec![[0u32; 2]; tokens];
    for e in 0..3 {
        for (t, experts) in choices.iter().enumerate() {
            if let Some(k) = experts.iter().position(|&expert| expert == e) {
                row_of[t][k] = token_of_row.len() as u32;
                token_of_row.push(t as u32);
            }
        }
        row_offsets.push(token_of_row.len() as u32);
    }
    let mut token_offsets = vec![0];
    let mut row_of_choice = vec![];
    for (t, experts) in choices.iter().enumerate() {
        row_of_choice.extend(&row_of[t][..experts.len()]);
        token_offsets.push(row_of_choice.len() as u32);
    }
    DispatchPlan::new(tokens, row_offsets, token_of_row, token_offsets, row_of_choice)
}
