//! What a parameter is for: declared where the parameter is made, asked wherever parameters are treated differently.
//!
//! A builder notes the role beside the path of every parameter that it makes, and a model keeps these notes ([`Roles`]) beside its
//! parameters: clones, `valid`, `train`, loading and updates keep them, and a part that is moved to another model takes its own
//! along. Nothing asks a parameter's name what the parameter is.

use std::collections::BTreeMap;

/// What a parameter is for. Weight decay and the type that a parameter is stored in follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// One row or column for each token id: the token embedding and an untied output projection.
    Embedding,
    /// Scale of a normalisation.
    Norm,
    /// Projection of an attention layer.
    Attention,
    /// What decides which experts see a token: scorers, noise, selection biases, thresholds, merge weights of soft layers.
    Router,
    /// Experts that a token may or may not visit, those without a network included.
    Expert,
    /// What every token visits: dense feed-forward and shared networks, and any other linear layer.
    Dense,
    /// What mixes without choosing: the slots of soft layers, the coefficients of Residual-MoE.
    Mixture,
    /// Gate of a shared network.
    Gate,
    /// Whole numbers looked up by token id; never learned.
    Table,
}

impl Role {
    /// Whether weight decay applies: it pulls to 0, which is no neutral value of a norm's scale, a routing decision, a gate or a
    /// table's entry.
    pub fn decays(self) -> bool {
        match self {
            Self::Embedding | Self::Attention | Self::Expert | Self::Dense | Self::Mixture => true,
            Self::Norm | Self::Router | Self::Gate | Self::Table => false,
        }
    }

    /// Whether it holds whole numbers that a 16-bit type would round: bf16 has them only up to 256.
    pub fn is_integral(self) -> bool {
        self == Self::Table
    }

    /// Its name in reports: `"expert"`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Norm => "norm",
            Self::Attention => "attention",
            Self::Router => "router",
            Self::Expert => "expert",
            Self::Dense => "dense",
            Self::Mixture => "mixture",
            Self::Gate => "gate",
            Self::Table => "table",
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The roles of a module's parameters, by path from the module. A path stands for all that is under it and has no role of its own.
///
/// ```
/// use burn::tensor::Device;
/// use mixtura_nn::{MoeLayer, MoeLayerConfig, NamedParameters, Role, Roles};
/// let moe = MoeLayer::new(&MoeLayerConfig::new(8, 4, 2, 16), 7, &Device::default()).unwrap();
/// // Of a model with this layer as its field `moe` and a linear layer as its field `head`:
/// let roles = Roles::default().with_role("head", Role::Dense).with("moe", &moe.roles());
/// assert_eq!(roles.of("moe.experts.down"), Some(Role::Expert));
/// assert_eq!(roles.of("head.bias"), Some(Role::Dense));
/// assert_eq!(roles.of("tail.weight"), None);
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roles(BTreeMap<String, Role>);

impl Roles {
    /// The same with the role of the parameters at or under `path`.
    pub fn with_role(mut self, path: impl Into<String>, role: Role) -> Self {
        self.0.insert(path.into(), role);
        self
    }

    /// The same with those of the module at `path`, whose own paths `roles` has.
    pub fn with(mut self, path: &str, roles: &Roles) -> Self {
        self.0.extend(roles.0.iter().map(|(below, &role)| (format!("{path}.{below}"), role)));
        self
    }

    /// The role of the parameter at `path`, if it was declared.
    pub fn of(&self, path: &str) -> Option<Role> {
        let above = std::iter::successors(Some(path), |path| path.rsplit_once('.').map(|(above, _)| above));
        above.filter_map(|path| self.0.get(path).copied()).next()
    }

    /// Those of the module at `path`, by path from there.
    pub(crate) fn under(&self, path: &str) -> Self {
        if path.is_empty() {
            return self.clone();
        }
        let below = |name: &str| Some(name.strip_prefix(path)?.strip_prefix('.')?.to_string());
        Self(self.0.iter().filter_map(|(name, &role)| Some((below(name)?, role))).collect())
    }
}
