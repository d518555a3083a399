//! How the rows of a layer reach their experts and come back: the one place that knows.
//!
//! A layer routes its own tokens and adds up its own rows, wherever the experts are. In between is an [`Exchange`]; all of them give the same
//! bits, forward and backward.
//!
//! Legend: T tokens, D model width, N rows (token, choice pairs).

use std::sync::Arc;

use burn::tensor::Tensor;
use mixtura_ops::{DispatchPlan, Numerics, combine_rows, dispatch_rows};

use crate::ffn::Experts;

/// How rows reach their experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Exchange {
    /// The experts are here, and the whole way is one op that never holds the gathered rows.
    #[default]
    Local,
    /// The experts are here, but the rows are gathered, computed and combined by three ops: the way of rows that travel, without the journey.
    Rows,
}

impl Exchange {
    /// `y_t = sum over the rows n of token t of weight_n * expert_e(n)(x_t)`, choices added in their order.
    ///
    /// # Shapes
    /// `[T, D]` and `[N]` give `[T, D]`.
    pub(crate) fn run(
        self,
        experts: &Experts,
        x_td: Tensor<2>,
        weight_n: Tensor<1>,
        plan: DispatchPlan,
        numerics: Numerics,
    ) -> Tensor<2> {
        let plan = Arc::new(plan);
        match self {
            Self::Local => experts.forward(x_td, weight_n, &plan, numerics),
            Self::Rows => {
                let x_nd = dispatch_rows(x_td, &plan);
                let rows = experts.forward_rows(x_nd, weight_n, &plan.row_offsets().into(), numerics);
                combine_rows(rows, &plan)
            }
        }
    }
}
