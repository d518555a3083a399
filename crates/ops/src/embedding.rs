//! `y_td = w_vd[ids_t]`: one row of the table per id. Backward adds the rows of `dy` into a zero table, in token order.
//!
//! Axes: `t` tokens, `v` vocabulary, `d` width.

use std::sync::Arc;

use burn::backend::{Dispatch, Flex};
use burn::tensor::{Int, Tensor, TensorData};
use burn_flex::FlexTensor;
use mixtura_kernels::embedding::{embedding_backward, embedding_forward, embedding_forward_bf16};

use crate::buffers::buffer;
use crate::fused::{self, FlexOp, Fused, slice, tensor_of};
use crate::sealed::SealedWeight;
use crate::{Isa, PackCell};

/// The rows of `w_vd` named by `ids_t`.
///
/// # Shapes
/// `[V, D]` and `T` ids give `[T, D]`.
///
/// # Panics
/// If an id is not below `V`.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// let w_vd = Tensor::<2>::from_data([[1.0, 2.0], [3.0, 4.0]], &Device::default());
/// let y_td = mixtura_ops::embedding(w_vd, vec![1, 0, 1].into());
/// assert_eq!(y_td.into_data().try_to_vec::<f32>().unwrap(), [3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
/// ```
pub fn embedding(w_vd: Tensor<2>, ids_t: Arc<[u32]>) -> Tensor<2> {
    let [v, _] = w_vd.dims();
    if let Some((t, id)) = ids_t.iter().enumerate().find(|(_, id)| **id as usize >= v) {
        panic!("embedding: token {t} has id {id}, the vocabulary has {v}");
    }
    let w = w_vd.into_dispatch();
    if !fused::is_fused(&w) {
        return embedding_portable(Tensor::from_dispatch(w), &ids_t);
    }
    Tensor::from_dispatch(Dispatch::one(w, Embedding { ids_t }))
}

/// The rows of the table `w_vd` named by `ids_t`: [`embedding`], for a table whose cell may be sealed.
///
/// # Shapes
/// `[V, D]` and `T` ids give `[T, D]`.
///
/// # Panics
/// If an id is not below `V`.
pub fn embedding_of(w_vd: Tensor<2>, ids_t: Arc<[u32]>, cell: &PackCell) -> Tensor<2> {
    let weight = match cell.sealed() {
        None => return embedding(w_vd, ids_t),
        Some(weight) if matches!(*weight, SealedWeight::Projection(_)) => return embedding(w_vd, ids_t),
        Some(weight) => weight,
    };
    let [v, d] = w_vd.dims();
    if let Some((t, id)) = ids_t.iter().enumerate().find(|(_, id)| **id as usize >= v) {
        panic!("embedding: token {t} has id {id}, the vocabulary has {v}");
    }
    let mut y_td = buffer(ids_t.len() * d);
    match &*weight {
        SealedWeight::Tied(packed) => {
            assert_eq!([packed.n(), packed.k()], [v, d], "embedding: the sealed table's shape");
            y_td.chunks_mut(d).zip(&*ids_t).for_each(|(row, &id)| packed.column(0, id as usize, row));
        }
        SealedWeight::Table(rows) => {
            assert_eq!(rows.len(), v * d, "embedding: a sealed table of {} numbers for [{v}, {d}]", rows.len());
            embedding_forward_bf16(Isa::current(), rows, d, &ids_t, &mut y_td);
        }
        other => panic!("embedding: the cell was sealed with {}", other.kind()),
    }
    Tensor::from_primitive::<Flex>(tensor_of(y_td, [ids_t.len(), d]))
}

/// [`embedding`] in plain Burn operations, on any device.
pub fn embedding_portable(w_vd: Tensor<2>, ids_t: &[u32]) -> Tensor<2> {
    let ids: Vec<i64> = ids_t.iter().map(|&id| id.into()).collect();
    let ids_t = Tensor::<1, Int>::from_data(TensorData::new(ids, [ids_t.len()]), &w_vd.device());
    w_vd.select(0, ids_t)
}

/// The non-tensor part of [`embedding`].
pub(crate) struct Embedding {
    ids_t: Arc<[u32]>,
}

impl FlexOp<1> for Embedding {
    type Saved = (Self, [usize; 2]);

    fn infer(self, [w]: [FlexTensor; 1]) -> FlexTensor {
        let (isa, [_, d]) = (Isa::current(), fused::dims(&w));
        let mut y_td = buffer(self.ids_t.len() * d);
        embedding_forward(isa, slice(&w), d, &self.ids_t, &mut y_td);
        tensor_of(y_td, [self.ids_t.len(), d])
    }

    fn forward(self, [w]: [FlexTensor; 1], _: [bool; 1]) -> (FlexTensor, Self::Saved) {
        let saved = (Self { ids_t: self.ids_t.clone() }, fused::dims(&w));
        (self.infer([w]), saved)
    }

    fn backward((op, [v, d]): Self::Saved, dy: &FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let isa = Isa::current();
        let mut dw_vd = buffer(v * d);
        embedding_backward(isa, slice(dy), d, &op.ids_t, &mut dw_vd, false);
        [Some(tensor_of(dw_vd, [v, d]))]
    }
}
