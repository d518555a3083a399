//! The experts of an MoE layer as one op: gather, gate and up projections, activation, down projection, weighted combine.
//!
//! `y_t = sum over the rows n of token t, in choice order, of weight_n * down_e(act(gate_up_e(x_t)))`, `e` the row's expert.
//!
//! Axes: `t` tokens, `d` width, `e` experts, `f` hidden width, `n` rows: the (token, choice) pairs, sorted by (expert, token).
//! Rows are ragged: no padding, no capacity, nothing dropped here. An expert without rows costs nothing and gets a zero
//! gradient. Activations kept for backward are the hidden rows only; `x` is gathered again from the tokens.

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::activation::{gelu, relu, silu};
use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};
use burn_flex::FlexTensor;
use mixtura_kernels::experts::{ExpertSaved, expert_ffn_backward, expert_ffn_forward};

use crate::buffers::{buffer, give_back};
use crate::fused::{self, FlexOp, Fused, slice, tensor_of};
use crate::sealed::{self, InferenceOp, Sealed, SealedWeight};
use crate::{Activation, DispatchPlan, Numerics, PackCell};

/// The experts of an MoE layer, from gather to weighted combine, differentiable in `x`, both weights and `weight_n`.
///
/// `gate_up_edf` holds the gate in columns `0..F` and the up projection in `F..2F`; for an activation without a gate it is
/// the up projection alone. `cell` belongs to the two weights together.
///
/// # Shapes
/// `x_td` `[T, D]`, `gate_up_edf` `[E, D, 2F]` (ungated `[E, D, F]`), `down_efd` `[E, F, D]`, `weight_n` `[N]` give `[T, D]`.
///
/// # Panics
/// If the sizes disagree with each other or with the plan.
///
/// ```
/// use std::sync::Arc;
/// use burn::tensor::{Device, Tensor};
/// use mixtura_ops::{Activation, DispatchPlan, Numerics, PackCell, expert_ffn};
/// let device = Device::default();
/// // One expert of width 1 that doubles positive inputs; one token, chosen with weight 0.5.
/// let plan = Arc::new(DispatchPlan::new(1, vec![0, 1], vec![0], vec![0, 1], vec![0]));
/// let x_td = Tensor::<2>::from_data([[3.0]], &device);
/// let (up, down) = (Tensor::<3>::ones([1, 1, 1], &device), Tensor::<3>::full([1, 1, 1], 2.0, &device));
/// let weight_n = Tensor::<1>::from_floats([0.5], &device);
/// let y_td = expert_ffn(x_td, up, down, weight_n, &plan, Activation::Relu, &PackCell::new(), Numerics::default());
/// assert_eq!(y_td.into_scalar::<f32>(), 3.0);
/// ```
pub fn expert_ffn(
    x_td: Tensor<2>,
    gate_up_edf: Tensor<3>,
    down_efd: Tensor<3>,
    weight_n: Tensor<1>,
    plan: &Arc<DispatchPlan>,
    activation: Activation,
    cell: &PackCell,
    numerics: Numerics,
) -> Tensor<2> {
    check(x_td.dims(), gate_up_edf.dims(), down_efd.dims(), weight_n.dims(), plan, activation);
    if let Some(weights) = cell.sealed() {
        return sealed_expert_ffn(x_td, weight_n, plan.clone(), weights, numerics);
    }
    let x = x_td.into_dispatch();
    if !fused::is_fused(&x) {
        return expert_ffn_portable(Tensor::from_dispatch(x), gate_up_edf, down_efd, weight_n, plan, activation);
    }
    let op = ExpertFfn { plan: plan.clone(), activation, cell: cell.clone(), numerics };
    let (gate_up, down) = (gate_up_edf.into_dispatch(), down_efd.into_dispatch());
    Tensor::from_dispatch(Dispatch::four(x, gate_up, down, weight_n.into_dispatch(), op))
}

/// [`expert_ffn`] in plain Burn operations, on any device: one pair of matrix products per expert that has rows.
pub fn expert_ffn_portable(
    x_td: Tensor<2>,
    gate_up_edf: Tensor<3>,
    down_efd: Tensor<3>,
    weight_n: Tensor<1>,
    plan: &DispatchPlan,
    activation: Activation,
) -> Tensor<2> {
    check(x_td.dims(), gate_up_edf.dims(), down_efd.dims(), weight_n.dims(), plan, activation);
    let device = x_td.device();
    // Times zero, not zeros: a token without an expert still belongs to the graph, and so do the experts that no token came to.
    let mut y_td = x_td.clone().mul_scalar(0.0);
    if plan.rows() == 0 {
        let weights = [first(gate_up_edf.clone()), first(down_efd.clone()), weight_n.clone().sum()];
        weights.into_iter().for_each(|w| y_td = y_td.clone() + w.mul_scalar(0.0).unsqueeze());
    }
    for (e, range) in plan.row_offsets().windows(2).enumerate() {
        let (start, rows) = (range[0] as usize, (range[1] - range[0]) as usize);
        if rows == 0 {
            continue;
        }
        let tokens: Vec<i64> = plan.token_of_row()[start..start + rows].iter().map(|&t| t.into()).collect();
        let tokens = Tensor::<1, Int>::from_data(TensorData::new(tokens, [rows]), &device);
        let out = network(x_td.clone().select(0, tokens.clone()), &gate_up_edf, &down_efd, e, activation);
        let weight_n1 = weight_n.clone().narrow(0, start, rows).unsqueeze_dim(1);
        y_td = y_td.select_assign(0, tokens, out * weight_n1, IndexingUpdateOp::Add);
    }
    y_td
}

/// What expert `e` answers to some rows, in plain Burn operations.
pub(crate) fn network(
    x_nd: Tensor<2>,
    gate_up_edf: &Tensor<3>,
    down_efd: &Tensor<3>,
    e: usize,
    activation: Activation,
) -> Tensor<2> {
    let [_, f, _] = down_efd.dims();
    let up = x_nd.matmul(gate_up_edf.clone().narrow(0, e, 1).squeeze_dim(0));
    let hidden = if activation.is_gated() {
        activate(up.clone().narrow(1, 0, f), activation) * up.narrow(1, f, f)
    } else {
        activate(up, activation)
    };
    hidden.matmul(down_efd.clone().narrow(0, e, 1).squeeze_dim(0))
}

/// The first element.
pub(crate) fn first(w: Tensor<3>) -> Tensor<1> {
    w.slice([0..1, 0..1, 0..1]).reshape([1])
}

fn activate(x: Tensor<2>, activation: Activation) -> Tensor<2> {
    match activation {
        Activation::SwiGlu => silu(x),
        Activation::Gelu => gelu(x),
        Activation::Relu => relu(x),
    }
}

fn check(
    [t, d]: [usize; 2],
    [ge, gd, gf]: [usize; 3],
    [e, f, dd]: [usize; 3],
    [n]: [usize; 1],
    plan: &DispatchPlan,
    activation: Activation,
) {
    let columns = if activation.is_gated() { 2 * f } else { f };
    assert!(
        (ge, gd, gf, dd) == (e, d, columns, d),
        "expert_ffn: x is [{t}, {d}], gate_up is [{ge}, {gd}, {gf}], down is [{e}, {f}, {dd}], activation {activation:?}"
    );
    let (plan_t, plan_e, plan_n) = (plan.tokens(), plan.experts(), plan.rows());
    assert!(
        (t, e, n) == (plan_t, plan_e, plan_n),
        "expert_ffn: {t} tokens, {e} experts and {n} weights, but the plan has {plan_t}, {plan_e} and {plan_n}"
    );
}

/// [`expert_ffn`] of sealed experts.
fn sealed_expert_ffn(
    x_td: Tensor<2>,
    weight_n: Tensor<1>,
    plan: Arc<DispatchPlan>,
    weights: Arc<SealedWeight>,
    numerics: Numerics,
) -> Tensor<2> {
    sealed::check_precision("expert_ffn", &weights.experts().down, numerics);
    let op = Sealed(SealedExpertFfn { plan, weights, numerics });
    Tensor::from_dispatch(Dispatch::two(sealed::on_flex("expert_ffn", x_td), weight_n.into_dispatch(), op))
}

struct SealedExpertFfn {
    plan: Arc<DispatchPlan>,
    weights: Arc<SealedWeight>,
    numerics: Numerics,
}

impl InferenceOp<2> for SealedExpertFfn {
    fn run(self, [x, weight]: [FlexTensor; 2]) -> FlexTensor {
        let experts = self.weights.experts();
        let mut y_td = buffer(self.plan.tokens() * experts.d);
        let (isa, view) = (self.numerics.isa, self.plan.view());
        expert_ffn_forward(isa, slice(&x), experts, &view, slice(&weight), &mut y_td, None);
        tensor_of(y_td, [self.plan.tokens(), experts.d])
    }
}

/// The non-tensor part of [`expert_ffn`].
pub(crate) struct ExpertFfn {
    plan: Arc<DispatchPlan>,
    activation: Activation,
    cell: PackCell,
    numerics: Numerics,
}

/// What backward needs of [`ExpertFfn`]: the weights of the forward pass themselves, so that it cannot meet others.
pub(crate) struct Saved {
    plan: Arc<DispatchPlan>,
    activation: Activation,
    numerics: Numerics,
    cell: PackCell,
    gate_up: FlexTensor,
    down: FlexTensor,
    x: FlexTensor,
    weight: FlexTensor,
    rows: ExpertSaved,
}

impl FlexOp<4> for ExpertFfn {
    type Saved = Saved;

    fn infer(self, [x, gate_up, down, weight]: [FlexTensor; 4]) -> FlexTensor {
        let [_, _, d] = fused::dims(&down);
        let packed = self.cell.experts(&gate_up, &down, self.activation, self.numerics);
        let mut y_td = buffer(self.plan.tokens() * d);
        let (isa, view) = (self.numerics.isa, self.plan.view());
        expert_ffn_forward(isa, slice(&x), &packed, &view, slice(&weight), &mut y_td, None);
        tensor_of(y_td, [self.plan.tokens(), d])
    }

    fn forward(self, [x, gate_up, down, weight]: [FlexTensor; 4], _: [bool; 4]) -> (FlexTensor, Saved) {
        let [_, _, d] = fused::dims(&down);
        let packed = self.cell.experts(&gate_up, &down, self.activation, self.numerics);
        let mut y_td = buffer(self.plan.tokens() * d);
        let mut rows = self.cell.take_rows();
        let (isa, view, saved) = (self.numerics.isa, self.plan.view(), Some(&mut rows));
        expert_ffn_forward(isa, slice(&x), &packed, &view, slice(&weight), &mut y_td, saved);
        let y = tensor_of(y_td, [self.plan.tokens(), d]);
        drop(packed);
        let Self { plan, activation, cell, numerics } = self;
        (y, Saved { plan, activation, numerics, cell, gate_up, down, x, weight, rows })
    }

    fn backward(saved: Saved, dy: &FlexTensor, _: [bool; 4]) -> [Option<FlexTensor>; 4] {
        let Saved { plan, activation, numerics, cell, gate_up, down, x, weight, rows } = saved;
        let ([e, f, d], [_, _, columns]) = (fused::dims(&down), fused::dims(&gate_up));
        let packed = cell.expert_transposes(&gate_up, &down, activation, numerics);
        let mut dx_td = buffer(plan.tokens() * d);
        let mut dgate_up_edf = buffer(e * d * columns);
        let mut ddown_efd = buffer(e * f * d);
        let mut dweight_n = buffer(plan.rows());
        expert_ffn_backward(
            numerics.isa,
            slice(dy),
            slice(&x),
            &packed,
            &plan.view(),
            slice(&weight),
            &rows,
            &mut dx_td,
            &mut dgate_up_edf,
            &mut ddown_efd,
            &mut dweight_n,
        );
        cell.give_back_rows(rows);
        give_back(x);
        give_back(weight);
        [
            Some(tensor_of(dx_td, [plan.tokens(), d])),
            Some(tensor_of(dgate_up_edf, [e, d, columns])),
            Some(tensor_of(ddown_efd, [e, f, d])),
            Some(tensor_of(dweight_n, [plan.rows()])),
        ]
    }
}
