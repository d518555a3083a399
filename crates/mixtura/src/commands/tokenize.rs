//! `mixtura tokenize`: text files and JSON lines to one token shard, with a receipt.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mixtura_data::Tokenizer;
use mixtura_data::corpus::{TokenWidth, Tokenized, tokenize_files};
use mixtura_train::interrupt::Interrupt;
use mixtura_train::table::{duration, grouped};
use serde::Serialize;

use crate::cli::TokenizeArgs;
use crate::commands::prepare;
use crate::failure::Failure;
use crate::model_dir::resolve;
use crate::output::Output;

/// Time between two lines of progress.
const LINE_EVERY: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Receipt {
    out: PathBuf,
    documents: u64,
    tokens: u64,
    /// Bytes of input.
    bytes: u64,
    vocab: usize,
    bytes_per_token: usize,
    /// Fingerprint of the tokenizer, which the shard remembers.
    tokenizer: String,
    seconds: f64,
}

/// Tokenizes.
pub fn run(args: &TokenizeArgs, output: &Output) -> Result<(), Failure> {
    prepare(&args.threads)?;
    let tokenizer = tokenizer(&args.tokenizer, output)?;
    check_paths(args)?;
    if !tokenizer.cuts() && args.files.iter().any(|file| file.metadata().is_ok_and(|data| data.len() > 64 << 20)) {
        output.note(
            "this tokenizer looks at a text as a whole: each file is held in memory, some hundred bytes per character",
        );
    }
    let interrupt = Interrupt::on_signals().map_err(|e| Failure::running(format!("cannot listen for signals: {e}")))?;
    let started = Instant::now();
    let mut last_line = Instant::now();
    let all: u64 = args.files.iter().filter_map(|file| file.metadata().ok()).map(|data| data.len()).sum();
    let made = tokenize_files(&args.files, &args.text_field, &tokenizer, &args.out, |file, so_far| {
        if last_line.elapsed() >= LINE_EVERY {
            last_line = Instant::now();
            output.note(&progress(file, so_far, all, started.elapsed()));
        }
        !interrupt.requested()
    })?;
    let Some(made) = made else {
        output.note("interrupted, nothing was written");
        return Err(Failure::silent(130));
    };
    let vocab = tokenizer.vocab_size();
    let receipt = Receipt {
        out: args.out.clone(),
        documents: made.documents,
        tokens: made.tokens,
        bytes: made.bytes,
        vocab,
        bytes_per_token: TokenWidth::for_vocab(vocab).bytes(),
        tokenizer: tokenizer.fingerprint().iter().map(|byte| format!("{byte:02x}")).collect(),
        seconds: started.elapsed().as_secs_f64(),
    };
    Ok(output.result(&receipt, || text(&receipt))?)
}

/// A name, a file, or a directory with a `tokenizer.json` in it.
fn tokenizer(choice: &str, output: &Output) -> Result<Tokenizer, Failure> {
    match choice {
        "byte" | "bytes" => return Ok(Tokenizer::byte()),
        "propositions" => return Ok(Tokenizer::propositions()),
        _ => {}
    }
    let path = Path::new(choice);
    if !path.exists() {
        let known = "expected byte, propositions, a tokenizer.json, or a directory that holds one";
        return Err(Failure::usage(format!("--tokenizer {choice}: there is no such file; {known}")));
    }
    let file = match path.is_dir() {
        true if path.join("tokenizer.json").exists() => path.join("tokenizer.json"),
        true => resolve(path, output)?.join("tokenizer.json"),
        false => path.to_path_buf(),
    };
    Ok(Tokenizer::from_file(&file)?)
}

/// What can be refused before anything is read.
fn check_paths(args: &TokenizeArgs) -> Result<(), Failure> {
    let out = args.out.display();
    if args.out.is_dir() {
        return Err(Failure::usage(format!("--out {out}: this is a directory; a file was expected")));
    }
    let parent = args.out.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(parent) = parent.filter(|parent| !parent.is_dir()) {
        return Err(Failure::usage(format!("--out {out}: the directory {} does not exist", parent.display())));
    }
    for file in &args.files {
        if !file.exists() {
            return Err(Failure::usage(format!("{}: there is no such file", file.display())));
        }
        if file.is_dir() {
            return Err(Failure::usage(format!("{}: this is a directory; name its files", file.display())));
        }
        let same = file.canonicalize().ok().zip(args.out.canonicalize().ok()).is_some_and(|(a, b)| a == b);
        if same {
            return Err(Failure::usage(format!("--out {out}: this is one of the files to read")));
        }
    }
    Ok(())
}

fn progress(file: &Path, so_far: &Tokenized, all: u64, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    let left = seconds / so_far.bytes.max(1) as f64 * all.saturating_sub(so_far.bytes) as f64;
    format!(
        "{}: {} of {} MiB, {} tokens, {} tokens/s, {} left",
        file.display(),
        so_far.bytes >> 20,
        all >> 20,
        grouped(so_far.tokens),
        grouped((so_far.tokens as f64 / seconds) as u64),
        duration(left)
    )
}

fn text(receipt: &Receipt) -> String {
    format!(
        "{}: {} tokens of {} documents, {} bytes each, from {} bytes of input\nvocabulary {}, tokenizer {}\n",
        receipt.out.display(),
        grouped(receipt.tokens),
        grouped(receipt.documents),
        receipt.bytes_per_token,
        grouped(receipt.bytes),
        grouped(receipt.vocab as u64),
        &receipt.tokenizer[..16],
    )
}
