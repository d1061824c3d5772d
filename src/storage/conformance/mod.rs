//! What every [`LogStore`] promises, checked against a model that is too simple to be wrong. For whoever brings a store: the stores
//! of this crate pass it too.
//!
//! A [`Rig`] wraps a store together with what it takes to close or crash it and open it again. [`check`] tries some fixed cases
//! first, then random sequences of writes, reads, reopenings and crashes; a sequence in which a promise is broken is shortened
//! before it is told.
//!
//! ```
//! use quorate::testkit::conformance::{self, Effort, Rig};
//! use quorate::store::{LogStore, MemoryDisk, MemoryStore, SyncMode};
//!
//! struct Mine {
//!     disk: MemoryDisk,
//!     store: MemoryStore,
//! }
//!
//! impl Rig for Mine {
//!     fn store(&self) -> &dyn LogStore {
//!         &self.store
//!     }
//!
//!     fn sync(&mut self) {
//!         self.disk.sync();
//!     }
//!
//!     fn reopen(&mut self) {
//!         self.disk.sync();
//!         self.store = MemoryStore::open(&self.disk);
//!     }
//!
//!     fn crash(&mut self, keep: usize) {
//!         self.disk.crash(keep);
//!         self.store = MemoryStore::open(&self.disk);
//!     }
//! }
//!
//! let open = || -> Box<dyn Rig> {
//!     let disk = MemoryDisk::new(SyncMode::Manual);
//!     Box::new(Mine { store: MemoryStore::open(&disk), disk })
//! };
//! conformance::check(open, Effort { runs: 10, ..Effort::default() }).unwrap();
//! ```
//!
//! # What it does not do
//! Cut the power: a crash is what the rig makes of it. One that kills the process shows what the store leaves to the kernel. Only one
//! that loses what was not synced shows a missing fsync: on a store in memory by dropping it, on a real one by a disk that forgets.

mod failures;
mod fixed;
mod model;
mod steps;
#[cfg(test)]
pub(crate) mod tests;

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, TryRecvError};
use std::time::Duration;

use super::{Completion, LogStore};
use crate::types::LogId;
use model::{LogMoment, ModelWrite};
pub(crate) use steps::RandomStep;
#[cfg(test)]
pub(crate) use steps::command;

/// A store under test.
pub trait Rig {
    /// The store that is open.
    fn store(&self) -> &dyn LogStore;

    /// Makes what was submitted durable, if the store does not do so by itself.
    fn sync(&mut self);

    /// Closes in order and opens again: nothing may be lost, whether or not it was synced before.
    fn reopen(&mut self);

    /// Crashes and opens again. Of the writes that are not durable, the first `keep` survive, or as many as the rig
    /// happens to keep.
    fn crash(&mut self, keep: usize);

    /// Has the next write that reaches the disk fail, or the sync of it. False if the rig cannot; then it is not checked that
    /// the first failure is final.
    fn fail_next_write(&mut self) -> bool {
        false
    }
}

/// What a store owes, as numbered in the documentation of the [storage room](super), and what it says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Promise {
    /// 1: after a crash there is a prefix of what was submitted.
    Order,
    /// 1: every write whose completion was called with `Ok` is in it, and after closing in order every write.
    Durability,
    /// 2: what was submitted shows at once.
    Visibility,
    /// 3: a completion is called once, in order, and without being asked again.
    Completion,
    /// 4: after one failed write every later one fails.
    Failure,
}

/// A promise that a store has broken.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{promise:?} is not kept: {detail}")]
#[non_exhaustive]
pub struct Broken {
    /// Which.
    pub promise: Promise,
    /// In which way, after what.
    pub detail: String,
}

/// How long to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort {
    /// Random sequences. Default: 100.
    pub runs: u64,
    /// Steps of the longest of them. Default: 40.
    pub steps: usize,
    /// Makes them others. Default: 0.
    pub seed: u64,
    /// Within this time a write has to be completed once the rig has synced. Default: 30 s.
    pub patience: Duration,
}

impl Default for Effort {
    fn default() -> Self {
        Self { runs: 100, steps: 40, seed: 0, patience: Duration::from_secs(30) }
    }
}

/// Checks that a store keeps its promises. `open` makes a rig with an empty store, each time another.
///
/// # Errors
/// The first promise that is broken, with the shortest sequence found that shows it.
pub fn check(mut open: impl FnMut() -> Box<dyn Rig>, effort: Effort) -> Result<(), Broken> {
    fixed::cases(&mut open, effort.patience)?;
    failures::cases(&mut open, effort.patience)?;
    for run in 0..effort.runs {
        let steps = steps::sequence(effort.seed.wrapping_mul(effort.runs).wrapping_add(run), effort.steps);
        if let Err(broken) = try_steps(&mut *open(), &steps, effort.patience) {
            return Err(shorten(&mut open, steps, broken, effort.patience));
        }
    }
    Ok(())
}

/// Leaves out steps for as long as the same promise is broken.
fn shorten(
    open: &mut impl FnMut() -> Box<dyn Rig>,
    mut steps: Vec<RandomStep>,
    mut broken: Broken,
    patience: Duration,
) -> Broken {
    let mut at = steps.len();
    while at > 0 {
        at -= 1;
        let mut fewer = steps.clone();
        fewer.remove(at);
        match try_steps(&mut *open(), &fewer, patience) {
            Err(again) if again.promise == broken.promise => (steps, broken) = (fewer, again),
            _ => {}
        }
    }
    broken.detail = format!("{}, after {steps:?}", broken.detail);
    broken
}

pub(crate) fn broken(promise: Promise, detail: impl Into<String>) -> Broken {
    Broken { promise, detail: detail.into() }
}

pub(crate) fn ensure(is_kept: bool, promise: Promise, detail: impl FnOnce() -> String) -> Result<(), Broken> {
    if is_kept { Ok(()) } else { Err(broken(promise, detail())) }
}

/// A completion, and where its outcome arrives.
pub(crate) fn completion() -> (Completion, Receiver<io::Result<()>>) {
    let (sender, receiver) = mpsc::channel();
    (Box::new(move |outcome| sender.send(outcome).unwrap_or_default()), receiver)
}

/// Waits for a completion that has to come.
fn outcome(of: &Receiver<io::Result<()>>, patience: Duration) -> Result<io::Result<()>, Broken> {
    of.recv_timeout(patience).map_err(|error| {
        let how = match error {
            RecvTimeoutError::Timeout => format!("a completion was not called within {patience:?}"),
            RecvTimeoutError::Disconnected => "a completion was dropped without a call".to_owned(),
        };
        broken(Promise::Completion, how)
    })
}

/// A run of random steps.
struct RandomRun<'a> {
    rig: &'a mut dyn Rig,
    patience: Duration,
    /// The log as it should show.
    now: LogMoment,
    /// Every state of the log that a crash may leave, oldest first; the first is surely durable.
    moments: Vec<LogMoment>,
    /// Every position that was said to be committed.
    saved: Vec<Option<LogId>>,
    /// Writes that nobody has waited for, and the moment at which each was complete.
    waiting: Vec<(Receiver<io::Result<()>>, usize)>,
}

/// Runs `steps` on the store and on the model, and compares them after each.
pub(crate) fn try_steps(rig: &mut dyn Rig, steps: &[RandomStep], patience: Duration) -> Result<(), Broken> {
    let now = LogMoment::default();
    let mut run =
        RandomRun { rig, patience, moments: vec![now.clone()], now, saved: vec![None], waiting: Vec::new() };
    for step in steps {
        match step {
            RandomStep::Commit(fraction) => run.commit(*fraction),
            RandomStep::Read(from, to, max_bytes) => run.read(*from, *to, *max_bytes)?,
            RandomStep::Sync => run.sync()?,
            RandomStep::Reopen => run.reopen()?,
            RandomStep::Crash(keep) => run.crash(*keep)?,
            write => run.write(write),
        }
        run.compare(Promise::Visibility)?;
    }
    Ok(())
}

impl RandomRun<'_> {
    fn write(&mut self, step: &RandomStep) {
        let Some(write) = ModelWrite::of(step, &mut self.now) else { return };
        self.moments.extend(self.now.take(&write));
        let (done, outcome) = completion();
        self.waiting.push((outcome, self.moments.len() - 1));
        write.submit(self.rig.store(), done);
    }

    fn commit(&mut self, fraction: u8) {
        let committed = self.now.entry_at(fraction).map(|entry| entry.log_id);
        if committed > self.now.committed {
            self.now.committed = committed;
            self.saved.push(committed);
            self.rig.store().save_committed(committed);
            if let Some(newest) = self.moments.last_mut() {
                newest.committed = committed;
            }
        }
    }

    fn read(&self, from: u8, to: u8, max_bytes: usize) -> Result<(), Broken> {
        let (start, end) = (self.now.index_at(from), self.now.index_at(to));
        let read = self.rig.store().read(start, end, max_bytes);
        let read = read.map_err(|error| broken(Promise::Visibility, format!("a read fails: {error}")))?;
        ensure(read == self.now.read(start, end, max_bytes), Promise::Visibility, || {
            format!("reading {start}..{end} with {max_bytes} bytes gives others than were appended")
        })
    }

    /// Waits until everything is durable.
    fn sync(&mut self) -> Result<(), Broken> {
        self.rig.sync();
        for (of, _) in self.waiting.drain(..) {
            outcome(&of, self.patience)?
                .map_err(|error| broken(Promise::Completion, format!("a write fails: {error}")))?;
        }
        self.moments = vec![self.now.clone()];
        Ok(())
    }

    fn reopen(&mut self) -> Result<(), Broken> {
        self.sync()?;
        self.rig.reopen();
        self.now.committed = self.recovered(self.rig.store().committed())?;
        self.compare(Promise::Durability)
    }

    fn crash(&mut self, keep: usize) -> Result<(), Broken> {
        self.rig.crash(keep);
        let mut confirmed = 0;
        for (of, moment) in self.waiting.drain(..) {
            match of.try_recv() {
                Ok(Ok(())) => confirmed = moment,
                // What comes of them nobody was told.
                Ok(Err(_)) | Err(TryRecvError::Empty | TryRecvError::Disconnected) => {}
            }
        }
        let found = LogMoment::of(self.rig.store())?;
        let is_found = |moment: &LogMoment| moment.shows_the_same(&found);
        let Some(left) = self.moments.iter().rposition(is_found) else {
            return Err(broken(Promise::Order, format!("a crash leaves {found}, which the log never was")));
        };
        ensure(left >= confirmed, Promise::Durability, || {
            format!("a crash leaves {found}, although {} was confirmed", self.moments[confirmed])
        })?;
        let term = self.now.term;
        self.now = self.moments.swap_remove(left);
        self.now.committed = self.recovered(found.committed)?;
        self.now.term = term + 1; // entries of before and after can be told apart
        self.moments = vec![self.now.clone()];
        Ok(())
    }

    /// What is committed as the store says after it was opened: something that it was told, and that the log holds.
    fn recovered(&self, committed: Option<LogId>) -> Result<Option<LogId>, Broken> {
        ensure(self.saved.contains(&committed), Promise::Order, || {
            format!("{committed:?} is committed, and was never said to be")
        })?;
        let is_held = committed.is_none_or(|committed| self.now.holds(committed));
        ensure(is_held, Promise::Order, || format!("{committed:?} is committed, and not in the log"))?;
        Ok(committed)
    }

    /// Compares what shows with what should.
    fn compare(&self, promise: Promise) -> Result<(), Broken> {
        let found = LogMoment::of(self.rig.store())?;
        let is_same = found.shows_the_same(&self.now) && found.committed == self.now.committed;
        ensure(is_same, promise, || format!("there is {found}, and should be {}", self.now))
    }
}
