//! In which precision the matrix products run. Everything outside them is f32 in all three.

use std::fmt;
use std::str::FromStr;

/// Precision of the operands and order of the sums of a matrix product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// f32 operands; each output element is one chain of FMAs over k ascending. Same bits on every ISA.
    #[default]
    F32,
    /// Operands rounded to bf16 (nearest even), products summed in f32 in the order of `TDPBF16PS`. Same bits on every ISA.
    Bf16,
    /// Operands rounded alike, summed in the order the machine is fastest at. Row- and thread-independent, but bits differ between ISAs.
    Bf16Native,
}

impl Precision {
    /// Whether operands are rounded to bf16.
    pub fn is_bf16(self) -> bool {
        self != Precision::F32
    }

    /// The name configs and flags use.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::Bf16Native => "bf16-native",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The text that named no precision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownPrecision(pub String);

impl fmt::Display for UnknownPrecision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not a precision; use f32, bf16 or bf16-native", self.0)
    }
}

impl std::error::Error for UnknownPrecision {}

impl FromStr for Precision {
    type Err = UnknownPrecision;

    fn from_str(name: &str) -> Result<Precision, UnknownPrecision> {
        [Precision::F32, Precision::Bf16, Precision::Bf16Native]
            .into_iter()
            .find(|precision| precision.name() == name)
            .ok_or_else(|| UnknownPrecision(name.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back_and_others_are_refused() {
        for precision in [Precision::F32, Precision::Bf16, Precision::Bf16Native] {
            assert_eq!(precision.to_string().parse::<Precision>(), Ok(precision));
        }
        assert!("fp8".parse::<Precision>().unwrap_err().to_string().contains("bf16-native"));
    }
}
