//! The reserve file, and what the log's file owns beyond its end: blocks that belong to nobody else when the disk is
//! full.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::policy::OPENING_BYTES;
use crate::error::StorageError;
use crate::storage::files::{self, io_error};

/// What `st_blocks` counts, whatever the file system's own blocks are.
const BLOCK_BYTES: u64 = 512;

/// The reserve of one data directory. What the file holds means nothing; that it occupies blocks does.
#[derive(Debug)]
pub(crate) struct Reserve {
    file: File,
    path: PathBuf,
    /// Whether the file system says how many blocks a file occupies. Some only say so later, or never.
    counted: bool,
}

impl Reserve {
    /// Opens or creates the file, without changing its size.
    pub(crate) fn open(path: &Path) -> Result<Self, StorageError> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)
            .map_err(|error| io_error("cannot open", path, error))?;
        Ok(Self { file, path: path.to_owned(), counted: true })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that are set aside at present. Where blocks do not count, the length of the file: then the watermark on
    /// what is free is all that protects the log.
    pub(crate) fn held(&self) -> io::Result<u64> {
        let metadata = self.file.metadata()?;
        let blocks = if self.counted { metadata.blocks() * BLOCK_BYTES } else { u64::MAX };
        Ok(metadata.len().min(blocks))
    }

    /// Frees what opening the log may need, if the disk has not got it. Call before opening.
    pub(crate) fn lend(&self, available: u64) -> io::Result<()> {
        let short = OPENING_BYTES.saturating_sub(available);
        let held = self.held()?;
        if short == 0 || held == 0 {
            return Ok(());
        }
        self.file.set_len(held.saturating_sub(short))?;
        self.file.sync_all()
    }

    /// Sets `bytes` aside, durably; frees what is held beyond that. What has been set aside stays so on failure.
    ///
    /// # Errors
    /// One for which [`files::is_full`] holds, if there is less than that.
    pub(crate) fn hold(&mut self, bytes: u64) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        if length > bytes {
            self.file.set_len(bytes)?;
        } else if self.held()? == bytes {
            return Ok(());
        }
        allocate(&self.file, bytes)?;
        self.file.sync_all()?;
        self.check_count(bytes)
    }

    /// Everything has been allocated, so if blocks say otherwise they mean nothing.
    fn check_count(&mut self, bytes: u64) -> io::Result<()> {
        if self.held()? < bytes {
            self.counted = false;
            tracing::warn!(path = %self.path.display(), "this file system does not count what the reserve occupies; only free space is watched");
        }
        Ok(())
    }

    /// Shortens the file to `piece`, for the log to have the rest, or has it hold as much of it as is `available`.
    pub(crate) fn keep(&mut self, piece: u64, available: u64) -> io::Result<()> {
        /// Less is no use to a start.
        const SHARES: [u64; 3] = [1, 2, 4];
        let held = self.held()?;
        if held > piece {
            // Where blocks do not count there may be none to give.
            return if self.counted { self.file.set_len(piece) } else { Ok(()) };
        }
        let fits = |bytes: &u64| *bytes > held && *bytes - held <= available;
        for bytes in SHARES.map(|share| piece / share).into_iter().filter(fits) {
            match allocate(&self.file, bytes).and_then(|()| self.file.sync_all()) {
                Err(error) if files::is_full(error.kind()) => {}
                outcome => return outcome,
            }
        }
        Ok(())
    }
}

/// Room that `file` owns beyond its end, in bytes; too little where the file has holes.
pub(crate) fn owned_beyond_end(file: &File) -> io::Result<u64> {
    let metadata = file.metadata()?;
    Ok((metadata.blocks() * BLOCK_BYTES).saturating_sub(metadata.len()))
}

/// Has the first `bytes` of a file occupy blocks, whatever they hold.
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{FallocateFlags, fallocate};
        let allocated = rustix::io::retry_on_intr(|| fallocate(file, FallocateFlags::empty(), 0, bytes));
        match allocated {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
            other => return other.map_err(io::Error::from),
        }
    }
    fill(file, bytes)
}

/// [`allocate`] for file systems that can only be written to.
fn fill(file: &File, bytes: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    const CHUNK_BYTES: u64 = 1024 * 1024;
    let metadata = file.metadata()?;
    let mut at = metadata.len().min(metadata.blocks() * BLOCK_BYTES).min(bytes);
    let chunk = vec![0x51; CHUNK_BYTES as usize];
    while at < bytes {
        let length = (bytes - at).min(CHUNK_BYTES);
        file.write_all_at(&chunk[..length as usize], at)?;
        at += length;
    }
    Ok(())
}

/// Of a claim: less is not worth an attempt. On a full disk, each makes some file systems commit their journal first.
pub(crate) const LEAST_CLAIM_BYTES: u64 = 1024 * 1024;

/// How much of a claim was granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claimed {
    All,
    /// The disk is full, or the quota.
    Part,
    /// The file system cannot do that.
    Nothing,
}

/// Has `file` own `bytes` beyond its end, what it owns there already included, without changing its length. Where
/// there is less, it gets that.
#[cfg(target_os = "linux")]
pub(crate) fn claim(file: &File, bytes: u64) -> io::Result<Claimed> {
    use rustix::fs::{FallocateFlags, fallocate};
    use rustix::io::Errno;
    let mut done = owned_beyond_end(file)?.min(bytes);
    let mut step = (bytes - done).max(1);
    loop {
        // Where it ends now: the log may have been shortened meanwhile, which frees what was beyond.
        let end = file.metadata()?.len();
        let upto = done.saturating_add(step).min(bytes);
        if upto == 0 {
            return Ok(Claimed::All);
        }
        match rustix::io::retry_on_intr(|| fallocate(file, FallocateFlags::KEEP_SIZE, end, upto)) {
            Ok(()) if upto == bytes => return Ok(Claimed::All),
            Ok(()) => done = upto,
            Err(Errno::NOSPC | Errno::DQUOT) if step / 2 < LEAST_CLAIM_BYTES => return Ok(Claimed::Part),
            Err(Errno::NOSPC | Errno::DQUOT) => step /= 2,
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(Claimed::Nothing),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn claim(_file: &File, _bytes: u64) -> io::Result<Claimed> {
    Ok(Claimed::Nothing)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn reserve() -> (tempfile::TempDir, Reserve) {
        let dir = tempfile::tempdir().unwrap();
        let reserve = Reserve::open(&dir.path().join("reserve")).unwrap();
        (dir, reserve)
    }

    #[test]
    fn what_is_set_aside_is_what_was_asked_for() {
        let (_dir, mut reserve) = reserve();
        for mib in [48, 16, 32, 32] {
            reserve.hold(mib * MIB).unwrap();
            assert_eq!(reserve.held().unwrap(), mib * MIB);
        }
        reserve.keep(16 * MIB, 0).unwrap();
        assert_eq!(reserve.held().unwrap(), 16 * MIB);
        reserve.keep(20 * MIB, MIB).unwrap();
        assert_eq!(reserve.held().unwrap(), 16 * MIB);
        reserve.keep(20 * MIB, 4 * MIB).unwrap();
        assert_eq!(reserve.held().unwrap(), 20 * MIB);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_claim_counts_what_is_owned_already() {
        let dir = tempfile::tempdir().unwrap();
        let log = File::create(dir.path().join("db")).unwrap();
        log.set_len(3).unwrap();
        for _ in 0..5 {
            assert_eq!(claim(&log, 32 * MIB).unwrap(), Claimed::All);
            assert_eq!(log.metadata().unwrap().len(), 3, "readers see nothing of it");
            let owned = owned_beyond_end(&log).unwrap();
            assert!((32 * MIB - 4096..=32 * MIB + 4096).contains(&owned), "{owned}");
        }
        // Shortening frees all of it.
        log.set_len(0).unwrap();
        assert_eq!(owned_beyond_end(&log).unwrap(), 0);
        assert_eq!(claim(&log, 0).unwrap(), Claimed::All);
        assert_eq!(claim(&log, MIB).unwrap(), Claimed::All);
        assert!(owned_beyond_end(&log).unwrap() >= MIB);
    }

    #[test]
    fn a_start_is_lent_what_it_lacks() {
        let (_dir, mut reserve) = reserve();
        reserve.lend(0).unwrap();
        assert_eq!(reserve.held().unwrap(), 0);
        reserve.hold(48 * MIB).unwrap();
        reserve.lend(OPENING_BYTES).unwrap();
        assert_eq!(reserve.held().unwrap(), 48 * MIB);
        reserve.lend(6 * MIB).unwrap();
        assert_eq!(reserve.held().unwrap(), 38 * MIB);
    }

    #[test]
    fn a_file_system_without_preallocation_is_written_to() {
        let (_dir, reserve) = reserve();
        fill(&reserve.file, 5 * MIB + 17).unwrap();
        assert_eq!(reserve.held().unwrap(), 5 * MIB + 17);
    }

    /// A file of that length that occupies nothing is what such a file system shows.
    #[test]
    fn where_blocks_do_not_count_the_length_does() {
        let (_dir, mut reserve) = reserve();
        reserve.file.set_len(5 * MIB).unwrap();
        assert_eq!(reserve.held().unwrap(), 0);
        reserve.check_count(5 * MIB).unwrap();
        assert_eq!(reserve.held().unwrap(), 5 * MIB);
        reserve.keep(MIB, MIB).unwrap();
        assert_eq!(reserve.held().unwrap(), 5 * MIB, "there is nothing to give");
    }
}
