//! Makes sled's log survive a power cut, and proves at start-up that it does.
//!
//! On Linux, sled 0.34.7 ends every log write with `sync_file_range` and calls that durable
//! (`pagecache/iobuf.rs`, `write_to_log`). It is not: the call writes neither the file's metadata nor the
//! disk's own cache, and acknowledged entries are gone after a power cut. If the call answers ENOSYS, sled
//! falls back to `sync_all`, a real fsync of the file, on every log write.
//!
//! So this file defines the symbol `sync_file_range` itself. The linker prefers a definition in the
//! program to the one in the C library, for sled as for everyone else in the process; nothing else in
//! this program wants the call. Two checks keep that from going wrong in silence, be it by a different link
//! order, a library that is preloaded, or a sled that reaches the kernel in another way:
//!
//! - [`ensure_power_safe`] calls the symbol and refuses to go on unless the answer is ENOSYS. That shows
//!   early what this crate reaches, but not what sled does.
//! - The definition counts its calls. Whoever opens a log writes something through sled and flushes it, and
//!   refuses to go on unless [`intercepted_calls`] has grown meanwhile: sled's own call did arrive here.
//!
//! One fsync may still hide an error from another: Linux reports a failed write-back once per open file, and
//! sled syncs its file also where it looks at no result (`pagecache/segment.rs`, `truncate`). [`WriteErrors`]
//! is an open file of our own on the same data, which hears of every failure whoever else has heard of it.
//!
//! Outside Linux sled always calls `sync_all`, and there is nothing to do. On macOS std's `sync_all` is
//! `F_FULLFSYNC`; on other systems it is what their fsync is worth.

#![allow(unsafe_code)] // the few system calls that std does not have; nothing else may live here

use std::fs::File;
use std::io;
use std::path::Path;
#[cfg(target_os = "linux")]
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use crate::error::StorageError;

/// Calls of [`sync_file_range`] so far.
#[cfg(target_os = "linux")]
static CALLS: AtomicU64 = AtomicU64::new(0);

/// What sled reaches instead of the C library's function: always fails with ENOSYS.
#[cfg(target_os = "linux")]
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn sync_file_range(
    _descriptor: libc::c_int,
    _offset: libc::off64_t,
    _length: libc::off64_t,
    _flags: libc::c_uint,
) -> libc::c_int {
    CALLS.fetch_add(1, SeqCst);
    // SAFETY: errno is a thread-local of this thread; its address is valid for as long as the thread runs.
    unsafe { *libc::__errno_location() = libc::ENOSYS };
    -1
}

/// How often anybody in this process has asked for `sync_file_range` and been told that there is none.
#[cfg(target_os = "linux")]
pub(crate) fn intercepted_calls() -> u64 {
    CALLS.load(SeqCst)
}

/// Checks that `sync_file_range` does not reach the kernel from here: the part of the check that needs no log.
///
/// # Errors
/// [`StorageError::NotPowerSafe`] when `sync_file_range` is answered by anything but ENOSYS.
#[cfg(target_os = "linux")]
pub fn ensure_power_safe() -> Result<(), StorageError> {
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

/// Checks that `sync_file_range` does not reach the kernel from here; outside Linux sled never calls it.
///
/// # Errors
/// None outside Linux.
#[cfg(not(target_os = "linux"))]
pub fn ensure_power_safe() -> Result<(), StorageError> {
    Ok(())
}

/// Checks that a write through sled, made and flushed by `write`, ends in a real fsync.
///
/// # Errors
/// [`StorageError::NotPowerSafe`] when sled has not called what is defined here; else those of `write`.
pub(crate) fn ensure_intercepted(
    write: impl FnOnce() -> Result<(), StorageError>,
) -> Result<(), StorageError> {
    #[cfg(target_os = "linux")]
    let before = intercepted_calls();
    write()?;
    #[cfg(target_os = "linux")]
    if intercepted_calls() == before {
        let detail = "sled has flushed a write, but not by the sync_file_range of this program".to_owned();
        return Err(StorageError::NotPowerSafe { detail });
    }
    Ok(())
}

/// Hears of every failed write-back of one file since it was opened, each once.
#[derive(Debug)]
pub(crate) struct WriteErrors(File);

impl WriteErrors {
    /// Opens `path` for listening; do it before anything is written that matters.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        File::open(path).map(Self)
    }

    /// Fails if the kernel could not write out part of the file since the last call. Call it after an fsync: it
    /// waits for pages that are on their way to the disk, writes none, and costs no flush of the disk's cache.
    #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
    pub(crate) fn check(&self) -> io::Result<()> {
        use std::os::fd::AsRawFd;

        let flags = libc::c_long::from(libc::SYNC_FILE_RANGE_WAIT_BEFORE);
        // The C function of this name is the one above.
        // SAFETY: the descriptor is open for the duration of the call, and no memory is passed.
        let answer =
            unsafe { libc::syscall(libc::SYS_sync_file_range, self.0.as_raw_fd(), 0i64, 0i64, flags) };
        if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Elsewhere there is no call that only reports: sled's fsync has to suffice.
    #[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
    pub(crate) fn check(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Has the kernel forget its copy of a file that was just synced, so that the next read comes from the disk:
/// after a failed write-back, pages that never reached it count as clean.
pub(crate) fn forget_cached(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;

        // SAFETY: the descriptor is open for the duration of the call, and no memory is passed.
        let error = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
    }
    drop(file);
    Ok(())
}

/// A real file with one byte in it, without a name: in memory, so that a read-only or full disk does not
/// matter here.
#[cfg(target_os = "linux")]
fn unnamed_file() -> io::Result<File> {
    use std::io::Write;
    use std::os::fd::FromRawFd;

    // SAFETY: the name is a NUL-terminated literal.
    let descriptor = unsafe { libc::memfd_create(c"quorate-power-check".as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just opened and nobody else owns it.
    let mut file = unsafe { File::from_raw_fd(descriptor) };
    file.write_all(&[0])?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sled_is_forced_to_fsync() {
        ensure_power_safe().unwrap();
    }

    #[test]
    fn sleds_own_call_arrives_here() {
        let dir = tempfile::tempdir().unwrap();
        let db = sled::Config::new().path(dir.path()).flush_every_ms(None).open().unwrap();
        ensure_intercepted(|| {
            db.insert(b"key", b"value").unwrap();
            db.flush().unwrap();
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn write_errors_are_asked_of_the_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, [1; 5000]).unwrap();
        let errors = WriteErrors::of(&path).unwrap();
        errors.check().unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        errors.check().unwrap();
        // The kernel has this call for files only; an answer made up in this process would be ENOSYS, or none.
        #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
        {
            let not_a_file = WriteErrors(File::open("/dev/null").unwrap());
            assert_eq!(not_a_file.check().unwrap_err().raw_os_error(), Some(libc::ESPIPE));
        }
    }

    #[test]
    fn what_is_forgotten_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, [7; 100_000]).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        forget_cached(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), [7; 100_000]);
        assert!(forget_cached(&dir.path().join("none")).is_err());
    }
}
