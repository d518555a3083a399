//! From scores to choices: one function per policy, each in the file of its family.
//!
//! A policy returns [`Choices`], and where it owns the queue at each expert, also who got a slot. What it decides is constant
//! for the gradient.

pub mod group_limited;
pub mod gshard;
pub mod top_p;
pub mod expert_choice;
pub mod batchwise;
pub mod hash;
pub mod base;
pub mod sinkhorn;
pub mod sparse_mixer;
pub mod hierarchical;
pub mod priority;
pub mod similarity;

use crate::assignment::Choices;
use crate::capacity::{slots_by_position, slots_by_position_each};
use crate::config::{DropOrder, Policy, RouterConfig};
use crate::error::RoutingError;
use crate::input::{RouteShape, RouterInput};
use crate::real::Real;
use crate::rng::{Purpose, StepContext};
use crate::select::{arg_max, top_k};

/// What a policy looks at.
pub(crate) struct PolicyInput<'a, S> {
    pub input: &'a RouterInput<'a, S>,
    pub shape: RouteShape,
    pub config: &'a RouterConfig,
    pub step: &'a StepContext,
    /// Logits with noise, if any `[T, E]`; with two levels `[T, E + a]`.
    pub logits_te: &'a [S],
    /// Their activation `[T, E]`.
    pub gates_te: &'a [S],
    /// Slots per expert; `None` when dropless.
    pub capacity: Option<usize>,
    /// Slots of each expert where they differ; `capacity` is then the first.
    pub capacity_e: Option<&'a [usize]>,
}

/// What a policy decided.
pub(crate) struct Selected {
    pub choices: Choices,
    /// Slot of every pair, [`crate::assignment::NO_SLOT`] if it has none; `None` = every pair is kept.
    pub slots: Option<Vec<u32>>,
}

impl<S: Real> PolicyInput<'_, S> {
    /// Choices and slots.
    pub(crate) fn select(&self) -> Result<Selected, RoutingError> {
        let RouteShape { tokens, experts, top_k: k } = self.shape;
        let choices = match self.config.policy {
            Policy::TopK | Policy::Switch | Policy::NoisyTopK => self.every_token(top_k(&self.scores(), experts, k)),
            Policy::GroupLimited { groups, keep } => {
                // With a bias (V3) a group is worth its two best; without (V2) its best.
                let best = if self.input.bias_e.is_some() { 2 } else { 1 };
                self.every_token(group_limited::select(&self.scores(), experts, groups, keep, best, k))
            }
            Policy::Hierarchical { .. } => match hierarchical::Levels::of(self.config, self.shape) {
                Some(levels) => self.ragged(levels.choose(self.logits_te)),
                None => unreachable!("the policy is hierarchical"),
            },
            Policy::Gshard { second } => {
                let choices = self.every_token(top_k(self.logits_te, experts, 2));
                return Ok(self.with_second_choice_rule(choices, second));
            }
            Policy::SampledTop1 => {
                let noisy = self.with_gumbel(Purpose::Gumbel);
                self.every_token(top_k(noisy.as_deref().unwrap_or(self.logits_te), experts, 1))
            }
            Policy::SampledSecond => {
                let noisy = self.with_gumbel(Purpose::Gumbel);
                self.every_token(sampled_second(self.logits_te, noisy.as_deref().unwrap_or(self.logits_te), experts))
            }
            Policy::TopP { mass } => self.ragged(top_p::select(self.gates_te, experts, S::of(mass))),
            Policy::Relu => self.ragged(positive(self.logits_te, experts)),
            Policy::ExpertChoice => {
                let each = expert_choice::tokens_per_expert(tokens, experts, k);
                return Ok(Selected {
                    choices: expert_choice::select(&self.masked_gates(), experts, each),
                    slots: None,
                });
            }
            Policy::ExpertChoiceCapped { cap } => {
                let each = expert_choice::tokens_per_expert(tokens, experts, k);
                let choices = expert_choice::select_capped(&self.masked_gates(), experts, each, cap);
                return Ok(Selected { choices, slots: None });
            }
            Policy::Batchwise if self.step.training => {
                let each = (tokens * k / experts).clamp(1.min(tokens), tokens);
                let choices = expert_choice::select(&self.masked_gates(), experts, each);
                return Ok(Selected { choices, slots: None });
            }
            Policy::Batchwise => {
                let needs = "thresholds_e, the learned thresholds";
                let thresholds =
                    self.input.thresholds_e.ok_or(RoutingError::MissingInput { policy: "batchwise", needs })?;
                self.ragged(batchwise::above_thresholds(self.gates_te, thresholds))
            }
            Policy::Hash => {
                let needs = "given_tk, the experts of each token's id";
                let given = self.input.given_tk.ok_or(RoutingError::MissingInput { policy: "hash", needs })?;
                self.every_token(given.to_vec())
            }
            Policy::Base if self.step.training => self.every_real_token(|affinity| base::assign(affinity, experts)),
            Policy::Sinkhorn if self.step.training => self.every_real_token(|logits| {
                let plan = sinkhorn::plan(logits, experts, sinkhorn::TOLERANCE, sinkhorn::MOST_ITERATIONS);
                top_k(&plan.plan_te, experts, k)
            }),
            Policy::Base | Policy::Sinkhorn => self.every_token(top_k(self.logits_te, experts, k)),
            Policy::SparseMixer { .. } => self.every_token(top_k(self.logits_te, experts, 2)),
        };
        self.with_drop_order(choices)
    }

    /// What the k largest are taken of: logits where their order is that of the scores, else scores plus bias.
    fn scores(&self) -> std::borrow::Cow<'_, [S]> {
        match self.input.bias_e {
            None => std::borrow::Cow::Borrowed(self.logits_te),
            Some(bias) => {
                let rows = self.gates_te.chunks_exact(self.shape.experts);
                rows.flat_map(|row| row.iter().zip(bias).map(|(&p, &b)| p + b)).collect()
            }
        }
    }

    /// Rectangular choices, without the padding tokens' ones.
    fn every_token(&self, chosen_tk: Vec<u32>) -> Choices {
        let tokens = self.shape.tokens;
        let k = chosen_tk.len().checked_div(tokens).unwrap_or(self.shape.top_k);
        match self.input.real_t {
            None => Choices::rectangular(tokens, k, chosen_tk),
            Some(real) => {
                Choices::ragged(chosen_tk.chunks_exact(k).zip(real).map(|(list, &r)| if r { list } else { &[] }))
            }
        }
    }

    /// For policies that weigh tokens against each other: `choose` sees the real tokens' logits only.
    fn every_real_token(&self, choose: impl Fn(&[f64]) -> Vec<u32>) -> Choices {
        let experts = self.shape.experts;
        let real = |t: usize| self.input.real_t.is_none_or(|real| real[t]);
        let rows = self.logits_te.chunks_exact(experts).enumerate().filter(|(t, _)| real(*t));
        let logits: Vec<f64> = rows.flat_map(|(_, row)| row.iter().map(|z| z.f64())).collect();
        let chosen = choose(&logits);
        let k = chosen.len().checked_div(logits.len() / experts).unwrap_or(0);
        let mut lists = chosen.chunks_exact(k.max(1));
        let list_of = |t: usize| if real(t) { lists.next().unwrap_or(&[]) } else { &[] };
        Choices::ragged((0..self.shape.tokens).map(list_of))
    }

    fn ragged(&self, choices: Choices) -> Choices {
        match self.input.real_t {
            None => choices,
            Some(real) => {
                Choices::ragged(real.iter().enumerate().map(|(t, &r)| if r { choices.of_token(t) } else { &[] }))
            }
        }
    }

    /// Gates with padding rows at minus infinity, so that no expert picks them before a real token.
    fn masked_gates(&self) -> std::borrow::Cow<'_, [S]> {
        match self.input.real_t {
            None => std::borrow::Cow::Borrowed(self.gates_te),
            Some(real) => {
                let mut gates = self.gates_te.to_vec();
                for (row, _) in gates.chunks_exact_mut(self.shape.experts).zip(real).filter(|(_, real)| !**real) {
                    row.fill(S::NEG_INFINITY);
                }
                gates.into()
            }
        }
    }

    /// Logits plus Gumbel noise; `None` outside training.
    fn with_gumbel(&self, purpose: Purpose) -> Option<Vec<S>> {
        let stream = self.step.stream(purpose)?;
        let experts = self.shape.experts;
        let noisy = self.logits_te.iter().enumerate().map(|(i, &z)| match self.input.noise_te {
            Some(given) => z + given[i],
            None => z + S::of(stream.gumbel(i / experts, i % experts)),
        });
        Some(noisy.collect())
    }

    fn with_second_choice_rule(&self, choices: Choices, rule: crate::config::SecondChoice) -> Selected {
        let uniform = self.step.stream(Purpose::SecondChoice);
        let skip: Vec<bool> = match uniform {
            None => vec![false; choices.pairs()],
            Some(stream) => {
                let draw = |t: usize| stream.uniform(t, 0);
                gshard::skipped(&choices, self.gates_te, self.shape.experts, rule, draw)
            }
        };
        if self.capacity.is_none() && skip.iter().all(|s| !s) {
            return Selected { choices, slots: None };
        }
        let capacity = self.capacity.unwrap_or(usize::MAX);
        let queue = gshard::Queue { skipped_takes_place: gshard::skipped_takes_place(rule) };
        let slots = queue.slots(&choices, self.shape.experts, capacity, &skip);
        Selected { choices, slots: Some(slots) }
    }

    fn with_drop_order(&self, mut choices: Choices) -> Result<Selected, RoutingError> {
        let Some(capacity) = self.capacity else { return Ok(Selected { choices, slots: None }) };
        let experts = self.shape.experts;
        let gate = |pair_token: usize, e: u32| self.gates_te[pair_token * experts + e as usize];
        let slots = match self.config.drop_order {
            order @ (DropOrder::TokenMajor | DropOrder::ChoiceMajor) => match self.capacity_e {
                Some(each) => slots_by_position_each(&choices, each, order),
                None => slots_by_position(&choices, experts, capacity, order),
            },
            DropOrder::Random => match self.step.stream(Purpose::TokenSelection) {
                None => slots_by_position(&choices, experts, capacity, DropOrder::TokenMajor),
                Some(stream) => {
                    priority::slots_by_key(&choices, experts, capacity, |t, e| stream.uniform(t, e as usize))
                }
            },
            DropOrder::Score => priority::slots_by_key(&choices, experts, capacity, |t, e| gate(t, e).f64()),
            DropOrder::BatchPriority | DropOrder::BatchPrioritySum => {
                let sum = self.config.drop_order == DropOrder::BatchPrioritySum;
                let order = priority::batch_order(&choices, |t, e| gate(t, e).f64(), sum);
                priority::slots_in_order(&choices, experts, capacity, &order)
            }
            DropOrder::Similarity | DropOrder::SimilarityRedirect => {
                let needs = "x_td, the tokens";
                let policy = "drop_order.similarity";
                let x_td = self.input.x_td.ok_or(RoutingError::MissingInput { policy, needs })?;
                let gates: Vec<f64> = self.gates_te.iter().map(|g| g.f64()).collect();
                let x: Vec<f64> = x_td.iter().map(|x| x.f64()).collect();
                let tokens = similarity::Tokens { gates_te: &gates, experts, x_td: &x };
                if self.config.drop_order == DropOrder::Similarity {
                    tokens.slots(&choices, capacity)
                } else {
                    let redirected = tokens.redirect(&choices, capacity);
                    choices = redirected.choices;
                    redirected.slots
                }
            }
        };
        Ok(Selected { choices, slots: Some(slots) })
    }
}

/// First choice by logits, second by `noisy` among the others; `[T, 2]`.
pub fn sampled_second<S: Real>(logits_te: &[S], noisy_te: &[S], experts: usize) -> Vec<u32> {
    let mut chosen = Vec::with_capacity(logits_te.len() / experts * 2);
    for (clean, noisy) in logits_te.chunks_exact(experts).zip(noisy_te.chunks_exact(experts)) {
        let first = arg_max(clean);
        let mut others = noisy.to_vec();
        others[first] = S::NEG_INFINITY;
        chosen.extend([first as u32, arg_max(&others) as u32]);
    }
    chosen
}

/// Every expert with a positive logit, largest first (ReMoE).
pub fn positive<S: Real>(logits_te: &[S], experts: usize) -> Choices {
    Choices::ragged(logits_te.chunks_exact(experts).map(|row| {
        let mut order = crate::select::order_descending(row);
        order.retain(|&e| row[e as usize] > S::ZERO);
        order
    }))
}
