//! One file per command: `run(args, output)` does it and prints its result.

pub mod train;
pub mod eval;
pub mod generate;
pub mod tokenize;
pub mod logits;
pub mod inspect;
pub mod route;
pub mod bench;
pub mod doctor;
pub mod completions;

use std::io::Read;
use std::path::Path;

use mixtura_kernels::ways;
use mixtura_ops::Isa;

use crate::cli::ThreadArgs;
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

/// A forward pass refuses ids and lengths that the person gave; anything else failed while running.
pub fn forward_failure(error: mixtura_nn::ForwardError) -> Failure {
    match error {
        mixtura_nn::ForwardError::Routing { .. } => Failure::running(error.to_string()),
        other => Failure::usage(other.to_string()),
    }
}
