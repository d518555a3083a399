//! `mixtura generate`: streams the continuation of a text; under `--json` one document at the end.

use std::time::Instant;

use mixtura_train::answer::{Continuation, Finish, Limits, generate};
use mixtura_train::sample::Sampling;
use serde::Serialize;

use crate::cli::GenerateArgs;
use crate::commands::{Prompt, forward_failure, prepare};
use crate::failure::Failure;
use crate::model_dir::Model;
use crate::output::Output;

#[derive(Serialize)]
struct Document {
    prompt: String,
    text: String,
    ids: Vec<u32>,
    /// `stop` where the model ended the text, `length` where there was no room for more; the words of serving APIs.
    finish_reason: &'static str,
    /// The same in a sentence.
    finish_detail: String,
    prompt_tokens: usize,
    tokens: usize,
    tokens_per_second: f64,
}

/// Generates.
pub fn run(args: &GenerateArgs, output: &Output) -> Result<(), Failure> {
    prepare(&args.compute.threads)?;
    let sampling = Sampling { temperature: args.temperature, top_p: args.top_p, seed: args.seed };
    sampling.validate().map_err(Failure::usage)?;
    let model = Model::load(&args.model, output)?;
    let tokenizer = model.tokenizer("generation")?;
    let (prompt_file, given) = (args.prompt_file.as_deref(), args.ids.as_deref());
    let prompt = Prompt::read(&model, args.prompt.as_deref(), prompt_file, given, args.special)?;
    if prompt.ids.is_empty() {
        return Err(Failure::usage("the prompt is empty and the vocabulary has no token to start from"));
    }
    // A text is shown as it was given; of ids, what they say so far.
    let (shown, mut stream) = match prompt.text {
        Some(text) => (text, tokenizer.stream_after(&prompt.ids)),
        None => {
            let mut stream = tokenizer.stream();
            (prompt.ids.iter().map(|id| stream.push(*id)).collect(), stream)
        }
    };
    if !output.json && !output.print_while_read(&shown)? {
        return Ok(());
    }
    let ends = model.ends();
    let limits = Limits { max_tokens: args.max_tokens, ends: &ends };
    let mut text = String::new();
    let mut broken = None;
    let started = Instant::now();
    let numerics = model.numerics(args.compute.precision);
    let Continuation { ids, finish } = generate(model.decoder(), &prompt.ids, limits, &sampling, numerics, |id| {
        let piece = stream.push(id);
        text.push_str(&piece);
        match if output.json { Ok(true) } else { output.print_while_read(&piece) } {
            Ok(goes_on) => goes_on,
            Err(error) => {
                broken = Some(error);
                false
            }
        }
    })
    .map_err(forward_failure)?;
    if let Some(error) = broken {
        return Err(error.into());
    }
    let tokens_per_second = ids.len() as f64 / started.elapsed().as_secs_f64();
    let last = stream.finish();
    text.push_str(&last);
    let (finish_reason, finish_detail) = match finish {
        Finish::End(id) => ("stop", format!("ended by token {id}, {}", tokenizer.token(id).unwrap_or_default())),
        Finish::MaxTokens => ("length", format!("ended by --max-tokens {}", args.max_tokens)),
        Finish::Context => {
            ("length", format!("ended because the model's context of {} tokens is full", model.loaded.config.context))
        }
        // Nobody reads any more.
        Finish::Stopped => return Ok(()),
    };
    let (prompt_tokens, tokens) = (prompt.ids.len(), ids.len());
    let note = format!("{tokens} tokens after {prompt_tokens}, {tokens_per_second:.0} per second; {finish_detail}");
    let document =
        Document { prompt: shown, text, ids, finish_reason, finish_detail, prompt_tokens, tokens, tokens_per_second };
    output.result(&document, || last + "\n")?;
    output.note(&note);
    Ok(())
}
