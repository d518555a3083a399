//! Handing out work: jobs are numbered, and every thread of the rayon pool takes the next number from one counter.
//!
//! The split never decides a result: a job writes only what is its own, and each output element is computed whole by one job.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Runs `work(0..jobs)`, each once, on the current rayon pool.
pub(crate) fn for_each_job(jobs: usize, work: impl Fn(usize) + Sync) {
    for_each_job_with(jobs, || (), |(), job| work(job));
}

/// Like [`for_each_job`], with a scratch value made once per thread that gets work.
pub(crate) fn for_each_job_with<S>(jobs: usize, scratch: impl Fn() -> S + Sync, work: impl Fn(&mut S, usize) + Sync) {
    let threads = rayon::current_num_threads().min(jobs);
    if threads <= 1 {
        if jobs > 0 {
            let mut own = scratch();
            (0..jobs).for_each(|job| work(&mut own, job));
        }
        return;
    }
    let next = AtomicUsize::new(0);
    let run = || {
        let mut job = next.fetch_add(1, Ordering::Relaxed);
        if job >= jobs {
            return;
        }
        let mut own = scratch();
        while job < jobs {
            work(&mut own, job);
            job = next.fetch_add(1, Ordering::Relaxed);
        }
    };
    rayon::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| run());
        }
        run();
    });
}

/// A mutable slice that several jobs write at once, each its own part.
pub(crate) struct SharedSlice<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `slice`, whose callers promise disjoint parts.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}
// SAFETY: as above; the slice itself is Send.
unsafe impl<T: Send> Send for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> SharedSlice<'a, T> {
        SharedSlice { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// # Safety
    /// No two threads may hold overlapping parts at the same time.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at + len <= self.len, "SharedSlice: {at} + {len} exceeds {}", self.len);
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }

    /// The start of the part from `at`; writing through it is bound by the promise of [`SharedSlice::slice`].
    pub(crate) fn pointer(&self, at: usize) -> *mut T {
        assert!(at <= self.len, "SharedSlice: {at} exceeds {}", self.len);
        // SAFETY: at most one past the end.
        unsafe { self.start.add(at) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_runs_once_on_any_number_of_threads() {
        for threads in [1, 2, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut counts = vec![0u32; 100];
            let shared = SharedSlice::new(&mut counts);
            // SAFETY: job n touches element n only.
            pool.install(|| for_each_job(100, |job| unsafe { shared.slice(job, 1)[0] += 1 }));
            assert!(counts.iter().all(|&count| count == 1));
        }
    }
}
