//! A log in memory, for simulation and tests: it loses on a crash what a disk would lose.
//!
//! A [`MemoryDisk`] outlives the [`MemoryStore`]s opened on it, as a disk outlives its processes. Writes show in
//! the store at once and wait in the disk until somebody calls [`MemoryDisk::sync`]; a crash keeps a prefix
//! of those that wait. There are no threads, no clock and no randomness here: the same calls in the same
//! order have the same outcome.
//!
//! It is no [`LogDisk`](super::durable_log::LogDisk), although that would be less code. A durable log has a writer thread, a watchdog and a
//! wall clock, so that when a write becomes durable would be the scheduler's to say; here it is the simulation's, which can
//! repeat it from a seed. And what waits is kept write by write, for a crash to keep any number of them.
//!
//! What it does not do: encode anything, or bound its memory.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::types::{Entry, LogId, Vote};

use super::{Completion, LogBounds, LogStore};

/// When writes become durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SyncMode {
    /// When [`MemoryDisk::sync`] is called.
    #[default]
    Manual,
    /// At once, before the call that writes returns.
    Immediate,
}

/// What survives a crash. Cheap to clone; all clones are the same disk.
#[derive(Clone, Default)]
pub struct MemoryDisk {
    inner: Arc<Mutex<MemoryLog>>,
}

#[derive(Default)]
struct MemoryLog {
    mode: SyncMode,
    durable: Image,
    /// Submitted, in order, and not yet durable.
    pending: VecDeque<Pending>,
    /// What the present store shows.
    current: Image,
    /// Counts stores opened; an older store is dead.
    generation: u64,
    /// The next sync fails with this message.
    fail_next_sync: Option<String>,
    /// Why the present store has failed for good.
    failure: Option<String>,
    notify: Option<Arc<dyn Fn() + Send + Sync>>,
}

struct Pending {
    change: MemoryWrite,
    /// Gone once a failed sync has reported it.
    done: Option<Completion>,
    /// The committed position at the time: it rides along with the next sync.
    committed: Option<LogId>,
}

/// One write.
#[derive(Debug, Clone)]
enum MemoryWrite {
    Append(Vec<Entry>),
    SaveVote(Vote),
    /// Everything after the position.
    Truncate(Option<LogId>),
    Purge(LogId),
}

/// The content of a log.
#[derive(Debug, Clone, Default)]
struct Image {
    vote: Option<Vote>,
    committed: Option<LogId>,
    purged: Option<LogId>,
    /// Follow on `purged` without a hole.
    entries: VecDeque<Entry>,
}

impl Image {
    fn first_index(&self) -> u64 {
        self.purged.map_or(0, |purged| purged.index + 1)
    }

    fn last(&self) -> Option<LogId> {
        self.entries.back().map(|entry| entry.log_id).or(self.purged)
    }

    fn next_index(&self) -> u64 {
        self.last().map_or(0, |last| last.index + 1)
    }

    /// What is at `index`: an entry, or the last one purged.
    fn position(&self, index: u64) -> Option<LogId> {
        let purged = self.purged.filter(|purged| purged.index == index);
        let entry = index.checked_sub(self.first_index()).and_then(|at| usize::try_from(at).ok());
        purged.or_else(|| entry.and_then(|at| self.entries.get(at)).map(|entry| entry.log_id))
    }

    fn check(&self, change: &MemoryWrite) -> Result<(), String> {
        let entries = match change {
            MemoryWrite::Append(entries) => entries,
            MemoryWrite::Truncate(Some(last)) => {
                return match self.position(last.index) {
                    Some(found) if found != *last => Err(format!("truncated after {last}, which is {found}")),
                    _ => Ok(()),
                };
            }
            _ => return Ok(()),
        };
        let mut term = self.last().map_or(0, |last| last.term);
        for (entry, index) in entries.iter().zip(self.next_index()..) {
            if entry.log_id.index != index {
                return Err(format!("entry {} appended where {index} should be", entry.log_id));
            }
            if entry.log_id.term < term {
                return Err(format!("entry {} appended after one of term {term}", entry.log_id));
            }
            term = entry.log_id.term;
        }
        Ok(())
    }

    fn apply(&mut self, change: MemoryWrite) {
        match change {
            MemoryWrite::Append(entries) => self.entries.extend(entries),
            MemoryWrite::SaveVote(vote) => self.vote = Some(vote),
            MemoryWrite::Truncate(last) => {
                let from = last.map_or(0, |last| last.index + 1);
                let kept = from.saturating_sub(self.first_index());
                self.entries.truncate(usize::try_from(kept).unwrap_or(usize::MAX));
            }
            MemoryWrite::Purge(upto) => {
                if upto.index >= self.first_index() {
                    let gone = usize::try_from(upto.index + 1 - self.first_index()).unwrap_or(usize::MAX);
                    self.entries.drain(..gone.min(self.entries.len()));
                    self.purged = Some(upto);
                }
            }
        }
    }

    /// Takes `committed` over, if the log goes that far.
    fn commit(&mut self, committed: Option<LogId>) {
        if committed.is_none_or(|committed| committed.index < self.next_index()) {
            self.committed = committed;
        }
    }
}

impl MemoryDisk {
    /// An empty disk.
    pub fn new(mode: SyncMode) -> Self {
        let disk = Self::default();
        disk.lock().mode = mode;
        disk
    }

    fn lock(&self) -> MutexGuard<'_, MemoryLog> {
        self.inner.lock().expect("invariant: no panic under this lock")
    }

    /// Writes that are not yet durable.
    pub fn pending(&self) -> usize {
        self.lock().pending.len()
    }

    /// Has `notify` called after every write that waits for a sync, in the call that submits it.
    pub fn on_pending(&self, notify: impl Fn() + Send + Sync + 'static) {
        self.lock().notify = Some(Arc::new(notify));
    }

    /// Makes everything submitted so far durable, and completes it in order. Returns how many writes that were.
    pub fn sync(&self) -> usize {
        self.sync_first(usize::MAX)
    }

    /// Makes the first `count` waiting writes durable, and completes them in order.
    pub fn sync_first(&self, count: usize) -> usize {
        let (completions, error) = {
            let mut inner = self.lock();
            if inner.failure.is_some() {
                return 0;
            }
            if let Some(error) = inner.fail_next_sync.take() {
                inner.failure = Some(error.clone());
                // The writes stay: whether the disk kept a failed sync's data shows only after a crash.
                (inner.pending.iter_mut().filter_map(|pending| pending.done.take()).collect(), Some(error))
            } else {
                let count = count.min(inner.pending.len());
                (inner.settle(count), None)
            }
        };
        let synced = completions.len();
        for done in completions {
            done(match &error {
                None => Ok(()),
                Some(error) => Err(io::Error::other(error.clone())),
            });
        }
        if error.is_none() { synced } else { 0 }
    }

    /// Has the next sync fail, and with it the store for good, until the disk is opened again.
    pub fn fail_next_sync(&self, message: &str) {
        self.lock().fail_next_sync = Some(message.to_owned());
    }

    /// Loses what is not durable, except for the first `keep_unsynced` waiting writes, and kills the store: its
    /// later calls do nothing, and completions that wait are dropped without a call.
    pub fn crash(&self, keep_unsynced: usize) {
        let dropped = {
            let mut inner = self.lock();
            let count = keep_unsynced.min(inner.pending.len());
            let completions = inner.settle(count);
            inner.generation += 1;
            inner.fail_next_sync = None;
            (completions, std::mem::take(&mut inner.pending))
        };
        // Outside the lock: what a dropped completion holds may well call back.
        drop(dropped);
    }
}

impl MemoryLog {
    /// Makes the first `count` waiting writes durable.
    fn settle(&mut self, count: usize) -> Vec<Completion> {
        let mut completions = Vec::with_capacity(count);
        for pending in self.pending.drain(..count) {
            self.durable.apply(pending.change);
            self.durable.commit(pending.committed);
            completions.extend(pending.done);
        }
        completions
    }
}

impl fmt::Debug for MemoryDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.lock();
        f.debug_struct("MemoryDisk")
            .field("durable_last", &inner.durable.last())
            .field("current_last", &inner.current.last())
            .field("pending", &inner.pending.len())
            .finish_non_exhaustive()
    }
}

/// A process's view of a [`MemoryDisk`].
#[derive(Debug)]
pub struct MemoryStore {
    disk: MemoryDisk,
    generation: u64,
}

impl MemoryStore {
    /// Opens the disk: what is durable on it is there, and nothing else. A store opened before is dead, as
    /// if its process had crashed.
    pub fn open(disk: &MemoryDisk) -> Self {
        disk.crash(0);
        let mut inner = disk.lock();
        inner.current = inner.durable.clone();
        inner.failure = None;
        Self { disk: disk.clone(), generation: inner.generation }
    }

    /// The disk, unless another store was opened on it: that one's votes and positions are not this one's.
    fn alive(&self) -> Option<MutexGuard<'_, MemoryLog>> {
        Some(self.disk.lock()).filter(|inner| inner.generation == self.generation)
    }

    fn submit(&self, change: MemoryWrite, done: Completion) {
        let mut inner = self.disk.lock();
        if inner.generation != self.generation {
            drop(inner);
            return done(Err(io::Error::other("this store died in a crash")));
        }
        if inner.failure.is_none()
            && let Err(reason) = inner.current.check(&change)
        {
            inner.failure = Some(reason);
        }
        if let Some(reason) = &inner.failure {
            let error = io::Error::other(reason.clone());
            let waiting: Vec<_> =
                inner.pending.iter_mut().filter_map(|pending| pending.done.take()).collect();
            drop(inner);
            for done in waiting.into_iter().chain([done]) {
                done(Err(io::Error::new(error.kind(), error.to_string())));
            }
            return;
        }
        inner.current.apply(change.clone());
        let committed = inner.current.committed;
        inner.pending.push_back(Pending { change, done: Some(done), committed });
        let (mode, notify) = (inner.mode, inner.notify.clone());
        drop(inner);
        match mode {
            SyncMode::Immediate => {
                self.disk.sync();
            }
            SyncMode::Manual => {
                if let Some(notify) = notify {
                    notify();
                }
            }
        }
    }
}

impl LogStore for MemoryStore {
    fn bounds(&self) -> LogBounds {
        let inner = self.disk.lock();
        LogBounds { purged: inner.current.purged, last: inner.current.last() }
    }

    fn vote(&self) -> Option<Vote> {
        self.alive().and_then(|inner| inner.current.vote)
    }

    fn committed(&self) -> Option<LogId> {
        self.alive().and_then(|inner| inner.current.committed)
    }

    fn read(&self, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        let inner = self.disk.lock();
        let image = &inner.current;
        let skip = usize::try_from(start.saturating_sub(image.first_index())).unwrap_or(usize::MAX);
        let mut entries: Vec<Entry> = Vec::new();
        let mut bytes = 0;
        for entry in image.entries.range(skip.min(image.entries.len())..) {
            bytes += entry.size_bytes();
            if entry.log_id.index >= end || (bytes > max_bytes && !entries.is_empty()) {
                break;
            }
            entries.push(entry.clone());
        }
        Ok(entries)
    }

    fn append(&self, entries: Vec<Entry>, done: Completion) {
        self.submit(MemoryWrite::Append(entries), done);
    }

    fn save_vote(&self, vote: Vote, done: Completion) {
        self.submit(MemoryWrite::SaveVote(vote), done);
    }

    fn save_committed(&self, committed: Option<LogId>) {
        let mut inner = self.disk.lock();
        if inner.generation != self.generation {
            return;
        }
        inner.current.committed = committed;
        if let Some(last) = inner.pending.back_mut() {
            last.committed = committed;
        }
    }

    fn truncate(&self, last: Option<LogId>, done: Completion) {
        self.submit(MemoryWrite::Truncate(last), done);
    }

    fn purge(&self, upto: LogId, done: Completion) {
        self.submit(MemoryWrite::Purge(upto), done);
    }
}
