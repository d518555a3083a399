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

use mixtura_ops::Isa;

use crate::cli::ThreadArgs;
use crate::failure::Failure;

/// More than this are refused, unless there are that many cores.
const MOST_THREADS: usize = 512;

/// Settles what everything that computes depends on: the instruction set can be used, and there are as many threads as asked
/// for. Returns the number of threads.
pub fn prepare(args: &ThreadArgs) -> Result<usize, Failure> {
    Isa::try_current().map_err(|e| Failure::usage(e.to_string()))?;
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

/// A forward pass refuses ids and lengths that the person gave; anything else failed while running.
pub fn forward_failure(error: mixtura_nn::ForwardError) -> Failure {
    match error {
        mixtura_nn::ForwardError::Routing { .. } => Failure::running(error.to_string()),
        other => Failure::usage(other.to_string()),
    }
}
