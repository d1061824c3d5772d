//! What was applied, once, for everybody who follows.
//!
//! The apply task records what each command does ([`Recorder`]), the newest of it stays in a ring in memory, and all of it goes to an
//! event log on disk, as far back as its limits say. Whoever follows has a [`FeedCursor`]: a position, from which on everything is
//! told in order, nothing left out and nothing twice.
//!
//! # Why not the log
//!
//! What a command did depends on the state: a write of a session that was applied before is in the log again and does nothing, a
//! transaction may do one thing or another, a range that is deleted has the keys that it has. So what is followed is what was
//! applied, not what was asked for.
//!
//! # Promises
//!
//! - Nothing can be followed before it is applied, so before it is committed.
//! - A cursor is told of every position that it covers, or that this node does not have it: [`FeedError::Compacted`].
//! - Applying never waits for anybody who follows, nor for the event log. A log that lags so far behind that the ring has to let go of
//!   what is not in it begins anew.
//! - The event log shows nothing that was not applied, and has no gaps. It is made durable before a snapshot is, and the log of the cluster is
//!   purged only behind that; so whatever a loss of power takes from the event log is applied again, and recorded again.
//!
//! `docs/design/feed.md` has the protocol with a figure, `docs/FORMAT.md` every byte.

mod cursor;
mod event_log;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzed;
mod hold;
mod piece;
mod previous;
mod record;
mod recorder;
mod ring;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

pub use self::cursor::{FeedCursor, FeedError, FeedPage};
use self::event_log::LogPage;
pub use self::event_log::{EventLog, EventLogLimits};
pub(crate) use self::hold::FeedHold;
use self::piece::Piece;
pub(crate) use self::previous::{KeyBefore, PreviousValues};
pub use self::record::{FeedContent, FeedRecord};
pub(crate) use self::recorder::Recorder;
use self::ring::Ring;
use crate::types::HistoryEpoch;

/// How far back what was applied can be told, and how far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FeedReach {
    /// The history that positions belong to.
    pub history: HistoryEpoch,
    /// Everything from this position on can be told.
    pub first: u64,
    /// The position after the last one that was applied.
    pub next: u64,
    /// Log time of the last operation, in milliseconds since the Unix epoch; 0 if there is none in memory.
    pub time_ms: u64,
    /// Operations in the event log.
    pub operations: u64,
    /// Bytes of the event log on disk.
    pub bytes: u64,
    /// Whether the event log cannot be written at present.
    pub is_log_failing: bool,
    /// How often the event log had to begin anew, since the node was started.
    pub restarts: u64,
}

/// Where what comes next is.
enum FoundPage {
    Page(FeedPage),
    OnDisk,
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Feed {
    ring: Mutex<Ring>,
    /// Tells the position after the last one that was applied; its largest value when nothing more will be.
    next: watch::Sender<u64>,
    /// How often it began anew.
    lives: watch::Sender<u64>,
    log: Option<Arc<EventLog>>,
}

impl Feed {
    /// A feed with or without an event log behind it.
    pub(crate) fn new(log: Option<Arc<EventLog>>) -> Arc<Self> {
        let ring = Mutex::new(Ring::new(log.is_some()));
        Arc::new(Self { ring, next: watch::Sender::new(0), lives: watch::Sender::new(0), log })
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.next.subscribe()
    }

    /// Tells the position after the last one that was applied.
    pub(crate) fn progress(&self) -> watch::Receiver<u64> {
        self.changes()
    }

    /// See [`Recorder::begin`].
    fn begin(&self, history: HistoryEpoch, next: u64) {
        self.ring().begin(history, next);
        // Also those who are further than that: they learn that it is another history.
        self.lives.send_modify(|lives| *lives += 1);
        self.next.send_replace(next);
        if let Some(log) = &self.log {
            // What it keeps of it is found out with the next write.
            log.begin(history, next);
            self.ring().log_has(Some(next.min(log.next())));
        }
    }

    fn publish(&self, pieces: &mut Vec<Piece>, next: u64) {
        self.ring().push(pieces, next);
        self.next.send_replace(next);
    }

    fn end(&self) {
        self.ring().is_over = true;
        self.next.send_replace(u64::MAX);
        if let Some(log) = &self.log {
            log.close();
        }
    }

    /// Follows from position `next` on: `next` is the first position that is told.
    pub(crate) fn follow(self: &Arc<Self>, next: u64) -> FeedCursor {
        let history = self.ring().history;
        FeedCursor::new(self.clone(), history, next)
    }

    /// Has the event log keep what is there from position `next` on, within bounds, for one who is about to need it. What is gone
    /// already does not come back.
    pub(crate) fn hold(&self, next: u64) -> Option<FeedHold> {
        self.log.as_ref().map(|log| log.holds.hold(next))
    }

    /// How far back it reaches.
    pub(crate) fn reach(&self) -> FeedReach {
        let (mut reach, begins) = {
            let ring = self.ring();
            let reach = FeedReach {
                history: ring.history,
                next: ring.next,
                time_ms: ring.time_ms,
                ..FeedReach::default()
            };
            (reach, ring.begins)
        };
        reach.first = begins;
        if let Some(log) = &self.log {
            let logged = log.reach();
            (reach.operations, reach.bytes) = (logged.operations, logged.bytes);
            (reach.is_log_failing, reach.restarts) = (logged.is_failing, logged.restarts);
            if logged.history == reach.history && logged.next >= begins {
                reach.first = begins.min(logged.first);
            }
        }
        reach
    }

    /// What comes next, if it is in memory.
    fn find(&self, history: HistoryEpoch, next: u64, max_bytes: usize) -> Result<FoundPage, FeedError> {
        let ring = self.ring();
        if ring.is_over {
            return Err(FeedError::Stopped);
        }
        if ring.history.differs_from(history) {
            return Err(FeedError::OtherHistory { known: ring.history });
        }
        if next >= ring.next {
            let page = FeedPage { records: Vec::new(), next, applied_next: ring.next.max(next) };
            return Ok(FoundPage::Page(page));
        }
        if next < ring.begins {
            let first = ring.begins;
            drop(ring);
            return match &self.log {
                Some(_) => Ok(FoundPage::OnDisk),
                None => Err(FeedError::Compacted { first }),
            };
        }
        let (pieces, applied_next) = (ring.pieces_from(next, max_bytes), ring.next);
        // Of one moment with the pieces: those that did not fit are for the next page.
        let last_in_ring = ring.last_piece();
        drop(ring);
        let mut page = FeedPage { records: Vec::new(), next: applied_next, applied_next };
        let taken = take_records(&pieces, (next, applied_next - 1), &mut page.records)?;
        if let Some(upto) = taken.filter(|upto| Some(*upto) < last_in_ring) {
            page.next = upto + 1;
        }
        Ok(FoundPage::Page(page))
    }

    /// What comes next, from the event log. Blocks.
    fn read_log(&self, history: HistoryEpoch, next: u64, max_bytes: usize) -> Result<FeedPage, FeedError> {
        let log = self.log.as_ref().expect("invariant: it was asked for");
        let (known, begins, applied_next) = {
            let ring = self.ring();
            (ring.history, ring.begins, ring.next)
        };
        if known != history {
            return Err(FeedError::OtherHistory { known });
        }
        // Looked at before it is read: a log that begins anew meanwhile would seem to have come as far as memory begins.
        let logged = log.next();
        let pieces = match log.read(history, next, max_bytes)? {
            LogPage::Gone => return Err(FeedError::Compacted { first: self.reach().first }),
            LogPage::Pieces(pieces) => pieces,
        };
        let mut page = FeedPage { records: Vec::new(), next, applied_next };
        match take_records(&pieces, (next, applied_next - 1), &mut page.records)? {
            Some(upto) => page.next = (upto + 1).min(applied_next),
            // All that was in it has come into memory, or is nothing.
            None if logged >= begins && log.has(history, next) => page.next = begins.max(next),
            None => return Err(FeedError::Compacted { first: self.reach().first }),
        }
        Ok(page)
    }

    /// What the event log, which has everything below `next`, does not have yet: the history, where the ring begins, pieces, and the
    /// position after the last one that was applied.
    fn unlogged(&self, next: u64) -> (HistoryEpoch, u64, Vec<Piece>, u64) {
        const WRITE_BYTES: usize = 4 * 1024 * 1024;
        let ring = self.ring();
        (ring.history, ring.begins, ring.pieces_from(next, WRITE_BYTES), ring.next)
    }

    /// Whether more waits for the event log than memory should hold: whoever applies the log at a start, and blocks anyway, waits for it.
    pub(crate) fn is_log_behind(&self) -> bool {
        self.ring().is_log_behind()
    }

    /// Writes what is new into the event log, if there is one. Blocks. What it fails with is told in the log and by
    /// [`reach`](Self::reach), and tried again later.
    pub(crate) fn write_log(&self) {
        if let Some(log) = &self.log {
            log.write(self, None);
        }
    }

    /// As [`write_log`](Self::write_log), and makes it durable as far as position `upto`, which has been applied.
    pub(crate) fn sync_log(&self, upto: u64) {
        if let Some(log) = &self.log {
            log.write(self, Some(upto));
        }
    }

    /// The event log, if there is one.
    pub(crate) fn log(&self) -> Option<&Arc<EventLog>> {
        self.log.as_ref()
    }
}

/// Adds the records of `pieces` between two positions, and tells the last position that they cover.
fn take_records(
    pieces: &[Piece],
    bounds: (u64, u64),
    records: &mut Vec<FeedRecord>,
) -> Result<Option<u64>, FeedError> {
    for piece in pieces {
        let read = piece.records(bounds, records);
        read.map_err(|error| FeedError::Unreadable { reason: error.to_string() })?;
    }
    Ok(pieces.last().map(|last| last.upto))
}
