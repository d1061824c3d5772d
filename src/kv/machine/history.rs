//! The latest changes, for those who watch.
//!
//! Every change of an item is one entry. Entries are kept in blocks, and the entries of one revision always in one
//! block: only [`History::advance`], which ends a revision, closes a block. Old blocks are dropped whole, so a
//! revision is in the history with all its events or not at all.
//!
//! The history belongs to the node, not to the state: it is neither in the hash nor, but for the position
//! it has reached, in a snapshot. It begins where the machine begins. After a snapshot it is empty, and complete
//! from the next revision on.
//!
//! How much it keeps is a setting of its node ([`HistoryLimits`]).
//!
//! A clone shares the blocks. After one, the next push copies the open block: at most [`BLOCK_EVENTS`] entries of
//! 64 bytes, unless the last commands changed more at once.
//!
//! The protocol, with a figure: `docs/design/watching.md`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use imbl::OrdMap;

use super::composite::CompositeKey;
use super::items::ITEM_OVERHEAD_BYTES;
use super::key::KeyRange;
use super::record::ItemRecord;
use super::{Change, Event, EventsAnswer, KvAnswer};

/// How much of the latest changes a node keeps for those who watch. Of two nodes each may keep as much as it likes: the
/// history is part of no state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistoryLimits {
    /// Most changes kept.
    pub events: usize,
    /// Most bytes: of the keys and values that changes refer to, and what keeping them takes. In the worst case nothing
    /// else keeps any of them alive.
    pub bytes: usize,
    /// How old a change may be, in milliseconds of elapsed time, when the next one drops it. 0: as old as the others allow.
    pub age_ms: u64,
}

impl Default for HistoryLimits {
    /// A million changes, 64 MiB, of any age.
    fn default() -> Self {
        Self { events: 1_000_000, bytes: 64 * 1024 * 1024, age_ms: 0 }
    }
}

/// How far a node's history reaches, for those who want to see it from outside while commands are applied.
#[derive(Debug, Default)]
pub struct HistoryReach {
    /// One more than the first revision that can be watched from; 0 while that is not known.
    first: AtomicU64,
    events: AtomicUsize,
    bytes: AtomicUsize,
}

impl HistoryReach {
    /// The first revision that can be watched from; `None` while that is not known.
    pub fn first_revision(&self) -> Option<u64> {
        self.first.load(Relaxed).checked_sub(1)
    }

    /// Changes kept.
    pub fn events(&self) -> usize {
        self.events.load(Relaxed)
    }

    /// Bytes kept for them.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    pub(super) fn note(&self, history: &History) {
        self.first.store(history.first_revision.map_or(0, |first| first.saturating_add(1)), Relaxed);
        self.events.store(history.events, Relaxed);
        self.bytes.store(history.bytes, Relaxed);
    }
}

/// Most events one query looks at, but for the rest of the last revision. A query that matches little then
/// answers with progress instead of holding up its task.
pub(super) const MAX_SCANNED_EVENTS: usize = 16_384;

/// A block with so many events is closed. Small, because an open block may have to be copied.
const BLOCK_EVENTS: usize = 32;

/// A block is closed when it has one part in so many of the bytes that there may be. Blocks are dropped whole: this is
/// how much too early at worst, unless one command changed more.
const BLOCKS: usize = 32;

/// What an event takes beside key and value: its entry, and the counters of the allocations that it shares.
const ENTRY_BYTES: usize = size_of::<HistoryEntry>() + 48;

/// What became of a key.
#[derive(Debug, Clone)]
pub(super) enum Happened {
    Put(ItemRecord),
    Deleted,
    Expired,
}

#[derive(Debug, Clone)]
struct HistoryEntry {
    revision: u64,
    key: CompositeKey,
    happened: Happened,
}

impl HistoryEntry {
    /// Bytes that this entry may be the last to keep alive.
    fn bytes(&self) -> usize {
        let record = match &self.happened {
            Happened::Put(record) => record.as_bytes().len(),
            Happened::Deleted | Happened::Expired => 0,
        };
        ENTRY_BYTES + self.key.len() + record
    }
}

#[derive(Debug, Default)]
struct Block {
    entries: Vec<HistoryEntry>,
    bytes: usize,
    /// Elapsed time at the last entry.
    last_ms: u64,
}

impl Clone for Block {
    /// With room for what is pushed next: that is why an open block is cloned.
    fn clone(&self) -> Self {
        let mut entries = Vec::with_capacity(BLOCK_EVENTS.max(self.entries.len() + 1));
        entries.extend_from_slice(&self.entries);
        Self { entries, bytes: self.bytes, last_ms: self.last_ms }
    }
}

/// The latest changes. See the [module](self).
///
/// # Invariants
/// - Revisions do not decrease from entry to entry; no revision is in two blocks.
/// - Every change at `first_revision` or later is in it.
#[derive(Debug, Clone)]
pub(super) struct History {
    /// Closed blocks, none empty, by the revision of their first entry.
    closed: OrdMap<u64, Arc<Block>>,
    open: Arc<Block>,
    /// In all blocks.
    events: usize,
    /// In all blocks.
    bytes: usize,
    /// `None` after a snapshot that does not say where it stands, until a command says so.
    first_revision: Option<u64>,
    /// One above the revision of the last command applied, changed anything or not; 0 if there is none.
    next_revision: u64,
    limits: HistoryLimits,
}

impl Default for History {
    /// That of a machine that has applied nothing: complete from the very beginning.
    fn default() -> Self {
        Self { first_revision: Some(0), ..Self::after_snapshot(0) }
    }
}

impl History {
    /// The history after a snapshot with this [`next_revision`](Self::next_revision), 0 for unknown.
    pub(super) fn after_snapshot(next_revision: u64) -> Self {
        Self {
            closed: OrdMap::new(),
            open: Arc::default(),
            events: 0,
            bytes: 0,
            first_revision: (next_revision != 0).then_some(next_revision),
            next_revision,
            limits: HistoryLimits::default(),
        }
    }

    /// From the next command on.
    pub(super) fn set_limits(&mut self, limits: HistoryLimits) {
        self.limits = limits;
    }

    pub(super) fn limits(&self) -> HistoryLimits {
        self.limits
    }

    /// One above the revision of the last command applied; 0 if there is none or it is not known.
    pub(super) fn next_revision(&self) -> u64 {
        self.next_revision
    }

    /// Adds a change made by the command at `revision`, which is being applied.
    pub(super) fn push(&mut self, revision: u64, key: CompositeKey, happened: Happened) {
        let entry = HistoryEntry { revision, key, happened };
        let open = Arc::make_mut(&mut self.open);
        self.events += 1;
        self.bytes += entry.bytes();
        open.bytes += entry.bytes();
        open.entries.push(entry);
    }

    /// The command at `revision` has been applied, at elapsed time `time_ms`.
    pub(super) fn advance(&mut self, revision: u64, time_ms: u64) {
        self.next_revision = revision + 1;
        self.first_revision.get_or_insert(revision);
        if self.open.entries.len() >= BLOCK_EVENTS || self.open.bytes >= self.limits.bytes / BLOCKS {
            let mut block = std::mem::take(&mut self.open);
            if let Some(first) = block.entries.first().map(|first| first.revision) {
                Arc::make_mut(&mut block).last_ms = time_ms;
                self.closed.insert(first, block);
            }
        }
        while let Some((_, oldest)) = self.closed.get_min() {
            let HistoryLimits { events, bytes, age_ms } = self.limits;
            let too_old = age_ms > 0 && oldest.last_ms.saturating_add(age_ms) < time_ms;
            if self.events <= events && self.bytes <= bytes && !too_old {
                break;
            }
            let (first, last) = (oldest.entries.first(), oldest.entries.last());
            let (first, last) = first
                .zip(last)
                .map(|(first, last)| (first.revision, last.revision))
                .expect("invariant: a closed block is not empty");
            self.events -= oldest.entries.len();
            self.bytes -= oldest.bytes;
            self.closed.remove(&first);
            self.first_revision = Some(last + 1);
        }
    }

    /// Every change at `revision` or later, which is at least `first_revision`.
    fn entries_from(&self, revision: u64) -> impl Iterator<Item = &HistoryEntry> {
        let first = self.closed.get_prev(&revision).map_or(0, |(first, _)| *first);
        let closed = self.closed.range(first..).map(|(_, block)| block);
        closed.chain([&self.open]).flat_map(move |block| {
            let skipped = block.entries.partition_point(|entry| entry.revision < revision);
            &block.entries[skipped..]
        })
    }

    /// The events in `range` from `from_revision` on. See [`EventsQuery`](super::EventsQuery) for the bounds.
    pub(super) fn events(
        &self,
        range: Option<&KeyRange>,
        from_revision: u64,
        bounds: EventBounds,
    ) -> KvAnswer {
        let mut answer = EventsAnswer { next_revision: from_revision, ..EventsAnswer::default() };
        match self.first_revision {
            // Nothing is known of what came before, and nothing has come since.
            None => return KvAnswer::Events(answer),
            Some(first_revision) if from_revision < first_revision => {
                return KvAnswer::Compacted { first_revision };
            }
            Some(_) => answer.next_revision = from_revision.max(self.next_revision),
        }
        answer.complete = true;
        let Some(range) = range else { return KvAnswer::Events(answer) };
        let (mut scanned, mut bytes) = (0, 0);
        let mut left_out = bounds.split.unwrap_or_default();
        // The revision at hand, and how many events there were before it.
        let (mut revision, mut before) = (None, 0);
        for entry in self.entries_from(from_revision) {
            if revision != Some(entry.revision) {
                let full = answer.events.len() >= bounds.limit || bytes >= bounds.max_bytes;
                if (full && !answer.events.is_empty()) || scanned >= MAX_SCANNED_EVENTS {
                    answer.stop(entry.revision, 0);
                    break;
                }
                (revision, before) = (Some(entry.revision), answer.events.len());
            }
            scanned += 1;
            if !range.contains(&entry.key) {
                continue;
            }
            if entry.revision == from_revision && left_out > 0 {
                left_out -= 1;
                continue;
            }
            let event = event(range, entry);
            bytes += event_bytes(&event);
            answer.events.push(event);
            let overfull = answer.events.len() > bounds.limit || bytes > bounds.max_bytes;
            if overfull && before > 0 {
                answer.events.truncate(before);
                answer.stop(entry.revision, 0);
                break;
            }
            if let Some(split) = bounds.split
                && overfull
                && answer.events.len() > 1
            {
                answer.events.pop();
                let earlier = if entry.revision == from_revision { split } else { 0 };
                answer.stop(entry.revision, earlier + answer.events.len());
                break;
            }
        }
        KvAnswer::Events(answer)
    }

    /// Checks the invariants and the bounds.
    #[cfg(test)]
    pub(super) fn assert_consistent(&self) {
        let blocks: Vec<_> = self.closed.values().chain([&self.open]).collect();
        let entries: Vec<_> = blocks.iter().flat_map(|block| &block.entries).collect();
        assert!(entries.is_sorted_by_key(|entry| entry.revision));
        for pair in blocks.windows(2) {
            let (last, next) = (pair[0].entries.last().unwrap(), pair[1].entries.first());
            assert!(next.is_none_or(|next| last.revision < next.revision), "a revision is in two blocks");
        }
        assert!(self.closed.iter().all(|(first, block)| block.entries[0].revision == *first));
        assert!(entries.first().is_none_or(|first| Some(first.revision) >= self.first_revision));
        assert!(entries.last().is_none_or(|last| last.revision < self.next_revision));
        assert_eq!(self.events, entries.len());
        assert_eq!(self.bytes, entries.iter().map(|entry| entry.bytes()).sum::<usize>());
        let limits = self.limits;
        assert!(self.closed.is_empty() || (self.events <= limits.events && self.bytes <= limits.bytes));
    }
}

/// How much one query wants to be told.
#[derive(Debug, Clone, Copy)]
pub(super) struct EventBounds {
    pub(super) limit: usize,
    pub(super) max_bytes: usize,
    /// See [`EventsQuery::split`](super::EventsQuery::split).
    pub(super) split: Option<usize>,
}

impl EventsAnswer {
    /// There is more: from `revision` on, of which so many are known.
    fn stop(&mut self, revision: u64, told: usize) {
        (self.next_revision, self.told, self.complete) = (revision, told, false);
    }
}

fn event(range: &KeyRange, entry: &HistoryEntry) -> Event {
    let change = match &entry.happened {
        Happened::Put(record) => Change::Put(record.item()),
        Happened::Deleted => Change::Deleted,
        Happened::Expired => Change::Expired,
    };
    Event { revision: entry.revision, key: range.key(&entry.key), change }
}

/// What an event counts in a bounded answer.
fn event_bytes(event: &Event) -> usize {
    let value = match &event.change {
        Change::Put(item) => item.value.len(),
        Change::Deleted | Change::Expired => 0,
    };
    event.key.len() + value + ITEM_OVERHEAD_BYTES
}
