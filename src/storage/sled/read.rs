//! Reading entries: from the tail where possible, else from sled.

use std::io::{self, ErrorKind};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::storage::LogBounds;
use crate::types::Entry;

use super::scan::{Scan, ScanError};
use super::{Shared, panic_message, words};

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
    fn push(&mut self, entry: Entry) -> bool {
        let bytes = self.bytes + entry.size_bytes();
        if bytes > self.max_bytes && !self.entries.is_empty() {
            return false;
        }
        self.bytes = bytes;
        self.entries.push(entry);
        true
    }
}

/// How a look at the in-memory state goes on.
enum Step {
    Done,
    /// The entries from the first index up to the second are to be read from sled.
    Scan(u64, u64),
    /// A truncation or purge came in between.
    Moved,
}

/// See [`LogStore::read`](crate::storage::LogStore::read).
pub(crate) fn read(
    shared: &Shared,
    log: &sled::Tree,
    directory: &Path,
    (start, end): (u64, u64),
    max_bytes: usize,
) -> io::Result<Vec<Entry>> {
    loop {
        if let Some(entries) = try_read(shared, log, directory, (start, end), max_bytes)? {
            return Ok(entries);
        }
    }
}

/// Reads once; none if the log was truncated or purged meanwhile, so that what was read from sled may be a
/// mixture of before and after.
fn try_read(
    shared: &Shared,
    log: &sled::Tree,
    directory: &Path,
    (start, end): (u64, u64),
    max_bytes: usize,
) -> io::Result<Option<Vec<Entry>>> {
    let mut collected = Collected::new(max_bytes);
    let mut began = None;
    loop {
        let step = look(shared, (start, end), &mut began, &mut collected);
        let (from, to) = match step {
            Step::Done => return Ok(Some(collected.entries)),
            Step::Moved => return Ok(None),
            Step::Scan(from, to) => (from, to),
        };
        let scanned = scan(log, directory, (from, to), &mut collected);
        if matches!(look(shared, (start, start), &mut began, &mut collected), Step::Moved) {
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
) -> Step {
    let state = shared.read();
    let (truncations, bounds) = began.get_or_insert((state.truncations, state.bounds));
    if (*truncations, bounds.purged) != (state.truncations, state.bounds.purged) {
        return Step::Moved;
    }
    let from = start.max(state.first_index()) + collected.entries.len() as u64;
    let end = end.min(state.next_index());
    if from >= end {
        return Step::Done;
    }
    let tail = state.tail.first_index().unwrap_or(u64::MAX);
    if from < tail {
        return Step::Scan(from, end.min(tail));
    }
    for entry in state.tail.from(from).take_while(|entry| entry.log_id.index < end) {
        if !collected.push(entry.clone()) {
            break;
        }
    }
    Step::Done
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Scanned {
    /// Everything asked for.
    All,
    /// As much as the limit allows.
    Full,
}

/// Collects the entries from `start` up to `end`, which are all durable and not purged, from sled.
fn scan(
    log: &sled::Tree,
    directory: &Path,
    (start, end): (u64, u64),
    collected: &mut Collected,
) -> io::Result<Scanned> {
    let invalid = |detail: String| {
        io::Error::new(ErrorKind::InvalidData, format!("the log in {}: {detail}", directory.display()))
    };
    let mut next = start;
    let mut walk = || -> Result<Scanned, ScanError> {
        for run in Scan::from(log, start)? {
            for entry in run?.entries.into_iter().skip_while(|entry| entry.log_id.index < start) {
                if entry.log_id.index != next {
                    return Ok(Scanned::All);
                }
                if !collected.push(entry) {
                    return Ok(Scanned::Full);
                }
                next += 1;
                if next == end {
                    return Ok(Scanned::All);
                }
            }
        }
        Ok(Scanned::All)
    };
    match catch_unwind(AssertUnwindSafe(&mut walk)) {
        Ok(Ok(Scanned::All)) if next < end => Err(invalid(format!("entry {next} is missing"))),
        Ok(Ok(scanned)) => Ok(scanned),
        Ok(Err(ScanError::Sled(sled::Error::Io(error)))) => {
            let error = words::io_error(error);
            let message = format!("the log in {} cannot be read: {error}", directory.display());
            Err(io::Error::new(error.kind(), message))
        }
        Ok(Err(error)) => Err(invalid(error.to_string())),
        Err(panic) => Err(invalid(format!("sled panicked: {}", panic_message(&*panic)))),
    }
}
