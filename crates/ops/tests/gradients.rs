//! Every fused op against its portable twin (f64), in value and in each gradient; the twin against finite differences.

mod common;

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use common::{Input, PRECISIONS, check, flat, ids, input, plan, shaped};
use mixtura_ops::{
    Activation, AttentionSpec, DispatchPlan, Head, IGNORED, KvCache, Numerics, PackCell, Precision, QkNorm,
    attention_decode, causal_attention, embedding, expert_ffn, host_function, host_function_2, linear,
    linear_cross_entropy, linear_tied, portable, rms_norm, with_slice,
};

#[test]
fn linear_equals_matmul() {
    for (precision, tolerance) in PRECISIONS {
        for (t, k, n) in [(1, 1, 1), (5, 7, 3), (33, 48, 65)] {
            let inputs = [input(1, [t, k], 1.0), input(2, [k, n], 0.3)];
            let [x, w] = &inputs;
            let cell = PackCell::new();
            let fused =
                |l: &[Tensor<1>]| flat(linear(shaped(&l[0], x), shaped(&l[1], w), &cell, Numerics::new(precision)));
            let twin = |l: &[Tensor<1>]| flat(portable::linear(shaped(&l[0], x), shaped(&l[1], w)));
            check(&inputs, &fused, &twin, tolerance);
        }
    }
}

#[test]
fn a_tied_linear_multiplies_by_the_transpose() {
    for (precision, tolerance) in PRECISIONS {
        let inputs = [input(1, [9, 20], 1.0), input(2, [37, 20], 0.3)];
        let [x, w] = &inputs;
        let cell = PackCell::new();
        let fused =
            |l: &[Tensor<1>]| flat(linear_tied(shaped(&l[0], x), shaped(&l[1], w), &cell, Numerics::new(precision)));
        let twin = |l: &[Tensor<1>]| flat(portable::linear_tied(shaped(&l[0], x), shaped(&l[1], w)));
        check(&inputs, &fused, &twin, tolerance);
    }
}

#[test]
fn rms_norm_equals_its_formula() {
    for (t, d) in [(1, 2), (4, 6), (300, 33)] {
        let inputs = [input(1, [t, d], 1.0), input(2, [d], 1.0)];
        let [x, gamma] = &inputs;
        let fused = |l: &[Tensor<1>]| flat(rms_norm(shaped(&l[0], x), shaped(&l[1], gamma), 1e-5, Numerics::default()));
        let twin = |l: &[Tensor<1>]| flat(portable::rms_norm(shaped(&l[0], x), shaped(&l[1], gamma), 1e-5));
        check(&inputs, &fused, &twin, 2e-5);
    }
}

fn attention_case(spec: AttentionSpec) -> Vec<Input> {
    let qkv = input(1, [spec.tokens(), spec.qkv_width()], 1.0);
    let (h, g, p) = (spec.heads, spec.kv_heads, spec.head_dim);
    match spec.qk_norm {
        None => vec![qkv],
        Some(QkNorm::FullProjection) => vec![qkv, input(2, [h * p], 1.0), input(3, [g * p], 1.0)],
        Some(QkNorm::PerHead) => vec![qkv, input(2, [p], 1.0), input(3, [p], 1.0)],
    }
}

#[test]
fn causal_attention_equals_softmax_of_masked_scores() {
    let norms = [None, Some(QkNorm::FullProjection), Some(QkNorm::PerHead)];
    for (qk_norm, clip) in norms.into_iter().flat_map(|norm| [(norm, None), (norm, Some(0.7))]) {
        for (batch, seq, heads, kv_heads, head_dim) in [(1, 1, 1, 1, 2), (2, 5, 2, 2, 4), (2, 37, 4, 2, 8)] {
            let spec = AttentionSpec { qk_norm, clip, ..AttentionSpec::new(batch, seq, heads, kv_heads, head_dim) };
            let inputs = attention_case(spec);
            let norm = |l: &[Tensor<1>], i: usize| l.get(i).map(|leaf| shaped::<1>(leaf, &inputs[i]));
            let qkv = |l: &[Tensor<1>]| shaped::<2>(&l[0], &inputs[0]);
            let fused =
                |l: &[Tensor<1>]| flat(causal_attention(qkv(l), norm(l, 1), norm(l, 2), &spec, Numerics::default()));
            let twin = |l: &[Tensor<1>]| flat(portable::causal_attention(qkv(l), norm(l, 1), norm(l, 2), &spec));
            check(&inputs, &fused, &twin, 5e-5);
        }
    }
}

#[test]
fn decoding_token_by_token_gives_the_bits_of_the_whole_sequence() {
    let device = Device::default();
    let (qk_norm, clip) = (Some(QkNorm::PerHead), Some(0.9));
    let spec = AttentionSpec { qk_norm, clip, ..AttentionSpec::new(1, 40, 4, 2, 8) };
    let tensor =
        |i: &Input| Tensor::<1>::from_data(TensorData::new(i.values.clone(), [i.values.len()]), (&device, DType::F32));
    let case = attention_case(spec);
    let [qkv, q_norm, k_norm] = [&case[0], &case[1], &case[2]].map(tensor);
    let qkv: Tensor<2> = qkv.reshape([spec.tokens(), spec.qkv_width()]);
    let norms = || (Some(q_norm.clone()), Some(k_norm.clone()));
    let whole = causal_attention(qkv.clone(), norms().0, norms().1, &spec, Numerics::default());
    let mut caches = [KvCache::new(&spec)];
    let mut start = 0;
    for seq in [17, 1, 1, 20, 1] {
        let step = AttentionSpec { seq, ..spec };
        let rows = qkv.clone().narrow(0, start, seq);
        let out = attention_decode(rows, norms().0, norms().1, &step, &mut caches, Numerics::default());
        with_slice(&out, |out| with_slice(&whole.clone().narrow(0, start, seq), |whole| assert_eq!(out, whole)));
        start += seq;
    }
    assert_eq!(caches[0].len(), 40);
}

#[test]
fn expert_ffn_equals_one_pair_of_products_per_expert() {
    for (precision, tolerance) in PRECISIONS {
        for activation in [Activation::SwiGlu, Activation::Gelu, Activation::Relu] {
            for (t, d, f) in [(2, 3, 5), (37, 40, 24)] {
                let (plan, cell) = (Arc::new(plan(t)), PackCell::new());
                let columns = if activation.is_gated() { 2 * f } else { f };
                let inputs = [
                    input(1, [t, d], 1.0),
                    input(2, [3, d, columns], 0.3),
                    input(3, [3, f, d], 0.3),
                    input(4, [plan.rows()], 1.0),
                ];
                let [x, gate_up, down, weight] = &inputs;
                let fused = |l: &[Tensor<1>]| {
                    let (x, gate_up) = (shaped(&l[0], x), shaped(&l[1], gate_up));
                    let (down, weight) = (shaped(&l[2], down), shaped(&l[3], weight));
                    flat(expert_ffn(x, gate_up, down, weight, &plan, activation, &cell, Numerics::new(precision)))
                };
                let twin = |l: &[Tensor<1>]| {
                    let (x, gate_up) = (shaped(&l[0], x), shaped(&l[1], gate_up));
                    let (down, weight) = (shaped(&l[2], down), shaped(&l[3], weight));
                    flat(portable::expert_ffn(x, gate_up, down, weight, &plan, activation))
                };
                // ReLU has a kink, and rounding to bf16 may step over it.
                let kink = if activation == Activation::Relu && precision.is_bf16() { 3.0 } else { 1.0 };
                check(&inputs, &fused, &twin, tolerance * kink);
            }
        }
    }
}

#[test]
fn a_layer_that_routes_nothing_gives_zeros() {
    let device = Device::default().autodiff();
    let plan = Arc::new(DispatchPlan::new(2, vec![0, 0, 0], vec![], vec![0, 0, 0], vec![]));
    let x = Tensor::<2>::ones([2, 3], &device).require_grad();
    let gate_up = Tensor::<3>::ones([2, 3, 8], &device).require_grad();
    let (down, weight_n) = (Tensor::<3>::ones([2, 4, 3], &device), Tensor::<1>::zeros([0], &device));
    let (cell, numerics) = (PackCell::new(), Numerics::new(Precision::Bf16));
    let y = expert_ffn(x.clone(), gate_up.clone(), down, weight_n, &plan, Activation::SwiGlu, &cell, numerics);
    with_slice(&y, |y| assert_eq!(y, [0.0; 6]));
    let gradients = y.sum().backward();
    with_slice(&x.grad(&gradients).unwrap(), |dx| assert_eq!(dx, [0.0; 6]));
    with_slice(&gate_up.grad(&gradients).unwrap(), |dw| assert_eq!(dw, [0.0; 48]));
}

#[test]
fn linear_cross_entropy_equals_the_mean_of_log_softmax() {
    for (precision, tolerance) in PRECISIONS {
        for head in [Head::Untied, Head::Tied] {
            for (t, d, v) in [(1, 2, 3), (70, 24, 131)] {
                let shape = if head == Head::Tied { [v, d] } else { [d, v] };
                let inputs = [input(1, [t, d], 1.0), input(2, shape, 0.3)];
                let [x, w] = &inputs;
                let mut targets = ids(3, t, v as u32);
                if t > 3 {
                    targets[2] = IGNORED;
                }
                let (targets, cell): (Arc<[u32]>, _) = (targets.into(), PackCell::new());
                let fused = |l: &[Tensor<1>]| {
                    let (x, w) = (shaped(&l[0], x), shaped(&l[1], w));
                    linear_cross_entropy(x, w, head, targets.clone(), &cell, Numerics::new(precision))
                };
                let twin = |l: &[Tensor<1>]| {
                    portable::linear_cross_entropy(shaped(&l[0], x), shaped(&l[1], w), head, &targets)
                };
                check(&inputs, &fused, &twin, tolerance);
            }
        }
    }
}

#[test]
fn a_batch_without_targets_has_loss_zero_and_no_gradient() {
    let device = Device::default().autodiff();
    let x = Tensor::<2>::ones([2, 3], &device).require_grad();
    let w = Tensor::<2>::ones([3, 4], &device).require_grad();
    let targets: Arc<[u32]> = vec![IGNORED; 2].into();
    let loss = linear_cross_entropy(x.clone(), w, Head::Untied, targets, &PackCell::new(), Numerics::default());
    assert_eq!(loss.clone().into_scalar::<f32>(), 0.0);
    let gradients = loss.backward();
    with_slice(&x.grad(&gradients).unwrap(), |dx| assert!(dx.iter().all(|&g| g == 0.0)));
}

#[test]
fn embedding_gathers_rows_and_adds_up_their_gradients() {
    let inputs = [input(1, [11, 6], 1.0)];
    let rows: Arc<[u32]> = vec![3, 0, 3, 10, 3].into();
    let fused = |l: &[Tensor<1>]| flat(embedding(shaped(&l[0], &inputs[0]), rows.clone()));
    let twin = |l: &[Tensor<1>]| flat(portable::embedding(shaped(&l[0], &inputs[0]), &rows));
    check(&inputs, &fused, &twin, 1e-6);
}

#[test]
fn host_functions_backpropagate_through_their_closures() {
    let inputs = [input(1, [4], 1.0), input(2, [4], 1.0)];
    let twin = |l: &[Tensor<1>]| {
        if l[0].dtype() == DType::F64 { l[0].clone().square() * l[1].clone() } else { unreachable!() }
    };
    let fused = |l: &[Tensor<1>]| {
        let read = |leaf: &Tensor<1>| with_slice(leaf, |values| values.to_vec());
        let a = read(&l[0]);
        let square = a.iter().map(|a| a * a).collect();
        let squared: Tensor<1> =
            host_function(l[0].clone(), square, [4], move |dy| a.iter().zip(dy).map(|(a, dy)| 2.0 * a * dy).collect());
        let (a, b) = (read(&squared), read(&l[1]));
        let times = |a: &[f32], b: &[f32]| -> Vec<f32> { a.iter().zip(b).map(|(a, b)| a * b).collect() };
        host_function_2(squared, l[1].clone(), times(&a, &b), [4], move |dy| (times(&b, dy), times(&a, dy)))
    };
    check(&inputs, &fused, &twin, 1e-6);
}

/// f64 stands for any device but Flex with f32: the tensor goes to the host's node and back, its gradient too.
#[test]
fn host_functions_take_tensors_of_other_types_to_the_host_and_back() {
    let inputs = [input(1, [6], 1.0), input(2, [4], 1.0)];
    let through_host = |l: &[Tensor<1>]| {
        let read = |leaf: &Tensor<1>| with_slice(leaf, |values| values.to_vec());
        let a = read(&l[0]);
        let first = a[..4].iter().map(|a| a * a).collect();
        let squared: Tensor<1> = host_function(l[0].clone(), first, [4], move |dy| {
            let slopes = a[..4].iter().zip(dy).map(|(a, dy)| 2.0 * a * dy);
            slopes.chain([0.0; 2]).collect()
        });
        assert_eq!(squared.dtype(), l[0].dtype());
        let (a, b) = (read(&squared), read(&l[1]));
        let times = |a: &[f32], b: &[f32]| -> Vec<f32> { a.iter().zip(b).map(|(a, b)| a * b).collect() };
        host_function_2(squared, l[1].clone(), times(&a, &b), [4], move |dy| (times(&b, dy), times(&a, dy)))
    };
    let formula = |l: &[Tensor<1>]| l[0].clone().narrow(0, 0, 4).square() * l[1].clone();
    let (value, gradients) = common::run(&inputs, &through_host, DType::F64);
    let (expected, expected_gradients) = common::run(&inputs, &formula, DType::F64);
    common::assert_close("value", &value, &expected, 1e-6);
    for (found, expected) in gradients.iter().zip(&expected_gradients) {
        common::assert_close("gradient", found, expected, 1e-6);
    }
}

#[test]
fn attention_of_f64_tensors_over_a_cache_is_that_of_the_whole_sequence() {
    let spec = AttentionSpec::new(1, 5, 2, 1, 4);
    let inputs = attention_case(spec);
    let whole = |l: &[Tensor<1>]| flat(portable::causal_attention(shaped(&l[0], &inputs[0]), None, None, &spec));
    let device = Device::default();
    let data = TensorData::new(inputs[0].values.clone(), inputs[0].shape.clone());
    let qkv_tc = Tensor::<2>::from_data(data, (&device, DType::F64));
    let mut caches = [KvCache::new(&spec)];
    let out = attention_decode(qkv_tc, None, None, &spec, &mut caches, Numerics::default());
    assert_eq!((out.dtype(), caches[0].len()), (DType::F64, 5));
    let (expected, _) = common::run(&inputs, &whole, DType::F64);
    let found = out.into_data().try_to_vec::<f64>().unwrap();
    common::assert_close("value", &found, &expected, 2e-5);
}

#[test]
fn f64_tensors_run_the_portable_twin() {
    let inputs = [input(1, [3, 4], 1.0), input(2, [4, 5], 1.0)];
    let [x, w] = &inputs;
    let public = |l: &[Tensor<1>]| {
        flat(linear(shaped(&l[0], x), shaped(&l[1], w), &PackCell::new(), Numerics::new(Precision::Bf16)))
    };
    let twin = |l: &[Tensor<1>]| flat(portable::linear(shaped(&l[0], x), shaped(&l[1], w)));
    assert_eq!(common::run(&inputs, &public, DType::F64), common::run(&inputs, &twin, DType::F64));
}

#[test]
fn a_frozen_weight_gets_no_gradient_and_leaves_the_others_theirs() {
    let device = Device::default().autodiff();
    let (x, w) = (Tensor::<2>::ones([2, 3], &device).require_grad(), Tensor::<2>::ones([3, 4], &device));
    let gradients = linear(x.clone(), w.clone(), &PackCell::new(), Numerics::default()).sum().backward();
    assert!(w.grad(&gradients).is_none());
    with_slice(&x.grad(&gradients).unwrap(), |dx| assert_eq!(dx, [4.0; 6]));
}

#[test]
#[should_panic(expected = "token 1 lists row 0, which is not its own")]
fn a_plan_that_contradicts_itself_is_refused() {
    DispatchPlan::new(2, vec![0, 2], vec![0, 1], vec![0, 1, 2], vec![0, 0]);
}

#[test]
#[should_panic(expected = "linear: x is [2, 3], w is [4, 5]")]
fn a_wrong_shape_is_named() {
    let device = Device::default();
    let (x, w) = (Tensor::<2>::ones([2, 3], &device), Tensor::<2>::ones([4, 5], &device));
    linear(x, w, &PackCell::new(), Numerics::default());
}

#[test]
#[should_panic(expected = "token 1 has id 9, the vocabulary has 4")]
fn an_id_outside_the_vocabulary_is_named() {
    embedding(Tensor::<2>::ones([4, 2], &Device::default()), vec![0, 9].into());
}
