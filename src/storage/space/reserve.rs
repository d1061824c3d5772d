//! The reserve file: blocks that belong to nobody else when the disk is full.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::StorageError;
use crate::storage::files::io_error;

/// What is kept of the reserve when it is given up. The next start on a full disk has it: opening the log
/// writes sled's own snapshot, and may begin a segment.
const OPENING_BYTES: u64 = 16 * 1024 * 1024;

/// What `st_blocks` counts, whatever the file system's own blocks are.
const BLOCK_BYTES: u64 = 512;

/// The reserve of one data directory. What the file holds means nothing; that it occupies blocks does.
#[derive(Debug)]
pub(crate) struct Reserve {
    file: File,
    path: PathBuf,
    /// When whole.
    bytes: u64,
}

impl Reserve {
    /// Opens or creates the file, without changing its size.
    pub(crate) fn open(path: &Path, bytes: u64) -> Result<Self, StorageError> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)
            .map_err(|error| io_error("cannot open", path, error))?;
        Ok(Self { file, path: path.to_owned(), bytes })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that are set aside at present.
    pub(crate) fn held(&self) -> io::Result<u64> {
        let metadata = self.file.metadata()?;
        Ok(metadata.len().min(metadata.blocks() * BLOCK_BYTES))
    }

    /// Frees what opening the log may need, if the disk has not got it. Call before opening, and
    /// [`hold`](Self::hold) after it.
    pub(crate) fn lend(&self, available: u64) -> io::Result<()> {
        let short = OPENING_BYTES.saturating_sub(available);
        let held = self.held()?;
        if short == 0 || held == 0 {
            return Ok(());
        }
        self.file.set_len(held.saturating_sub(short))?;
        self.file.sync_all()
    }

    /// Sets everything aside, durably, or as much as there is up to the piece that the next start needs.
    ///
    /// # Errors
    /// [`ErrorKind::StorageFull`] if it is not everything.
    pub(crate) fn hold(&self) -> io::Result<()> {
        let whole = self.grow(self.bytes);
        if let Err(error) = &whole
            && error.kind() == ErrorKind::StorageFull
        {
            let piece = OPENING_BYTES.min(self.bytes);
            let held = [piece, piece / 2, piece / 4].into_iter().any(|bytes| self.grow(bytes).is_ok());
            if !held {
                self.file.set_len(0)?;
            }
        }
        whole
    }

    fn grow(&self, bytes: u64) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        if length > bytes {
            self.file.set_len(bytes)?;
        }
        allocate(&self.file, bytes)?;
        self.file.sync_all()
    }

    /// Gives everything but the opening piece to `log`, beyond its end where only `log` can use it. On a file
    /// system that cannot do that it becomes free, for whoever is first.
    pub(crate) fn give(&self, log: &File) -> io::Result<()> {
        let held = self.held()?;
        let piece = OPENING_BYTES.min(self.bytes);
        if held <= piece {
            return Ok(());
        }
        self.file.set_len(piece)?;
        claim(log, held - piece)
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
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {}
        other => return other.map_err(io::Error::from),
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

/// Has `file` own `bytes` more beyond its end, without changing its length.
#[cfg(target_os = "linux")]
fn claim(file: &File, bytes: u64) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    let end = file.metadata()?.len() + owned_beyond_end(file)?;
    match fallocate(file, FallocateFlags::KEEP_SIZE, 0, end + bytes) {
        // Somebody took part of it in between: then the log has what is left.
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::NOSPC) => {
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(not(target_os = "linux"))]
fn claim(_file: &File, _bytes: u64) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn reserve(bytes: u64) -> (tempfile::TempDir, Reserve) {
        let dir = tempfile::tempdir().unwrap();
        let reserve = Reserve::open(&dir.path().join("reserve"), bytes).unwrap();
        (dir, reserve)
    }

    #[test]
    fn what_is_given_belongs_to_the_log() {
        let (dir, reserve) = reserve(48 * MIB);
        reserve.hold().unwrap();
        assert_eq!(reserve.held().unwrap(), 48 * MIB);
        let log = File::create(dir.path().join("db")).unwrap();
        log.set_len(3).unwrap();
        reserve.give(&log).unwrap();
        assert_eq!(reserve.held().unwrap(), OPENING_BYTES);
        assert_eq!(log.metadata().unwrap().len(), 3, "readers see nothing of it");
        #[cfg(target_os = "linux")]
        assert!(owned_beyond_end(&log).unwrap() >= 32 * MIB - 4096);
        reserve.give(&log).unwrap();
        assert_eq!(reserve.held().unwrap(), OPENING_BYTES);
        reserve.hold().unwrap();
        assert_eq!(reserve.held().unwrap(), 48 * MIB);
    }

    #[test]
    fn a_start_is_lent_what_it_lacks() {
        let (_dir, reserve) = reserve(48 * MIB);
        reserve.lend(0).unwrap();
        assert_eq!(reserve.held().unwrap(), 0);
        reserve.hold().unwrap();
        reserve.lend(OPENING_BYTES).unwrap();
        assert_eq!(reserve.held().unwrap(), 48 * MIB);
        reserve.lend(6 * MIB).unwrap();
        assert_eq!(reserve.held().unwrap(), 38 * MIB);
    }

    #[test]
    fn a_file_system_without_preallocation_is_written_to() {
        let (_dir, reserve) = reserve(5 * MIB + 17);
        fill(&reserve.file, reserve.bytes).unwrap();
        assert_eq!(reserve.held().unwrap(), reserve.bytes);
    }
}
