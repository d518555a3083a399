//! `AlignedVec`: a growable buffer of plain numbers that starts on a cache line.
//!
//! AMX tile loads from addresses that are no multiple of 64 were measured four times slower. Buffers of 2 MiB and more start on a
//! 2 MiB boundary and ask for huge pages, which removes most page faults and TLB misses of packed weights.
#![allow(unsafe_code)]

use bytemuck::Pod;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
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

/// Asks for huge pages under freshly allocated memory that nobody has touched yet, as far as whole ones fit into it. For buffers that
/// must come from the global allocator; a no-op elsewhere than on Linux.
pub fn advise_huge_pages<T: Pod>(memory: &mut [T]) {
    #[cfg(target_os = "linux")]
    {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(memory);
        let before = bytes.as_ptr().align_offset(HUGE_PAGE);
        if let Some(whole) = bytes.get_mut(before..) {
            let size = whole.len() / HUGE_PAGE * HUGE_PAGE;
            // SAFETY: the range is borrowed memory; the advice changes no content, and its refusal is harmless.
            unsafe { libc::madvise(whole.as_mut_ptr().cast(), size, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

fn bytes_of<T>(len: usize) -> usize {
    assert!(size_of::<T>() > 0, "AlignedVec: elements must have a size");
    len.checked_mul(size_of::<T>()).expect("AlignedVec: size overflows")
}

fn layout_of<T>(len: usize) -> Layout {
    Layout::from_size_align(bytes_of::<T>(len), CACHE_LINE).expect("AlignedVec: size overflows")
}

fn allocate_zeroed<T>(len: usize) -> NonNull<T> {
    if cfg!(target_os = "linux") && bytes_of::<T>(len) >= HUGE_PAGE {
        return map::allocate(bytes_of::<T>(len)).cast();
    }
    let layout = layout_of::<T>(len);
    // SAFETY: the layout has a non-zero size: len > 0, and zero-sized elements were refused.
    let raw = unsafe { alloc_zeroed(layout) };
    NonNull::new(raw.cast::<T>()).unwrap_or_else(|| handle_alloc_error(layout))
}

fn release<T>(start: NonNull<T>, len: usize) {
    if cfg!(target_os = "linux") && bytes_of::<T>(len) >= HUGE_PAGE {
        return map::release(start.cast(), bytes_of::<T>(len));
    }
    // SAFETY: the memory came from alloc_zeroed with this very layout.
    unsafe { dealloc(start.as_ptr().cast(), layout_of::<T>(len)) }
}

/// Large buffers come straight from the operating system, zeroed page by page by whichever thread touches them first.
#[cfg(target_os = "linux")]
mod map {
    use super::{CACHE_LINE, HUGE_PAGE, Layout, NonNull, handle_alloc_error};

    pub(super) fn allocate(bytes: usize) -> NonNull<u8> {
        let size = bytes.next_multiple_of(HUGE_PAGE);
        // SAFETY: an anonymous private mapping at an address of the kernel's choice aliases nothing.
        let raw = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), size + HUGE_PAGE, access, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        if raw == libc::MAP_FAILED {
            handle_alloc_error(Layout::from_size_align(bytes, CACHE_LINE).expect("AlignedVec: size overflows"));
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
            NonNull::new_unchecked(start)
        }
    }

    pub(super) fn release(start: NonNull<u8>, bytes: usize) {
        // SAFETY: exactly the range that `allocate` kept for a buffer of this size.
        unsafe { libc::munmap(start.as_ptr().cast(), bytes.next_multiple_of(HUGE_PAGE)) };
    }
}

#[cfg(not(target_os = "linux"))]
mod map {
    use super::NonNull;

    pub(super) fn allocate(_bytes: usize) -> NonNull<u8> {
        unreachable!("only Linux maps large buffers")
    }

    pub(super) fn release(_start: NonNull<u8>, _bytes: usize) {}
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
    fn resizing_within_the_capacity_keeps_the_memory() {
        let mut buffer = AlignedVec::<u16>::zeroed(100);
        let start = buffer.as_ptr();
        buffer.resize_for_overwrite(50);
        assert_eq!((buffer.as_ptr(), buffer.len()), (start, 50));
        buffer.resize_for_overwrite(200);
        assert_eq!(buffer.len(), 200);
    }
}
