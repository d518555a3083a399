//! MoE and transformer operations as differentiable Burn ops.
//!
//! Each op is a function on [`Tensor`](burn::tensor::Tensor)s, in a file that opens with its formula. On the Flex backend it runs
//! the kernels of `mixtura-kernels`, with a backward pass of its own; on any other device it runs its twin in [`portable`], plain
//! Burn operations, which is also what the tests hold it against. What is not a tensor (sizes, precision, routing, packed weights)
//! is passed as plain Rust values.
//!
//! Weights are `[in, out]`; experts are `[E, in, out]`. On Flex everything between ops is f32 and row-major. Twins compute in the float
//! type of their tensors, whatever the precision, and take all their tensors on one device and of one type; [`tensor_like`] makes a
//! constant to match.

mod numerics;
mod pack_cell;
mod buffers;
mod fused;
mod sealed;
mod host;
mod lend;
mod embedding;
mod rms_norm;
mod linear;
mod attention;
mod decode;
mod dispatch_plan;
mod expert_ffn;
mod exchange;
mod cross_entropy;
mod adamw;

pub use adamw::{adamw_step, grad_norm_squared};
pub use attention::causal_attention;
pub use buffers::{limit_idle_memory, recycle};
pub use cross_entropy::{Head, IGNORED, linear_cross_entropy};
pub use decode::{KvCache, attention_decode, attention_decode_ragged};
pub use dispatch_plan::{DispatchPlan, RowIndices};
pub use embedding::{embedding, embedding_of};
pub use exchange::{WeightedRows, combine_rows, dispatch_rows, expert_rows};
pub use expert_ffn::expert_ffn;
pub use host::{host_function, host_function_2, into_vec, tensor_from_vec, tensor_like, with_slice, with_slice_mut};
pub use lend::{GradientSlot, lend_gradient, pass};
pub use linear::{linear, linear_tied};
pub use numerics::Numerics;
pub use pack_cell::{PackCell, PackRoom};
pub use rms_norm::rms_norm;
pub use sealed::{SealedWeight, held, stand_in};

pub use mixtura_kernels::adamw::AdamWParams;
pub use mixtura_kernels::attention::{AttentionSpec, KEY_BLOCK, QkNorm};
pub use mixtura_kernels::experts::{Activation, ExpertWeights};
pub use mixtura_kernels::isa::Isa;
pub use mixtura_kernels::pack::{Columns, Elements, PackedB, Source};
pub use mixtura_kernels::precision::Precision;
pub use mixtura_kernels::team;
pub use mixtura_kernels::ways::Way;

/// Every op in plain Burn operations: any device, any float type, built-in autodiff. The reference of the fused ops.
pub mod portable {
    pub use crate::attention::causal_attention_portable as causal_attention;
    pub use crate::cross_entropy::linear_cross_entropy_portable as linear_cross_entropy;
    pub use crate::embedding::embedding_portable as embedding;
    pub use crate::exchange::{
        combine_rows_portable as combine_rows, dispatch_rows_portable as dispatch_rows,
        expert_rows_portable as expert_rows,
    };
    pub use crate::expert_ffn::expert_ffn_portable as expert_ffn;
    pub use crate::lend::pass_portable as pass;
    pub use crate::linear::{linear_portable as linear, linear_tied_portable as linear_tied};
    pub use crate::rms_norm::rms_norm_portable as rms_norm;
}
