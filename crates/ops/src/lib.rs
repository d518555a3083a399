//! MoE and transformer operations as differentiable Burn ops.
