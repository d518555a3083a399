//! CPU kernels for MoE transformers on plain slices: AMX, AVX-512, AVX2 and scalar, one result.
