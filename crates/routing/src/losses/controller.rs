//! ReMoE's controller (Wang et al. 2024, section 3.3): after every optimizer step the coefficient of the L1 penalty is multiplied
//! or divided by `alpha`, so that a share `1 - k/E` of all gates becomes zero.
//!
//! It starts near 0: training begins almost dense, and sparsity comes by itself. The state is one number, which belongs into
//! a checkpoint.

use crate::config::ReluControl;
use crate::real::Real;
use crate::route::Routed;
use std::cmp::Ordering;

/// The controller's state during a run.
///
/// ```
/// use mixtura_routing::{ReluControl, ReluController};
/// let mut controller = ReluController::new(ReluControl::default());
/// controller.count(30, 8, 4, 1); // 8 tokens, 4 experts: 24 zeros wanted, 30 found
/// assert_eq!(controller.update(), 1e-8 / 1.2);
/// assert_eq!(controller.update(), 1e-8 / 1.2, "nothing was counted since");
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReluController {
    /// The coefficient to use now.
    pub lambda: f64,
    alpha: f64,
    /// Gates that were zero since the last update, and how many should have been.
    zeros: u64,
    wanted: u64,
}

impl ReluController {
    /// At its start. For a run that goes on, set [`lambda`](Self::lambda) to the saved value.
    pub fn new(control: ReluControl) -> Self {
        Self { lambda: control.start, alpha: control.alpha, zeros: 0, wanted: 0 }
    }

    /// Counts the zero gates of one layer and micro-batch.
    pub fn add<S: Real>(&mut self, routed: &Routed<S>) {
        let shape = routed.shape;
        let gates = (shape.tokens * shape.experts) as u64;
        self.count(gates - routed.choices.pairs() as u64, shape.tokens as u64, shape.experts, shape.top_k);
    }

    /// Counts `zeros` zero gates among those of `tokens` tokens and `experts` experts, of which `top_k` should be positive.
    pub fn count(&mut self, zeros: u64, tokens: u64, experts: usize, top_k: usize) {
        self.zeros += zeros;
        self.wanted += tokens * experts.saturating_sub(top_k) as u64;
    }

    /// After an optimizer step: the next coefficient. At the target it stays (the released code divides there).
    pub fn update(&mut self) -> f64 {
        self.lambda = steered(self.lambda, self.alpha, self.wanted.cmp(&self.zeros));
        (self.zeros, self.wanted) = (0, 0);
        self.lambda
    }
}

/// The coefficient after a step in which a fraction `sparsity` of all gates was zero: [`ReluController::update`] on fractions
/// instead of counts.
pub fn relu_controller(lambda: f64, alpha: f64, sparsity: f64, experts: usize, top_k: usize) -> f64 {
    let wanted = 1.0 - top_k as f64 / experts.max(1) as f64;
    steered(lambda, alpha, wanted.total_cmp(&sparsity))
}

/// Up while more zeros are wanted than were found, down in the other case.
fn steered(lambda: f64, alpha: f64, wanted_to_found: Ordering) -> f64 {
    match wanted_to_found {
        Ordering::Greater => lambda * alpha,
        Ordering::Less => lambda / alpha,
        Ordering::Equal => lambda,
    }
}
