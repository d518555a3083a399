//! Weights that exist only as the kernels read them: for inference, where nothing changes a weight and a second copy of it would be
//! half of the memory.
//!
//! A sealed [`PackCell`](crate::PackCell) holds the weight itself. The tensor that its module keeps beside it is a [`stand_in`]: of the weight's shape, with
//! the memory of one number. Ops never read the stand-in of a sealed weight, have no backward pass for it, and give the bits that they give
//! for the tensor it stands for.

use burn::backend::{DispatchTensor, Flex};
use burn::tensor::{Device, Tensor};
use burn_flex::FlexTensor;
use mixtura_kernels::experts::ExpertWeights;
use mixtura_kernels::pack::PackedB;

use crate::Numerics;
use crate::fused::{self, FlexOp};

/// A weight as the kernels read it.
#[derive(Debug)]
pub enum SealedWeight {
    /// `[in, out]`, the right operand of [`linear`](crate::linear).
    Matrix(PackedB),
    /// The transpose, `[D, V]`, of an embedding table that is the output projection too: its columns are the table's rows.
    Tied(PackedB),
    /// The same, rounded: tokens are looked up in the table itself, which stays beside the cell.
    Projection(PackedB),
    /// The experts of a layer, or a dense network.
    Experts(ExpertWeights),
    /// An embedding table in bf16, `[V, D]`.
    Table(Vec<u16>),
}

impl SealedWeight {
    /// Memory held.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Matrix(packed) | Self::Tied(packed) | Self::Projection(packed) => packed.bytes(),
            Self::Experts(experts) => experts.bytes(),
            Self::Table(rows) => size_of_val(&rows[..]),
        }
    }

    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Matrix(_) => "a matrix",
            Self::Tied(_) | Self::Projection(_) => "a tied embedding",
            Self::Experts(_) => "experts",
            Self::Table(_) => "an embedding table",
        }
    }
}

/// A tensor of this shape with the memory of one number, in place of a weight that is sealed.
pub fn stand_in<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::<D>::zeros([1; D], device).expand(shape)
}

/// How many numbers a tensor holds in memory: 1 for a [`stand_in`].
pub fn held<const D: usize>(tensor: &Tensor<D>) -> usize {
    match tensor.clone().inner().try_into_primitive::<Flex>() {
        Ok(primitive) => primitive.data_arc().len() / size_of::<f32>(),
        Err(_) => tensor.shape().num_elements(),
    }
}

pub(crate) fn on_flex<const D: usize>(op: &str, x: Tensor<D>) -> DispatchTensor {
    let x = x.into_dispatch();
    assert!(fused::is_fused(&x), "{op}: sealed weights are for f32 tensors on Flex");
    x
}

pub(crate) fn check_precision(op: &str, packed: &PackedB, numerics: Numerics) {
    let (found, asked) = (packed.precision(), numerics.precision);
    assert_eq!(found, asked, "{op}: the weight was sealed for {found}, the forward pass is in {asked}");
}

impl SealedWeight {
    pub(crate) fn matrix(&self) -> &PackedB {
        match self {
            Self::Matrix(packed) | Self::Tied(packed) | Self::Projection(packed) => packed,
            other => panic!("a matrix was asked for, the cell was sealed with {}", other.kind()),
        }
    }

    pub(crate) fn experts(&self) -> &ExpertWeights {
        match self {
            Self::Experts(experts) => experts,
            other => panic!("experts were asked for, the cell was sealed with {}", other.kind()),
        }
    }
}

/// An op of sealed weights: forward only.
pub(crate) trait InferenceOp<const N: usize>: Send + Sized + 'static {
    /// The result.
    fn run(self, inputs: [FlexTensor; N]) -> FlexTensor;
}

/// Makes a graph node of an [`InferenceOp`]; a tracked pass is a caller's mistake.
pub(crate) struct Sealed<O>(pub(crate) O);

impl<O: InferenceOp<N>, const N: usize> FlexOp<N> for Sealed<O> {
    type Saved = ();

    fn infer(self, inputs: [FlexTensor; N]) -> FlexTensor {
        self.0.run(inputs)
    }

    fn forward(self, _: [FlexTensor; N], _: [bool; N]) -> (FlexTensor, ()) {
        panic!("sealed weights are for inference: no gradient goes through them")
    }

    fn backward((): (), _: &FlexTensor, _: [bool; N]) -> [Option<FlexTensor>; N] {
        unreachable!("`forward` does not return")
    }
}
