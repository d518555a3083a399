//! The executable specification of Mixture-of-Experts routing: scores to assignments, weights, balance losses, statistics.
//!
//! Plain Rust on slices: no Burn, no unsafe, no threads, no global state. Training, evaluation, serving and `mixtura route`
//! call the same functions, so what a test proves here holds for every one of them.
//!
//! ```text
//! logits_te -> activation -> probs_te -> policy -> Choices -> capacity -> Assignment -> weight_n
//!                                 \____________________________\________-> losses, stats
//! ```
//!
//! Three zones. What a step runs: [`route`](route()) and what it calls, [`losses`], [`stats`], [`soft`]. What names mean: [`catalogue`].
//! What judges the others and runs in no step: [`mod@reference`], with the golden vectors. A module uses those that stand above it
//! in this file and no others, which a test holds (`tests/zones.rs`).
//!
//! Axes: `t` tokens, `e` experts, `k` choices per token, `n` rows, that is kept (token, choice) pairs sorted by (expert, token),
//! `d` model width. `probs_te` is row-major `[T, E]`. Generic code runs in `f32` (training) and `f64` (reference).
//!
//! ```
//! use mixtura_routing::{RouteShape, RouterConfig, RouterInput, StepContext, route};
//!
//! let logits = [2.0f32, 1.0, 0.0, -1.0, 1.5, 1.4, -0.5, 0.2]; // two tokens, four experts
//! let shape = RouteShape { tokens: 2, experts: 4, top_k: 2 };
//! let routed = route(&RouterInput::new(&logits), shape, &RouterConfig::default(), &StepContext::evaluation()).unwrap();
//! assert_eq!(routed.choices.experts, [0, 1, 0, 1]);
//! assert_eq!(routed.assignment.token_of_row, [0, 1, 0, 1]); // expert 0's rows, then expert 1's
//! ```
#![forbid(unsafe_code)]

// What everything stands on.
pub mod error;
pub mod rng;
pub mod names;
pub mod select;
pub mod real;
pub mod activation;

// A token's way.
pub mod scorers;
pub mod config;
pub mod assignment;
mod input;
pub mod capacity;
pub mod policy;
pub mod stats;
pub mod route;
pub mod losses;

// Layers that are more than a selection.
pub mod soft;
pub mod zero_cost;
pub mod residual;

// What names mean, for configuration files and for `mixtura route`.
pub mod catalogue;

// Judges the others; nothing above uses it.
pub mod reference;

pub use assignment::{Assignment, Choices, DroppedPair};
pub use catalogue::recipe::Recipe;
pub use config::{
    Activation, BalanceConfig, BalanceLoss, BalanceScope, DropOrder, GivenBalance, GivenRouter, HashTable, Noise,
    Normalize, Policy, ReluControl, RouterConfig, Scorer, SecondChoice, ZeroComputation, ZeroCost,
};
pub use error::RoutingError;
pub use losses::{Auxiliary, AuxiliaryOptions, ReluController, auxiliary};
pub use real::Real;
pub use rng::{Purpose, StepContext, Stream};
pub use route::{RouteShape, Routed, RouterInput, route, route_choices};
pub use stats::RoutingStats;
