//! `mixtura generate`: streams the continuation of a text; under `--json` one document at the end.

use std::time::Instant;

use mixtura_train::answer::{Limits, generate};
use mixtura_train::sample::Sampling;
use serde::Serialize;

use crate::cli::GenerateArgs;
use crate::commands::{forward_failure, prepare};
use crate::failure::Failure;
use crate::model_dir::Model;
use crate::output::Output;

#[derive(Serialize)]
struct Document<'a> {
    prompt: &'a str,
    text: String,
    ids: Vec<u32>,
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
    let prompt = tokenizer.encode_prompt(&args.prompt)?;
    if prompt.is_empty() {
        return Err(Failure::usage("--prompt: the text is empty and the vocabulary has no token to start from"));
    }
    let limits = Limits { max_tokens: args.max_tokens, eos: tokenizer.eos() };
    let mut stream = tokenizer.stream();
    if !output.json {
        output.print(&args.prompt)?;
    }
    let mut text = String::new();
    let mut broken = None;
    let started = Instant::now();
    let numerics = model.numerics(args.compute.precision);
    let ids = generate(model.decoder(), &prompt, limits, &sampling, numerics, |id| {
        let piece = stream.push(id);
        let printed = if output.json { Ok(()) } else { output.print(&piece) };
        text.push_str(&piece);
        broken = printed.err();
        broken.is_none()
    })
    .map_err(forward_failure)?;
    if let Some(error) = broken {
        return Err(error.into());
    }
    let tokens_per_second = ids.len() as f64 / started.elapsed().as_secs_f64();
    let (prompt_tokens, tokens) = (prompt.len(), ids.len());
    let document = Document { prompt: &args.prompt, text, ids, prompt_tokens, tokens, tokens_per_second };
    output.result(&document, || "\n".to_string())?;
    output.note(&format!("{tokens} tokens after {prompt_tokens}, {tokens_per_second:.0} per second"));
    Ok(())
}
