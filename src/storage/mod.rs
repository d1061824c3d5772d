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
use std::sync::{Arc, Mutex};
/// x
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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
pub struct SnapshotHandle {
    meta: SnapshotMeta,
    bytes: Bytes,
}
impl SnapshotHandle {
    /// x
    pub fn meta(&self) -> &SnapshotMeta {
        &self.meta
    }
    /// x
    pub fn path(&self) -> std::path::PathBuf {
        std::path::PathBuf::new()
    }
    /// x
    pub fn len_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }
    /// x
    pub fn read_at(&self, o: u64, l: usize) -> io::Result<Bytes> {
        let o = o as usize;
        Ok(self.bytes.slice(o..(o + l).min(self.bytes.len())))
    }
    /// x
    pub fn open(&self) -> io::Result<Box<dyn io::Read + Send>> {
        let mut r = &self.bytes[..];
        let n = u32::from_le_bytes(r[..4].try_into().unwrap()) as usize;
        r = &r[4 + n..];
        Ok(Box::new(io::Cursor::new(Bytes::copy_from_slice(r))))
    }
}
/// x
pub struct SnapshotWriter {
    meta: SnapshotMeta,
    bytes: Vec<u8>,
    store: MemorySnapshots,
}
impl io::Write for SnapshotWriter {
    fn write(&mut self, b: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(b);
        Ok(b.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
impl SnapshotWriter {
    /// x
    pub fn finish(self) -> Result<SnapshotHandle, StorageError> {
        let h = SnapshotHandle { meta: self.meta, bytes: self.bytes.into() };
        self.store.put(h.clone());
        Ok(h)
    }
}
impl std::fmt::Debug for SnapshotWriter {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        Ok(())
    }
}
/// x
pub struct SnapshotReceiver(Vec<u8>);
impl SnapshotReceiver {
    /// x
    pub fn write(&mut self, b: &[u8]) -> Result<(), StorageError> {
        self.0.extend_from_slice(b);
        Ok(())
    }
    /// x
    pub fn finish(self) -> Result<ReceivedSnapshot, StorageError> {
        let n = u32::from_le_bytes(self.0[..4].try_into().unwrap()) as usize;
        let meta =
            bincode::serde::decode_from_slice(&self.0[4..4 + n], bincode::config::standard()).unwrap().0;
        Ok(ReceivedSnapshot(SnapshotHandle { meta, bytes: self.0.into() }))
    }
}
/// x
pub struct ReceivedSnapshot(SnapshotHandle);
impl ReceivedSnapshot {
    /// x
    pub fn meta(&self) -> &SnapshotMeta {
        &self.0.meta
    }
}
/// x
#[derive(Clone, Default)]
pub struct MemorySnapshots(Arc<Mutex<Option<SnapshotHandle>>>);
impl MemorySnapshots {
    fn put(&self, h: SnapshotHandle) {
        let mut s = self.0.lock().unwrap();
        if s.as_ref().is_none_or(|o| o.meta.log_id < h.meta.log_id) {
            *s = Some(h);
        }
    }
}
impl SnapshotStore for MemorySnapshots {
    fn begin(&self, meta: SnapshotMeta) -> Result<SnapshotWriter, StorageError> {
        let m = bincode::serde::encode_to_vec(&meta, bincode::config::standard()).unwrap();
        let mut bytes = (m.len() as u32).to_le_bytes().to_vec();
        bytes.extend(m);
        Ok(SnapshotWriter { meta, bytes, store: self.clone() })
    }
    fn receive(&self, _: LogId) -> Result<SnapshotReceiver, StorageError> {
        Ok(SnapshotReceiver(vec![]))
    }
    fn place(&self, r: ReceivedSnapshot) -> Result<SnapshotHandle, StorageError> {
        self.put(r.0.clone());
        Ok(r.0)
    }
    fn newest(&self) -> Result<Option<SnapshotHandle>, StorageError> {
        Ok(self.0.lock().unwrap().clone())
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
