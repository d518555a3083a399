//! The expert op in three parts, for rows that travel between tokens and experts: `dispatch_rows`, `expert_rows`, `combine_rows`.
//!
//! ```text
//! x_td ── dispatch_rows ──> x_nd ── expert_rows ──> WeightedRows ── combine_rows ──> y_td
//!         gather by expert    (travel)  weight_n     (travel)         sum in choice order
//! ```
//!
//! Put together they are [`expert_ffn`](crate::expert_ffn) bit for bit, forward and backward. To be that, the product of a row with its
//! weight is put off: the combine multiplies and adds in one rounding, and on the way back the experts compute with the gradient of the
//! weighted row and the weight, never with their rounded product. So the weights go to the experts, and [`WeightedRows`] stands for the
//! products.
//!
//! Axes: `t` tokens, `d` width, `e` experts, `f` hidden width, `n` rows sorted by (expert, token).

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::{IndexingUpdateOp, Int, Tensor, TensorData};
use burn_flex::FlexTensor;
use mixtura_kernels::experts::{self, ExpertSaved, expert_rows_backward, expert_rows_forward};

use crate::buffers::{buffer, give_back};
use crate::expert_ffn::{first, network};
use crate::fused::{self, FlexOp, Fused, slice, tensor_of};
use crate::{Activation, DispatchPlan, Numerics, PackCell};

/// The input of every row: that of its token, expert by expert.
///
/// # Shapes
/// `[T, D]` gives `[N, D]`.
///
/// # Panics
/// If the plan is for another number of tokens.
///
/// ```
/// use std::sync::Arc;
/// use burn::tensor::{Device, Tensor};
/// use mixtura_ops::{DispatchPlan, dispatch_rows};
/// // Two tokens, two experts: token 0 goes to expert 1, token 1 to both.
/// let plan = Arc::new(DispatchPlan::new(2, vec![0, 1, 3], vec![1, 0, 1], vec![0, 1, 3], vec![1, 0, 2]));
/// let x_td = Tensor::<2>::from_data([[5.0], [7.0]], &Device::default());
/// assert_eq!(dispatch_rows(x_td, &plan).into_data().try_to_vec::<f32>().unwrap(), [7.0, 5.0, 7.0]);
/// ```
pub fn dispatch_rows(x_td: Tensor<2>, plan: &Arc<DispatchPlan>) -> Tensor<2> {
    let [t, _] = x_td.dims();
    assert_eq!(t, plan.tokens(), "dispatch_rows: {t} tokens, the plan is for {}", plan.tokens());
    let x = x_td.into_dispatch();
    if !fused::is_fused(&x) {
        return dispatch_rows_portable(Tensor::from_dispatch(x), plan);
    }
    Tensor::from_dispatch(Dispatch::one(x, DispatchRows(plan.clone())))
}

/// [`dispatch_rows`] in plain Burn operations, on any device.
pub fn dispatch_rows_portable(x_td: Tensor<2>, plan: &DispatchPlan) -> Tensor<2> {
    let tokens = tokens_of_rows(plan, &x_td);
    x_td.select(0, tokens)
}

fn tokens_of_rows(plan: &DispatchPlan, like: &Tensor<2>) -> Tensor<1, Int> {
    let tokens: Vec<i64> = plan.token_of_row().iter().map(|&t| t.into()).collect();
    Tensor::from_data(TensorData::new(tokens, [plan.rows()]), &like.device())
}

/// What experts answered to rows, and the weights those answers get: their products, not yet multiplied.
#[derive(Debug, Clone)]
pub struct WeightedRows {
    rows_nd: Tensor<2>,
    weight_n: Tensor<1>,
}

impl WeightedRows {
    /// Number of rows, and their width.
    pub fn dims(&self) -> [usize; 2] {
        self.rows_nd.dims()
    }

    /// The answers of experts in several places, one after another.
    ///
    /// # Panics
    /// If there are none.
    pub fn joined(parts: Vec<Self>) -> Self {
        let (rows, weights) = parts.into_iter().map(|part| (part.rows_nd, part.weight_n)).unzip();
        Self { rows_nd: Tensor::cat(rows, 0), weight_n: Tensor::cat(weights, 0) }
    }

    /// The same rows elsewhere: `travel` moves whole rows and nothing else, forward and (by its gradient) backward. `weight_n` are the
    /// weights of the rows in their new order, as the place where they arrive knows them.
    ///
    /// # Panics
    /// If there is not one weight for each row that arrives.
    pub fn travelled(self, weight_n: Tensor<1>, travel: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Self {
        let rows_nd = travel(self.rows_nd);
        let ([n, _], [weights]) = (rows_nd.dims(), weight_n.dims());
        assert_eq!(n, weights, "WeightedRows: {n} rows arrive, {weights} weights are given");
        Self { rows_nd, weight_n }
    }
}

/// The experts on rows sorted by expert: expert `e` has rows `row_offsets[e]..row_offsets[e + 1]`. Differentiable in `x_nd`, both weights and
/// `weight_n`. `cell` belongs to the two weights together, as in [`expert_ffn`](crate::expert_ffn).
///
/// # Shapes
/// `x_nd` `[N, D]`, `gate_up_edf` `[E, D, 2F]` (ungated `[E, D, F]`), `down_efd` `[E, F, D]`, `weight_n` `[N]` give `[N, D]`.
///
/// # Panics
/// If the sizes disagree with each other or with the offsets.
pub fn expert_rows(
    x_nd: Tensor<2>,
    gate_up_edf: Tensor<3>,
    down_efd: Tensor<3>,
    weight_n: Tensor<1>,
    row_offsets: &Arc<[u32]>,
    activation: Activation,
    cell: &PackCell,
    numerics: Numerics,
) -> WeightedRows {
    check(x_nd.dims(), gate_up_edf.dims(), down_efd.dims(), weight_n.dims(), row_offsets, activation);
    let x = x_nd.into_dispatch();
    if !fused::is_fused(&x) {
        let x_nd = Tensor::from_dispatch(x);
        return expert_rows_portable(x_nd, gate_up_edf, down_efd, weight_n, row_offsets, activation);
    }
    let op = ExpertRows { row_offsets: row_offsets.clone(), activation, cell: cell.clone(), numerics };
    let (gate_up, down) = (gate_up_edf.into_dispatch(), down_efd.into_dispatch());
    let rows = Dispatch::four(x, gate_up, down, weight_n.clone().into_dispatch(), op);
    WeightedRows { rows_nd: Tensor::from_dispatch(rows), weight_n }
}

/// [`expert_rows`] in plain Burn operations, on any device. The weights get their gradient from the combine, where their product is.
pub fn expert_rows_portable(
    x_nd: Tensor<2>,
    gate_up_edf: Tensor<3>,
    down_efd: Tensor<3>,
    weight_n: Tensor<1>,
    row_offsets: &[u32],
    activation: Activation,
) -> WeightedRows {
    check(x_nd.dims(), gate_up_edf.dims(), down_efd.dims(), weight_n.dims(), row_offsets, activation);
    let ranges = row_offsets.windows(2).map(|range| (range[0] as usize, (range[1] - range[0]) as usize));
    let answers = ranges
        .enumerate()
        .filter(|(_, (_, rows))| *rows > 0)
        .map(|(e, (start, rows))| network(x_nd.clone().narrow(0, start, rows), &gate_up_edf, &down_efd, e, activation));
    let answers: Vec<Tensor<2>> = answers.collect();
    let rows_nd = if answers.is_empty() {
        // No row came, but all of them belong to the graph.
        let weights = first(gate_up_edf) + first(down_efd);
        x_nd + weights.mul_scalar(0.0).unsqueeze()
    } else {
        Tensor::cat(answers, 0)
    };
    WeightedRows { rows_nd, weight_n }
}

/// Each token's sum of its weighted rows, in choice order; zero for a token without rows.
///
/// # Shapes
/// `N` rows of width `D` give `[T, D]`.
///
/// # Panics
/// If the plan has another number of rows.
pub fn combine_rows(rows: WeightedRows, plan: &Arc<DispatchPlan>) -> Tensor<2> {
    let [n, _] = rows.dims();
    assert_eq!(n, plan.rows(), "combine_rows: {n} rows, the plan has {}", plan.rows());
    let WeightedRows { rows_nd, weight_n } = rows;
    let rows = rows_nd.into_dispatch();
    if !fused::is_fused(&rows) {
        return combine_rows_portable(WeightedRows { rows_nd: Tensor::from_dispatch(rows), weight_n }, plan);
    }
    // The weights' gradient is the experts' business.
    let weight_n = crate::with_slice(&weight_n, |weight_n| weight_n.to_vec());
    Tensor::from_dispatch(Dispatch::one(rows, CombineRows { plan: plan.clone(), weight_n }))
}

/// [`combine_rows`] in plain Burn operations, on any device.
pub fn combine_rows_portable(WeightedRows { rows_nd, weight_n }: WeightedRows, plan: &DispatchPlan) -> Tensor<2> {
    let [_, d] = rows_nd.dims();
    let tokens = tokens_of_rows(plan, &rows_nd);
    let y_td = Tensor::<2>::zeros([plan.tokens(), d], (&rows_nd.device(), rows_nd.dtype()));
    if plan.rows() == 0 {
        // Nothing to add, but what was dispatched belongs to the graph.
        return y_td + (rows_nd.sum() + weight_n.sum()).mul_scalar(0.0).unsqueeze();
    }
    y_td.select_assign(0, tokens, rows_nd * weight_n.unsqueeze_dim(1), IndexingUpdateOp::Add)
}

fn check(
    [n, d]: [usize; 2],
    [ge, gd, gf]: [usize; 3],
    [e, f, dd]: [usize; 3],
    [weights]: [usize; 1],
    row_offsets: &[u32],
    activation: Activation,
) {
    let columns = if activation.is_gated() { 2 * f } else { f };
    assert!(
        (ge, gd, gf, dd) == (e, d, columns, d),
        "expert_rows: x is [{n}, {d}], gate_up is [{ge}, {gd}, {gf}], down is [{e}, {f}, {dd}], activation {activation:?}"
    );
    let end = row_offsets.last().map_or(0, |&end| end as usize);
    assert!(
        (n, n, e + 1) == (end, weights, row_offsets.len()),
        "expert_rows: {n} rows, {weights} weights and {e} experts, but {} row offsets end at {end}",
        row_offsets.len()
    );
}

/// The non-tensor part of [`dispatch_rows`].
struct DispatchRows(Arc<DispatchPlan>);

impl FlexOp<1> for DispatchRows {
    type Saved = (Arc<DispatchPlan>, usize);

    fn infer(self, [x]: [FlexTensor; 1]) -> FlexTensor {
        let [_, d] = fused::dims(&x);
        gathered(&x, d, &self.0)
    }

    fn forward(self, [x]: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, Self::Saved) {
        let [_, d] = fused::dims(&x);
        (gathered(&x, d, &self.0), (self.0, d))
    }

    fn backward((plan, d): Self::Saved, dx_nd: &FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let mut dx_td = buffer(plan.tokens() * d);
        experts::combine_rows(crate::Isa::current(), slice(dx_nd), d, &plan.view(), None, &mut dx_td);
        [Some(tensor_of(dx_td, [plan.tokens(), d]))]
    }
}

/// The row of each row's token.
fn gathered(x_td: &FlexTensor, d: usize, plan: &DispatchPlan) -> FlexTensor {
    let mut x_nd = buffer(plan.rows() * d);
    experts::gather_rows(slice(x_td), d, plan.token_of_row(), &mut x_nd);
    tensor_of(x_nd, [plan.rows(), d])
}

/// The non-tensor part of [`combine_rows`].
struct CombineRows {
    plan: Arc<DispatchPlan>,
    weight_n: Vec<f32>,
}

impl FlexOp<1> for CombineRows {
    type Saved = (Arc<DispatchPlan>, usize);

    fn infer(self, [rows]: [FlexTensor; 1]) -> FlexTensor {
        let [_, d] = fused::dims(&rows);
        let mut y_td = buffer(self.plan.tokens() * d);
        let (isa, view) = (crate::Isa::current(), self.plan.view());
        experts::combine_rows(isa, slice(&rows), d, &view, Some(&self.weight_n), &mut y_td);
        tensor_of(y_td, [self.plan.tokens(), d])
    }

    fn forward(self, [rows]: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, Self::Saved) {
        let ([_, d], plan) = (fused::dims(&rows), self.plan.clone());
        let y = self.infer([rows.clone()]);
        give_back(rows);
        (y, (plan, d))
    }

    /// The gradient of a weighted row is that of its token.
    fn backward((plan, d): Self::Saved, dy: &FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(gathered(dy, d, &plan))]
    }
}

/// The non-tensor part of [`expert_rows`].
struct ExpertRows {
    row_offsets: Arc<[u32]>,
    activation: Activation,
    cell: PackCell,
    numerics: Numerics,
}

/// What backward needs of [`ExpertRows`].
struct Saved {
    row_offsets: Arc<[u32]>,
    activation: Activation,
    numerics: Numerics,
    cell: PackCell,
    gate_up: FlexTensor,
    down: FlexTensor,
    x: FlexTensor,
    weight: FlexTensor,
    rows: ExpertSaved,
}

impl FlexOp<4> for ExpertRows {
    type Saved = Saved;

    fn infer(self, [x, gate_up, down, _]: [FlexTensor; 4]) -> FlexTensor {
        let [n, d] = fused::dims(&x);
        let packed = self.cell.experts(&gate_up, &down, self.activation, self.numerics);
        let mut rows_nd = buffer(n * d);
        expert_rows_forward(self.numerics.isa, slice(&x), &packed, &self.row_offsets, &mut rows_nd, None);
        tensor_of(rows_nd, [n, d])
    }

    fn forward(self, [x, gate_up, down, weight]: [FlexTensor; 4], _: [bool; 4]) -> (FlexTensor, Saved) {
        let [n, d] = fused::dims(&x);
        let packed = self.cell.experts(&gate_up, &down, self.activation, self.numerics);
        let mut rows_nd = buffer(n * d);
        let mut rows = self.cell.take_rows();
        expert_rows_forward(self.numerics.isa, slice(&x), &packed, &self.row_offsets, &mut rows_nd, Some(&mut rows));
        drop(packed);
        let Self { row_offsets, activation, cell, numerics } = self;
        let saved = Saved { row_offsets, activation, numerics, cell, gate_up, down, x, weight, rows };
        (tensor_of(rows_nd, [n, d]), saved)
    }

    fn backward(saved: Saved, dy: &FlexTensor, _: [bool; 4]) -> [Option<FlexTensor>; 4] {
        let Saved { row_offsets, activation, numerics, cell, gate_up, down, x, weight, rows } = saved;
        let ([n, _], [e, f, d], [_, _, columns]) = (fused::dims(&x), fused::dims(&down), fused::dims(&gate_up));
        let packed = cell.expert_transposes(&gate_up, &down, activation, numerics);
        let mut dx_nd = buffer(n * d);
        let mut dgate_up_edf = buffer(e * d * columns);
        let mut ddown_efd = buffer(e * f * d);
        let mut dweight_n = buffer(n);
        expert_rows_backward(
            numerics.isa,
            slice(dy),
            slice(&x),
            &packed,
            &row_offsets,
            slice(&weight),
            &rows,
            &mut dx_nd,
            &mut dgate_up_edf,
            &mut ddown_efd,
            &mut dweight_n,
        );
        cell.give_back_rows(rows);
        give_back(x);
        give_back(weight);
        [
            Some(tensor_of(dx_nd, [n, d])),
            Some(tensor_of(dgate_up_edf, [e, d, columns])),
            Some(tensor_of(ddown_efd, [e, f, d])),
            Some(tensor_of(dweight_n, [n])),
        ]
    }
}
