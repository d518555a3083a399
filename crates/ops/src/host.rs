//! Host code as differentiable ops, and host access to tensors without copies.
//!
//! [`host_function`] makes an op of a value computed by the host and a closure for its vector-Jacobian product. It is how
//! discrete or scalar-heavy parts of a model (a router's combine weights, its balance losses) are written as plain code on
//! slices and still take part in autodiff. Their graph node lives on Flex; a tensor on another device, or of another float type,
//! goes there and back through its data, in both directions of the graph.

use burn::backend::{Dispatch, Flex};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_flex::FlexTensor;

use crate::fused::{self, FlexOp, Fused, slice, tensor_of};

/// A differentiable op of one tensor whose value the host has computed: `value`, of shape `shape`, is the result, and
/// `backward` turns the gradient of the result into the gradient of `x` (both in row-major order).
///
/// `backward` runs at most once, on the thread of the backward pass, and is dropped unused where no gradient is wanted.
///
/// # Panics
/// If `value` does not fill `shape`; in backward, if the gradient is not as long as `x`.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mixtura_ops::{host_function, with_slice};
/// let x = Tensor::<1>::from_floats([1.0, 2.0, 3.0], &Device::default().autodiff()).require_grad();
/// let kept = with_slice(&x, |x| x.to_vec());
/// let squares = kept.iter().map(|x| x * x).collect();
/// let y: Tensor<1> = host_function(x.clone(), squares, [3], move |dy| kept.iter().zip(dy).map(|(x, dy)| 2.0 * x * dy).collect());
/// let gradients = y.sum().backward();
/// assert_eq!(x.grad(&gradients).unwrap().into_data().try_to_vec::<f32>().unwrap(), [2.0, 4.0, 6.0]);
/// ```
pub fn host_function<const D: usize, const DY: usize>(
    x: Tensor<D>,
    value: Vec<f32>,
    shape: [usize; DY],
    backward: impl FnOnce(&[f32]) -> Vec<f32> + Send + 'static,
) -> Tensor<DY> {
    let (device, dtype) = (x.device(), x.dtype());
    let op = HostFunction { value: tensor_of(value, shape), backward: Box::new(|dy| [backward(dy)]) };
    let y = Tensor::from_dispatch(Dispatch::one(on_flex(x).into_dispatch(), op));
    like(y, &device, dtype)
}

/// [`host_function`] of two tensors; `backward` returns the gradients of both.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mixtura_ops::host_function_2;
/// let device = Device::default();
/// let (a, b) = (Tensor::<1>::from_floats([2.0], &device), Tensor::<1>::from_floats([3.0], &device));
/// let product: Tensor<1> = host_function_2(a, b, vec![6.0], [1], |dy| (vec![3.0 * dy[0]], vec![2.0 * dy[0]]));
/// assert_eq!(product.into_scalar::<f32>(), 6.0);
/// ```
///
/// # Panics
/// As [`host_function`].
pub fn host_function_2<const DA: usize, const DB: usize, const DY: usize>(
    a: Tensor<DA>,
    b: Tensor<DB>,
    value: Vec<f32>,
    shape: [usize; DY],
    backward: impl FnOnce(&[f32]) -> (Vec<f32>, Vec<f32>) + Send + 'static,
) -> Tensor<DY> {
    let (device, dtype) = (a.device(), a.dtype());
    let op = HostFunction { value: tensor_of(value, shape), backward: Box::new(|dy| backward(dy).into()) };
    let (a, b) = (on_flex(a).into_dispatch(), on_flex(b).into_dispatch());
    like(Tensor::from_dispatch(Dispatch::two(a, b, op)), &device, dtype)
}

/// The tensor in f32 on Flex: itself, if it is that already. Differentiable.
pub(crate) fn on_flex<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if fused::is_fused(&x.clone().into_dispatch()) { x } else { x.to_device(&Device::flex()).cast(FloatDType::F32) }
}

/// The way back: the tensor on `device`, as `dtype`. Differentiable.
pub(crate) fn like<const D: usize>(y: Tensor<D>, device: &Device, dtype: DType) -> Tensor<D> {
    if y.dtype() == dtype && y.device() == *device { y } else { y.cast(FloatDType::from(dtype)).to_device(device) }
}

/// The gradients of the inputs, given the gradient of the result.
type HostBackward<const N: usize> = Box<dyn FnOnce(&[f32]) -> [Vec<f32>; N] + Send>;

/// The value of [`host_function`] and the way back.
pub(crate) struct HostFunction<const N: usize> {
    value: FlexTensor,
    backward: HostBackward<N>,
}

impl<const N: usize> FlexOp<N> for HostFunction<N> {
    /// The way back, and the shapes of the inputs.
    type Saved = (HostBackward<N>, [Vec<usize>; N]);

    fn infer(self, _: [FlexTensor; N]) -> FlexTensor {
        self.value
    }

    fn forward(self, inputs: [FlexTensor; N], _: [bool; N]) -> (FlexTensor, Self::Saved) {
        let shapes = inputs.each_ref().map(|input| input.layout().shape().to_vec());
        (self.value, (self.backward, shapes))
    }

    fn backward((backward, shapes): Self::Saved, dy: &FlexTensor, _: [bool; N]) -> [Option<FlexTensor>; N] {
        let mut shapes = shapes.into_iter();
        backward(slice(dy)).map(|gradient| shapes.next().map(|shape| tensor_of(gradient, shape)))
    }
}

/// Calls `f` with the elements of a tensor in row-major order, rounded to f32 if they are of another float type. No copy on
/// Flex if the tensor is contiguous and f32.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// let x = Tensor::<2>::from_data([[1.0, 2.0], [3.0, 4.0]], &Device::default());
/// assert_eq!(mixtura_ops::with_slice(&x, |x| x.iter().sum::<f32>()), 10.0);
/// ```
pub fn with_slice<const D: usize, R>(tensor: &Tensor<D>, f: impl FnOnce(&[f32]) -> R) -> R {
    match tensor.clone().inner().try_into_primitive::<Flex>() {
        Ok(primitive) if primitive.dtype() == DType::F32 => f(slice(&primitive.to_contiguous())),
        _ => f(tensor.to_data().convert_dtype(DType::F32).as_slice().expect("converted to f32")),
    }
}

/// Lets `f` change the elements of a tensor (row-major), and returns the tensor.
///
/// In place on Flex if nothing else holds the tensor's buffer (clear its [`PackCell`](crate::PackCell) first); otherwise on
/// a copy, so no other holder ever sees the change. A tensor with autodiff comes back as a leaf of the same `require_grad`. A tensor of
/// another float type is rounded to f32 for `f` and comes back in its own.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// let x = Tensor::<1>::from_floats([1.0, 2.0], &Device::default());
/// let x = mixtura_ops::with_slice_mut(x, |x| x[0] = 5.0);
/// assert_eq!(x.into_data().try_to_vec::<f32>().unwrap(), [5.0, 2.0]);
/// ```
pub fn with_slice_mut<const D: usize>(tensor: Tensor<D>, f: impl FnOnce(&mut [f32])) -> Tensor<D> {
    let (autodiff, require_grad) = (tensor.is_autodiff(), tensor.is_require_grad());
    let (device, dtype) = (tensor.device().inner(), tensor.dtype());
    let tensor = tensor.inner();
    let changed = if fused::is_fused(&tensor.clone().into_dispatch()) {
        let Ok(primitive) = tensor.try_into_primitive::<Flex>() else { unreachable!("checked to live on Flex") };
        Tensor::from_primitive::<Flex>(change(primitive, f))
    } else {
        let mut data = tensor.into_data().convert_dtype(DType::F32);
        f(data.as_mut_slice().expect("converted to f32"));
        Tensor::from_data(data.convert_dtype(dtype), (&device, dtype))
    };
    if autodiff { changed.autodiff().set_require_grad(require_grad) } else { changed }
}

fn change(tensor: FlexTensor, f: impl FnOnce(&mut [f32])) -> FlexTensor {
    let shape = tensor.layout().shape().to_vec();
    let whole = tensor.is_contiguous() && tensor.storage::<f32>().len() == shape.iter().product::<usize>();
    let mut tensor = if whole { tensor } else { tensor.to_contiguous() };
    f(tensor.storage_mut());
    tensor
}

/// A tensor that takes over `values`, without a copy on Flex. It has no gradient; call `require_grad` for one.
///
/// # Panics
/// If `values` does not fill `shape`.
///
/// ```
/// use burn::tensor::Device;
/// let x = mixtura_ops::tensor_from_vec(vec![1.0, 2.0], [1, 2], &Device::default());
/// assert_eq!(x.dims(), [1, 2]);
/// ```
pub fn tensor_from_vec<const D: usize>(values: Vec<f32>, shape: [usize; D], device: &Device) -> Tensor<D> {
    assert_eq!(values.len(), shape.iter().product::<usize>(), "{} values do not fill shape {shape:?}", values.len());
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// The tensor of [`tensor_from_vec`] on the device of `other` and in its float type, so that the two can meet in an operation.
///
/// # Panics
/// If `values` does not fill `shape`.
///
/// ```
/// use burn::tensor::{DType, Device, Tensor};
/// let x = Tensor::<1>::from_data([1.0, 2.0], (&Device::default(), DType::F64));
/// let y = mixtura_ops::tensor_like(vec![3.0, 4.0], [2], &x);
/// assert_eq!((x + y).into_data().try_to_vec::<f64>().unwrap(), [4.0, 6.0]);
/// ```
pub fn tensor_like<const D: usize, const L: usize>(
    values: Vec<f32>,
    shape: [usize; D],
    other: &Tensor<L>,
) -> Tensor<D> {
    assert_eq!(values.len(), shape.iter().product::<usize>(), "{} values do not fill shape {shape:?}", values.len());
    let dtype = other.dtype();
    Tensor::from_data(TensorData::new(values, shape).convert_dtype(dtype), (&other.device(), dtype))
}

/// The elements of a tensor, in row-major order, rounded to f32 if they are of another float type. Without a copy on Flex if nothing else
/// holds the tensor's buffer.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// let x = Tensor::<1>::from_floats([1.0, 2.0], &Device::default());
/// assert_eq!(mixtura_ops::into_vec(x), [1.0, 2.0]);
/// ```
pub fn into_vec<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert_dtype(DType::F32).try_into_vec().expect("converted to f32")
}
