//! The Mixture-of-Experts layer: every token goes to K of E experts and gets the weighted sum of what they answer.
//!
//! ```text
//! x_td -> router -> weight_n, dispatch plan
//!    \------------------> experts -> y_td  (+ shared experts that every token visits)
//! ```
//!
//! Legend: T tokens, D model width, E experts, K experts per token, F hidden width, N rows (token, choice pairs).

use burn::module::{Module, Param};
use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, Tensor};
use mixtura_ops::{Numerics, PackCell, Precision, linear};
use mixtura_routing::{BalanceConfig, HashTable, RouterConfig};

use crate::build::Builder;
use crate::config::FfnActivation;
use crate::context::ForwardContext;
use crate::error::{ConfigError, ForwardError};
use crate::ffn::{Experts, ExpertsShape};
use crate::init::Init;
use crate::parameters::NamedParameters;
use crate::router::{LayerRouting, Router, RouterSpec};

/// What an MoE layer is made of.
///
/// ```
/// use mixtura_nn::MoeLayerConfig;
/// let config = MoeLayerConfig { d_shared: 32, ..MoeLayerConfig::new(64, 8, 2, 128) };
/// config.validate().unwrap();
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct MoeLayerConfig {
    /// Width D of the tokens.
    pub d_model: usize,
    /// Experts E.
    pub experts: usize,
    /// Experts K that a token visits.
    pub top_k: usize,
    /// Hidden width F of an expert.
    pub d_expert: usize,
    /// Hidden width of the network that every token visits besides its experts; 0 for none.
    pub d_shared: usize,
    /// Multiplies that network's output by sigmoid(w x).
    pub shared_gate: bool,
    /// Activation of the experts.
    pub activation: FfnActivation,
    /// How tokens choose.
    pub router: RouterConfig,
    /// What keeps the experts' loads even.
    pub balance: BalanceConfig,
    /// Standard deviation of the initial weights.
    pub init_std: f64,
    /// Standard deviation of the projections back to the model's width.
    pub out_init_std: f64,
    /// Token ids V, for the table of a hash layer; 0 without one.
    pub vocab: usize,
}

impl MoeLayerConfig {
    /// `experts` SwiGLU experts of hidden width `d_expert`, `top_k` per token, everything else at its default.
    pub fn new(d_model: usize, experts: usize, top_k: usize, d_expert: usize) -> Self {
        Self {
            d_model,
            experts,
            top_k,
            d_expert,
            d_shared: 0,
            shared_gate: false,
            activation: FfnActivation::Swiglu,
            router: RouterConfig::default(),
            balance: BalanceConfig::default(),
            init_std: 0.02,
            out_init_std: 0.02,
            vocab: 0,
        }
    }

    /// Whether every value can be built.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (key, value) in [("d_model", self.d_model), ("experts", self.experts), ("d_expert", self.d_expert)] {
            if value == 0 {
                return Err(ConfigError::new(key, 0, "at least 1"));
            }
        }
        if self.shared_gate && self.d_shared == 0 {
            return Err(ConfigError::new("shared_gate", true, "false, since d_shared = 0"));
        }
        let refuse = |error| ConfigError::router(error, "", "this layer");
        self.router.validate(self.experts, self.top_k).map_err(refuse)?;
        self.balance.validate_with(&self.router).map_err(refuse)?;
        if self.router.hash_table != HashTable::Modulo && self.vocab == 0 {
            return Err(ConfigError::new(
                "vocab",
                0,
                "at least 1, since router.hash_table has an entry for each token id",
            ));
        }
        Ok(())
    }

    /// What the router is made of.
    fn router_spec(&self) -> RouterSpec<'_> {
        RouterSpec {
            d_model: self.d_model,
            experts: self.experts,
            top_k: self.top_k,
            router: &self.router,
            balance: &self.balance,
            init_std: self.init_std,
            vocab: self.vocab,
        }
    }

    /// How many numbers the layer holds, and the most that one token uses.
    pub(crate) fn parameters(&self) -> [usize; 2] {
        let into = if self.activation.kernel().is_gated() { 3 } else { 2 };
        let network = |d_hidden: usize| into * self.d_model * d_hidden;
        let shared = network(self.d_shared) + if self.shared_gate { self.d_model } else { 0 };
        let every = self.router_spec().parameters() + shared;
        let one = network(self.d_expert);
        [every + self.experts * one, every + self.top_k.min(self.experts) * one]
    }
}

/// A Mixture-of-Experts layer, usable in any Burn model in place of a feed-forward network.
///
/// The residual connection and the normalisation before the layer are the caller's.
///
/// ```
/// use burn::module::Module;
/// use burn::nn::{Linear, LinearConfig};
/// use burn::optim::{AdamConfig, GradientsParams, Optimizer};
/// use burn::tensor::{Device, Distribution, Tensor};
/// use mixtura_nn::{ForwardContext, MoeLayer, MoeLayerConfig};
///
/// #[derive(Module, Debug)]
/// struct Classifier {
///     moe: MoeLayer,
///     head: Linear,
/// }
///
/// let device = Device::default().autodiff();
/// let mut model = Classifier {
///     moe: MoeLayer::new(&MoeLayerConfig::new(8, 4, 2, 16), 7, &device).unwrap(),
///     head: LinearConfig::new(8, 1).init(&device),
/// };
/// let mut optimizer = AdamConfig::new().init();
///
/// let x_td = Tensor::<2>::random([32, 8], Distribution::Normal(0.0, 1.0), &device);
/// let target = x_td.clone().slice([0..32, 0..1]).sin();
/// let mut losses = Vec::new();
/// for step in 0..20 {
///     let context = ForwardContext::training(7, step, Default::default());
///     let out = model.moe.forward(x_td.clone(), &context).unwrap();
///     let error = model.head.forward(x_td.clone() + out.y_td) - target.clone();
///     let loss = error.powf_scalar(2.0).mean() + out.routing.losses.total.clone();
///     losses.push(loss.clone().into_scalar::<f32>());
///     let gradients = GradientsParams::from_grads(loss.backward(), &model);
///     model = optimizer.step(0.01, model, gradients);
///     println!("step {step}: load per expert {:?}", out.routing.assignment().load());
/// }
/// assert!(losses[19] < losses[0]);
/// ```
#[derive(Module, Debug)]
pub struct MoeLayer {
    /// Decides which experts see which token.
    pub router: Router,
    /// The networks that tokens choose among.
    pub experts: Experts,
    /// The network that every token visits.
    pub shared: Option<Experts>,
    /// Gate of the shared network, `[D, 1]`.
    pub shared_gate: Option<Param<Tensor<2>>>,
    #[module(skip)]
    shared_gate_cell: PackCell,
}

/// What an MoE layer answers.
#[derive(Debug, Clone)]
pub struct MoeOutput {
    /// The layer's output, `[T, D]`.
    pub y_td: Tensor<2>,
    /// How the tokens were routed, with the auxiliary losses to add to the model's.
    pub routing: LayerRouting,
}

impl MoeLayer {
    /// A layer whose weights are drawn from `seed`.
    pub fn new(config: &MoeLayerConfig, seed: u64, device: &Device) -> Result<Self, ConfigError> {
        config.validate()?;
        Self::build(config, &Builder::new(seed, device))
    }

    pub(crate) fn build(config: &MoeLayerConfig, builder: &Builder) -> Result<Self, ConfigError> {
        let MoeLayerConfig { d_model, experts, activation, init_std, .. } = *config;
        let std = (init_std, config.out_init_std);
        let network = |experts, d_hidden| ExpertsShape { experts, d_model, d_hidden, activation, std };
        let shared = (config.d_shared > 0).then(|| Experts::new(network(1, config.d_shared), &builder.at("shared")));
        let gate = || builder.parameter("shared_gate", [d_model, 1], Init::TruncatedNormal(init_std));
        Ok(Self {
            router: Router::new(config.router_spec(), &builder.at("router"))?,
            experts: Experts::new(network(experts, config.d_expert), &builder.at("experts")),
            shared,
            shared_gate: config.shared_gate.then(gate),
            shared_gate_cell: PackCell::new(),
        })
    }

    /// Routes and answers `T` tokens.
    ///
    /// # Shapes
    /// `[T, D]` gives `[T, D]`.
    ///
    /// # Errors
    /// If a router logit is not finite, or the capacity rule leaves no slot.
    pub fn forward(&self, x_td: Tensor<2>, context: &ForwardContext) -> Result<MoeOutput, ForwardError> {
        self.forward_layer(x_td, 0, context)
    }

    /// As layer `layer` of a model: its index keys the routing noise.
    pub(crate) fn forward_layer(
        &self,
        x_td: Tensor<2>,
        layer: usize,
        context: &ForwardContext,
    ) -> Result<MoeOutput, ForwardError> {
        let (routing, plan) = self
            .router
            .forward(x_td.clone(), layer, context)
            .map_err(|source| ForwardError::Routing { layer, source })?;
        let routed_td = self.experts.forward(x_td.clone(), routing.weight_n.clone(), &plan, context.numerics);
        let y_td = match self.forward_shared(x_td, context.numerics) {
            None => routed_td,
            Some(shared_td) => routed_td + shared_td,
        };
        Ok(MoeOutput { y_td, routing })
    }

    fn forward_shared(&self, x_td: Tensor<2>, numerics: Numerics) -> Option<Tensor<2>> {
        let y_td = self.shared.as_ref()?.forward_dense(x_td.clone(), numerics);
        let Some(gate) = &self.shared_gate else { return Some(y_td) };
        let exact = Numerics { precision: Precision::F32, ..numerics };
        Some(y_td * sigmoid(linear(x_td, gate.val(), &self.shared_gate_cell, exact)))
    }
}

impl NamedParameters for MoeLayer {
    fn hollow(&self) -> Self {
        let device = self.experts.gate_up.lazy_device();
        let hollow = Self::build(&MoeLayerConfig::new(1, 1, 1, 1), &Builder::new(0, &device));
        hollow.expect("a linear scorer can always be built")
    }

    fn clear_packs(&self) {
        self.router.clear_packs();
        self.experts.clear_packs();
        self.shared.iter().for_each(Experts::clear_packs);
        self.shared_gate_cell.clear();
    }
}
