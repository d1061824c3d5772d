//! What a node must not forget: its log and vote, its snapshots, and who it is.
//!
//! The only room that names sled. It knows nothing of Raft's rules: it keeps entries in order,
//! says when they are durable, and stops for good at the first sign that it cannot.
//!
//! # Promises of every [`LogStore`]
//!
//! 1. Writes take effect in the order in which they were submitted: votes, appends, truncations and
//!    purges go through one queue. After a crash a prefix of them survives, and it contains every
//!    write whose [`Completion`] was called with `Ok`.
//! 2. An entry can be read as soon as [`LogStore::append`] has returned, before it is durable.
//! 3. A completion is called exactly once, after the fsync that covers its write, never before.
//! 4. After one failed write every later one fails too, with the first error. Nothing is retried: a
//!    retried fsync may report success for data the kernel has already dropped.
//!
//! What it does not do: replicate, compare terms, decide what may be truncated.

use std::io;

use crate::types::{Entry, LogId, Vote};

/// Called exactly once when a write is durable, or has failed for good.
pub type Completion = Box<dyn FnOnce(io::Result<()>) + Send + 'static>;

/// What a store holds at the moment of asking, entries that are not yet durable included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogBounds {
    /// Everything up to and including this position has been purged.
    pub purged: Option<LogId>,
    /// The last entry, or `purged` when there is none after it.
    pub last: Option<LogId>,
}

/// The durable log of one node. See the [module](self) for what all of them promise.
///
/// Every method may be called from an asynchronous task: none waits for a disk write. Only `read`
/// may touch the disk, for entries that are no longer in the in-memory tail.
pub trait LogStore: Send + Sync + 'static {
    /// The present bounds.
    fn bounds(&self) -> LogBounds;

    /// The newest vote submitted, or recovered at open.
    fn vote(&self) -> Option<Vote>;

    /// The newest committed position submitted, or recovered at open. May lag behind after a crash:
    /// it rides along with the next flush and never causes one.
    fn committed(&self) -> Option<LogId>;

    /// Entries from `start` (inclusive) to `end` (exclusive) that the store holds, in order and without a
    /// hole. Stops after `max_bytes`, but returns at least one entry if there is one. Purged entries
    /// at the beginning and absent ones at the end are left out.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] for an entry whose checksum does not match, or a hole.
    fn read(&self, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>>;

    /// Appends `entries`, whose indexes follow the last entry without a gap. An empty store that has
    /// purged nothing accepts index 0 only.
    fn append(&self, entries: Vec<Entry>, done: Completion);

    /// Replaces the vote.
    fn save_vote(&self, vote: Vote, done: Completion);

    /// Notes how far the log is known to be committed. Not awaited and never flushed for its own sake.
    fn save_committed(&self, committed: Option<LogId>);

    /// Removes every entry with an index of at least `from`. Later appends overwrite them.
    fn truncate(&self, from: u64, done: Completion);

    /// Removes every entry up to and including `upto`, and remembers `upto`. It may lie beyond the last
    /// entry: then the log is empty afterwards and continues at `upto.index + 1`.
    fn purge(&self, upto: LogId, done: Completion);
}

// ---- temporary stand-ins, replaced by the storage room ----
use crate::error::StorageError;
use crate::types::Membership;
use bytes::Bytes;
/// x
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotMeta {
    /// x
    pub log_id: LogId,
    /// x
    pub time_ms: u64,
    /// x
    pub membership_log_id: Option<LogId>,
    /// x
    pub membership: Membership,
}
/// x
#[derive(Clone, Debug)]
pub struct SnapshotHandle;
impl SnapshotHandle {
    /// x
    pub fn meta(&self) -> &SnapshotMeta {
        unimplemented!()
    }
    /// x
    pub fn path(&self) -> std::path::PathBuf {
        unimplemented!()
    }
    /// x
    pub fn len_bytes(&self) -> u64 {
        0
    }
    /// x
    pub fn read_at(&self, _o: u64, _l: usize) -> io::Result<Bytes> {
        unimplemented!()
    }
    /// x
    pub fn open(&self) -> io::Result<Box<dyn io::Read + Send>> {
        unimplemented!()
    }
}
/// x
pub struct SnapshotWriter;
impl io::Write for SnapshotWriter {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        unimplemented!()
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
impl SnapshotWriter {
    /// x
    pub fn finish(self) -> Result<SnapshotHandle, StorageError> {
        unimplemented!()
    }
}
/// x
pub struct SnapshotReceiver;
impl SnapshotReceiver {
    /// x
    pub fn write(&mut self, _: &[u8]) -> Result<(), StorageError> {
        unimplemented!()
    }
    /// x
    pub fn finish(self) -> Result<ReceivedSnapshot, StorageError> {
        unimplemented!()
    }
}
/// x
pub struct ReceivedSnapshot;
impl ReceivedSnapshot {
    /// x
    pub fn meta(&self) -> &SnapshotMeta {
        unimplemented!()
    }
}
/// x
pub trait SnapshotStore: Send + Sync + 'static {
    /// x
    fn begin(&self, meta: SnapshotMeta) -> Result<SnapshotWriter, StorageError>;
    /// x
    fn receive(&self, log_id: LogId) -> Result<SnapshotReceiver, StorageError>;
    /// x
    fn place(&self, received: ReceivedSnapshot) -> Result<SnapshotHandle, StorageError>;
    /// x
    fn newest(&self) -> Result<Option<SnapshotHandle>, StorageError>;
}
/// x
#[derive(Debug)]
pub struct DataDir;
/// x
pub struct Identity {
    /// x
    pub incarnation: crate::types::Incarnation,
}
impl DataDir {
    /// x
    pub fn open(_p: &std::path::Path, _c: &str, _n: u64) -> Result<Self, StorageError> {
        unimplemented!()
    }
    /// x
    pub fn identity(&self) -> &Identity {
        unimplemented!()
    }
    /// x
    pub fn log_dir(&self) -> std::path::PathBuf {
        unimplemented!()
    }
    /// x
    pub fn snapshot_dir(&self) -> std::path::PathBuf {
        unimplemented!()
    }
}
/// x
#[derive(Default)]
pub struct SledOptions {
    /// x
    pub tail_bytes: usize,
    /// x
    pub flush_watchdog: std::time::Duration,
}
/// x
pub struct SledStore;
impl SledStore {
    /// x
    pub fn open(_p: &std::path::Path, _o: SledOptions) -> Result<Self, StorageError> {
        unimplemented!()
    }
}
impl LogStore for SledStore {
    fn bounds(&self) -> LogBounds {
        unimplemented!()
    }
    fn vote(&self) -> Option<Vote> {
        unimplemented!()
    }
    fn committed(&self) -> Option<LogId> {
        unimplemented!()
    }
    fn read(&self, _: u64, _: u64, _: usize) -> io::Result<Vec<Entry>> {
        unimplemented!()
    }
    fn append(&self, _: Vec<Entry>, _: Completion) {}
    fn save_vote(&self, _: Vote, _: Completion) {}
    fn save_committed(&self, _: Option<LogId>) {}
    fn truncate(&self, _: u64, _: Completion) {}
    fn purge(&self, _: LogId, _: Completion) {}
}
/// x
pub struct SnapshotDir;
impl SnapshotDir {
    /// x
    pub fn open(_p: &std::path::Path) -> Result<Self, StorageError> {
        unimplemented!()
    }
}
impl SnapshotStore for SnapshotDir {
    fn begin(&self, _: SnapshotMeta) -> Result<SnapshotWriter, StorageError> {
        unimplemented!()
    }
    fn receive(&self, _: LogId) -> Result<SnapshotReceiver, StorageError> {
        unimplemented!()
    }
    fn place(&self, _: ReceivedSnapshot) -> Result<SnapshotHandle, StorageError> {
        unimplemented!()
    }
    fn newest(&self) -> Result<Option<SnapshotHandle>, StorageError> {
        unimplemented!()
    }
}
