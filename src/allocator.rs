//! The allocators of the program: what they reserve, and what they keep of what was freed.

#![allow(unsafe_code)] // settings of two allocators, which no crate offers; nothing else may live here

use std::ffi::{c_int, c_long};

/// Commands are allocated on one thread and freed on another, which glibc's allocator does badly.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` in `mimalloc.h`: for how many milliseconds freed memory is kept before the system has it back.
const PURGE_DELAY: c_int = 15;

unsafe extern "C" {
    fn mi_option_set(option: c_int, value: c_long);
    #[cfg(test)]
    fn mi_option_get(option: c_int) -> c_long;
}

/// Keeps the C library's allocator from reserving address space, 64 MiB for each of the first threads, until a limit on it (`ulimit -v`)
/// leaves the program's own allocator none. Only what the C library allocates for itself comes from there, so one area is enough. To be
/// called before there are threads.
pub(crate) fn reserve_little() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it is a setting of the C library's, which knows it or refuses it.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Has little memory kept on a node that may use `memory_bytes`, where these are few.
///
/// By default freed memory is kept for a second. Values of a megabyte, written and deleted as fast as a disk allows, come to more than a
/// hundred megabytes in that time, which a node of a few hundred has not.
pub(crate) fn fit(memory_bytes: u64) {
    /// From here on a second's writes are little beside what the quota leaves to spare.
    const AMPLE_BYTES: u64 = 4 * 1024 * 1024 * 1024;
    const DELAY_MS: c_long = 10;
    if memory_bytes < AMPLE_BYTES {
        // SAFETY: the option exists in the version that is linked, and may be set at any time, from any thread.
        unsafe { mi_option_set(PURGE_DELAY, DELAY_MS) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_node_gives_freed_memory_back_at_once() {
        // SAFETY: the option exists in the version that is linked.
        let delay = || unsafe { mi_option_get(PURGE_DELAY) };
        fit(4 << 30);
        assert_eq!(delay(), 1_000, "the default: this is the option that it is taken for");
        fit(400 << 20);
        assert_eq!(delay(), 10);
    }
}
