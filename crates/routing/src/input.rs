//! What a router is given beside its configuration, and the checks that all of it fits together.

use crate::assignment::Choices;
use crate::config::{RouterConfig, ZeroComputation};
use crate::error::RoutingError;
use crate::real::Real;

/// The sizes of one routing call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteShape {
    /// T, tokens in the routing group.
    pub tokens: usize,
    /// E.
    pub experts: usize,
    /// k.
    pub top_k: usize,
}

/// What a router looks at. Most need logits only.
#[derive(Debug, Clone, Copy)]
pub struct RouterInput<'a, S> {
    /// Router logits `[T, E]`; with two levels `[T, E + a]`, those of the a groups last.
    pub logits_te: &'a [S],
    /// `x W_noise`, as many as logits, for [`Noise::Softplus`](crate::Noise::Softplus) in training.
    pub raw_noise_te: Option<&'a [S]>,
    /// Added to the scores for selection only, never to the weights `[E]` (DeepSeek-V3).
    pub bias_e: Option<&'a [S]>,
    /// `false` for padding: such a token chooses nothing and counts nowhere `[T]`.
    pub real_t: Option<&'a [bool]>,
    /// Given standard normal draws, as many as logits, instead of the stream's, where the configuration's noise is normal and trained
    /// with: for tests and golden vectors.
    pub noise_te: Option<&'a [S]>,
    /// Slots per expert, instead of what the configuration's factor gives.
    pub capacity: Option<usize>,
    /// The tokens `[T, d]`, for similarity-aware selection.
    pub x_td: Option<&'a [S]>,
    /// Learned thresholds `[E]`, for batchwise gating in evaluation.
    pub thresholds_e: Option<&'a [S]>,
    /// Experts decided elsewhere `[T, k]`, for hash layers.
    pub given_tk: Option<&'a [u32]>,
    /// Which of the E experts have no network (MoE++): their own capacity and share of the balance loss.
    pub zero_computation: Option<ZeroComputation>,
}

impl<'a, S: Real> RouterInput<'a, S> {
    /// Logits alone.
    pub fn new(logits_te: &'a [S]) -> Self {
        Self {
            logits_te,
            raw_noise_te: None,
            bias_e: None,
            real_t: None,
            noise_te: None,
            capacity: None,
            x_td: None,
            thresholds_e: None,
            given_tk: None,
            zero_computation: None,
        }
    }

    /// With `x W_noise` for Shazeer's noise.
    pub fn with_raw_noise(self, raw_noise_te: &'a [S]) -> Self {
        Self { raw_noise_te: Some(raw_noise_te), ..self }
    }

    /// With a selection bias per expert.
    pub fn with_bias(self, bias_e: &'a [S]) -> Self {
        Self { bias_e: Some(bias_e), ..self }
    }

    /// With padding marked `false`.
    pub fn with_padding(self, real_t: &'a [bool]) -> Self {
        Self { real_t: Some(real_t), ..self }
    }

    /// With the tokens `[T, d]`.
    pub fn with_tokens(self, x_td: &'a [S]) -> Self {
        Self { x_td: Some(x_td), ..self }
    }

    /// With experts decided elsewhere `[T, k]`.
    pub fn with_given(self, given_tk: &'a [u32]) -> Self {
        Self { given_tk: Some(given_tk), ..self }
    }

    /// With learned thresholds `[E]`.
    pub fn with_thresholds(self, thresholds_e: &'a [S]) -> Self {
        Self { thresholds_e: Some(thresholds_e), ..self }
    }

    /// With given standard normal draws.
    pub fn with_noise(self, noise_te: &'a [S]) -> Self {
        Self { noise_te: Some(noise_te), ..self }
    }
}

pub(crate) fn real_tokens<S>(input: &RouterInput<S>, tokens: usize) -> usize {
    input.real_t.map_or(tokens, |real| real.iter().filter(|r| **r).count())
}

pub(crate) fn check_input<S: Real>(
    input: &RouterInput<S>,
    shape: RouteShape,
    config: &RouterConfig,
) -> Result<(), RoutingError> {
    let RouteShape { tokens, experts, top_k } = shape;
    if tokens.saturating_mul(top_k) >= u32::MAX as usize {
        return Err(RoutingError::TooLarge { tokens, per_token: top_k });
    }
    if let Some(zero) = input.zero_computation {
        zero.validate(zero.networks(experts), config)?;
    }
    let width = config.logits_per_token(experts);
    let scores = tokens.saturating_mul(width);
    check_scores("router logits", input.logits_te, scores, width, shape)?;
    if let Some(raw) = input.raw_noise_te {
        check_scores("raw noise", raw, scores, width, shape)?;
    }
    if let Some(noise) = input.noise_te {
        check_scores("noise", noise, scores, width, shape)?;
    }
    if let Some(bias) = input.bias_e {
        check_scores("selection bias", bias, experts, experts, shape)?;
    }
    if let Some(thresholds) = input.thresholds_e {
        check_scores("thresholds", thresholds, experts, experts, shape)?;
    }
    if let Some(x_td) = input.x_td {
        if tokens > 0 && x_td.len() % tokens != 0 {
            return Err(length("tokens x_td", tokens * (x_td.len() / tokens + 1), x_td.len(), shape));
        }
        if let Some(at) = x_td.iter().position(|x| !x.is_finite()) {
            let token = at / (x_td.len() / tokens.max(1)).max(1);
            return Err(RoutingError::NonFinite { what: "tokens x_td", token, expert: 0, value: x_td[at].f64() });
        }
    }
    if let Some(given) = input.given_tk {
        if given.len() != tokens * top_k {
            return Err(length("given experts", tokens * top_k, given.len(), shape));
        }
        Choices::rectangular(tokens, top_k, given.to_vec()).check(experts)?;
    }
    match input.real_t {
        Some(real) if real.len() != tokens => Err(length("padding mask", tokens, real.len(), shape)),
        _ => Ok(()),
    }
}

fn check_scores<S: Real>(
    what: &'static str,
    scores: &[S],
    expected: usize,
    width: usize,
    shape: RouteShape,
) -> Result<(), RoutingError> {
    if scores.len() != expected {
        return Err(length(what, expected, scores.len(), shape));
    }
    match scores.iter().position(|z| !z.is_finite()) {
        None => Ok(()),
        Some(at) => {
            Err(RoutingError::NonFinite { what, token: at / width, expert: at % width, value: scores[at].f64() })
        }
    }
}

pub(crate) fn length(what: &'static str, expected: usize, found: usize, shape: RouteShape) -> RoutingError {
    let RouteShape { tokens, experts, top_k } = shape;
    RoutingError::Length { what, expected, found, shape: format!("T={tokens} E={experts} k={top_k}") }
}
