//! Packed weights: kept between calls for as long as the weight does not change, or made anew for each call in shared room.
//!
//! The matrix kernels read weights in column panels (and in bf16, if so asked). Packing costs one pass over the weight, so
//! it is done once per change of the weight, not once per call: forward, backward, and every micro-batch of a step share it.
//!
//! A training step of a single micro-batch changes every weight before it uses a pack again, and uses the pack as it lies and the
//! transposed one a pass apart. Keeping them would hold each weight two more times for nothing. So cells can be told to
//! [`share`](PackCell::share) a [`PackRoom`]: each call packs into the room and gives it back, and the packs of all weights take the
//! memory of the largest.
//!
//! **Why a stale pack cannot be used.** The cell keeps a handle on the very buffer it packed. While it does, the buffer
//! cannot be written in place (Flex copies a shared buffer before it writes) nor freed and reused for another weight. So
//! "same buffer, same shape" means "same values", and anything else is packed anew. The price: an optimizer that wants to
//! update the weight in place must first [`clear`](PackCell::clear) the cell, or else pay for one copy of the weight.
//!
//! The memory of a kept pack outlives it: the next pack of the same shape is written into it, so that a training step maps no
//! new pages for its weights.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::backend::TensorMetadata;
use burn_flex::FlexTensor;
use mixtura_kernels::experts::{Activation, ExpertSaved, ExpertTransposes, ExpertWeights};
use mixtura_kernels::pack::{MatView, PackedB};

use crate::Numerics;
use crate::buffers::idle_memory_is_limited;
use crate::fused::{dims, slice};
use crate::sealed::SealedWeight;

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

/// Room for packed weights that are used once each, lent to one after the other: it grows to the largest of each size that are in
/// use at the same time. Clones share one room.
///
/// ```
/// use mixtura_ops::{PackCell, PackRoom};
/// let (room, cell) = (PackRoom::default(), PackCell::new());
/// cell.share(&room);
/// assert_eq!(room.bytes(), 0);
/// ```
#[derive(Clone, Default)]
pub struct PackRoom(Arc<Mutex<Vec<PackedB>>>);

#[derive(Default)]
struct Contents {
    /// What is packed: these buffers, for these numerics. Empty after `clear`.
    weights: Vec<FlexTensor>,
    numerics: Option<Numerics>,
    /// A single weight as it lies, and its transpose.
    as_is: Pack<PackedB>,
    transposed: Pack<PackedB>,
    /// The two weights of a set of experts, likewise.
    experts: Pack<ExpertWeights>,
    expert_transposes: Pack<ExpertTransposes>,
    /// Where packs are made instead of being kept here.
    room: Option<PackRoom>,
    /// Room for the activations of one expert pass.
    rows: Option<ExpertSaved>,
    /// The weight itself, where there is no tensor of it to pack.
    sealed: Option<Arc<SealedWeight>>,
}

/// A packed copy, or after the weight has changed the memory of the old one.
#[derive(Default)]
enum Pack<T> {
    #[default]
    None,
    Current(Arc<T>),
    Stale(Arc<T>),
}

/// A pack in use. What was made in shared room goes back there when dropped.
pub(crate) struct Packed<T: Pieces> {
    /// Always there until the drop.
    pack: Option<Arc<T>>,
    room: Option<PackRoom>,
}

/// The matrices that a pack is made of, for their memory.
pub(crate) trait Pieces {
    fn pieces(self) -> Vec<PackedB>;
}

impl PackCell {
    /// An empty cell that keeps what it packs.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets go of the weight's buffer, so that the weight can be updated in place. The next use packs anew, into the memory
    /// already held.
    pub fn clear(&self) {
        self.lock().forget();
    }

    /// From now on holds the weight itself: the tensor beside the cell is a [`stand_in`](crate::stand_in), which no op reads any more.
    pub fn seal(&self, weight: SealedWeight) {
        *self.lock() = Contents { sealed: Some(Arc::new(weight)), ..Contents::default() };
    }

    /// Whether the weight is here and not in a tensor.
    pub fn is_sealed(&self) -> bool {
        self.lock().sealed.is_some()
    }

    pub(crate) fn sealed(&self) -> Option<Arc<SealedWeight>> {
        self.lock().sealed.clone()
    }

    /// From now on packs anew for each call, in `room`, and keeps nothing: for weights that change as often as they are used.
    pub fn share(&self, room: &PackRoom) {
        let mut contents = self.lock();
        assert!(contents.sealed.is_none(), "a sealed weight cannot be packed anew");
        let rows = contents.rows.take();
        *contents = Contents { room: Some(room.clone()), rows, ..Contents::default() };
    }

    /// From now on keeps what it packs until the weight changes, as a new cell does.
    pub fn keep(&self) {
        self.lock().room = None;
    }

    /// Memory held for packed copies, those of an earlier weight included; that of shared room is not counted.
    pub fn bytes(&self) -> usize {
        let contents = self.lock();
        let matrix = |pack: &Pack<PackedB>| pack.held().map_or(0, |packed| packed.bytes());
        let experts = contents.experts.held().map_or(0, |packed| packed.bytes());
        let expert_transposes = contents.expert_transposes.held().map_or(0, |packed| packed.bytes());
        let sealed = contents.sealed.as_ref().map_or(0, |weight| weight.bytes());
        matrix(&contents.as_is) + matrix(&contents.transposed) + experts + expert_transposes + sealed
    }

    /// The packed form of `w_kn`: the right operand of `x_tk w_kn`.
    pub(crate) fn matrix(&self, w_kn: &FlexTensor, numerics: Numerics) -> Packed<PackedB> {
        let ([k, n], Numerics { isa, precision }) = (dims(w_kn), numerics);
        let view = MatView::row_major(slice(w_kn), k, n);
        let pack = |spare: &mut Vec<_>| PackedB::pack_into(spare, isa, precision, 1, k, n, view);
        self.packed(&[w_kn], numerics, |contents| &mut contents.as_is, |_| true, pack)
    }

    /// The packed form of the transpose of `w_kn`: the right operand of `y_tn w_kn^T`.
    pub(crate) fn matrix_transposed(&self, w_kn: &FlexTensor, numerics: Numerics) -> Packed<PackedB> {
        let ([k, n], Numerics { isa, precision }) = (dims(w_kn), numerics);
        let view = MatView::transposed(slice(w_kn), k, n);
        let pack = |spare: &mut Vec<_>| PackedB::pack_into(spare, isa, precision, 1, n, k, view);
        self.packed(&[w_kn], numerics, |contents| &mut contents.transposed, |_| true, pack)
    }

    /// The packed experts, for the forward pass.
    pub(crate) fn experts(
        &self,
        gate_up_edf: &FlexTensor,
        down_efd: &FlexTensor,
        activation: Activation,
        numerics: Numerics,
    ) -> Packed<ExpertWeights> {
        let ([e, f, d], Numerics { isa, precision }) = (dims(down_efd), numerics);
        let (gate_up, down) = (slice(gate_up_edf), slice(down_efd));
        let pack = |spare: &mut Vec<_>| ExpertWeights::pack(spare, isa, precision, e, d, f, activation, gate_up, down);
        let serves = |packed: &ExpertWeights| packed.activation == activation;
        self.packed(&[gate_up_edf, down_efd], numerics, |contents| &mut contents.experts, serves, pack)
    }

    /// Their packed transposes, for the backward pass.
    pub(crate) fn expert_transposes(
        &self,
        gate_up_edf: &FlexTensor,
        down_efd: &FlexTensor,
        activation: Activation,
        numerics: Numerics,
    ) -> Packed<ExpertTransposes> {
        let ([e, f, d], Numerics { isa, precision }) = (dims(down_efd), numerics);
        let (gate_up, down) = (slice(gate_up_edf), slice(down_efd));
        let pack =
            |spare: &mut Vec<_>| ExpertTransposes::pack(spare, isa, precision, e, d, f, activation, gate_up, down);
        let serves = |packed: &ExpertTransposes| packed.activation == activation;
        self.packed(&[gate_up_edf, down_efd], numerics, |contents| &mut contents.expert_transposes, serves, pack)
    }

    /// What `slot` holds if it was packed from exactly these weights and `serves`; otherwise what `pack` makes, given the
    /// memory of the old pack, or that of the shared room.
    fn packed<T: Pieces>(
        &self,
        weights: &[&FlexTensor],
        numerics: Numerics,
        slot: impl Fn(&mut Contents) -> &mut Pack<T>,
        serves: impl Fn(&T) -> bool,
        pack: impl FnOnce(&mut Vec<PackedB>) -> T,
    ) -> Packed<T> {
        let mut contents = self.lock();
        assert!(contents.sealed.is_none(), "this op cannot use a sealed weight: it would read the stand-in");
        if let Some(room) = contents.room.clone() {
            // Packing waits for other threads, which may be about to ask for this very cell: not under the lock.
            drop(contents);
            let mut spare = room.take();
            let packed = pack(&mut spare);
            room.give_back(spare);
            return Packed { pack: Some(Arc::new(packed)), room: Some(room) };
        }
        contents.turn_to(weights, numerics);
        let slot_now = slot(&mut contents);
        if let Pack::Current(packed) = slot_now
            && serves(packed)
        {
            return Packed { pack: Some(packed.clone()), room: None };
        }
        let mut spare = slot_now.reclaim().map_or_else(Vec::new, T::pieces);
        // As above.
        drop(contents);
        let packed = Arc::new(pack(&mut spare));
        let mut contents = self.lock();
        if contents.is_for(weights, numerics) && contents.room.is_none() {
            *slot(&mut contents) = Pack::Current(packed.clone());
        }
        Packed { pack: Some(packed), room: None }
    }

    /// Room for the activations of an expert pass: that of an earlier pass if it was given back.
    pub(crate) fn take_rows(&self) -> ExpertSaved {
        self.lock().rows.take().unwrap_or_default()
    }

    /// Gives the room back for the next pass; or to the kernels' pool, where memory that waits is not to be held layer by layer.
    pub(crate) fn give_back_rows(&self, rows: ExpertSaved) {
        if !idle_memory_is_limited() {
            self.lock().rows = Some(rows);
        }
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
        self.expert_transposes.expire();
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

impl PackRoom {
    /// Memory held while nothing is lent.
    pub fn bytes(&self) -> usize {
        self.lock().iter().map(PackedB::bytes).sum()
    }

    fn take(&self) -> Vec<PackedB> {
        std::mem::take(&mut self.lock())
    }

    fn give_back(&self, pieces: Vec<PackedB>) {
        self.lock().extend(pieces);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<PackedB>> {
        // Memory without a content: whole or absent.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Pieces> Deref for Packed<T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.pack.as_ref().expect("held until the drop")
    }
}

impl<T: Pieces> Drop for Packed<T> {
    fn drop(&mut self) {
        if let Some(room) = &self.room
            && let Some(pack) = self.pack.take().and_then(Arc::into_inner)
        {
            room.give_back(pack.pieces());
        }
    }
}

impl Pieces for PackedB {
    fn pieces(self) -> Vec<PackedB> {
        vec![self]
    }
}

impl Pieces for ExpertWeights {
    fn pieces(self) -> Vec<PackedB> {
        vec![self.gate_up, self.down]
    }
}

impl Pieces for ExpertTransposes {
    fn pieces(self) -> Vec<PackedB> {
        vec![self.gate_up_t, self.down_t]
    }
}

impl fmt::Debug for PackRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackRoom({} bytes)", self.bytes())
    }
}

impl fmt::Debug for PackCell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackCell({} bytes)", self.bytes())
    }
}
