//! How many slots an expert has, and which pairs get one.
//!
//! Capacity is a policy: it decides which pairs are dropped and leaves no trace in any layout. The size is computed in
//! exact integers, because `ceil` of a rounded product is off by one near whole numbers.

use crate::assignment::{Choices, NO_SLOT};
use crate::config::{DropOrder, RouterConfig, ZeroComputation};
use crate::error::RoutingError;

/// A non-negative decimal as an exact fraction: 1.25 is 125/100, not its binary neighbour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fraction {
    /// Numerator.
    pub numerator: u128,
    /// Denominator, a power of ten.
    pub denominator: u128,
}

impl Fraction {
    /// The shortest decimal that reads back as `value`; at most 15 digits after the point are kept, so that
    /// products with any token count stay far below 2^128.
    pub fn from_decimal(value: f64) -> Option<Self> {
        if !value.is_finite() || !(0.0..1e6).contains(&value) {
            return None;
        }
        let text = format!("{value}");
        let (whole, digits) = text.split_once('.').unwrap_or((&text, ""));
        let digits = &digits[..digits.len().min(15)];
        let denominator = 10u128.pow(digits.len() as u32);
        let whole: u128 = whole.parse().ok()?;
        let part: u128 = if digits.is_empty() { 0 } else { digits.parse().ok()? };
        Some(Self { numerator: whole * denominator + part, denominator })
    }

    /// `ceil(self * n / d)`, exactly.
    pub fn ceil_mul_div(self, n: u128, d: u128) -> u128 {
        (self.numerator * n).div_ceil(self.denominator * d)
    }

    /// `floor(self * n / d)`, exactly.
    pub fn floor_mul_div(self, n: u128, d: u128) -> u128 {
        self.numerator * n / (self.denominator * d)
    }

    /// `self * n / d` to the nearest whole number, halves to even.
    pub fn round_mul_div(self, n: u128, d: u128) -> u128 {
        let (above, below) = (self.numerator * n, self.denominator * d);
        let (whole, rest) = (above / below, above % below);
        match (rest * 2).cmp(&below) {
            std::cmp::Ordering::Less => whole,
            std::cmp::Ordering::Greater => whole + 1,
            std::cmp::Ordering::Equal => whole + whole % 2,
        }
    }
}

/// `max(min(ceil(factor k T / E), T), minimum)`, rounded up to `multiple`; `None` when the factor is 0, that is unlimited.
pub fn slots_per_expert(
    config: &RouterConfig,
    training: bool,
    tokens: usize,
    experts: usize,
    top_k: usize,
) -> Result<Option<usize>, RoutingError> {
    let factor = if training { config.capacity_factor } else { config.eval_capacity_factor };
    if factor == 0.0 || tokens == 0 {
        return Ok(None);
    }
    let exact = Fraction::from_decimal(factor).ok_or(RoutingError::Config {
        key: "capacity_factor",
        value: factor.to_string(),
        reason: "a finite number between 0 and 1e6".to_string(),
    })?;
    let share = exact.ceil_mul_div((tokens * top_k) as u128, experts as u128).min(tokens as u128) as usize;
    let slots = share.max(config.capacity_min).next_multiple_of(config.capacity_multiple.max(1));
    if slots == 0 {
        return Err(RoutingError::ZeroCapacity { factor, top_k, tokens, experts, minimum: config.capacity_min });
    }
    Ok(Some(slots))
}

impl ZeroComputation {
    /// Slots of every expert in training, `[E]`; `None` when `gamma` is 0, that is unlimited.
    ///
    /// [`zero_cost_shares`] of the `k T` selections (the paper writes T, of which k fold would not fit), rounded up exactly, at most T
    /// and at least `minimum`. With `tau` 1 that is the capacity of equal experts with factor `gamma`.
    pub fn slots(&self, tokens: usize, experts: usize, top_k: usize, minimum: usize) -> Option<Vec<usize>> {
        let (gamma, tau) = (Fraction::from_decimal(self.gamma)?, Fraction::from_decimal(self.tau)?);
        if gamma.numerator == 0 || tokens == 0 {
            return None;
        }
        let networks = self.networks(experts);
        let below = gamma.denominator.checked_mul(
            tau.numerator.checked_mul(networks as u128)? + tau.denominator.checked_mul(self.experts() as u128)?,
        );
        let slots = |weight: u128| {
            let above = gamma.numerator.checked_mul(weight)?.checked_mul((tokens * top_k) as u128)?;
            Some(above.div_ceil(below?).min(tokens as u128) as usize)
        };
        // Decimals too long for exact integers: no file has them.
        let (wide, narrow) =
            zero_cost_shares((tokens * top_k) as f64, networks as f64, self.experts() as f64, self.tau, self.gamma);
        let wide = slots(tau.numerator).unwrap_or(wide.ceil() as usize).max(minimum).max(1);
        let narrow = slots(tau.denominator).unwrap_or(narrow.ceil() as usize).max(minimum).max(1);
        Some((0..experts).map(|e| if e < networks { wide } else { narrow }).collect())
    }
}

/// Slots per FFN expert and per zero-cost expert, before rounding: `gamma tau T / (tau N_ffn + N_zc)` and `gamma T / (...)`.
pub fn zero_cost_shares(tokens: f64, ffn: f64, zero_cost: f64, tau: f64, gamma: f64) -> (f64, f64) {
    let share = gamma * tokens / (tau * ffn + zero_cost);
    (tau * share, share)
}

/// The slot of every pair at its expert when slots are given choice-major, or else token-major; [`NO_SLOT`] from `capacity` on.
pub fn slots_by_position(choices: &Choices, experts: usize, capacity: usize, order: DropOrder) -> Vec<u32> {
    slots_by_position_each(choices, &vec![capacity; experts], order)
}

/// The same when experts differ in their number of slots, `[E]`.
pub fn slots_by_position_each(choices: &Choices, capacity_e: &[usize], order: DropOrder) -> Vec<u32> {
    let mut next = vec![0u32; capacity_e.len()];
    let mut slots = vec![NO_SLOT; choices.experts.len()];
    let mut take = |pair: usize| {
        let expert = choices.experts[pair] as usize;
        let seen = &mut next[expert];
        if (*seen as usize) < capacity_e[expert] {
            slots[pair] = *seen;
            *seen += 1;
        }
    };
    if order == DropOrder::ChoiceMajor {
        for choice in 0..choices.most_per_token() {
            for token in 0..choices.tokens() {
                if choice < choices.of_token(token).len() {
                    take(choices.token_offsets[token] as usize + choice);
                }
            }
        }
    } else {
        (0..choices.experts.len()).for_each(take);
    }
    slots
}

/// A library's capacity: from (S tokens, E experts, capacity factor, k) to slots.
pub type LibraryFormula = fn(u128, u128, Fraction, u128) -> u128;

/// What other implementations compute for the same four numbers, in exact arithmetic.
///
/// They disagree on whether k is a factor, on rounding and on the minimum; DeepSpeed evaluates its own in f32.
pub const LIBRARY_FORMULAS: &[(&str, LibraryFormula)] = &[
    ("mesh_tf(max(min(S,floor(S*cf/E)),4))", mesh),
    ("deepspeed(max(ceil(S/E*cf*k),4))", |s, e, cf, k| cf.ceil_mul_div(s * k, e).max(4)),
    ("tutel(k*floor(cf*ceil(S/E)))", |s, e, cf, k| k * cf.floor_mul_div(s.div_ceil(e), 1)),
    ("torchscale_top1_train(floor(cf*ceil(S/E)))", |s, e, cf, _| cf.floor_mul_div(s.div_ceil(e), 1)),
    ("vmoe(up4(ceil(S*k*cf/E)))", |s, e, cf, k| cf.ceil_mul_div(s * k, e).next_multiple_of(4)),
    ("vmoe_paper(round(S*k*cf/E))", |s, e, cf, k| cf.round_mul_div(s * k, e)),
    ("flaxformer(max(round_half_even(cf*S/E),4))", |s, e, cf, _| cf.round_mul_div(s, e).max(4)),
    ("lingvo(up4(floor(S*cf/E) or 4))", |s, e, cf, _| match cf.floor_mul_div(s, e) {
        0 => 4,
        slots => slots.next_multiple_of(4),
    }),
    ("megablocks(floor(cf*k*S/E))", |s, e, cf, k| cf.floor_mul_div(s * k, e)),
    ("megatron(ceil(S*k/E*cf))", |s, e, cf, k| cf.ceil_mul_div(s * k, e)),
    ("fastmoe_gshard(floor(ceil(cf*S)*k/E))", |s, e, cf, k| cf.ceil_mul_div(s, 1) * k / e),
    ("lucidrains_st(max(min(S,floor(S*cf/E)),4))", mesh),
];

fn mesh(s: u128, e: u128, cf: Fraction, _: u128) -> u128 {
    cf.floor_mul_div(s, e).min(s).max(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacity_is_exact_where_binary_fractions_are_not() {
        // 1.1 is stored as 1.100000000000000088..: a product in doubles rounds 1.1 * 10 up to 11.000000000000002.
        let config = RouterConfig { capacity_factor: 1.1, capacity_min: 1, ..RouterConfig::default() };
        assert_eq!(slots_per_expert(&config, true, 100, 10, 1), Ok(Some(11)));
        assert_eq!((1.1f64 * 10.0).ceil(), 11.0);
        let third = RouterConfig { capacity_factor: 0.07, capacity_min: 1, ..config.clone() };
        assert_eq!(slots_per_expert(&third, true, 1000, 10, 1), Ok(Some(7)));
        assert_eq!((0.07f64 * 100.0).ceil(), 8.0, "what a computation in doubles would give");
        assert_eq!(slots_per_expert(&config, false, 100, 10, 1), Ok(None));
    }

    #[test]
    fn capacity_keeps_to_its_bounds() {
        let config = RouterConfig { capacity_factor: 50.0, capacity_min: 4, ..RouterConfig::default() };
        assert_eq!(slots_per_expert(&config, true, 10, 4, 2), Ok(Some(10)), "never more than the tokens");
        let tiny = RouterConfig { capacity_factor: 1e-9, capacity_min: 0, ..RouterConfig::default() };
        assert_eq!(slots_per_expert(&tiny, true, 10, 4, 2), Ok(Some(1)));
        let aligned = RouterConfig { capacity_factor: 1.0, capacity_min: 1, capacity_multiple: 8, ..tiny };
        assert_eq!(slots_per_expert(&aligned, true, 20, 4, 2), Ok(Some(16)));
    }
}
