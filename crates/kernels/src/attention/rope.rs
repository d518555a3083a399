//! Rotary tables: cos and sin of `position * theta^(-2i/P)`.
//!
//! Angles are rounded to f32 where the published models round them (exponent, power, inverse, product), because at long positions that
//! rounding, not the sine, decides the last digits of a logit. Tables are pure functions of (theta, P), so they are kept for the life
//! of the process and grow to the longest position seen.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// cos and sin, [positions, P/2] each.
#[derive(Debug)]
pub(super) struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// The table for `head_dim` and `theta`, at least `positions` long.
    pub(super) fn get(theta: f64, head_dim: usize, positions: usize) -> Arc<RopeTable> {
        type Tables = BTreeMap<(u64, usize), Arc<RopeTable>>;
        static TABLES: Mutex<Option<Tables>> = Mutex::new(None);
        let mut tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
        let table = tables
            .get_or_insert_default()
            .entry((theta.to_bits(), head_dim))
            .or_insert_with(|| Arc::new(RopeTable { half: head_dim / 2, cos: Vec::new(), sin: Vec::new() }));
        if table.positions() < positions {
            *table = Arc::new(RopeTable::new(theta, head_dim, positions.next_power_of_two()));
        }
        Arc::clone(table)
    }

    fn new(theta: f64, head_dim: usize, positions: usize) -> RopeTable {
        let half = head_dim / 2;
        let frequencies: Vec<f32> =
            (0..half).map(|i| 1.0 / theta.powf(f64::from((2 * i) as f32 / head_dim as f32)) as f32).collect();
        let mut table =
            RopeTable { half, cos: Vec::with_capacity(positions * half), sin: Vec::with_capacity(positions * half) };
        for position in 0..positions {
            for &frequency in &frequencies {
                let angle = f64::from(position as f32 * frequency);
                table.cos.push(angle.cos() as f32);
                table.sin.push(angle.sin() as f32);
            }
        }
        table
    }

    fn positions(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(usize::MAX)
    }

    /// cos and sin of one position, P/2 values each.
    #[inline(always)]
    pub(super) fn row(&self, position: usize) -> (&[f32], &[f32]) {
        let at = position * self.half..(position + 1) * self.half;
        (&self.cos[at.clone()], &self.sin[at])
    }
}
