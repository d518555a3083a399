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
use mixtura_kernels::experts::{self, ExpertSaved, expert_ffn_backward, expert_ffn_forward};

use crate::buffers::{buffer, give_back};
use crate::fused::{self, FlexOp, FusedOps, slice, tensor_of};
use crate::{Activation, Numerics, PackCell};

/// Which token each row is, and which rows each token and each expert has: all that dispatch needs of an assignment.
///
/// ```
/// use mixtura_ops::DispatchPlan;
/// // Two tokens, three experts, one choice each: token 0 goes to expert 2, token 1 to expert 0.
/// let plan = DispatchPlan::new(2, vec![0, 1, 1, 2], vec![1, 0], vec![0, 1, 2], vec![1, 0]);
/// assert_eq!((plan.tokens(), plan.experts(), plan.rows()), (2, 3, 2));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DispatchPlan {
    tokens: usize,
    row_offsets: Vec<u32>,
    token_of_row: Vec<u32>,
    token_offsets: Vec<u32>,
    row_of_choice: Vec<u32>,
}

impl DispatchPlan {
    /// Takes over the index vectors: expert `e` has rows `row_offsets[e]..row_offsets[e + 1]`, row `n` is token
    /// `token_of_row[n]`, and token `t` has the rows `row_of_choice[token_offsets[t]..token_offsets[t + 1]]`, in choice order.
    ///
    /// # Panics
    /// If the vectors contradict each other: offsets that do not ascend or end at `N`, an index out of range, or a row that
    /// its token does not list.
    pub fn new(
        tokens: usize,
        row_offsets: Vec<u32>,
        token_of_row: Vec<u32>,
        token_offsets: Vec<u32>,
        row_of_choice: Vec<u32>,
    ) -> Self {
        let rows = token_of_row.len();
        let ascends = |offsets: &[u32]| {
            offsets.first() == Some(&0)
                && offsets.is_sorted()
                && offsets.last().is_some_and(|&end| end as usize == rows)
        };
        assert!(ascends(&row_offsets), "DispatchPlan: row_offsets must ascend from 0 to {rows} rows");
        assert!(ascends(&token_offsets), "DispatchPlan: token_offsets must ascend from 0 to {rows} rows");
        assert_eq!(token_offsets.len(), tokens + 1, "DispatchPlan: {tokens} tokens need {} token_offsets", tokens + 1);
        assert_eq!(row_of_choice.len(), rows, "DispatchPlan: {} choices, {rows} rows", row_of_choice.len());
        for (t, range) in token_offsets.windows(2).enumerate() {
            for &n in &row_of_choice[range[0] as usize..range[1] as usize] {
                let owner = token_of_row.get(n as usize);
                assert_eq!(owner, Some(&(t as u32)), "DispatchPlan: token {t} lists row {n}, which is not its own");
            }
        }
        Self { tokens, row_offsets, token_of_row, token_offsets, row_of_choice }
    }

    /// Number of tokens, `T`.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Number of experts, `E`.
    pub fn experts(&self) -> usize {
        self.row_offsets.len() - 1
    }

    /// Number of rows, `N`.
    pub fn rows(&self) -> usize {
        self.token_of_row.len()
    }

    /// `[E + 1]`: where each expert's rows begin.
    pub fn row_offsets(&self) -> &[u32] {
        &self.row_offsets
    }

    /// `[N]`: the token of each row.
    pub fn token_of_row(&self) -> &[u32] {
        &self.token_of_row
    }

    /// `[T + 1]`: where each token's entries of [`row_of_choice`](Self::row_of_choice) begin.
    pub fn token_offsets(&self) -> &[u32] {
        &self.token_offsets
    }

    /// `[N]`: the rows of token 0 in choice order, then those of token 1, and so on.
    pub fn row_of_choice(&self) -> &[u32] {
        &self.row_of_choice
    }

    fn view(&self) -> experts::Dispatch<'_> {
        experts::Dispatch {
            tokens: self.tokens,
            row_offsets: &self.row_offsets,
            token_of_row: &self.token_of_row,
            token_offsets: &self.token_offsets,
            row_of_choice: &self.row_of_choice,
        }
    }
}

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
    let x = x_td.into_dispatch();
    if !fused::is_fused(&x) {
        return expert_ffn_portable(Tensor::from_dispatch(x), gate_up_edf, down_efd, weight_n, plan, activation);
    }
    let op = ExpertFfn { plan: plan.clone(), activation, cell: cell.clone(), numerics };
    let (gate_up, down) = (gate_up_edf.into_dispatch(), down_efd.into_dispatch());
    Tensor::from_dispatch(Dispatch::expert_ffn(x, gate_up, down, weight_n.into_dispatch(), op))
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
    let (device, [_, f, _]) = (x_td.device(), down_efd.dims());
    // Times zero, not zeros: a token without an expert still belongs to the graph.
    let mut y_td = x_td.clone().mul_scalar(0.0);
    for (e, range) in plan.row_offsets.windows(2).enumerate() {
        let (start, rows) = (range[0] as usize, (range[1] - range[0]) as usize);
        if rows == 0 {
            continue;
        }
        let tokens: Vec<i64> = plan.token_of_row[start..start + rows].iter().map(|&t| t.into()).collect();
        let tokens = Tensor::<1, Int>::from_data(TensorData::new(tokens, [rows]), &device);
        let up = x_td.clone().select(0, tokens.clone()).matmul(gate_up_edf.clone().narrow(0, e, 1).squeeze_dim(0));
        let hidden = if activation.is_gated() {
            activate(up.clone().narrow(1, 0, f), activation) * up.narrow(1, f, f)
        } else {
            activate(up, activation)
        };
        let out = hidden.matmul(down_efd.clone().narrow(0, e, 1).squeeze_dim(0));
        let weight_n1 = weight_n.clone().narrow(0, start, rows).unsqueeze_dim(1);
        y_td = y_td.select_assign(0, tokens, out * weight_n1, IndexingUpdateOp::Add);
    }
    y_td
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
        let mut y_td = buffer(self.plan.tokens * d);
        let (isa, view) = (self.numerics.isa, self.plan.view());
        expert_ffn_forward(isa, slice(&x), &packed, &view, slice(&weight), &mut y_td, None);
        tensor_of(y_td, [self.plan.tokens, d])
    }

    fn forward(self, [x, gate_up, down, weight]: [FlexTensor; 4], _: [bool; 4]) -> (FlexTensor, Saved) {
        let [_, _, d] = fused::dims(&down);
        let packed = self.cell.experts(&gate_up, &down, self.activation, self.numerics);
        let mut y_td = buffer(self.plan.tokens * d);
        let mut rows = self.cell.take_rows();
        let (isa, view, saved) = (self.numerics.isa, self.plan.view(), Some(&mut rows));
        expert_ffn_forward(isa, slice(&x), &packed, &view, slice(&weight), &mut y_td, saved);
        let y = tensor_of(y_td, [self.plan.tokens, d]);
        drop(packed);
        let Self { plan, activation, cell, numerics } = self;
        (y, Saved { plan, activation, numerics, cell, gate_up, down, x, weight, rows })
    }

    fn backward(saved: Saved, dy: &FlexTensor, _: [bool; 4]) -> [Option<FlexTensor>; 4] {
        let Saved { plan, activation, numerics, cell, gate_up, down, x, weight, rows } = saved;
        let ([e, f, d], [_, _, columns]) = (fused::dims(&down), fused::dims(&gate_up));
        let packed = cell.expert_transposes(&gate_up, &down, activation, numerics);
        let mut dx_td = buffer(plan.tokens * d);
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
            Some(tensor_of(dx_td, [plan.tokens, d])),
            Some(tensor_of(dgate_up_edf, [e, d, columns])),
            Some(tensor_of(ddown_efd, [e, f, d])),
            Some(tensor_of(dweight_n, [plan.rows()])),
        ]
    }
}
