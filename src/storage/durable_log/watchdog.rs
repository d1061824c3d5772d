//! Whether what the log is doing comes back.
//!
//! A disk can hang for ever, after an IO error for example, and nothing can cancel a call that does. So a thread looks whether
//! a batch, or a step of opening or closing, takes longer than the watchdog allows. If so, the store fails and the
//! completions of that batch with it; should the call ever come back, it completes nothing.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::{Cause, Shared};
use crate::storage::Completion;

/// What the writer is doing at the moment, for those who watch it.
pub(crate) struct WriterProgress {
    state: Mutex<WriterState>,
    changed: Condvar,
}

struct WriterState {
    /// Since when the present batch has been under way.
    busy_since: Option<Instant>,
    /// How many times the limit it may take.
    patience: u32,
    /// Its completions.
    completions: Vec<Completion>,
    phase: WriterPhase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WriterPhase {
    Running,
    /// The writer has ended, and nothing of the disk is left on its stack.
    Stopped,
    /// All of the disk is let go of, and there is nothing left to watch.
    Closed,
    /// The writer hangs in the disk. Should it ever come back, it must not complete anything.
    Hung,
}

/// The watchdog has given up on what the caller was doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GaveUp;

impl WriterState {
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

impl WriterProgress {
    pub(crate) fn new() -> Self {
        let state = WriterState {
            busy_since: None,
            patience: 1,
            completions: Vec::new(),
            phase: WriterPhase::Running,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// How long the present batch, or step, has been under way.
    pub(crate) fn busy_for(&self) -> Option<Duration> {
        self.lock().busy_since.map(|since| since.elapsed())
    }

    fn lock(&self) -> MutexGuard<'_, WriterState> {
        self.state.lock().expect("invariant: no panic under this lock")
    }

    /// Begins a batch. Its completions are kept here in any case.
    pub(super) fn begin(&self, completions: Vec<Completion>) -> Result<(), GaveUp> {
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
        if state.phase == WriterPhase::Hung { Err(GaveUp) } else { Ok(()) }
    }

    /// Ends the batch and gives its completions back, unless the watchdog has failed them already.
    pub(crate) fn end(&self) -> Result<Vec<Completion>, GaveUp> {
        let mut state = self.lock();
        state.busy_since = None;
        if state.phase == WriterPhase::Hung {
            return Err(GaveUp);
        }
        Ok(std::mem::take(&mut state.completions))
    }

    /// Ends whatever was under way, for good, and takes the completions that nobody has called.
    pub(super) fn abandon(&self) -> Vec<Completion> {
        let mut state = self.lock();
        state.busy_since = None;
        std::mem::take(&mut state.completions)
    }

    pub(super) fn stop(&self) {
        let mut state = self.lock();
        if state.phase == WriterPhase::Running {
            state.phase = WriterPhase::Stopped;
        }
        self.changed.notify_all();
    }

    /// Lets the watchdog end: there is nothing left of the disk.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        if state.phase != WriterPhase::Hung {
            state.phase = WriterPhase::Closed;
        }
        self.changed.notify_all();
    }

    /// Waits for so long, or until the writer has ended or hangs. Whether it still runs.
    pub(super) fn runs_after(&self, pause: Duration) -> bool {
        let state = self.lock();
        let running = |state: &mut WriterState| state.phase == WriterPhase::Running;
        let (state, _) = self
            .changed
            .wait_timeout_while(state, pause, running)
            .expect("invariant: no panic under this lock");
        state.phase == WriterPhase::Running
    }

    /// Whether the watchdog has given up.
    pub(super) fn hangs(&self) -> bool {
        self.lock().phase == WriterPhase::Hung
    }

    /// Waits until the writer will do nothing more.
    pub(crate) fn wait_until_over(&self) -> WriterPhase {
        let mut state = self.lock();
        while state.phase == WriterPhase::Running {
            state = self.changed.wait(state).expect("invariant: no panic under this lock");
        }
        state.phase
    }

    /// Waits for the end, or for a batch to take longer than `limit`, or a step its multiple: then the completions of
    /// that batch are the caller's to fail; with them comes how long was waited.
    fn supervise(&self, limit: Duration) -> Option<(Vec<Completion>, Duration)> {
        /// Looks this often within the limit.
        const LOOKS: u32 = 8;
        let mut state = self.lock();
        let mut looked = Instant::now();
        loop {
            if matches!(state.phase, WriterPhase::Closed | WriterPhase::Hung) {
                return None;
            }
            let now = Instant::now();
            state.discount_pause(now.saturating_duration_since(looked), limit / LOOKS, now);
            looked = now;
            let patience = limit.saturating_mul(state.patience);
            if state.busy_since.is_some_and(|since| since.elapsed() > patience) {
                state.phase = WriterPhase::Hung;
                self.changed.notify_all();
                return Some((std::mem::take(&mut state.completions), patience));
            }
            let (next, _) =
                self.changed.wait_timeout(state, limit / LOOKS).expect("invariant: no panic under this lock");
            state = next;
        }
    }
}

/// Body of the supervising thread.
pub(super) fn supervise(shared: &Shared, limit: Duration) {
    if let Some((completions, patience)) = shared.progress.supervise(limit) {
        let reason = format!("a write to the log has not come back for {} ms", patience.as_millis());
        shared.fail(&reason, Cause::Hung, completions);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_of_the_process_is_not_counted_as_the_writers() {
        let (pace, minute) = (Duration::from_secs(4), Duration::from_secs(60));
        let progress = WriterProgress::new();
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
