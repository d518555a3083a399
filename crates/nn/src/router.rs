//! From tokens to combine weights: scorer, noise, selection, weights and auxiliary losses of one MoE layer.
//!
//! ```text
//! logits_te = x W (f32) -> mixtura-routing selects, drops and weighs -> weight_n, losses (both differentiable)
//! ```
//!
//! Selection is discrete and runs on the host; `weight_n` and the losses re-enter the graph as host functions whose
//! backward passes are mixtura-routing's own gradients. Training, evaluation and decoding all come through here.
//!
//! Legend: T tokens, D model width, E experts, K experts per token, N rows (kept token, choice pairs).

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use mixtura_ops::{
    DispatchPlan, Numerics, PackCell, Precision, RowIndices, host_function, host_function_2, linear, tensor_like,
    with_slice,
};
use mixtura_routing::policy::batchwise;
use mixtura_routing::zero_cost::ZeroComputation;
use mixtura_routing::{
    AuxiliaryOptions, BalanceConfig, DropOrder, HashTable, Noise, Policy, RouteShape, Routed, RouterConfig,
    RouterInput, RoutingError, StepContext, auxiliary, policy::hash, route, route::input_jitter,
};

use crate::build::Builder;
use crate::context::ForwardContext;
use crate::error::ConfigError;
use crate::fan::Fan;
use crate::init::Init;
use crate::layer_routing::{LayerLosses, LayerRouting};
use crate::role::Role;
use crate::scorer::{Logits, ScorerParameters};

/// The part of an MoE layer that decides which experts see which token.
#[derive(Module, Debug)]
pub struct Router {
    /// The scorer's first matrix: `[D, E]` of a linear one, `[D, E + groups]` with two levels. See [`crate::scorer`] for the others.
    pub weight: Option<Param<Tensor<2>>>,
    /// The scorer's second matrix.
    pub second: Option<Param<Tensor<2>>>,
    /// Logarithm of a cosine scorer's temperature, `[1]`.
    pub log_temperature: Option<Param<Tensor<1>>>,
    /// Scale of the learned noise before softplus, of the shape of a linear scorer's matrix; only with softplus noise.
    pub noise: Option<Param<Tensor<2>>>,
    /// Added to the scores for selection only, `[E]`; only with loss-free balancing. It has no gradient.
    pub bias: Option<Param<Tensor<1>>>,
    /// What a probability must exceed in evaluation, `[E]`; only with batchwise gating.
    pub thresholds: Option<Param<Tensor<1>>>,
    /// What the logits of the previous MoE layer add to this one's, `[E of that layer, E]` (MoE++).
    pub gating_residual: Option<Param<Tensor<2>>>,
    /// Expert of every token id, `[V]`, as whole numbers; only with a hash table. It has no gradient.
    pub table: Option<Param<Tensor<1>>>,
    #[module(skip)]
    rules: Rules,
    #[module(skip)]
    cells: Cells,
}

/// Packed copies of the router's matrices.
#[derive(Debug, Clone, Default)]
struct Cells {
    weight: PackCell,
    second: PackCell,
    noise: PackCell,
    gating_residual: PackCell,
}

/// What a router does, apart from its weights.
#[derive(Debug, Clone, PartialEq)]
struct Rules {
    experts: usize,
    top_k: usize,
    logits: Logits,
    router: RouterConfig,
    balance: BalanceConfig,
    zero_computation: Option<ZeroComputation>,
    width_e: Option<Vec<f64>>,
}

/// What a [`Router`] is made of, for use outside an MoE layer.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use mixtura_nn::{ForwardContext, RouterLayerConfig};
/// let device = Device::default();
/// let router = RouterLayerConfig::new(8, 4, 2).init(&device).unwrap();
/// let x_td = Tensor::<2>::random([10, 8], Distribution::Normal(0.0, 1.0), &device);
/// let (routing, _plan) = router.forward(x_td, 0, &ForwardContext::evaluation(Default::default())).unwrap();
/// assert_eq!(routing.logits_te.dims(), [10, 4]);
/// assert_eq!(routing.weight_n.dims(), [10 * 2]);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct RouterLayerConfig {
    /// Width D of the tokens.
    pub d_model: usize,
    /// Experts E.
    pub experts: usize,
    /// Experts K that a token visits.
    pub top_k: usize,
    /// How tokens choose.
    pub router: RouterConfig,
    /// What keeps the experts' loads even.
    pub balance: BalanceConfig,
    /// Token ids V, for the table of a hash layer; 0 without one.
    pub vocab: usize,
    /// Standard deviation of the initial weights.
    pub init_std: f64,
    /// What the weights are drawn from. Modules of one shape with the same seed start equal.
    pub seed: u64,
}

impl RouterLayerConfig {
    /// `top_k` of `experts` experts by [`Policy::TopK`], everything else at its default.
    pub fn new(d_model: usize, experts: usize, top_k: usize) -> Self {
        Self {
            d_model,
            experts,
            top_k,
            router: RouterConfig::of(Policy::TopK, top_k),
            balance: BalanceConfig::default(),
            vocab: 0,
            init_std: 0.02,
            seed: 0,
        }
    }

    /// The router, with parameters on `device`.
    ///
    /// # Errors
    /// If the configuration cannot be built, or on an autodiff device if it could not learn.
    pub fn init(&self, device: &Device) -> Result<Router, ConfigError> {
        let Self { d_model, experts, top_k, router, balance, vocab, init_std, seed } = self;
        let refuse = |error| ConfigError::router(error, "", "this layer");
        for (key, value) in [("d_model", *d_model), ("experts", *experts)] {
            if value == 0 {
                return Err(ConfigError::new(key, 0, "at least 1"));
            }
        }
        router.validate(*experts, *top_k).map_err(refuse)?;
        balance.validate_with(router).map_err(refuse)?;
        if device.is_autodiff() {
            router.validate_training(*experts, *top_k, None).map_err(refuse)?;
        }
        if router.hash_table != HashTable::Modulo && *vocab == 0 {
            let expected = "at least 1, since router.hash_table has an entry for each token id";
            return Err(ConfigError::new("vocab", 0, expected));
        }
        let spec = RouterSpec {
            d_model: *d_model,
            experts: *experts,
            top_k: *top_k,
            router,
            balance,
            init_std: *init_std,
            vocab: *vocab,
            zero_computation: None,
            previous_logits: 0,
            width_e: &[],
        };
        Router::new(spec, &Builder::new(*seed, device))
    }
}

/// What a router is made of, all of it checked before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RouterSpec<'a> {
    pub d_model: usize,
    /// E, with every kind of expert.
    pub experts: usize,
    pub top_k: usize,
    pub router: &'a RouterConfig,
    pub balance: &'a BalanceConfig,
    pub init_std: f64,
    /// V, for hash tables.
    pub vocab: usize,
    pub zero_computation: Option<ZeroComputation>,
    /// Logits of the previous MoE layer, for a gating residual; 0 without one.
    pub previous_logits: usize,
    /// Hidden width of every expert where they differ.
    pub width_e: &'a [usize],
}

impl RouterSpec<'_> {
    /// How many numbers such a router holds.
    pub fn parameters(&self) -> usize {
        let Self { d_model, experts, router, balance, vocab, .. } = *self;
        let logits = router.logits_per_token(experts);
        let scorer = Logits::of(router).map_or(0, |scorer| scorer.parameters(d_model, logits));
        let noise = if matches!(router.noise, Noise::Softplus { .. }) { d_model * logits } else { 0 };
        let per_expert = usize::from(balance.bias_update > 0.0) + usize::from(router.policy == Policy::Batchwise);
        let table = if router.hash_table == HashTable::Modulo { 0 } else { vocab };
        scorer + noise + per_expert * experts + table + self.previous_logits * experts
    }
}

impl Router {
    /// A router whose configuration has been validated.
    pub(crate) fn new(spec: RouterSpec, builder: &Builder) -> Result<Self, ConfigError> {
        let RouterSpec { d_model, experts, top_k, router, balance, init_std, vocab, .. } = spec;
        let RouterSpec { zero_computation, previous_logits, width_e, .. } = spec;
        let width = router.logits_per_token(experts);
        let logits = Logits::of(router)?;
        let learned_noise = matches!(router.noise, Noise::Softplus { .. });
        // Shazeer's gate starts at zero: equal load, and the noise breaks the ties.
        let init = if learned_noise { Init::Zeros } else { Init::TruncatedNormal(init_std) };
        let ScorerParameters { weight, second, log_temperature } =
            logits.build(d_model, width, init, init_std, builder);
        let batchwise = router.policy == Policy::Batchwise;
        let table = match router.hash_table {
            HashTable::Random => Some(Init::RandomTable(experts)),
            // Until the counts of the training text are known.
            HashTable::Balanced => Some(Init::ModuloTable(experts)),
            _ => None,
        };
        Ok(Self {
            weight,
            second,
            log_temperature,
            noise: learned_noise.then(|| builder.parameter("noise", Role::Router, [d_model, width], Init::Zeros)),
            bias: (balance.bias_update > 0.0).then(|| builder.constant("bias", Role::Router, [experts], Init::Zeros)),
            thresholds: batchwise.then(|| builder.parameter("thresholds", Role::Router, [experts], Init::Zeros)),
            // Zero: a layer starts as if it stood alone.
            gating_residual: (previous_logits > 0)
                .then(|| builder.parameter("gating_residual", Role::Router, [previous_logits, experts], Init::Zeros)),
            table: table.map(|init| builder.constant("table", Role::Table, [vocab], init)),
            rules: Rules {
                experts,
                top_k,
                logits,
                router: router.clone(),
                balance: balance.clone(),
                zero_computation,
                width_e: (!width_e.is_empty()).then(|| width_e.iter().map(|&width| width as f64).collect()),
            },
            cells: Cells::default(),
        })
    }

    /// Routes `T` tokens, and returns how to dispatch them.
    ///
    /// # Shapes
    /// `x_td` is `[T, D]`.
    pub fn forward(
        &self,
        x_td: Tensor<2>,
        layer: usize,
        context: &ForwardContext,
    ) -> Result<(LayerRouting, Arc<DispatchPlan>), RoutingError> {
        let routing = self.route(x_td, None, layer, context)?;
        let plan = Arc::new(plan_of(&routing.routed));
        Ok((routing, plan))
    }

    /// Routes `T` tokens. `previous_te` are the logits of the previous MoE layer, for a gating residual; the first has none.
    pub(crate) fn route(
        &self,
        x_td: Tensor<2>,
        previous_te: Option<Tensor<2>>,
        layer: usize,
        context: &ForwardContext,
    ) -> Result<LayerRouting, RoutingError> {
        let [tokens, _] = x_td.dims();
        let Rules { experts, top_k, router, balance, .. } = &self.rules;
        let shape = RouteShape { tokens, experts: *experts, top_k: *top_k };
        let step = context.router(layer);

        let (logits_te, raw_noise_te) = self.scores(&x_td, previous_te, &step, context.numerics);
        let logits: Arc<[f32]> = with_slice(&logits_te, |logits| logits.into());
        let raw_noise: Option<Arc<[f32]>> = raw_noise_te.as_ref().map(|raw| with_slice(raw, |raw| raw.into()));
        let values = |parameter: &Option<Param<Tensor<1>>>| -> Option<Vec<f32>> {
            parameter.as_ref().map(|parameter| with_slice(&parameter.val(), |values| values.to_vec()))
        };
        let (bias, thresholds) = (values(&self.bias), values(&self.thresholds));
        let seen = self.looks_at_tokens().then(|| with_slice(&x_td, |x| x.to_vec()));
        let given = self.experts_of_ids(tokens, context)?;

        let input = RouterInput {
            raw_noise_te: raw_noise.as_deref(),
            bias_e: bias.as_deref(),
            thresholds_e: thresholds.as_deref(),
            x_td: seen.as_deref(),
            given_tk: given.as_deref(),
            zero_computation: self.rules.zero_computation,
            ..RouterInput::new(&logits)
        };
        let routed = match &context.kept {
            None => Arc::new(route(&input, shape, router, &step)?),
            Some(kept) => kept.clone(),
        };
        let counted = context.beyond.as_ref().and_then(|beyond| beyond.fractions(layer, &routed));
        let options = AuxiliaryOptions {
            global_fraction_e: counted.as_deref(),
            sequence: context.sequence,
            width_e: self.rules.width_e.as_deref(),
        };
        let coefficient = context.balance_coefficient.unwrap_or(balance.coefficient);
        let losses = auxiliary(&input, &routed, &BalanceConfig { coefficient, ..balance.clone() }, options)?;

        let mut logits = Fan::new(logits_te);
        let weight_n = weights_op(logits.take(), raw_noise_te.clone(), raw_noise, &routed);
        let (balance, z, entropy) = (losses.balance, losses.z, losses.entropy);
        let mut total = match raw_noise_te.zip(losses.draw_noise_te) {
            None => scalar_op(logits.take(), losses.total, losses.dlogits_te),
            Some((raw, draw)) => scalar_op_2(logits.take(), raw, losses.total, losses.dlogits_te, draw),
        };
        if let (Some(parameter), Some(values), true) = (&self.thresholds, &thresholds, context.training) {
            total = total + threshold_op(parameter.val(), values, &routed);
        }
        let losses = LayerLosses { balance, z, entropy, total };
        Ok(LayerRouting { layer, logits_te: logits.take(), weight_n, routed, losses })
    }

    /// Logits and, in training with learned noise, `x W_noise`; both `[T, E]`.
    fn scores(
        &self,
        x_td: &Tensor<2>,
        previous_te: Option<Tensor<2>>,
        step: &StepContext,
        numerics: Numerics,
    ) -> (Tensor<2>, Option<Tensor<2>>) {
        let Cells { weight, second, noise, gating_residual } = &self.cells;
        let numerics = Numerics { precision: Precision::F32, ..numerics };
        let mut x = Fan::new(x_td.clone());
        let logits_te = self.rules.logits.forward(
            self.jitter(x.take(), step),
            self.rules.experts,
            self.weight.as_ref().map(|w| (w.val(), weight)),
            self.second.as_ref().map(|w| (w.val(), second)),
            self.log_temperature.as_ref().map(Param::val),
            numerics,
        );
        let logits_te = match (&self.gating_residual, previous_te) {
            (Some(carry), Some(previous_te)) => logits_te + linear(previous_te, carry.val(), gating_residual, numerics),
            _ => logits_te,
        };
        let learned_noise = self.noise.as_ref().filter(|_| step.training);
        (logits_te, learned_noise.map(|w| linear(x.take(), w.val(), noise, numerics)))
    }

    /// Whether in evaluation every token is routed by itself, so that it may come with any others.
    pub(crate) fn is_per_token(&self) -> bool {
        let Rules { router, top_k, zero_computation, .. } = &self.rules;
        router.eval_capacity_factor == 0.0 && router.leak(false, *top_k, zero_computation.as_ref()).is_none()
    }

    fn looks_at_tokens(&self) -> bool {
        matches!(self.rules.router.drop_order, DropOrder::Similarity | DropOrder::SimilarityRedirect)
    }

    /// Hash layers: the experts of the token ids, `[T, K]`.
    fn experts_of_ids(&self, tokens: usize, context: &ForwardContext) -> Result<Option<Vec<u32>>, RoutingError> {
        let Rules { experts, top_k, .. } = self.rules;
        if self.rules.logits != Logits::None {
            return Ok(None);
        }
        let needs = "token ids: ForwardContext::ids, which a decoder fills in";
        let ids = context.ids.as_deref().filter(|ids| ids.len() == tokens);
        let ids = ids.ok_or(RoutingError::MissingInput { policy: "hash", needs })?;
        let choices = |table: &[u32]| hash::choices(ids, table, experts, top_k);
        Ok(Some(match &self.table {
            None => choices(&[]),
            Some(table) => {
                choices(&with_slice(&table.val(), |table| table.iter().map(|&e| e as u32).collect::<Vec<_>>()))
            }
        }))
    }

    /// Sets the table of a balanced hash layer from how often each token id occurs in the training text, `[V]`.
    ///
    /// # Panics
    /// If there are not as many counts as token ids.
    pub fn balance_table(&mut self, frequency_v: &[f64]) {
        if self.rules.router.hash_table != HashTable::Balanced {
            return;
        }
        let (table, _) = hash::balanced_table(frequency_v, self.rules.experts);
        let set = |values: &mut [f32]| {
            assert_eq!(values.len(), table.len(), "one count for each token id");
            values.iter_mut().zip(&table).for_each(|(value, &expert)| *value = expert as f32);
        };
        self.table =
            self.table.take().map(|parameter| parameter.map(|tensor| mixtura_ops::with_slice_mut(tensor, set)));
    }

    /// The router's input times uniform noise, in training with a jitter rule only. Experts see the clean input.
    fn jitter(&self, x_td: Tensor<2>, step: &StepContext) -> Tensor<2> {
        let Noise::Jitter { eps } = self.rules.router.noise else { return x_td };
        if !step.training || eps == 0.0 {
            return x_td;
        }
        let [tokens, width] = x_td.dims();
        let mut factor = vec![1.0f32; tokens * width];
        input_jitter(&mut factor, width, eps, step);
        let factor = tensor_like(factor, [tokens, width], &x_td);
        x_td * factor
    }

    /// Moves the selection bias towards the experts with less than the mean load, by the configured step.
    pub fn update_bias(&mut self, load_e: &[f64]) {
        let u = self.rules.balance.bias_update;
        if let Some(bias) = self.bias.take() {
            let update = |bias: Tensor<1>| {
                mixtura_ops::with_slice_mut(bias, |bias| mixtura_routing::losses::bias_update(bias, load_e, u))
            };
            self.bias = Some(bias.map(update));
        }
    }

    pub(crate) fn for_each_cell(&self, f: &mut dyn FnMut(&PackCell)) {
        let Cells { weight, second, noise, gating_residual } = &self.cells;
        [weight, second, noise, gating_residual].into_iter().for_each(f);
    }
}

/// The row weights with routing's gradient for the logits, and for the noise's scale where that is learned.
fn weights_op(
    logits_te: Tensor<2>,
    raw_noise_te: Option<Tensor<2>>,
    raw_noise: Option<Arc<[f32]>>,
    routed: &Arc<Routed<f32>>,
) -> Tensor<1> {
    let (value, shape) = (routed.weight_n.clone(), [routed.weight_n.len()]);
    let routed = routed.clone();
    let dlogits_of = move |routed: &Routed<f32>, dweight_n: &[f32]| {
        let mut dlogits_te = vec![0.0; routed.logits_len()];
        routed.weights_backward(dweight_n, &mut dlogits_te);
        dlogits_te
    };
    match raw_noise_te.zip(raw_noise) {
        None => host_function(logits_te, value, shape, move |dweight_n| dlogits_of(&routed, dweight_n)),
        Some((raw_te, raw)) => host_function_2(logits_te, raw_te, value, shape, move |dweight_n| {
            let dlogits_te = dlogits_of(&routed, dweight_n);
            let mut draw_te = vec![0.0; dlogits_te.len()];
            routed.noise_backward(&raw, &dlogits_te, &mut draw_te);
            (dlogits_te, draw_te)
        }),
    }
}

/// A scalar whose gradient is known.
fn scalar_op(x: Tensor<2>, value: f64, dx: Vec<f32>) -> Tensor<1> {
    host_function(x, vec![value as f32], [1], move |dy| scaled(dx, dy[0]))
}

fn scalar_op_2(a: Tensor<2>, b: Tensor<2>, value: f64, da: Vec<f32>, db: Vec<f32>) -> Tensor<1> {
    host_function_2(a, b, vec![value as f32], [1], move |dy| (scaled(da, dy[0]), scaled(db, dy[0])))
}

/// Batchwise gating pulls its thresholds towards the training mask; the mean over tokens of the paper's loss.
fn threshold_op(thresholds_e: Tensor<1>, thresholds: &[f32], routed: &Routed<f32>) -> Tensor<1> {
    let (experts, tokens) = (routed.shape.experts, routed.shape.tokens.max(1) as f64);
    let probs: Vec<f64> = routed.probs_te.iter().map(|p| f64::from(*p)).collect();
    let wide: Vec<f64> = thresholds.iter().map(|t| f64::from(*t)).collect();
    let above = batchwise::mask(&batchwise::above_thresholds(&routed.probs_te, thresholds), experts);
    let (loss, gradient) = batchwise::threshold_loss(&probs, &wide, &batchwise::mask(&routed.choices, experts), &above);
    let gradient = gradient.into_iter().map(|g| (g / tokens) as f32).collect();
    host_function(thresholds_e, vec![(loss / tokens) as f32], [1], move |dy| scaled(gradient, dy[0]))
}

fn scaled(mut values: Vec<f32>, factor: f32) -> Vec<f32> {
    values.iter_mut().for_each(|v| *v *= factor);
    values
}

/// How to dispatch all rows. The plan reads the assignment where it is.
pub(crate) fn plan_of(routed: &Arc<Routed<f32>>) -> DispatchPlan {
    DispatchPlan::shared(Shared(routed.clone()))
}

/// A layer's assignment as the ops read it.
struct Shared(Arc<Routed<f32>>);

impl RowIndices for Shared {
    fn tokens(&self) -> usize {
        self.0.assignment.tokens
    }
    fn row_offsets(&self) -> &[u32] {
        &self.0.assignment.row_offsets
    }
    fn token_of_row(&self) -> &[u32] {
        &self.0.assignment.token_of_row
    }
    fn token_offsets(&self) -> &[u32] {
        &self.0.assignment.token_offsets
    }
    fn row_of_choice(&self) -> &[u32] {
        &self.0.assignment.row_of_choice
    }
}
