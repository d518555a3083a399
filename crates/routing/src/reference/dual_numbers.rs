//! Dual numbers: a value and its derivative in one direction, carried through any function generic over [`Real`].
//!
//! Running a reference on duals gives its exact derivative without a hand-written backward pass; selections compare values
//! only, so what routing treats as constant is constant here too. Used to check gradients and to state those of soft routers.

use crate::real::Real;
use crate::select::Score;
use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, DivAssign, Mul, MulAssign, Neg, Sub, SubAssign};

/// `value + derivative * epsilon` with `epsilon^2 = 0`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Dual {
    /// The value.
    pub value: f64,
    /// The derivative in the chosen direction.
    pub derivative: f64,
}

impl Dual {
    /// A constant.
    pub const fn constant(value: f64) -> Self {
        Self { value, derivative: 0.0 }
    }

    /// The variable itself.
    pub const fn variable(value: f64) -> Self {
        Self { value, derivative: 1.0 }
    }

    fn map(self, value: f64, slope: f64) -> Self {
        Self { value, derivative: slope * self.derivative }
    }
}

/// Gradient of `f` at `point`: one evaluation per coordinate.
pub fn gradient(point: &[f64], f: impl Fn(&[Dual]) -> Dual) -> Vec<f64> {
    let mut duals: Vec<Dual> = point.iter().map(|&v| Dual::constant(v)).collect();
    let mut gradient = Vec::with_capacity(point.len());
    for i in 0..point.len() {
        duals[i].derivative = 1.0;
        gradient.push(f(&duals).derivative);
        duals[i].derivative = 0.0;
    }
    gradient
}

impl fmt::Display for Dual {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} + {} eps", self.value, self.derivative)
    }
}

impl PartialOrd for Dual {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        self.value.partial_cmp(&other.value)
    }
}

impl Add for Dual {
    type Output = Self;
    fn add(self, o: Self) -> Self {
        Self { value: self.value + o.value, derivative: self.derivative + o.derivative }
    }
}

impl Sub for Dual {
    type Output = Self;
    fn sub(self, o: Self) -> Self {
        Self { value: self.value - o.value, derivative: self.derivative - o.derivative }
    }
}

impl Mul for Dual {
    type Output = Self;
    fn mul(self, o: Self) -> Self {
        Self { value: self.value * o.value, derivative: self.derivative * o.value + self.value * o.derivative }
    }
}

impl Div for Dual {
    type Output = Self;
    fn div(self, o: Self) -> Self {
        let value = self.value / o.value;
        Self { value, derivative: (self.derivative - value * o.derivative) / o.value }
    }
}

impl Neg for Dual {
    type Output = Self;
    fn neg(self) -> Self {
        Self { value: -self.value, derivative: -self.derivative }
    }
}

impl AddAssign for Dual {
    fn add_assign(&mut self, o: Self) {
        *self = *self + o;
    }
}

impl SubAssign for Dual {
    fn sub_assign(&mut self, o: Self) {
        *self = *self - o;
    }
}

impl MulAssign for Dual {
    fn mul_assign(&mut self, o: Self) {
        *self = *self * o;
    }
}

impl DivAssign for Dual {
    fn div_assign(&mut self, o: Self) {
        *self = *self / o;
    }
}

impl Sum for Dual {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::default(), Add::add)
    }
}

impl Score for Dual {}

impl Real for Dual {
    const ZERO: Self = Self::constant(0.0);
    const ONE: Self = Self::constant(1.0);
    const NEG_INFINITY: Self = Self::constant(f64::NEG_INFINITY);
    fn of(value: f64) -> Self {
        Self::constant(value)
    }
    fn f64(self) -> f64 {
        self.value
    }
    fn exp(self) -> Self {
        let e = self.value.exp();
        self.map(e, e)
    }
    fn ln(self) -> Self {
        self.map(self.value.ln(), 1.0 / self.value)
    }
    fn ln_1p(self) -> Self {
        self.map(self.value.ln_1p(), 1.0 / (1.0 + self.value))
    }
    fn sqrt(self) -> Self {
        let root = self.value.sqrt();
        self.map(root, 0.5 / root)
    }
    fn is_finite(self) -> bool {
        self.value.is_finite() && self.derivative.is_finite()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derivatives_follow_the_rules() {
        let f = |v: &[Dual]| (v[0] * v[1]).exp() / (v[0] + v[1].sqrt()) - v[0].ln();
        let point = [0.7, 1.3];
        let exact = gradient(&point, f);
        for i in 0..2 {
            let at = |h: f64| {
                let mut moved = point.map(Dual::constant);
                moved[i].value += h;
                f(&moved).value
            };
            assert!((exact[i] - (at(1e-6) - at(-1e-6)) / 2e-6).abs() < 1e-8);
        }
    }
}
