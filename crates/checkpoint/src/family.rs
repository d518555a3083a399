//! The layouts in which a model can lie on the disk.

use std::fmt;

use crate::families::{FAMILIES, HfFamily};

/// A family of checkpoints: names and shapes of tensors, and the keys of `config.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// One of Hugging Face's, which other programs read; each has a file in `families/`.
    Hf(&'static HfFamily),
    /// Our own: every parameter under the name and in the shape that the model uses, for what the others cannot express.
    Mixtura,
}

impl Family {
    /// All of them, in the order in which [`Family::of`] asks: the specific ones first, our own last.
    pub fn all() -> impl Iterator<Item = Self> {
        FAMILIES.iter().copied().map(Self::Hf).chain([Self::Mixtura])
    }

    /// The value of `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Hf(family) => family.model_type,
            Self::Mixtura => "mixtura",
        }
    }

    /// The class name under `architectures`.
    pub fn architecture(self) -> &'static str {
        match self {
            Self::Hf(family) => family.architecture,
            Self::Mixtura => "MixturaDecoder",
        }
    }

    /// The family of a `model_type`.
    pub fn from_model_type(model_type: &str) -> Option<Self> {
        Self::all().find(|family| family.model_type() == model_type)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.model_type())
    }
}
