//! How a fused op meets Burn: an op is a [`FlexOp`], the file that defines it is all there is to it, and what follows turns its pair of
//! plain functions (`forward`, `backward`) into a node of the autodiff graph, routed by device. Nothing here knows any op.
//!
//! A call goes `Tensor -> Dispatch -> Flex` (inference: forward only, nothing kept) or
//! `Tensor -> Dispatch -> Autodiff<Flex>` (training: forward, one graph node holding what the backward pass needs).
//! Tensors on any other device never come here: the public function of each op sends them to its portable twin.
//! The way in costs about 1 us per op, so nothing is gained by making the ops coarser than the mathematics asks for.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, DispatchTensor, DispatchTensorKind, Flex, TensorMetadata, backend_extension};
use burn::tensor::{DType, Shape, TensorData};
use burn_flex::FlexTensor;

use crate::buffers::give_back;

/// The way in for a [`FlexOp`], as a Burn backend extension: one method per number of tensors. What is not a tensor is in `op`.
#[backend_extension(Autodiff, Flex)]
pub(crate) trait Fused: Backend {
    /// An op of one tensor.
    fn one<O: FlexOp<1>>(a: FloatTensor<Self>, op: O) -> FloatTensor<Self>;
    /// An op of two tensors.
    fn two<O: FlexOp<2>>(a: FloatTensor<Self>, b: FloatTensor<Self>, op: O) -> FloatTensor<Self>;
    /// An op of three tensors.
    fn three<O: FlexOp<3>>(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        op: O,
    ) -> FloatTensor<Self>;
    /// An op of four tensors.
    fn four<O: FlexOp<4>>(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        op: O,
    ) -> FloatTensor<Self>;
}

impl Fused for Flex {
    fn one<O: FlexOp<1>>(a: FlexTensor, op: O) -> FlexTensor {
        untracked(op, [a])
    }
    fn two<O: FlexOp<2>>(a: FlexTensor, b: FlexTensor, op: O) -> FlexTensor {
        untracked(op, [a, b])
    }
    fn three<O: FlexOp<3>>(a: FlexTensor, b: FlexTensor, c: FlexTensor, op: O) -> FlexTensor {
        untracked(op, [a, b, c])
    }
    fn four<O: FlexOp<4>>(a: FlexTensor, b: FlexTensor, c: FlexTensor, d: FlexTensor, op: O) -> FlexTensor {
        untracked(op, [a, b, c, d])
    }
}

/// A Flex tensor with a place in the autodiff graph.
type Node<C> = FloatTensor<Autodiff<Flex, C>>;

impl<C: CheckpointStrategy> Fused for Autodiff<Flex, C> {
    fn one<O: FlexOp<1>>(a: Node<C>, op: O) -> Node<C> {
        tracked::<C, _, 1>(op, [a])
    }
    fn two<O: FlexOp<2>>(a: Node<C>, b: Node<C>, op: O) -> Node<C> {
        tracked::<C, _, 2>(op, [a, b])
    }
    fn three<O: FlexOp<3>>(a: Node<C>, b: Node<C>, c: Node<C>, op: O) -> Node<C> {
        tracked::<C, _, 3>(op, [a, b, c])
    }
    fn four<O: FlexOp<4>>(a: Node<C>, b: Node<C>, c: Node<C>, d: Node<C>, op: O) -> Node<C> {
        tracked::<C, _, 4>(op, [a, b, c, d])
    }
}

/// An operation of `N` tensors with one result, and its vector-Jacobian product.
pub(crate) trait FlexOp<const N: usize>: Send + Sized + 'static {
    /// What the backward pass needs, tensors included; dropped as soon as it has run.
    type Saved: Send + 'static;

    /// The result. Inputs are contiguous f32; nothing is kept.
    fn infer(self, inputs: [FlexTensor; N]) -> FlexTensor;

    /// The result and what `backward` needs. `wanted[i]` says whether input `i` takes part in the backward pass.
    fn forward(self, inputs: [FlexTensor; N], wanted: [bool; N]) -> (FlexTensor, Self::Saved);

    /// The gradient of each wanted input, given the gradient of the result. What is returned for an unwanted one is dropped.
    fn backward(saved: Self::Saved, dy: &FlexTensor, wanted: [bool; N]) -> [Option<FlexTensor>; N];
}

fn untracked<O: FlexOp<N>, const N: usize>(op: O, inputs: [FlexTensor; N]) -> FlexTensor {
    op.infer(inputs.map(contiguous))
}

fn tracked<C: CheckpointStrategy, O: FlexOp<N>, const N: usize>(op: O, inputs: [Node<C>; N]) -> Node<C> {
    let mut guards = Vec::with_capacity(N);
    let primitives = inputs.map(|input| {
        let (primitive, guard) = input.into_parts();
        guards.push(guard);
        contiguous(primitive)
    });
    let Ok(guards) = guards.try_into() else { unreachable!("one guard per input") };
    // The graph does not say before `finish` which inputs are wanted, so each is assumed to be; `backward` is told exactly.
    match GraphNode::<O>(std::marker::PhantomData).prepare::<C>(guards).compute_bound().stateful() {
        OpsKind::Tracked(prepared) => {
            let (y, saved) = op.forward(primitives, [true; N]);
            prepared.finish(TakeOnce::new(saved), y)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(op.infer(primitives)),
    }
}

/// The graph node of op `O`.
struct GraphNode<O>(std::marker::PhantomData<fn() -> O>);

impl<O> fmt::Debug for GraphNode<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::any::type_name::<O>())
    }
}

impl<O: FlexOp<N>, const N: usize> Backward<Flex, N> for GraphNode<O> {
    type State = TakeOnce<O::Saved>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = contiguous(grads.consume::<Flex>(&ops.node));
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let gradients = O::backward(ops.state.take(), &dy, wanted);
        give_back(dy);
        for (parent, gradient) in ops.parents.iter().zip(gradients) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

/// A value that is moved out once. Burn wants graph state to be `Clone`; nothing large should be, so the clones share.
pub(crate) struct TakeOnce<T>(Arc<Mutex<Option<T>>>);

impl<T> TakeOnce<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Arc::new(Mutex::new(Some(value))))
    }

    pub(crate) fn take(&self) -> T {
        let value = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        value.expect("the backward pass of this op has already run, and freed what it had saved")
    }
}

impl<T> Clone for TakeOnce<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> fmt::Debug for TakeOnce<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("saved for the backward pass")
    }
}

/// The same tensor if its elements lie in order in a buffer of exactly their size, a copy otherwise.
fn contiguous(tensor: FlexTensor) -> FlexTensor {
    assert_eq!(tensor.dtype(), DType::F32, "the fused ops take f32 tensors");
    tensor.to_contiguous()
}

/// The elements of a contiguous f32 tensor.
pub(crate) fn slice(tensor: &FlexTensor) -> &[f32] {
    tensor.storage()
}

/// A tensor that takes over `values`, without a copy.
pub(crate) fn tensor_of(values: Vec<f32>, shape: impl AsRef<[usize]>) -> FlexTensor {
    let shape = shape.as_ref();
    assert_eq!(values.len(), shape.iter().product::<usize>(), "{} values do not fill shape {shape:?}", values.len());
    FlexTensor::from_data(TensorData::new(values, shape.to_vec()))
}

/// The sizes of a tensor of rank `D`.
pub(crate) fn dims<const D: usize>(tensor: &FlexTensor) -> [usize; D] {
    let shape: Shape = tensor.shape();
    shape.dims::<D>()
}

/// Whether the fused ops can run on this tensor: it lives on Flex and holds f32.
pub(crate) fn is_fused(tensor: &DispatchTensor) -> bool {
    let kind = match &tensor.kind {
        DispatchTensorKind::Autodiff(inner) => inner,
        kind => kind,
    };
    matches!(kind, DispatchTensorKind::Flex(_)) && tensor.kind.dtype() == DType::F32
}
