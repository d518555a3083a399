//! Packed weights, kept between calls for as long as the weight does not change.
//!
//! The matrix kernels read weights in column panels (and in bf16, if so asked). Packing costs one pass over the weight, so
//! it is done once per change of the weight, not once per call: forward, backward, and every micro-batch of a step share it.
//!
//! **Why a stale pack cannot be used.** The cell keeps a handle on the very buffer it packed. While it does, the buffer
//! cannot be written in place (Flex copies a shared buffer before it writes) nor freed and reused for another weight. So
//! "same buffer, same shape" means "same values", and anything else is packed anew. The price: an optimizer that wants to
//! update the weight in place must first [`clear`](PackCell::clear) the cell, or else pay for one copy of the weight.
//!
//! The memory of a pack outlives it: the next pack of the same shape is written into it, so that a training step maps no
//! new pages for its weights.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::backend::TensorMetadata;
use burn_flex::FlexTensor;
use mixtura_kernels::experts::{Activation, ExpertSaved, ExpertWeights};
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
pub struct PackCell(Arc<Mutex<Contents>>);

#[derive(Default)]
struct Contents {
    /// What is packed: these buffers, for these numerics. Empty after `clear`.
    weights: Vec<FlexTensor>,
    numerics: Option<Numerics>,
    /// A single weight as it lies, and its transpose.
    as_is: Pack<PackedB>,
    transposed: Pack<PackedB>,
    /// The two weights of a set of experts.
    experts: Pack<ExpertWeights>,
    /// Room for the activations of one expert pass.
    rows: Option<ExpertSaved>,
}

/// A packed copy, or after the weight has changed the memory of the old one.
#[derive(Default)]
enum Pack<T> {
    #[default]
    None,
    Current(Arc<T>),
    Stale(Arc<T>),
}

impl PackCell {
    /// An empty cell.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets go of the weight's buffer, so that the weight can be updated in place. The next use packs anew, into the memory
    /// already held.
    pub fn clear(&self) {
        self.lock().forget();
    }

    /// Memory held for packed copies, those of an earlier weight included.
    pub fn bytes(&self) -> usize {
        let contents = self.lock();
        let matrix = |pack: &Pack<PackedB>| pack.held().map_or(0, |packed| packed.bytes());
        let experts = contents.experts.held().map_or(0, |packed| packed.bytes());
        matrix(&contents.as_is) + matrix(&contents.transposed) + experts
    }

    /// The packed form of `w_kn`: the right operand of `x_tk w_kn`.
    pub(crate) fn matrix(&self, w_kn: &FlexTensor, numerics: Numerics) -> Arc<PackedB> {
        let [k, n] = dims(w_kn);
        let pack = |memory| pack_matrix(memory, numerics, k, n, MatView::row_major(slice(w_kn), k, n));
        self.packed(&[w_kn], numerics, |contents| &mut contents.as_is, |_| true, pack)
    }

    /// The packed form of the transpose of `w_kn`: the right operand of `y_tn w_kn^T`.
    pub(crate) fn matrix_transposed(&self, w_kn: &FlexTensor, numerics: Numerics) -> Arc<PackedB> {
        let [k, n] = dims(w_kn);
        let pack = |memory| pack_matrix(memory, numerics, n, k, MatView::transposed(slice(w_kn), k, n));
        self.packed(&[w_kn], numerics, |contents| &mut contents.transposed, |_| true, pack)
    }

    /// The packed experts. `with_backward` asks for the transposes too; a pack that has them also serves calls that do not.
    pub(crate) fn experts(
        &self,
        gate_up_edf: &FlexTensor,
        down_efd: &FlexTensor,
        activation: Activation,
        with_backward: bool,
        numerics: Numerics,
    ) -> Arc<ExpertWeights> {
        let serves =
            |packed: &ExpertWeights| packed.activation == activation && (packed.down_t.is_some() || !with_backward);
        let pack = |memory| pack_experts(memory, numerics, activation, with_backward, gate_up_edf, down_efd);
        self.packed(&[gate_up_edf, down_efd], numerics, |contents| &mut contents.experts, serves, pack)
    }

    /// What `slot` holds if it was packed from exactly these weights and `serves`; otherwise what `pack` makes, given the
    /// memory of the old pack.
    fn packed<T>(
        &self,
        weights: &[&FlexTensor],
        numerics: Numerics,
        slot: impl Fn(&mut Contents) -> &mut Pack<T>,
        serves: impl Fn(&T) -> bool,
        pack: impl FnOnce(Option<T>) -> T,
    ) -> Arc<T> {
        let mut contents = self.lock();
        contents.turn_to(weights, numerics);
        let slot_now = slot(&mut contents);
        if let Pack::Current(packed) = slot_now
            && serves(packed)
        {
            return packed.clone();
        }
        let memory = slot_now.reclaim();
        // Packing waits for other threads, which may be about to ask for this very cell: not under the lock.
        drop(contents);
        let packed = Arc::new(pack(memory));
        let mut contents = self.lock();
        if contents.is_for(weights, numerics) {
            *slot(&mut contents) = Pack::Current(packed.clone());
        }
        packed
    }

    /// Room for the activations of an expert pass: that of an earlier pass if it was given back.
    pub(crate) fn take_rows(&self) -> ExpertSaved {
        self.lock().rows.take().unwrap_or_default()
    }

    /// Gives the room back for the next pass.
    pub(crate) fn give_back_rows(&self, rows: ExpertSaved) {
        self.lock().rows = Some(rows);
    }

    /// Moves the room for an expert pass's activations, if there is any, from this cell to another. Layers that take turns, as
    /// under activation checkpointing, need the room of one layer between them.
    pub fn move_room_to(&self, other: &PackCell) {
        // Two statements: one lock at a time.
        let rows = self.lock().rows.take();
        if rows.is_some() {
            other.lock().rows = rows;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        // A panic while packing leaves a pack absent or complete, never half-made.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Contents {
    /// Whether what is `Current` was packed from exactly these weights.
    fn is_for(&self, weights: &[&FlexTensor], numerics: Numerics) -> bool {
        let same = |a: &FlexTensor, b: &FlexTensor| Arc::ptr_eq(&a.data_arc(), &b.data_arc()) && a.shape() == b.shape();
        self.numerics == Some(numerics)
            && self.weights.len() == weights.len()
            && self.weights.iter().zip(weights).all(|(held, weight)| same(held, weight))
    }

    fn turn_to(&mut self, weights: &[&FlexTensor], numerics: Numerics) {
        if !self.is_for(weights, numerics) {
            self.forget();
            self.weights = weights.iter().map(|&weight| weight.clone()).collect();
            self.numerics = Some(numerics);
        }
    }

    fn forget(&mut self) {
        self.weights.clear();
        self.as_is.expire();
        self.transposed.expire();
        self.experts.expire();
    }
}

impl<T> Pack<T> {
    fn held(&self) -> Option<&Arc<T>> {
        match self {
            Pack::None => None,
            Pack::Current(packed) | Pack::Stale(packed) => Some(packed),
        }
    }

    fn expire(&mut self) {
        *self = match std::mem::take(self) {
            Pack::Current(packed) => Pack::Stale(packed),
            other => other,
        };
    }

    /// The held memory, unless a backward pass that is still to come needs what is in it.
    fn reclaim(&mut self) -> Option<T> {
        match std::mem::take(self) {
            Pack::None => None,
            Pack::Current(packed) | Pack::Stale(packed) => Arc::into_inner(packed),
        }
    }
}

/// Packs the logical `[k, n]` matrix `view`, into `memory` if it fits.
fn pack_matrix(memory: Option<PackedB>, numerics: Numerics, k: usize, n: usize, view: MatView) -> PackedB {
    let Numerics { isa, precision } = numerics;
    match memory.filter(|old| (old.precision(), old.k(), old.n()) == (precision, k, n)) {
        None => PackedB::pack(isa, precision, 1, k, n, view),
        Some(mut old) => {
            old.repack(isa, view);
            old
        }
    }
}

/// Packs experts, into `memory` if it fits. Transposes nobody asks for are dropped, not left stale.
fn pack_experts(
    memory: Option<ExpertWeights>,
    Numerics { isa, precision }: Numerics,
    activation: Activation,
    with_backward: bool,
    gate_up_edf: &FlexTensor,
    down_efd: &FlexTensor,
) -> ExpertWeights {
    let ([e, f, d], columns) = (dims(down_efd), activation.first_columns(dims::<3>(down_efd)[1]));
    let (gate_up, down) = (slice(gate_up_edf), slice(down_efd));
    let fits = |old: &ExpertWeights| {
        (old.precision(), old.experts(), old.d, old.f, old.activation) == (precision, e, d, f, activation)
    };
    let Some(mut packed) = memory.filter(fits) else {
        return ExpertWeights::pack(isa, precision, e, d, f, activation, gate_up, down, with_backward);
    };
    packed.gate_up.repack(isa, MatView::row_major(gate_up, d, columns));
    packed.down.repack(isa, MatView::row_major(down, f, d));
    match (&mut packed.gate_up_t, &mut packed.down_t) {
        (Some(gate_up_t), Some(down_t)) if with_backward => {
            gate_up_t.repack(isa, MatView::transposed(gate_up, d, columns));
            down_t.repack(isa, MatView::transposed(down, f, d));
        }
        (gate_up_t, down_t) => {
            (*gate_up_t, *down_t) = (None, None);
            if with_backward {
                packed.pack_backward(isa, gate_up, down);
            }
        }
    }
    packed
}

impl fmt::Debug for PackCell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackCell({} bytes)", self.bytes())
    }
}
