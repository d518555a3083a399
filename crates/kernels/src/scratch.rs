//! Buffers that outlive a call: taken from a pool, handed back when dropped, never zeroed.
//!
//! A fresh allocation of a few MiB per call costs more in page faults than the kernels that fill it.

use crate::aligned::AlignedVec;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// Buffers kept when nobody uses them.
const KEPT: usize = 32;

static POOL: Mutex<Vec<AlignedVec<f32>>> = Mutex::new(Vec::new());

/// A slice of f32 of unspecified content, 64-byte aligned.
pub(crate) struct Scratch(AlignedVec<f32>);

impl Scratch {
    /// `len` values of unspecified content.
    pub(crate) fn take(len: usize) -> Scratch {
        let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest buffer that is large enough; without one, the largest grows.
        let fits = |buffer: &AlignedVec<f32>| buffer.bytes() >= len * size_of::<f32>();
        let best = (0..pool.len())
            .min_by_key(|&i| if fits(&pool[i]) { (0, pool[i].bytes()) } else { (1, usize::MAX - pool[i].bytes()) });
        let mut buffer = best.map_or_else(AlignedVec::new, |i| pool.swap_remove(i));
        drop(pool);
        buffer.resize_for_overwrite(len);
        Scratch(buffer)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.len() < KEPT {
            pool.push(std::mem::replace(&mut self.0, AlignedVec::new()));
        }
    }
}

impl Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}
