//! Text from a model: one token after another through the key-value cache, streamed, or many prompts at once.

use mixtura_nn::{Decoder, ForwardContext, ForwardError};
use mixtura_ops::{Numerics, with_slice};
use rayon::prelude::*;

use crate::interrupt::Interrupt;
use crate::sample::Sampling;

/// When a continuation ends, apart from the model's context.
#[derive(Debug, Clone, Copy)]
pub struct Limits<'a> {
    /// Tokens to add at most.
    pub max_tokens: usize,
    /// The ids that end a text.
    pub ends: &'a [u32],
}

/// Why a continuation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model gave this id, which ends a text.
    End(u32),
    /// [`Limits::max_tokens`] were added.
    MaxTokens,
    /// The model's context is full.
    Context,
    /// Whoever the tokens were handed to wants no more.
    Stopped,
}

/// What was added to a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Continuation {
    /// The new tokens, without the one that ended the text.
    pub ids: Vec<u32>,
    /// Why there are no more.
    pub finish: Finish,
}

/// Continues `prompt` and hands out each new token as it comes; `false` from `each` stops.
///
/// The model must be one without autodiff (see `Module::valid`). Errors are those of a forward pass: a prompt that is empty,
/// too long for the context or outside the vocabulary.
pub fn generate(
    model: &Decoder,
    prompt: &[u32],
    limits: Limits,
    sampling: &Sampling,
    numerics: Numerics,
    mut each: impl FnMut(u32) -> bool,
) -> Result<Continuation, ForwardError> {
    let context = ForwardContext::evaluation(numerics);
    let room = model.config().context;
    if prompt.len() > room {
        return Err(ForwardError::TooLong { found: prompt.len(), context: room });
    }
    let mut cache = model.cache(prompt.len().saturating_add(limits.max_tokens));
    let mut ids = Vec::new();
    let mut out = model.decode_last(prompt, &mut cache, &context)?;
    let finish = loop {
        if ids.len() == limits.max_tokens {
            break Finish::MaxTokens;
        }
        // Before the second and every later token: the one before it has to go through the model, if it still fits.
        if let Some(&last) = ids.last() {
            if cache.len() >= cache.capacity() {
                break Finish::Context;
            }
            out = model.decode_last(&[last], &mut cache, &context)?;
        }
        let id = with_slice(&out.logits, |logits_v| sampling.next(logits_v, ids.len() as u64));
        if limits.ends.contains(&id) {
            break Finish::End(id);
        }
        ids.push(id);
        if !each(id) {
            break Finish::Stopped;
        }
    };
    Ok(Continuation { ids, finish })
}

/// The likeliest continuation of every prompt; prompts are spread over the threads. Those that `interrupt` cut short are `None`.
pub fn generate_all(
    model: &Decoder,
    prompts: &[&[u32]],
    limits: Limits,
    numerics: Numerics,
    interrupt: &Interrupt,
) -> Result<Vec<Option<Vec<u32>>>, ForwardError> {
    let one = |prompt: &&[u32]| {
        if interrupt.requested() {
            return Ok(None);
        }
        let answer = generate(model, prompt, limits, &Sampling::GREEDY, numerics, |_| !interrupt.requested())?;
        Ok((!interrupt.requested()).then_some(answer.ids))
    };
    // The first prompt alone packs every weight: no thread then waits on a pack while it holds another thread's work.
    let Some((first, rest)) = prompts.split_first() else { return Ok(Vec::new()) };
    let mut all = vec![one(first)?];
    all.extend(rest.par_iter().map(one).collect::<Result<Vec<_>, _>>()?);
    Ok(all)
}
