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

pub mod error;
pub mod real;
pub mod rng;
pub mod config;
pub mod activation;
pub mod select;
pub mod capacity;
pub mod assignment;
pub mod scorers;
pub mod policy;
pub mod route;
pub mod losses;
pub mod stats;
pub mod probe;
pub mod layer;
pub mod soft;
pub mod zero_cost;
pub mod heterogeneous;
pub mod residual;
pub mod compress;
pub mod theory;
pub mod dictionary;
pub mod sampler;
pub mod logic;
pub mod dual;
pub mod recipe;
pub mod causality;
pub mod explain;
pub mod golden;

pub use assignment::{Assignment, Choices, DroppedPair};
pub use config::{
    Activation, BalanceConfig, BalanceLoss, BalanceScope, DropOrder, GivenBalance, GivenRouter, HashTable, Noise,
    Normalize, Policy, RouterConfig, Scorer, SecondChoice,
};
pub use error::RoutingError;
pub use losses::{Auxiliary, AuxiliaryOptions, ReluControl, ReluController, auxiliary};
pub use real::Real;
pub use recipe::Recipe;
pub use rng::{Purpose, StepContext, Stream};
pub use route::{RouteShape, Routed, RouterInput, route, route_choices};
pub use stats::RoutingStats;
