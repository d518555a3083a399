//! Root-mean-square normalisation with a learned scale: `y = x / sqrt(mean(x^2) + eps) * weight`, always in f32.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use mixtura_ops::{Numerics, rms_norm};

use crate::build::Builder;
use crate::init::Init;
use crate::role::Role;

/// RMSNorm over the last axis.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// Scale of each column, `[D]`.
    pub weight: Param<Tensor<1>>,
    eps: f64,
}

impl RmsNorm {
    /// All scales one.
    pub fn new(width: usize, eps: f64, builder: &Builder) -> Self {
        Self { weight: builder.parameter("weight", Role::Norm, [width], Init::Ones), eps }
    }

    /// # Shapes
    /// `[T, D]` gives `[T, D]`.
    pub fn forward(&self, x_td: Tensor<2>, numerics: Numerics) -> Tensor<2> {
        rms_norm(x_td, self.weight.val(), self.eps as f32, numerics)
    }
}
