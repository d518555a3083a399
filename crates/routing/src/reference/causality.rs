//! Which routers are causal, and which let one sequence's output depend on another's: found by trying, not by argument.
//!
//! Causal: replacing token t of a sequence never changes, not even by one bit, an output before t. Batch-invariant: with two
//! sequences in one routing group, changing the first never changes the second's output. A probe is a whole layer with fixed
//! random parameters, tokens `[T, d]` to outputs `[T, d]`; capacity binds.

use crate::config::{Activation, DropOrder, Normalize, Policy, RouterConfig};
use crate::reference::combine::combine;
use crate::rng::{Purpose, StepContext, Stream};
use crate::route::{RouteShape, RouterInput, route};
use crate::scorers::linear_logits;
use crate::soft::merge::{FirstSegment, merged_forward, segment_weights, shifted_weights};
use crate::soft::soft_moe::{Mixing, NORM_EPSILON, SoftMoe};
use crate::soft::{block_causal, mixture_of_tokens};

/// What the trials found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// No later token ever changed an earlier output.
    pub causal: bool,
    /// No other sequence of the group ever changed this one's output.
    pub batch_invariant: bool,
}

const WIDTH: usize = 4;
const EXPERTS: usize = 4;
const TOKENS: usize = 8;

/// Tokens `[T, d]` to outputs `[T, d]`.
type Layer = Box<dyn Fn(&[f64]) -> Vec<f64>>;

/// A layer under test.
pub struct Probe {
    /// Its name in the golden vectors, where it has one.
    pub name: &'static str,
    layer: Layer,
    /// Pairs a routing of these tokens drops; `None` for layers without capacity.
    dropped: Option<Box<dyn Fn(&[f64]) -> usize>>,
}

impl Probe {
    /// In how many of the trials of [`Self::verdict`] a full expert drops something, alone and in a group of two sequences;
    /// `None` for layers without capacity.
    pub fn binding(&self, trials: usize) -> Option<usize> {
        let dropped = self.dropped.as_ref()?;
        let binds = |trial: &usize| {
            let group = [fill(*trial, 3, TOKENS), fill(*trial, 2, TOKENS)].concat();
            dropped(&fill(*trial, 0, TOKENS)) > 0 && dropped(&group) > 0
        };
        Some((0..trials).filter(binds).count())
    }

    /// Tries `trials` random inputs for each of the two properties.
    pub fn verdict(&self, trials: usize) -> Verdict {
        let mut verdict = Verdict { causal: true, batch_invariant: true };
        for trial in 0..trials {
            let x = fill(trial, 0, TOKENS);
            let t = 1 + trial % (TOKENS - 1);
            let mut changed = x.clone();
            changed[t * WIDTH..(t + 1) * WIDTH].copy_from_slice(&fill(trial, 1, 1));
            verdict.causal &= (self.layer)(&x)[..t * WIDTH] == (self.layer)(&changed)[..t * WIDTH];

            let own = fill(trial, 2, TOKENS);
            let with = |other: Vec<f64>| (self.layer)(&[other, own.clone()].concat())[TOKENS * WIDTH..].to_vec();
            verdict.batch_invariant &= with(fill(trial, 3, TOKENS)) == with(fill(trial, 4, TOKENS));
        }
        verdict
    }
}

/// Tokens of a trial, standard normal.
fn fill(trial: usize, part: usize, tokens: usize) -> Vec<f64> {
    let draws = source(0xCA05);
    (0..tokens * WIDTH).map(|i| draws.normal(trial * 8 + part, i)).collect()
}

/// Every probe.
pub fn probes() -> Vec<Probe> {
    let top = |k: usize| (RouterConfig { normalize: Normalize::Never, ..RouterConfig::default() }, k);
    let (plain, order) = (top(2).0, |drop_order| RouterConfig { drop_order, ..top(2).0 });
    let policy = |policy| RouterConfig { policy, ..top(2).0 };
    let relu = RouterConfig { policy: Policy::Relu, activation: Activation::Relu, ..top(2).0 };
    let two_level =
        RouterConfig { activation: Activation::SoftmaxSelected, ..policy(Policy::Hierarchical { groups: 2, keep: 2 }) };
    let choice = RouterConfig { policy: Policy::ExpertChoice, ..top(2).0 };
    vec![
        sparse("token_choice_dropless", plain.clone(), 2, 0.0),
        sparse("switch_top1_capacity_position", order(DropOrder::TokenMajor), 1, 1.0),
        sparse("top2_capacity_k_major", order(DropOrder::ChoiceMajor), 2, 0.75),
        sparse("top2_capacity_token_major", order(DropOrder::TokenMajor), 2, 0.75),
        sparse("top1_capacity_bpr", order(DropOrder::BatchPriority), 1, 1.0),
        sparse("expert_choice", choice, 2, 0.0),
        smooth("soft_moe", soft_moe),
        sparse("relu_routing", relu, 2, 0.0),
        merged("smear", usize::MAX, None),
        merged("lory_own_first", 2, Some(FirstSegment::OwnMean)),
        merged("lory_uniform_first", 2, Some(FirstSegment::Uniform)),
        smooth("block_causal_soft", |x| soft(|l| block_causal::forward(l, x, WIDTH, 2, expert).y_td)),
        sparse("top2_capacity_random", order(DropOrder::Random), 2, 0.75),
        sparse("top2_capacity_score", order(DropOrder::Score), 2, 0.75),
        sparse("top1_capacity_similarity", order(DropOrder::Similarity), 1, 1.0),
        sparse("batchwise", policy(Policy::Batchwise), 2, 0.0),
        sparse("base", policy(Policy::Base), 1, 0.0),
        sparse("sinkhorn", policy(Policy::Sinkhorn), 1, 0.0),
        sparse("top_p", policy(Policy::TopP { mass: 0.6 }), 2, 0.0),
        sparse("group_limited", policy(Policy::GroupLimited { groups: 2, keep: 1 }), 2, 0.0),
        sparse("top2_capacity_bpr_sum", order(DropOrder::BatchPrioritySum), 2, 0.75),
        sparse("top2_capacity_redirect", order(DropOrder::SimilarityRedirect), 2, 0.75),
        sparse("expert_choice_capped", policy(Policy::ExpertChoiceCapped { cap: 2 }), 2, 0.0),
        sparse("frozen_bias", RouterConfig { activation: Activation::Sigmoid, ..plain }, 2, 0.0),
        smooth("mixture_of_tokens", mixture_of_positions),
        smooth("soft_moe_group_is_the_sequence", |x| x.chunks(TOKENS * WIDTH).flat_map(soft_moe).collect()),
        sparse("hierarchical", two_level, 4, 0.0),
    ]
}

fn smooth(name: &'static str, layer: impl Fn(&[f64]) -> Vec<f64> + 'static) -> Probe {
    Probe { name, layer: Box::new(layer), dropped: None }
}

fn sparse(name: &'static str, config: RouterConfig, top_k: usize, factor: f64) -> Probe {
    let router = parameters(1, WIDTH * config.logits_per_token(EXPERTS));
    let bias = (name == "frozen_bias").then(|| parameters(5, EXPERTS));
    let routed = move |x: &[f64]| {
        let tokens = x.len() / WIDTH;
        let logits = linear_logits(x, &router, WIDTH);
        let slots = (factor * (tokens * top_k) as f64 / EXPERTS as f64).ceil() as usize;
        let capacity = (slots > 0).then_some(slots);
        let input = RouterInput { capacity, bias_e: bias.as_deref(), ..RouterInput::new(&logits).with_tokens(x) };
        let shape = RouteShape { tokens, experts: EXPERTS, top_k };
        // Training, because that is where random selection, batchwise masks and plans are in force.
        route(&input, shape, &config, &StepContext::training(1, 1, 1))
    };
    let counted = routed.clone();
    let layer = move |x: &[f64]| match routed(x) {
        Ok(routed) => combine(x, WIDTH, &routed.assignment, &routed.weight_n, expert),
        Err(_) => vec![f64::NAN; x.len()],
    };
    let dropped = move |x: &[f64]| counted(x).map_or(0, |routed| routed.assignment.dropped.len());
    let capacity = factor > 0.0;
    Probe { name, layer: Box::new(layer), dropped: if capacity { Some(Box::new(dropped)) } else { None } }
}

fn soft_moe(x: &[f64]) -> Vec<f64> {
    soft(|layer| layer.forward(x, WIDTH, Mixing::Soft, expert).y_td)
}

/// Tokens at the same position of all sequences are one group.
fn mixture_of_positions(x: &[f64]) -> Vec<f64> {
    let controller = parameters(6, WIDTH * EXPERTS);
    let sequences = x.len() / (TOKENS * WIDTH);
    let mut y = vec![0.0; x.len()];
    for position in 0..TOKENS {
        let at = |s: usize| (s * TOKENS + position) * WIDTH..(s * TOKENS + position + 1) * WIDTH;
        let group: Vec<f64> = (0..sequences).flat_map(|s| x[at(s)].to_vec()).collect();
        let (_, out) = mixture_of_tokens::group_forward(&group, &controller, WIDTH, 1.0, expert);
        (0..sequences).for_each(|s| y[at(s)].copy_from_slice(&out[s * WIDTH..(s + 1) * WIDTH]));
    }
    y
}

fn soft(run: impl Fn(&SoftMoe<f64>) -> Vec<f64>) -> Vec<f64> {
    let phi_ds = parameters(2, WIDTH * EXPERTS);
    run(&SoftMoe { phi_ds: &phi_ds, slots: EXPERTS, per_expert: 1, scale: 1.5, epsilon: NORM_EPSILON })
}

fn merged(name: &'static str, segment: usize, first: Option<FirstSegment>) -> Probe {
    let router = parameters(3, WIDTH * EXPERTS);
    let matrices = parameters(4, EXPERTS * WIDTH * WIDTH);
    let layer = move |x: &[f64]| {
        let segment = segment.min(x.len() / WIDTH);
        let own = segment_weights(x, &router, WIDTH, segment);
        let used = first.map_or(own.clone(), |first| shifted_weights(&own, EXPERTS, first));
        let apply = |w: &[f64], x: &[f64]| linear_logits(x, w, WIDTH).into_iter().map(f64::tanh).collect();
        merged_forward(x, WIDTH, segment, &used, &matrices, EXPERTS, apply)
    };
    smooth(name, layer)
}

fn expert(e: usize, x: &[f64]) -> Vec<f64> {
    x.iter().map(|v| (v * (e as f64 + 0.5) + 0.1).tanh()).collect()
}

fn parameters(which: usize, n: usize) -> Vec<f64> {
    let draws = source(0x5EED);
    (0..n).map(|i| draws.normal(which, i)).collect()
}

fn source(seed: u64) -> Stream {
    let step = StepContext::training(seed, 0, 0);
    Stream::new(&step, Purpose::LogitNoise)
}
