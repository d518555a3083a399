//! The executable specification of MoE routing: scores to assignments, balance losses, statistics.
