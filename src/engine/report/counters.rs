//! What the engine counts: reads, acknowledgements and refusals. Read where it is counted, at any time.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::engine::Engine;
use crate::machine::StateMachine;
use crate::raft::activity::Activity;
use crate::reason::Reason;
use crate::types::{AckLevel, ReadLevel, ReadWait};

/// The reasons for which commands are refused that are counted: most are not even proposed, those of sessions when they
/// come to be applied.
pub const REFUSALS: [Reason; 9] = [
    Reason::TooLarge,
    Reason::Overloaded,
    Reason::DiskFull,
    Reason::DiskStalled,
    Reason::NoQuorum,
    Reason::NotLeader,
    Reason::TooManySessions,
    Reason::WindowExceeded,
    Reason::QuotaExceeded,
];

/// Names of the read levels in metrics, in the order in which [`Counters`] counts them.
pub const READ_LEVELS: [&str; 4] = ["linearizable", "lease", "bounded", "local"];

/// A read that waits; it counts for as long as this lives.
pub(in crate::engine) struct WaitingRead<'a>(&'a AtomicU64);

impl Drop for WaitingRead<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// What the engine counts, since the node started.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Counters {
    refused: [AtomicU64; REFUSALS.len()],
    reads: [AtomicU64; READ_LEVELS.len()],
    acknowledged: [AtomicU64; AckLevel::ALL.len()],
    waiting: [AtomicU64; ReadWait::ALL.len()],
    /// Commands proposed because the machine had asked to be woken.
    pub wake_ups: AtomicU64,
    /// Entries proposed for nothing but their time.
    pub clock_entries: AtomicU64,
    /// Jumps of this node's wall clock.
    pub clock_jumps: AtomicU64,
}

impl Counters {
    /// Counts a refusal, if it is for one of [`REFUSALS`].
    pub(in crate::engine) fn refuse(&self, why: Reason) {
        if let Some(place) = REFUSALS.iter().position(|counted| *counted == why) {
            self.refused[place].fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn read(&self, level: ReadLevel) {
        let place = match level {
            ReadLevel::Linearizable => 0,
            ReadLevel::Lease => 1,
            ReadLevel::Bounded { .. } => 2,
            ReadLevel::Local => 3,
        };
        self.reads[place].fetch_add(1, Relaxed);
    }

    pub(in crate::engine) fn acknowledge(&self, level: AckLevel) {
        self.acknowledged[level as usize].fetch_add(1, Relaxed);
    }

    /// Commands acknowledged at this level, for sessions and of the machine's own included.
    pub fn acknowledged(&self, level: AckLevel) -> u64 {
        self.acknowledged[level as usize].load(Relaxed)
    }

    pub(in crate::engine) fn wait(&self, on: ReadWait) -> WaitingRead<'_> {
        let waiting = &self.waiting[on as usize];
        waiting.fetch_add(1, Relaxed);
        WaitingRead(waiting)
    }

    /// Reads that wait for this at the moment.
    pub fn waiting(&self, on: ReadWait) -> u64 {
        self.waiting[on as usize].load(Relaxed)
    }

    /// Commands refused, by the reasons in [`REFUSALS`].
    pub fn refused(&self) -> [u64; REFUSALS.len()] {
        std::array::from_fn(|place| self.refused[place].load(Relaxed))
    }

    /// Reads asked for, by the names in [`READ_LEVELS`].
    pub fn reads(&self) -> [u64; READ_LEVELS.len()] {
        std::array::from_fn(|place| self.reads[place].load(Relaxed))
    }
}

impl<M: StateMachine> Engine<M> {
    /// What the core has counted: elections, applied entries, snapshots and the like.
    pub fn activity(&self) -> &Activity {
        self.inner.core.activity()
    }

    /// What the engine has counted: reads, acknowledgements and refusals.
    pub fn counters(&self) -> &Counters {
        &self.inner.counters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_and_levels_are_counted_in_their_places() {
        let counters = Counters::default();
        REFUSALS.into_iter().for_each(|why| counters.refuse(why));
        counters.refuse(Reason::Overloaded);
        counters.refuse(Reason::NotFound);
        assert_eq!(counters.refused(), [1, 2, 1, 1, 1, 1, 1, 1, 1]);
        counters.read(ReadLevel::Bounded { max_lag_ms: 5 });
        assert_eq!(counters.reads(), [0, 0, 1, 0]);
        counters.acknowledge(AckLevel::Leader);
        assert_eq!(AckLevel::ALL.map(|level| counters.acknowledged(level)), [0, 0, 1]);
    }
}
