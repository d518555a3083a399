//! One file per command: `run(args, output)` does it and prints its result.

pub mod train;
pub mod eval;
pub mod generate;
pub mod chat;
pub mod tokenize;
pub mod logits;
pub mod inspect;
pub mod route;
pub mod bench;
pub mod doctor;
pub mod completions;

use std::io::Read;
use std::path::Path;

use mixtura_data::{DataKind, kind_of};
use mixtura_infer::sampling::{Sampling, SamplingError};
use mixtura_infer::{RequestError, StepError, StopStrings};
use mixtura_kernels::ways;
use mixtura_ops::Isa;

use crate::cli::{SamplingArgs, ThreadArgs};
use crate::failure::Failure;
use crate::model_dir::Model;

/// More than this are refused, unless there are that many cores.
const MOST_THREADS: usize = 512;

/// Settles what everything that computes depends on: the instruction set and the way asked for can be used, and there are as many threads as asked
/// for. Returns the number of threads.
pub fn prepare(args: &ThreadArgs) -> Result<usize, Failure> {
    Isa::try_current().map_err(|e| Failure::usage(e.to_string()))?;
    ways::forced().map_err(|e| Failure::usage(e.to_string()))?;
    // Each has a stack and work buffers of its own, and beyond the cores they only wait for each other: 100 000 never get started.
    let most = MOST_THREADS.max(8 * std::thread::available_parallelism().map_or(1, usize::from));
    let refuse = |given: &str| {
        let message =
            format!("{given}: expected 1 to {most} threads; by default there is one per core that the process may use");
        Err(Failure::usage(message))
    };
    match (args.threads, std::env::var("RAYON_NUM_THREADS").ok().and_then(|n| n.parse::<usize>().ok())) {
        (Some(threads), _) if !(1..=most).contains(&threads) => return refuse(&format!("--threads {threads}")),
        (None, Some(threads)) if threads > most => return refuse(&format!("RAYON_NUM_THREADS = {threads}")),
        _ => {}
    }
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()
            .map_err(|e| Failure::running(format!("cannot start {threads} threads: {e}")))?;
    }
    Ok(rayon::current_num_threads())
}

/// What a command was given to start from.
pub struct Prompt {
    /// As it was typed or read; none where ids were given.
    pub text: Option<String>,
    /// What the model sees.
    pub ids: Vec<u32>,
}

impl Prompt {
    /// One of three: a text, a file of text (`-` is stdin), or ids. `special` reads special tokens in a text as such.
    pub fn read(
        model: &Model,
        text: Option<&str>,
        file: Option<&Path>,
        ids: Option<&[u32]>,
        special: bool,
    ) -> Result<Self, Failure> {
        if let Some(ids) = ids {
            return Ok(Self { text: None, ids: ids.to_vec() });
        }
        let text = match (text, file) {
            (Some(text), _) => text.to_string(),
            (None, Some(file)) => text_of(file)?,
            (None, None) => return Err(Failure::usage("no text and no ids were given")),
        };
        let tokenizer = model.tokenizer("a text")?;
        let ids = match special {
            true => tokenizer.encode_prompt_with_special(&text)?,
            false => tokenizer.encode_prompt(&text)?,
        };
        Ok(Self { text: Some(text), ids })
    }
}

/// All of a file, or of stdin.
fn text_of(file: &Path) -> Result<String, Failure> {
    let (name, bytes) = if file == Path::new("-") {
        let mut bytes = Vec::new();
        ("stdin".to_string(), std::io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes))
    } else {
        (file.display().to_string(), std::fs::read(file))
    };
    let bytes = bytes.map_err(|error| Failure::usage(format!("cannot read the text from {name}: {error}")))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Failure::usage(format!("{name} is not UTF-8 text: byte 0x{:02x} at byte {at}", error.as_bytes()[at]))
    })
}

/// The experts of a token with their weights, in a table.
pub fn choices_cell(experts: &[u32], weights: &[f32]) -> String {
    let pairs = experts.iter().zip(weights);
    pairs.map(|(expert, weight)| format!("{expert}:{weight:.2}")).collect::<Vec<_>>().join(" ")
}

/// How tokens are to be chosen, if the options are possible.
pub fn sampling(args: &SamplingArgs) -> Result<Sampling, Failure> {
    let SamplingArgs { temperature, top_k, top_p, min_p, repetition_penalty, seed, .. } = *args;
    let sampling = Sampling { temperature, top_k, top_p, min_p, repetition_penalty, seed };
    sampling.validate().map_err(|error| match error {
        SamplingError::Option { option, found, expected } => {
            Failure::usage(format!("--{} {found}: expected {expected}", option.replace('_', "-")))
        }
        other => Failure::usage(other.to_string()),
    })?;
    StopStrings::new(&args.stop).map_err(|e| Failure::usage(e.to_string()))?;
    Ok(sampling)
}

/// A text per line of a file or of stdin (`-`): the line, or where it is JSON the string, or the field `prompt` of the object. Blank lines
/// are none.
pub fn lines_of(file: &Path) -> Result<Vec<String>, Failure> {
    let text = text_of(file)?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let is_json = kind_of(file) == DataKind::Jsonl;
    let line = |(number, line): (usize, &str)| {
        if !is_json {
            return Ok(line.to_string());
        }
        let refuse = |why: String| Failure::usage(format!("{}, line {}: {why}", file.display(), number + 1));
        match serde_json::from_str(line).map_err(|e| refuse(e.to_string()))? {
            serde_json::Value::String(text) => Ok(text),
            serde_json::Value::Object(fields) => match fields.get("prompt") {
                Some(serde_json::Value::String(text)) => Ok(text.clone()),
                _ => Err(refuse("expected a field \"prompt\" with a text".into())),
            },
            _ => Err(refuse("expected a text, or an object with a field \"prompt\"".into())),
        }
    };
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(line).collect()
}

/// Requests are refused for what the person gave, or for want of memory.
pub fn request_failure(error: RequestError) -> Failure {
    match error {
        RequestError::Memory { .. } => Failure::running(error.to_string()),
        other => Failure::usage(other.to_string()),
    }
}

/// Likewise, and for what came out of the model.
pub fn step_failure(error: StepError) -> Failure {
    match error {
        StepError::Request(error) => request_failure(error),
        StepError::Forward(error) => forward_failure(error),
        StepError::Sampling(error) => Failure::running(error.to_string()),
    }
}

/// A forward pass refuses ids and lengths that the person gave; anything else failed while running.
pub fn forward_failure(error: mixtura_nn::ForwardError) -> Failure {
    match error {
        mixtura_nn::ForwardError::Routing { .. } => Failure::running(error.to_string()),
        other => Failure::usage(other.to_string()),
    }
}
