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

use mixtura_kernels::ways;
use mixtura_ops::Isa;

use crate::cli::ThreadArgs;
use crate::failure::Failure;

/// Settles what everything that computes depends on: the instruction set and the way asked for can be used, and there are as many threads as asked
/// for. Returns the number of threads.
pub fn prepare(args: &ThreadArgs) -> Result<usize, Failure> {
    Isa::try_current().map_err(|e| Failure::usage(e.to_string()))?;
    ways::forced().map_err(|e| Failure::usage(e.to_string()))?;
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
