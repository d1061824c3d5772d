//! Reading entries: from the tail where possible, else from the disk.

use std::io;

use crate::storage::LogBounds;
use crate::types::Entry;

use super::Shared;
use super::disk::LogReader;

/// Entries collected for one read.
pub(crate) struct Collected {
    pub(crate) entries: Vec<Entry>,
    bytes: usize,
    max_bytes: usize,
}

impl Collected {
    fn new(max_bytes: usize) -> Self {
        Self { entries: Vec::new(), bytes: 0, max_bytes }
    }

    /// Adds an entry, unless that exceeds the limit; the first one always fits.
    pub(crate) fn push(&mut self, entry: Entry) -> bool {
        let bytes = self.bytes + entry.size_bytes();
        if bytes > self.max_bytes && !self.entries.is_empty() {
            return false;
        }
        self.bytes = bytes;
        self.entries.push(entry);
        true
    }
}

/// How far a disk has read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Scanned {
    /// Everything asked for.
    All,
    /// As much as the limit allows.
    Full,
}

/// How a look at the in-memory state goes on.
enum ReadStep {
    Done,
    /// The entries from the first index up to the second are to be read from the disk.
    Scan(u64, u64),
    /// A truncation or purge came in between.
    Moved,
}

/// See [`LogStore::read`](crate::storage::LogStore::read).
pub(super) fn read(
    shared: &Shared,
    disk: &impl LogReader,
    (start, end): (u64, u64),
    max_bytes: usize,
) -> io::Result<Vec<Entry>> {
    loop {
        if let Some(entries) = try_read(shared, disk, (start, end), max_bytes)? {
            return Ok(entries);
        }
    }
}

/// Reads once; none if the log was truncated or purged meanwhile, so that what was read from the disk may be a
/// mixture of before and after.
fn try_read(
    shared: &Shared,
    disk: &impl LogReader,
    (start, end): (u64, u64),
    max_bytes: usize,
) -> io::Result<Option<Vec<Entry>>> {
    let mut collected = Collected::new(max_bytes);
    let mut began = None;
    loop {
        let step = look(shared, (start, end), &mut began, &mut collected);
        let (from, to) = match step {
            ReadStep::Done => return Ok(Some(collected.entries)),
            ReadStep::Moved => return Ok(None),
            ReadStep::Scan(from, to) => (from, to),
        };
        let scanned = disk.read((from, to), &mut collected);
        if matches!(look(shared, (start, start), &mut began, &mut collected), ReadStep::Moved) {
            return Ok(None);
        }
        if scanned? == Scanned::Full {
            return Ok(Some(collected.entries));
        }
    }
}

/// What the tail can contribute, and what is still missing.
fn look(
    shared: &Shared,
    (start, end): (u64, u64),
    began: &mut Option<(u64, LogBounds)>,
    collected: &mut Collected,
) -> ReadStep {
    let state = shared.read();
    let (truncations, bounds) = began.get_or_insert((state.truncations, state.bounds));
    if (*truncations, bounds.purged) != (state.truncations, state.bounds.purged) {
        return ReadStep::Moved;
    }
    let from = start.max(state.first_index()) + collected.entries.len() as u64;
    let end = end.min(state.next_index());
    if from >= end {
        return ReadStep::Done;
    }
    let tail = state.tail.first_index().unwrap_or(u64::MAX);
    if from < tail {
        return ReadStep::Scan(from, end.min(tail));
    }
    for entry in state.tail.from(from).take_while(|entry| entry.log_id.index < end) {
        if !collected.push(entry.clone()) {
            break;
        }
    }
    ReadStep::Done
}
