//! The sizes that a configuration may ask for.

use crate::error::ConfigError;

/// No width, head or expert count of a real model comes near; the product of two of them is far from overflowing.
pub(super) const LARGEST_SIZE: usize = 1 << 24;

/// Refuses a size outside `least..=most`.
pub(super) fn size(key: &str, value: usize, least: usize, most: usize) -> Result<(), ConfigError> {
    match (least..=most).contains(&value) {
        true => Ok(()),
        false if value < least => Err(ConfigError::new(key, value, format!("at least {least}"))),
        false => Err(ConfigError::new(key, value, format!("at most {most}"))),
    }
}
