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
use mixtura_routing::residual::Residual;
use mixtura_routing::zero_cost::ZeroComputation;
use mixtura_routing::{BalanceConfig, HashTable, Policy, RouterConfig};

use crate::build::Builder;
use crate::context::ForwardContext;
use crate::error::{ConfigError, ForwardError};
use crate::exchange::Exchange;
use crate::fan::Fan;
use crate::ffn::{Experts, ExpertsShape, FfnActivation};
use crate::init::Init;
use crate::layer_routing::LayerRouting;
use crate::parameters::NamedParameters;
use crate::parts::{ResidualGate, ZeroExperts, blocks, part, rest_of_weight, weights_of};
use crate::role::{Role, Roles};
use crate::router::{Router, RouterSpec, plan_of};

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
    /// Experts E that have a network.
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
    /// Hidden width of every expert where they differ (HMoE), `[E]`; empty when all have `d_expert`.
    pub d_expert_each: Vec<usize>,
    /// Experts without a network beside the E that have one (MoE++).
    pub zero_computation: Option<ZeroComputation>,
    /// Logits of the previous MoE layer, for the gating residual of MoE++; 0 without one.
    pub previous_logits: usize,
    /// How the shared network joins the experts (Residual-MoE); `None` adds it.
    pub residual: Option<Residual>,
}

impl MoeLayerConfig {
    /// `experts` SwiGLU experts of hidden width `d_expert`, `top_k` per token, everything else at its default: the recipe of
    /// [`Policy::TopK`]. That of another policy is [`RouterConfig::of`].
    pub fn new(d_model: usize, experts: usize, top_k: usize, d_expert: usize) -> Self {
        Self {
            d_model,
            experts,
            top_k,
            d_expert,
            d_shared: 0,
            shared_gate: false,
            activation: FfnActivation::Swiglu,
            router: RouterConfig::of(Policy::TopK, top_k),
            balance: BalanceConfig::default(),
            init_std: 0.02,
            out_init_std: 0.02,
            vocab: 0,
            d_expert_each: Vec::new(),
            zero_computation: None,
            previous_logits: 0,
            residual: None,
        }
    }

    /// Whether every value can be built.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.d_model == 0 {
            return Err(ConfigError::new("d_model", 0, "at least 1"));
        }
        self.validate_in("", "this layer")
    }

    /// Whether the layer is what its configuration says and its router can learn from the task; see
    /// [`RouterConfig::validate_training`].
    pub fn validate_training(&self) -> Result<(), ConfigError> {
        self.validate()?;
        self.validate_training_in("", "this layer")
    }

    /// The same of a valid configuration, with keys under `prefix`, in a table that concerns `place`.
    pub(crate) fn validate_training_in(&self, prefix: &str, place: &str) -> Result<(), ConfigError> {
        self.router
            .validate_training(self.all_experts(), self.top_k, self.zero_computation.as_ref())
            .map_err(|error| ConfigError::router(error, prefix, place))
    }

    /// [`validate`](Self::validate) with keys under `prefix`, in a table that concerns `place`.
    pub(crate) fn validate_in(&self, prefix: &str, place: &str) -> Result<(), ConfigError> {
        let error = |key: &str, value: &dyn std::fmt::Display, expected: String| {
            Err(ConfigError::new(format!("{prefix}{key}"), value, expected))
        };
        if self.experts == 0 {
            return error("experts", &0, "at least 1".into());
        }
        let each = &self.d_expert_each;
        if each.is_empty() && self.d_expert == 0 {
            return error("d_expert", &0, "at least 1".into());
        }
        if !each.is_empty() && (each.len() != self.experts || each.contains(&0)) {
            let expected = format!("a positive width for each of the {} experts of {place}", self.experts);
            return error("d_expert_each", &format!("{each:?}"), expected);
        }
        if self.shared_gate && self.d_shared == 0 {
            return error("shared_gate", &true, "false, since d_shared = 0".into());
        }
        if self.residual.is_some() && (self.d_shared == 0 || self.shared_gate) {
            return error("residual", &"given", "a shared network (d_shared) without shared_gate".into());
        }
        let refuse = |error| ConfigError::router(error, prefix, place);
        if let Some(zero) = &self.zero_computation {
            zero.validate(self.experts, &self.router).map_err(refuse)?;
        }
        self.router.validate(self.all_experts(), self.top_k).map_err(refuse)?;
        self.balance.validate_with(&self.router).map_err(refuse)?;
        if self.router.hash_table != HashTable::Modulo && self.vocab == 0 {
            let expected = "at least 1, since router.hash_table has an entry for each token id".into();
            return error("vocab", &0, expected);
        }
        Ok(())
    }

    /// E and the experts without a network.
    fn all_experts(&self) -> usize {
        self.experts + self.zero_computation.map_or(0, |zero| zero.experts())
    }

    /// Hidden width of every expert that has a network, `[E]`.
    fn widths(&self) -> Vec<usize> {
        if self.d_expert_each.is_empty() { vec![self.d_expert; self.experts] } else { self.d_expert_each.clone() }
    }

    /// What the router is made of; `widths` as [`widths`](Self::widths), 0 for experts without a network.
    fn router_spec<'a>(&'a self, widths: &'a [usize]) -> RouterSpec<'a> {
        RouterSpec {
            d_model: self.d_model,
            experts: self.all_experts(),
            top_k: self.top_k,
            router: &self.router,
            balance: &self.balance,
            init_std: self.init_std,
            vocab: self.vocab,
            zero_computation: self.zero_computation,
            previous_logits: self.previous_logits,
            width_e: widths,
        }
    }

    /// How many numbers the layer holds, and the most that one token uses.
    pub(crate) fn parameters(&self) -> [usize; 2] {
        let (d, into) = (self.d_model, if self.activation.kernel().is_gated() { 3 } else { 2 });
        let mut every = self.router_spec(&[]).parameters() + into * d * self.d_shared;
        every += if self.shared_gate { d } else { 0 };
        every += if self.residual == Some(Residual::Coefficient) { ResidualGate::parameters(d) } else { 0 };
        every += self.zero_computation.map_or(0, |zero| ZeroExperts::parameters(&zero, d));
        let mut widths = self.widths();
        widths.sort_unstable_by_key(|&width| std::cmp::Reverse(width));
        let hidden = |widths: &[usize]| into * d * widths.iter().sum::<usize>();
        [every + hidden(&widths), every + hidden(&widths[..self.top_k.min(self.experts)])]
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
    /// The networks that tokens choose among; where widths differ, those as wide as the first.
    pub experts: Experts,
    /// The experts of every further width, in the order of their first expert.
    pub other_widths: Vec<Experts>,
    /// What experts without a network learn.
    pub zero_computation: Option<ZeroExperts>,
    /// The network that every token visits.
    pub shared: Option<Experts>,
    /// Gate of the shared network, `[D, 1]`.
    pub shared_gate: Option<Param<Tensor<2>>>,
    /// Mixes the experts with the shared network instead of adding them.
    pub residual: Option<ResidualGate>,
    #[module(skip)]
    shared_gate_cell: PackCell,
    /// The experts of each block, [`experts`](Self::experts) first; empty when that one computes every row.
    #[module(skip)]
    blocks: Vec<Vec<usize>>,
    /// Whether what a weight lacks to 1 goes to the token itself (BASE).
    #[module(skip)]
    keeps_rest: bool,
    #[module(skip)]
    exchange: Exchange,
    #[module(skip)]
    roles: Roles,
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
    ///
    /// # Errors
    /// If the configuration cannot be built, or on an autodiff device if its router could not learn.
    pub fn new(config: &MoeLayerConfig, seed: u64, device: &Device) -> Result<Self, ConfigError> {
        if device.is_autodiff() { config.validate_training() } else { config.validate() }?;
        Self::build(config, &Builder::new(seed, device))
    }

    pub(crate) fn build(config: &MoeLayerConfig, builder: &Builder) -> Result<Self, ConfigError> {
        let MoeLayerConfig { d_model, activation, init_std, .. } = *config;
        let std = (init_std, config.out_init_std);
        let network = |experts, d_hidden| ExpertsShape { experts, d_model, d_hidden, activation, std };
        let shared = (config.d_shared > 0)
            .then(|| Experts::new(network(1, config.d_shared), Role::Dense, &builder.at("shared")));
        let gate = || builder.parameter("shared_gate", Role::Gate, [d_model, 1], Init::TruncatedNormal(init_std));
        let mixed = config.residual == Some(Residual::Coefficient);
        let widths = config.widths();
        let blocks = blocks(&widths);
        let block =
            |i: usize, builder: Builder| Experts::new(network(blocks[i].1.len(), blocks[i].0), Role::Expert, &builder);
        let other_widths = (1..blocks.len()).map(|i| block(i, builder.at("other_widths").at(i - 1))).collect();
        let width_e = if config.d_expert_each.is_empty() {
            Vec::new()
        } else {
            [widths, vec![0; config.all_experts() - config.experts]].concat()
        };
        let one = blocks.len() == 1 && config.zero_computation.is_none();
        Ok(Self {
            router: Router::new(config.router_spec(&width_e), &builder.at("router"))?,
            experts: block(0, builder.at("experts")),
            other_widths,
            zero_computation: config
                .zero_computation
                .map(|kinds| ZeroExperts::new(kinds, d_model, init_std, &builder.at("zero_computation"))),
            shared,
            shared_gate: config.shared_gate.then(gate),
            residual: mixed.then(|| ResidualGate::new(d_model, init_std, &builder.at("residual"))),
            shared_gate_cell: PackCell::new(),
            blocks: if one { Vec::new() } else { blocks.into_iter().map(|(_, experts)| experts).collect() },
            keeps_rest: config.router.policy == Policy::Base,
            exchange: Exchange::default(),
            roles: builder.roles(),
        })
    }

    /// The same layer with another way for rows to reach their experts.
    pub fn with_exchange(self, exchange: Exchange) -> Self {
        Self { exchange, ..self }
    }

    /// Routes and answers `T` tokens.
    ///
    /// # Shapes
    /// `[T, D]` gives `[T, D]`.
    ///
    /// # Errors
    /// If a router logit is not finite, or the capacity rule leaves no slot.
    pub fn forward(&self, x_td: Tensor<2>, context: &ForwardContext) -> Result<MoeOutput, ForwardError> {
        self.forward_layer(x_td, None, 0, context)
    }

    /// As layer `layer` of a model: its index keys the routing noise. `previous_te` are the router logits of the MoE layer
    /// before ([`LayerRouting::logits_te`]), which a gating residual adds to its own; the first layer has none.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_layer(
        &self,
        x_td: Tensor<2>,
        previous_te: Option<Tensor<2>>,
        layer: usize,
        context: &ForwardContext,
    ) -> Result<MoeOutput, ForwardError> {
        let mut x = Fan::new(x_td);
        let routing = self
            .router
            .route(x.take(), previous_te, layer, context)
            .map_err(|source| ForwardError::Routing { layer, source })?;
        let routed_td = self.forward_routed(&mut x, &routing, context.numerics);
        let y_td = match (self.forward_shared(&mut x, context.numerics), &self.residual) {
            (None, _) => routed_td,
            (Some(shared_td), None) => routed_td + shared_td,
            (Some(shared_td), Some(gate)) => gate.forward(x.take(), routed_td, shared_td, context.numerics),
        };
        Ok(MoeOutput { y_td, routing })
    }

    /// What the routed experts answer.
    fn forward_routed(&self, x: &mut Fan<2>, routing: &LayerRouting, numerics: Numerics) -> Tensor<2> {
        let exchange = self.exchange;
        let mut weight = Fan::new(routing.weight_n.clone());
        let blocks = std::iter::once(&self.experts).chain(&self.other_widths).zip(&self.blocks);
        let of_blocks = blocks.map(|(experts, members)| {
            let (plan, rows) = part(routing.assignment(), members);
            exchange.run(experts, x.take(), weights_of(weight.take(), rows), plan, numerics)
        });
        let of_blocks = of_blocks.reduce(|sum, next| sum + next);
        let mut y_td = of_blocks.unwrap_or_else(|| {
            exchange.run(&self.experts, x.take(), weight.take(), plan_of(&routing.routed), numerics)
        });
        if let Some(zero) = &self.zero_computation {
            y_td = y_td + zero.forward(x.take(), weight.take(), &routing.routed, numerics);
        }
        if self.keeps_rest {
            y_td = y_td + rest_of_weight(weight.take(), &routing.routed) * x.take();
        }
        y_td
    }

    fn forward_shared(&self, x: &mut Fan<2>, numerics: Numerics) -> Option<Tensor<2>> {
        let y_td = self.shared.as_ref()?.forward_dense(x.take(), numerics);
        let Some(gate) = &self.shared_gate else { return Some(y_td) };
        let exact = Numerics { precision: Precision::F32, ..numerics };
        Some(y_td * sigmoid(linear(x.take(), gate.val(), &self.shared_gate_cell, exact)))
    }
}

impl NamedParameters for MoeLayer {
    fn hollow(&self) -> Self {
        let device = self.experts.gate_up.lazy_device();
        let hollow = Self::build(&MoeLayerConfig::new(1, 1, 1, 1), &Builder::new(0, &device));
        hollow.expect("a linear scorer can always be built")
    }

    fn for_each_cell(&self, f: &mut dyn FnMut(&PackCell)) {
        self.router.for_each_cell(f);
        self.experts.for_each_cell(f);
        self.other_widths.iter().for_each(|experts| experts.for_each_cell(f));
        self.zero_computation.iter().for_each(|experts| experts.for_each_cell(f));
        self.residual.iter().for_each(|gate| gate.for_each_cell(f));
        self.shared.iter().for_each(|shared| shared.for_each_cell(f));
        f(&self.shared_gate_cell);
    }

    fn roles(&self) -> Roles {
        self.roles.clone()
    }
}
