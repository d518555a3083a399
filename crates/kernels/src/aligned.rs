//! `AlignedVec`: a growable buffer of plain numbers that starts on a cache line.
//!
//! AMX tile loads from addresses that are no multiple of 64 were measured four times slower. Buffers of 2 MiB and more start on a
//! 2 MiB boundary and ask for huge pages, which removes most page faults and TLB misses of packed weights.
//!
//! What must come from the global allocator (a `Vec` that becomes a tensor, an optimizer's moments) gets huge pages in two ways:
//! [`HugePages`] maps every large block of a program that declares it as its allocator, and [`advise_huge_pages`] advises about one
//! buffer, in whatever program this is a library of.
#![allow(unsafe_code)]

use bytemuck::Pod;
use std::alloc::{GlobalAlloc, Layout, System, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

const CACHE_LINE: usize = 64;
const HUGE_PAGE: usize = 2 << 20;

/// A zero-initialised slice of `T` on a 64-byte boundary.
pub struct AlignedVec<T: Pod> {
    start: NonNull<T>,
    len: usize,
    capacity: usize,
}

// SAFETY: an AlignedVec owns its memory like a Vec of plain numbers does.
unsafe impl<T: Pod + Send> Send for AlignedVec<T> {}
// SAFETY: shared access hands out shared slices only.
unsafe impl<T: Pod + Sync> Sync for AlignedVec<T> {}

impl<T: Pod> AlignedVec<T> {
    /// An empty buffer; allocates nothing.
    pub const fn new() -> AlignedVec<T> {
        // SAFETY: CACHE_LINE is not zero. An empty buffer is aligned too, so that it can be cast to wider numbers.
        let start = unsafe { NonNull::new_unchecked(std::ptr::without_provenance_mut(CACHE_LINE)) };
        AlignedVec { start, len: 0, capacity: 0 }
    }

    /// `len` zeros.
    pub fn zeroed(len: usize) -> AlignedVec<T> {
        if len == 0 {
            return AlignedVec::new();
        }
        AlignedVec { start: allocate_zeroed::<T>(len), len, capacity: len }
    }

    /// Makes the buffer hold `len` elements of unspecified (but initialised) value, reusing the memory if it is large enough.
    pub fn resize_for_overwrite(&mut self, len: usize) {
        if len <= self.capacity {
            self.len = len;
        } else {
            *self = AlignedVec::zeroed(len);
        }
    }

    /// The first element. Writing through it is sound only where no reference to the same elements is alive.
    pub(crate) fn start(&self) -> *mut T {
        self.start.as_ptr()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.capacity * size_of::<T>()
    }
}

impl<T: Pod> Drop for AlignedVec<T> {
    fn drop(&mut self) {
        if self.capacity > 0 {
            release(self.start, self.capacity);
        }
    }
}

impl<T: Pod> Deref for AlignedVec<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `start` is valid for `len <= capacity` initialised elements (zeroed at allocation; any bits are a valid Pod).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Pod> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T: Pod> Clone for AlignedVec<T> {
    fn clone(&self) -> AlignedVec<T> {
        let mut copy = AlignedVec::zeroed(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl<T: Pod> Default for AlignedVec<T> {
    fn default() -> AlignedVec<T> {
        AlignedVec::new()
    }
}

impl<T: Pod + fmt::Debug> fmt::Debug for AlignedVec<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedVec({} x {})", self.len, std::any::type_name::<T>())
    }
}

/// Asks for huge pages under memory that was just allocated, before anybody touches it: one page fault and one entry of the TLB for
/// 2 MiB instead of 512. A no-op for less than 2 MiB, and elsewhere than on Linux.
pub fn advise_huge_pages<T: Pod>(memory: &mut [T]) {
    advise(memory.as_mut_ptr().cast(), size_of_val(memory));
}

/// The system's allocator for what is small; on Linux, what takes 2 MiB and more is mapped on a 2 MiB boundary, with huge pages, and
/// unmapped when it is freed.
///
/// Parameters, gradients and moments of a model of 500 million take 2 million page faults of 4 KiB before the first step is done, and
/// none of them is allocated by this crate. Behind the header of the C library's blocks a tensor of 6 MiB has two whole huge pages at
/// best, and hundreds of small ones around them; and freed blocks of up to 32 MiB are kept for ever. A program that trains declares
///
/// ```
/// #[global_allocator]
/// static MEMORY: mixtura_kernels::aligned::HugePages = mixtura_kernels::aligned::HugePages;
/// assert_eq!(vec![0.0f32; 1 << 20].as_ptr() as usize % (2 << 20), 0);
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct HugePages;

/// Whether [`HugePages`] maps an allocation itself: a matter of the layout alone, so that freeing finds the same answer.
fn is_mapped(layout: Layout) -> bool {
    cfg!(target_os = "linux") && layout.size() >= HUGE_PAGE && layout.align() <= HUGE_PAGE
}

// SAFETY: an allocation is mapped or the system allocator's by its layout alone, and goes back to where it came from. Mappings are
// aligned to 2 MiB, at least as long as asked for, and zero when new.
unsafe impl GlobalAlloc for HugePages {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_mapped(layout) {
            return freed::take(layout.size()).unwrap_or_else(|| map::allocate(layout.size()));
        }
        // SAFETY: the caller's promises are those of the callee.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_mapped(layout) {
            return map::allocate(layout.size());
        }
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        if is_mapped(layout) {
            return freed::keep(memory, layout.size());
        }
        // SAFETY: as above.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that `size`, rounded up to the alignment, does not overflow.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        match (is_mapped(layout), is_mapped(new)) {
            // SAFETY: as above.
            (false, false) => unsafe { System.realloc(memory, layout, size) },
            (true, true) if map::extent(size) == map::extent(layout.size()) => memory,
            // SAFETY: the old block is readable for the smaller of the two sizes, the new one writable, and they are two blocks.
            _ => unsafe {
                let moved = self.alloc(new);
                if !moved.is_null() {
                    std::ptr::copy_nonoverlapping(memory, moved, size.min(layout.size()));
                    self.dealloc(memory, layout);
                }
                moved
            },
        }
    }
}

/// The last few mappings that were freed, for the next allocation of the same extent: ops that are not ours make and free a few
/// results of one size all the time, and mapping each anew would clear it each time.
mod freed {
    use super::map;
    use std::sync::{Mutex, PoisonError};

    /// How many, and of how many bytes in all.
    const KEPT: usize = 8;
    const KEPT_BYTES: usize = 64 << 20;

    struct Mapping {
        start: *mut u8,
        extent: usize,
    }

    // SAFETY: a freed mapping is nobody's but the list's.
    unsafe impl Send for Mapping {}

    static FREED: Mutex<[Option<Mapping>; KEPT]> = Mutex::new([const { None }; KEPT]);

    pub(super) fn take(size: usize) -> Option<*mut u8> {
        let mut freed = FREED.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |slot: &&mut Option<Mapping>| slot.as_ref().is_some_and(|held| held.extent == map::extent(size));
        freed.iter_mut().find(same)?.take().map(|mapping| mapping.start)
    }

    /// Newest first; what no longer fits is unmapped.
    pub(super) fn keep(start: *mut u8, size: usize) {
        let mut freed = FREED.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut incoming, mut bytes) = (Some(Mapping { start, extent: map::extent(size) }), 0);
        for slot in freed.iter_mut() {
            if incoming.is_some() {
                std::mem::swap(slot, &mut incoming);
            }
            bytes += slot.as_ref().map_or(0, |held| held.extent);
            if bytes > KEPT_BYTES
                && let Some(over) = slot.take()
            {
                bytes -= over.extent;
                map::release(over.start, over.extent);
            }
        }
        if let Some(last) = incoming {
            map::release(last.start, last.extent);
        }
    }
}

/// The advice for an allocation of 2 MiB or more.
#[cfg(target_os = "linux")]
fn advise(memory: *mut u8, size: usize) {
    /// The smallest page there is; where pages are larger, the system refuses an address between two of them, and nothing is lost.
    const PAGE: usize = 4096;
    if size >= HUGE_PAGE {
        let before = memory as usize % PAGE;
        // SAFETY: the advice changes no content, whatever lies there, and its refusal is harmless.
        unsafe { libc::madvise(memory.wrapping_sub(before).cast(), before + size, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise(_memory: *mut u8, _size: usize) {}

fn bytes_of<T>(len: usize) -> usize {
    assert!(size_of::<T>() > 0, "AlignedVec: elements must have a size");
    len.checked_mul(size_of::<T>()).expect("AlignedVec: size overflows")
}

fn layout_of<T>(len: usize) -> Layout {
    Layout::from_size_align(bytes_of::<T>(len), CACHE_LINE).expect("AlignedVec: size overflows")
}

fn allocate_zeroed<T>(len: usize) -> NonNull<T> {
    let layout = layout_of::<T>(len);
    let raw = if is_mapped(layout) {
        map::allocate(layout.size())
    } else {
        // SAFETY: the layout has a non-zero size: len > 0, and zero-sized elements were refused.
        unsafe { alloc_zeroed(layout) }
    };
    NonNull::new(raw.cast::<T>()).unwrap_or_else(|| handle_alloc_error(layout))
}

fn release<T>(start: NonNull<T>, len: usize) {
    let layout = layout_of::<T>(len);
    if is_mapped(layout) {
        return map::release(start.as_ptr().cast(), map::extent(layout.size()));
    }
    // SAFETY: the memory came from alloc_zeroed with this very layout.
    unsafe { dealloc(start.as_ptr().cast(), layout) }
}

/// Large blocks come straight from the operating system, zeroed page by page by whichever thread touches them first.
#[cfg(target_os = "linux")]
mod map {
    use super::HUGE_PAGE;

    /// The largest page that Linux is built with where 2 MiB is a huge one.
    const PAGE: usize = 64 << 10;

    /// Bytes mapped for an allocation: whole huge pages if that adds an eighth at most, since a page touched is a page taken.
    pub(super) fn extent(bytes: usize) -> usize {
        let whole = bytes.checked_next_multiple_of(HUGE_PAGE).unwrap_or(usize::MAX);
        if whole - bytes <= bytes / 8 { whole } else { bytes.next_multiple_of(PAGE) }
    }

    /// Zeros; null if there is no memory.
    pub(super) fn allocate(bytes: usize) -> *mut u8 {
        let size = extent(bytes);
        let Some(reserved) = size.checked_add(HUGE_PAGE) else { return std::ptr::null_mut() };
        // SAFETY: an anonymous private mapping at an address of the kernel's choice aliases nothing.
        let raw = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), reserved, access, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        if raw == libc::MAP_FAILED {
            return std::ptr::null_mut();
        }
        let raw = raw.cast::<u8>();
        let before = raw.align_offset(HUGE_PAGE);
        // SAFETY: both trimmed ends lie inside the mapping just made and outside the part kept; the advice changes no content, and
        // its refusal is harmless.
        unsafe {
            let start = raw.add(before);
            if before > 0 {
                libc::munmap(raw.cast(), before);
            }
            if before < HUGE_PAGE {
                libc::munmap(start.add(size).cast(), HUGE_PAGE - before);
            }
            libc::madvise(start.cast(), size, libc::MADV_HUGEPAGE);
            start
        }
    }

    /// Gives back a mapping of this extent.
    pub(super) fn release(start: *mut u8, extent: usize) {
        // SAFETY: exactly the range that `allocate` kept, which nobody uses any more.
        unsafe { libc::munmap(start.cast(), extent) };
    }
}

#[cfg(not(target_os = "linux"))]
mod map {
    pub(super) fn extent(bytes: usize) -> usize {
        bytes
    }

    pub(super) fn allocate(_bytes: usize) -> *mut u8 {
        unreachable!("only Linux maps large blocks")
    }

    pub(super) fn release(_start: *mut u8, _extent: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_on_a_cache_line_and_holds_zeros() {
        for len in [1usize, 7, 1000, 600_000] {
            let buffer = AlignedVec::<f32>::zeroed(len);
            assert_eq!(buffer.as_ptr() as usize % CACHE_LINE, 0);
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|&x| x == 0.0));
        }
    }

    #[test]
    fn blocks_of_every_size_keep_their_content_and_are_found_again() {
        let layout = |size| Layout::from_size_align(size, 4).unwrap();
        let sizes = [100, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE, 3 * HUGE_PAGE + 5, 40 * HUGE_PAGE + (1 << 20)];
        for old in sizes {
            for new in sizes {
                // SAFETY: every block is used within its size and freed with the layout that it was last given.
                unsafe {
                    let block = HugePages.alloc_zeroed(layout(old));
                    assert!(*block == 0 && *block.add(old - 1) == 0, "{old} bytes are not zero");
                    (*block, *block.add(99), *block.add(old - 1)) = (3, 5, 7);
                    let block = HugePages.realloc(block, layout(old), new);
                    assert_eq!((*block, *block.add(99)), (3, if old == 100 { 7 } else { 5 }), "{old} to {new}");
                    *block.add(new - 1) = 9;
                    HugePages.dealloc(block, layout(new));
                }
            }
        }
        // A freed block serves the next of its size, but never one that must be zero.
        // SAFETY: as above.
        unsafe {
            let first = HugePages.alloc(layout(5 * HUGE_PAGE));
            *first = 1;
            HugePages.dealloc(first, layout(5 * HUGE_PAGE));
            let zeroed = HugePages.alloc_zeroed(layout(5 * HUGE_PAGE));
            assert_eq!(*zeroed, 0);
            HugePages.dealloc(zeroed, layout(5 * HUGE_PAGE));
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_block_takes_an_eighth_more_than_asked_for_at_most() {
        for bytes in [HUGE_PAGE, HUGE_PAGE + 1, 3 * HUGE_PAGE - 1, 3 * HUGE_PAGE + 1, 33 * HUGE_PAGE + 1] {
            let extent = map::extent(bytes);
            assert!(
                extent >= bytes && extent <= bytes + bytes / 8 && extent.is_multiple_of(64 << 10),
                "{bytes}: {extent}"
            );
        }
        assert_eq!(map::extent(33 * HUGE_PAGE + 1), 34 * HUGE_PAGE);
    }

    #[test]
    fn resizing_within_the_capacity_keeps_the_memory() {
        let mut buffer = AlignedVec::<u16>::zeroed(100);
        let start = buffer.as_ptr();
        buffer.resize_for_overwrite(50);
        assert_eq!((buffer.as_ptr(), buffer.len()), (start, 50));
        buffer.resize_for_overwrite(200);
        assert_eq!(buffer.len(), 200);
    }
}
