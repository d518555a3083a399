//! Balance losses, their gradients for the logits, and the z-loss.
//!
//! | loss | value | at balance |
//! | --- | --- | --- |
//! | switch | `(E/k) sum_i f_i Pbar_i`, f_i = selections per token before capacity (a constant), Pbar_i = mean probability | 1 |
//! | importance | CV^2 of `sum_t G[t,i]`, the combine weights | 0 |
//! | load | CV^2 of `sum_t P(token t would select i under fresh noise)` | 0 |
//! | parameter_penalty | `E sum_i f_i Pbar_i h_i / mean(h)`, h_i the expert's hidden width (HMoE) | k |
//! | z | mean squared log-sum-exp of the clean logits | - |
//! | entropy | mean over tokens of `-sum p ln p` | - |
//!
//! With experts that have no network (MoE++) the first is `sum_i eta_i f_i Pbar_i`, see [`crate::zero_cost::balance_loss`].
//!
//! With gates that are no distribution the switch loss takes `P = gate / sum of gates` (sigmoid, DeepSeek-V3) or the gate itself
//! (ReLU: this is ReMoE's `L_reg`). Per sequence it counts the choices without the selection bias, as DeepSeek-V3 does.
//! CV^2 uses the population variance and `mean^2 + 1e-10`. Each is the value of one layer; a model averages over layers.

use crate::assignment::{Assignment, Choices};
use crate::config::{Activation, BalanceConfig, BalanceLoss, BalanceScope};
use crate::error::RoutingError;
use crate::policy::hierarchical::Levels;
use crate::real::Real;
use crate::route::{Routed, RouterInput, gate_slope};
use crate::select::top_k;

mod controller;
mod cv;
mod load;
pub mod heterogeneous;
mod two_level;

pub use controller::{ReluController, relu_controller};
pub use cv::{cv_squared, cv_squared_backward, cv_squared_bessel, importance};
use heterogeneous::normalised_widths;
pub use load::{LoadEstimate, ThresholdGradient, normal_cdf, normal_pdf};

/// What the balance loss counts beyond this call's tokens.
#[derive(Debug, Clone, Copy, Default)]
pub struct AuxiliaryOptions<'a> {
    /// Selections per token and expert over the step, or over what of it is known (sums to k); used by [`BalanceScope::Global`]
    /// and [`BalanceScope::Running`] when given.
    pub global_fraction_e: Option<&'a [f64]>,
    /// Tokens per sequence, for [`BalanceScope::Sequence`]; 0 = all tokens are one sequence.
    pub sequence: usize,
    /// Hidden width of every expert, for [`BalanceLoss::ParameterPenalty`]; all equal when left out.
    pub width_e: Option<&'a [f64]>,
}

/// Values without coefficients, and the gradient of the weighted total.
#[derive(Debug, Clone, PartialEq)]
pub struct Auxiliary<S> {
    /// The balance loss.
    pub balance: f64,
    /// The z-loss.
    pub z: f64,
    /// The entropy; 0 when its coefficient is.
    pub entropy: f64,
    /// `coefficient * balance + z_loss * z + entropy coefficient * entropy`.
    pub total: f64,
    /// Gradient of `total` for the clean logits `[T, E]`; with two levels `[T, E + a]`.
    pub dlogits_te: Vec<S>,
    /// Gradient of `total` for `x W_noise`, as many, with Shazeer's noise.
    pub draw_noise_te: Option<Vec<S>>,
}

/// The auxiliary losses of one routing call.
pub fn auxiliary<S: Real>(
    input: &RouterInput<S>,
    routed: &Routed<S>,
    config: &BalanceConfig,
    options: AuxiliaryOptions,
) -> Result<Auxiliary<S>, RoutingError> {
    config.validate()?;
    let learned = routed.noise.as_ref().filter(|noise| noise.learned);
    let mut out = Auxiliary {
        balance: 0.0,
        z: 0.0,
        entropy: 0.0,
        total: 0.0,
        dlogits_te: vec![S::ZERO; routed.logits_len()],
        draw_noise_te: learned.and(input.raw_noise_te).map(|raw| vec![S::ZERO; raw.len()]),
    };
    let coefficient = coefficient(input, config);
    let levels = routed.levels();
    match config.loss {
        BalanceLoss::None => {}
        BalanceLoss::Switch | BalanceLoss::ParameterPenalty => {
            let dprobs = |dlogits: &mut [S]| product(input, routed, config, coefficient, options, dlogits);
            out.balance = through_levels(levels, routed, &mut out.dlogits_te, dprobs)?;
        }
        BalanceLoss::Importance => out.balance = cv::importance_loss(input, routed, coefficient, &mut out),
        BalanceLoss::Load => out.balance = load_loss(input, routed, coefficient, &mut out),
        BalanceLoss::ImportanceLoad => {
            let importance = cv::importance_loss(input, routed, coefficient, &mut out);
            out.balance = importance + load_loss(input, routed, coefficient, &mut out);
        }
    }
    if config.entropy > 0.0 {
        let dprobs = |dlogits: &mut [S]| Ok(entropy(input, routed, config.entropy, dlogits));
        out.entropy = through_levels(levels, routed, &mut out.dlogits_te, dprobs)?;
    }
    out.z = match levels {
        None => z_loss(input, routed, config.z_loss, &mut out.dlogits_te),
        Some(levels) => two_level::z_loss(levels, input, routed, config.z_loss, &mut out.dlogits_te),
    };
    out.total = coefficient * out.balance + config.z_loss * out.z + config.entropy * out.entropy;
    Ok(out)
}

/// The balance loss's coefficient: `beta` where there are experts without a network.
fn coefficient<S>(input: &RouterInput<S>, config: &BalanceConfig) -> f64 {
    match input.zero_computation {
        Some(zero) if config.loss == BalanceLoss::Switch => zero.beta,
        _ => config.coefficient,
    }
}

/// Runs a loss of the probabilities; with two levels its gradient, for the joint logarithms, goes on to both levels.
fn through_levels<S: Real>(
    levels: Option<Levels>,
    routed: &Routed<S>,
    dlogits_te: &mut [S],
    loss: impl FnOnce(&mut [S]) -> Result<f64, RoutingError>,
) -> Result<f64, RoutingError> {
    let Some(levels) = levels else { return loss(dlogits_te) };
    let mut djoint_te = vec![S::ZERO; routed.probs_te.len()];
    let value = loss(&mut djoint_te)?;
    levels.joint_backward(&routed.probs_te, &djoint_te, dlogits_te);
    Ok(value)
}

fn load_loss<S: Real>(input: &RouterInput<S>, routed: &Routed<S>, coefficient: f64, out: &mut Auxiliary<S>) -> f64 {
    match routed.levels() {
        None => load::load_loss(input, routed, coefficient, out),
        Some(levels) => two_level::load_loss(levels, input, routed, coefficient, out),
    }
}

/// Selections of each expert per token: sums to k. Zero tokens: zeros.
pub fn selection_fractions(choices: &Choices, experts: usize, tokens: usize) -> Vec<f64> {
    let demand = choices.demand(experts);
    demand.iter().map(|&c| if tokens == 0 { 0.0 } else { f64::from(c) / tokens as f64 }).collect()
}

/// `(E/k) sum_i f_i Pbar_i`.
pub fn switch_loss(fraction_e: &[f64], mean_prob_e: &[f64], top_k: usize) -> f64 {
    let inner: f64 = fraction_e.iter().zip(mean_prob_e).map(|(f, p)| f * p).sum();
    fraction_e.len() as f64 / top_k as f64 * inner
}

/// Gradient for the logits of `sum_i cost_i Pbar_i` with P a softmax over all experts and `cost_e` a constant:
/// `P[t,i] (cost_i - <P_t, cost>) / T`; `[T, E]`.
///
/// Every loss of the form "selections times probability" is one of these: the Switch loss has `cost_i = (E/k) f_i`, HMoE's
/// penalty `E f_i h_i`, MoE++'s `eta_i f_i`, DeepSeekMoE's device loss the f of the expert's device. All rows are counted;
/// leave padding out. Panics unless `probs_te` is whole rows of `cost_e.len()`.
pub fn mean_probability_backward(cost_e: &[f64], probs_te: &[f64]) -> Vec<f64> {
    let experts = cost_e.len();
    assert_eq!(
        probs_te.len() % experts.max(1),
        0,
        "mean_probability_backward: probs [T, {experts}], {} values",
        probs_te.len()
    );
    let tokens = (probs_te.len() / experts.max(1)) as f64;
    let mut dlogits_te = vec![0.0; probs_te.len()];
    for (row, dlogits) in probs_te.chunks_exact(experts.max(1)).zip(dlogits_te.chunks_exact_mut(experts.max(1))) {
        let inner: f64 = row.iter().zip(cost_e).map(|(p, c)| p * c).sum();
        for ((dz, p), c) in dlogits.iter_mut().zip(row).zip(cost_e) {
            *dz = p * (c - inner) / tokens;
        }
    }
    dlogits_te
}

/// A loss `lead sum_i cost_i f_i Pbar_i` over the tokens of `input`, its gradient times `coefficient` added to `dlogits_te`.
fn product<S: Real>(
    input: &RouterInput<S>,
    routed: &Routed<S>,
    config: &BalanceConfig,
    coefficient: f64,
    options: AuxiliaryOptions,
    dlogits_te: &mut [S],
) -> Result<f64, RoutingError> {
    let tokens = routed.shape.tokens;
    let experts = routed.shape.experts;
    let per_group = match (config.scope, options.sequence) {
        (BalanceScope::Sequence, n) if n > 0 => n,
        _ => tokens.max(1),
    };
    if !tokens.is_multiple_of(per_group) {
        return Err(RoutingError::Config {
            key: "balance.scope",
            value: "sequence".to_string(),
            reason: format!("whole sequences of {per_group} tokens, found {tokens} tokens"),
        });
    }
    let beyond = matches!(config.scope, BalanceScope::Global | BalanceScope::Running);
    let global = options.global_fraction_e.filter(|_| beyond);
    if let Some(f) = global.filter(|f| f.len() != experts) {
        let shape = format!("E={experts}");
        return Err(RoutingError::Length { what: "global fractions", expected: experts, found: f.len(), shape });
    }
    // DeepSeek-V3's sequence loss counts what the scores alone would choose, without the bias that selected.
    let unbiased = (config.scope == BalanceScope::Sequence && input.bias_e.is_some()).then(|| {
        let k = routed.shape.top_k;
        Choices::rectangular(tokens, k, top_k(input.logits_te, experts, k))
    });
    let choices = unbiased.as_ref().unwrap_or(&routed.choices);
    let real = |t: usize| input.real_t.is_none_or(|real| real[t]);
    let ranges = (0..tokens / per_group).map(|group| group * per_group..(group + 1) * per_group);
    // A sequence of nothing but padding is no sequence.
    let groups: Vec<_> = ranges.filter(|range| range.clone().any(real)).collect();
    let (lead, cost_e) = constants(input, routed, config, options)?;
    let mut value = 0.0;
    for range in &groups {
        let share = coefficient / groups.len() as f64;
        let group = Group { choices, range: range.clone(), global };
        value += product_group(input, routed, group, (lead, cost_e.as_deref()), share, dlogits_te);
    }
    Ok(value / groups.len().max(1) as f64)
}

/// The constant in front of the sum, and what each expert's selections cost (all 1 when absent).
fn constants<S: Real>(
    input: &RouterInput<S>,
    routed: &Routed<S>,
    config: &BalanceConfig,
    options: AuxiliaryOptions,
) -> Result<(f64, Option<Vec<f64>>), RoutingError> {
    let experts = routed.shape.experts;
    if config.loss == BalanceLoss::ParameterPenalty {
        if let Some(width) = options.width_e.filter(|width| width.len() != experts) {
            let shape = format!("E={experts}");
            return Err(RoutingError::Length { what: "expert widths", expected: experts, found: width.len(), shape });
        }
        return Ok((experts as f64, options.width_e.map(normalised_widths)));
    }
    Ok(match input.zero_computation {
        Some(zero) => (1.0, Some(zero.eta(experts))),
        None => (experts as f64 / routed.shape.top_k as f64, None),
    })
}

/// Which selections a product loss counts.
struct Group<'a> {
    choices: &'a Choices,
    range: std::ops::Range<usize>,
    /// Selection fractions from elsewhere, instead of this group's own.
    global: Option<&'a [f64]>,
}

fn product_group<S: Real>(
    input: &RouterInput<S>,
    routed: &Routed<S>,
    Group { choices, range, global }: Group,
    (lead, cost_e): (f64, Option<&[f64]>),
    coefficient: f64,
    dlogits_te: &mut [S],
) -> f64 {
    let experts = routed.shape.experts;
    let activation = routed.activation();
    // Sigmoid-like scores are made a distribution first, as DeepSeek-V3 does; ReMoE's gates are taken as they are.
    let distribution = !activation.is_softmax() && activation != Activation::Relu;
    let real = |t: usize| input.real_t.is_none_or(|real| real[t]);
    let counted = range.clone().filter(|&t| real(t)).count();
    if counted == 0 {
        return 0.0;
    }
    let mut fraction = vec![0.0; experts];
    let mut mean = vec![0.0; experts];
    for t in range.clone().filter(|&t| real(t)) {
        for &e in choices.of_token(t) {
            fraction[e as usize] += 1.0;
        }
        let row = &routed.probs_te[t * experts..(t + 1) * experts];
        let total = if distribution { row.iter().map(|p| p.f64()).sum::<f64>() } else { 1.0 };
        for (m, p) in mean.iter_mut().zip(row) {
            *m += if total > 0.0 { p.f64() / total } else { 0.0 };
        }
    }
    fraction.iter_mut().for_each(|f| *f /= counted as f64);
    mean.iter_mut().for_each(|m| *m /= counted as f64);
    let mut fraction = global.map_or(fraction, <[f64]>::to_vec);
    if let Some(cost_e) = cost_e {
        fraction.iter_mut().zip(cost_e).for_each(|(f, cost)| *f *= cost);
    }
    let value = lead * fraction.iter().zip(&mean).map(|(f, p)| f * p).sum::<f64>();

    let factor = coefficient * lead / counted as f64;
    if factor == 0.0 {
        return value;
    }
    let fraction: Vec<S> = fraction.iter().map(|&f| S::of(f)).collect();
    for t in range.filter(|&t| real(t)) {
        let row = &routed.probs_te[t * experts..(t + 1) * experts];
        let dlogits = &mut dlogits_te[t * experts..(t + 1) * experts];
        let inner: S = row.iter().zip(&fraction).map(|(&p, &f)| p * f).sum();
        if distribution {
            let total: S = row.iter().copied().sum();
            if total > S::ZERO {
                for ((dz, &s), &f) in dlogits.iter_mut().zip(row).zip(&fraction) {
                    *dz += S::of(factor) * (f - inner / total) / total * gate_slope(activation, s);
                }
            }
        } else if activation == Activation::Relu {
            for ((dz, &r), &f) in dlogits.iter_mut().zip(row).zip(&fraction) {
                *dz += S::of(factor) * f * gate_slope(activation, r);
            }
        } else {
            for ((dz, &p), &f) in dlogits.iter_mut().zip(row).zip(&fraction) {
                *dz += S::of(factor) * p * (f - inner);
            }
        }
    }
    value
}

/// Mean squared log-sum-exp of the clean logits; its gradient `2 lse p / T` times `coefficient` added to `dlogits_te`.
fn z_loss<S: Real>(input: &RouterInput<S>, routed: &Routed<S>, coefficient: f64, dlogits_te: &mut [S]) -> f64 {
    let experts = routed.shape.experts;
    let real = |t: usize| input.real_t.is_none_or(|real| real[t]);
    let counted = (0..routed.shape.tokens).filter(|&t| real(t)).count();
    if counted == 0 {
        return 0.0;
    }
    let mut value = 0.0;
    let softmax = routed.activation().is_softmax();
    for t in (0..routed.shape.tokens).filter(|&t| real(t)) {
        let lse = routed.lse_t[t];
        value += lse.f64() * lse.f64();
        if coefficient != 0.0 {
            let factor = S::of(2.0 * coefficient / counted as f64) * lse;
            let token = t * experts..(t + 1) * experts;
            for i in token {
                // With other gates the softmax is not at hand: recompute it from the log-sum-exp.
                let p = if softmax { routed.probs_te[i] } else { (input.logits_te[i] - lse).exp() };
                dlogits_te[i] += factor * p;
            }
        }
    }
    value / counted as f64
}

/// Mean entropy of the softmax; its gradient `-p (ln p + H) / T` times `coefficient` added to `dlogits_te`.
fn entropy<S: Real>(input: &RouterInput<S>, routed: &Routed<S>, coefficient: f64, dlogits_te: &mut [S]) -> f64 {
    let experts = routed.shape.experts;
    let real = |t: usize| input.real_t.is_none_or(|real| real[t]);
    let counted = (0..routed.shape.tokens).filter(|&t| real(t)).count();
    let mut value = 0.0;
    let rows = routed.probs_te.chunks_exact(experts).zip(dlogits_te.chunks_exact_mut(experts)).enumerate();
    for (_, (row, dlogits)) in rows.filter(|(t, _)| real(*t)) {
        let log = |p: S| if p > S::ZERO { p.ln() } else { S::ZERO };
        let own: S = row.iter().map(|&p| -(p * log(p))).sum();
        value += own.f64();
        for (dz, &p) in dlogits.iter_mut().zip(row) {
            *dz += S::of(-coefficient / counted as f64) * p * (log(p) + own);
        }
    }
    if counted == 0 { 0.0 } else { value / counted as f64 }
}

/// New selection biases after an optimizer step (loss-free balancing): `b_i + u sign(mean(load) - load_i)`.
pub fn bias_update(bias_e: &mut [f32], load_e: &[f64], u: f64) {
    let mean = load_e.iter().sum::<f64>() / load_e.len().max(1) as f64;
    for (b, &load) in bias_e.iter_mut().zip(load_e) {
        if load != mean {
            *b += (u * (mean - load).signum()) as f32;
        }
    }
}

/// DeepSeekMoE's device-level loss `sum_D f_D P_D`: f_D the mean of `E/k` times the fractions of the device's experts, P_D the
/// sum of their probabilities.
pub fn device_loss(fraction_e: &[f64], mean_prob_e: &[f64], top_k: usize, devices: &[Vec<usize>]) -> f64 {
    let scale = fraction_e.len() as f64 / top_k as f64;
    let of_device = |device: &Vec<usize>| {
        let f = device.iter().map(|&e| scale * fraction_e[e]).sum::<f64>() / device.len().max(1) as f64;
        f * device.iter().map(|&e| mean_prob_e[e]).sum::<f64>()
    };
    devices.iter().map(of_device).sum()
}

/// Gradient of [`device_loss`] for the logits, `[T, E]`; fractions are constants. An expert on no device costs nothing.
pub fn device_loss_backward(fraction_e: &[f64], probs_te: &[f64], top_k: usize, devices: &[Vec<usize>]) -> Vec<f64> {
    let scale = fraction_e.len() as f64 / top_k as f64;
    let mut cost_e = vec![0.0; fraction_e.len()];
    for device in devices {
        let f = device.iter().map(|&e| scale * fraction_e[e]).sum::<f64>() / device.len().max(1) as f64;
        device.iter().for_each(|&e| cost_e[e] += f);
    }
    mean_probability_backward(&cost_e, probs_te)
}

/// Kept rows per expert over capacity-free demand, for reports.
pub fn kept_fraction(assignment: &Assignment) -> f64 {
    let asked = assignment.rows() + assignment.dropped.len();
    if asked == 0 { 1.0 } else { assignment.rows() as f64 / asked as f64 }
}
