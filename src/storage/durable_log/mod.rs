//! A log on any disk that can hold one: what a [`LogStore`] promises, made of the few writes of a [`LogDisk`].
//!
//! # The route of a write
//! `append` puts the entries into the in-memory [`tail`] and a queue, and returns; from then on they can be
//! read. The one [`writer`] takes all that is queued, hands it to the disk, flushes once, and calls the completions.
//! So one fsync serves all who wait, and its cost does not grow with their number.
//!
//! ```text
//! callers ──▶ tail (read at once)
//!         ──▶ queue ──▶ writer ──▶ LogDisk: append, …, flush ──▶ completions
//!                         ▲ watchdog
//! ```
//!
//! | thread | what it does | ends |
//! |---|---|---|
//! | `log-writer` | everything that is done to the disk | once what is queued is written, or with the first failure |
//! | `log-watchdog` | looks whether the writer comes back, from the first step of opening to the last of closing | when the disk is let go of |
//! | `log-sync-later` | once a second, what no completion waits for | after the writer |
//!
//! # Invariants
//! - What a completion has confirmed is on the disk, in a form that its recovery accepts.
//! - The in-memory state is what the disk will hold once the writer has written the queue. After a truncation no reader sees
//!   an entry that the truncation has removed. No reader sees a mixture of the log before and after a truncation.
//! - After any failure (IO error, panic, a flush that hangs, a write out of order) the store is *failed* for
//!   good: nothing more is confirmed, nothing new accepted, nothing retried. Entries accepted before stay
//!   readable, although they may not be durable; the node has to stop.
//!
//! What it does not do: know what is on the disk, or how it got there.
//!
//! A simulation has no threads. There the batches of the writer are written [by hand](by_hand), and everything else is the same.
//!
//! The protocol, with a figure: `docs/design/disk.md`.

mod by_hand;
mod disk;
mod read;
mod stats;
mod tail;
#[cfg(test)]
mod tests;
mod watchdog;
mod writer;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::error::StorageError;
use crate::runtime::panic_message;
use crate::types::{Entry, LogId, Vote};

use super::space::Attendant;
use super::{Closed, Completion, DataDir, DiskWatch, LogBounds, LogStore, Room, files};
pub(crate) use by_hand::HandWriter;
pub(crate) use disk::{LogDisk, LogReader, Opened, RecoveredLog};
pub(crate) use read::{Collected, Scanned};
pub use stats::{FLUSH_BUCKETS_US, LogStats};
pub(crate) use tail::Tail;
use watchdog::WriterPhase;
pub(crate) use watchdog::{GaveUp, WriterProgress};
use writer::{LogChange, QueuedWrite, WriteQueue};

/// Why a store failed for good.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failure {
    /// What happened.
    pub reason: String,
    /// Whether the writer hangs in a system call, or in what writes to the disk. Then only the end of the process helps.
    pub hung: bool,
}

/// Is told why a store has failed, once, on the thread that noticed, before the completions that fail with it.
pub(crate) type OnFailure = Arc<dyn Fn(&Failure) + Send + Sync>;

/// What a log is to do beside its writes.
pub(crate) struct Duties {
    /// A batch that takes longer than this has hung; a step of opening or closing may take 20 times as long.
    pub(crate) flush_watchdog: Duration,
    pub(crate) on_failure: OnFailure,
    /// Looked at before each batch.
    pub(crate) room: Option<Arc<Room>>,
}

/// A log on a [`LogDisk`]. See the [module](self).
///
/// Dropping it writes and flushes what is queued, stops its threads and lets go of the disk.
pub(crate) struct DurableLog<D: LogDisk> {
    shared: Arc<Shared>,
    /// Gone only while opening or closing.
    reader: Option<D::Reader>,
    watchdog: Option<JoinHandle<()>>,
    /// The writer, and what ends when it does.
    threads: Vec<JoinHandle<()>>,
    /// Looks after the room of the disk, if anybody does.
    attendant: Option<Attendant>,
    /// Locked for as long as the log in it is open.
    data_dir: Option<DataDir>,
    /// Dropped last.
    when_closed: WhenClosed,
}

/// Calls, when it is dropped, who wants to know that what was dropped before it is.
#[derive(Default)]
struct WhenClosed(Mutex<Vec<Closed>>);

impl WhenClosed {
    fn add(&self, closed: Closed) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(closed);
    }
}

impl Drop for WhenClosed {
    fn drop(&mut self) {
        for closed in self.0.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            closed();
        }
    }
}

/// What the threads of a store have in common.
struct Shared {
    state: RwLock<State>,
    queue: WriteQueue,
    progress: WriterProgress,
    stats: Arc<LogStats>,
    /// The disk must not be touched again, not even to close it.
    abandoned: AtomicBool,
    /// Looked at before each batch.
    room: Option<Arc<Room>>,
    on_failure: OnFailure,
}

/// The log as of the last submission.
#[derive(Default)]
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
}

impl State {
    fn first_index(&self) -> u64 {
        first_index(self.bounds.purged)
    }

    fn next_index(&self) -> u64 {
        first_index(self.bounds.last)
    }

    fn check(&self) {
        assert!(self.first_index() <= self.next_index(), "invariant: a log does not end before it begins");
        let (last, tail) = (self.bounds.last, self.tail.ends());
        assert!(
            tail.is_none_or(|(first, _)| first >= self.first_index()),
            "invariant: nothing that is purged is in the tail"
        );
        assert!(tail.is_none_or(|(_, end)| Some(end) == last), "invariant: the tail ends where the log ends");
    }

    /// What is at `index`, as far as that is known without the disk.
    fn position(&self, index: u64) -> Option<LogId> {
        let ends = [self.bounds.last, self.bounds.purged];
        let end = ends.into_iter().flatten().find(|position| position.index == index);
        end.or_else(|| self.tail.log_id(index))
    }
}

impl Shared {
    fn new(room: Option<Arc<Room>>, on_failure: OnFailure) -> Arc<Self> {
        Arc::new(Self {
            state: RwLock::new(State::default()),
            queue: WriteQueue::default(),
            progress: WriterProgress::new(),
            stats: Arc::default(),
            abandoned: AtomicBool::new(false),
            room,
            on_failure,
        })
    }

    /// Shows what was found on the disk.
    fn recover(&self, recovered: RecoveredLog) {
        let RecoveredLog { bounds, vote, committed, tail } = recovered;
        let mut state = self.write();
        (state.bounds, state.vote, state.committed, state.tail) = (bounds, vote, committed, tail);
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().expect("invariant: no panic under this lock")
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().expect("invariant: no panic under this lock")
    }

    fn is_abandoned(&self) -> bool {
        self.abandoned.load(Acquire)
    }

    /// Notes that writes up to `ticket` are durable. Returns the error if the store has failed meanwhile.
    fn settle(&self, ticket: u64) -> Option<io::Error> {
        let mut state = self.write();
        if let Some(reason) = &state.failure {
            return Some(failed(reason));
        }
        assert!(ticket <= state.ticket, "invariant: nothing is durable that was not submitted");
        state.tail.settle(ticket);
        None
    }

    /// Fails the store for good: first the writes `in_flight`, then all that is queued. Returns the error to
    /// report, which is that of the first failure.
    fn fail(&self, reason: &str, cause: Cause, in_flight: Vec<Completion>) -> io::Error {
        let report = |hung| {
            let failure = Failure { reason: reason.to_owned(), hung };
            // Those who wait for their writes are to hear of it all the same.
            if catch_unwind(AssertUnwindSafe(|| (self.on_failure)(&failure))).is_err() {
                tracing::error!(reason, "who wants to know that the log has failed has panicked");
            }
        };
        if cause == Cause::Hung {
            // Before any lock: its holder may be waiting for the same disk.
            self.stats.failed.store(true, Relaxed);
            report(true);
        }
        let (first, error) = {
            // Whoever panicked under it failed the store with that.
            let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
            let first = state.failure.is_none();
            self.abandoned.fetch_or(cause != Cause::Misuse, Release);
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
    /// A write that does not fit the log: the disk is well.
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

/// Starts a thread of a store. One that panics fails it: what the thread was there for, nobody does any more.
fn start(
    shared: &Arc<Shared>,
    name: &'static str,
    body: Box<dyn FnOnce() + Send>,
) -> io::Result<JoinHandle<()>> {
    let shared = shared.clone();
    let guarded = move || {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(body)) {
            let reason = format!("the thread {name} has panicked: {}", panic_message(&*panic));
            shared.fail(&reason, Cause::Disk, Vec::new());
        }
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(guarded)
}

fn unstarted(directory: &Path, error: io::Error) -> StorageError {
    files::io_error("cannot start a thread for", directory, error)
}

/// The index after `position`: 0 when there is nothing yet.
pub(crate) fn first_index(position: Option<LogId>) -> u64 {
    position.map_or(0, |position| position.index + 1)
}

/// For the opening of what is in `directory`, when the watchdog has given up on it.
pub(crate) fn too_late(directory: &Path) -> StorageError {
    files::io_error("cannot open", directory, io::ErrorKind::TimedOut.into())
}

impl<D: LogDisk> DurableLog<D> {
    /// Opens the log in `directory` as `recover` does it, which says at the beginning of each [step](WriterProgress::step) that it
    /// has come so far: the watchdog looks after it already.
    ///
    /// # Errors
    /// Those of `recover`, and when the watchdog has given up on it.
    pub(crate) fn open(
        directory: &Path,
        duties: Duties,
        recover: impl FnOnce(&WriterProgress, &Arc<LogStats>) -> Result<Opened<D>, StorageError>,
    ) -> Result<Self, StorageError> {
        let Duties { flush_watchdog, on_failure, room } = duties;
        let shared = Shared::new(room, on_failure);
        let spawn = |name, body| start(&shared, name, body).map_err(|error| unstarted(directory, error));
        // If anything fails from here on, dropping the store stops what has been started.
        let mut store = Self::without_threads(shared.clone());
        let watched = shared.clone();
        let supervise = Box::new(move || watchdog::supervise(&watched, flush_watchdog));
        store.watchdog = Some(spawn("log-watchdog", supervise)?);

        let opened = recover(&shared.progress, &shared.stats)?;
        let Opened { disk, reader, sync_later, grows, recovered } = opened;
        store.reader = Some(reader);
        if shared.progress.end().is_err() {
            std::mem::forget(disk);
            return Err(too_late(directory));
        }
        if let Some(room) = &shared.room {
            store.attendant = Some(room.attend(&grows, |look| spawn("disk-look", look).map(drop))?);
        }
        shared.recover(recovered);
        let for_writer = shared.clone();
        store.threads.push(spawn("log-writer", Box::new(move || writer::run(&for_writer, disk)))?);
        let for_sync = shared.clone();
        let sync_later = Box::new(move || writer::sync_later(&for_sync, &sync_later));
        store.threads.push(spawn("log-sync-later", sync_later)?);
        Ok(store)
    }

    fn without_threads(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            reader: None,
            watchdog: None,
            threads: Vec::new(),
            attendant: None,
            data_dir: None,
            when_closed: WhenClosed::default(),
        }
    }

    /// Keeps the directory that the log is in locked.
    pub(crate) fn keep_locked(&mut self, dir: DataDir) {
        self.data_dir = Some(dir);
    }

    fn reader(&self) -> &D::Reader {
        self.reader.as_ref().expect("invariant: an open store has its disk")
    }

    /// Applies a write to the in-memory state and queues it, both under one lock so that their orders agree.
    fn submit(
        &self,
        bytes: usize,
        done: Completion,
        apply: impl FnOnce(&mut State, u64) -> Result<LogChange, String>,
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
                state.check();
                state.ticket = ticket;
                self.shared.stats.queued_bytes.fetch_add(bytes as u64, Relaxed);
                self.shared.stats.queued_writes.fetch_add(1, Relaxed);
                let committed = state.committed;
                self.shared.queue.push(QueuedWrite { ticket, change, bytes, committed, done });
            }
            Err(reason) => {
                drop(state);
                self.shared.fail(&reason, Cause::Misuse, vec![done]);
            }
        }
    }
}

impl<D: LogDisk> LogStore for DurableLog<D> {
    fn bounds(&self) -> LogBounds {
        self.shared.read().bounds
    }

    fn vote(&self) -> Option<Vote> {
        self.shared.read().vote
    }

    fn committed(&self) -> Option<LogId> {
        self.shared.read().committed
    }

    fn read(&self, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        read::read(&self.shared, self.reader(), (start, end), max_bytes)
    }

    fn append(&self, entries: Vec<Entry>, done: Completion) {
        let bytes = entries.iter().map(Entry::size_bytes).sum();
        self.submit(bytes, done, |state, ticket| {
            let expected = state.next_index();
            let mut term = state.bounds.last.map_or(0, |last| last.term);
            for (entry, index) in entries.iter().zip(expected..) {
                if entry.log_id.index != index {
                    return Err(format!("entry {} appended where {index} should be", entry.log_id));
                }
                if entry.log_id.term < term {
                    return Err(format!("entry {} appended after one of term {term}", entry.log_id));
                }
                term = entry.log_id.term;
            }
            let Some(last) = entries.last() else { return Ok(LogChange::Nothing) };
            state.bounds.last = Some(last.log_id);
            for entry in &entries {
                state.tail.push(ticket, entry.clone());
            }
            Ok(LogChange::Append(entries))
        });
    }

    fn save_vote(&self, vote: Vote, done: Completion) {
        self.submit(0, done, |state, _| {
            state.vote = Some(vote);
            Ok(LogChange::SaveVote(vote))
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
                return Ok(LogChange::Nothing);
            }
            let last = if from == state.first_index() { state.bounds.purged } else { last };
            state.bounds.last = last;
            state.tail.truncate(from);
            state.truncations += 1;
            Ok(LogChange::Truncate(from, last))
        });
    }

    fn purge(&self, upto: LogId, done: Completion) {
        self.submit(0, done, |state, _| {
            if upto.index < state.first_index() {
                return Ok(LogChange::Nothing);
            }
            state.bounds.purged = Some(upto);
            if state.next_index() <= upto.index + 1 {
                state.bounds.last = Some(upto);
            }
            state.tail.purge(upto.index);
            Ok(LogChange::Purge(upto))
        });
    }

    fn stats(&self) -> Option<&Arc<LogStats>> {
        Some(&self.shared.stats)
    }

    fn disk_bytes(&self) -> io::Result<u64> {
        self.reader().disk_bytes()
    }

    fn watch_disk(&self, stall: Option<Duration>) -> DiskWatch {
        let (shared, stats) = (self.shared.clone(), self.shared.stats.clone());
        let queued = move || stats.queued_bytes.load(Relaxed);
        DiskWatch::new(self.shared.room.clone(), move || shared.progress.busy_for(), queued, stall)
    }

    fn on_closed(&self, closed: Closed) {
        self.when_closed.add(closed);
    }
}

impl<D: LogDisk> Drop for DurableLog<D> {
    fn drop(&mut self) {
        let progress = &self.shared.progress;
        self.shared.queue.close();
        let phase = if self.threads.is_empty() { WriterPhase::Stopped } else { progress.wait_until_over() };
        let mut hung = phase == WriterPhase::Hung || progress.step().is_err();
        if !hung {
            for thread in self.threads.drain(..) {
                // Its panics were caught and reported.
                let _ = thread.join();
            }
        }
        hung |= progress.step().is_err();
        if hung || self.shared.is_abandoned() {
            // A disk may flush when its last handle goes, and a failed fsync must never be retried: keep one for ever.
            std::mem::forget(self.reader.take());
        }
        drop(self.reader.take());
        // Only now there is nothing left that could hang.
        progress.close();
        if let Some(watchdog) = self.watchdog.take()
            && !hung
        {
            let _ = watchdog.join();
        }
    }
}
