//! What is told of one event or command, whatever carries it.

use bytes::Bytes;

use crate::feed::{FeedRecord, KeyBefore};
use crate::machine::AppliedEvent;
use crate::types::{HistoryEpoch, MachineVersion};

/// A longer value from before a change is not told.
const MAX_PREVIOUS_BYTES: usize = 4 * 1024 * 1024;
/// Nor is one that is longer than this together with the value after it: both must fit a message, of
/// [`MAX_ENTRY_BYTES`](super::MAX_ENTRY_BYTES).
const MAX_BOTH_BYTES: usize = 30 * 1024 * 1024;

/// What entries of one position have in common.
#[derive(Debug, Clone, Copy)]
pub(in crate::node) struct EntryAt {
    pub(in crate::node) seq: u64,
    pub(in crate::node) term: u64,
    pub(in crate::node) time_ms: u64,
    pub(in crate::node) elapsed_ms: u64,
}

impl EntryAt {
    pub(in crate::node) fn of(record: &FeedRecord) -> Self {
        let FeedRecord { log_id, time_ms, elapsed_ms, .. } = *record;
        Self { seq: log_id.index, term: log_id.term, time_ms, elapsed_ms }
    }

    /// The cluster's clock when elapsed time is `elapsed_ms`, as things stood at this position.
    fn time_at(&self, elapsed_ms: u64) -> u64 {
        // Both may be on either side.
        let distance = i128::from(elapsed_ms) - i128::from(self.elapsed_ms);
        let time = i128::from(self.time_ms) + distance;
        // 0 stands for never.
        u64::try_from(time.max(1)).unwrap_or(u64::MAX)
    }
}

/// What an entry tells.
#[derive(Debug, Clone, Copy)]
pub(in crate::node) enum EntryContent<'a> {
    Event(&'a AppliedEvent),
    Command { wrote: MachineVersion, command: &'a Bytes },
}

/// An entry that is to be sent.
#[derive(Debug, Clone, Copy)]
pub(in crate::node) struct SentEntry<'a> {
    pub(in crate::node) at: EntryAt,
    pub(in crate::node) content: EntryContent<'a>,
    pub(in crate::node) more: bool,
    /// Where it is to be named.
    pub(in crate::node) history: Option<HistoryEpoch>,
    /// Whether it is an item of a snapshot.
    pub(in crate::node) is_item: bool,
    /// What the key was before, if that was asked for.
    pub(in crate::node) before: Option<&'a KeyBefore>,
}

impl<'a> SentEntry<'a> {
    /// The value that the key had before, as far as it is told, and whether it had one that is not.
    pub(in crate::node) fn previous(&self) -> (Option<&'a Bytes>, bool) {
        let after = match self.content {
            EntryContent::Event(event) => event.value.len(),
            EntryContent::Command { .. } => 0,
        };
        let fits = |before: usize| before <= MAX_PREVIOUS_BYTES && before + after <= MAX_BOTH_BYTES;
        match self.before {
            Some(KeyBefore::Written(event)) if fits(event.value.len()) => (Some(&event.value), false),
            Some(KeyBefore::Written(_) | KeyBefore::Unknown) => (None, true),
            Some(KeyBefore::Absent) | None => (None, false),
        }
    }

    /// When what `event` has written expires, by the cluster's clock; 0 for never.
    pub(in crate::node) fn expires_ms(&self, event: &AppliedEvent) -> u64 {
        event.deadline_ms.map_or(0, |deadline| self.at.time_at(deadline))
    }
}
