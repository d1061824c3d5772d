//! What was applied, on disk: behind the ring, as far back as its limits say, across restarts.
//!
//! One task writes it, behind whoever applies, and nobody waits for that. What is written is handed to the operating system at once, and
//! made durable before each snapshot. A start finds it to end at, before or behind the position that the node begins to apply
//! from. If it is before that, there is a gap, and the log begins anew; what is behind is not written again, and told once it is applied
//! again.
//!
//! What is beyond its limits goes, but for what somebody needs who is [catching up](super::hold), within bounds of its own.
//!
//! A write that fails is tried again later: what is there stays, and can be told. Once the ring has let go of what is not in it, or
//! after a failed fsync, the log begins anew, the latter with the next start of the node.

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use tokio::time::Instant;

use super::Feed;
use super::cursor::FeedError;
use super::hold::FeedHolds;
use super::piece::Piece;
use super::record::{FeedRecord, NoRecord};
use crate::error::StorageError;
use crate::runtime;
use crate::storage::segments::{
    CutReason, KeepLimits, ReadSegmentsError, SegmentLog, SegmentOptions, SegmentReader, SegmentRecord,
};
use crate::types::HistoryEpoch;

/// For those who are catching up it may become so many times as large as it may otherwise.
const HELD_TIMES: u64 = 4;
/// How long to wait after a write that failed.
const PAUSE: Duration = Duration::from_secs(5);

/// How much of what was applied a node keeps on its disk for those who follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventLogLimits {
    /// Most operations.
    pub operations: u64,
    /// Most bytes on disk.
    pub bytes: u64,
    /// How old an operation may be, in milliseconds of log time; 0: as old as the others allow.
    pub age_ms: u64,
}

impl Default for EventLogLimits {
    /// A million operations, 1 GiB, of any age.
    fn default() -> Self {
        Self { operations: 1_000_000, bytes: 1024 * 1024 * 1024, age_ms: 0 }
    }
}

/// What the log has, and what is to become of it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LogState {
    pub(super) history: HistoryEpoch,
    /// Everything from here on is in it.
    pub(super) first: u64,
    /// Everything below has been written.
    pub(super) next: u64,
    pub(super) operations: u64,
    pub(super) bytes: u64,
    pub(super) is_failing: bool,
    pub(super) restarts: u64,
    /// It has nothing of this history up to there, and is to begin there.
    reset: Option<(HistoryEpoch, u64)>,
}

/// What the log has from a position on.
pub(super) enum LogPage {
    Pieces(Vec<Piece>),
    /// It does not reach back so far.
    Gone,
}

/// See the [module](self).
#[derive(Debug)]
pub struct EventLog {
    /// None once it is closed.
    writer: Mutex<Option<EventLogWriter>>,
    is_closed: AtomicBool,
    reader: SegmentReader,
    state: Mutex<LogState>,
    limits: Mutex<EventLogLimits>,
    pub(super) holds: Arc<FeedHolds>,
}

struct EventLogWriter {
    segments: SegmentLog,
    failed_at: Option<Instant>,
}

impl fmt::Debug for EventLogWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventLogWriter").field("reach", &self.segments.reach()).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EventLog {
    /// The log in the directory `dir`, which is made if it is not there. Blocks.
    ///
    /// # Errors
    /// When another process has it open, a newer version has written it, or it cannot be read. Damage is no error: what is from there on is cut off.
    pub fn open(dir: &Path, limits: EventLogLimits) -> Result<Self, StorageError> {
        let (segments, cut) = SegmentLog::open(dir, SegmentOptions::default())?;
        if let Some(cut) = cut {
            tracing::warn!(path = %cut.path.display(), offset = cut.offset, bytes = cut.bytes, was_whole_before = cut.reason == CutReason::Damage, "the event log is cut where it is damaged: followers that are further behind need a snapshot");
        }
        let reader = segments.reader();
        let log = Self {
            writer: Mutex::new(Some(EventLogWriter { segments, failed_at: None })),
            is_closed: AtomicBool::new(false),
            reader,
            state: Mutex::default(),
            limits: Mutex::new(limits),
            holds: Arc::default(),
        };
        log.find_out()?;
        Ok(log)
    }

    /// What is there at a start.
    fn find_out(&self) -> Result<(), StorageError> {
        let reach = self.reader.reach();
        let mut state = lock(&self.state);
        (state.operations, state.bytes) = (reach.count, reach.bytes);
        let Some((first_key, last_key)) = reach.first_key.zip(reach.last_key) else { return Ok(()) };
        let (first, last) = (self.piece_at(first_key)?, self.piece_at(last_key)?);
        // What cannot be read, or is not one log, has nothing that could be told.
        if let Some(((history, first), (last_history, last))) = first.zip(last)
            && history == last_history
        {
            (state.history, state.first, state.next) = (history, first.from, last.upto + 1);
        }
        Ok(())
    }

    fn piece_at(&self, key: u64) -> Result<Option<(HistoryEpoch, Piece)>, StorageError> {
        let records = match self.reader.read(key, 0) {
            Ok(records) => records,
            Err(ReadSegmentsError::Storage(error)) => return Err(error),
            Err(ReadSegmentsError::Purged { .. } | ReadSegmentsError::Damaged { .. }) => return Ok(None),
        };
        Ok(records.into_iter().next().and_then(|record| Piece::read(record.payload).ok()))
    }

    pub(super) fn reach(&self) -> LogState {
        let mut state = *lock(&self.state);
        if let Some((history, next)) = state.reset {
            (state.history, state.first, state.next) = (history, next, next);
        }
        state
    }

    /// The position after the last one that was written.
    pub(super) fn next(&self) -> u64 {
        self.reach().next
    }

    /// The history that it is of, the first position that it has, and the one after the last.
    pub(crate) fn extent(&self) -> (HistoryEpoch, u64, u64) {
        let state = self.reach();
        (state.history, state.first, state.next)
    }

    /// What happened from position `next` on, in about `max_bytes`, and the position after that. Blocks.
    ///
    /// # Errors
    /// That it cannot be read, or is not there.
    pub(crate) fn records(
        &self,
        history: HistoryEpoch,
        next: u64,
        max_bytes: usize,
    ) -> std::io::Result<(Vec<FeedRecord>, u64)> {
        let gone = || std::io::Error::other(format!("the event log does not have position {next}"));
        let LogPage::Pieces(pieces) = self.read(history, next, max_bytes).map_err(std::io::Error::other)?
        else {
            return Err(gone());
        };
        let mut records = Vec::new();
        for piece in &pieces {
            piece.records((next, u64::MAX), &mut records).map_err(std::io::Error::other)?;
        }
        pieces.last().map(|last| (records, last.upto + 1)).ok_or_else(gone)
    }

    /// How much it keeps.
    pub fn limits(&self) -> EventLogLimits {
        *lock(&self.limits)
    }

    /// Has it keep so much, from the next write on.
    pub(crate) fn set_limits(&self, limits: EventLogLimits) {
        *lock(&self.limits) = limits;
    }

    /// What comes next is position `next` of `history`.
    pub(super) fn begin(&self, history: HistoryEpoch, next: u64) {
        if history == HistoryEpoch::UNKNOWN && next == 0 {
            // Its history is told with the first entry.
            return;
        }
        let mut state = lock(&self.state);
        let goes_on =
            state.reset.is_none() && state.history == history && (state.first..=state.next).contains(&next);
        if !goes_on {
            // One that begins behind the state has lost nothing that is not told again.
            let is_lost = state.next > state.first && state.first <= next;
            if is_lost && state.history == history {
                state.restarts += 1;
                tracing::warn!(
                    ended = state.next,
                    begins = next,
                    "the event log does not reach the state of this node, and begins anew: followers that are behind need a snapshot"
                );
            }
            state.reset = Some((history, next));
        }
    }

    /// Pieces from position `next` on. Blocks.
    pub(super) fn read(
        &self,
        history: HistoryEpoch,
        next: u64,
        max_bytes: usize,
    ) -> Result<LogPage, FeedError> {
        if !self.has(history, next) {
            return Ok(LogPage::Gone);
        }
        let records = match self.reader.read(next, max_bytes) {
            Ok(records) => records,
            Err(ReadSegmentsError::Purged { .. }) => return Ok(LogPage::Gone),
            Err(error) => return Err(FeedError::Unreadable { reason: error.to_string() }),
        };
        match in_sequence(records, history, next) {
            Ok(pieces) => Ok(LogPage::Pieces(pieces)),
            // It may have been purged, or have begun anew, meanwhile.
            Err(_) if !self.has(history, next) || self.is_being_purged(next) => Ok(LogPage::Gone),
            Err(error) => Err(FeedError::Unreadable { reason: error.to_string() }),
        }
    }

    /// Whether what is left begins behind position `next`, of which [`has`](Self::has) does not know yet.
    fn is_being_purged(&self, next: u64) -> bool {
        let first = self.reader.reach().first_key;
        let first = first.and_then(|first| self.piece_at(first).ok().flatten());
        first.is_some_and(|(_, piece)| piece.from > next)
    }

    /// Whether it has `history` from position `next` on.
    pub(super) fn has(&self, history: HistoryEpoch, next: u64) -> bool {
        let state = self.reach();
        state.history == history && state.first <= next
    }

    /// Writes what `feed` has and it has not, and makes all of it durable, as having come as far as position `durable`, if one is given.
    pub(super) fn write(&self, feed: &Feed, durable: Option<u64>) {
        if let Some(writer) = &mut *lock(&self.writer) {
            self.write_with(writer, feed, durable);
        }
        if self.is_closed.load(Ordering::Acquire) {
            self.close();
        }
    }

    /// Lets go of the directory, which may be opened again, once a write that is under way is done. It is not written any more.
    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::Release);
        match self.writer.try_lock() {
            Ok(mut writer) => *writer = None,
            Err(TryLockError::Poisoned(poisoned)) => *poisoned.into_inner() = None,
            // Whoever writes looks whether it was closed meanwhile.
            Err(TryLockError::WouldBlock) => {}
        }
    }

    fn write_with(&self, writer: &mut EventLogWriter, feed: &Feed, durable: Option<u64>) {
        if durable.is_none() && writer.failed_at.is_some_and(|at| at.elapsed() < PAUSE) {
            return;
        }
        let outcome = self.write_new(&mut writer.segments, feed).and_then(|()| match durable {
            Some(upto) => self.write_durably(&mut writer.segments, upto),
            None => Ok(()),
        });
        let failed = outcome.is_err();
        if let Err(error) = outcome
            && writer.failed_at.is_none()
        {
            tracing::warn!(%error, "the event log cannot be written: followers that are far behind may need a snapshot");
        }
        writer.failed_at = failed.then(Instant::now);
        let reach = writer.segments.reach();
        let mut state = lock(&self.state);
        (state.operations, state.bytes, state.is_failing) = (reach.count, reach.bytes, failed);
        let (next, is_settled) = (state.next, state.reset.is_none());
        drop(state);
        if is_settled {
            feed.ring().log_has(Some(next));
        }
    }

    fn write_new(&self, segments: &mut SegmentLog, feed: &Feed) -> Result<(), StorageError> {
        loop {
            self.begin_anew(segments)?;
            let state = *lock(&self.state);
            let (history, begins, pieces, next) = feed.unlogged(state.next);
            if history != state.history || next <= state.next {
                // Something may have become too old, or the limits smaller.
                return self.purge(segments);
            }
            if begins > state.next {
                tracing::warn!(
                    written = state.next,
                    begins,
                    "the event log cannot be written as fast as commands are applied, and begins anew"
                );
                let mut state = lock(&self.state);
                state.restarts += 1;
                state.reset.get_or_insert((history, begins));
                continue;
            }
            for piece in &pieces {
                append(segments, history, written(segments, &state), piece)?;
            }
            segments.flush()?;
            // Only what can be read by now.
            lock(&self.state).next = pieces.last().map_or(next, |last| last.upto + 1);
            self.purge(segments)?;
        }
    }

    /// Does what [`begin`](Self::begin) has asked for.
    fn begin_anew(&self, segments: &mut SegmentLog) -> Result<(), StorageError> {
        let Some(reset) = lock(&self.state).reset else { return Ok(()) };
        segments.clear()?;
        let mut state = lock(&self.state);
        let (history, next) = reset;
        (state.history, state.first, state.next) = (history, next, next);
        if state.reset == Some(reset) {
            state.reset = None;
        }
        Ok(())
    }

    fn purge(&self, segments: &mut SegmentLog) -> Result<(), StorageError> {
        let EventLogLimits { operations, bytes, age_ms } = self.limits();
        let before = segments.reach().first_key;
        let limits = KeepLimits {
            max_count: operations,
            max_bytes: bytes,
            max_age_ms: age_ms,
            held_from: self.holds.first(),
            max_held_bytes: bytes.saturating_mul(HELD_TIMES),
        };
        let kept = segments.keep(&limits, runtime::unix_time_ms());
        // Also where a file could not be removed: it is not read any more.
        let after = segments.reach().first_key;
        if let Some(first) = after.filter(|_| after != before) {
            let piece = self.piece_at(first)?;
            let mut state = lock(&self.state);
            state.first = state.first.max(piece.map_or(first, |(_, piece)| piece.from));
        }
        kept
    }

    fn write_durably(&self, segments: &mut SegmentLog, upto: u64) -> Result<(), StorageError> {
        let state = *lock(&self.state);
        // A state of another history, or one that the log does not lead to, is not for it.
        let covers = state.reset.is_none() && state.first <= upto && state.next > upto;
        let written = written(segments, &state);
        if covers && written <= upto {
            let mark = Piece::empty(state.history, written, upto, runtime::unix_time_ms());
            segments.append(upto, 0, mark.time_ms, &mark.bytes)?;
        }
        segments.sync()
    }
}

/// The position after the last one that is in `segments`. Not all of it may be readable yet.
fn written(segments: &SegmentLog, state: &LogState) -> u64 {
    segments.reach().last_key.map_or(state.first, |last| last + 1)
}

/// Appends what `piece` has from position `written` on, if it has anything.
fn append(
    segments: &mut SegmentLog,
    history: HistoryEpoch,
    written: u64,
    piece: &Piece,
) -> Result<(), StorageError> {
    if piece.upto < written {
        return Ok(());
    }
    let rest = (piece.from < written).then(|| piece.without_first(history, written));
    let rest = rest.transpose().expect("invariant: what was recorded can be read");
    let piece = rest.as_ref().unwrap_or(piece);
    segments.append(piece.upto, piece.operations, piece.time_ms, &piece.bytes)
}

/// The pieces in `records`, which lead on from position `next` without a gap.
fn in_sequence(
    records: Vec<SegmentRecord>,
    history: HistoryEpoch,
    next: u64,
) -> Result<Vec<Piece>, NoRecord> {
    let mut expected = next;
    let mut pieces = Vec::with_capacity(records.len());
    for record in records {
        let (found, piece) = Piece::read(record.payload)?;
        if found != history {
            return Err(NoRecord("a piece of another history"));
        }
        if piece.from > expected || piece.upto < expected {
            return Err(NoRecord("a gap"));
        }
        expected = piece.upto + 1;
        pieces.push(piece);
    }
    Ok(pieces)
}
