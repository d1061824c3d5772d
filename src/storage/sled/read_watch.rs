//! Notices a read that fails while sled opens its files, and keeps sled from building on it.
//!
//! sled 0.34.7 drops such errors. A segment whose header cannot be read counts as free (`pagecache/iterator.rs`,
//! `fetch`), the log ends where its next part cannot be read (`LogIter::next`), and a directory that cannot be listed
//! holds no snapshot (`config.rs`, `get_snapshot_files`). Then sled *writes*: zeros over what it takes for free or for the
//! end of the log, a snapshot of its pages in place of the one before, a shorter file. So one error that passes would cost
//! acknowledged entries for good, and nobody would be told. To find that out afterwards is too late.
//!
//! So this file defines the few functions of the C library by which std, and sled through it, reads, writes,
//! truncates, renames and lists; the linker prefers them, as it does the one in [`power`](super::power). They do what the originals
//! do, for every file in the process, with two additions for the files that a [`ReadWatch`] names:
//!
//! - a read that fails is noted, and so is one that ends before the file does;
//! - from then on, until the watch ends, every write to the file, every change of its length, and every rename of a file to
//!   the name of a snapshot in its directory fails with EIO. sled gives up, and what was on the disk is what still is.
//!
//! The first change by which sled says where its log ends, zeros from there on or a snapshot of that name, is also compared with
//! the end that was [found before](LogEnd). If sled is mistaken, for whatever reason, it comes to nothing in the same way.
//!
//! While nobody watches, the price is one look at a counter per call.
//!
//! [`ensure_reads_watched`] proves at start-up that std's calls arrive here, and [`ReadWatch::seen`] that sled's do.
//!
//! What it does not do: judge what was read, retry, or notice anything outside 64-bit Linux with the GNU C library. Elsewhere a
//! failed read is met by the checks before and after sled's open only.

#![allow(unsafe_code)] // functions of the C library, defined anew; nothing else may live here

use std::io;
use std::path::Path;

use crate::error::StorageError;

/// The position after the last complete message of sled's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LogEnd {
    /// In the log: a byte of it has the same position for ever.
    pub(crate) lsn: u64,
    /// In the file.
    pub(crate) offset: u64,
}

#[cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
pub(crate) use interposed::{ReadWatch, ensure_reads_watched};

#[cfg(not(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64")))]
pub(crate) use unwatched::{ReadWatch, ensure_reads_watched};

#[cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
mod interposed {
    use std::ffi::CStr;
    use std::fs::File;
    use std::io::ErrorKind;
    use std::mem::MaybeUninit;
    use std::os::fd::{AsRawFd, FromRawFd};
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
    use std::sync::{Arc, OnceLock, PoisonError, RwLock};

    use libc::{DIR, c_char, c_int, c_void, dirent64, off64_t, size_t, ssize_t};

    use super::{LogEnd, Path, StorageError, io};
    use crate::storage::files::parent;

    /// Length of [`TARGETS`], to be looked at without a lock.
    static WATCHES: AtomicUsize = AtomicUsize::new(0);
    /// What is watched: one per log that is being opened.
    static TARGETS: RwLock<Vec<Arc<WatchedFiles>>> = RwLock::new(Vec::new());

    /// Watches sled's file and the directory that it is in.
    #[derive(Debug)]
    pub(crate) struct ReadWatch(Arc<WatchedFiles>);

    #[derive(Debug)]
    struct WatchedFiles {
        file: FileIdentity,
        directory: FileIdentity,
        /// How the names of sled's snapshots begin, as they are passed to the C library.
        snapshots: Vec<u8>,
        /// Open for as long as they are watched, so that their numbers are nobody else's.
        _open: [File; 2],
        seen: AtomicBool,
        failed: OnceLock<FailedRead>,
        /// Where sled has to see the end of its log.
        end: Option<LogEnd>,
        /// Whether anything was changed while writes depend on reads.
        touched: AtomicBool,
        /// Whether writes are refused once a read has failed.
        strict: AtomicBool,
    }

    /// A file, whatever it is called by.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct FileIdentity {
        device: libc::dev_t,
        inode: libc::ino_t,
    }

    #[derive(Debug, Clone, Copy)]
    enum FailedRead {
        /// With this error number.
        Error(c_int),
        /// Nothing came, and the file goes on.
        Short,
        /// None, but sled behaves as if.
        OtherEnd(LogEnd),
    }

    /// What sled is about to do to its files.
    #[derive(Debug, Clone, Copy)]
    enum FileChange {
        /// Write from this offset of the file on.
        Write(off64_t),
        Truncate,
        /// Call a snapshot by this position of the log, if it is one.
        Snapshot(Option<u64>),
    }

    impl FileChange {
        /// Whether it may be the first one to a log that ends there.
        fn agrees(self, end: LogEnd) -> bool {
            match self {
                Self::Write(offset) => u64::try_from(offset) == Ok(end.offset),
                Self::Truncate => false,
                // A segment that is nearly full counts as full.
                Self::Snapshot(position) => position.is_some_and(|position| position >= end.lsn),
            }
        }
    }

    impl ReadWatch {
        /// Watches `file` and the directory that it is in, where the paths of sled's snapshots begin with `snapshots`. If there
        /// is an `end` after the newest of them, sled has to see it.
        pub(crate) fn on(file: &Path, snapshots: &Path, end: Option<LogEnd>) -> io::Result<Self> {
            let open = [File::open(file)?, File::open(parent(file))?];
            Self::of(open, snapshots, end)
        }

        fn of(open: [File; 2], snapshots: &Path, end: Option<LogEnd>) -> io::Result<Self> {
            let (file, _) = identify(open[0].as_raw_fd())?;
            let (directory, _) = identify(open[1].as_raw_fd())?;
            let target = Arc::new(WatchedFiles {
                file,
                directory,
                snapshots: snapshots.as_os_str().as_bytes().to_owned(),
                _open: open,
                seen: AtomicBool::new(false),
                failed: OnceLock::new(),
                end,
                touched: AtomicBool::new(false),
                strict: AtomicBool::new(true),
            });
            let mut targets = TARGETS.write().unwrap_or_else(PoisonError::into_inner);
            targets.push(target.clone());
            WATCHES.store(targets.len(), SeqCst);
            Ok(Self(target))
        }

        /// Fails if a read has failed since the watch began, with the error of the first; with
        /// [`ErrorKind::InvalidData`] if none has, and sled was about to end its log elsewhere.
        pub(crate) fn check(&self) -> io::Result<()> {
            match self.0.failed.get() {
                None => Ok(()),
                Some(FailedRead::Error(number)) => Err(io::Error::from_raw_os_error(*number)),
                Some(FailedRead::Short) => {
                    Err(io::Error::new(ErrorKind::UnexpectedEof, "it seemed to end before its end"))
                }
                Some(FailedRead::OtherEnd(end)) => Err(other_end(*end)),
            }
        }

        /// Fails with [`ErrorKind::InvalidData`] if sled, which is open now, has not noted the end of its log.
        pub(crate) fn check_end(&self) -> io::Result<()> {
            match self.0.end {
                Some(end) if !self.touched() => Err(other_end(end)),
                Some(_) | None => Ok(()),
            }
        }

        /// Whether the file has been read at all by one of the functions here.
        pub(crate) fn seen(&self) -> bool {
            self.0.seen.load(SeqCst)
        }

        /// Whether sled has begun to change what is on the disk, while it had to be stopped by a read that fails.
        pub(crate) fn touched(&self) -> bool {
            self.0.touched.load(SeqCst)
        }

        /// From now on a read that fails is still noted, but stops no writes.
        pub(crate) fn allow_writes(&self) {
            self.0.strict.store(false, SeqCst);
        }

        /// Never ends the watch.
        pub(crate) fn keep(self) {
            std::mem::forget(self);
        }
    }

    fn other_end(end: LogEnd) -> io::Error {
        let offset = end.offset;
        io::Error::new(
            ErrorKind::InvalidData,
            format!("sled does not see that its log ends at byte {offset}"),
        )
    }

    impl Drop for ReadWatch {
        fn drop(&mut self) {
            let mut targets = TARGETS.write().unwrap_or_else(PoisonError::into_inner);
            targets.retain(|target| !Arc::ptr_eq(target, &self.0));
            WATCHES.store(targets.len(), SeqCst);
        }
    }

    impl WatchedFiles {
        /// Whether a change of it, were it made, would be of interest.
        fn minds(&self) -> bool {
            self.strict.load(SeqCst) && (self.failed.get().is_some() || !self.touched.load(SeqCst))
        }

        /// Notes that it is to be changed. Whether that is refused.
        fn refuses(&self, change: FileChange) -> bool {
            if let Some(end) = self.end
                && !self.touched.load(SeqCst)
                && !change.agrees(end)
            {
                let _ = self.failed.set(FailedRead::OtherEnd(end)); // the first one counts
            }
            let refused = self.failed.get().is_some();
            self.touched.fetch_or(!refused, SeqCst);
            refused
        }

        /// Notes a read at `offset` of the file that was `found`, if it is this one. A file that could not even be
        /// identified after its read had failed may be this one.
        fn note(&self, found: Option<&(FileIdentity, off64_t)>, offset: off64_t, failed: Option<FailedRead>) {
            let length = match found {
                Some((identity, length)) if *identity == self.file => *length,
                Some(_) => return,
                None if failed.is_none() => return,
                None => off64_t::MAX,
            };
            self.seen.store(true, SeqCst);
            match failed {
                Some(FailedRead::Short) if offset >= length => {} // it does end there
                Some(failed) => {
                    let _ = self.failed.set(failed); // the first one counts
                }
                None => {}
            }
        }
    }

    /// Those that `matches`. No lock is held afterwards: a file system may need one of these functions to answer a
    /// question about its file.
    fn targets_where(matches: impl Fn(&WatchedFiles) -> bool) -> Vec<Arc<WatchedFiles>> {
        let targets = TARGETS.read().unwrap_or_else(PoisonError::into_inner);
        targets.iter().filter(|target| matches(target)).cloned().collect()
    }

    /// Which file is open there, and how long it is.
    fn identify(descriptor: c_int) -> io::Result<(FileIdentity, off64_t)> {
        let mut found = MaybeUninit::<libc::stat>::uninit();
        // SAFETY: the kernel checks the descriptor, and `found` is as large as what it writes there.
        if unsafe { libc::fstat(descriptor, found.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has succeeded, so it has written all of it.
        let found = unsafe { found.assume_init() };
        Ok((FileIdentity { device: found.st_dev, inode: found.st_ino }, found.st_size))
    }

    fn errno() -> c_int {
        // SAFETY: errno is a thread-local of this thread; its address is valid for as long as the thread runs.
        unsafe { *libc::__errno_location() }
    }

    fn set_errno(number: c_int) {
        // SAFETY: as in `errno`.
        unsafe { *libc::__errno_location() = number };
    }

    /// Looks at the answer to a read; errno is the caller's.
    fn note_read(descriptor: c_int, bytes: size_t, offset: off64_t, answer: ssize_t) {
        let number = errno();
        let failed = match answer {
            ..0 if number == libc::EINTR => return,
            ..0 => Some(FailedRead::Error(number)),
            0 if bytes > 0 => Some(FailedRead::Short),
            _ => None,
        };
        let concerned = targets_where(|target| failed.is_some() || !target.seen.load(SeqCst));
        if !concerned.is_empty() {
            let found = identify(descriptor);
            for target in concerned {
                target.note(found.as_ref().ok(), offset, failed);
            }
            set_errno(number);
        }
    }

    /// Whether a watch refuses that the file at `descriptor` is changed.
    fn is_refused(descriptor: c_int, change: FileChange) -> bool {
        let concerned = targets_where(WatchedFiles::minds);
        if concerned.is_empty() {
            return false;
        }
        let found = identify(descriptor);
        let is = |target: &WatchedFiles| match &found {
            Ok((identity, _)) => *identity == target.file,
            Err(_) => target.failed.get().is_some(),
        };
        concerned.iter().filter(|target| is(target)).any(|target| target.refuses(change))
    }

    fn is_watching() -> bool {
        WATCHES.load(SeqCst) > 0
    }

    /// The C library's, and its answer is looked at.
    #[unsafe(no_mangle)]
    #[inline(never)]
    unsafe extern "C" fn pread64(
        descriptor: c_int,
        buffer: *mut c_void,
        bytes: size_t,
        offset: off64_t,
    ) -> ssize_t {
        // SAFETY: the same function under its other name, with what our caller has promised.
        let answer = unsafe { libc::pread(descriptor, buffer, bytes, offset) };
        if is_watching() {
            note_read(descriptor, bytes, offset, answer);
        }
        answer
    }

    /// The C library's, unless a watch refuses.
    #[unsafe(no_mangle)]
    #[inline(never)]
    unsafe extern "C" fn pwrite64(
        descriptor: c_int,
        buffer: *const c_void,
        bytes: size_t,
        offset: off64_t,
    ) -> ssize_t {
        if is_watching() && is_refused(descriptor, FileChange::Write(offset)) {
            set_errno(libc::EIO);
            return -1;
        }
        // SAFETY: the same function under its other name, with what our caller has promised.
        unsafe { libc::pwrite(descriptor, buffer, bytes, offset) }
    }

    /// The C library's, unless a watch refuses.
    #[unsafe(no_mangle)]
    #[inline(never)]
    unsafe extern "C" fn ftruncate64(descriptor: c_int, length: off64_t) -> c_int {
        if is_watching() && is_refused(descriptor, FileChange::Truncate) {
            set_errno(libc::EIO);
            return -1;
        }
        // SAFETY: the same function under its other name; it takes no memory.
        unsafe { libc::ftruncate(descriptor, length) }
    }

    /// The C library's, unless a watch refuses a new snapshot.
    #[unsafe(no_mangle)]
    #[inline(never)]
    unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
        if is_watching() && !to.is_null() {
            // SAFETY: our caller has promised a string that ends in NUL.
            let name = unsafe { CStr::from_ptr(to) }.to_bytes();
            let concerned = targets_where(|target| target.minds() && name.starts_with(&target.snapshots));
            let position = |target: &WatchedFiles| {
                let position = std::str::from_utf8(&name[target.snapshots.len()..]).ok()?;
                u64::from_str_radix(position, 16).ok()
            };
            if concerned.iter().any(|target| target.refuses(FileChange::Snapshot(position(target)))) {
                set_errno(libc::EIO);
                return -1;
            }
        }
        // SAFETY: what the C library's own does, with what our caller has promised.
        unsafe { libc::renameat(libc::AT_FDCWD, from, libc::AT_FDCWD, to) }
    }

    /// The C library's, and its answer is looked at.
    #[unsafe(no_mangle)]
    #[inline(never)]
    unsafe extern "C" fn readdir64(directory: *mut DIR) -> *mut dirent64 {
        let before = errno();
        // SAFETY: the same function under its other name, with what our caller has promised. On 64-bit systems both return
        // the same structure.
        let entry = unsafe { libc::readdir(directory) }.cast::<dirent64>();
        let number = errno();
        if is_watching() && entry.is_null() && number != before {
            // SAFETY: our caller has promised an open directory.
            let found = identify(unsafe { libc::dirfd(directory) });
            for target in targets_where(|_| true) {
                if found.as_ref().map_or(true, |(identity, _)| *identity == target.directory) {
                    let _ = target.failed.set(FailedRead::Error(number)); // the first one counts
                }
            }
            set_errno(number);
        }
        entry
    }

    /// Checks that what std reads and writes passes through here.
    ///
    /// # Errors
    /// [`StorageError::NotPowerSafe`] when it does not.
    pub(crate) fn ensure_reads_watched() -> Result<(), StorageError> {
        /// Before the beginning of any file.
        const NOWHERE: u64 = u64::MAX;
        let refuse = |detail: &str| StorageError::NotPowerSafe { detail: detail.to_owned() };
        let failed = |error: io::Error| refuse(&format!("cannot make a file to check with: {error}"));
        let file = unnamed_file().map_err(failed)?;
        let (named, directory) = (file.try_clone().map_err(failed)?, file.try_clone().map_err(failed)?);
        let nothing = Path::new("/proc/quorate-read-check"); // no such place
        let watch = ReadWatch::of([named, directory], nothing, None).map_err(failed)?;
        let mut byte = [0];
        if file.read_at(&mut byte, NOWHERE).is_ok() || watch.check().is_ok() {
            return Err(refuse("a read of the log that fails would not be noticed"));
        }
        let is_refused =
            |outcome: io::Result<()>| outcome.is_err_and(|error| error.raw_os_error() == Some(libc::EIO));
        let outcomes = [file.write_all_at(&byte, 0), file.set_len(0), std::fs::rename(nothing, nothing)];
        if !outcomes.into_iter().all(is_refused) {
            return Err(refuse("a log that cannot be read would be written to"));
        }
        Ok(())
    }

    /// A file in memory.
    fn unnamed_file() -> io::Result<File> {
        // SAFETY: the name is a NUL-terminated literal.
        let descriptor = unsafe { libc::memfd_create(c"quorate-read-check".as_ptr(), libc::MFD_CLOEXEC) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just opened and nobody else owns it.
        Ok(unsafe { File::from_raw_fd(descriptor) })
    }
}

#[cfg(test)]
#[cfg(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64"))]
mod tests {
    use std::fs::{self, File, OpenOptions};
    use std::os::unix::fs::FileExt;

    use super::*;

    /// Before the beginning of any file: such a read fails.
    const NOWHERE: u64 = u64::MAX;

    struct Watched {
        dir: tempfile::TempDir,
        file: File,
        watch: ReadWatch,
    }

    fn watched(end: Option<LogEnd>) -> Watched {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("db"), [7; 100]).unwrap();
        fs::write(dir.path().join("snap.1.generating"), b"new").unwrap();
        fs::write(dir.path().join("snap.1"), b"old").unwrap();
        let file = OpenOptions::new().read(true).write(true).open(dir.path().join("db")).unwrap();
        let watch = ReadWatch::on(&dir.path().join("db"), &dir.path().join("snap."), end).unwrap();
        Watched { dir, file, watch }
    }

    impl Watched {
        fn rename(&self, to: &str) -> io::Result<()> {
            fs::rename(self.dir.path().join("snap.1.generating"), self.dir.path().join(to))
        }

        fn content(&self) -> Vec<u8> {
            fs::read(self.dir.path().join("db")).unwrap()
        }
    }

    fn is_eio(outcome: io::Result<()>) -> bool {
        outcome.is_err_and(|error| error.raw_os_error() == Some(libc::EIO))
    }

    #[test]
    fn a_start_is_refused_where_this_is_not_in_force() {
        ensure_reads_watched().unwrap();
    }

    #[test]
    fn nothing_changes_once_a_read_has_failed() {
        let (one, other) = (watched(None), watched(None));
        let mut byte = [0];
        assert!(!one.watch.seen());
        one.file.read_exact_at(&mut byte, 99).unwrap();
        assert!(one.watch.seen() && !other.watch.seen());
        assert_eq!(one.file.read_at(&mut byte, 100).unwrap(), 0);
        one.watch.check().unwrap(); // it does end there
        one.file.write_all_at(&[8], 0).unwrap();
        assert!(one.watch.touched());

        let failed = one.file.read_at(&mut byte, NOWHERE).unwrap_err();
        assert_eq!(one.watch.check().unwrap_err().raw_os_error(), failed.raw_os_error());
        let before = one.content();
        assert!(is_eio(one.file.write_all_at(&[9], 0)) && is_eio(one.file.set_len(0)));
        assert!(is_eio(one.rename("snap.1")));
        assert_eq!(one.content(), before);
        assert_eq!(fs::read(one.dir.path().join("snap.1")).unwrap(), b"old");
        one.rename("else").unwrap();

        // Nobody else has to suffer.
        other.watch.check().unwrap();
        other.file.write_all_at(&[9], 0).unwrap();
        other.rename("snap.1").unwrap();
        other.file.set_len(1).unwrap();
        assert_eq!(other.content(), [9]);

        one.watch.allow_writes();
        one.file.write_all_at(&[9], 0).unwrap();
        assert!(one.watch.check().is_err(), "it is not forgotten");
        let again = ReadWatch::on(&one.dir.path().join("db"), &one.dir.path().join("snap."), None).unwrap();
        drop(one.watch);
        again.check().unwrap();
    }

    #[test]
    fn the_first_change_is_made_where_the_log_ends() {
        let end = Some(LogEnd { lsn: 0x50, offset: 20 });
        let right = watched(end);
        assert!(right.watch.check_end().is_err(), "sled has to say that it has seen it");
        right.file.write_all_at(&[0; 80], 20).unwrap();
        right.watch.check_end().unwrap();
        right.rename("snap.1").unwrap();
        right.file.write_all_at(&[0; 20], 0).unwrap();
        right.watch.check_end().unwrap();

        for change in [
            |watched: &Watched| watched.file.write_all_at(&[0; 80], 19),
            |watched: &Watched| watched.file.set_len(20),
            |watched: &Watched| watched.rename("snap.000000000000004F"),
        ] {
            let wrong = watched(end);
            assert!(is_eio(change(&wrong)));
            assert_eq!(wrong.watch.check().unwrap_err().kind(), io::ErrorKind::InvalidData);
            assert!(is_eio(wrong.file.write_all_at(&[0; 80], 20)), "it cannot be trusted any more");
            assert_eq!(wrong.content(), [7; 100]);
        }
        let full = watched(end);
        full.rename("snap.0000000000000060").unwrap();
        full.watch.check_end().unwrap();
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64")))]
mod unwatched {
    use super::{LogEnd, Path, StorageError, io};

    /// Watches nothing here.
    #[derive(Debug)]
    pub(crate) struct ReadWatch(());

    impl ReadWatch {
        pub(crate) fn on(_file: &Path, _snapshots: &Path, _end: Option<LogEnd>) -> io::Result<Self> {
            Ok(Self(()))
        }

        pub(crate) fn check(&self) -> io::Result<()> {
            Ok(())
        }

        pub(crate) fn check_end(&self) -> io::Result<()> {
            Ok(())
        }

        pub(crate) fn seen(&self) -> bool {
            true
        }

        pub(crate) fn touched(&self) -> bool {
            true
        }

        pub(crate) fn allow_writes(&self) {}

        pub(crate) fn keep(self) {}
    }

    pub(crate) fn ensure_reads_watched() -> Result<(), StorageError> {
        Ok(())
    }
}
