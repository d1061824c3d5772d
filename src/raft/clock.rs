//! The clocks of the cluster: elapsed time, which lifetimes are measured in, and log time, which is shown to people.
//!
//! Nothing on a wall clock can be trusted to end a key: it is set, it jumps, and each node has another one. So every
//! entry with a command carries two numbers of the leader that proposed it ([`Reading`]): what its wall clock showed, and
//! how long it had *counted* by its monotonic clock. All nodes add up what was counted, entry by entry, in
//! [`ClusterClock`], which is replicated state and in every snapshot. `docs/design/time.md` has the argument at length.
//!
//! # Elapsed time
//!
//! A leader counts from the moment at which its own log last received a command of an earlier term ([`LeaderClock`]). Every
//! such command was proposed before that moment. So the first reading of a term may be added as a whole to what those
//! commands had reached: it is less than the time that has passed since any of them was proposed. Later readings
//! of the same term add their difference. Entries without a command carry no reading and do not count: a leader that failed before it
//! wrote a command leaves a blank entry behind, and what had passed before that would be lost. A reading that was taken in one term and whose entry got into the log
//! in another one adds nothing, and neither does the next one, because nobody knows what lies between the two.
//!
//! - *Never early*: between two entries elapsed time advances by no more than the time that has passed between their
//!   proposals, to the millisecond.
//! - *Hardly late*: a new leader that was running all along has counted the time without a leader too. One that was
//!   started meanwhile counts from its start.
//! - *No wall clock*: the first entry of a log sets elapsed time to the wall clock of its leader; after that it
//!   enters nothing but log time.
//!
//! The monotonic clock stands still while a machine is suspended, so lifetimes are longer by that: late, never early.
//!
//! # Log time
//!
//! Elapsed time plus an offset. The offset changes when the sum is more than [`TOLERANCE_MS`] away from the wall clock of
//! the leader. So log time follows a clock that was set, in both directions, at the next entry, and
//! otherwise runs evenly. It says when something happened; it must not decide anything.

use std::sync::{Mutex, MutexGuard};

use tokio::time::Instant;

use crate::types::{ClusterClock, Entry, Payload};

/// How far log time may be from the leader's wall clock before it is corrected, in milliseconds. Clocks of different
/// nodes, kept by NTP, are closer to each other than that.
pub const TOLERANCE_MS: u64 = 1_000;

/// The end of the year 9999, in milliseconds since the Unix epoch: what a clock shows that is set to later.
pub const LARGEST_TIME_MS: u64 = 253_402_300_799_999;

/// What the clocks of a leader showed when it proposed an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reading {
    /// Its wall clock, in milliseconds since the Unix epoch.
    pub wall_ms: u64,
    /// The term it was counting in.
    pub term: u64,
    /// How long it had counted in that term, in milliseconds.
    pub counted_ms: u64,
}

/// What an entry says of the time at which it was proposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stamp {
    /// Written by a build that had one clock for everything, in milliseconds since the Unix epoch.
    LogTime(u64),
    /// The leader's clocks.
    Reading(Reading),
}

impl ClusterClock {
    /// Log time in milliseconds since the Unix epoch: what the leader's wall clock showed, give or take
    /// [`TOLERANCE_MS`], when the last entry was proposed. May go back.
    pub fn log_time_ms(&self) -> u64 {
        self.log_time_at(self.elapsed_ms)
    }

    /// The log time, as things stand, of a moment in elapsed time. Never 0, which stands for never.
    pub fn log_time_at(&self, elapsed_ms: u64) -> u64 {
        elapsed_ms.saturating_add_signed(self.wall_offset_ms).max(1)
    }

    /// An entry of `term` that says `stamp` is being applied.
    pub(super) fn advance(&mut self, term: u64, stamp: Stamp) {
        assert!(self.term <= term, "invariant: terms do not fall along the log");
        let before_ms = self.elapsed_ms;
        match stamp {
            Stamp::LogTime(time_ms) => {
                self.elapsed_ms = self.elapsed_ms.max(time_ms);
                // As in a snapshot of such a build, which does not tell the term. No leader changes its build within a term, so
                // the next reading is the first of its own.
                (self.term, self.counted_ms) = (0, None);
            }
            Stamp::Reading(reading) => {
                if *self == Self::default() {
                    self.elapsed_ms = reading.wall_ms;
                } else if reading.term == term {
                    self.elapsed_ms = self.elapsed_at(&reading);
                }
                let counted = (reading.term == term).then_some(reading.counted_ms);
                // Entries may enter the log in another order than that of their readings.
                let before = self.counted_ms.filter(|_| self.term == term);
                (self.term, self.counted_ms) = (term, counted.map(|ms| ms.max(before.unwrap_or(0))));
                self.follow(reading.wall_ms);
            }
        }
        assert!(self.elapsed_ms >= before_ms, "invariant: elapsed time does not go back");
    }

    /// What elapsed time would be after an entry with `reading`, if it came next and in the term of the reading.
    pub(crate) fn elapsed_at(&self, reading: &Reading) -> u64 {
        let passed_ms = match reading.term.cmp(&self.term) {
            std::cmp::Ordering::Less => 0,
            std::cmp::Ordering::Equal => {
                self.counted_ms.map_or(0, |before_ms| reading.counted_ms.saturating_sub(before_ms))
            }
            std::cmp::Ordering::Greater => reading.counted_ms,
        };
        self.elapsed_ms.saturating_add(passed_ms)
    }

    /// Whether time goes on with `reading`. Otherwise an entry has to be written with a reading of its term first.
    pub(crate) fn goes_on_at(&self, reading: &Reading) -> bool {
        reading.term > self.term || (reading.term == self.term && self.counted_ms.is_some())
    }

    /// Corrects log time if it is too far from `wall_ms`.
    fn follow(&mut self, wall_ms: u64) {
        if self.log_time_ms().abs_diff(wall_ms) > TOLERANCE_MS {
            let offset_ms = i128::from(wall_ms) - i128::from(self.elapsed_ms);
            let bound = if offset_ms < 0 { i64::MIN } else { i64::MAX };
            self.wall_offset_ms = i64::try_from(offset_ms).unwrap_or(bound);
        }
    }
}

/// The clock that a node counts by when it leads: it is told what the node's log receives.
#[derive(Debug)]
pub struct LeaderClock(Mutex<Received>);

#[derive(Debug)]
struct Received {
    /// The term of the last entry received since this node started; 0 if there was none.
    term: u64,
    /// No command of an earlier term was received after this.
    since: Instant,
    /// When a command, or a snapshot, was last received; the start of the node if none was.
    last: Instant,
}

/// Entries that a log receives, as far as they matter to a [`LeaderClock`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// The term of the first command; `None` without one.
    pub first_command: Option<u64>,
    /// The term of the last entry.
    pub last: u64,
}

impl Batch {
    /// What `entries` are; `None` if there are none.
    pub fn of(entries: &[Entry]) -> Option<Self> {
        let is_command = |entry: &&Entry| matches!(entry.payload, Payload::Command(_));
        let first_command = entries.iter().find(is_command).map(|entry| entry.log_id.term);
        entries.last().map(|last| Self { first_command, last: last.log_id.term })
    }
}

impl Default for LeaderClock {
    /// What was received earlier was received before now.
    fn default() -> Self {
        let now = Instant::now();
        Self(Mutex::new(Received { term: 0, since: now, last: now }))
    }
}

impl LeaderClock {
    fn received(&self) -> MutexGuard<'_, Received> {
        self.0.lock().expect("invariant: no panic under this lock")
    }

    /// The log is receiving entries.
    pub fn entries_received(&self, Batch { first_command, last }: Batch) {
        let (mut received, now) = (self.received(), Instant::now());
        if last != received.term {
            received.since = received.last;
            received.term = last;
        }
        if first_command.is_some_and(|first| first < last) {
            received.since = now;
        }
        if first_command.is_some() {
            received.last = now;
        }
    }

    /// The node has received a snapshot, which stands for entries of any term.
    pub fn snapshot_received(&self) {
        self.received().last = Instant::now();
    }

    /// What this node counts, beside what its wall clock shows. Of use only if it leads the term of the reading.
    pub fn reading(&self, wall_ms: u64) -> Reading {
        // Nobody would take an entry that says more.
        let wall_ms = wall_ms.min(LARGEST_TIME_MS);
        let received = self.received();
        let counted_ms = u64::try_from(received.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        Reading { wall_ms, term: received.term, counted_ms }
    }
}

#[cfg(test)]
mod tests;
