//! The one thread that writes to the disk, and what it writes.
//!
//! The writer takes all that is queued, writes it in order, flushes once, and only then calls the
//! completions, in order. The [`watchdog`](super::watchdog) looks whether one such batch comes back.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use crate::runtime::panic_message;
use crate::storage::Completion;
use crate::types::{Entry, LogId, Vote};

use super::disk::{LogDisk, SyncLater};
use super::watchdog::GaveUp;
use super::{Cause, LogStats, Shared};

/// Why the writer stopped.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriterError<E: std::error::Error> {
    #[error("{0}")]
    Disk(E),
    #[error("the writer came back after the watchdog had given up")]
    GaveUp,
    #[error("the log has failed elsewhere")]
    Abandoned,
    #[error("cannot look after the disk's free space: {0}")]
    Room(io::Error),
    #[error("a completion panicked: {0}")]
    Completion(String),
}

impl<E: std::error::Error> From<GaveUp> for WriterError<E> {
    fn from(_: GaveUp) -> Self {
        Self::GaveUp
    }
}

/// One write, as submitted.
#[derive(Debug)]
pub(crate) enum LogChange {
    Append(Vec<Entry>),
    SaveVote(Vote),
    /// Truncate from the index on, after which the log ends with the position.
    Truncate(u64, Option<LogId>),
    Purge(LogId),
    /// Nothing to do but to come after the writes before it.
    Nothing,
}

impl LogChange {
    fn entries(&self) -> usize {
        if let Self::Append(entries) = self { entries.len() } else { 0 }
    }
}

pub(crate) struct QueuedWrite {
    /// Submission order, from 1.
    pub(crate) ticket: u64,
    pub(crate) change: LogChange,
    pub(crate) bytes: usize,
    /// What was committed when it was submitted. A later one may be an entry that only a later write brings, in the place of
    /// one that is there now.
    pub(crate) committed: Option<LogId>,
    pub(crate) done: Completion,
}

/// What is waiting to be written.
#[derive(Default)]
pub(crate) struct WriteQueue {
    waiting: Mutex<WaitingWrites>,
    changed: Condvar,
}

#[derive(Default)]
struct WaitingWrites {
    writes: VecDeque<QueuedWrite>,
    closed: bool,
}

impl WaitingWrites {
    /// Takes as many writes from the front as one flush should cover, but at least one if there is one.
    fn cut(&mut self) -> Vec<QueuedWrite> {
        /// What waits behind such a batch waits for one flush of this size, and the watchdog sees one flush of
        /// this size, however long the queue has grown.
        const BATCH_BYTES: usize = 8 * 1024 * 1024;
        const BATCH_ENTRIES: usize = 4096;
        let (mut bytes, mut entries, mut count) = (0, 0, 0);
        for write in &self.writes {
            bytes += write.bytes;
            entries += write.change.entries();
            if count > 0 && (bytes > BATCH_BYTES || entries > BATCH_ENTRIES) {
                break;
            }
            count += 1;
        }
        self.writes.drain(..count).collect()
    }
}

/// What the writer found in the queue.
enum NextWrite {
    Batch(Vec<QueuedWrite>),
    /// Nothing at present, and the caller did not want to wait.
    Idle,
    Closed,
}

impl WriteQueue {
    pub(crate) fn push(&self, write: QueuedWrite) {
        self.lock().writes.push_back(write);
        self.changed.notify_one();
    }

    /// Lets the writer stop once it has written what is queued.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    pub(crate) fn drain(&self) -> VecDeque<QueuedWrite> {
        std::mem::take(&mut self.lock().writes)
    }

    /// Writes that wait.
    pub(super) fn len(&self) -> usize {
        self.lock().writes.len()
    }

    /// Takes the first `count` that wait, or all.
    pub(super) fn take(&self, count: usize) -> Vec<QueuedWrite> {
        let mut waiting = self.lock();
        let count = count.min(waiting.writes.len());
        waiting.writes.drain(..count).collect()
    }

    fn next(&self, wait: bool) -> NextWrite {
        let mut waiting = self.lock();
        loop {
            if !waiting.writes.is_empty() {
                return NextWrite::Batch(waiting.cut());
            }
            if waiting.closed {
                return NextWrite::Closed;
            }
            if !wait {
                return NextWrite::Idle;
            }
            waiting = self.changed.wait(waiting).expect("invariant: no panic under this lock");
        }
    }

    fn lock(&self) -> MutexGuard<'_, WaitingWrites> {
        self.waiting.lock().expect("invariant: no panic under this lock")
    }
}

/// Body of the thread that now and then syncs what no completion waits for. The watchdog cannot do this: on a disk that
/// hangs it would hang, too.
pub(super) fn sync_later(shared: &Shared, sync: &SyncLater) {
    /// What a power cut may take of it.
    const PAUSE: Duration = Duration::from_secs(1);
    let mut running = true;
    while running {
        running = shared.progress.runs_after(PAUSE);
        if shared.progress.hangs() || shared.is_abandoned() {
            return;
        }
        if let Err(reason) = sync() {
            shared.fail(&reason, Cause::Disk, Vec::new());
            return;
        }
    }
}

/// Body of the writer thread.
pub(super) fn run<D: LogDisk>(shared: &Arc<Shared>, mut disk: D) {
    // Whatever ends it: closing waits for that.
    let _over = Over(shared);
    let outcome = catch_unwind(AssertUnwindSafe(|| serve(shared, &mut disk)));
    let cause = if matches!(outcome, Ok(Err(WriterError::GaveUp))) { Cause::Late } else { Cause::Disk };
    let failure = match outcome {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(panic) => Some(format!("the writer panicked: {}", panic_message(&*panic))),
    };
    match failure {
        None => drop(disk),
        Some(reason) => {
            // A disk may flush when its last handle goes, and a failed fsync must never be retried.
            std::mem::forget(disk);
            shared.fail(&reason, cause, shared.progress.abandon());
        }
    }
}

/// Says that the writer is no more when it is dropped.
struct Over<'a>(&'a Shared);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.progress.stop();
    }
}

/// Writes until the queue is closed.
fn serve<D: LogDisk>(shared: &Shared, disk: &mut D) -> Result<(), WriterError<D::Error>> {
    loop {
        let next = shared.queue.next(!disk.unswept());
        if shared.is_abandoned() {
            // Another thread has met an error: nothing more is done with this disk, not even to close it.
            return Err(WriterError::Abandoned);
        }
        let writes = match next {
            NextWrite::Batch(writes) => writes,
            NextWrite::Idle => {
                sweep(shared, disk)?;
                continue;
            }
            NextWrite::Closed => {
                shared.progress.step()?;
                disk.close().map_err(WriterError::Disk)?;
                shared.progress.end()?;
                return Ok(());
            }
        };
        write(shared, disk, writes)?;
        if disk.unswept() {
            sweep(shared, disk)?;
        }
    }
}

fn sweep<D: LogDisk>(shared: &Shared, disk: &mut D) -> Result<(), WriterError<D::Error>> {
    shared.progress.begin(Vec::new())?;
    disk.sweep().map_err(WriterError::Disk)?;
    shared.progress.end()?;
    Ok(())
}

/// Writes one batch and reports its outcome.
fn write<D: LogDisk>(
    shared: &Shared,
    disk: &mut D,
    writes: Vec<QueuedWrite>,
) -> Result<(), WriterError<D::Error>> {
    settle(shared, disk, writes)?.complete(&shared.stats).map_err(WriterError::Completion)
}

/// A batch that is durable, and whose completions are still to be called.
pub(super) struct SettledBatch {
    pub(super) completions: Vec<Completion>,
    /// What the store has failed with meanwhile.
    failure: Option<io::Error>,
    bytes: u64,
}

impl SettledBatch {
    /// Calls the completions, with the lock of nobody held. The first panic in one is returned.
    pub(super) fn complete(self, stats: &LogStats) -> Result<(), String> {
        let Self { completions, failure, bytes } = self;
        let count = completions.len() as u64;
        let queued_bytes = stats.queued_bytes.fetch_sub(bytes, Relaxed);
        let queued_writes = stats.queued_writes.fetch_sub(count, Relaxed);
        let completed = complete(completions.into_iter(), failure.as_ref());
        // What is durable is confirmed first.
        assert!(queued_bytes >= bytes, "invariant: no more bytes leave the queue than came");
        assert!(queued_writes >= count, "invariant: no more writes leave the queue than came");
        completed
    }
}

/// Makes one batch durable.
pub(super) fn settle<D: LogDisk>(
    shared: &Shared,
    disk: &mut D,
    writes: Vec<QueuedWrite>,
) -> Result<SettledBatch, WriterError<D::Error>> {
    let (ticket, committed) = writes.last().map_or((0, None), |write| (write.ticket, write.committed));
    let in_order = writes.is_sorted_by(|earlier, later| earlier.ticket < later.ticket);
    assert!(in_order, "invariant: the queue keeps the order of submission");
    let bytes = writes.iter().map(|write| write.bytes as u64).sum();
    let (changes, completions): (Vec<_>, Vec<_>) =
        writes.into_iter().map(|write| (write.change, write.done)).unzip();
    shared.progress.begin(completions)?;
    if let Some(room) = &shared.room {
        // No write may meet a full disk: the first that fails is final.
        room.before_batch(bytes).map_err(WriterError::Room)?;
    }
    for change in changes {
        hand_over(disk, change).map_err(WriterError::Disk)?;
    }
    disk.flush(committed).map_err(WriterError::Disk)?;
    let completions = shared.progress.end()?;
    Ok(SettledBatch { completions, failure: shared.settle(ticket), bytes })
}

/// Writes one change, which the next flush makes durable.
pub(super) fn hand_over<D: LogDisk>(disk: &mut D, change: LogChange) -> Result<(), D::Error> {
    match change {
        LogChange::Append(entries) => disk.append(&entries),
        LogChange::SaveVote(vote) => disk.save_vote(vote),
        LogChange::Truncate(from, last) => disk.truncate(from, last),
        LogChange::Purge(upto) => disk.purge(upto),
        LogChange::Nothing => Ok(()),
    }
}

/// Calls every completion, with `error` if there is one. A panic in one does not keep the others from being
/// called; the first is returned.
pub(crate) fn complete(
    completions: impl Iterator<Item = Completion>,
    error: Option<&io::Error>,
) -> Result<(), String> {
    let mut outcome = Ok(());
    for done in completions {
        let result = match error {
            None => Ok(()),
            Some(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| done(result))) {
            outcome = outcome.and(Err(panic_message(&*panic).to_owned()));
        }
    }
    outcome
}
