//! Packed weights, kept between calls for as long as the weight does not change.
//!
//! The matrix kernels read weights in column panels (and in bf16, if so asked). Packing costs one pass over the weight, so
//! it is done once per change of the weight, not once per call: forward, backward, and every micro-batch of a step share it.
//!
//! **Why a stale pack cannot be used.** The cell keeps a handle on the very buffer it packed. While it does, the buffer
//! cannot be written in place (Flex copies a shared buffer before it writes) nor freed and reused for another weight. So
//! "same buffer, same shape" means "same values", and anything else is packed anew. The price: an optimizer that wants to
//! update the weight in place must first [`clear`](PackCell::clear) the cell, or else pay for one copy of the weight.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::TensorMetadata;
use burn_flex::FlexTensor;
use mixtura_kernels::experts::{Activation, ExpertWeights};
use mixtura_kernels::pack::{MatView, PackedB};

use crate::Numerics;
use crate::fused::{dims, slice};

/// Where a weight's packed copy lives. Kept beside the weight in a module as `#[module(skip)] cell: PackCell`.
///
/// Clones share one cell. That is never wrong (see the module's text); two modules that share a cell but not the weight
/// would pack at every call, so give each weight its own.
///
/// ```
/// use mixtura_ops::PackCell;
/// let cell = PackCell::new();
/// assert_eq!(cell.bytes(), 0);
/// ```
#[derive(Clone, Default)]
pub struct PackCell(Arc<Mutex<Option<Entry>>>);

struct Entry {
    numerics: Numerics,
    sources: Vec<FlexTensor>,
    packed: Packed,
}

enum Packed {
    /// `w` as it lies, and its transpose; each made when first asked for.
    Matrix {
        as_is: Option<Arc<PackedB>>,
        transposed: Option<Arc<PackedB>>,
    },
    Experts(Arc<ExpertWeights>),
}

impl PackCell {
    /// An empty cell.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets the packed copy and lets go of the weight's buffer, so that the weight can be updated in place.
    pub fn clear(&self) {
        *self.lock() = None;
    }

    /// Memory held by the packed copies.
    pub fn bytes(&self) -> usize {
        match self.lock().as_ref().map(|entry| &entry.packed) {
            None => 0,
            Some(Packed::Matrix { as_is, transposed }) => {
                [as_is, transposed].into_iter().flatten().map(|packed| packed.bytes()).sum()
            }
            Some(Packed::Experts(weights)) => weights.bytes(),
        }
    }

    /// The packed form of `w_kn`: the right operand of `x_tk w_kn`.
    pub(crate) fn matrix(&self, w_kn: &FlexTensor, numerics: Numerics) -> Arc<PackedB> {
        let [k, n] = dims(w_kn);
        let view = MatView::row_major(slice(w_kn), k, n);
        self.matrix_slot(w_kn, numerics, |as_is, _| {
            as_is
                .get_or_insert_with(|| Arc::new(PackedB::pack(numerics.isa, numerics.precision, 1, k, n, view)))
                .clone()
        })
    }

    /// The packed form of the transpose of `w_kn`: the right operand of `y_tn w_kn^T`.
    pub(crate) fn matrix_transposed(&self, w_kn: &FlexTensor, numerics: Numerics) -> Arc<PackedB> {
        let [k, n] = dims(w_kn);
        let view = MatView::transposed(slice(w_kn), k, n);
        self.matrix_slot(w_kn, numerics, |_, transposed| {
            let pack = || Arc::new(PackedB::pack(numerics.isa, numerics.precision, 1, n, k, view));
            transposed.get_or_insert_with(pack).clone()
        })
    }

    fn matrix_slot<R>(
        &self,
        w_kn: &FlexTensor,
        numerics: Numerics,
        get: impl FnOnce(&mut Option<Arc<PackedB>>, &mut Option<Arc<PackedB>>) -> R,
    ) -> R {
        let mut guard = self.lock();
        let current = guard
            .as_ref()
            .is_some_and(|entry| entry.is_for(&[w_kn], numerics) && matches!(entry.packed, Packed::Matrix { .. }));
        if !current {
            let packed = Packed::Matrix { as_is: None, transposed: None };
            *guard = Some(Entry { numerics, sources: vec![w_kn.clone()], packed });
        }
        let Some(Entry { packed: Packed::Matrix { as_is, transposed }, .. }) = guard.as_mut() else {
            unreachable!("the cell was just given a matrix entry")
        };
        get(as_is, transposed)
    }

    /// The packed experts. `with_backward` asks for the transposes too; a cell that has them also serves calls that do not.
    pub(crate) fn experts(
        &self,
        gate_up_edf: &FlexTensor,
        down_efd: &FlexTensor,
        activation: Activation,
        with_backward: bool,
        numerics: Numerics,
    ) -> Arc<ExpertWeights> {
        let mut guard = self.lock();
        if let Some(entry) = guard.as_ref()
            && entry.is_for(&[gate_up_edf, down_efd], numerics)
            && let Packed::Experts(weights) = &entry.packed
            && weights.activation == activation
            && (weights.down_t.is_some() || !with_backward)
        {
            return weights.clone();
        }
        // Free the old copy before making the new one: experts are most of a model.
        *guard = None;
        let [experts, f, d] = dims(down_efd);
        let weights = Arc::new(ExpertWeights::pack(
            numerics.isa,
            numerics.precision,
            experts,
            d,
            f,
            activation,
            slice(gate_up_edf),
            slice(down_efd),
            with_backward,
        ));
        let packed = Packed::Experts(weights.clone());
        *guard = Some(Entry { numerics, sources: vec![gate_up_edf.clone(), down_efd.clone()], packed });
        weights
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Entry>> {
        // A panic while packing leaves the entry empty or complete, never half-made.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn is_for(&self, weights: &[&FlexTensor], numerics: Numerics) -> bool {
        let same = |a: &FlexTensor, b: &FlexTensor| Arc::ptr_eq(&a.data_arc(), &b.data_arc()) && a.shape() == b.shape();
        self.numerics == numerics
            && self.sources.len() == weights.len()
            && self.sources.iter().zip(weights).all(|(held, weight)| same(held, weight))
    }
}

impl fmt::Debug for PackCell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackCell({} bytes)", self.bytes())
    }
}
