//! Text from a model: one token after another through the key-value cache, streamed, or many prompts at once.

use mixtura_nn::{Decoder, ForwardContext, ForwardError};
use mixtura_ops::{Numerics, with_slice};
use rayon::prelude::*;

use crate::interrupt::Interrupt;
use crate::sample::Sampling;

/// When a continuation ends, apart from the model's context.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Tokens to add at most.
    pub max_tokens: usize,
    /// The id that ends a document, if the vocabulary has one.
    pub eos: Option<u32>,
}

/// Continues `prompt` and hands out each new token as it comes; `false` from `each` stops. Returns the new tokens, eos left out.
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
) -> Result<Vec<u32>, ForwardError> {
    let context = ForwardContext::evaluation(numerics);
    let room = model.config().context;
    if prompt.len() > room {
        return Err(ForwardError::TooLong { found: prompt.len(), context: room });
    }
    let mut cache = model.cache(prompt.len() + limits.max_tokens);
    let mut new = Vec::new();
    let mut out = model.decode_last(prompt, &mut cache, &context)?;
    while new.len() < limits.max_tokens {
        let id = with_slice(&out.logits, |logits_v| sampling.next(logits_v, new.len() as u64));
        if Some(id) == limits.eos {
            break;
        }
        new.push(id);
        if !each(id) || cache.len() >= cache.capacity() || new.len() == limits.max_tokens {
            break;
        }
        out = model.decode_last(&[id], &mut cache, &context)?;
    }
    Ok(new)
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
        Ok((!interrupt.requested()).then_some(answer))
    };
    // The first prompt alone packs every weight: no thread then waits on a pack while it holds another thread's work.
    let Some((first, rest)) = prompts.split_first() else { return Ok(Vec::new()) };
    let mut all = vec![one(first)?];
    all.extend(rest.par_iter().map(one).collect::<Result<Vec<_>, _>>()?);
    Ok(all)
}
