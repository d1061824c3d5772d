//! What a node must not forget: its log and vote, its snapshots, and who it is.
//!
//! A store knows nothing of Raft's rules. It keeps entries in order and says when they are durable. At the first sign that
//! it cannot do so, it stops for good.
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
//! # What is where
//! [`SledStore`] keeps the log on disk. What it does for that, sled or not, is in `durable_log`: queue, group commit, watchdog, the newest
//! entries in memory; what is true of sled alone is in `sled`, and only that folder names the crate. [`MemoryStore`] is for
//! simulation. Both pass the [`conformance`] suite, and so can yours. [`SnapshotDir`] and [`MemorySnapshots`] are the same pair for snapshots. [`DataDir`] locks a data
//! directory and says whose it is; open it first. [`DiskWatch`] tells whether the disk can take more. `docs/FORMAT.md` describes every byte on disk.
//!
//! What it does not do: replicate, compare terms, decide what may be truncated.

pub mod conformance;
#[cfg_attr(not(feature = "sled"), allow(dead_code, unused_imports))] // its disk is sled, or one of a test
mod durable_log;
mod files;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed;
mod identity;
pub(crate) mod lease;
mod memory;
mod progress;
pub(crate) mod segments;
#[cfg(feature = "sled")]
mod sled;
mod snapshots;
mod space;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::types::{Entry, LogId, Vote};

#[cfg(feature = "sled")]
use self::sled::is_sleds as is_of_a_log;
#[cfg(feature = "sled")]
#[doc(hidden)]
pub use self::sled::{DiskEvent, Observer};
#[cfg(feature = "sled")]
pub use self::sled::{SledOptions, SledStore, ensure_power_safe};
pub use durable_log::{FLUSH_BUCKETS_US, Failure, LogStats};
pub(crate) use files::{create_directory, is_full, write_durably};
pub use identity::{DataDir, Identity};
pub use memory::{MemoryDisk, MemoryStore, SyncMode};
pub use progress::{StartProgress, StartStep, StartedSoFar};
pub(crate) use snapshots::{FilePiece, READS_ZSTD, SnapshotPieces};
pub use snapshots::{
    MemorySnapshots, ReceivedSnapshot, SnapshotDir, SnapshotHandle, SnapshotMeta, SnapshotReceiver,
    SnapshotStore, SnapshotWriter,
};
pub(crate) use space::file_system_bytes;
pub use space::{Attendant, DiskChanges, DiskState, DiskStatus, DiskWatch, Origin, Room, Taken};

/// Whether a file in the directory of a log is part of one. Without a store that knows its own, all are.
#[cfg(not(feature = "sled"))]
fn is_of_a_log(_: &std::path::Path) -> bool {
    true
}

/// Called exactly once when a write is durable, or has failed for good.
pub type Completion = Box<dyn FnOnce(io::Result<()>) + Send + 'static>;

/// Called once when a store is closed, and what it held can be opened again.
pub type Closed = Box<dyn FnOnce() + Send + 'static>;

/// What a store holds at the moment of asking, entries that are not yet durable included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogBounds {
    /// Everything up to and including this position has been purged.
    pub purged: Option<LogId>,
    /// The last entry, or `purged` when there is none after it.
    pub last: Option<LogId>,
}

/// The durable log of one node. See the [module](self) for what all of them promise, and [`conformance`] for how to check
/// that one does.
///
/// Every method may be called from an asynchronous task: none waits for a disk write. Only `read`
/// may touch the disk, for entries that are no longer in the in-memory tail, and so may `disk_bytes`. A completion may be called
/// on any thread, also within the call. A write that does not fit (a hole, another entry where one is named) completes with an
/// error, changes nothing that shows, and is final like any other failure. Dropping the store writes what is queued first.
///
/// # Beyond the log
/// The last four methods tell of the disk under it. A store in memory has none, and what they do by default is right for it. A store
/// with a disk implements all of them: without [`watch_disk`](Self::watch_disk) a node goes on taking writes while its disk
/// is full or hangs, and without [`on_closed`](Self::on_closed) it seems to have stopped while the disk is still in use. A
/// store that wraps another passes them on.
pub trait LogStore: Send + Sync + 'static {
    /// The present bounds.
    fn bounds(&self) -> LogBounds;

    /// The newest vote submitted, or recovered at open.
    fn vote(&self) -> Option<Vote>;

    /// The newest committed position submitted, or recovered at open. After opening it may lag behind, and is `None` or a
    /// position that was saved: it rides along with the next write and never causes one. One that was saved beyond the end of
    /// the log is not recovered; the last before it that was within is.
    fn committed(&self) -> Option<LogId>;

    /// Entries from `start` (inclusive) to `end` (exclusive) that the store holds, in order and without a
    /// hole. They take no more than `max_bytes` by [`Entry::size_bytes`], but there is at least one if the store holds any.
    /// Purged entries at the beginning and absent ones at the end are left out. A read beside a truncation sees the log of
    /// before or of after it, never a mixture.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] for an entry whose checksum does not match, or a hole.
    fn read(&self, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>>;

    /// Appends `entries`, whose indexes follow the last entry without a gap, and whose terms do not fall. An empty store that has
    /// purged nothing accepts index 0 only.
    fn append(&self, entries: Vec<Entry>, done: Completion);

    /// Replaces the vote.
    fn save_vote(&self, vote: Vote, done: Completion);

    /// Notes how far the log is known to be committed. Not awaited and never flushed for its own sake.
    fn save_committed(&self, committed: Option<LogId>);

    /// Removes every entry after `last`, or all of them; purged ones stay purged. Later appends overwrite what was removed.
    /// Where there is nothing after `last`, nothing is done. That the log has another entry in the place of `last` is an
    /// error, told by the completion at the latest.
    fn truncate(&self, last: Option<LogId>, done: Completion);

    /// Removes every entry up to and including `upto`, and remembers `upto`. It may lie beyond the last
    /// entry: then the log is empty afterwards and continues at `upto.index + 1`. Where `upto` is purged already, nothing is
    /// done.
    fn purge(&self, upto: LogId, done: Completion);

    /// What it has counted since it was opened: flushes, entries, bytes, and whether it has failed.
    fn stats(&self) -> Option<&Arc<LogStats>> {
        None
    }

    /// Bytes that the log takes on the disk, what is purged and not yet freed included.
    ///
    /// # Errors
    /// When the disk does not say.
    fn disk_bytes(&self) -> io::Result<u64> {
        Ok(0)
    }

    /// A view of the disk, which must not keep the store open: how much [`Room`] there is, and for how long the present write
    /// has been under way. One that takes longer than `stall` has stalled.
    fn watch_disk(&self, stall: Option<Duration>) -> DiskWatch {
        let _ = stall;
        DiskWatch::default()
    }

    /// Has `closed` called once the store is dropped and has let go of all that another one would need: files, locks, threads that
    /// use them. After a failure of the disk a store may keep some of that for ever, rather than touch the disk again, and calls
    /// it nevertheless.
    fn on_closed(&self, closed: Closed) {
        closed();
    }
}
