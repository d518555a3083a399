//! Root-mean-square normalisation with a learned scale: `y = x / sqrt(mean(x^2) + eps) * weight`, always in f32.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use mixtura_ops::{Numerics, rms_norm};

use crate::build::Builder;
use crate::init::Init;
use crate::role::Role;

/// What an [`RmsNorm`] is made of.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mixtura_nn::RmsNormConfig;
/// let device = Device::default();
/// let norm = RmsNormConfig::new(2).init(&device);
/// let y_td = norm.forward(Tensor::from_floats([[3.0, 4.0]], &device), Default::default());
/// // sqrt((9 + 16) / 2) = 3.536
/// mixtura_ops::with_slice(&y_td, |y| assert!((y[0] - 0.8485).abs() < 1e-4 && (y[1] - 1.1314).abs() < 1e-4));
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct RmsNormConfig {
    /// Columns D.
    pub width: usize,
    /// Added to the mean square.
    pub eps: f64,
}

impl RmsNormConfig {
    /// Rows of `width` values; `eps` is 1e-5.
    pub fn new(width: usize) -> Self {
        Self { width, eps: 1e-5 }
    }

    /// A norm whose scales are all one, with parameters on `device`.
    pub fn init(&self, device: &Device) -> RmsNorm {
        RmsNorm::new(self, &Builder::new(0, device))
    }
}

/// RMSNorm over the last axis.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// Scale of each column, `[D]`.
    pub weight: Param<Tensor<1>>,
    eps: f64,
}

impl RmsNorm {
    /// All scales one.
    pub(crate) fn new(config: &RmsNormConfig, builder: &Builder) -> Self {
        let RmsNormConfig { width, eps } = *config;
        Self { weight: builder.parameter("weight", Role::Norm, [width], Init::Ones), eps }
    }

    /// # Shapes
    /// `[T, D]` gives `[T, D]`.
    pub fn forward(&self, x_td: Tensor<2>, numerics: Numerics) -> Tensor<2> {
        rms_norm(x_td, self.weight.val(), self.eps as f32, numerics)
    }
}
