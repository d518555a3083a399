//! Output projection and cross-entropy in one op: `mean_t(logsumexp_v(x_t W) - (x_t W)_target)`, without ever holding `[T, V]`.
//!
//! Axes: `t` tokens, `d` width, `v` vocabulary. The kernel works over chunks of rows: logits, their softmax, and from it the
//! gradients, while the chunk is in cache. Gradients are therefore computed in the forward pass, when one is asked for;
//! backward only scales them by the gradient of the loss (which is 1 unless losses are weighted or added up).
//!
//! The weight is `[D, V]`, or with [`Head::Tied`] the embedding table `[V, D]`, used transposed.

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor, TensorData};
use burn_flex::FlexTensor;
use mixtura_kernels::cross_entropy::{self as kernel, CrossEntropy, HeadGradient};
use mixtura_kernels::pack::PackedB;

use crate::buffers::buffer;
use crate::fused::{self, FlexOp, Fused, slice, tensor_of};
use crate::pack_cell::Packed;
use crate::sealed::{self, InferenceOp, Sealed, SealedWeight};
use crate::{Numerics, PackCell};

pub use mixtura_kernels::cross_entropy::IGNORED;

/// How the output projection lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// Its own weight, `[D, V]`.
    Untied,
    /// The embedding table `[V, D]`, used transposed.
    Tied,
}

/// Mean cross-entropy of `softmax(x_td W)` against `targets_t`, over the targets that are not [`IGNORED`] (0 if all are).
///
/// # Shapes
/// `[T, D]`, `[D, V]` (or `[V, D]` with [`Head::Tied`]) and `T` targets give `[1]`.
///
/// # Panics
/// If the sizes disagree, or a target is neither below `V` nor [`IGNORED`].
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mixtura_ops::{Head, Numerics, PackCell, linear_cross_entropy};
/// let device = Device::default();
/// let (x_td, w_dv) = (Tensor::<2>::ones([3, 2], &device), Tensor::<2>::zeros([2, 4], &device));
/// let loss = linear_cross_entropy(x_td, w_dv, Head::Untied, vec![0, 1, 2].into(), &PackCell::new(), Numerics::default());
/// assert!((loss.into_scalar::<f32>() - 4f32.ln()).abs() < 1e-6);
/// ```
pub fn linear_cross_entropy(
    x_td: Tensor<2>,
    w: Tensor<2>,
    head: Head,
    targets_t: Arc<[u32]>,
    cell: &PackCell,
    numerics: Numerics,
) -> Tensor<1> {
    check(x_td.dims(), w.dims(), head, &targets_t);
    if let Some(weight) = cell.sealed() {
        return sealed_cross_entropy(x_td, weight, targets_t, numerics);
    }
    let x = x_td.into_dispatch();
    if !fused::is_fused(&x) {
        return linear_cross_entropy_portable(Tensor::from_dispatch(x), w, head, &targets_t);
    }
    let op = LinearCrossEntropy { head, targets_t, cell: cell.clone(), numerics };
    Tensor::from_dispatch(Dispatch::two(x, w.into_dispatch(), op))
}

/// [`linear_cross_entropy`] in plain Burn operations, on any device. Holds the `[T, V]` logits.
pub fn linear_cross_entropy_portable(x_td: Tensor<2>, w: Tensor<2>, head: Head, targets_t: &[u32]) -> Tensor<1> {
    check(x_td.dims(), w.dims(), head, targets_t);
    let device = x_td.device();
    let w_dv = match head {
        Head::Untied => w,
        Head::Tied => w.transpose(),
    };
    let (rows, targets): (Vec<i64>, Vec<i64>) =
        (0i64..).zip(targets_t).filter(|(_, target)| **target != IGNORED).map(|(t, &v)| (t, i64::from(v))).unzip();
    let counted = rows.len();
    if counted == 0 {
        // Both belong to the graph all the same.
        return x_td.mul_scalar(0.0).sum() + w_dv.slice([0..1, 0..1]).mul_scalar(0.0).sum();
    }
    let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [counted]), &device);
    let targets = Tensor::<2, Int>::from_data(TensorData::new(targets, [counted, 1]), &device);
    let log_p = log_softmax(x_td.select(0, rows).matmul(w_dv), 1);
    log_p.gather(1, targets).mean().neg()
}

fn check([t, d]: [usize; 2], w: [usize; 2], head: Head, targets_t: &[u32]) {
    let (wd, v) = match head {
        Head::Untied => (w[0], w[1]),
        Head::Tied => (w[1], w[0]),
    };
    assert_eq!(d, wd, "linear_cross_entropy: x is [{t}, {d}], w is {w:?} ({head:?})");
    assert_eq!(t, targets_t.len(), "linear_cross_entropy: {t} rows, {} targets", targets_t.len());
    if let Some((t, target)) = targets_t.iter().enumerate().find(|(_, y)| **y != IGNORED && **y as usize >= v) {
        panic!("linear_cross_entropy: token {t} has target {target}, the vocabulary has {v}");
    }
}

/// [`linear_cross_entropy`] of a sealed projection.
fn sealed_cross_entropy(
    x_td: Tensor<2>,
    weight: Arc<SealedWeight>,
    targets_t: Arc<[u32]>,
    numerics: Numerics,
) -> Tensor<1> {
    sealed::check_precision("linear_cross_entropy", weight.matrix(), numerics);
    let op = Sealed(SealedCrossEntropy { weight, targets_t, numerics });
    Tensor::from_dispatch(Dispatch::one(sealed::on_flex("linear_cross_entropy", x_td), op))
}

struct SealedCrossEntropy {
    weight: Arc<SealedWeight>,
    targets_t: Arc<[u32]>,
    numerics: Numerics,
}

impl InferenceOp<1> for SealedCrossEntropy {
    fn run(self, [x]: [FlexTensor; 1]) -> FlexTensor {
        let [_, d] = fused::dims(&x);
        let head = self.weight.matrix();
        let loss = kernel::linear_cross_entropy(self.numerics.isa, slice(&x), d, head, &self.targets_t, None);
        mean(loss)
    }
}

/// The non-tensor part of [`linear_cross_entropy`].
pub(crate) struct LinearCrossEntropy {
    head: Head,
    targets_t: Arc<[u32]>,
    cell: PackCell,
    numerics: Numerics,
}

impl LinearCrossEntropy {
    /// The packed weight as `[D, V]`, and as `[V, D]`.
    fn projection(&self, w: &FlexTensor) -> Packed<PackedB> {
        match self.head {
            Head::Untied => self.cell.matrix(w, self.numerics),
            Head::Tied => self.cell.matrix_transposed(w, self.numerics),
        }
    }

    fn projection_transposed(&self, w: &FlexTensor) -> Packed<PackedB> {
        match self.head {
            Head::Untied => self.cell.matrix_transposed(w, self.numerics),
            Head::Tied => self.cell.matrix(w, self.numerics),
        }
    }
}

impl FlexOp<2> for LinearCrossEntropy {
    /// The gradients of `x` and `w` for an upstream gradient of 1.
    type Saved = [FlexTensor; 2];

    fn infer(self, [x, w]: [FlexTensor; 2]) -> FlexTensor {
        let [_, d] = fused::dims(&x);
        let head = self.projection(&w);
        mean(kernel::linear_cross_entropy(self.numerics.isa, slice(&x), d, &head, &self.targets_t, None))
    }

    fn forward(self, [x, w]: [FlexTensor; 2], _: [bool; 2]) -> (FlexTensor, Self::Saved) {
        let ([t, d], shape) = (fused::dims(&x), fused::dims::<2>(&w));
        let (head, head_t) = (self.projection(&w), self.projection_transposed(&w));
        let counted = self.targets_t.iter().filter(|&&target| target != IGNORED).count();
        let (mut dx_td, mut dw) = (buffer(t * d), buffer(shape[0] * shape[1]));
        let into_dw = match self.head {
            Head::Untied => HeadGradient::InOut(&mut dw),
            Head::Tied => HeadGradient::OutIn(&mut dw),
        };
        let loss = kernel::linear_cross_entropy_forward_backward(
            self.numerics.isa,
            slice(&x),
            d,
            &head,
            &head_t,
            &self.targets_t,
            1.0 / counted.max(1) as f32,
            &mut dx_td,
            into_dw,
            None,
        );
        (mean(loss), [tensor_of(dx_td, [t, d]), tensor_of(dw, shape)])
    }

    fn backward(gradients: Self::Saved, dy: &FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let upstream = slice(dy)[0];
        gradients.map(|gradient| Some(scaled(gradient, upstream)))
    }
}

fn mean(loss: CrossEntropy) -> FlexTensor {
    tensor_of(vec![(loss.loss_sum / loss.counted.max(1) as f64) as f32], [1])
}

/// `upstream * gradient`, in place; nothing to do for the usual upstream gradient of 1.
fn scaled(mut gradient: FlexTensor, upstream: f32) -> FlexTensor {
    if upstream != 1.0 {
        gradient.storage_mut::<f32>().iter_mut().for_each(|value| *value *= upstream);
    }
    gradient
}
