//! Threads that wait for the next parallel part awake: for a row of work that is cut into a hundred parts of some ten microseconds each, as the
//! layers of a decoding step are. Asleep, a thread is woken through the kernel for each part, which took a fifth of a step.
//!
//! The members of a team are threads of the rayon pool that [`team`] borrows for as long as its closure runs. They look for work without
//! sleeping, and give their core away now and then where nothing comes. A member that the pool is late with is not waited for: jobs are
//! taken from a counter, so whoever is there does them all.

use std::cell::{Cell, UnsafeCell};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

/// How often a member looks for work before it lets others have the core: some 20 microseconds.
const LOOKS: u32 = 1 << 10;

/// What a team is to do: everyone calls it, and returns when there is nothing left.
type Part = *const (dyn Fn() + Sync);

struct Team {
    /// Counts parts; a member takes part once in each.
    part: AtomicUsize,
    work: UnsafeCell<Option<Part>>,
    /// Whether the current part may be entered.
    open: AtomicBool,
    /// Members inside the current part.
    inside: AtomicUsize,
    failed: AtomicBool,
    over: AtomicBool,
}

// SAFETY: `work` is written by the leader while the part is closed and nobody is inside, and read by members that are inside an open part.
unsafe impl Sync for Team {}

thread_local! {
    /// The team that this thread leads.
    static LED: Cell<*const Team> = const { Cell::new(std::ptr::null()) };
}

/// Runs `work` with the threads of the current pool awake for its parallel parts. On one thread, or inside another team, it just runs.
pub fn team<R>(work: impl FnOnce() -> R) -> R {
    let members = rayon::current_num_threads() - 1;
    if members == 0 || !LED.get().is_null() || rayon::current_thread_index().is_none() {
        return work();
    }
    let team = Team {
        part: AtomicUsize::new(0),
        work: UnsafeCell::new(None),
        open: AtomicBool::new(false),
        inside: AtomicUsize::new(0),
        failed: AtomicBool::new(false),
        over: AtomicBool::new(false),
    };
    rayon::in_place_scope(|scope| {
        for _ in 0..members {
            scope.spawn(|_| team.serve());
        }
        // Dropped in any case: the scope waits for the members.
        let _lead = Lead(&team);
        LED.set(&raw const team);
        work()
    })
}

/// While it lives, this thread leads.
struct Lead<'a>(&'a Team);

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        LED.set(std::ptr::null());
        self.0.over.store(true, SeqCst);
    }
}

/// Has everyone call `part`, if this thread leads a team; whether it does.
pub(super) fn run(part: &(dyn Fn() + Sync)) -> bool {
    let led = LED.get();
    if led.is_null() {
        return false;
    }
    // SAFETY: the pointer is set only while the team lives, on this thread.
    unsafe { &*led }.run(part);
    true
}

impl Team {
    fn run(&self, part: &(dyn Fn() + Sync)) {
        // SAFETY: only the lifetime changes; nobody uses the pointer after `Closing` is dropped, which is before `part` goes.
        let erased: Part = unsafe { std::mem::transmute::<&(dyn Fn() + Sync), &'static (dyn Fn() + Sync)>(part) };
        // SAFETY: the part before is closed and nobody is inside.
        unsafe { *self.work.get() = Some(erased) };
        self.part.fetch_add(1, SeqCst);
        self.open.store(true, SeqCst);
        let closing = Closing(self);
        part();
        drop(closing);
        assert!(!self.failed.load(SeqCst), "a thread panicked in a parallel part");
    }

    /// What a member does until the team is over.
    fn serve(&self) {
        let (mut seen, mut looks) = (0, 0);
        while !self.over.load(SeqCst) {
            let part = self.part.load(SeqCst);
            if part == seen || !self.open.load(SeqCst) {
                looks += 1;
                if looks % LOOKS == 0 {
                    std::thread::yield_now()
                } else {
                    std::hint::spin_loop()
                }
                continue;
            }
            (seen, looks) = (part, 0);
            self.inside.fetch_add(1, SeqCst);
            // Closed before this member was counted: the leader may be gone from the part. Closed after: the leader waits.
            if self.open.load(SeqCst) {
                // SAFETY: inside an open part, see `Sync`.
                let work = unsafe { (*self.work.get()).expect("an open part has work") };
                // SAFETY: `work` lives until the part is closed and left.
                let call = std::panic::AssertUnwindSafe(|| unsafe { (*work)() });
                if std::panic::catch_unwind(call).is_err() {
                    self.failed.store(true, SeqCst);
                }
            }
            self.inside.fetch_sub(1, SeqCst);
        }
    }
}

/// Closes the part and waits for those inside, also when the leader's own share panics.
struct Closing<'a>(&'a Team);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.open.store(false, SeqCst);
        let mut looks = 0u32;
        while self.0.inside.load(SeqCst) != 0 {
            looks += 1;
            if looks.is_multiple_of(LOOKS) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::for_each_job;
    use super::*;

    #[test]
    fn every_job_of_every_part_runs_once() {
        for threads in [1, 2, 3, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let counts: Vec<AtomicUsize> = (0..7).map(|_| AtomicUsize::new(0)).collect();
            pool.install(|| {
                team(|| {
                    for _ in 0..2000 {
                        for_each_job(counts.len(), |job| {
                            counts[job].fetch_add(1, SeqCst);
                        });
                    }
                });
            });
            assert!(counts.iter().all(|count| count.load(SeqCst) == 2000), "{threads} threads: {counts:?}");
        }
    }

    #[test]
    fn a_panic_in_a_job_reaches_the_leader_and_ends_the_team() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for bad in [0, 5] {
            let run = || pool.install(|| team(|| for_each_job(64, |job| assert_ne!(job, bad))));
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err());
        }
        pool.install(|| team(|| for_each_job(64, |_| ())));
    }

    #[test]
    fn teams_beside_and_inside_each_other_end() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let done = AtomicUsize::new(0);
        let some = || {
            team(|| {
                for_each_job(50, |_| ());
                team(|| for_each_job(50, |_| ()));
                done.fetch_add(1, SeqCst);
            });
        };
        pool.install(|| rayon::join(some, || rayon::join(some, some)));
        assert_eq!(done.load(SeqCst), 3);
    }
}
