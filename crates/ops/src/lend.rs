//! Gradients found outside the graph: a tensor that passes through unchanged, and a parameter whose gradient somebody else
//! computes before the backward pass comes by.
//!
//! Activation checkpointing runs a part of the model again during the backward pass, on a graph of its own. That graph finds
//! the gradients of the part's parameters, which the outer graph does not know to be involved. So the part's input first goes
//! through one [`lend_gradient`] per parameter: in the backward pass, which comes through here after the part itself, each
//! hands its parameter what the slot then holds.

use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::{Dispatch, Flex};
use burn::tensor::{DType, Device, Tensor};
use burn_flex::FlexTensor;

use crate::fused::{self, FlexOp, Fused};
use crate::host::{like, on_flex};

/// Where a gradient waits to be picked up. Clones share the place.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mixtura_ops::{GradientSlot, host_function, lend_gradient, tensor_from_vec};
/// let device = Device::default().autodiff();
/// let (x, w) = (Tensor::<1>::ones([1], &device).require_grad(), Tensor::<1>::ones([2], &device).require_grad());
/// let slot = GradientSlot::default();
/// let filled = slot.clone();
/// let part = host_function(lend_gradient(x, &w, &slot), vec![5.0], [1], move |dy| {
///     filled.fill(tensor_from_vec(vec![3.0 * dy[0], 4.0 * dy[0]], [2], &Device::default()));
///     dy.to_vec()
/// });
/// let gradient = w.grad(&Tensor::<1>::backward(&part)).unwrap();
/// assert_eq!(gradient.into_data().try_to_vec::<f32>().unwrap(), [3.0, 4.0]);
/// ```
#[derive(Debug, Clone, Default)]
pub struct GradientSlot(Arc<Mutex<Option<FlexTensor>>>);

impl GradientSlot {
    /// Puts a gradient in, in place of any that was there. From another device than Flex it comes as its values in f32.
    pub fn fill<const D: usize>(&self, gradient: Tensor<D>) {
        let Ok(gradient) = on_flex(gradient.inner()).try_into_primitive::<Flex>() else {
            unreachable!("moved to Flex")
        };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(gradient);
    }

    fn take(&self) -> Option<FlexTensor> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// `x`, and in the backward pass the gradient in `slot` for `w`; none if it is empty then. A gradient must have `w`'s shape.
///
/// Elsewhere than on Flex, `x` stays where it is and gets a zero added, whose gradient brings the slot's along; `w` goes to the host and
/// back, as with [`host_function`](crate::host_function).
pub fn lend_gradient<const D: usize, const P: usize>(x: Tensor<D>, w: &Tensor<P>, slot: &GradientSlot) -> Tensor<D> {
    let (device, dtype) = (x.device(), x.dtype());
    let x = x.into_dispatch();
    let (op, on_host) = (LendGradient(slot.clone()), on_flex(w.clone()).into_dispatch());
    if fused::is_fused(&x) {
        return Tensor::from_dispatch(Dispatch::two(x, on_host, op));
    }
    let host = if device.is_autodiff() { Device::flex().autodiff() } else { Device::flex() };
    let zero = Tensor::<1>::zeros([1], (&host, DType::F32)).into_dispatch();
    let zero = Tensor::<1>::from_dispatch(Dispatch::two(zero, on_host, op));
    Tensor::from_dispatch(x) + like(zero, &device, dtype).reshape([1; D])
}

/// `x` itself as a node of its own. The gradients of a tensor with three users add in the order in which the backward pass meets
/// them; with a node between the first user and the rest, no tensor has more than two, and the order cannot matter.
pub fn pass<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let x = x.into_dispatch();
    if !fused::is_fused(&x) {
        return pass_portable(Tensor::from_dispatch(x));
    }
    Tensor::from_dispatch(Dispatch::one(x, Pass))
}

/// [`pass`] in plain Burn operations, on any device: a reshape to the shape it has, which moves nothing and is a node.
pub fn pass_portable<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let shape = x.dims();
    x.reshape(shape)
}

/// The non-tensor part of [`pass`].
pub(crate) struct Pass;

impl FlexOp<1> for Pass {
    type Saved = ();

    fn infer(self, [x]: [FlexTensor; 1]) -> FlexTensor {
        x
    }

    fn forward(self, [x]: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, ()) {
        (x, ())
    }

    fn backward((): (), dy: &FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(dy.clone())]
    }
}

/// The non-tensor part of [`lend_gradient`].
pub(crate) struct LendGradient(GradientSlot);

impl FlexOp<2> for LendGradient {
    type Saved = GradientSlot;

    fn infer(self, [x, _]: [FlexTensor; 2]) -> FlexTensor {
        x
    }

    fn forward(self, [x, _]: [FlexTensor; 2], _: [bool; 2]) -> (FlexTensor, GradientSlot) {
        (x, self.0)
    }

    fn backward(slot: GradientSlot, dy: &FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        [Some(dy.clone()), slot.take()]
    }
}
