//! The learning rate of a step: a linear warm-up, then a cosine or a plateau with a decay at the end.
//!
//! With `w` warm-up steps, `n` steps in all and `f` the final share of the peak:
//!
//! - warm-up, step `s < w`: `peak * (s + 1) / w`;
//! - `cosine`: `peak * (f + (1 - f) * (1 + cos(pi * (s - w) / (n - w))) / 2)`;
//! - `wsd` (warm-up, stable, decay): `peak`, then over the last `decay * n` steps linearly down to `f * peak`;
//! - `constant`: `peak`.
//!
//! Steps count from 0. The rate is a function of the step alone, so a resumed run has the rate it would have had.

use serde::{Deserialize, Serialize};

use crate::error::ConfigError;

/// What the rate does after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleKind {
    /// Half a cosine from the peak to the final share.
    Cosine,
    /// Warm-up, stable, decay: the peak until the last part, then a straight line down.
    Wsd,
    /// The peak, always.
    Constant,
}

/// `[schedule]` of the config file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScheduleConfig {
    /// The shape after the warm-up.
    pub kind: ScheduleKind,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// The last step's rate as a share of the peak.
    pub final_share: f64,
    /// `wsd` only: the share of all steps over which the rate falls.
    pub decay: f64,
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self { kind: ScheduleKind::Cosine, warmup: 50, final_share: 0.1, decay: 0.2 }
    }
}

impl ScheduleConfig {
    /// The factor on the peak rate at `step` of `steps`.
    pub fn factor(&self, step: u64, steps: u64) -> f64 {
        if step < self.warmup {
            return (step + 1) as f64 / self.warmup as f64;
        }
        match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Cosine => {
                let length = steps.saturating_sub(self.warmup).max(1) as f64;
                let progress = ((step - self.warmup) as f64 / length).min(1.0);
                self.final_share + (1.0 - self.final_share) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
            }
            ScheduleKind::Wsd => {
                let decay_steps = (self.decay * steps as f64).max(1.0);
                let left = (steps as f64 - step as f64).max(0.0);
                let share = (left / decay_steps).min(1.0);
                self.final_share + (1.0 - self.final_share) * share
            }
        }
    }

    /// Refuses shares outside `[0, 1]`. A warm-up longer than the run is allowed: short trials keep the config's warm-up.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (key, value) in [("schedule.final_share", self.final_share), ("schedule.decay", self.decay)] {
            if !(0.0..=1.0).contains(&value) {
                return Err(ConfigError::new(key, format!("expected a share between 0 and 1, found {value}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(kind: ScheduleKind, expected: &[(u64, f64)]) {
        let schedule = ScheduleConfig { kind, warmup: 10, final_share: 0.1, decay: 0.2 };
        for &(step, factor) in expected {
            let found = schedule.factor(step, 110);
            assert!((found - factor).abs() < 1e-12, "{kind:?} step {step}: expected {factor}, found {found}");
        }
    }

    #[test]
    fn the_cosine_passes_through_its_half() {
        check(ScheduleKind::Cosine, &[(0, 0.1), (9, 1.0), (10, 1.0), (60, 0.55), (110, 0.1)]);
    }

    #[test]
    fn the_plateau_holds_until_the_last_fifth() {
        check(ScheduleKind::Wsd, &[(4, 0.5), (10, 1.0), (88, 1.0), (99, 0.55), (110, 0.1)]);
    }

    #[test]
    fn a_share_above_one_is_refused() {
        let schedule = ScheduleConfig { decay: 1.5, ..ScheduleConfig::default() };
        assert!(schedule.validate().unwrap_err().to_string().contains("schedule.decay"));
    }
}
