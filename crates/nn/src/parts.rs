//! Layers whose rows are not all computed by one block of equal experts: how rows are split, and what the rows of experts
//! without a network give.
//!
//! ```text
//! y_td = block 0 (its rows) + block 1 (its rows) + ... + a_t x_td + b_tc value_cd
//! ```
//!
//! Blocks come in the order of their first expert, and within a block a token's choices are added in their order, so the sum
//! has one order. `a_t` and `b_tc` gather what copy and constant experts contribute; zero experts contribute nothing. None of
//! these rows enters an expert kernel.
//!
//! Legend: T tokens, D model width, E experts, N rows, C constant experts.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use mixtura_ops::{DispatchPlan, Numerics, PackCell, Precision, host_function, host_function_2, linear, with_slice};
use mixtura_routing::activation::{sigmoid, softmax};
use mixtura_routing::zero_cost::{ZeroComputation, ZeroCost};
use mixtura_routing::{Assignment, Routed};

use crate::build::Builder;
use crate::init::Init;
use crate::role::Role;

/// Experts grouped by hidden width, in the order of their first expert: (width, experts).
pub(crate) fn blocks(width_e: &[usize]) -> Vec<(usize, Vec<usize>)> {
    let mut blocks: Vec<(usize, Vec<usize>)> = Vec::new();
    for (expert, &width) in width_e.iter().enumerate() {
        match blocks.iter_mut().find(|(of, _)| *of == width) {
            Some((_, experts)) => experts.push(expert),
            None => blocks.push((width, vec![expert])),
        }
    }
    blocks
}

/// The rows of some experts alone: how to dispatch them, and which row of the whole each one is.
pub(crate) fn part(assignment: &Assignment, experts: &[usize]) -> (DispatchPlan, Vec<u32>) {
    let mut row_offsets = vec![0];
    let mut row_of_part = Vec::new();
    let mut part_of_row = vec![u32::MAX; assignment.rows()];
    for &expert in experts {
        for row in assignment.rows_of_expert(expert) {
            part_of_row[row] = row_of_part.len() as u32;
            row_of_part.push(row as u32);
        }
        row_offsets.push(row_of_part.len() as u32);
    }
    let token_of_row = row_of_part.iter().map(|&row| assignment.token_of_row[row as usize]).collect();
    let mut token_offsets = vec![0];
    let mut row_of_choice = Vec::with_capacity(row_of_part.len());
    for t in 0..assignment.tokens {
        let rows = assignment.rows_of_token(t).iter().map(|&row| part_of_row[row as usize]);
        row_of_choice.extend(rows.filter(|&row| row != u32::MAX));
        token_offsets.push(row_of_choice.len() as u32);
    }
    let plan = DispatchPlan::new(assignment.tokens, row_offsets, token_of_row, token_offsets, row_of_choice);
    (plan, row_of_part)
}

/// The weights of some rows.
pub(crate) fn weights_of(weight_n: Tensor<1>, rows: Vec<u32>) -> Tensor<1> {
    let [all] = weight_n.dims();
    let value: Vec<f32> = with_slice(&weight_n, |w| rows.iter().map(|&row| w[row as usize]).collect());
    let shape = [value.len()];
    host_function(weight_n, value, shape, move |dy| {
        let mut dweight = vec![0.0; all];
        rows.iter().zip(dy).for_each(|(&row, d)| dweight[row as usize] = *d);
        dweight
    })
}

/// BASE layers answer `w E(x) + (1 - w) x`: the factor of x, `[T, 1]`, 0 for a token without a row.
pub(crate) fn rest_of_weight(weight_n: Tensor<1>, routed: &Arc<Routed<f32>>) -> Tensor<2> {
    let tokens = routed.shape.tokens;
    let mut value = vec![0.0; tokens];
    with_slice(&weight_n, |w| {
        let rows = routed.assignment.token_of_row.iter().zip(w);
        rows.for_each(|(&t, w)| value[t as usize] += 1.0 - w);
    });
    let routed = routed.clone();
    host_function(weight_n, value, [tokens, 1], move |dy| {
        routed.assignment.token_of_row.iter().map(|&t| -dy[t as usize]).collect()
    })
}

/// What the experts without a network learn (MoE++): the constant ones `a1 x + a2 v`, `[a1, a2] = softmax(x mix)`.
#[derive(Module, Debug)]
pub struct ZeroExperts {
    /// `[D, 2 C]`, two columns for each constant expert: the logits of its a1 and a2; absent without constant experts.
    pub mix: Option<Param<Tensor<2>>>,
    /// The constants v, `[C, D]`.
    pub value: Option<Param<Tensor<2>>>,
    #[module(skip)]
    kinds: ZeroComputation,
    #[module(skip)]
    cells: Cells,
}

#[derive(Debug, Clone, Default)]
struct Cells {
    mix: PackCell,
    value: PackCell,
}

impl ZeroExperts {
    pub(crate) fn new(kinds: ZeroComputation, d_model: usize, init_std: f64, builder: &Builder) -> Self {
        let (constants, init) = (kinds.constant, Init::TruncatedNormal(init_std));
        Self {
            mix: (constants > 0).then(|| builder.parameter("mix", Role::Expert, [d_model, 2 * constants], init)),
            value: (constants > 0).then(|| builder.parameter("value", Role::Expert, [constants, d_model], init)),
            kinds,
            cells: Cells::default(),
        }
    }

    /// How many numbers they hold.
    pub(crate) fn parameters(kinds: &ZeroComputation, d_model: usize) -> usize {
        3 * kinds.constant * d_model
    }

    /// Their share of the layer's output, `[T, D]`; `networks` experts come before them.
    pub(crate) fn forward(
        &self,
        x_td: Tensor<2>,
        weight_n: Tensor<1>,
        routed: &Arc<Routed<f32>>,
        numerics: Numerics,
    ) -> Tensor<2> {
        let exact = Numerics { precision: Precision::F32, ..numerics };
        let rows = Rows::of(&routed.assignment, &self.kinds);
        let (Some(mix), Some(value)) = (&self.mix, &self.value) else {
            return copies(weight_n, rows) * x_td;
        };
        let logits_tc = linear(x_td.clone(), mix.val(), &self.cells.mix, exact);
        let factors = constants(weight_n, logits_tc, rows);
        let [_, all] = factors.dims();
        let constant_td = linear(factors.clone().narrow(1, 1, all - 1), value.val(), &self.cells.value, exact);
        factors.narrow(1, 0, 1) * x_td + constant_td
    }

    pub(crate) fn for_each_cell(&self, f: &mut dyn FnMut(&PackCell)) {
        f(&self.cells.mix);
        f(&self.cells.value);
    }
}

/// One row of an expert without a network that gives something.
#[derive(Debug, Clone, Copy)]
struct Row {
    row: u32,
    token: u32,
    /// Which constant expert; `None` copies.
    constant: Option<usize>,
}

/// All such rows, by token and then in choice order: the order in which a token's contributions are added.
#[derive(Debug, Clone)]
struct Rows {
    tokens: usize,
    constants: usize,
    rows: Vec<Row>,
    all: usize,
}

impl Rows {
    fn of(assignment: &Assignment, kinds: &ZeroComputation) -> Self {
        let first = kinds.networks(assignment.experts);
        let expert_of_row = assignment.expert_of_row();
        let row = |token: usize, row: u32| {
            let index = (expert_of_row[row as usize] as usize).checked_sub(first)?;
            let constant = match kinds.kind(index) {
                ZeroCost::Constant => Some(index),
                ZeroCost::Copy => None,
                ZeroCost::Zero => return None,
            };
            Some(Row { row, token: token as u32, constant })
        };
        let of_token = |t: usize| assignment.rows_of_token(t).iter().filter_map(move |&n| row(t, n));
        let rows = (0..assignment.tokens).flat_map(of_token).collect();
        Self { tokens: assignment.tokens, constants: kinds.constant, rows, all: assignment.rows() }
    }
}

/// Sum of each token's weights at copy experts, `[T, 1]`.
fn copies(weight_n: Tensor<1>, rows: Rows) -> Tensor<2> {
    let mut value = vec![0.0; rows.tokens];
    with_slice(&weight_n, |w| rows.rows.iter().for_each(|at| value[at.token as usize] += w[at.row as usize]));
    host_function(weight_n, value, [rows.tokens, 1], move |dy| {
        let mut dweight = vec![0.0; rows.all];
        rows.rows.iter().for_each(|at| dweight[at.row as usize] = dy[at.token as usize]);
        dweight
    })
}

/// The factor of x, and of each constant, `[T, 1 + C]`.
fn constants(weight_n: Tensor<1>, logits_tc: Tensor<2>, rows: Rows) -> Tensor<2> {
    let width = 1 + rows.constants;
    let logits: Arc<[f32]> = with_slice(&logits_tc, |logits| logits.into());
    let weights: Arc<[f32]> = with_slice(&weight_n, |weights| weights.into());
    // a1 of constant c for token t; a2 is the rest.
    let (seen, constants) = (logits.clone(), rows.constants);
    let first = move |t: usize, c: usize| {
        let pair = &seen[(t * constants + c) * 2..][..2];
        sigmoid(pair[0] - pair[1])
    };
    let mut value = vec![0.0; rows.tokens * width];
    for at in &rows.rows {
        let (t, w) = (at.token as usize, weights[at.row as usize]);
        match at.constant {
            None => value[t * width] += w,
            Some(c) => {
                let a1 = first(t, c);
                value[t * width] += w * a1;
                value[t * width + 1 + c] += w * (1.0 - a1);
            }
        }
    }
    host_function_2(weight_n, logits_tc, value, [rows.tokens, width], move |dy| {
        let (mut dweight, mut dlogits) = (vec![0.0; rows.all], vec![0.0; logits.len()]);
        for at in &rows.rows {
            let (t, n) = (at.token as usize, at.row as usize);
            let dx = dy[t * width];
            match at.constant {
                None => dweight[n] = dx,
                Some(c) => {
                    let (a1, dv) = (first(t, c), dy[t * width + 1 + c]);
                    dweight[n] = dx * a1 + dv * (1.0 - a1);
                    let d = weights[n] * a1 * (1.0 - a1) * (dx - dv);
                    dlogits[(t * constants + c) * 2] += d;
                    dlogits[(t * constants + c) * 2 + 1] -= d;
                }
            }
        }
        (dweight, dlogits)
    })
}

/// The mixture of a Residual-MoE layer, `softmax(x W + b)`: column 0 weighs the experts, column 1 the dense network.
#[derive(Module, Debug)]
pub struct ResidualGate {
    /// `[D, 2]`.
    pub weight: Param<Tensor<2>>,
    /// `[2]`.
    pub bias: Param<Tensor<1>>,
    #[module(skip)]
    cell: PackCell,
}

impl ResidualGate {
    pub(crate) fn new(d_model: usize, init_std: f64, builder: &Builder) -> Self {
        Self {
            weight: builder.parameter("weight", Role::Mixture, [d_model, 2], Init::TruncatedNormal(init_std)),
            bias: builder.parameter("bias", Role::Mixture, [2], Init::Zeros),
            cell: PackCell::new(),
        }
    }

    /// How many numbers it holds.
    pub(crate) fn parameters(d_model: usize) -> usize {
        2 * d_model + 2
    }

    /// `c0 routed + c1 dense`, both `[T, D]`.
    pub(crate) fn forward(
        &self,
        x_td: Tensor<2>,
        routed_td: Tensor<2>,
        dense_td: Tensor<2>,
        numerics: Numerics,
    ) -> Tensor<2> {
        let exact = Numerics { precision: Precision::F32, ..numerics };
        let logits_t2 = linear(x_td, self.weight.val(), &self.cell, exact) + self.bias.val().unsqueeze();
        let shape = logits_t2.dims();
        let mut probs = vec![0.0f32; shape[0] * 2];
        with_slice(&logits_t2, |logits| {
            for (row, out) in logits.chunks_exact(2).zip(probs.chunks_exact_mut(2)) {
                softmax(row, out);
            }
        });
        let kept: Arc<[f32]> = probs.as_slice().into();
        let coefficient_t2 = host_function(logits_t2, probs, shape, move |dy| {
            let mut dlogits = Vec::with_capacity(dy.len());
            for (p, d) in kept.chunks_exact(2).zip(dy.chunks_exact(2)) {
                let slope = p[0] * p[1] * (d[0] - d[1]);
                dlogits.extend([slope, -slope]);
            }
            dlogits
        });
        coefficient_t2.clone().narrow(1, 0, 1) * routed_td + coefficient_t2.narrow(1, 1, 1) * dense_td
    }

    pub(crate) fn for_each_cell(&self, f: &mut dyn FnMut(&PackCell)) {
        f(&self.cell);
    }
}
