//! Large buffers that live from call to call: taken from a pool of the process, handed back when dropped, never zeroed.
//!
//! Measured before this pool existed: a third of the backward pass of an expert layer went into the kernel clearing fresh pages.
//!
//! There are three pools, because what they hand out lives in three ways:
//!
//! | pool | holds | for | why not one of the others |
//! | --- | --- | --- | --- |
//! | here | aligned words, any element type | operands and rows of one matrix pass, some saved until the backward pass | a buffer is often dropped by another thread than took it, and is large: one lock a buffer is nothing |
//! | `scratch` | aligned f32, per thread | panels of attention, down to a few KiB per panel and job | taken thousands of times a pass: a lock would be felt, and the buffer should be in the cache of the core that asks |
//! | `buffers` of `mixtura-ops` | `Vec<f32>` by exact length | results and gradients, which become tensors | Burn takes over a `Vec` and frees it as one, so the memory must be the global allocator's |

use crate::aligned::AlignedVec;
use bytemuck::Pod;
use std::collections::VecDeque;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Buffers kept while nobody uses them; the one unused for longest goes first.
const KEPT: usize = 24;

static POOL: Mutex<VecDeque<AlignedVec<u32>>> = Mutex::new(VecDeque::new());

/// Bytes kept while nobody uses them.
static IDLE_LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// From now on keeps at most `bytes` of work buffers that nobody uses; without this call, two dozen of any size. For programs that hold
/// gigabytes, to whom a buffer that waits for its next use is worth less than the memory.
pub fn limit_idle_memory(bytes: usize) {
    IDLE_LIMIT.store(bytes, Ordering::Relaxed);
}

/// What the pool is to let go of, the longest unused first, to stay within its limits.
fn surplus(pool: &mut VecDeque<AlignedVec<u32>>, limit: usize) -> Vec<AlignedVec<u32>> {
    let mut idle: usize = pool.iter().map(AlignedVec::bytes).sum();
    let mut surplus = Vec::new();
    while pool.len() > KEPT || idle > limit {
        let Some(oldest) = pool.pop_front() else { break };
        idle -= oldest.bytes();
        surplus.push(oldest);
    }
    surplus
}

/// A slice of `T` of unspecified (but initialised) content, 64-byte aligned.
pub(crate) struct Workspace<T: Pod> {
    buffer: AlignedVec<u32>,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Pod> Workspace<T> {
    /// Holds nothing.
    pub(crate) const fn new() -> Workspace<T> {
        Workspace { buffer: AlignedVec::new(), len: 0, element: PhantomData }
    }

    /// `len` elements.
    pub(crate) fn take(len: usize) -> Workspace<T> {
        let words = (len * size_of::<T>()).div_ceil(size_of::<u32>());
        let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that is large enough, but not one so large that a larger request would miss it.
        let fits = |buffer: &AlignedVec<u32>| {
            let held = buffer.bytes() / size_of::<u32>();
            (words..=2 * words + (16 << 10)).contains(&held).then_some(held)
        };
        let best = (0..pool.len()).filter_map(|at| Some((fits(&pool[at])?, at))).min();
        let mut buffer = best.and_then(|(_, at)| pool.remove(at)).unwrap_or_default();
        drop(pool);
        if buffer.bytes() == 0 {
            // Ragged sizes differ a little from step to step: an eighth to spare lets the next one reuse this.
            buffer = AlignedVec::zeroed(words + words / 8);
        }
        buffer.resize_for_overwrite(words);
        Workspace { buffer, len, element: PhantomData }
    }

    /// The first element. Writing through it is sound only where no reference to the same elements is alive.
    pub(crate) fn start(&self) -> *mut T {
        self.buffer.start().cast()
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> usize {
        self.buffer.bytes()
    }
}

impl<T: Pod> Drop for Workspace<T> {
    fn drop(&mut self) {
        if self.buffer.bytes() > 0 {
            let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
            pool.push_back(std::mem::take(&mut self.buffer));
            let surplus = surplus(&mut pool, IDLE_LIMIT.load(Ordering::Relaxed));
            drop(pool);
            drop(surplus);
        }
    }
}

impl<T: Pod> Deref for Workspace<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.buffer)[..self.len]
    }
}

impl<T: Pod> DerefMut for Workspace<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.buffer)[..self.len]
    }
}

impl<T: Pod> Default for Workspace<T> {
    fn default() -> Workspace<T> {
        Workspace::new()
    }
}

impl<T: Pod> Clone for Workspace<T> {
    fn clone(&self) -> Workspace<T> {
        let mut copy = Workspace::take(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl<T: Pod> fmt::Debug for Workspace<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Workspace({} x {})", self.len, std::any::type_name::<T>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_buffers_stay_within_the_limit_and_the_longest_unused_go_first() {
        let pool = |sizes: &[usize]| sizes.iter().map(|&len| AlignedVec::<u32>::zeroed(len)).collect::<VecDeque<_>>();
        let mut three = pool(&[10, 20, 30]);
        assert!(surplus(&mut three, 240).is_empty());
        let gone = surplus(&mut three, 239);
        assert_eq!((gone.len(), gone[0].bytes(), three.len()), (1, 40, 2));
        assert_eq!((surplus(&mut three, 0).len(), three.len()), (2, 0));
        let mut many = pool(&[1; KEPT + 2]);
        assert_eq!((surplus(&mut many, usize::MAX).len(), many.len()), (2, KEPT));
    }

    #[test]
    fn buffers_have_the_length_asked_for_and_keep_what_is_written() {
        for len in [0usize, 1, 3, 1000, 700_000] {
            let mut halves = Workspace::<u16>::take(len);
            halves.fill(7);
            let mut floats = Workspace::<f32>::take(len);
            floats.fill(1.5);
            assert_eq!((halves.len(), floats.len()), (len, len));
            assert!(halves.iter().all(|&x| x == 7) && floats.iter().all(|&x| x == 1.5));
            assert_eq!(halves.as_ptr() as usize % 64, 0);
        }
    }
}
