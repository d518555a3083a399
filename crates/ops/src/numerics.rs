//! Which arithmetic an op runs in: the precision of its matrix products and the instruction set that computes them.

use mixtura_kernels::isa::Isa;
use mixtura_kernels::precision::Precision;
use mixtura_kernels::ways::{Choice, Way};

/// How an op computes. Passed by value to every op; it changes speed and rounding, never what is computed.
///
/// ```
/// use mixtura_ops::{Numerics, Precision};
/// let numerics = Numerics::new(Precision::Bf16);
/// assert_eq!(numerics.precision, Precision::Bf16);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numerics {
    /// Rounding of the operands of matrix products and the order of their sums. Norms, softmax, attention and the
    /// residual stream are f32 in every precision.
    pub precision: Precision,
    /// The instruction set, which for products of bf16 operands also says by which way they are computed
    /// ([`mixtura_kernels::ways`]). In `F32` and `Bf16` it does not change a single bit of any result.
    pub isa: Isa,
}

impl Numerics {
    /// This precision by the fastest way of this machine.
    pub fn new(precision: Precision) -> Self {
        Self { precision, isa: Choice::of(precision).isa }
    }

    /// This precision by a given way, if this machine has it.
    pub fn by(precision: Precision, way: Way) -> Option<Self> {
        way.on(Isa::current()).map(|isa| Self { precision, isa })
    }

    /// The way by which products are computed.
    pub fn way(&self) -> Way {
        Way::of(self.isa, self.precision)
    }

    /// The numerics of a run in `precision` whose products began by the way `began`: the same bits, by whatever way this machine has.
    pub fn like(precision: Precision, began: Option<Way>) -> Self {
        let (precision, choice, _) = Choice::like(precision, began);
        Self { precision, isa: choice.isa }
    }
}

impl Default for Numerics {
    /// f32 on the best instruction set of this machine.
    fn default() -> Self {
        Self::new(Precision::F32)
    }
}
