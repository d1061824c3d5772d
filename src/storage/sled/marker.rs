//! The ready file beside sled's directory: proof that the directory was once complete, and how far it got.
//!
//! Until it exists, nothing was promised, and a store that does not open may be made anew. From then on a
//! store that is missing or does not open is a lost disk, not a new one.
//!
//! sled cuts its log at the first damaged byte it meets while recovering, and says nothing. So the file also
//! carries a *mark*: the sequence number of the hard state as of the last flush. It is written after the flush
//! and synced about once a second, by another thread, hence never ahead of what is durable; a store that recovers less than its mark
//! says has lost writes it had acknowledged. A killed process leaves the mark exact; a power cut may set it
//! back to what the kernel had written out, by about a second.
//!
//! Three sectors of 512 bytes, the unit a disk writes whole: the head, which never changes, then two slots
//! that take turns.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use crate::error::StorageError;
use crate::storage::files;

const MAGIC: &[u8; 8] = b"QUORREDY";
const VERSION: u32 = 1;
const SECTOR_BYTES: usize = 512;
const FILE_BYTES: usize = 3 * SECTOR_BYTES;

/// The ready file, open for marking.
#[derive(Debug)]
pub(crate) struct Marker {
    file: Arc<File>,
    /// Since the last sync.
    moved: Arc<AtomicBool>,
}

/// Syncs the mark, from another thread.
#[derive(Debug)]
pub(crate) struct MarkSync {
    file: Arc<File>,
    moved: Arc<AtomicBool>,
}

impl MarkSync {
    /// Makes the newest mark durable. Free if it has not moved.
    pub(crate) fn sync(&self) -> io::Result<()> {
        if self.moved.swap(false, SeqCst) { self.file.sync_data() } else { Ok(()) }
    }
}

impl Marker {
    /// Where the ready file of the sled directory `log` is.
    pub(crate) fn path(log: &Path) -> PathBuf {
        log.with_extension("ready")
    }

    /// Opens the ready file, if there is one; the second value is its mark.
    pub(crate) fn open(path: &Path) -> Result<Option<(Self, u64)>, StorageError> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(files::unreadable(path, error)),
        };
        let corrupt =
            |detail: &str| StorageError::Corrupt { path: path.to_owned(), detail: detail.to_owned() };
        if bytes.len() != FILE_BYTES {
            return Err(corrupt(&format!("it has {} bytes instead of {FILE_BYTES}", bytes.len())));
        }
        let (head, slots) = bytes.split_at(SECTOR_BYTES);
        if &head[..8] != MAGIC || checksum_of(&head[..12]) != u32_at(head, 12) {
            return Err(corrupt("its head (bytes 0 to 15) is damaged"));
        }
        let version = u32_at(head, 8);
        if version != VERSION {
            return Err(StorageError::Version { path: path.to_owned(), found: version, supported: VERSION });
        }
        let mark = slots
            .chunks(SECTOR_BYTES)
            .filter(|slot| checksum_of(&slot[..8]) == u32_at(slot, 8))
            .map(|slot| u64::from_le_bytes(slot[..8].try_into().expect("invariant: eight bytes")))
            .max();
        let mark = mark.ok_or_else(|| corrupt("both of its slots (bytes 512 and 1024) are damaged"))?;
        let file = OpenOptions::new()
            .write(true)
            .open(path)
            .map_err(|error| files::io_error("cannot open", path, error))?;
        Ok(Some((Self::new(file), mark)))
    }

    /// Writes the ready file, which must not exist, and makes it durable.
    pub(crate) fn create(path: &Path, mark: u64) -> Result<Self, StorageError> {
        let mut bytes = vec![0; FILE_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        let checksum = checksum_of(&bytes[..12]);
        bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
        for slot in [SECTOR_BYTES, 2 * SECTOR_BYTES] {
            bytes[slot..slot + 12].copy_from_slice(&encode_slot(mark));
        }
        files::write_durably(path, &bytes)?;
        let file = OpenOptions::new()
            .write(true)
            .open(path)
            .map_err(|error| files::io_error("cannot open", path, error))?;
        Ok(Self::new(file))
    }

    fn new(file: File) -> Self {
        Self { file: Arc::new(file), moved: Arc::default() }
    }

    /// For syncing the mark from another thread.
    pub(crate) fn syncer(&self) -> MarkSync {
        MarkSync { file: self.file.clone(), moved: self.moved.clone() }
    }

    /// Notes that the hard state with `sequence` is durable. Costs no fsync.
    pub(crate) fn mark(&self, sequence: u64) -> io::Result<()> {
        let slot = 1 + sequence % 2;
        self.file.write_all_at(&encode_slot(sequence), slot * SECTOR_BYTES as u64)?;
        self.moved.store(true, SeqCst);
        Ok(())
    }
}

fn encode_slot(sequence: u64) -> [u8; 12] {
    let mut slot = [0; 12];
    slot[..8].copy_from_slice(&sequence.to_le_bytes());
    let checksum = checksum_of(&slot[..8]);
    slot[8..].copy_from_slice(&checksum.to_le_bytes());
    slot
}

fn checksum_of(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().expect("invariant: four bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_intact_slot_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = Marker::path(&dir.path().join("log"));
        assert!(Marker::open(&path).unwrap().is_none());
        let marker = Marker::create(&path, 1).unwrap();
        for sequence in 2..6 {
            marker.mark(sequence).unwrap();
            assert_eq!(Marker::open(&path).unwrap().unwrap().1, sequence);
        }
        let mut bytes = fs::read(&path).unwrap();
        bytes[2 * SECTOR_BYTES] ^= 1; // where 5 is
        fs::write(&path, &bytes).unwrap();
        assert_eq!(Marker::open(&path).unwrap().unwrap().1, 4);
        bytes[SECTOR_BYTES] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert!(matches!(Marker::open(&path), Err(StorageError::Corrupt { .. })));
    }

    #[test]
    fn a_damaged_head_or_a_wrong_size_is_corrupt() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.ready");
        Marker::create(&path, 1).unwrap();
        let bytes = fs::read(&path).unwrap();
        for offset in 0..16 {
            let mut damaged = bytes.clone();
            damaged[offset] ^= 1;
            fs::write(&path, &damaged).unwrap();
            assert!(matches!(Marker::open(&path), Err(StorageError::Corrupt { .. })));
        }
        fs::write(&path, b"").unwrap();
        assert!(matches!(Marker::open(&path), Err(StorageError::Corrupt { .. })));
    }
}
