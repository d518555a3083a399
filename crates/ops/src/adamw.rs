//! The optimizer's two passes over a tensor: AdamW in place, and the squared gradient norm.
//!
//! Neither is differentiable. A step reads parameter, gradient and both moments once and writes three of them back: a second
//! buffer would cost more than the arithmetic, hence in place.

use burn::tensor::Tensor;
use mixtura_kernels::{adamw, grad_norm};

use crate::{AdamWParams, Numerics, with_slice, with_slice_mut};

/// One AdamW step: `m` and `v` are the moments (as long as the parameter, zero at first), the updated parameter is returned.
///
/// In place if nothing else holds the parameter's buffer. So [`clear`](crate::PackCell::clear) its cell, drop the graph of the
/// step, and call this inside `Param::map`, which gives the tensor away. Otherwise the parameter is copied once.
///
/// # Panics
/// If the four do not have the same number of elements.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mixtura_ops::{AdamWParams, Numerics, adamw_step};
/// let device = Device::default();
/// let (w, g) = (Tensor::<1>::ones([2], &device), Tensor::<1>::from_floats([0.5, -0.5], &device));
/// let (mut m, mut v) = (vec![0.0; 2], vec![0.0; 2]);
/// let (lr, betas, eps, weight_decay, step, grad_scale) = (0.1, (0.9, 0.95), 1e-8, 0.0, 1, 1.0);
/// let hyper = AdamWParams::at_step(lr, betas.0, betas.1, eps, weight_decay, step, grad_scale);
/// let w = adamw_step(w, &g, &mut m, &mut v, &hyper, Numerics::default());
/// let w = w.into_data().try_to_vec::<f32>().unwrap();
/// assert!((w[0] - 0.9).abs() < 1e-6 && (w[1] - 1.1).abs() < 1e-6);
/// ```
pub fn adamw_step<const D: usize>(
    param: Tensor<D>,
    grad: &Tensor<D>,
    m: &mut [f32],
    v: &mut [f32],
    hyper: &AdamWParams,
    numerics: Numerics,
) -> Tensor<D> {
    assert_eq!(param.dims(), grad.dims(), "adamw_step: parameter and gradient differ in shape");
    let elements = param.shape().num_elements();
    assert!(
        m.len() == elements && v.len() == elements,
        "adamw_step: {elements} parameters, moments of {} and {}",
        m.len(),
        v.len()
    );
    with_slice(grad, |grad| with_slice_mut(param, |param| adamw::adamw_step(numerics.isa, hyper, param, grad, m, v)))
}

/// The sum of the squares of a tensor, in one fixed order: the same on any number of threads and any instruction set.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// let g = Tensor::<1>::from_floats([3.0, 4.0], &Device::default());
/// assert_eq!(mixtura_ops::grad_norm_squared(&g, Default::default()), 25.0);
/// ```
pub fn grad_norm_squared<const D: usize>(grad: &Tensor<D>, numerics: Numerics) -> f64 {
    with_slice(grad, |grad| grad_norm::grad_norm_squared(numerics.isa, grad))
}
