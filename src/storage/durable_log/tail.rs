//! The newest entries, in memory: all that are not yet durable, and as many durable ones as a budget allows.
//!
//! Apply and replication read what was appended a moment ago; served from here, they neither wait for the
//! disk nor decode what is on it.
//!
//! # Invariants
//! - The entries are the last ones of the log, in order and without a hole.
//! - An entry leaves the front only once it is durable, or because it was purged or truncated: whatever
//!   lies before the tail can be read from the disk.

use std::collections::VecDeque;

use crate::types::{Entry, LogId};

#[derive(Debug, Default)]
pub(crate) struct Tail {
    entries: VecDeque<Tailed>,
    bytes: usize,
    budget_bytes: usize,
    /// Writes with a ticket up to this one are durable.
    durable_ticket: u64,
}

#[derive(Debug)]
struct Tailed {
    /// The write that appended it.
    ticket: u64,
    entry: Entry,
}

impl Tailed {
    /// What an entry takes in memory beyond its own bytes: its slot, of which there may be twice as many as there are
    /// entries, and the count of those that share it.
    const OVERHEAD_BYTES: usize = 2 * size_of::<Self>() + 32;

    fn bytes(entry: &Entry) -> usize {
        entry.size_bytes() + Self::OVERHEAD_BYTES
    }
}

impl Tail {
    pub(crate) fn new(budget_bytes: usize) -> Self {
        Self { entries: VecDeque::new(), bytes: 0, budget_bytes, durable_ticket: 0 }
    }

    /// What `entry` takes here.
    #[cfg(test)]
    pub(crate) fn bytes_of(entry: &Entry) -> usize {
        Tailed::bytes(entry)
    }

    /// Index of the first entry held.
    pub(crate) fn first_index(&self) -> Option<u64> {
        self.entries.front().map(|tailed| tailed.entry.log_id.index)
    }

    /// Index of the first entry, and position of the last.
    pub(super) fn ends(&self) -> Option<(u64, LogId)> {
        Some((self.first_index()?, self.entries.back()?.entry.log_id))
    }

    pub(crate) fn push(&mut self, ticket: u64, entry: Entry) {
        if let Some(last) = self.entries.back() {
            assert!(last.entry.log_id.index + 1 == entry.log_id.index, "invariant: the tail has no hole");
            assert!(
                last.entry.log_id.term <= entry.log_id.term,
                "invariant: terms do not fall along the log"
            );
            assert!(last.ticket <= ticket, "invariant: entries come in the order of their writes");
        }
        let is_recovered = ticket == 0;
        assert!(
            is_recovered || ticket > self.durable_ticket,
            "invariant: nothing is durable before it is written"
        );
        self.bytes += Tailed::bytes(&entry);
        self.entries.push_back(Tailed { ticket, entry });
    }

    /// Notes that writes up to `ticket` are durable, and lets go of what exceeds the budget.
    pub(crate) fn settle(&mut self, ticket: u64) {
        assert!(ticket >= self.durable_ticket, "invariant: writes become durable in their order");
        self.durable_ticket = ticket;
        while self.bytes > self.budget_bytes
            && self.entries.front().is_some_and(|first| first.ticket <= self.durable_ticket)
        {
            self.pop_front();
        }
    }

    pub(crate) fn truncate(&mut self, from: u64) {
        while self.entries.back().is_some_and(|last| last.entry.log_id.index >= from) {
            if let Some(last) = self.entries.pop_back() {
                self.bytes -= Tailed::bytes(&last.entry);
            }
        }
    }

    pub(crate) fn purge(&mut self, upto: u64) {
        while self.entries.front().is_some_and(|first| first.entry.log_id.index <= upto) {
            self.pop_front();
        }
    }

    fn pop_front(&mut self) {
        if let Some(first) = self.entries.pop_front() {
            self.bytes -= Tailed::bytes(&first.entry);
        }
        assert!(self.bytes == 0 || !self.entries.is_empty(), "invariant: an empty tail takes nothing");
    }

    /// Position of the entry with `index`, if it is here.
    pub(crate) fn log_id(&self, index: u64) -> Option<LogId> {
        self.from(index).next().map(|entry| entry.log_id)
    }

    /// The entries from `index` on; none if it lies before the tail.
    pub(crate) fn from(&self, index: u64) -> impl Iterator<Item = &Entry> {
        let skip = self.first_index().and_then(|first| index.checked_sub(first));
        let skip = skip.and_then(|skip| usize::try_from(skip).ok()).unwrap_or(usize::MAX);
        self.entries.range(skip.min(self.entries.len())..).map(|tailed| &tailed.entry)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::types::Payload;

    fn entry(index: u64) -> Entry {
        Entry { log_id: LogId::new(1, index), payload: Payload::Command(Bytes::from_static(&[0; 68])) }
    }

    #[test]
    fn only_durable_entries_make_room() {
        let two = 2 * Tailed::bytes(&entry(0));
        let mut tail = Tail::new(two + two / 4);
        for index in 0..5 {
            tail.push(index + 1, entry(index));
        }
        assert_eq!(tail.first_index(), Some(0));
        tail.settle(2);
        assert_eq!(tail.first_index(), Some(2));
        tail.settle(5);
        assert_eq!(tail.first_index(), Some(3));
        assert_eq!(tail.from(4).count(), 1);
        assert_eq!(tail.from(2).count(), 0);
        tail.truncate(4);
        tail.purge(3);
        assert_eq!((tail.first_index(), tail.bytes), (None, 0));
    }
}
