//! AdamW against its formula in f64, and what it leaves alone.

use burn::tensor::{Device, Tensor};
use mixtura_nn::{Decoder, ModelConfig, MoeConfig, NamedParameters};
use mixtura_ops::{Isa, tensor_from_vec};
use mixtura_train::config::OptimizerConfig;
use mixtura_train::optimizer::{Accumulated, AdamW};

fn model() -> Decoder {
    let config = ModelConfig { vocab: 16, moe: Some(MoeConfig::new(3, 2, 8)), ..ModelConfig::new(8, 1, 2, 8) };
    Decoder::new(&config, 5, &Device::default().autodiff()).unwrap()
}

fn values(model: &Decoder) -> Vec<Vec<f32>> {
    let mut all = Vec::new();
    model.for_each_parameter(|_, values| all.push(values.to_vec()));
    all
}

/// A gradient for each parameter but the first, different in each step.
fn gradients(lengths: &[usize], step: usize) -> Vec<Option<Vec<f32>>> {
    let value = |p: usize, i: usize| ((p * 31 + i * 7 + step * 13) as f32 * 0.37).sin();
    lengths.iter().enumerate().map(|(p, &n)| (p > 0).then(|| (0..n).map(|i| value(p, i)).collect())).collect()
}

fn accumulated(gradients: &[Option<Vec<f32>>]) -> Accumulated {
    let device = Device::default();
    let tensor = |g: &Vec<f32>| -> Tensor<1> { tensor_from_vec(g.clone(), [g.len()], &device) };
    let mut sum = Accumulated::default();
    sum.add(gradients.iter().map(|g| g.as_ref().map(tensor)).collect());
    sum
}

#[test]
fn three_clipped_steps_are_those_of_the_formula() {
    let config = OptimizerConfig { clip: 0.5, ..OptimizerConfig::default() };
    let mut model = model();
    let infos = model.parameter_infos();
    let lengths: Vec<usize> = infos.iter().map(|info| info.len()).collect();
    let before = values(&model);
    let mut expected: Vec<Vec<f64>> = before.iter().map(|p| p.iter().map(|v| f64::from(*v)).collect()).collect();
    let (mut m, mut v) = (zeros(&lengths), zeros(&lengths));

    let mut optimizer = AdamW::new(&config, Isa::current(), &infos);
    for step in 1..=3 {
        let lr = 1e-2 / step as f64;
        let gradients = gradients(&lengths, step);
        let squares: f64 = gradients.iter().flatten().flatten().map(|g| f64::from(*g).powi(2)).sum();
        let sum = accumulated(&gradients);
        let norm = sum.norm(Isa::current());
        assert!((norm - squares.sqrt()).abs() < 1e-6 * norm && norm > config.clip);
        optimizer.step(&mut model, &sum, norm, lr);

        for (p, info) in infos.iter().enumerate() {
            let Some(gradient) = &gradients[p] else { continue };
            let decay =
                if info.name.contains("norm") || info.name.contains("router") { 0.0 } else { config.weight_decay };
            for i in 0..lengths[p] {
                let g = f64::from(gradient[i]) * config.clip / squares.sqrt();
                m[p][i] = config.beta1 * m[p][i] + (1.0 - config.beta1) * g;
                v[p][i] = config.beta2 * v[p][i] + (1.0 - config.beta2) * g * g;
                let m_hat = m[p][i] / (1.0 - config.beta1.powi(step as i32));
                let v_hat = v[p][i] / (1.0 - config.beta2.powi(step as i32));
                let w = &mut expected[p][i];
                *w -= lr * (m_hat / (v_hat.sqrt() + config.eps) + decay * *w);
            }
        }
    }
    let after = values(&model);
    for (p, info) in infos.iter().enumerate() {
        for (i, (found, expected)) in after[p].iter().zip(&expected[p]).enumerate() {
            let found = f64::from(*found);
            assert!((found - expected).abs() < 3e-6, "{}[{i}]: {found} instead of {expected}", info.name);
        }
    }
    assert_eq!(after[0], before[0], "a parameter without a gradient keeps its value");
    assert!(optimizer.moments[0].m.iter().all(|m| *m == 0.0));
    assert_ne!(after[1], before[1]);
}

fn zeros(lengths: &[usize]) -> Vec<Vec<f64>> {
    lengths.iter().map(|&n| vec![0.0; n]).collect()
}

#[test]
fn micro_batches_add_up_in_order_and_missing_gradients_count_as_zero() {
    // Longer than one parallel chunk, so that the split is exercised.
    let lengths = [3, 100_000];
    let (first, second) = (gradients(&lengths, 1), gradients(&lengths, 2));
    let mut sum = accumulated(&first);
    let device = Device::default();
    let second: Vec<Vec<f32>> = second.into_iter().map(|g| g.unwrap_or(vec![1.0; 3])).collect();
    sum.add(second.iter().map(|g| Some(tensor_from_vec(g.clone(), [g.len()], &device))).collect());
    let mut found = Vec::new();
    sum.for_each(|index, values| found.push((index, values.to_vec())));
    assert_eq!(found[0], (0, second[0].clone()));
    let expected: Vec<f32> = first[1].as_ref().unwrap().iter().zip(&second[1]).map(|(a, b)| a + b).collect();
    assert_eq!(found[1], (1, expected));
}
