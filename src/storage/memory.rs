//! A log in memory, for simulation and tests: it loses on a crash what a disk would lose.
//!
//! A [`MemoryDisk`] outlives the [`MemoryStore`]s opened on it, as a disk outlives its processes. Writes show in
//! the store at once and wait in its queue until somebody calls [`MemoryDisk::sync`]; a crash keeps a prefix
//! of those that wait. There are no threads, no clock and no randomness here: the same calls in the same
//! order have the same outcome.
//!
//! The store is the one that nodes have, a [`DurableLog`], on a [`LogDisk`] that is an [`Image`]. Only its writer is [led by
//! hand](HandWriter): when a write becomes durable is not the scheduler's to say but the simulation's, which can repeat it from a
//! seed.
//!
//! What it does not do: encode anything, or bound its memory.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use crate::types::{Entry, LogId, Vote};

use super::durable_log::{
    Collected, DurableLog, HandWriter, LogDisk, LogReader, RecoveredLog, Scanned, Tail, first_index,
};
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
    attached: Arc<Mutex<Attached>>,
    platter: Arc<Mutex<Platter>>,
}

/// Who uses a disk at present.
#[derive(Default)]
struct Attached {
    mode: SyncMode,
    /// Of the store that was opened last, until a crash.
    writer: Option<HandWriter<Written>>,
    notify: Option<Arc<dyn Fn() + Send + Sync>>,
}

/// What is on a disk.
#[derive(Default)]
struct Platter {
    /// What a store that is opened on it finds.
    flushed: Image,
    /// The same, and all that was written since.
    written: Image,
    /// What was written since, in order.
    unflushed: VecDeque<MemoryWrite>,
    /// The next flush fails with this message.
    fail_next_flush: Option<String>,
    crashes: u64,
}

/// One write.
#[derive(Debug, Clone)]
enum MemoryWrite {
    Append(Vec<Entry>),
    SaveVote(Vote),
    /// Everything from the index on.
    Truncate(u64),
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
    fn bounds(&self) -> LogBounds {
        let last = self.entries.back().map(|entry| entry.log_id).or(self.purged);
        LogBounds { purged: self.purged, last }
    }

    /// How many entries come before `index`.
    fn place(&self, index: u64) -> usize {
        let before = usize::try_from(index.saturating_sub(first_index(self.purged)));
        before.unwrap_or(usize::MAX).min(self.entries.len())
    }

    /// The position that an entry with `index` would follow on.
    fn before(&self, index: u64) -> Option<LogId> {
        let last = self.place(index).checked_sub(1);
        last.map_or(self.purged, |last| Some(self.entries[last].log_id))
    }

    fn apply(&mut self, write: MemoryWrite) {
        match write {
            MemoryWrite::Append(entries) => self.entries.extend(entries),
            MemoryWrite::SaveVote(vote) => self.vote = Some(vote),
            MemoryWrite::Truncate(from) => self.entries.truncate(self.place(from)),
            MemoryWrite::Purge(upto) => {
                self.entries.drain(..self.place(upto.index + 1));
                self.purged = Some(upto);
            }
        }
    }
}

impl Platter {
    fn write(&mut self, write: MemoryWrite) {
        self.written.apply(write.clone());
        self.unflushed.push_back(write);
    }

    /// Flushes the first `count` writes.
    fn flush_first(&mut self, count: usize) {
        for write in self.unflushed.drain(..count) {
            self.flushed.apply(write);
        }
    }
}

/// A [`MemoryDisk`] as the writer of its store has it.
struct Written(Arc<Mutex<Platter>>);

/// A [`MemoryDisk`] as the readers of its store have it. A store that has failed never lets go of this, so it must not be what
/// keeps the disk.
struct Readable {
    platter: Weak<Mutex<Platter>>,
    /// How often the disk had crashed when the store was opened: what another one writes is not this one's.
    crashes: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("invariant: no panic under this lock")
}

impl LogDisk for Written {
    type Reader = Readable;
    type Error = io::Error;

    fn append(&mut self, entries: &[Entry]) -> io::Result<()> {
        lock(&self.0).write(MemoryWrite::Append(entries.to_vec()));
        Ok(())
    }

    fn save_vote(&mut self, vote: Vote) -> io::Result<()> {
        lock(&self.0).write(MemoryWrite::SaveVote(vote));
        Ok(())
    }

    fn truncate(&mut self, from: u64, last: Option<LogId>) -> io::Result<()> {
        let mut platter = lock(&self.0);
        match platter.written.before(from) {
            found if found == last => {
                platter.write(MemoryWrite::Truncate(from));
                Ok(())
            }
            found => {
                let name = |position: Option<LogId>| position.map_or("nothing".into(), |at| at.to_string());
                Err(io::Error::other(format!("truncated after {}, which is {}", name(last), name(found))))
            }
        }
    }

    fn purge(&mut self, upto: LogId) -> io::Result<()> {
        lock(&self.0).write(MemoryWrite::Purge(upto));
        Ok(())
    }

    fn flush(&mut self, committed: Option<LogId>) -> io::Result<()> {
        let mut platter = lock(&self.0);
        if let Some(message) = platter.fail_next_flush.take() {
            // What was written stays: whether the disk has kept it shows only after a crash.
            return Err(io::Error::other(message));
        }
        let count = platter.unflushed.len();
        platter.flush_first(count);
        if committed.is_none_or(|committed| committed.index < first_index(platter.flushed.bounds().last)) {
            platter.flushed.committed = committed;
        }
        Ok(())
    }

    fn unswept(&self) -> bool {
        false
    }

    fn sweep(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn close(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl LogReader for Readable {
    fn read(&self, (from, to): (u64, u64), collected: &mut Collected) -> io::Result<Scanned> {
        let platter = self.platter.upgrade().ok_or_else(|| io::Error::other("the disk is gone"))?;
        let platter = lock(&platter);
        if platter.crashes != self.crashes {
            return Err(io::Error::other("this store died in a crash"));
        }
        let image = &platter.flushed;
        if from < first_index(image.purged) || to > first_index(image.bounds().last) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        for entry in image.entries.range(image.place(from)..image.place(to)) {
            if !collected.push(entry.clone()) {
                return Ok(Scanned::Full);
            }
        }
        Ok(Scanned::All)
    }

    fn disk_bytes(&self) -> io::Result<u64> {
        Ok(0)
    }
}

impl MemoryDisk {
    /// An empty disk.
    pub fn new(mode: SyncMode) -> Self {
        let disk = Self::default();
        lock(&disk.attached).mode = mode;
        disk
    }

    /// Writes that are not yet durable.
    pub fn pending(&self) -> usize {
        let queued = lock(&self.attached).writer.as_ref().map_or(0, HandWriter::queued);
        queued + lock(&self.platter).unflushed.len()
    }

    /// Has `notify` called after every write, in the call that submits it, unless it is durable by then.
    pub fn on_pending(&self, notify: impl Fn() + Send + Sync + 'static) {
        lock(&self.attached).notify = Some(Arc::new(notify));
    }

    /// Makes everything submitted so far durable, and completes it in order. Returns how many writes that were.
    pub fn sync(&self) -> usize {
        self.sync_first(usize::MAX)
    }

    /// Makes the first `count` waiting writes durable, and completes them in order.
    pub fn sync_first(&self, count: usize) -> usize {
        let complete = lock(&self.attached).writer.as_mut().map(|writer| writer.write(count));
        complete.map_or(0, |complete| complete())
    }

    /// Has the next sync that has something to write fail, and with it the store for good, until the disk is opened again.
    pub fn fail_next_sync(&self, message: &str) {
        lock(&self.platter).fail_next_flush = Some(message.to_owned());
    }

    /// Loses what is not durable, except for the first `keep_unsynced` waiting writes, and kills the store: its
    /// later writes fail, and completions that wait are dropped without a call.
    pub fn crash(&self, keep_unsynced: usize) {
        let writer = lock(&self.attached).writer.take();
        let unflushed = {
            let mut platter = lock(&self.platter);
            let unflushed = platter.unflushed.len();
            platter.flush_first(keep_unsynced.min(unflushed));
            platter.unflushed.clear();
            platter.written = platter.flushed.clone();
            platter.fail_next_flush = None;
            platter.crashes += 1;
            unflushed
        };
        // What a dropped completion holds may well call back, so that no lock is held.
        drop(writer.map(|mut writer| writer.crash(keep_unsynced.saturating_sub(unflushed))));
    }

    fn submitted(&self) {
        let (mode, notify) = {
            let attached = lock(&self.attached);
            (attached.mode, attached.notify.clone())
        };
        match (mode, notify) {
            (SyncMode::Immediate, _) => drop(self.sync()),
            (SyncMode::Manual, Some(notify)) => notify(),
            (SyncMode::Manual, None) => {}
        }
    }
}

impl fmt::Debug for MemoryDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bounds = lock(&self.platter).flushed.bounds();
        f.debug_struct("MemoryDisk")
            .field("durable", &bounds)
            .field("pending", &self.pending())
            .finish_non_exhaustive()
    }
}

/// A process's view of a [`MemoryDisk`].
pub struct MemoryStore {
    disk: MemoryDisk,
    log: DurableLog<Written>,
}

impl MemoryStore {
    /// Opens the disk: what is durable on it is there, and nothing else. A store opened before is dead, as
    /// if its process had crashed.
    pub fn open(disk: &MemoryDisk) -> Self {
        /// So few that reads cross from them to the disk.
        const TAIL_BYTES: usize = 4096;
        disk.crash(0);
        let recovered = {
            let flushed = &lock(&disk.platter).flushed;
            let (bounds, vote, committed) = (flushed.bounds(), flushed.vote, flushed.committed);
            RecoveredLog { bounds, vote, committed, tail: Tail::new(TAIL_BYTES) }
        };
        let (written, platter) = (Written(disk.platter.clone()), Arc::downgrade(&disk.platter));
        let readable = Readable { platter, crashes: lock(&disk.platter).crashes };
        let (log, writer) = DurableLog::by_hand(written, readable, recovered);
        lock(&disk.attached).writer = Some(writer);
        Self { disk: disk.clone(), log }
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore").field("disk", &self.disk).field("bounds", &self.bounds()).finish()
    }
}

impl LogStore for MemoryStore {
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
        self.disk.submitted();
    }

    fn save_vote(&self, vote: Vote, done: Completion) {
        self.log.save_vote(vote, done);
        self.disk.submitted();
    }

    fn save_committed(&self, committed: Option<LogId>) {
        self.log.save_committed(committed);
    }

    fn truncate(&self, last: Option<LogId>, done: Completion) {
        self.log.truncate(last, done);
        self.disk.submitted();
    }

    fn purge(&self, upto: LogId, done: Completion) {
        self.log.purge(upto, done);
        self.disk.submitted();
    }
}
