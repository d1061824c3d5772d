//! The log on sled: the default [`LogStore`], a [`DurableLog`] of which the disk is sled.
//!
//! The writer hands sled what is queued in packed [records](record), writes the [`hard_state`], flushes once, and notes the flush
//! in the [ready file](marker).
//!
//! # What sled needs to be safe
//! `sync_file_range` made ineffective ([`power`]), segments of 8 MiB with records up to
//! 64 KiB so that `blobs/` stays empty (checked), no compression, no flush timer, plain inserts, and the
//! dance around opening that [`recovery`] describes.

mod disk;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed;
mod hard_state;
mod layout;
mod log_end;
mod marker;
mod power;
mod read_watch;
mod reader;
mod record;
mod recovery;
mod scan;
#[cfg(test)]
mod tests;
mod words;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::error::StorageError;
use crate::types::{Entry, LogId, Vote};

use super::durable_log::{DurableLog, Duties, Failure, LogStats};
use super::{Closed, Completion, DataDir, DiskWatch, LogBounds, LogStore, Room, StartProgress};
use disk::Disk;
pub use power::ensure_power_safe;
pub(super) use recovery::is_sleds;

/// Bytes of records between two looks into `blobs/`.
const DISK_BYTES_BETWEEN_BLOB_CHECKS: usize = 64 * 1024 * 1024;

/// Called before everything the writer does to sled; see [`SledOptions::observer`].
#[doc(hidden)]
pub type Observer = Arc<dyn Fn(DiskEvent<'_>) -> io::Result<()> + Send + Sync>;

/// What the writer is about to do to sled. A crash leaves a prefix of these.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskEvent<'a> {
    /// Insert into the `log` tree.
    Insert(&'a [u8], &'a [u8]),
    /// Remove from the `log` tree.
    Remove(&'a [u8]),
    /// Replace the hard state.
    HardState(&'a [u8]),
    /// Flush what came before.
    Flush,
}

/// Settings of a [`SledStore`].
#[derive(Clone)]
pub struct SledOptions {
    /// Memory for the newest entries, in bytes. Entries that are not yet durable may exceed it. Default: 16 MiB.
    pub tail_bytes: usize,
    /// Memory for sled's page cache, in bytes. Default: 8 MiB. Only members that lag by more than the tail read from it.
    pub cache_bytes: u64,
    /// A write to the disk that takes longer than this has hung; a step of opening or closing may take 20 times as
    /// long. Default: 30 s.
    pub flush_watchdog: Duration,
    /// Called once when the store fails, on the thread that noticed, before the completions that fail with
    /// it. The default logs the reason, and aborts the process if the writer hangs: a hung flush cannot be
    /// cancelled, and it may hold up an orderly exit for ever.
    pub on_failure: Arc<dyn Fn(&Failure) + Send + Sync>,
    /// Is told how far opening is. The default tells nobody.
    pub progress: StartProgress,
    /// Sees everything that is done to sled; an error counts as sled's. For fault injection.
    #[doc(hidden)]
    pub observer: Option<Observer>,
}

impl Default for SledOptions {
    fn default() -> Self {
        Self {
            tail_bytes: 16 * 1024 * 1024,
            cache_bytes: 8 * 1024 * 1024,
            flush_watchdog: Duration::from_secs(30),
            on_failure: Arc::new(|failure| {
                tracing::error!(reason = failure.reason, "the log has failed; this node must stop");
                if failure.hung {
                    crate::logging::flush();
                    std::process::abort();
                }
            }),
            progress: StartProgress::default(),
            observer: None,
        }
    }
}

impl fmt::Debug for SledOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SledOptions")
            .field("tail_bytes", &self.tail_bytes)
            .field("cache_bytes", &self.cache_bytes)
            .field("flush_watchdog", &self.flush_watchdog)
            .finish_non_exhaustive()
    }
}

/// The durable log of a node, on sled. See the [module](self).
///
/// Dropping it writes and flushes what is queued, stops its threads and releases sled's lock, and then that of its data
/// directory.
pub struct SledStore {
    log: DurableLog<Disk>,
    directory: PathBuf,
}

impl fmt::Debug for SledStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SledStore").field("directory", &self.directory).finish_non_exhaustive()
    }
}

impl SledStore {
    /// Opens the log in `directory`, or creates it. Beside the directory there is its ready file,
    /// `<directory>.ready`.
    ///
    /// Reads and verifies the whole log: what has not been purged.
    ///
    /// # Errors
    /// [`StorageError::Lost`] if the log existed and is gone, [`StorageError::Corrupt`] if it holds anything
    /// that was not written there, [`StorageError::InUse`] if another store has it open.
    pub fn open(directory: &Path, options: SledOptions) -> Result<Self, StorageError> {
        Self::open_with(directory, options, None)
    }

    fn open_with(
        directory: &Path,
        options: SledOptions,
        room: Option<Arc<Room>>,
    ) -> Result<Self, StorageError> {
        let duties =
            Duties { flush_watchdog: options.flush_watchdog, on_failure: options.on_failure.clone(), room };
        let log = DurableLog::open(directory, duties, |progress, stats| {
            recovery::open(directory, &options, stats.clone(), progress)
        })?;
        Ok(Self { log, directory: directory.to_owned() })
    }

    /// Opens the log of a data directory, or creates it, and has the directory note that it has one. The directory stays locked
    /// for as long as the log is open. If there is a `room`, it is looked at before every batch.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_in(
        dir: DataDir,
        options: SledOptions,
        room: Option<Arc<Room>>,
    ) -> Result<Self, StorageError> {
        let mut store = Self::open_with(&dir.log_dir(), options, room)?;
        dir.record_log()?;
        store.log.keep_locked(dir);
        Ok(store)
    }
}

impl LogStore for SledStore {
    fn bounds(&self) -> LogBounds {
        self.log.bounds()
    }

    fn vote(&self) -> Option<Vote> {
        self.log.vote()
    }

    fn committed(&self) -> Option<LogId> {
        self.log.committed()
    }

    fn read(&self, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        self.log.read(start, end, max_bytes)
    }

    fn append(&self, entries: Vec<Entry>, done: Completion) {
        self.log.append(entries, done);
    }

    fn save_vote(&self, vote: Vote, done: Completion) {
        self.log.save_vote(vote, done);
    }

    fn save_committed(&self, committed: Option<LogId>) {
        self.log.save_committed(committed);
    }

    fn truncate(&self, last: Option<LogId>, done: Completion) {
        self.log.truncate(last, done);
    }

    fn purge(&self, upto: LogId, done: Completion) {
        self.log.purge(upto, done);
    }

    fn stats(&self) -> Option<&Arc<LogStats>> {
        self.log.stats()
    }

    fn disk_bytes(&self) -> io::Result<u64> {
        self.log.disk_bytes()
    }

    fn watch_disk(&self, stall: Option<Duration>) -> DiskWatch {
        self.log.watch_disk(stall)
    }

    fn on_closed(&self, closed: Closed) {
        self.log.on_closed(closed);
    }
}
