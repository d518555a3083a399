//! The activation of an expert applied to one panel of pre-activations, forward and backward, sixteen columns at a time.
//!
//! Saved pre-activations keep the panel layout of the first product: gated, each 32 columns are 16 gate and the matching 16 up columns.

use super::Activation;
use crate::isa::Isa;
use crate::kernel::{Operand, PANEL, Wide};
use crate::lanes::{LANES, Lanes, Real, per_isa};
use crate::vmath::{gelu, gelu_and_derivative, silu, silu_and_derivative};

/// The hidden value of one column: `pre` holds gate and up for gated activations, and the same value twice otherwise.
#[inline(always)]
pub(super) fn hidden<R: Real>(activation: Activation, gate: R, up: R) -> R {
    match activation {
        Activation::SwiGlu => silu(gate).mul(up),
        Activation::Gelu => gelu(gate),
        Activation::Relu => gate.max(R::splat(0.0)),
    }
}

/// The hidden value again, and the gradients of gate and up for a gradient `dh` of the hidden value. Ungated: the second is unused.
#[inline(always)]
pub(super) fn hidden_backward<R: Real>(activation: Activation, gate: R, up: R, dh: R) -> (R, R, R) {
    match activation {
        Activation::SwiGlu => {
            let (s, slope) = silu_and_derivative(gate);
            (s.mul(up), dh.mul(up).mul(slope), dh.mul(s))
        }
        Activation::Gelu => {
            let (y, slope) = gelu_and_derivative(gate);
            (y, dh.mul(slope), dh)
        }
        Activation::Relu => {
            let zero = R::splat(0.0);
            (gate.max(zero), R::select_lt(zero, gate, dh, zero), dh)
        }
    }
}

/// A panel of pre-activations on its way to the hidden rows.
pub(super) struct ForwardPanel<'a, T> {
    pub(super) activation: Activation,
    pub(super) panel: usize,
    /// `[rows, 32]`, fresh from the product.
    pub(super) pre: &'a [f32],
    /// Hidden rows, `hidden_stride` apart; the panel's columns are written.
    pub(super) hidden: &'a mut [T],
    pub(super) hidden_stride: usize,
    /// Saved pre-activations of these rows, `saved_width` apart; empty if nothing is to be saved.
    pub(super) saved: &'a mut [T],
    pub(super) saved_width: usize,
}

per_isa! {
    fn forward_f32 = forward_body_f32(work: ForwardPanel<f32>);
    fn forward_bf16 = forward_body_bf16(work: ForwardPanel<u16>);
    fn backward_f32 = backward_body_f32(work: BackwardPanel<f32>);
    fn backward_bf16 = backward_body_bf16(work: BackwardPanel<u16>);
}

/// Which compiled body serves an operand type.
pub(super) trait Activate: Operand {
    fn forward(isa: Isa, work: ForwardPanel<Self>);
}

/// The same on the way back, for the operand types that a training step has.
pub(super) trait ActivateBackward: Activate {
    fn backward(isa: Isa, work: BackwardPanel<Self>);
}

impl Activate for f32 {
    fn forward(isa: Isa, work: ForwardPanel<f32>) {
        forward_f32(isa, work);
    }
}

impl Activate for u16 {
    fn forward(isa: Isa, work: ForwardPanel<u16>) {
        forward_bf16(isa, work);
    }
}

impl Activate for Wide {
    fn forward(isa: Isa, work: ForwardPanel<Wide>) {
        let ForwardPanel { activation, panel, pre, hidden, hidden_stride, saved, saved_width } = work;
        let (hidden, saved) = (bytemuck::cast_slice_mut(hidden), bytemuck::cast_slice_mut(saved));
        forward_f32(isa, ForwardPanel { activation, panel, pre, hidden, hidden_stride, saved, saved_width });
    }
}

impl ActivateBackward for f32 {
    fn backward(isa: Isa, work: BackwardPanel<f32>) {
        backward_f32(isa, work);
    }
}

impl ActivateBackward for u16 {
    fn backward(isa: Isa, work: BackwardPanel<u16>) {
        backward_bf16(isa, work);
    }
}

#[inline(always)]
fn forward_body_f32<L: Lanes>(work: ForwardPanel<f32>) {
    forward_body::<L, f32>(work);
}

#[inline(always)]
fn forward_body_bf16<L: Lanes>(work: ForwardPanel<u16>) {
    forward_body::<L, u16>(work);
}

#[inline(always)]
fn forward_body<L: Lanes, T: Operand>(work: ForwardPanel<T>) {
    let ForwardPanel { activation, panel, pre, hidden: out, hidden_stride, saved, saved_width } = work;
    for (row, pre) in pre.chunks_exact(PANEL).enumerate() {
        let first: L = L::load(&pre[..LANES]);
        let second: L = L::load(&pre[LANES..]);
        if !saved.is_empty() {
            let saved = &mut saved[row * saved_width + panel * PANEL..][..PANEL];
            T::store_lanes(first, &mut saved[..LANES]);
            T::store_lanes(second, &mut saved[LANES..]);
        }
        let out = &mut out[row * hidden_stride..][..hidden_stride];
        if activation.is_gated() {
            T::store_lanes(hidden(activation, first, second), &mut out[panel * LANES..][..LANES]);
        } else {
            T::store_lanes(hidden(activation, first, first), &mut out[panel * PANEL..][..LANES]);
            T::store_lanes(hidden(activation, second, second), &mut out[panel * PANEL + LANES..][..LANES]);
        }
    }
}

/// A panel of the hidden layer's gradient on its way to the gradients of the pre-activations.
pub(super) struct BackwardPanel<'a, T> {
    pub(super) activation: Activation,
    pub(super) panel: usize,
    /// F.
    pub(super) f: usize,
    /// [rows, 32]: dy W_down^T, before the row's weight.
    pub(super) dh: &'a [f32],
    /// The combine weight of each row.
    pub(super) weight: &'a [f32],
    pub(super) saved: &'a [T],
    pub(super) saved_width: usize,
    /// weight * hidden per row, `hidden_stride` apart.
    pub(super) scaled_hidden: &'a mut [T],
    pub(super) hidden_stride: usize,
    /// Gradient of the pre-activations, columns in the order of the weights (gate, then up), `dpre_stride` apart.
    pub(super) dpre: &'a mut [T],
    pub(super) dpre_stride: usize,
    /// [rows, 16]: lane l sums hidden * dh over the columns f with f mod 16 = l.
    pub(super) dweight_lanes: &'a mut [f32],
}

#[inline(always)]
fn backward_body_f32<L: Lanes>(work: BackwardPanel<f32>) {
    backward_body::<L, f32>(work);
}

#[inline(always)]
fn backward_body_bf16<L: Lanes>(work: BackwardPanel<u16>) {
    backward_body::<L, u16>(work);
}

#[inline(always)]
fn backward_body<L: Lanes, T: Operand>(work: BackwardPanel<T>) {
    let BackwardPanel { activation, panel, f, dh, weight, saved, saved_width, .. } = work;
    let (hidden_stride, dpre_stride) = (work.hidden_stride, work.dpre_stride);
    for (row, dh) in dh.chunks_exact(PANEL).enumerate() {
        let w = L::splat(weight[row]);
        let saved = &saved[row * saved_width..][..saved_width];
        let scaled = &mut work.scaled_hidden[row * hidden_stride..][..hidden_stride];
        let dpre = &mut work.dpre[row * dpre_stride..][..dpre_stride];
        let lanes = &mut work.dweight_lanes[row * LANES..][..LANES];
        let mut dweight: L = L::load(lanes);
        for half in 0..2 {
            let group = 2 * panel + half;
            let column = group * LANES;
            if column >= f {
                break;
            }
            let width = LANES.min(f - column);
            let dh: L = L::load(&dh[half * LANES..]);
            let (gate, up): (L, L) = if activation.is_gated() {
                let pre = &saved[group * PANEL..][..PANEL];
                (T::load_lanes(&pre[..LANES]), T::load_lanes(&pre[LANES..]))
            } else {
                let pre = T::load_lanes(&saved[column..][..LANES]);
                (pre, pre)
            };
            let (h, dgate, dup) = hidden_backward(activation, gate, up, w.mul(dh));
            dweight = h.mul_add(dh, dweight);
            T::store_lanes(w.mul(h), &mut scaled[column..][..LANES]);
            T::store_lanes(dgate, &mut dpre[column..][..width]);
            if activation.is_gated() {
                T::store_lanes(dup, &mut dpre[f + column..][..width]);
            }
        }
        dweight.store(lanes);
    }
}
