//! Routers, experts, MoE layers, attention and decoder models as Burn modules.
