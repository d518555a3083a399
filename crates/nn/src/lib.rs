//! Routers, experts, MoE layers, attention and decoder models as Burn modules.
//!
//! [`MoeLayer`] goes into any Burn model in place of a feed-forward network; [`Decoder`] is a whole language model whose
//! [`ModelConfig`] expresses the OLMoE and Mixtral architectures exactly. Everything a step produces is in its return
//! value. This crate opens no file, reads no environment variable and keeps no global.
//!
//! ```
//! use burn::tensor::Device;
//! use mixtura_nn::{Decoder, ForwardContext, ModelConfig, MoeConfig, NamedParameters, Role};
//!
//! let config = ModelConfig { vocab: 32, moe: Some(MoeConfig::new(4, 2, 24)), ..ModelConfig::new(16, 2, 2, 8) };
//! let mut model = Decoder::new(&config, 7, &Device::default().autodiff()).unwrap();
//! let (ids, targets) = ([1, 2, 3, 4], [2, 3, 4, 5]);
//! let out = model.loss(&ids, &targets, 1, 4, &ForwardContext::training(7, 0, Default::default())).unwrap();
//! let gradients = model.take_gradients(&mut out.total.backward());
//! model.for_each_parameter_mut(|i, info, values| {
//!     let Some(gradient) = &gradients[i] else { return };
//!     mixtura_ops::with_slice(gradient, |gradient| values.iter_mut().zip(gradient).for_each(|(w, g)| *w -= 0.1 * g));
//!     assert_eq!(info.decays(), !matches!(info.role, Role::Norm | Role::Router));
//! });
//! ```

pub mod decoder;
pub mod decode;
pub mod sealed;
pub mod block;
pub mod kv_cache;
mod recompute;
mod fan;
pub mod exchange;
pub mod attention;
pub mod router;
pub mod layer_routing;
pub mod scorer;
pub mod moe;
pub mod parts;
pub mod soft;
pub mod ffn;
pub mod norm;
pub mod config;
pub mod context;
pub mod parameters;
pub mod role;
pub mod init;
mod build;
mod error;

pub use attention::{Attention, AttentionConfig, QkNorm};
pub use block::{Block, Feedforward};
pub use config::{
    AllLayers, EveryLayer, LayerFfn, ModelConfig, MoeConfig, MoeLayers, ParameterCounts, PerLayer, mixtral_8x7b,
    olmoe_1b_7b,
};
pub use context::{Beyond, ForwardContext, SelectionCounts};
pub use decode::{BatchOutput, DecodeOutput, NewTokens, Project, RoutedRows};
pub use decoder::{Decoder, DecoderOutput, Embedding, Head, LossOutput};
pub use error::{ConfigError, ForwardError, LoadError};
pub use exchange::Exchange;
pub use ffn::{Experts, ExpertsConfig, FfnActivation};
pub use init::Init;
pub use kv_cache::KvCache;
pub use layer_routing::{LayerLosses, LayerRouting};
pub use mixtura_routing::residual::Residual;
pub use mixtura_routing::soft::config::{Emit, SoftConfig};
pub use moe::{MoeLayer, MoeLayerConfig, MoeOutput};
pub use norm::{RmsNorm, RmsNormConfig};
pub use parameters::{NamedParameters, ParameterInfo};
pub use parts::{ResidualGate, ZeroExperts};
pub use role::{Role, Roles};
pub use router::{Router, RouterLayerConfig};
pub use sealed::{SealError, WeightSource};
pub use soft::config::SoftLayerConfig;
pub use soft::soft_moe::{SoftMoeConfig, SoftMoeLayer, SoftMoeOutput};
pub use soft::{SoftLayer, SoftMixer};
