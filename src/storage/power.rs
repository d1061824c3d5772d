//! Makes sled's log survive a power cut, and proves at start-up that it does.
//!
//! On Linux, sled 0.34.7 ends every log write with `sync_file_range` and calls that durable
//! (`pagecache/iobuf.rs`, `write_to_log`). It is not: the call writes neither the file's metadata nor the
//! disk's own cache, and acknowledged entries are gone after a power cut. If the call answers ENOSYS, sled
//! falls back to `sync_all`, a real fsync of the file, on every log write.
//!
//! So this file defines the symbol `sync_file_range` itself. The linker prefers a definition in the
//! program to the one in the C library, for sled as for everyone else in the process; nothing else in
//! this program wants the call. [`ensure_power_safe`] then calls it the way sled does and refuses to go on
//! unless the answer is ENOSYS: a different link order, a C library that is preloaded, or a future sled
//! that reaches the kernel in another way must not turn durability off in silence.
//!
//! Outside Linux sled always calls `sync_all`, and there is nothing to do. On macOS std's `sync_all` is
//! `F_FULLFSYNC`; on other systems it is what their fsync is worth.

#![allow(unsafe_code)] // defines and calls one C symbol; nothing else may live here

use crate::error::StorageError;

/// What sled reaches instead of the C library's function: always fails with ENOSYS.
#[cfg(target_os = "linux")]
#[unsafe(no_mangle)]
extern "C" fn sync_file_range(
    _descriptor: libc::c_int,
    _offset: libc::off64_t,
    _length: libc::off64_t,
    _flags: libc::c_uint,
) -> libc::c_int {
    // SAFETY: errno is a thread-local of this thread; its address is valid for as long as the thread runs.
    unsafe { *libc::__errno_location() = libc::ENOSYS };
    -1
}

/// Checks that sled's log writes end in a real fsync in this process.
///
/// # Errors
/// [`StorageError::NotPowerSafe`] when `sync_file_range` is answered by anything but ENOSYS.
#[cfg(target_os = "linux")]
pub fn ensure_power_safe() -> Result<(), StorageError> {
    use std::io;
    use std::os::fd::AsRawFd;

    let refuse = |detail: String| StorageError::NotPowerSafe { detail };
    let file =
        unnamed_file().map_err(|error| refuse(format!("cannot make a file to check with: {error}")))?;
    let flags =
        libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the descriptor is open for the duration of the call, and no memory is passed.
    let answer = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 1, flags) };
    let error = io::Error::last_os_error();
    match (answer, error.raw_os_error()) {
        (-1, Some(libc::ENOSYS)) => Ok(()),
        (-1, _) => Err(refuse(format!("sync_file_range answers \"{error}\" instead of ENOSYS"))),
        _ => Err(refuse("sync_file_range reaches the kernel, so flushes would not be fsyncs".to_owned())),
    }
}

/// Checks that sled's log writes end in a real fsync in this process; outside Linux they always do.
///
/// # Errors
/// None outside Linux.
#[cfg(not(target_os = "linux"))]
pub fn ensure_power_safe() -> Result<(), StorageError> {
    Ok(())
}

/// A real file with one byte in it, without a name: in memory, so that a read-only or full disk does not
/// matter here.
#[cfg(target_os = "linux")]
fn unnamed_file() -> std::io::Result<std::fs::File> {
    use std::io::Write;
    use std::os::fd::FromRawFd;

    // SAFETY: the name is a NUL-terminated literal.
    let descriptor = unsafe { libc::memfd_create(c"quorate-power-check".as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened and nobody else owns it.
    let mut file = unsafe { std::fs::File::from_raw_fd(descriptor) };
    file.write_all(&[0])?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::ensure_power_safe;

    #[test]
    fn sled_is_forced_to_fsync() {
        ensure_power_safe().unwrap();
    }
}
