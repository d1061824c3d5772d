//! What a [`DurableLog`](super::DurableLog) needs of the disk that it is on.

use std::io;
use std::path::PathBuf;

use crate::storage::LogBounds;
use crate::types::{Entry, LogId, Vote};

use super::read::{Collected, Scanned};
use super::tail::Tail;

/// Keeps a log on a disk. One thread writes, and waits for the disk; it says what is to be flushed together.
///
/// # What a disk owes
/// - After a crash there is a prefix of what was written, and in it everything that a [`flush`](Self::flush) which has returned
///   covers. Every prefix of it is a log in good order: a write that was cut off has either not happened, or was an
///   [`append`](Self::append) of fewer entries, or a [`truncate`](Self::truncate) of fewer.
/// - Nothing that was written later survives without what was written before it: neither an entry without the vote that was
///   saved before it, nor one without the truncation that made room for it.
/// - What is flushed can be read through the [`Reader`](Self::Reader) until it is truncated or purged.
///
/// # What it may rely on
/// - Writes fit the log: the first entry of an append follows on the last one of the log, a truncation or purge removes
///   something, a truncation nothing that is purged.
/// - After an error or a panic it is neither used again nor dropped: a disk may flush when its last handle goes, and a failed
///   fsync must never be retried.
pub(crate) trait LogDisk: Send + 'static {
    /// What other threads ask of it.
    type Reader: LogReader;
    /// Why a write did not become durable.
    type Error: std::error::Error;

    /// Appends entries that follow the last one.
    fn append(&mut self, entries: &[Entry]) -> Result<(), Self::Error>;

    /// Replaces the vote.
    fn save_vote(&mut self, vote: Vote) -> Result<(), Self::Error>;

    /// Removes the entries from `from` on; `last` is what then ends the log. Fails if it finds another entry there.
    fn truncate(&mut self, from: u64, last: Option<LogId>) -> Result<(), Self::Error>;

    /// Removes the entries up to `upto`, which may lie beyond the end; the log then goes on after it. What they take on the disk
    /// may be left to [`sweep`](Self::sweep).
    fn purge(&mut self, upto: LogId) -> Result<(), Self::Error>;

    /// Makes all of the above durable, and `committed` with it if the log goes that far. Free if there is
    /// nothing to flush.
    fn flush(&mut self, committed: Option<LogId>) -> Result<(), Self::Error>;

    /// Whether [`sweep`](Self::sweep) has something to do.
    fn unswept(&self) -> bool;

    /// Frees some of what purged entries take: so much that an append can wait for it. Called when everything is flushed.
    fn sweep(&mut self) -> Result<(), Self::Error>;

    /// Makes durable what sweeps have done, so that there is nothing left to do when it is dropped.
    fn close(&mut self) -> Result<(), Self::Error>;
}

/// Reads a log that another thread writes. It may be the last to let go of the disk.
pub(crate) trait LogReader: Send + Sync + 'static {
    /// Collects the entries from the first index up to the second, in order, until all or [enough](Collected::push) are
    /// collected. All are flushed, and were neither truncated nor purged when this was asked; if they have been since, what it
    /// answers is not looked at.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] for an entry whose checksum does not match, or one that is missing.
    fn read(&self, range: (u64, u64), collected: &mut Collected) -> io::Result<Scanned>;

    /// Bytes that the log takes on the disk.
    fn disk_bytes(&self) -> io::Result<u64>;
}

/// Makes something durable that no completion waits for; the error is for people.
pub(crate) type SyncLater = Box<dyn Fn() -> Result<(), String> + Send>;

/// A disk that may be written to, and what is on it.
pub(crate) struct Opened<D: LogDisk> {
    pub(crate) disk: D,
    pub(crate) reader: D::Reader,
    /// Called about once a second, and once after the last write, by a thread of its own.
    pub(crate) sync_later: SyncLater,
    /// The file that grows with the log. It is to own [room](crate::storage::space) beyond its end.
    pub(crate) grows: PathBuf,
    pub(crate) recovered: RecoveredLog,
}

/// What is on a disk when it is opened.
pub(crate) struct RecoveredLog {
    pub(crate) bounds: LogBounds,
    pub(crate) vote: Option<Vote>,
    pub(crate) committed: Option<LogId>,
    /// The newest of its entries.
    pub(crate) tail: Tail,
}
