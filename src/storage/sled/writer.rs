//! The one thread that writes to sled, and the one that watches it.
//!
//! The writer takes all that is queued, writes it in order, flushes once, and only then calls the
//! completions, in order. A supervising thread looks whether one such batch takes longer than the watchdog
//! allows: sled's flush can hang for ever after an IO error, and nothing can cancel it.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::storage::Completion;
use crate::types::{Entry, LogId, Vote};

use super::disk::{Disk, DiskError};
use super::marker::MarkSync;
use super::{Cause, Shared};

/// One write, as submitted.
#[derive(Debug)]
pub(crate) enum Change {
    Append(Vec<Entry>),
    SaveVote(Vote),
    /// Truncate from the index on, after which the log ends with the position.
    Truncate(u64, Option<LogId>),
    Purge(LogId),
    /// Nothing to do but to come after the writes before it.
    Nothing,
}

impl Change {
    fn entries(&self) -> usize {
        if let Self::Append(entries) = self { entries.len() } else { 0 }
    }
}

pub(crate) struct Write {
    /// Submission order, from 1.
    pub(crate) ticket: u64,
    pub(crate) change: Change,
    pub(crate) bytes: usize,
    pub(crate) done: Completion,
}

/// What is waiting to be written.
#[derive(Default)]
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    writes: VecDeque<Write>,
    closed: bool,
}

impl Waiting {
    /// Takes as many writes from the front as one flush should cover, but at least one if there is one.
    fn cut(&mut self) -> Vec<Write> {
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
enum Next {
    Batch(Vec<Write>),
    /// Nothing at present, and the caller did not want to wait.
    Idle,
    Closed,
}

impl Queue {
    pub(crate) fn push(&self, write: Write) {
        self.lock().writes.push_back(write);
        self.changed.notify_one();
    }

    /// Lets the writer stop once it has written what is queued.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_one();
    }

    pub(crate) fn drain(&self) -> VecDeque<Write> {
        std::mem::take(&mut self.lock().writes)
    }

    fn next(&self, wait: bool) -> Next {
        let mut waiting = self.lock();
        loop {
            if !waiting.writes.is_empty() {
                return Next::Batch(waiting.cut());
            }
            if waiting.closed {
                return Next::Closed;
            }
            if !wait {
                return Next::Idle;
            }
            waiting = self.changed.wait(waiting).expect("invariant: no panic under this lock");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().expect("invariant: no panic under this lock")
    }
}

/// What the writer is doing at the moment, for those who watch it.
pub(crate) struct Progress {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Since when the present batch has been under way.
    busy_since: Option<Instant>,
    /// How many times the limit it may take.
    patience: u32,
    /// Its completions.
    completions: Vec<Completion>,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Running,
    /// The writer has ended, and nothing of sled is left on its stack.
    Stopped,
    /// All of sled is gone, and there is nothing left to watch.
    Closed,
    /// The writer hangs in sled. Should it ever come back, it must not complete anything.
    Hung,
}

/// The watchdog has given up on what the caller was doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GaveUp;

impl State {
    /// A look that comes much later than it should tells of a pause of this process, in which no write could come back:
    /// that time is not the write's.
    fn discount_pause(&mut self, gap: Duration, pace: Duration, now: Instant) {
        if gap > pace * 2
            && let Some(since) = &mut self.busy_since
        {
            *since = since.checked_add(gap - pace).map_or(now, |since| since.min(now));
        }
    }
}

impl Progress {
    pub(crate) fn new() -> Self {
        let state = State { busy_since: None, patience: 1, completions: Vec::new(), phase: Phase::Running };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// How long the present batch, or step, has been under way.
    pub(crate) fn busy_for(&self) -> Option<Duration> {
        self.lock().busy_since.map(|since| since.elapsed())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("invariant: no panic under this lock")
    }

    /// Begins a batch. Its completions are kept here in any case.
    fn begin(&self, completions: Vec<Completion>) -> Result<(), GaveUp> {
        self.start(completions, 1)
    }

    /// Begins, or goes on to, a step of opening or closing. It may take longer than a batch: it may read or sync
    /// all there is.
    pub(crate) fn step(&self) -> Result<(), GaveUp> {
        const STEP_PATIENCE: u32 = 20;
        self.start(Vec::new(), STEP_PATIENCE)
    }

    fn start(&self, completions: Vec<Completion>, patience: u32) -> Result<(), GaveUp> {
        let mut state = self.lock();
        state.busy_since = Some(Instant::now());
        state.patience = patience;
        state.completions = completions;
        if state.phase == Phase::Hung { Err(GaveUp) } else { Ok(()) }
    }

    /// Ends the batch and gives its completions back, unless the watchdog has failed them already.
    pub(crate) fn end(&self) -> Result<Vec<Completion>, GaveUp> {
        let mut state = self.lock();
        state.busy_since = None;
        if state.phase == Phase::Hung {
            return Err(GaveUp);
        }
        Ok(std::mem::take(&mut state.completions))
    }

    /// Ends whatever was under way, for good, and takes the completions that nobody has called.
    fn abandon(&self) -> Vec<Completion> {
        let mut state = self.lock();
        state.busy_since = None;
        std::mem::take(&mut state.completions)
    }

    fn stop(&self) {
        let mut state = self.lock();
        if state.phase == Phase::Running {
            state.phase = Phase::Stopped;
        }
        self.changed.notify_all();
    }

    /// Lets the watchdog end: there is nothing left of sled.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        if state.phase != Phase::Hung {
            state.phase = Phase::Closed;
        }
        self.changed.notify_all();
    }

    /// Waits for so long, or until the writer has ended or hangs. Whether it still runs.
    fn runs_after(&self, pause: Duration) -> bool {
        let state = self.lock();
        let running = |state: &mut State| state.phase == Phase::Running;
        let (state, _) = self
            .changed
            .wait_timeout_while(state, pause, running)
            .expect("invariant: no panic under this lock");
        state.phase == Phase::Running
    }

    /// Waits until the writer will do nothing more.
    pub(crate) fn wait_until_over(&self) -> Phase {
        let mut state = self.lock();
        while state.phase == Phase::Running {
            state = self.changed.wait(state).expect("invariant: no panic under this lock");
        }
        state.phase
    }

    /// Waits for the end, or for a batch to take longer than `limit`: then the completions of
    /// that batch are the caller's to fail.
    fn supervise(&self, limit: Duration) -> Option<Vec<Completion>> {
        /// Looks this often within the limit.
        const LOOKS: u32 = 8;
        let mut state = self.lock();
        let mut looked = Instant::now();
        loop {
            if matches!(state.phase, Phase::Closed | Phase::Hung) {
                return None;
            }
            let now = Instant::now();
            state.discount_pause(now.saturating_duration_since(looked), limit / LOOKS, now);
            looked = now;
            let patience = limit * state.patience;
            if state.busy_since.is_some_and(|since| since.elapsed() > patience) {
                state.phase = Phase::Hung;
                self.changed.notify_all();
                return Some(std::mem::take(&mut state.completions));
            }
            let (next, _) =
                self.changed.wait_timeout(state, limit / LOOKS).expect("invariant: no panic under this lock");
            state = next;
        }
    }
}

/// Body of the supervising thread.
pub(crate) fn supervise(shared: &Shared, limit: Duration) {
    if let Some(completions) = shared.progress.supervise(limit) {
        let reason = format!("a write to the log has not come back for {} ms", limit.as_millis());
        shared.fail(&reason, Cause::Hung, completions);
    }
}

/// Body of the thread that now and then makes the mark durable. The watchdog cannot do this: on a disk that hangs
/// it would hang, too.
pub(crate) fn sync_marks(shared: &Shared, mark: &MarkSync) {
    /// What a power cut may take from the mark. A mark that is behind hides the loss of what came after it.
    const PAUSE: Duration = Duration::from_secs(1);
    let mut running = true;
    while running {
        running = shared.progress.runs_after(PAUSE);
        if shared.progress.lock().phase == Phase::Hung || shared.read().abandoned {
            return;
        }
        if let Err(error) = mark.sync() {
            shared.fail(&format!("cannot sync the ready file: {error}"), Cause::Disk, Vec::new());
            return;
        }
    }
}

/// Body of the writer thread.
pub(crate) fn run(shared: &Arc<Shared>, mut disk: Disk) {
    let outcome = catch_unwind(AssertUnwindSafe(|| serve(shared, &mut disk)));
    let cause = if matches!(outcome, Ok(Err(DiskError::GaveUp))) { Cause::Late } else { Cause::Disk };
    let failure = match outcome {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(panic) => Some(format!("the writer panicked: {}", super::panic_message(&*panic))),
    };
    match failure {
        None => drop(disk),
        Some(reason) => {
            // sled flushes when its last handle goes, and a failed fsync must never be retried.
            std::mem::forget(disk);
            shared.fail(&reason, cause, shared.progress.abandon());
        }
    }
    shared.progress.stop();
}

/// Writes until the queue is closed.
fn serve(shared: &Shared, disk: &mut Disk) -> Result<(), DiskError> {
    loop {
        let writes = match shared.queue.next(!disk.unswept()) {
            Next::Batch(writes) => writes,
            Next::Idle => {
                sweep(shared, disk)?;
                continue;
            }
            Next::Closed => {
                shared.progress.step()?;
                disk.close()?;
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

fn sweep(shared: &Shared, disk: &mut Disk) -> Result<(), DiskError> {
    shared.progress.begin(Vec::new())?;
    disk.sweep()?;
    shared.progress.end()?;
    Ok(())
}

/// Writes one batch and reports its outcome.
fn write(shared: &Shared, disk: &mut Disk, writes: Vec<Write>) -> Result<(), DiskError> {
    let ticket = writes.last().map_or(0, |write| write.ticket);
    let bytes: usize = writes.iter().map(|write| write.bytes).sum();
    let count = writes.len() as u64;
    let (changes, completions): (Vec<_>, Vec<_>) =
        writes.into_iter().map(|write| (write.change, write.done)).unzip();
    shared.progress.begin(completions)?;
    if let Some(room) = &shared.room {
        // sled must not meet a full disk.
        room.before_batch(bytes as u64).map_err(DiskError::Room)?;
    }
    for change in changes {
        match change {
            Change::Append(entries) => disk.append(&entries)?,
            Change::SaveVote(vote) => disk.save_vote(vote)?,
            Change::Truncate(from, last) => disk.truncate(from, last)?,
            Change::Purge(upto) => disk.purge(upto)?,
            Change::Nothing => {}
        }
    }
    disk.flush(shared.committed())?;
    let completions = shared.progress.end()?;
    let failure = shared.settle(ticket);
    shared.stats.queued_bytes.fetch_sub(bytes as u64, Relaxed);
    shared.stats.queued_writes.fetch_sub(count, Relaxed);
    complete(completions.into_iter(), failure.as_ref()).map_err(DiskError::Completion)
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
            outcome = outcome.and(Err(super::panic_message(&*panic).to_owned()));
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_of_the_process_is_not_counted_as_the_writers() {
        let (pace, minute) = (Duration::from_secs(4), Duration::from_secs(60));
        let progress = Progress::new();
        progress.begin(Vec::new()).unwrap();
        let mut state = progress.lock();
        let began = state.busy_since.unwrap();
        // Looks that come in time, or not much later, change nothing.
        state.discount_pause(pace, pace, began + pace);
        state.discount_pause(pace * 2, pace, began + pace * 3);
        assert_eq!(state.busy_since, Some(began));
        // Stopped for a minute: what is left of the gap is one look.
        let now = began + pace * 3 + minute;
        state.discount_pause(minute, pace, now);
        assert_eq!(now - state.busy_since.unwrap(), pace * 4);
        // A batch that began during the gap has not been under way for longer than that.
        state.busy_since = Some(now);
        state.discount_pause(minute, pace, now);
        assert_eq!(state.busy_since, Some(now));
        state.busy_since = None;
        state.discount_pause(minute, pace, now);
        assert_eq!(state.busy_since, None);
    }
}
