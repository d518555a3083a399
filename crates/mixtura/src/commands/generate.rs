//! `mixtura generate`: continues texts, many at once. One is streamed; of several, each is printed when it and those before it are done.
//! Under `--json` one document at the end.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mixtura_infer::sampling::{Sampling, ScoredToken};
use mixtura_infer::{Engine, Event, Finish, Request, SequenceId, StopStrings, TextWriter, TokenRouting};
use serde::Serialize;

use crate::cli::GenerateArgs;
use crate::commands::{Prompt, choices_cell, prepare, request_failure, step_failure};
use crate::failure::Failure;
use crate::model_dir::{Held, Model};
use crate::output::Output;

#[derive(Serialize)]
struct Document {
    prompt: String,
    text: String,
    ids: Vec<u32>,
    /// `stop` where the model ended the text or a stop string did, `length` where there was no room for more; the words of serving APIs.
    finish_reason: &'static str,
    /// The same in a sentence.
    finish_detail: String,
    prompt_tokens: usize,
    tokens: usize,
    /// From the first new token of any text to the last; starting up and reading prompts are not in it.
    tokens_per_second: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    log_probabilities: Option<Vec<Likely>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    routing: Option<Vec<TokenRoute>>,
}

/// A new token under the model's own distribution, and the likeliest ones at its place.
#[derive(Serialize)]
struct Likely {
    id: u32,
    log_probability: f64,
    likeliest: Vec<(u32, f64)>,
}

/// Where a token went, prompt and text alike; the last new token does not go through the model.
#[derive(Serialize)]
struct TokenRoute {
    position: usize,
    id: u32,
    token: String,
    layers: Vec<Choices>,
}

#[derive(Serialize)]
struct Choices {
    layer: usize,
    experts: Vec<u32>,
    weights: Vec<f32>,
}

/// One text under way.
struct Text<'t> {
    shown: String,
    prompt_tokens: usize,
    writer: TextWriter<'t>,
    /// What was said after the prompt.
    text: String,
    ids: Vec<u32>,
    likely: Vec<Likely>,
    routes: Vec<TokenRouting>,
    ended: Option<Ended>,
}

/// Why a text ended.
enum Ended {
    Model(Finish),
    StopString,
}

/// Generates.
pub fn run(args: &GenerateArgs, output: &Output) -> Result<(), Failure> {
    prepare(&args.compute.threads)?;
    let sampling = super::sampling(&args.sampling)?;
    let model = Model::load(&args.model, Held::packed(args.compute.precision), output)?;
    // Inside the pool, so that no parallel part of a forward pass has to be handed over to it.
    rayon::scope(|_| generate(args, sampling, &model, output))
}

fn generate(args: &GenerateArgs, sampling: Sampling, model: &Model, output: &Output) -> Result<(), Failure> {
    let prompts = prompts(args, model)?;
    let tokenizer = model.tokenizer("generation")?;
    let ends = model.ends();
    let mut engine = Engine::new(model.decoder(), model.numerics());
    let mut texts: BTreeMap<SequenceId, Text> = BTreeMap::new();
    let mut seen: BTreeMap<Vec<u32>, u64> = BTreeMap::new();
    for Prompt { text, ids } in prompts {
        // The same draws as alone; a prompt that is given again gets others.
        let again = seen.entry(ids.clone()).and_modify(|n| *n += 1).or_insert(0);
        let seed = sampling.seed.wrapping_add(*again);
        let stops = StopStrings::new(&args.sampling.stop).expect("checked before the model was read");
        // A text is shown as it was given; of ids, what they say so far.
        let shown = text.unwrap_or_else(|| {
            let mut stream = tokenizer.stream();
            ids.iter().map(|id| stream.push(*id)).collect()
        });
        let writer = TextWriter::after(tokenizer, &ids, stops);
        let prompt_tokens = ids.len();
        let request = Request {
            sampling: Sampling { seed, ..sampling },
            likeliest: args.sampling.log_probabilities.unwrap_or(0),
            routing: args.routing,
            ..Request::greedy(ids, args.max_tokens, &ends)
        };
        let id = engine.add(request).map_err(request_failure)?;
        let (text, ids, likely, routes) = Default::default();
        texts.insert(id, Text { shown, prompt_tokens, writer, text, ids, likely, routes, ended: None });
    }
    let streamed = texts.len() == 1 && !output.json && !args.routing;
    if let Some(only) = texts.values().next().filter(|_| streamed)
        && !output.print_while_read(&only.shown)?
    {
        return Ok(());
    }
    let mut clock = Clock::default();
    while !engine.is_idle() {
        for (id, event) in engine.step().map_err(step_failure)? {
            let text = texts.get_mut(&id).expect("it was asked for");
            match event {
                Event::Routed(routes) => text.routes.extend(routes),
                Event::Token { token, likeliest } => {
                    clock.token();
                    text.ids.push(token.id);
                    text.likely.push(Likely::of(token, &likeliest));
                    let piece = text.writer.push(token.id);
                    text.text.push_str(&piece.text);
                    if piece.stopped {
                        text.ended.get_or_insert(Ended::StopString);
                        engine.remove(id);
                    }
                    if streamed && !output.print_while_read(&piece.text)? {
                        return Ok(());
                    }
                }
                Event::Finished(finish) if text.ended.is_none() => {
                    let last = text.writer.finish();
                    text.text.push_str(&last.text);
                    text.ended = Some(if last.stopped { Ended::StopString } else { Ended::Model(finish) });
                    if streamed && !output.print_while_read(&last.text)? {
                        return Ok(());
                    }
                }
                Event::Finished(_) => {}
            }
        }
    }
    let tokens_per_second = clock.tokens_per_second();
    let mut documents: Vec<Document> =
        texts.into_values().map(|text| text.document(args, model, tokens_per_second)).collect();
    let note = note(&documents, tokens_per_second);
    match (&mut documents[..], streamed) {
        (_, true) => output.print("\n")?,
        ([one], false) => output.result(&*one, || one.routed_text())?,
        (several, false) => output.result(&several, || several.iter().map(Document::titled_text).collect())?,
    }
    output.note(&note);
    Ok(())
}

/// All that is to be continued.
fn prompts(args: &GenerateArgs, model: &Model) -> Result<Vec<Prompt>, Failure> {
    let one = |text: Option<&str>, file, ids| Prompt::read(model, text, file, ids, args.special);
    let mut prompts = Vec::new();
    for text in &args.prompt {
        prompts.push(one(Some(text), None, None)?);
    }
    if let Some(file) = &args.prompt_file {
        prompts.push(one(None, Some(file), None)?);
    }
    if let Some(ids) = &args.ids {
        prompts.push(one(None, None, Some(ids))?);
    }
    if let Some(file) = &args.prompts {
        let texts = super::lines_of(file)?;
        if texts.is_empty() {
            return Err(Failure::usage(format!("{} has no prompt", file.display())));
        }
        for text in &texts {
            prompts.push(one(Some(text), None, None)?);
        }
    }
    if prompts.iter().any(|prompt| prompt.ids.is_empty()) {
        return Err(Failure::usage("the prompt is empty and the vocabulary has no token to start from"));
    }
    Ok(prompts)
}

/// When tokens came.
#[derive(Default)]
struct Clock {
    first: Option<Instant>,
    last: Option<Instant>,
    tokens: usize,
}

impl Clock {
    fn token(&mut self) {
        let now = Instant::now();
        self.first.get_or_insert(now);
        self.last = Some(now);
        self.tokens += 1;
    }

    /// Of the tokens after the first: it came out of the pass over the prompt. 0 where there are none.
    fn tokens_per_second(&self) -> f64 {
        let taken = self.first.zip(self.last).map_or(Duration::ZERO, |(first, last)| last - first);
        if taken.is_zero() { 0.0 } else { (self.tokens - 1) as f64 / taken.as_secs_f64() }
    }
}

impl Likely {
    fn of(token: ScoredToken, likeliest: &[ScoredToken]) -> Self {
        let likeliest = likeliest.iter().map(|one| (one.id, one.log_probability)).collect();
        Self { id: token.id, log_probability: token.log_probability, likeliest }
    }
}

impl Text<'_> {
    fn document(self, args: &GenerateArgs, model: &Model, tokens_per_second: f64) -> Document {
        let tokenizer = model.tokenizer.as_ref().expect("generation has begun");
        let name = |id: u32| tokenizer.token(id).unwrap_or_default();
        let (finish_reason, finish_detail) = match self.ended {
            Some(Ended::Model(Finish::End(id))) => ("stop", format!("ended by token {id}, {}", name(id))),
            Some(Ended::StopString) => ("stop", "ended by a stop string".into()),
            Some(Ended::Model(Finish::MaxTokens)) => ("length", format!("ended by --max-tokens {}", args.max_tokens)),
            Some(Ended::Model(Finish::Context)) | None => {
                let context = model.loaded.config.context;
                ("length", format!("ended because the model's context of {context} tokens is full"))
            }
        };
        let route = |TokenRouting { id, position, layers }| TokenRoute {
            position,
            id,
            token: name(id),
            layers: layers
                .into_iter()
                .map(|l| Choices { layer: l.layer, experts: l.experts, weights: l.weights })
                .collect(),
        };
        Document {
            prompt: self.shown,
            text: self.text,
            finish_reason,
            finish_detail,
            prompt_tokens: self.prompt_tokens,
            tokens: self.ids.len(),
            tokens_per_second,
            log_probabilities: args.sampling.log_probabilities.map(|_| self.likely),
            routing: args.routing.then(|| self.routes.into_iter().map(route).collect()),
            ids: self.ids,
        }
    }
}

impl Document {
    /// For a person who asked for several.
    fn titled_text(&self) -> String {
        let tokens = self.tokens;
        format!("=== {tokens} tokens, {}\n{}", self.finish_detail, self.routed_text())
    }

    /// The whole text, then the table of its tokens' experts if it was asked for.
    fn routed_text(&self) -> String {
        let text = format!("{}{}\n", self.prompt, self.text);
        let Some(routing) = &self.routing else { return text };
        let layers = routing.first().map_or(&[][..], |token| &token.layers);
        let header = ["position", "id", "token"].map(String::from).into_iter();
        let header = header.chain(layers.iter().map(|layer| format!("layer {}", layer.layer)));
        let mut table = mixtura_train::table::Table::new(header);
        for TokenRoute { position, id, token, layers } in routing {
            let experts = |layer: &Choices| choices_cell(&layer.experts, &layer.weights);
            let cells = [position.to_string(), id.to_string(), token.escape_debug().to_string()];
            table.row(cells.into_iter().chain(layers.iter().map(experts)));
        }
        format!("{text}\n{table}")
    }
}

fn note(documents: &[Document], tokens_per_second: f64) -> String {
    match documents {
        [one] => format!(
            "{} tokens after {}, {tokens_per_second:.0} per second; {}",
            one.tokens, one.prompt_tokens, one.finish_detail
        ),
        several => {
            let tokens: usize = several.iter().map(|one| one.tokens).sum();
            format!("{tokens} tokens of {} texts, {tokens_per_second:.0} per second in all", several.len())
        }
    }
}
