//! The expert op in its three parts: the bits of the op in one piece, the gradients of their twins, and experts that are not all in one
//! place.

mod common;

use std::sync::Arc;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use common::{Input, PRECISIONS, check, flat, input, plan, shaped};
use mixtura_ops::{
    Activation, DispatchPlan, Numerics, PackCell, Precision, WeightedRows, combine_rows, dispatch_rows, expert_ffn,
    expert_rows, portable, with_slice,
};

const ACTIVATIONS: [Activation; 3] = [Activation::SwiGlu, Activation::Gelu, Activation::Relu];

/// x, gate_up, down and weights for three experts.
fn inputs(plan: &DispatchPlan, d: usize, f: usize, activation: Activation) -> [Input; 4] {
    let columns = if activation.is_gated() { 2 * f } else { f };
    let weight = input(4, [plan.rows()], 1.0);
    [input(1, [plan.tokens(), d], 1.0), input(2, [3, d, columns], 0.3), input(3, [3, f, d], 0.3), weight]
}

fn in_parts(
    l: &[Tensor<1>],
    [x, gate_up, down, weight]: &[Input; 4],
    plan: &Arc<DispatchPlan>,
    activation: Activation,
    numerics: Numerics,
) -> Tensor<1> {
    let (gate_up, down) = (shaped(&l[1], gate_up), shaped(&l[2], down));
    let x_nd = dispatch_rows(shaped(&l[0], x), plan);
    let (weight_n, offsets) = (shaped(&l[3], weight), plan.row_offsets().into());
    let rows = expert_rows(x_nd, gate_up, down, weight_n, &offsets, activation, &PackCell::new(), numerics);
    flat(combine_rows(rows, plan))
}

#[test]
fn the_three_parts_have_the_bits_of_the_fused_op_in_value_and_every_gradient() {
    for (precision, _) in PRECISIONS {
        for activation in ACTIVATIONS {
            for (t, d, f) in [(2, 3, 5), (37, 40, 24), (300, 33, 17)] {
                let (plan, numerics) = (Arc::new(plan(t)), Numerics::new(precision));
                let inputs = inputs(&plan, d, f, activation);
                let parts = |l: &[Tensor<1>]| in_parts(l, &inputs, &plan, activation, numerics);
                let fused = |l: &[Tensor<1>]| {
                    let [x, gate_up, down, weight] = &inputs;
                    let (x, gate_up) = (shaped(&l[0], x), shaped(&l[1], gate_up));
                    let (down, weight) = (shaped(&l[2], down), shaped(&l[3], weight));
                    flat(expert_ffn(x, gate_up, down, weight, &plan, activation, &PackCell::new(), numerics))
                };
                let what = format!("{precision} {activation:?} T{t}");
                assert_eq!(
                    common::run(&inputs, &parts, DType::F32),
                    common::run(&inputs, &fused, DType::F32),
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn the_three_parts_equal_their_twins_and_these_equal_finite_differences() {
    for (precision, tolerance) in PRECISIONS {
        for activation in ACTIVATIONS {
            let (plan, numerics) = (Arc::new(plan(37)), Numerics::new(precision));
            let inputs = inputs(&plan, 40, 24, activation);
            let parts = |l: &[Tensor<1>]| in_parts(l, &inputs, &plan, activation, numerics);
            let twins = |l: &[Tensor<1>]| {
                let [x, gate_up, down, weight] = &inputs;
                let x_nd = portable::dispatch_rows(shaped(&l[0], x), &plan);
                let (gate_up, down, weight_n) = (shaped(&l[1], gate_up), shaped(&l[2], down), shaped(&l[3], weight));
                let rows = portable::expert_rows(x_nd, gate_up, down, weight_n, plan.row_offsets(), activation);
                flat(portable::combine_rows(rows, &plan))
            };
            // ReLU has a kink, and rounding to bf16 may step over it.
            let kink = if activation == Activation::Relu && precision.is_bf16() { 3.0 } else { 1.0 };
            check(&inputs, &parts, &twins, tolerance * kink);
        }
    }
}

/// Each of the three experts alone on a rank of its own, which sees nothing but the rows that came to it, in an order that is not the
/// token's side's: the same bits as all of them in one op.
#[test]
fn experts_that_are_not_in_one_place_give_the_bits_of_those_that_are() {
    for (precision, _) in PRECISIONS {
        let (plan, numerics, activation) = (Arc::new(plan(45)), Numerics::new(precision), Activation::SwiGlu);
        let inputs = inputs(&plan, 40, 24, activation);
        let [x, gate_up, down, weight] = &inputs;
        let offsets: Vec<usize> = plan.row_offsets().iter().map(|&offset| offset as usize).collect();
        // Ranks are visited in reverse. No row comes to expert 1, so nothing is asked of it.
        let ranks = [2, 0];
        assert_eq!(offsets[1], offsets[2]);
        let sent: Vec<i64> = ranks.iter().flat_map(|&e| offsets[e] as i64..offsets[e + 1] as i64).collect();
        let mut back = vec![0i64; sent.len()];
        sent.iter().enumerate().for_each(|(at, &row)| back[row as usize] = at as i64);
        let index = |rows: &[i64], device: &Device| {
            Tensor::<1, Int>::from_data(TensorData::new(rows.to_vec(), [rows.len()]), device)
        };
        let far = |l: &[Tensor<1>]| {
            let device = l[0].device();
            let (gate_up, down): (Tensor<3>, Tensor<3>) = (shaped(&l[1], gate_up), shaped(&l[2], down));
            let weight_n: Tensor<1> = shaped(&l[3], weight);
            let x_nd = dispatch_rows(shaped(&l[0], x), &plan).select(0, index(&sent, &device));
            let travelled_n = weight_n.clone().select(0, index(&sent, &device));
            let mut start = 0;
            let answer = |e: usize| {
                let rows = offsets[e + 1] - offsets[e];
                let (x_nd, weight_n) =
                    (x_nd.clone().narrow(0, start, rows), travelled_n.clone().narrow(0, start, rows));
                start += rows;
                let (gate_up, down) = (gate_up.clone().narrow(0, e, 1), down.clone().narrow(0, e, 1));
                let own: Arc<[u32]> = Arc::new([0, rows as u32]);
                expert_rows(x_nd, gate_up, down, weight_n, &own, activation, &PackCell::new(), numerics)
            };
            let answers = WeightedRows::joined(ranks.map(answer).into());
            let home = answers.travelled(weight_n, |rows_nd| rows_nd.select(0, index(&back, &device)));
            flat(combine_rows(home, &plan))
        };
        let here = |l: &[Tensor<1>]| in_parts(l, &inputs, &plan, activation, numerics);
        assert_eq!(common::run(&inputs, &far, DType::F32), common::run(&inputs, &here, DType::F32), "{precision}");
    }
}

#[test]
fn a_plan_without_rows_gives_zeros_in_parts_too() {
    let device = Device::default().autodiff();
    let plan = Arc::new(DispatchPlan::new(2, vec![0, 0, 0], vec![], vec![0, 0, 0], vec![]));
    let x = Tensor::<2>::ones([2, 3], &device).require_grad();
    let gate_up = Tensor::<3>::ones([2, 3, 8], &device).require_grad();
    let (down, weight_n) = (Tensor::<3>::ones([2, 4, 3], &device), Tensor::<1>::zeros([0], &device));
    let x_nd = dispatch_rows(x.clone(), &plan);
    let (offsets, numerics) = (plan.row_offsets().into(), Numerics::new(Precision::Bf16));
    let swiglu = Activation::SwiGlu;
    let rows = expert_rows(x_nd, gate_up.clone(), down, weight_n, &offsets, swiglu, &PackCell::new(), numerics);
    let y = combine_rows(rows, &plan);
    with_slice(&y, |y| assert_eq!(y, [0.0; 6]));
    let gradients = y.sum().backward();
    with_slice(&x.grad(&gradients).unwrap(), |dx| assert_eq!(dx, [0.0; 6]));
    with_slice(&gate_up.grad(&gradients).unwrap(), |dw| assert_eq!(dw, [0.0; 48]));
}

#[test]
#[should_panic(expected = "expert_rows: 3 rows, 3 weights and 1 experts, but 2 row offsets end at 2")]
fn rows_that_the_offsets_do_not_count_are_refused() {
    let device = Device::default();
    let (gate_up, down) = (Tensor::<3>::ones([1, 2, 8], &device), Tensor::<3>::ones([1, 4, 2], &device));
    let (x_nd, weight_n) = (Tensor::<2>::ones([3, 2], &device), Tensor::<1>::ones([3], &device));
    let offsets: Arc<[u32]> = Arc::new([0, 2]);
    expert_rows(x_nd, gate_up, down, weight_n, &offsets, Activation::SwiGlu, &PackCell::new(), Numerics::default());
}
