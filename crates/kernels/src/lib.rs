//! CPU kernels for MoE transformers on plain slices: AMX, AVX-512, AVX2 and scalar, one result.

pub mod isa;
pub mod precision;
pub mod ways;
pub mod aligned;
pub mod bf16;
pub mod lanes;
pub mod vmath;
pub mod norm;
pub mod attention;
pub mod embedding;
pub mod softmax;
pub mod cross_entropy;
pub mod adamw;
pub mod grad_norm;
pub mod pack;
pub mod gemm;
pub mod experts;
pub mod roofline;
mod kernel;
mod parallel;
pub use parallel::team;
pub mod workspace;
mod scratch;
#[cfg(test)]
mod testing;
