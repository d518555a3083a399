//! One file per command: `run(args, output)` does it and prints its result.

pub mod train;
pub mod eval;
pub mod generate;
pub mod logits;
pub mod inspect;
pub mod route;
pub mod bench;
pub mod doctor;
pub mod completions;

use crate::cli::ThreadArgs;
use crate::failure::Failure;

/// Sets the number of threads of everything that runs in parallel; returns it.
pub fn use_threads(args: &ThreadArgs) -> Result<usize, Failure> {
    if args.threads == Some(0) {
        return Err(Failure::usage("--threads 0: expected at least 1"));
    }
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build_global()
            .map_err(|e| Failure::running(format!("cannot start {threads} threads: {e}")))?;
    }
    Ok(rayon::current_num_threads())
}

/// A forward pass refuses ids and lengths that the person gave; anything else failed while running.
pub fn forward_failure(error: mixtura_nn::ForwardError) -> Failure {
    match error {
        mixtura_nn::ForwardError::Routing { .. } => Failure::running(error.to_string()),
        other => Failure::usage(other.to_string()),
    }
}
