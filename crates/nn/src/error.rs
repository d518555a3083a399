//! The errors of this crate: a configuration that cannot be built, parameters that do not fit, and a forward pass
//! that cannot go on. Each names the key or the tensor, what was found and what was expected.

use mixtura_routing::RoutingError;

/// A value of the configuration that no model can be built from.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} = {value}: expected {expected}")]
pub struct ConfigError {
    /// Dotted path of the key inside `[model]`, for instance `moe.top_k`.
    pub key: String,
    /// What the configuration holds there.
    pub value: String,
    /// What would be accepted, with the other value it depends on.
    pub expected: String,
}

impl ConfigError {
    /// An error at `key`, which holds `value` where `expected` was needed.
    pub fn new(key: impl Into<String>, value: impl std::fmt::Display, expected: impl Into<String>) -> Self {
        Self { key: key.into(), value: value.to_string(), expected: expected.into() }
    }

    /// A refusal by mixtura-routing, its key put under `prefix` (`"moe."` or nothing).
    pub(crate) fn router(error: RoutingError, prefix: &str, place: &str) -> Self {
        match error {
            RoutingError::TopK { top_k, experts } => {
                Self::new(format!("{prefix}top_k"), top_k, format!("1 to {experts}, the number of experts of {place}"))
            }
            RoutingError::Config { key, value, reason }
                if key.starts_with("balance.") || key.starts_with("zero_computation") =>
            {
                Self::new(format!("{prefix}{key}"), value, reason)
            }
            RoutingError::Config { key, value, reason } => Self::new(format!("{prefix}router.{key}"), value, reason),
            other => Self::new(format!("{prefix}router"), format!("not possible for {place}"), other.to_string()),
        }
    }
}

/// Parameters that cannot be loaded into a model. Nothing is changed when one of these is returned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// The model has this parameter and the source does not.
    #[error("parameter `{name}` {shape:?} is missing")]
    Missing {
        /// Dotted name of the parameter.
        name: String,
        /// Its shape in the model.
        shape: Vec<usize>,
    },
    /// The source has a tensor that the model does not have.
    #[error("tensor `{name}` is not a parameter of this model{}", .nearest.as_ref().map(|n| format!("; the nearest name is `{n}`")).unwrap_or_default())]
    Unknown {
        /// The name in the source.
        name: String,
        /// The parameter of the model with the longest common beginning, if any.
        nearest: Option<String>,
    },
    /// The source names a parameter twice.
    #[error("parameter `{name}` is given twice")]
    Twice {
        /// Dotted name of the parameter.
        name: String,
    },
    /// The number of values differs from the parameter's shape.
    #[error("parameter `{name}`: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// Dotted name of the parameter.
        name: String,
        /// Its shape in the model.
        expected: Vec<usize>,
        /// The shape in the source.
        found: Vec<usize>,
    },
}

/// A forward pass that cannot produce an output.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ForwardError {
    /// The router of a layer refused its scores, for instance because one is not finite.
    #[error("router of layer {layer}: {source}")]
    Routing {
        /// Index of the layer.
        layer: usize,
        /// What the router said.
        source: RoutingError,
    },
    /// A token id lies outside the vocabulary.
    #[error("token id {id} at position {position} is outside the vocabulary of {vocab}")]
    TokenId {
        /// The id found.
        id: u32,
        /// Its index in the flattened batch.
        position: usize,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// The number of ids is not batch times sequence length.
    #[error("{found} token ids for a batch of {batch} sequences of {seq} tokens")]
    BatchShape {
        /// Number of ids passed.
        found: usize,
        /// Sequences.
        batch: usize,
        /// Tokens per sequence.
        seq: usize,
    },
    /// The sequence is longer than the model's context.
    #[error("a sequence of {found} tokens is longer than the model's context of {context}")]
    TooLong {
        /// Tokens of the sequence, cached ones included.
        found: usize,
        /// The model's context length.
        context: usize,
    },
    /// A layer that needs later tokens was asked to decode.
    #[error(
        "layer {layer} is a soft layer of kind \"{kind}\" that looks at later tokens, so token by token it would compute something \
         else; a model that generates needs a causal kind: \"block_causal\", \"lory\" with first_segment = \"uniform\", or \
         \"mixture_of_tokens\""
    )]
    Future {
        /// Index of the layer.
        layer: usize,
        /// The soft layer's kind.
        kind: &'static str,
    },
    /// A key-value cache made for another model.
    #[error("this key-value cache was made for {found}, the model needs {expected}")]
    Cache {
        /// Shape of the cache.
        found: String,
        /// Shape the model needs.
        expected: String,
    },
}
