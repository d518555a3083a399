//! CPU kernels for MoE transformers on plain slices: AMX, AVX-512, AVX2 and scalar, one result.

pub mod isa;
pub mod precision;
pub mod aligned;
pub mod bf16;
