//! Buffers that outlive a call: taken from the thread's pool, handed back when dropped, never zeroed.
//!
//! A fresh allocation of a few MiB per call costs more in page faults than the kernels that fill it; a pool per thread keeps a buffer
//! in the cache of the core that used it last. How this pool differs from the other two: see `workspace`.

use crate::aligned::AlignedVec;
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Buffers kept per thread when nobody uses them.
const KEPT: usize = 16;

thread_local! {
    static POOL: RefCell<Vec<AlignedVec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// A slice of f32 of unspecified content, 64-byte aligned.
pub(crate) struct Scratch(AlignedVec<f32>);

impl Scratch {
    /// `len` values of unspecified content.
    pub(crate) fn take(len: usize) -> Scratch {
        // The smallest buffer that is large enough; without one, the largest grows.
        let mut buffer = POOL.with_borrow_mut(|pool| {
            let rank = |buffer: &AlignedVec<f32>| match buffer.bytes() {
                bytes if bytes >= len * size_of::<f32>() => (0, bytes),
                bytes => (1, usize::MAX - bytes),
            };
            let best = (0..pool.len()).min_by_key(|&i| rank(&pool[i]));
            best.map_or_else(AlignedVec::new, |i| pool.swap_remove(i))
        });
        buffer.resize_for_overwrite(len);
        Scratch(buffer)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        // Fails only while the thread ends; then the buffer is freed.
        let _ = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            if pool.len() < KEPT {
                pool.push(buffer);
            }
        });
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
