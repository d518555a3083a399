//! Mixtura, the Mixture-of-Experts toolkit for Rust: the library facade.
//!
//! Each crate of the workspace under a short name. Most programs need [`nn`] (an MoE layer for any Burn model, or a whole decoder),
//! [`train`] (a run from a config) or [`routing`] (the executable specification).

pub use mixtura_checkpoint as checkpoint;
pub use mixtura_data as data;
pub use mixtura_kernels as kernels;
pub use mixtura_nn as nn;
pub use mixtura_ops as ops;
pub use mixtura_routing as routing;
pub use mixtura_train as train;
