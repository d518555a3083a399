//! What can be wrong with a router's input or configuration, each with its evidence.

/// A typed refusal: the sentence names the value found and what was expected.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RoutingError {
    /// A slice does not have the length its shape promises.
    #[error("{what} has {found} values, expected {expected} ({shape})")]
    Length {
        /// Which slice.
        what: &'static str,
        /// Values expected.
        expected: usize,
        /// Values found.
        found: usize,
        /// The shape in words, for example `T=5 E=4`.
        shape: String,
    },
    /// A score is NaN or infinite.
    #[error("{what} of token {token}, expert {expert} is {value}: router scores must be finite")]
    NonFinite {
        /// Which slice.
        what: &'static str,
        /// Token index.
        token: usize,
        /// Expert index.
        expert: usize,
        /// The value found.
        value: f64,
    },
    /// More choices per token than experts, or none.
    #[error("top_k = {top_k} is not possible with {experts} experts: expected 1..={experts}")]
    TopK {
        /// Choices asked for.
        top_k: usize,
        /// Experts there are.
        experts: usize,
    },
    /// A layer without experts.
    #[error("a router needs at least one expert, found 0")]
    NoExperts,
    /// More rows than a `u32` row index can name.
    #[error("{tokens} tokens x {per_token} choices exceed {}: split the batch", u32::MAX)]
    TooLarge {
        /// Tokens.
        tokens: usize,
        /// Choices, or experts, per token.
        per_token: usize,
    },
    /// The capacity rule leaves no slot.
    #[error(
        "capacity rounds to 0 (factor {factor}, k={top_k}, T={tokens}, E={experts}, minimum {minimum}): every token would be dropped"
    )]
    ZeroCapacity {
        /// Capacity factor.
        factor: f64,
        /// Choices per token.
        top_k: usize,
        /// Tokens in the group.
        tokens: usize,
        /// Experts.
        experts: usize,
        /// Smallest capacity allowed by the configuration.
        minimum: usize,
    },
    /// Experts cannot be cut into that many equal groups.
    #[error("{groups} groups do not divide {experts} experts")]
    Groups {
        /// Groups asked for.
        groups: usize,
        /// Experts there are.
        experts: usize,
    },
    /// A choice names an expert that is not there.
    #[error("expert {expert} was chosen, but there are {experts} experts")]
    NoSuchExpert {
        /// The expert named.
        expert: u32,
        /// Experts there are.
        experts: usize,
    },
    /// A token's list names an expert twice.
    #[error("token {token} names expert {expert} twice")]
    RepeatedExpert {
        /// Token index.
        token: usize,
        /// The expert.
        expert: u32,
    },
    /// A policy needs an input that was not given.
    #[error("policy {policy} needs {needs}, which was not given")]
    MissingInput {
        /// Policy or noise name.
        policy: &'static str,
        /// The missing input.
        needs: &'static str,
    },
    /// A configuration value out of range or a combination without meaning.
    #[error("router setting {key} = {value}: expected {reason}")]
    Config {
        /// The key as written in a config file.
        key: &'static str,
        /// The value found.
        value: String,
        /// What would be accepted: what follows the word "expected".
        reason: String,
    },
}
