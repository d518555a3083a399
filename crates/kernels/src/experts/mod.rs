//! The experts of an MoE layer as one operation: y_t = sum over the token's choices of weight * expert(x_t), and its backward.
//!
//! expert(x) = act(x W_gate_up) W_down, with act(gate, up) = silu(gate) * up for gated experts. Rows (token, choice pairs) are sorted by
//! (expert, token); capacity is no concern here, every expert takes exactly its rows.
//!
//! Forward, per block of rows of one expert, in one thread's L2: gather and round x, gate/up product panel by panel with the activation
//! applied to each panel while it is in L1, down product; then, per token, the weighted sum in choice order. X is never stored gathered.
//! Backward: the same shape of pass for dX, leaving the activations as operands for the two weight-gradient products.
//!
//! A row's result depends on that row only; see `reference` for the order of every sum.
//!
//! Axes: T tokens, D width, E experts, F hidden, N rows.

use crate::gemm::check_offsets;
use crate::isa::Isa;
use crate::kernel::{Operand, PANEL, Stored};
use crate::pack::{MatView, PackedB};
use crate::precision::Precision;
use crate::workspace::Workspace;
use std::fmt;

mod activation;
mod backward;
mod combine;
mod forward;
mod reference;
mod rows;

pub use backward::expert_ffn_backward;
pub use forward::expert_ffn_forward;
pub use reference::{expert_ffn_backward_reference, expert_ffn_forward_reference};
pub use rows::{combine_rows, expert_rows_backward, expert_rows_forward, gather_rows};

/// What an expert applies between its two products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Activation {
    /// silu(gate) * up, with gate and up two halves of the first product.
    #[default]
    SwiGlu,
    /// The exact GELU, x * Phi(x).
    Gelu,
    /// max(x, 0).
    Relu,
}

impl Activation {
    /// Whether the first product has 2F columns.
    pub fn is_gated(self) -> bool {
        self == Activation::SwiGlu
    }

    /// Columns of the first product for hidden width `f`.
    pub fn first_columns(self, f: usize) -> usize {
        if self.is_gated() { 2 * f } else { f }
    }

    /// The name configs use.
    pub fn name(self) -> &'static str {
        match self {
            Activation::SwiGlu => "swiglu",
            Activation::Gelu => "gelu",
            Activation::Relu => "relu",
        }
    }
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Which rows go to which expert, and where a token finds its rows again.
#[derive(Clone, Copy, Debug)]
pub struct Dispatch<'a> {
    /// T.
    pub tokens: usize,
    /// `[E + 1]`: expert e has rows `row_offsets[e]..row_offsets[e + 1]`.
    pub row_offsets: &'a [u32],
    /// `[N]`: the token of each row.
    pub token_of_row: &'a [u32],
    /// `[T + 1]`: token t has choices `token_offsets[t]..token_offsets[t + 1]`; none if all were dropped.
    pub token_offsets: &'a [u32],
    /// `[N]`: the rows of token 0 in choice order, then of token 1, ...
    pub row_of_choice: &'a [u32],
}

impl Dispatch<'_> {
    /// N: rows of all experts.
    pub fn rows(&self) -> usize {
        self.token_of_row.len()
    }

    /// Panics with the shapes if the parts do not fit together.
    fn check(&self, who: &str, experts: usize) {
        let rows = check_offsets(who, self.row_offsets, experts);
        let choices = check_offsets(who, self.token_offsets, self.tokens);
        assert!(
            self.token_of_row.len() == rows && self.row_of_choice.len() == rows && choices == rows,
            "{who}: row_offsets say {rows} rows, token_of_row {}, row_of_choice {}, token_offsets {choices}",
            self.token_of_row.len(),
            self.row_of_choice.len()
        );
        assert!(
            self.token_of_row.iter().all(|&token| (token as usize) < self.tokens)
                && self.row_of_choice.iter().all(|&row| (row as usize) < rows),
            "{who}: a token or row index is out of range (T {}, N {rows})",
            self.tokens
        );
    }
}

/// The experts' weights, packed for the forward pass.
#[derive(Clone, Debug)]
pub struct ExpertWeights {
    /// Width of the tokens.
    pub d: usize,
    /// Hidden width of an expert.
    pub f: usize,
    /// Between the two products.
    pub activation: Activation,
    /// `[D, 2F]` (ungated `[D, F]`) per expert.
    pub gate_up: PackedB,
    /// `[F, D]` per expert.
    pub down: PackedB,
}

/// The transposes of the experts' weights, packed for the backward pass. Apart from [`ExpertWeights`], because the two passes come one
/// after the other: memory for one of them at a time is enough.
#[derive(Clone, Debug)]
pub struct ExpertTransposes {
    /// Width of the tokens.
    pub d: usize,
    /// Hidden width of an expert.
    pub f: usize,
    /// Between the two products.
    pub activation: Activation,
    /// The transpose of the first product's weights, `[2F, D]` (ungated `[F, D]`) per expert, for dX.
    pub gate_up_t: PackedB,
    /// The transpose of the second's, `[D, F]` per expert, for the gradient of the hidden layer.
    pub down_t: PackedB,
}

impl ExpertWeights {
    /// Packs row-major `gate_up_edf` `[E, D, 2F]` (gate columns first; ungated `[E, D, F]`) and `down_efd` `[E, F, D]`, into the memory
    /// of packs in `spare` where any fits.
    pub fn pack(
        spare: &mut Vec<PackedB>,
        isa: Isa,
        precision: Precision,
        experts: usize,
        d: usize,
        f: usize,
        activation: Activation,
        gate_up_edf: &[f32],
        down_efd: &[f32],
    ) -> ExpertWeights {
        let columns = activation.first_columns(f);
        check_weights("ExpertWeights::pack", [experts, d, f, columns], gate_up_edf, down_efd);
        let first = MatView::row_major(gate_up_edf, d, columns);
        let gate_up = if activation.is_gated() {
            PackedB::pack_gate_up_into(spare, isa, precision, experts, d, f, first)
        } else {
            PackedB::pack_into(spare, isa, precision, experts, d, f, first)
        };
        let down = PackedB::pack_into(spare, isa, precision, experts, f, d, MatView::row_major(down_efd, f, d));
        ExpertWeights { d, f, activation, gate_up, down }
    }

    /// The weights of two packs that were made on their own, as [`PackedB::from_stored`] makes them from a file. What is held in bf16 in
    /// precision f32 serves forward passes that save nothing.
    ///
    /// # Panics
    /// If they are not the `[D, 2F]` (gate and up in one panel; ungated `[D, F]`) and `[F, D]` of as many experts, of one precision and
    /// held in one number type.
    pub fn from_packed(activation: Activation, gate_up: PackedB, down: PackedB) -> ExpertWeights {
        let (d, f) = (down.n(), down.k());
        let of = |pack: &PackedB| {
            let order = if pack.is_gate_up() { "gate and up" } else { "plain" };
            let (held, precision) = (if pack.holds_bf16() { "bf16" } else { "f32" }, pack.precision());
            format!("[{}, {}, {}] {order} columns held in {held} for {precision}", pack.experts(), pack.k(), pack.n())
        };
        assert!(
            gate_up.experts() == down.experts()
                && (gate_up.k(), gate_up.n()) == (d, activation.first_columns(f))
                && (gate_up.is_gate_up(), down.is_gate_up()) == (activation.is_gated(), false)
                && gate_up.operands() == down.operands()
                && gate_up.precision() == down.precision(),
            "ExpertWeights::from_packed: {} and {} are not the two products of {activation} experts",
            of(&gate_up),
            of(&down)
        );
        ExpertWeights { d, f, activation, gate_up, down }
    }

    /// E.
    pub fn experts(&self) -> usize {
        self.gate_up.experts()
    }

    /// The precision the weights were packed for.
    pub fn precision(&self) -> Precision {
        self.gate_up.precision()
    }

    /// Bytes of both packs.
    pub fn bytes(&self) -> usize {
        self.gate_up.bytes() + self.down.bytes()
    }
}

impl ExpertTransposes {
    /// Packs the transposes of the matrices that [`ExpertWeights::pack`] takes.
    pub fn pack(
        spare: &mut Vec<PackedB>,
        isa: Isa,
        precision: Precision,
        experts: usize,
        d: usize,
        f: usize,
        activation: Activation,
        gate_up_edf: &[f32],
        down_efd: &[f32],
    ) -> ExpertTransposes {
        let columns = activation.first_columns(f);
        check_weights("ExpertTransposes::pack", [experts, d, f, columns], gate_up_edf, down_efd);
        let (first, second) = (MatView::transposed(gate_up_edf, d, columns), MatView::transposed(down_efd, f, d));
        let gate_up_t = PackedB::pack_into(spare, isa, precision, experts, columns, d, first);
        let down_t = PackedB::pack_into(spare, isa, precision, experts, d, f, second);
        ExpertTransposes { d, f, activation, gate_up_t, down_t }
    }

    /// E.
    pub fn experts(&self) -> usize {
        self.gate_up_t.experts()
    }

    /// The precision the weights were packed for.
    pub fn precision(&self) -> Precision {
        self.gate_up_t.precision()
    }

    /// Bytes of both packs.
    pub fn bytes(&self) -> usize {
        self.gate_up_t.bytes() + self.down_t.bytes()
    }
}

fn check_weights(who: &str, [experts, d, f, columns]: [usize; 4], gate_up_edf: &[f32], down_efd: &[f32]) {
    assert!(
        gate_up_edf.len() == experts * d * columns && down_efd.len() == experts * f * d,
        "{who}: gate_up has {} elements and down {}; [{experts}, {d}, {columns}] and [{experts}, {f}, {d}] expected",
        gate_up_edf.len(),
        down_efd.len()
    );
}

/// The pre-activations of a forward pass, kept for its backward: f32, or rounded to bf16 in the bf16 precisions.
#[derive(Clone, Debug, Default)]
pub struct ExpertSaved {
    pub(crate) f32: Workspace<f32>,
    pub(crate) bf16: Workspace<u16>,
}

impl ExpertSaved {
    /// Nothing saved yet; the forward pass takes the room it needs from a pool, and dropping hands it back.
    pub fn new() -> ExpertSaved {
        ExpertSaved::default()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.f32.bytes() + self.bf16.bytes()
    }
}

/// The part of [`ExpertSaved`] that an operand type of the backward pass finds its pre-activations in.
pub(crate) trait SavedAs: Operand<B = Self> + Stored {
    fn part(saved: &ExpertSaved) -> &Workspace<Self>;
}

impl SavedAs for f32 {
    fn part(saved: &ExpertSaved) -> &Workspace<f32> {
        &saved.f32
    }
}

impl SavedAs for u16 {
    fn part(saved: &ExpertSaved) -> &Workspace<u16> {
        &saved.bf16
    }
}

/// Columns per row of saved pre-activations: the panels of the first product as they are.
fn saved_width(activation: Activation, f: usize) -> usize {
    let panels = if activation.is_gated() { f.div_ceil(PANEL / 2) } else { f.div_ceil(PANEL) };
    panels * PANEL
}

#[cfg(test)]
mod tests;
