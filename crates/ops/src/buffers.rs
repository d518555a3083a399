//! Buffers that outlive the tensors they held: what one step frees, the next one writes into.
//!
//! A training step makes and frees some sixty buffers of a few MiB. Each one from the allocator is a fresh mapping, which costs a page
//! fault per 4 KiB on first touch and zeroing that nobody needs: a sixth of the whole step was measured to go there. So ops take
//! their results from this pool, and give tensors back to it when the backward pass has used them for the last time.
//!
//! A buffer is reused for the same length only; training repeats its shapes. Buffers that were not wanted for a long time (an
//! evaluation with another batch size) are freed. The pool holds at most what the process held at its peak anyway; where gigabytes wait
//! in it for their next use, [`limit_idle_memory`] bounds them.
//! How it differs from the two pools of the kernels is said in `mixtura_kernels`, `workspace.rs`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use burn::backend::Flex;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use mixtura_kernels::aligned::advise_huge_pages;

/// Shorter buffers are left to the allocator, which is good at them.
const SHORTEST: usize = 1 << 14;
/// A buffer that saw this many others taken is freed. A step of a 32-layer model takes about a thousand.
const MAX_AGE: u64 = 1 << 13;

static POOL: Mutex<Pool> = Mutex::new(Pool::new());

struct Pool {
    /// How many buffers were taken so far.
    clock: u64,
    /// By length.
    shelves: BTreeMap<usize, Shelf>,
    /// Elements of all free buffers, and how many there may be.
    idle: usize,
    limit: usize,
}

#[derive(Default)]
struct Shelf {
    /// Buffers taken less buffers that came back. What comes back beyond that was not made here (an op of Burn made it), and
    /// keeping it would make the pool grow with every step.
    lent: usize,
    /// When one was last taken.
    used: u64,
    /// With the time each came back.
    free: VecDeque<(u64, Vec<f32>)>,
}

impl Pool {
    const fn new() -> Self {
        Self { clock: 0, shelves: BTreeMap::new(), idle: 0, limit: usize::MAX }
    }

    fn take(&mut self, len: usize) -> Option<Vec<f32>> {
        self.clock += 1;
        if self.clock.is_multiple_of(MAX_AGE / 8) {
            let oldest = self.clock.saturating_sub(MAX_AGE);
            self.shelves.values_mut().for_each(|shelf| shelf.free.retain(|(time, _)| *time >= oldest));
            self.shelves.retain(|_, shelf| shelf.used >= oldest);
            self.idle = self.shelves.iter().map(|(len, shelf)| len * shelf.free.len()).sum();
        }
        let shelf = self.shelves.entry(len).or_default();
        shelf.lent += 1;
        shelf.used = self.clock;
        // The one that came back last is the likeliest to be in cache.
        let (_, buffer) = shelf.free.pop_back()?;
        self.idle -= len;
        Some(buffer)
    }

    /// Keeps the buffer if it is one of those lent out. What is handed back is to be freed without the lock: the buffer otherwise, or
    /// those that waited longest, if there are too many now.
    fn give(&mut self, buffer: Vec<f32>) -> Vec<Vec<f32>> {
        self.clock += 1;
        let shelf = match self.shelves.get_mut(&buffer.len()) {
            Some(shelf) if shelf.lent > 0 => shelf,
            _ => return vec![buffer],
        };
        shelf.lent -= 1;
        self.idle += buffer.len();
        shelf.free.push_back((self.clock, buffer));
        let mut surplus = Vec::new();
        while self.idle > self.limit {
            let waiting = self.shelves.values_mut().filter(|shelf| !shelf.free.is_empty());
            let longest = waiting.min_by_key(|shelf| shelf.free.front().map(|(time, _)| *time));
            let Some((_, oldest)) = longest.and_then(|shelf| shelf.free.pop_front()) else { break };
            self.idle -= oldest.len();
            surplus.push(oldest);
        }
        surplus
    }
}

/// From now on keeps at most `results` bytes of buffers that no tensor uses, and `work` bytes of those that kernels need meanwhile.
/// Whoever trains a model whose gradients and activations are gigabytes calls this: what the backward pass has used is freed at once
/// and gradients take its place, for a page fault per 2 MiB; without the call each keeps its own memory from step to step.
pub fn limit_idle_memory(results: usize, work: usize) {
    with_pool(|pool| pool.limit = results / size_of::<f32>());
    mixtura_kernels::workspace::limit_idle_memory(work);
}

/// Whether [`limit_idle_memory`] was called.
pub(crate) fn idle_memory_is_limited() -> bool {
    with_pool(|pool| pool.limit != usize::MAX)
}

fn with_pool<R>(f: impl FnOnce(&mut Pool) -> R) -> R {
    f(&mut POOL.lock().unwrap_or_else(PoisonError::into_inner))
}

/// `len` elements of unspecified value, for a caller that overwrites them all. Debug builds fill them with NaN, so that one
/// that does not is found.
pub(crate) fn buffer(len: usize) -> Vec<f32> {
    let mut buffer = if len < SHORTEST { None } else { with_pool(|pool| pool.take(len)) }.unwrap_or_else(|| {
        let mut fresh = vec![0.0; len];
        // Rows of a weight gradient are a page or more apart: on small pages, every store of a panel would look up another one.
        advise_huge_pages(&mut fresh);
        fresh
    });
    if cfg!(debug_assertions) {
        buffer.fill(f32::NAN);
    }
    buffer
}

/// Gives a tensor's buffer to the pool if nothing else holds it.
pub(crate) fn give_back(tensor: FlexTensor) {
    if tensor.layout().num_elements() < SHORTEST || !tensor.is_unique() {
        return;
    }
    if let Ok(buffer) = tensor.into_data().try_into_vec::<f32>() {
        drop(with_pool(|pool| pool.give(buffer)));
    }
}

/// Gives the buffer of a tensor that is no longer needed to the next op that makes one of the same size. Worth calling where a
/// training loop drops large tensors, such as gradients after the optimizer's step. Does nothing if something else holds it.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// mixtura_ops::recycle(Tensor::<2>::zeros([256, 256], &Device::default()));
/// ```
pub fn recycle<const D: usize>(tensor: Tensor<D>) {
    if let Ok(tensor) = tensor.inner().try_into_primitive::<Flex>()
        && tensor.dtype() == burn::tensor::DType::F32
        && tensor.is_contiguous()
    {
        give_back(tensor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fused::tensor_of;

    #[test]
    fn idle_buffers_stay_within_the_limit_and_those_that_waited_longest_go_first() {
        let mut pool = Pool::new();
        for len in [100, 100, 200, 300] {
            assert_eq!(pool.take(len), None);
        }
        pool.limit = 400;
        let given = |pool: &mut Pool, len: usize| pool.give(vec![0.0; len]).iter().map(Vec::len).collect::<Vec<_>>();
        assert!(given(&mut pool, 100).is_empty() && given(&mut pool, 300).is_empty());
        assert_eq!(given(&mut pool, 200), [100, 300]);
        assert!(given(&mut pool, 100).is_empty());
        assert_eq!(pool.idle, 300);
        assert!(pool.take(300).is_none() && pool.take(200).is_some());
        assert_eq!(pool.idle, 100);
        // Not one of ours.
        assert_eq!(given(&mut pool, 77), [77]);
        // Larger than all that may wait.
        pool.limit = 250;
        assert_eq!(given(&mut pool, 300), [100, 300]);
    }

    /// A length no other test uses.
    const LEN: usize = SHORTEST + 77;

    #[test]
    fn a_buffer_comes_back_unless_something_else_holds_it() {
        let tensor = tensor_of(buffer(LEN), [LEN]);
        let (start, other) = (tensor.bytes().as_ptr(), tensor.clone());
        give_back(tensor);
        assert!(with_pool(|pool| pool.shelves[&LEN].free.is_empty()), "taken from under its holder");
        give_back(other);
        // One was lent, so only one is kept.
        give_back(tensor_of(vec![0.0; LEN], [LEN]));
        let (again, fresh) = (buffer(LEN), buffer(LEN));
        assert_eq!(again.as_ptr().cast(), start);
        assert_ne!(fresh.as_ptr().cast(), start);
    }
}
