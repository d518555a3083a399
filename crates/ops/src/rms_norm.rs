//! `y_td = x_td / sqrt(mean_d(x^2) + eps) * gamma_d`, each row on its own, in f32 whatever the precision.
//!
//! Axes: `t` rows (tokens), `d` width. Backward recomputes the row scale from `x` (one pass over a row that is in cache
//! anyway) and sums `dgamma` over fixed blocks of rows, so that threads do not change it.

use burn::backend::Dispatch;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use mixtura_kernels::norm::{rms_norm_backward, rms_norm_forward};

use crate::Numerics;
use crate::buffers::{buffer, give_back};
use crate::fused::{self, FlexOp, Fused, slice, tensor_of};

/// Root-mean-square normalisation of each row, scaled by `gamma_d`.
///
/// # Shapes
/// `[T, D]` and `[D]` give `[T, D]`.
///
/// # Panics
/// If the widths differ.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mixtura_ops::{Numerics, rms_norm};
/// let device = Device::default();
/// let x_td = Tensor::<2>::from_data([[3.0, 4.0, 0.0, 0.0]], &device);
/// let y_td = rms_norm(x_td, Tensor::ones([4], &device), 0.0, Numerics::default());
/// assert_eq!(y_td.into_data().try_to_vec::<f32>().unwrap(), [1.2, 1.6, 0.0, 0.0]);
/// ```
pub fn rms_norm(x_td: Tensor<2>, gamma_d: Tensor<1>, eps: f32, numerics: Numerics) -> Tensor<2> {
    let ([t, d], [gd]) = (x_td.dims(), gamma_d.dims());
    assert_eq!(d, gd, "rms_norm: x is [{t}, {d}], gamma is [{gd}]");
    let x = x_td.into_dispatch();
    if !fused::is_fused(&x) {
        return rms_norm_portable(Tensor::from_dispatch(x), gamma_d, eps);
    }
    Tensor::from_dispatch(Dispatch::two(x, gamma_d.into_dispatch(), RmsNorm { eps, numerics }))
}

/// [`rms_norm`] in plain Burn operations, on any device.
pub fn rms_norm_portable(x_td: Tensor<2>, gamma_d: Tensor<1>, eps: f32) -> Tensor<2> {
    let mean_square_t1 = x_td.clone().square().mean_dim(1);
    x_td / mean_square_t1.add_scalar(eps).sqrt() * gamma_d.unsqueeze()
}

/// The non-tensor part of [`rms_norm`].
pub(crate) struct RmsNorm {
    eps: f32,
    numerics: Numerics,
}

/// What backward needs of [`RmsNorm`].
pub(crate) struct Saved {
    op: RmsNorm,
    x: FlexTensor,
    gamma: FlexTensor,
}

impl FlexOp<2> for RmsNorm {
    type Saved = Saved;

    fn infer(self, [x, gamma]: [FlexTensor; 2]) -> FlexTensor {
        let [t, d] = fused::dims(&x);
        let mut y_td = buffer(t * d);
        rms_norm_forward(self.numerics.isa, slice(&x), t, d, d, slice(&gamma), self.eps, &mut y_td);
        tensor_of(y_td, [t, d])
    }

    fn forward(self, [x, gamma]: [FlexTensor; 2], _: [bool; 2]) -> (FlexTensor, Saved) {
        let op = RmsNorm { ..self };
        let y = self.infer([x.clone(), gamma.clone()]);
        (y, Saved { op, x, gamma })
    }

    fn backward(saved: Saved, dy: &FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let Saved { op, x, gamma } = saved;
        let [t, d] = fused::dims(&x);
        let (mut dx_td, mut dgamma_d) = (buffer(t * d), buffer(d));
        let isa = op.numerics.isa;
        rms_norm_backward(isa, slice(dy), slice(&x), t, d, d, slice(&gamma), op.eps, &mut dx_td, &mut dgamma_d);
        give_back(x);
        [Some(tensor_of(dx_td, [t, d])), Some(tensor_of(dgamma_d, [d]))]
    }
}
