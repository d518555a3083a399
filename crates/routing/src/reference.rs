//! What judges the rest of this crate and runs in no training step: plain-loop layers, exact derivatives, bounds of a loss, trials of
//! causality, and golden vectors, which recompute published numbers with all of it. Nothing outside this zone uses it.

pub mod combine;
pub mod dual_numbers;
pub mod balance_bounds;
pub mod causality;
pub mod propositions;
pub mod dispersion;
// Waits for the crate that prunes and merges checkpoints; until then the golden vectors alone use it.
#[doc(hidden)]
pub mod compress;
pub mod golden;
