//! How a fused op meets Burn: one trait with one method per op, routed by device, and one engine that turns a pair of
//! plain functions (`forward`, `backward`) into a node of the autodiff graph.
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

use crate::attention::CausalAttention;
use crate::buffers::give_back;
use crate::cross_entropy::LinearCrossEntropy;
use crate::embedding::Embedding;
use crate::expert_ffn::ExpertFfn;
use crate::host::HostFunction;
use crate::lend::{LendGradient, Pass};
use crate::linear::Linear;
use crate::rms_norm::RmsNorm;

/// The fused operations, as a Burn backend extension. `op` carries everything that is not a tensor.
#[backend_extension(Autodiff, Flex)]
pub(crate) trait FusedOps: Backend {
    /// `y_tn = x_tk w_kn`.
    fn linear(x: FloatTensor<Self>, w: FloatTensor<Self>, op: Linear) -> FloatTensor<Self>;
    /// Root-mean-square normalisation of each row.
    fn rms_norm(x: FloatTensor<Self>, gamma: FloatTensor<Self>, op: RmsNorm) -> FloatTensor<Self>;
    /// Rotary causal attention.
    fn attention(qkv: FloatTensor<Self>, op: CausalAttention) -> FloatTensor<Self>;
    /// Rotary causal attention with normalised queries and keys.
    fn attention_qk_norm(
        qkv: FloatTensor<Self>,
        q_norm: FloatTensor<Self>,
        k_norm: FloatTensor<Self>,
        op: CausalAttention,
    ) -> FloatTensor<Self>;
    /// The experts of an MoE layer, from gather to weighted combine.
    fn expert_ffn(
        x: FloatTensor<Self>,
        gate_up: FloatTensor<Self>,
        down: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        op: ExpertFfn,
    ) -> FloatTensor<Self>;
    /// Output projection and cross-entropy.
    fn linear_cross_entropy(x: FloatTensor<Self>, w: FloatTensor<Self>, op: LinearCrossEntropy) -> FloatTensor<Self>;
    /// Row lookup.
    fn embedding(w: FloatTensor<Self>, op: Embedding) -> FloatTensor<Self>;
    /// A host closure of one tensor.
    fn host_function(x: FloatTensor<Self>, op: HostFunction<1>) -> FloatTensor<Self>;
    /// A host closure of two tensors.
    fn host_function_2(a: FloatTensor<Self>, b: FloatTensor<Self>, op: HostFunction<2>) -> FloatTensor<Self>;
    /// The first tensor, with a gradient for the second.
    fn lend_gradient(x: FloatTensor<Self>, w: FloatTensor<Self>, op: LendGradient) -> FloatTensor<Self>;
    /// The tensor itself.
    fn pass(x: FloatTensor<Self>, op: Pass) -> FloatTensor<Self>;
}

impl FusedOps for Flex {
    fn linear(x: FlexTensor, w: FlexTensor, op: Linear) -> FlexTensor {
        untracked(op, [x, w])
    }
    fn rms_norm(x: FlexTensor, gamma: FlexTensor, op: RmsNorm) -> FlexTensor {
        untracked(op, [x, gamma])
    }
    fn attention(qkv: FlexTensor, op: CausalAttention) -> FlexTensor {
        untracked(op, [qkv])
    }
    fn attention_qk_norm(qkv: FlexTensor, q_norm: FlexTensor, k_norm: FlexTensor, op: CausalAttention) -> FlexTensor {
        untracked(op, [qkv, q_norm, k_norm])
    }
    fn expert_ffn(
        x: FlexTensor,
        gate_up: FlexTensor,
        down: FlexTensor,
        weight: FlexTensor,
        op: ExpertFfn,
    ) -> FlexTensor {
        untracked(op, [x, gate_up, down, weight])
    }
    fn linear_cross_entropy(x: FlexTensor, w: FlexTensor, op: LinearCrossEntropy) -> FlexTensor {
        untracked(op, [x, w])
    }
    fn embedding(w: FlexTensor, op: Embedding) -> FlexTensor {
        untracked(op, [w])
    }
    fn host_function(x: FlexTensor, op: HostFunction<1>) -> FlexTensor {
        untracked(op, [x])
    }
    fn host_function_2(a: FlexTensor, b: FlexTensor, op: HostFunction<2>) -> FlexTensor {
        untracked(op, [a, b])
    }
    fn lend_gradient(x: FlexTensor, w: FlexTensor, op: LendGradient) -> FlexTensor {
        untracked(op, [x, w])
    }
    fn pass(x: FlexTensor, op: Pass) -> FlexTensor {
        untracked(op, [x])
    }
}

/// A Flex tensor with a place in the autodiff graph.
type Node<C> = FloatTensor<Autodiff<Flex, C>>;

impl<C: CheckpointStrategy> FusedOps for Autodiff<Flex, C> {
    fn linear(x: Node<C>, w: Node<C>, op: Linear) -> Node<C> {
        tracked::<C, _, 2>(op, [x, w])
    }
    fn rms_norm(x: Node<C>, gamma: Node<C>, op: RmsNorm) -> Node<C> {
        tracked::<C, _, 2>(op, [x, gamma])
    }
    fn attention(qkv: Node<C>, op: CausalAttention) -> Node<C> {
        tracked::<C, _, 1>(op, [qkv])
    }
    fn attention_qk_norm(qkv: Node<C>, q_norm: Node<C>, k_norm: Node<C>, op: CausalAttention) -> Node<C> {
        tracked::<C, _, 3>(op, [qkv, q_norm, k_norm])
    }
    fn expert_ffn(x: Node<C>, gate_up: Node<C>, down: Node<C>, weight: Node<C>, op: ExpertFfn) -> Node<C> {
        tracked::<C, _, 4>(op, [x, gate_up, down, weight])
    }
    fn linear_cross_entropy(x: Node<C>, w: Node<C>, op: LinearCrossEntropy) -> Node<C> {
        tracked::<C, _, 2>(op, [x, w])
    }
    fn embedding(w: Node<C>, op: Embedding) -> Node<C> {
        tracked::<C, _, 1>(op, [w])
    }
    fn host_function(x: Node<C>, op: HostFunction<1>) -> Node<C> {
        tracked::<C, _, 1>(op, [x])
    }
    fn host_function_2(a: Node<C>, b: Node<C>, op: HostFunction<2>) -> Node<C> {
        tracked::<C, _, 2>(op, [a, b])
    }
    fn lend_gradient(x: Node<C>, w: Node<C>, op: LendGradient) -> Node<C> {
        tracked::<C, _, 2>(op, [x, w])
    }
    fn pass(x: Node<C>, op: Pass) -> Node<C> {
        tracked::<C, _, 1>(op, [x])
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
