//! How far the start of a node has come: for probes, for the log, and for whoever waits.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

/// What a start is doing at a moment, in the order in which it does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StartStep {
    /// Looking at the data directory.
    Directory,
    /// Reading the files of the log, counted in bytes.
    ReadingLog,
    /// sled builds its index of the log; it does not say how far it is.
    OpeningLog,
    /// Verifying the entries of the log, one by one.
    VerifyingLog,
    /// Reading the newest snapshot, counted in bytes: once to verify it, once to load it.
    ReadingSnapshot,
    /// Applying the committed entries that the snapshot does not cover.
    Applying,
    /// The node takes part in its cluster.
    Done,
}

impl StartStep {
    const ALL: [Self; 7] = [
        Self::Directory,
        Self::ReadingLog,
        Self::OpeningLog,
        Self::VerifyingLog,
        Self::ReadingSnapshot,
        Self::Applying,
        Self::Done,
    ];
}

/// A count of how far a start is. Cheap to clone; all clones are the same count. Counting costs nothing that could be
/// measured, and whoever looks waits for nobody.
#[derive(Debug, Clone, Default)]
pub struct StartProgress(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// Index into [`StartStep::ALL`].
    step: AtomicU8,
    done: AtomicU64,
    total: AtomicU64,
}

/// How far a start is at one moment. Shown as a phrase such as `reading the log: 12 of 800 MiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct StartedSoFar {
    /// What it is doing.
    pub step: StartStep,
    /// How much of that is done, in the step's own unit.
    pub done: u64,
    /// How much there is to do; 0 where that is not known.
    pub total: u64,
}

impl StartProgress {
    /// How far it is now.
    pub fn now(&self) -> StartedSoFar {
        let Counts { step, done, total } = &*self.0;
        let step = StartStep::ALL.get(usize::from(step.load(Relaxed))).copied().unwrap_or(StartStep::Done);
        let total = total.load(Relaxed);
        let done = done.load(Relaxed);
        StartedSoFar { step, done: if total == 0 { done } else { done.min(total) }, total }
    }

    /// The next step begins, of which there is `total`.
    pub(crate) fn begin(&self, step: StartStep, total: u64) {
        let number = StartStep::ALL.iter().position(|known| *known == step).unwrap_or_default();
        self.0.done.store(0, Relaxed);
        self.0.total.store(total, Relaxed);
        self.0.step.store(u8::try_from(number).unwrap_or(u8::MAX), Relaxed);
    }

    /// So much more is done.
    pub(crate) fn add(&self, amount: u64) {
        self.0.done.fetch_add(amount, Relaxed);
    }

    /// So much is done by now.
    pub(crate) fn reach(&self, done: u64) {
        self.0.done.store(done, Relaxed);
    }
}

impl fmt::Display for StartedSoFar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Bytes are shown in these.
        const MIB: u64 = 1024 * 1024;
        let Self { step, done, total } = *self;
        let bytes = |f: &mut fmt::Formatter<'_>, what: &str| {
            write!(f, "{what}: {} of {} MiB", done / MIB, total.div_ceil(MIB))
        };
        match step {
            StartStep::Directory => f.write_str("opening the data directory"),
            StartStep::ReadingLog => bytes(f, "reading the log"),
            StartStep::OpeningLog => f.write_str("opening the log"),
            StartStep::VerifyingLog => write!(f, "verifying the log: {done} of {total} entries"),
            StartStep::ReadingSnapshot => bytes(f, "reading the snapshot"),
            StartStep::Applying => write!(f, "applying the log: {done} of {total} entries"),
            StartStep::Done => f.write_str("started"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_says_how_far_it_is() {
        let progress = StartProgress::default();
        assert_eq!(progress.now().to_string(), "opening the data directory");
        progress.begin(StartStep::ReadingLog, 800 * 1024 * 1024);
        progress.add(12 * 1024 * 1024);
        assert_eq!(progress.clone().now().to_string(), "reading the log: 12 of 800 MiB");
        progress.begin(StartStep::VerifyingLog, 10);
        assert_eq!(progress.now().to_string(), "verifying the log: 0 of 10 entries");
        progress.reach(99);
        assert_eq!(progress.now().done, 10, "never more than there is");
        for step in StartStep::ALL {
            progress.begin(step, 1);
            assert_eq!(progress.now().step, step);
        }
    }
}
