//! The log on sled: the default [`LogStore`].
//!
//! # The route of a write
//! `append` puts the entries into the in-memory [`tail`] and a queue, and returns; from then on they can be
//! read. The one [`writer`] takes all that is queued, hands it to sled in packed [records](record),
//! writes the [`ledger`], flushes once, notes the flush in the [ready file](marker), and calls the completions.
//! So one fsync serves all who wait, and its cost does not grow with their number.
//!
//! # Invariants
//! - What a completion has confirmed is on the disk, in a form that [`recovery`] accepts.
//! - The in-memory state is what the disk will hold once the queue is written; readers never see an entry
//!   that a later truncation has removed, nor a mixture of before and after it.
//! - After any failure (IO error, panic, a flush that hangs, a write out of order) the store is *failed* for
//!   good: nothing more is confirmed, nothing new accepted, nothing retried. Entries accepted before stay
//!   readable, although they may not be durable; the node has to stop.
//!
//! # What sled needs to be safe
//! `sync_file_range` made ineffective ([`power`]), segments of 8 MiB with records up to
//! 64 KiB so that `blobs/` stays empty (checked), no compression, no flush timer, plain inserts, and the
//! dance around opening that [`recovery`] describes.

mod disk;
mod layout;
mod ledger;
mod log_end;
mod marker;
mod power;
mod read;
mod read_watch;
mod record;
mod recovery;
mod scan;
mod stats;
mod tail;
#[cfg(test)]
mod tests;
mod words;
mod writer;

use std::any::Any;
use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::error::StorageError;
use crate::types::{Entry, LogId, Vote};

use super::space::Attendant;
use super::{Completion, DataDir, DiskWatch, LogBounds, LogStore, Room, StartProgress, files};
use disk::Trees;
use ledger::first_index;
pub use power::ensure_power_safe;
pub use stats::{FLUSH_BUCKETS_US, LogStats};
use tail::Tail;
use writer::{Change, Phase, Progress, Queue, Write};

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
    /// Replace the ledger.
    Ledger(&'a [u8]),
    /// Flush what came before.
    Flush,
}

/// Why a store failed for good.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failure {
    /// What happened.
    pub reason: String,
    /// Whether the writer hangs in a system call or in sled. Then only the end of the process helps.
    pub hung: bool,
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
/// Dropping it writes and flushes what is queued, stops its threads and releases sled's lock.
pub struct SledStore {
    shared: Arc<Shared>,
    /// Gone only while opening or closing.
    trees: Option<Trees>,
    directory: PathBuf,
    watchdog: Option<JoinHandle<()>>,
    /// The writer, and what ends when it does.
    threads: Vec<JoinHandle<()>>,
    /// Looks after the room of the disk, if anybody does.
    attendant: Option<Attendant>,
}

impl fmt::Debug for SledStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SledStore").field("directory", &self.directory).finish_non_exhaustive()
    }
}

/// What the threads of a store have in common.
pub(crate) struct Shared {
    state: RwLock<State>,
    queue: Queue,
    progress: Progress,
    stats: Arc<LogStats>,
    /// Looked at before each batch.
    room: Option<Arc<Room>>,
    on_failure: Arc<dyn Fn(&Failure) + Send + Sync>,
}

/// The log as of the last submission.
struct State {
    bounds: LogBounds,
    vote: Option<Vote>,
    committed: Option<LogId>,
    tail: Tail,
    /// Counts truncations, so that a read that meets one starts over.
    truncations: u64,
    /// Of the newest submission.
    ticket: u64,
    failure: Option<String>,
    /// sled must not be touched again, not even to close it.
    abandoned: bool,
}

impl State {
    fn first_index(&self) -> u64 {
        first_index(self.bounds.purged)
    }

    fn next_index(&self) -> u64 {
        first_index(self.bounds.last)
    }

    /// What is at `index`, as far as that is known without the disk.
    fn position(&self, index: u64) -> Option<LogId> {
        let ends = [self.bounds.last, self.bounds.purged];
        let end = ends.into_iter().flatten().find(|position| position.index == index);
        end.or_else(|| self.tail.log_id(index))
    }
}

impl Shared {
    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().expect("invariant: no panic under this lock")
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().expect("invariant: no panic under this lock")
    }

    fn committed(&self) -> Option<LogId> {
        self.read().committed
    }

    /// Notes that writes up to `ticket` are durable. Returns the error if the store has failed meanwhile.
    fn settle(&self, ticket: u64) -> Option<io::Error> {
        let mut state = self.write();
        if let Some(reason) = &state.failure {
            return Some(failed(reason));
        }
        state.tail.settle(ticket);
        None
    }

    /// Fails the store for good: first the writes `in_flight`, then all that is queued. Returns the error to
    /// report, which is that of the first failure.
    fn fail(&self, reason: &str, cause: Cause, in_flight: Vec<Completion>) -> io::Error {
        let report = |hung| (self.on_failure)(&Failure { reason: reason.to_owned(), hung });
        if cause == Cause::Hung {
            // Before any lock: its holder may be waiting for the same disk.
            self.stats.failed.store(true, Relaxed);
            report(true);
        }
        let (first, error) = {
            let mut state = self.write();
            let first = state.failure.is_none();
            state.abandoned |= cause != Cause::Misuse;
            (first, failed(state.failure.get_or_insert_with(|| reason.to_owned())))
        };
        self.stats.failed.store(true, Relaxed);
        if first && matches!(cause, Cause::Misuse | Cause::Disk) {
            report(false);
        }
        let queued = self.queue.drain().into_iter().map(|write| write.done);
        // What a completion does with an error, even panic, changes nothing any more.
        let _ = writer::complete(in_flight.into_iter().chain(queued), Some(&error));
        error
    }
}

/// What made a store fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// A write that does not fit the log: sled is well.
    Misuse,
    /// The writer met an error or panicked.
    Disk,
    /// The writer hangs.
    Hung,
    /// It came back after that had been reported.
    Late,
}

fn failed(reason: &str) -> io::Error {
    io::Error::other(format!("the log has failed for good: {reason}"))
}

/// The message of a caught panic.
fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
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
        let stats = Arc::new(LogStats::default());
        let state = State {
            bounds: LogBounds::default(),
            vote: None,
            committed: None,
            tail: Tail::new(0),
            truncations: 0,
            ticket: 0,
            failure: None,
            abandoned: false,
        };
        let shared = Arc::new(Shared {
            state: RwLock::new(state),
            queue: Queue::default(),
            progress: Progress::new(),
            stats: stats.clone(),
            room,
            on_failure: options.on_failure.clone(),
        });
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(body)
                .map_err(|error| files::io_error("cannot start a thread for", directory, error))
        };
        // If anything fails from here on, dropping the store stops what has been started.
        let mut store = Self {
            shared: shared.clone(),
            trees: None,
            directory: directory.to_owned(),
            watchdog: None,
            threads: Vec::new(),
            attendant: None,
        };
        let (watched, limit) = (shared.clone(), options.flush_watchdog);
        store.watchdog = Some(spawn("log-watchdog", Box::new(move || writer::supervise(&watched, limit)))?);

        let opened = recovery::open(directory, &options, stats, &shared.progress)?;
        let recovery::Opened { disk, mark_sync, trees, ledger, tail } = opened;
        store.trees = Some(trees);
        if shared.progress.end().is_err() {
            std::mem::forget(disk);
            return Err(recovery::too_late(directory));
        }
        if let Some(room) = &shared.room {
            store.attendant = Some(room.attend(&directory.join("db"))?);
        }
        {
            let mut state = shared.write();
            state.bounds = LogBounds { purged: ledger.purged, last: ledger.last };
            (state.vote, state.committed, state.tail) = (ledger.vote, ledger.committed, tail);
        }
        let for_writer = shared.clone();
        store.threads.push(spawn("log-writer", Box::new(move || writer::run(&for_writer, disk)))?);
        let sync_marks = Box::new(move || writer::sync_marks(&shared, &mark_sync));
        store.threads.push(spawn("log-mark-sync", sync_marks)?);
        Ok(store)
    }

    fn log(&self) -> &sled::Tree {
        &self.trees.as_ref().expect("invariant: an open store has its trees").log
    }

    /// Opens the log of a data directory, or creates it, and has the directory note that it has one.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_in(dir: &DataDir, options: SledOptions) -> Result<Self, StorageError> {
        Self::open_in_room(dir, options, None)
    }

    /// [`open_in`](Self::open_in) with a look at `room` before every batch.
    pub(crate) fn open_in_room(
        dir: &DataDir,
        options: SledOptions,
        room: Option<Arc<Room>>,
    ) -> Result<Self, StorageError> {
        let store = Self::open_with(&dir.log_dir(), options, room)?;
        dir.record_log()?;
        Ok(store)
    }

    /// A view of the disk under this log. A write that takes longer than `stall` has stalled.
    pub fn watch_disk(&self, stall: Option<Duration>) -> DiskWatch {
        let (shared, stats) = (self.shared.clone(), self.shared.stats.clone());
        let queued = move || stats.queued_bytes.load(Relaxed);
        DiskWatch::new(self.shared.room.clone(), move || shared.progress.busy_for(), queued, stall)
    }

    /// Counters for metrics.
    pub fn stats(&self) -> &Arc<LogStats> {
        &self.shared.stats
    }

    /// Bytes the log takes on the disk.
    ///
    /// # Errors
    /// When the directory can not be listed.
    pub fn disk_bytes(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        /// What `st_blocks` counts, whatever the file system's own blocks are.
        const BLOCK_BYTES: u64 = 512;
        let mut bytes = 0;
        for directory in [self.directory.clone(), disk::blobs(&self.directory)] {
            for file in std::fs::read_dir(directory)? {
                match file?.metadata() {
                    Ok(metadata) => bytes += metadata.blocks() * BLOCK_BYTES,
                    Err(error) if error.kind() == ErrorKind::NotFound => {} // sled removed it meanwhile
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(bytes)
    }

    /// Applies a write to the in-memory state and queues it, both under one lock so that their orders agree.
    fn submit(
        &self,
        bytes: usize,
        done: Completion,
        apply: impl FnOnce(&mut State, u64) -> Result<Change, String>,
    ) {
        let mut state = self.shared.write();
        if let Some(reason) = &state.failure {
            let error = failed(reason);
            drop(state);
            return done(Err(error));
        }
        let ticket = state.ticket + 1;
        match apply(&mut state, ticket) {
            Ok(change) => {
                state.ticket = ticket;
                self.shared.stats.queued_bytes.fetch_add(bytes as u64, Relaxed);
                self.shared.stats.queued_writes.fetch_add(1, Relaxed);
                self.shared.queue.push(Write { ticket, change, bytes, done });
            }
            Err(reason) => {
                drop(state);
                self.shared.fail(&reason, Cause::Misuse, vec![done]);
            }
        }
    }
}

impl LogStore for SledStore {
    fn bounds(&self) -> LogBounds {
        self.shared.read().bounds
    }

    fn vote(&self) -> Option<Vote> {
        self.shared.read().vote
    }

    fn committed(&self) -> Option<LogId> {
        self.shared.committed()
    }

    fn read(&self, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        read::read(&self.shared, self.log(), &self.directory, (start, end), max_bytes)
    }

    fn append(&self, entries: Vec<Entry>, done: Completion) {
        let bytes = entries.iter().map(Entry::size_bytes).sum();
        self.submit(bytes, done, |state, ticket| {
            let expected = state.next_index();
            for (entry, index) in entries.iter().zip(expected..) {
                if entry.log_id.index != index {
                    return Err(format!("entry {} appended where {index} should be", entry.log_id));
                }
            }
            let Some(last) = entries.last() else { return Ok(Change::Nothing) };
            state.bounds.last = Some(last.log_id);
            for entry in &entries {
                state.tail.push(ticket, entry.clone());
            }
            Ok(Change::Append(entries))
        });
    }

    fn save_vote(&self, vote: Vote, done: Completion) {
        self.submit(0, done, |state, _| {
            state.vote = Some(vote);
            Ok(Change::SaveVote(vote))
        });
    }

    fn save_committed(&self, committed: Option<LogId>) {
        self.shared.write().committed = committed;
    }

    fn truncate(&self, last: Option<LogId>, done: Completion) {
        self.submit(0, done, |state, _| {
            // What is not in memory, the writer looks at: here the disk must not be waited for.
            if let Some(last) = last
                && let Some(found) = state.position(last.index)
                && found != last
            {
                return Err(format!("truncated after {last}, which is {found}"));
            }
            let from = first_index(last).max(state.first_index());
            if from >= state.next_index() {
                return Ok(Change::Nothing);
            }
            let last = if from == state.first_index() { state.bounds.purged } else { last };
            state.bounds.last = last;
            state.tail.truncate(from);
            state.truncations += 1;
            Ok(Change::Truncate(from, last))
        });
    }

    fn purge(&self, upto: LogId, done: Completion) {
        self.submit(0, done, |state, _| {
            if upto.index < state.first_index() {
                return Ok(Change::Nothing);
            }
            state.bounds.purged = Some(upto);
            if state.next_index() <= upto.index + 1 {
                state.bounds.last = Some(upto);
            }
            state.tail.purge(upto.index);
            Ok(Change::Purge(upto))
        });
    }
}

impl Drop for SledStore {
    fn drop(&mut self) {
        let progress = &self.shared.progress;
        self.shared.queue.close();
        let phase = if self.threads.is_empty() { Phase::Stopped } else { progress.wait_until_over() };
        let mut hung = phase == Phase::Hung || progress.step().is_err();
        if !hung {
            for thread in self.threads.drain(..) {
                // Its panics were caught and reported.
                let _ = thread.join();
            }
        }
        hung |= progress.step().is_err();
        if hung || self.shared.read().abandoned {
            // sled flushes when its last handle goes, and a failed fsync must never be retried: keep one for ever.
            std::mem::forget(self.trees.take());
        }
        drop(self.trees.take());
        // Only now there is nothing left that could hang.
        progress.close();
        if let Some(watchdog) = self.watchdog.take()
            && !hung
        {
            let _ = watchdog.join();
        }
    }
}
