//! Snapshots: the whole state of a machine at one position of the log, in one file.
//!
//! A snapshot is either written here, payload first to last ([`SnapshotStore::begin`]), or received from a
//! peer as the bytes of its file ([`SnapshotStore::receive`]). Both go to an unfinished file that means
//! nothing until it is complete and synced, and checked if it was received; then it takes its name, atomically,
//! and older ones are removed.
//!
//! # Invariants
//! - What [`newest`](SnapshotStore::newest) returns is complete, and every byte of it matched its checksum when it
//!   was opened or received. Reading the payload checks every frame again.
//! - A received file is verified from the first to the last byte before it takes the place of another.
//! - A damaged snapshot is reported and left alone; it is never passed over for an older one.
//! - A handle reads the same snapshot for as long as it lives, also once that has been replaced.
//!
//! What it does not do: know what the payload means, or decide when to take a snapshot.

mod directory;
mod format;
mod memory;
#[cfg(test)]
mod tests;
mod transfer;

#[cfg(any(test, fuzzing))]
pub(super) use format::sealed;

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::StorageError;
use crate::types::{ClusterClock, HistoryEpoch, LogId, Membership, SnapshotMachines};

use super::files::io_error;
pub use directory::SnapshotDir;
pub(super) use directory::{is_complete, is_snapshot};
use format::{Encoder, SnapshotPayload};
pub use memory::MemorySnapshots;
pub(crate) use transfer::{FilePiece, READS_ZSTD, SnapshotPieces};

/// What a snapshot says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMeta {
    /// The last entry whose effect it contains.
    pub log_id: LogId,
    /// The cluster's clocks at that entry. Before version 3 there was one for everything, the log's time.
    pub clock: ClusterClock,
    /// Where the membership stands in the log; none for one that was never logged.
    pub membership_log_id: Option<LogId>,
    /// The membership as of `log_id`.
    pub membership: Membership,
    /// The history that positions of this log belong to; 0 where it is not known.
    pub history: HistoryEpoch,
    /// Most bytes that the state may take; 0 where none was agreed.
    pub quota_bytes: u64,
    /// Whose parts follow, and in which versions. Stored from version 4 on, behind the intents, if there is anything to say.
    #[serde(skip)]
    pub machines: SnapshotMachines,
}

/// The meta data of a snapshot before version 3.
#[derive(Deserialize)]
struct SnapshotMetaV2 {
    log_id: LogId,
    time_ms: u64,
    membership_log_id: Option<LogId>,
    membership: Membership,
}

impl From<SnapshotMetaV2> for SnapshotMeta {
    fn from(meta: SnapshotMetaV2) -> Self {
        let SnapshotMetaV2 { log_id, time_ms, membership_log_id, membership } = meta;
        // Deadlines were in log time.
        let clock = ClusterClock { elapsed_ms: time_ms, ..ClusterClock::default() };
        let (history, quota_bytes) = (HistoryEpoch::default(), 0);
        let machines = SnapshotMachines::default();
        Self { log_id, clock, membership_log_id, membership, history, quota_bytes, machines }
    }
}

/// Where a node keeps its snapshots. See the [module](self) for what all of them promise.
pub trait SnapshotStore: Send + Sync + 'static {
    /// Begins to write a snapshot.
    ///
    /// # Errors
    /// When the file cannot be created.
    fn begin(&self, meta: &SnapshotMeta) -> Result<SnapshotWriter, StorageError>;

    /// Begins to receive the file of a peer's snapshot, which was taken at `log_id`.
    ///
    /// # Errors
    /// When the file cannot be created.
    fn receive(&self, log_id: LogId) -> Result<SnapshotReceiver, StorageError>;

    /// The newest snapshot. The first call verifies the whole file.
    ///
    /// # Errors
    /// [`StorageError::Corrupt`] if it is damaged; an older one is not tried.
    fn newest(&self) -> Result<Option<SnapshotHandle>, StorageError>;
}

/// The bytes of a complete snapshot.
trait Source: Send + Sync {
    /// For error messages.
    fn path(&self) -> &Path;
    fn len_bytes(&self) -> u64;
    /// Reads up to `buffer.len()` bytes; 0 at the end.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;
}

/// A file in the making; removed when dropped.
trait Staging: Send {
    fn path(&self) -> &Path;
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// A view of what was appended, as a source.
    fn source(&self) -> io::Result<Arc<dyn Source>>;
    /// Makes the file durable and gives it its name.
    fn publish(self: Box<Self>, handle: SnapshotHandle) -> Result<SnapshotHandle, StorageError>;
}

/// A complete snapshot. Cheap to clone.
#[derive(Clone)]
pub struct SnapshotHandle {
    source: Arc<dyn Source>,
    meta: Arc<SnapshotMeta>,
}

impl fmt::Debug for SnapshotHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotHandle")
            .field("log_id", &self.meta.log_id)
            .field("len_bytes", &self.len_bytes())
            .finish_non_exhaustive()
    }
}

impl SnapshotHandle {
    /// What the snapshot says about itself.
    pub fn meta(&self) -> &SnapshotMeta {
        &self.meta
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        self.source.path()
    }

    /// Length of the file, in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.source.len_bytes()
    }

    /// Raw bytes of the file from `offset` on, for a peer: `length` of them, or fewer at the end. They are not
    /// checked here; the receiver checks the whole.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read_at(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        let rest = self.len_bytes().saturating_sub(offset);
        let length = length.min(usize::try_from(rest).unwrap_or(usize::MAX));
        let mut bytes = vec![0; length];
        format::read_exact_at(&*self.source, offset, &mut bytes)?;
        Ok(bytes.into())
    }

    /// CRC-32 of the first `length` bytes of the file, which has so many. Blocks.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn crc32_of_first(&self, length: u64) -> io::Result<u32> {
        const READ_BYTES: u64 = 1024 * 1024;
        let mut crc32 = crc32fast::Hasher::new();
        let mut bytes = vec![0; usize::try_from(READ_BYTES.min(length)).unwrap_or(usize::MAX)];
        let mut offset = 0;
        while offset < length {
            let rest = usize::try_from(length - offset).unwrap_or(usize::MAX).min(bytes.len());
            format::read_exact_at(&*self.source, offset, &mut bytes[..rest])?;
            crc32.update(&bytes[..rest]);
            offset += rest as u64;
        }
        Ok(crc32.finalize())
    }

    /// The version of the file, and its payload, each frame checked before any byte of it is given out.
    ///
    /// The reader ends exactly at the end of the payload, after the checksum of the whole file matched. It
    /// fails with [`ErrorKind::InvalidData`] on anything else: damage, truncation, bytes after the end.
    ///
    /// # Errors
    /// When the head cannot be read or is damaged; [`refuse`](Self::refuse) says what an error means.
    pub fn open(&self) -> io::Result<(u32, impl Read + Send + 'static)> {
        SnapshotPayload::open(self.source.clone()).map(|(payload, _)| (payload.version(), payload))
    }

    /// What an error of [`open`](Self::open), or of the reader that it returns, means: damage, a version that this build
    /// does not know, or that the file cannot be read.
    pub(crate) fn refuse(&self, error: io::Error) -> StorageError {
        format::refuse(self.path(), error)
    }

    /// Reads `source` from the first to the last byte and checks all of it.
    fn verified(source: Arc<dyn Source>) -> io::Result<Self> {
        let (mut payload, meta) = SnapshotPayload::open(source.clone())?;
        while payload.next_frame()? {}
        Ok(Self { source, meta: Arc::new(meta) })
    }
}

/// Writes one snapshot. Dropped before [`finish`](Self::finish), it leaves nothing behind.
pub struct SnapshotWriter {
    staging: Box<dyn Staging>,
    encoder: Encoder,
    meta: SnapshotMeta,
}

impl fmt::Debug for SnapshotWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotWriter").field("log_id", &self.meta.log_id).finish_non_exhaustive()
    }
}

impl SnapshotWriter {
    fn begin(mut staging: Box<dyn Staging>, meta: &SnapshotMeta) -> Result<Self, StorageError> {
        let begun = Encoder::begin(meta, &mut |bytes| staging.append(bytes));
        let encoder = begun.map_err(|error| io_error("cannot write", staging.path(), error))?;
        Ok(Self { staging, encoder, meta: meta.clone() })
    }

    /// Makes the snapshot durable and the newest one, and removes older ones.
    ///
    /// # Errors
    /// When the disk fails; then there is no such snapshot, and the ones before are still there.
    pub fn finish(mut self) -> Result<SnapshotHandle, StorageError> {
        let staging = &mut self.staging;
        let finished =
            self.encoder.finish(&mut |bytes| staging.append(bytes)).and_then(|()| staging.source());
        let source = finished.map_err(|error| io_error("cannot write", self.staging.path(), error))?;
        self.staging.publish(SnapshotHandle { source, meta: Arc::new(self.meta) })
    }
}

impl Write for SnapshotWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let staging = &mut self.staging;
        self.encoder.write(bytes, &mut |bytes| staging.append(bytes))?;
        Ok(bytes.len())
    }

    /// Does nothing: only [`finish`](Self::finish) makes anything durable.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Receives the file of a peer's snapshot. Dropped before [`finish`](Self::finish), it leaves nothing behind.
pub struct SnapshotReceiver {
    staging: Box<dyn Staging>,
    log_id: LogId,
    received_bytes: u64,
    /// Of what was received.
    crc32: crc32fast::Hasher,
}

impl fmt::Debug for SnapshotReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotReceiver")
            .field("log_id", &self.log_id)
            .field("received_bytes", &self.received_bytes)
            .finish_non_exhaustive()
    }
}

impl SnapshotReceiver {
    fn begin(staging: Box<dyn Staging>, log_id: LogId) -> Self {
        Self { staging, log_id, received_bytes: 0, crc32: crc32fast::Hasher::new() }
    }

    /// How much of the file is here: the only offset that [`write`](Self::write) takes next.
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes
    }

    /// CRC-32 of what is here: tells a sender whether it is the beginning of the file that it has.
    pub fn crc32(&self) -> u32 {
        self.crc32.clone().finalize()
    }

    /// Adds the piece of the file that begins at `offset`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if it does not follow on the pieces before it; else when the disk fails.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if offset != self.received_bytes {
            let expected = self.received_bytes;
            let message = format!("a piece of a snapshot begins at {offset} instead of {expected}");
            return Err(io::Error::new(ErrorKind::InvalidInput, message));
        }
        self.staging.append(bytes)?;
        self.crc32.update(bytes);
        self.received_bytes += bytes.len() as u64;
        Ok(())
    }

    /// What the snapshot says of itself, once enough of it is here to tell.
    pub(crate) fn head(&self) -> Option<SnapshotMeta> {
        let source = self.staging.source().ok()?;
        format::SnapshotPayload::open(source).ok().map(|(_, meta)| meta)
    }

    /// Verifies the whole file. It is not among the snapshots before it is [placed](ReceivedSnapshot::place):
    /// consensus may yet reject it.
    ///
    /// # Errors
    /// [`StorageError::Io`] of kind [`ErrorKind::InvalidData`] if the file is not a complete snapshot at the
    /// position announced: what was received is dropped, and what was here before is still there.
    pub fn finish(self) -> Result<ReceivedSnapshot, StorageError> {
        let path = self.staging.path().to_owned();
        let verified = self.staging.source().and_then(SnapshotHandle::verified).and_then(|handle| {
            if handle.meta.log_id == self.log_id {
                Ok(handle)
            } else {
                let message = format!("it was taken at {}, not at {}", handle.meta.log_id, self.log_id);
                Err(io::Error::new(ErrorKind::InvalidData, message))
            }
        });
        let handle = verified.map_err(|error| io_error("cannot use the received", &path, error))?;
        Ok(ReceivedSnapshot { staging: self.staging, handle })
    }
}

/// A complete and verified snapshot from a peer, not yet in its place. Dropped, it leaves nothing behind.
pub struct ReceivedSnapshot {
    staging: Box<dyn Staging>,
    handle: SnapshotHandle,
}

impl fmt::Debug for ReceivedSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReceivedSnapshot").field("log_id", &self.handle.meta.log_id).finish_non_exhaustive()
    }
}

impl ReceivedSnapshot {
    /// What the snapshot says about itself.
    pub fn meta(&self) -> &SnapshotMeta {
        self.handle.meta()
    }

    /// Its content, readable before it is placed.
    pub fn handle(&self) -> &SnapshotHandle {
        &self.handle
    }

    /// Makes it durable and the newest snapshot, and removes older ones.
    ///
    /// # Errors
    /// When the disk fails; then there is no such snapshot, and the ones before are still there.
    pub fn place(self) -> Result<SnapshotHandle, StorageError> {
        self.staging.publish(self.handle)
    }
}
