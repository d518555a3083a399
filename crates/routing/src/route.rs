//! Scores to assignment and weights: the one entry point, [`route`], and the gradient of the weights.
//!
//! In order: (1) noise, in training only; (2) activation; (3) the policy picks experts; (4) capacity drops pairs; (5) weights
//! are gathered at the choices, normalised and scaled; (6) statistics. Selected sets, slots and counts are constants for the gradient.
//!
//! Without a bias the experts are picked on logits, not on probabilities: the order is the same, but
//! two different logits can round to one probability.

use crate::activation::{sigmoid, sigmoid_all, softmax_rows, softplus};
use crate::assignment::{Assignment, Choices};
use crate::capacity::slots_per_expert;
use crate::config::{Activation, Noise, Normalize, Policy, RouterConfig};
use crate::error::RoutingError;
use crate::input::{check_input, length, real_tokens};
use crate::policy::hierarchical::Levels;
use crate::policy::{PolicyInput, Selected, sparse_mixer};
use crate::real::Real;
use crate::rng::{Purpose, StepContext};
use crate::stats::RoutingStats;

pub use crate::input::{RouteShape, RouterInput};

/// What noise did to the logits.
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseDraw<S> {
    /// Logits with noise, as many as logits: what was selected on and weighted with.
    pub logits_te: Vec<S>,
    /// Activation of the noisy logits `[T, E]`.
    pub probs_te: Vec<S>,
    /// Standard normal draws, as many as logits.
    pub eps_te: Vec<S>,
    /// Standard deviation of each.
    pub sd_te: Vec<S>,
    /// Whether the standard deviations were learned, `softplus(x W_noise)`; fixed ones have no gradient.
    pub learned: bool,
}

/// Everything one routing call produced.
#[derive(Debug, Clone, PartialEq)]
pub struct Routed<S> {
    /// The sizes.
    pub shape: RouteShape,
    /// What tokens asked for; `choices.experts` is `[T, k]` row-major when every token has k choices.
    pub choices: Choices,
    /// What they got: rows sorted by (expert, token).
    pub assignment: Assignment,
    /// Slots per expert, those of the first where they differ; `None` when dropless.
    pub capacity: Option<usize>,
    /// Activation of the clean logits `[T, E]` (softmax over all experts also for [`Activation::SoftmaxSelected`], the
    /// product of both softmaxes with two levels).
    pub probs_te: Vec<S>,
    /// Log-sum-exp of the clean logits `[T]`; with two levels see [`Levels::joint`].
    pub lse_t: Vec<S>,
    /// Present if noise was added.
    pub noise: Option<NoiseDraw<S>>,
    /// Weight of every choice, dropped ones included, in pair order.
    pub weight_of_pair: Vec<S>,
    /// Weight of every row of the assignment `[N]`.
    pub weight_n: Vec<S>,
    /// Load, balance and confidence.
    pub stats: RoutingStats,
    rule: WeightRule,
    own_rule: OwnRule<S>,
}

/// Weights that are not gathered from the activations.
#[derive(Debug, Clone, PartialEq)]
enum OwnRule<S> {
    No,
    /// Always 1: no gradient.
    Constant,
    SparseMixer {
        eps: S,
        logits_te: Vec<S>,
    },
    /// Products of two softmaxes over selected logits.
    TwoLevel {
        levels: Levels,
        logits_ts: Vec<S>,
    },
}

/// How weights came from logits, kept for the gradient.
#[derive(Debug, Clone, Copy, PartialEq)]
struct WeightRule {
    activation: Activation,
    normalize: Normalize,
    scale: f64,
    /// Experts from here on are zero experts whose weight goes to the token's others.
    zero_from: Option<usize>,
}

/// Routes one group of tokens. Same inputs, same bits: no thread, no batch neighbour and, in evaluation, no seed matters.
pub fn route<S: Real>(
    input: &RouterInput<S>,
    shape: RouteShape,
    config: &RouterConfig,
    step: &StepContext,
) -> Result<Routed<S>, RoutingError> {
    config.validate(shape.experts, shape.top_k)?;
    check_input(input, shape, config)?;
    let RouteShape { tokens, experts, top_k: k } = shape;

    let (probs_te, lse_t) = activate(input.logits_te, shape, config);
    let noise = draw_noise(input, shape, config, step)?;
    let logits_te = noise.as_ref().map_or(input.logits_te, |n| &n.logits_te);
    let gates_te = noise.as_ref().map_or(&probs_te, |n| &n.probs_te);

    let real = real_tokens(input, tokens);
    let zero_computation = input.zero_computation.filter(|_| step.training);
    let capacity_e = zero_computation.and_then(|zero| zero.slots(real, experts, k, config.capacity_min));
    let capacity = match input.capacity.or(capacity_e.as_ref().and_then(|each| each.first().copied())) {
        Some(0) => {
            let minimum = config.capacity_min;
            return Err(RoutingError::ZeroCapacity { factor: 0.0, top_k: k, tokens, experts, minimum });
        }
        Some(slots) => Some(slots),
        None => slots_per_expert(config, step.training, real, experts, k)?,
    };
    let capacity_e = capacity_e.as_deref();
    let selected = PolicyInput { input, shape, config, step, logits_te, gates_te, capacity, capacity_e }.select()?;
    Ok(finish(input, shape, config, selected, probs_te, lse_t, noise, capacity))
}

/// Weights and statistics for choices that were made elsewhere (saved by a checkpoint, replayed from another engine, or
/// decided by a reference of this crate): steps 4 to 6 of [`route`]. `slots` as in [`crate::capacity`]; `None` keeps all.
/// Choices are outside data: ones that do not fit the shape are refused, see [`Choices::check`].
pub fn route_choices<S: Real>(
    input: &RouterInput<S>,
    shape: RouteShape,
    config: &RouterConfig,
    choices: Choices,
    slots: Option<Vec<u32>>,
) -> Result<Routed<S>, RoutingError> {
    if shape.experts == 0 {
        return Err(RoutingError::NoExperts);
    }
    if matches!(config.policy, Policy::Hierarchical { .. }) {
        config.validate(shape.experts, shape.top_k)?;
    }
    check_input(input, shape, config)?;
    choices.check(shape.experts)?;
    let pairs = choices.pairs();
    let found = choices.tokens();
    if found != shape.tokens {
        return Err(length("choices", shape.tokens, found, shape));
    }
    if let Some(slots) = &slots
        && slots.len() != pairs
    {
        return Err(length("slots", pairs, slots.len(), shape));
    }
    let (probs_te, lse_t) = activate(input.logits_te, shape, config);
    Ok(finish(input, shape, config, Selected { choices, slots }, probs_te, lse_t, None, input.capacity))
}

fn finish<S: Real>(
    input: &RouterInput<S>,
    shape: RouteShape,
    config: &RouterConfig,
    selected: Selected,
    probs_te: Vec<S>,
    lse_t: Vec<S>,
    noise: Option<NoiseDraw<S>>,
    capacity: Option<usize>,
) -> Routed<S> {
    let experts = shape.experts;
    let Selected { choices, slots } = selected;
    let assignment = match &slots {
        None => Assignment::dropless(&choices, experts),
        Some(slots) => Assignment::with_slots(&choices, experts, slots),
    };
    let logits_te = noise.as_ref().map_or(input.logits_te, |n| &n.logits_te);
    let gates_te = noise.as_ref().map_or(&probs_te, |n| &n.probs_te);
    let zero_from = input.zero_computation.filter(|zero| zero.renorm_after_zero).map(|zero| experts - zero.zero);
    let (activation, normalize, scale) = (config.activation, config.normalize, config.weight_scale);
    let rule = WeightRule { activation, normalize, scale, zero_from };
    let own_rule = match (config.policy.clone(), Levels::of(config, shape)) {
        (Policy::Hash, _) => OwnRule::Constant,
        (Policy::SparseMixer { eps }, _) => OwnRule::SparseMixer { eps: S::of(eps), logits_te: logits_te.to_vec() },
        (_, Some(levels)) => OwnRule::TwoLevel { levels, logits_ts: logits_te.to_vec() },
        _ => OwnRule::No,
    };
    let weight_of_pair = match &own_rule {
        OwnRule::No => weigh(rule, experts, &choices, &assignment, logits_te, gates_te),
        OwnRule::Constant => vec![S::ONE; choices.pairs()],
        OwnRule::SparseMixer { eps, .. } => sparse_mixer::weights(&choices, logits_te, experts, *eps),
        OwnRule::TwoLevel { levels, .. } => {
            levels.weights(&choices, logits_te).into_iter().map(|w| w * S::of(scale)).collect()
        }
    };
    let weight_n = gather_rows(&choices, &assignment, &weight_of_pair);
    let stats = match &own_rule {
        OwnRule::TwoLevel { levels, .. } => {
            let (joint_te, root_t) = levels.joint(input.logits_te);
            let joint = RouterInput { logits_te: &joint_te, ..*input };
            let certain = vec![S::ZERO; root_t.len()];
            let stats = RoutingStats::new(&joint, &choices, &assignment, &probs_te, &certain, activation);
            stats.with_logits(input.logits_te, &root_t, input.real_t)
        }
        _ => RoutingStats::new(input, &choices, &assignment, &probs_te, &lse_t, activation),
    };
    Routed {
        shape,
        choices,
        assignment,
        capacity,
        probs_te,
        lse_t,
        noise,
        weight_of_pair,
        weight_n,
        stats,
        rule,
        own_rule,
    }
}

/// Activation of the logits and their log-sum-exp.
fn activate<S: Real>(logits_te: &[S], shape: RouteShape, config: &RouterConfig) -> (Vec<S>, Vec<S>) {
    if let Some(levels) = Levels::of(config, shape) {
        let (mut probs_te, root_t) = levels.joint(logits_te);
        probs_te.iter_mut().for_each(|p| *p = p.exp());
        return (probs_te, root_t);
    }
    let mut probs_te = vec![S::ZERO; logits_te.len()];
    let mut lse_t = vec![S::ZERO; shape.tokens];
    softmax_rows(logits_te, shape.experts, &mut probs_te, &mut lse_t);
    score_each(logits_te, config.activation, &mut probs_te);
    (probs_te, lse_t)
}

/// The activations that score every expert on its own; a softmax is left as it is.
fn score_each<S: Real>(logits: &[S], activation: Activation, out: &mut [S]) {
    match activation {
        Activation::Softmax | Activation::SoftmaxSelected => {}
        Activation::Sigmoid => sigmoid_all(logits, out),
        Activation::SqrtSoftplus => out.iter_mut().zip(logits).for_each(|(o, &z)| *o = softplus(z).sqrt()),
        Activation::Relu => out.iter_mut().zip(logits).for_each(|(o, &z)| *o = z.larger(S::ZERO)),
    }
}

/// Derivative of such an activation, from its value.
pub(crate) fn gate_slope<S: Real>(activation: Activation, gate: S) -> S {
    match activation {
        Activation::Sigmoid => gate * (S::ONE - gate),
        // g = sqrt(softplus(z)), so sigmoid(z) = 1 - e^(-g^2) and dg/dz = sigmoid(z) / 2g.
        Activation::SqrtSoftplus if gate > S::ZERO => (S::ONE - (-(gate * gate)).exp()) / (gate + gate),
        Activation::Relu if gate > S::ZERO => S::ONE,
        _ => S::ZERO,
    }
}

impl<S: Real> Routed<S> {
    /// How many logits the routing had: `T E`, with two levels `T (E + a)`. Their gradient is as long.
    pub fn logits_len(&self) -> usize {
        match &self.own_rule {
            OwnRule::TwoLevel { logits_ts, .. } => logits_ts.len(),
            _ => self.probs_te.len(),
        }
    }

    /// How a two-level router's experts are arranged.
    pub fn levels(&self) -> Option<Levels> {
        match &self.own_rule {
            OwnRule::TwoLevel { levels, .. } => Some(*levels),
            _ => None,
        }
    }

    /// Gradient of the row weights with respect to the logits: `dweight_n` `[N]` in, dlogits `[T, E]` added to `dlogits_te`.
    ///
    /// With noise this is the gradient for noisy and clean logits alike (the noise is added); see [`Self::noise_backward`].
    pub fn weights_backward(&self, dweight_n: &[S], dlogits_te: &mut [S]) {
        assert_eq!(dweight_n.len(), self.assignment.rows(), "weights_backward: one gradient per row");
        let mut dpair = vec![S::ZERO; self.choices.pairs()];
        for t in 0..self.choices.tokens() {
            let first = self.choices.token_offsets[t];
            for &row in self.assignment.rows_of_token(t) {
                dpair[(first + self.assignment.choice_of_row[row as usize]) as usize] = dweight_n[row as usize];
            }
        }
        self.pair_weights_backward(&dpair, dlogits_te);
    }

    /// The same from gradients of [`Self::weight_of_pair`]; a dropped pair's gradient is 0 in a layer.
    pub fn pair_weights_backward(&self, dpair: &[S], dlogits_te: &mut [S]) {
        let experts = self.shape.experts;
        assert_eq!(dpair.len(), self.choices.pairs(), "pair_weights_backward: one gradient per pair");
        assert_eq!(dlogits_te.len(), self.logits_len(), "pair_weights_backward: one gradient per logit");
        match &self.own_rule {
            OwnRule::No => {}
            OwnRule::Constant => return,
            OwnRule::SparseMixer { eps, logits_te } => {
                return sparse_mixer::backward(&self.choices, logits_te, experts, *eps, dpair, dlogits_te);
            }
            OwnRule::TwoLevel { levels, logits_ts } => {
                let dpair: Vec<S> = dpair.iter().map(|&d| d * S::of(self.rule.scale)).collect();
                return levels.weights_backward(&self.choices, logits_ts, &dpair, dlogits_te);
            }
        }
        let gates_te = self.noise.as_ref().map_or(&self.probs_te, |n| &n.probs_te);
        for t in 0..self.choices.tokens() {
            let pairs = self.choices.pair_range(t);
            let token = t * experts..(t + 1) * experts;
            self.token_backward(
                &self.choices.experts[pairs.clone()],
                &self.weight_of_pair[pairs.clone()],
                &dpair[pairs],
                &gates_te[token.clone()],
                &mut dlogits_te[token],
            );
        }
    }

    /// The activation the weights were computed with.
    pub fn activation(&self) -> Activation {
        self.rule.activation
    }

    /// One token: `dw` per choice, zero where dropped.
    fn token_backward(&self, experts: &[u32], weights: &[S], dw: &[S], gates: &[S], dlogits: &mut [S]) {
        let scale = S::of(self.rule.scale);
        let softmax = self.rule.activation.is_softmax();
        let normalized = self.rule.normalize != Normalize::Never || self.rule.zero_from.is_some();
        // <dw, w> with w the weights before scaling; what the normaliser (or the softmax over the selected) subtracts.
        let inner: S = dw.iter().zip(weights).map(|(&d, &w)| d * w).sum();
        if self.rule.activation == Activation::SoftmaxSelected || (softmax && normalized) {
            // w (dw - <dw, w>): the softmax denominator cancels, so unselected logits get exactly 0.
            for ((&e, &w), &d) in experts.iter().zip(weights).zip(dw) {
                dlogits[e as usize] += w * (d - inner / scale);
            }
            return;
        }
        let total: S = match self.rule.normalize {
            Normalize::Never => S::ONE,
            Normalize::BeforeDrop => experts.iter().map(|&e| gates[e as usize]).sum(),
            Normalize::AfterDrop => {
                experts.iter().zip(weights).filter(|(_, w)| **w != S::ZERO).map(|(&e, _)| gates[e as usize]).sum()
            }
        };
        if total == S::ZERO {
            return;
        }
        let dropped_after = |w: S| self.rule.normalize == Normalize::AfterDrop && w == S::ZERO;
        let dgate = |w: S, d: S| {
            if !normalized {
                d * scale
            } else if dropped_after(w) {
                S::ZERO
            } else {
                (d * scale - inner) / total
            }
        };
        if softmax {
            // Raw softmax: every logit moves, through the denominator.
            let outer: S = experts.iter().zip(dw).map(|(&e, &d)| d * scale * gates[e as usize]).sum();
            for (dz, &p) in dlogits.iter_mut().zip(gates) {
                *dz -= p * outer;
            }
            for (&e, &d) in experts.iter().zip(dw) {
                dlogits[e as usize] += gates[e as usize] * d * scale;
            }
        } else {
            for ((&e, &w), &d) in experts.iter().zip(weights).zip(dw) {
                dlogits[e as usize] += dgate(w, d) * gate_slope(self.rule.activation, gates[e as usize]);
            }
        }
    }

    /// Gradient for `x W_noise` `[T, E]` from the gradient of the noisy logits: `dnoisy * eps * sigmoid(raw)`, added; none
    /// for noise that is not learned.
    pub fn noise_backward(&self, raw_noise_te: &[S], dnoisy_te: &[S], draw_te: &mut [S]) {
        let Some(noise) = self.noise.as_ref().filter(|noise| noise.learned) else { return };
        for (((dr, &dz), &eps), &raw) in draw_te.iter_mut().zip(dnoisy_te).zip(&noise.eps_te).zip(raw_noise_te) {
            *dr += dz * eps * sigmoid(raw);
        }
    }

    /// Combine weights as a dense `[T, E]` matrix, 0 where nothing was kept; for tests and for people.
    pub fn combine_te(&self) -> Vec<S> {
        let experts = self.shape.experts;
        let mut dense = vec![S::ZERO; self.shape.tokens * experts];
        for e in 0..experts {
            for row in self.assignment.rows_of_expert(e) {
                dense[self.assignment.token_of_row[row] as usize * experts + e] = self.weight_n[row];
            }
        }
        dense
    }
}

/// Multiplies the router's input `[T, d]` by uniforms on [1 - eps, 1 + eps]; training only. Experts must see the clean input.
pub fn input_jitter<S: Real>(x_td: &mut [S], width: usize, eps: f64, step: &StepContext) {
    let Some(stream) = step.stream(Purpose::InputJitter) else { return };
    for (t, row) in x_td.chunks_exact_mut(width).enumerate() {
        for (i, x) in row.iter_mut().enumerate() {
            *x *= S::of(1.0 + eps * (2.0 * stream.uniform(t, i) - 1.0));
        }
    }
}

fn weigh<S: Real>(
    rule: WeightRule,
    experts: usize,
    choices: &Choices,
    assignment: &Assignment,
    logits_te: &[S],
    gates_te: &[S],
) -> Vec<S> {
    let mut weights = Vec::with_capacity(choices.pairs());
    for t in 0..choices.tokens() {
        let list = choices.of_token(t);
        let first = weights.len();
        if rule.activation == Activation::SoftmaxSelected {
            let row = &logits_te[t * experts..(t + 1) * experts];
            let top = list.iter().fold(S::NEG_INFINITY, |best, &e| best.larger(row[e as usize]));
            weights.extend(list.iter().map(|&e| (row[e as usize] - top).exp()));
        } else {
            weights.extend(list.iter().map(|&e| gates_te[t * experts + e as usize]));
        }
        let own = &mut weights[first..];
        if rule.normalize == Normalize::AfterDrop && !assignment.dropped.is_empty() {
            let mut kept = vec![false; own.len()];
            for &row in assignment.rows_of_token(t) {
                kept[assignment.choice_of_row[row as usize] as usize] = true;
            }
            own.iter_mut().zip(kept).filter(|(_, kept)| !kept).for_each(|(w, _)| *w = S::ZERO);
        }
        if let Some(zero_from) = rule.zero_from {
            own.iter_mut().zip(list).filter(|(_, e)| **e as usize >= zero_from).for_each(|(w, _)| *w = S::ZERO);
        }
        if rule.normalize != Normalize::Never
            || rule.zero_from.is_some()
            || rule.activation == Activation::SoftmaxSelected
        {
            let total: S = own.iter().copied().sum();
            if total > S::ZERO {
                own.iter_mut().for_each(|w| *w /= total);
            }
        }
        if rule.scale != 1.0 {
            own.iter_mut().for_each(|w| *w *= S::of(rule.scale));
        }
    }
    weights
}

fn gather_rows<S: Real>(choices: &Choices, assignment: &Assignment, weight_of_pair: &[S]) -> Vec<S> {
    let rows = assignment.token_of_row.iter().zip(&assignment.choice_of_row);
    rows.map(|(&t, &choice)| weight_of_pair[(choices.token_offsets[t as usize] + choice) as usize]).collect()
}

fn draw_noise<S: Real>(
    input: &RouterInput<S>,
    shape: RouteShape,
    config: &RouterConfig,
    step: &StepContext,
) -> Result<Option<NoiseDraw<S>>, RoutingError> {
    let Some(stream) = step.stream(Purpose::LogitNoise) else { return Ok(None) };
    let (tokens, width) = (shape.tokens, config.logits_per_token(shape.experts));
    let sd_te: Vec<S> = match config.noise {
        Noise::None | Noise::Jitter { .. } => return Ok(None),
        Noise::Normal { scale } => vec![S::of(scale / shape.experts as f64); tokens * width],
        Noise::Softplus { floor } => {
            let needs = "raw_noise_te, the product x W_noise";
            let raw = input.raw_noise_te.ok_or(RoutingError::MissingInput { policy: "noise.softplus", needs })?;
            raw.iter().map(|&r| softplus(r) + S::of(floor)).collect()
        }
    };
    let eps_te: Vec<S> = match input.noise_te {
        Some(given) => given.to_vec(),
        None => (0..tokens * width).map(|i| S::of(stream.normal(i / width, i % width))).collect(),
    };
    let logits_te: Vec<S> =
        input.logits_te.iter().zip(&eps_te).zip(&sd_te).map(|((&z, &eps), &sd)| z + eps * sd).collect();
    let (probs_te, _) = activate(&logits_te, shape, config);
    let learned = matches!(config.noise, Noise::Softplus { .. });
    Ok(Some(NoiseDraw { logits_te, probs_te, eps_te, sd_te, learned }))
}
