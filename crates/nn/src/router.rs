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
use burn::tensor::Tensor;
use mixtura_ops::{
    DispatchPlan, Numerics, PackCell, Precision, host_function, host_function_2, linear, tensor_from_vec, with_slice,
};
use mixtura_routing::{
    Assignment, AuxiliaryOptions, BalanceConfig, Noise, RouteShape, Routed, RouterConfig, RouterInput, RoutingError,
    RoutingStats, auxiliary, route, route::input_jitter,
};

use crate::build::Builder;
use crate::context::ForwardContext;
use crate::init::Init;

/// The part of an MoE layer that decides which experts see which token.
#[derive(Module, Debug)]
pub struct Router {
    /// [D, E].
    pub weight: Param<Tensor<2>>,
    /// Scale of the learned noise before softplus, [D, E]; only with softplus noise.
    pub noise: Option<Param<Tensor<2>>>,
    /// Added to the scores for selection only, [E]; only with loss-free balancing. It has no gradient.
    pub bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    rules: Rules,
    #[module(skip)]
    weight_cell: PackCell,
    #[module(skip)]
    noise_cell: PackCell,
}

/// What a router does, apart from its weights.
#[derive(Debug, Clone, PartialEq)]
struct Rules {
    experts: usize,
    top_k: usize,
    router: RouterConfig,
    balance: BalanceConfig,
}

/// Everything one routing step produced.
#[derive(Debug, Clone)]
pub struct LayerRouting {
    /// Index of the layer in its model, 0 for a layer used alone.
    pub layer: usize,
    /// Router logits before noise, [T, E].
    pub logits_te: Tensor<2>,
    /// Combine weight of each row, [N], differentiable.
    pub weight_n: Tensor<1>,
    /// Choices, assignment, probabilities and statistics.
    pub routed: Arc<Routed<f32>>,
    /// The auxiliary losses.
    pub losses: LayerLosses,
}

/// Auxiliary losses of one layer.
#[derive(Debug, Clone)]
pub struct LayerLosses {
    /// The balance loss, without its coefficient.
    pub balance: f64,
    /// The z-loss, without its coefficient.
    pub z: f64,
    /// Coefficient times balance plus coefficient times z, [1], differentiable.
    pub total: Tensor<1>,
}

impl LayerRouting {
    /// Which rows each expert computes.
    pub fn assignment(&self) -> &Assignment {
        &self.routed.assignment
    }

    /// Load, balance and confidence.
    pub fn stats(&self) -> &RoutingStats {
        &self.routed.stats
    }
}

impl Router {
    /// A router over `experts` experts; the configuration must have been validated.
    pub(crate) fn new(
        d_model: usize,
        experts: usize,
        top_k: usize,
        router: &RouterConfig,
        balance: &BalanceConfig,
        init_std: f64,
        builder: &Builder,
    ) -> Self {
        let learned_noise = matches!(router.noise, Noise::Softplus { .. });
        // Shazeer's gate starts at zero: equal load, and the noise breaks the ties.
        let init = if learned_noise { Init::Zeros } else { Init::TruncatedNormal(init_std) };
        Self {
            weight: builder.parameter("weight", [d_model, experts], init),
            noise: learned_noise.then(|| builder.parameter("noise", [d_model, experts], Init::Zeros)),
            bias: (balance.bias_update > 0.0).then(|| builder.constant("bias", [experts], Init::Zeros)),
            rules: Rules { experts, top_k, router: router.clone(), balance: balance.clone() },
            weight_cell: PackCell::new(),
            noise_cell: PackCell::new(),
        }
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
        let [tokens, _] = x_td.dims();
        let Rules { experts, top_k, router, balance } = &self.rules;
        let shape = RouteShape { tokens, experts: *experts, top_k: *top_k };
        let numerics = Numerics { precision: Precision::F32, ..context.numerics };
        let step = context.router(layer);

        let seen_td = self.jitter(x_td.clone(), &step);
        let logits_te = linear(seen_td, self.weight.val(), &self.weight_cell, numerics);
        let raw_noise_te = match &self.noise {
            Some(noise) if context.training => Some(linear(x_td, noise.val(), &self.noise_cell, numerics)),
            _ => None,
        };
        let logits: Arc<[f32]> = with_slice(&logits_te, |logits| logits.into());
        let raw_noise: Option<Arc<[f32]>> = raw_noise_te.as_ref().map(|raw| with_slice(raw, |raw| raw.into()));
        let bias: Option<Vec<f32>> = self.bias.as_ref().map(|bias| with_slice(&bias.val(), <[f32]>::to_vec));

        let input =
            RouterInput { raw_noise_te: raw_noise.as_deref(), bias_e: bias.as_deref(), ..RouterInput::new(&logits) };
        let routed = Arc::new(route(&input, shape, router, &step)?);
        let earlier = context.earlier.as_ref().and_then(|counts| counts.fractions_with(layer, &routed));
        let options = AuxiliaryOptions { global_fraction_e: earlier.as_deref(), sequence: context.sequence };
        let losses = auxiliary(&input, &routed, balance, options)?;

        let weight_n = weights_op(logits_te.clone(), raw_noise_te.clone(), raw_noise, &routed);
        let (balance, z) = (losses.balance, losses.z);
        let total = match raw_noise_te.zip(losses.draw_noise_te) {
            None => scalar_op(logits_te.clone(), losses.total, losses.dlogits_te),
            Some((raw, draw)) => scalar_op_2(logits_te.clone(), raw, losses.total, losses.dlogits_te, draw),
        };
        let plan = Arc::new(plan_of(&routed.assignment));
        let losses = LayerLosses { balance, z, total };
        Ok((LayerRouting { layer, logits_te, weight_n, routed, losses }, plan))
    }

    /// The router's input times uniform noise, in training with a jitter rule only. Experts see the clean input.
    fn jitter(&self, x_td: Tensor<2>, step: &mixtura_routing::StepContext) -> Tensor<2> {
        let Noise::Jitter { eps } = self.rules.router.noise else { return x_td };
        if !step.training || eps == 0.0 {
            return x_td;
        }
        let [tokens, width] = x_td.dims();
        let mut factor = vec![1.0f32; tokens * width];
        input_jitter(&mut factor, width, eps, step);
        let factor = tensor_from_vec(factor, [tokens, width], &x_td.device());
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

    pub(crate) fn clear_packs(&self) {
        self.weight_cell.clear();
        self.noise_cell.clear();
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
        let mut dlogits_te = vec![0.0; routed.probs_te.len()];
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

fn scaled(mut values: Vec<f32>, factor: f32) -> Vec<f32> {
    values.iter_mut().for_each(|v| *v *= factor);
    values
}

fn plan_of(assignment: &Assignment) -> DispatchPlan {
    let Assignment { tokens, row_offsets, token_of_row, token_offsets, row_of_choice, .. } = assignment.clone();
    DispatchPlan::new(tokens, row_offsets, token_of_row, token_offsets, row_of_choice)
}
