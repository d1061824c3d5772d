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
//! A clone shares the blocks. After one, the next push copies the open block: at most [`BLOCK_EVENTS`] entries of
//! 48 bytes, unless the last commands changed more at once.

use std::sync::Arc;

use imbl::OrdMap;

use super::items::ITEM_OVERHEAD_BYTES;
use super::key::KeyRange;
use super::record::Record;
use super::{Change, Event, EventsAnswer, KvAnswer};

/// Most events kept.
pub(super) const MAX_HISTORY_EVENTS: usize = 65_536;

/// Most bytes of keys and values that events refer to. In the worst case nothing else keeps any of them alive.
pub(super) const MAX_HISTORY_BYTES: usize = 32 * 1024 * 1024;

/// Most events one query looks at, but for the rest of the last revision. A query that matches little then
/// answers with progress instead of holding up its task.
pub(super) const MAX_SCANNED_EVENTS: usize = 16_384;

/// A block with so many events is closed. Small, because an open block may have to be copied.
const BLOCK_EVENTS: usize = 32;

/// A block with so many bytes is closed. Blocks are dropped whole: this is how much too early at worst, unless
/// one command changed more.
const BLOCK_BYTES: usize = MAX_HISTORY_BYTES / 32;

/// What became of a key.
#[derive(Debug, Clone)]
pub(super) enum Happened {
    Put(Record),
    Deleted,
    Expired,
}

#[derive(Debug, Clone)]
struct Entry {
    revision: u64,
    key: Arc<[u8]>,
    happened: Happened,
}

impl Entry {
    /// Bytes that this entry may be the last to keep alive.
    fn bytes(&self) -> usize {
        let record = match &self.happened {
            Happened::Put(record) => record.as_bytes().len(),
            Happened::Deleted | Happened::Expired => 0,
        };
        self.key.len() + record
    }
}

#[derive(Debug, Default)]
struct Block {
    entries: Vec<Entry>,
    bytes: usize,
}

impl Clone for Block {
    /// With room for what is pushed next: that is why an open block is cloned.
    fn clone(&self) -> Self {
        let mut entries = Vec::with_capacity(BLOCK_EVENTS.max(self.entries.len() + 1));
        entries.extend_from_slice(&self.entries);
        Self { entries, bytes: self.bytes }
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
        }
    }

    /// One above the revision of the last command applied; 0 if there is none or it is not known.
    pub(super) fn next_revision(&self) -> u64 {
        self.next_revision
    }

    /// Adds a change made by the command at `revision`, which is being applied.
    pub(super) fn push(&mut self, revision: u64, key: Arc<[u8]>, happened: Happened) {
        let entry = Entry { revision, key, happened };
        let open = Arc::make_mut(&mut self.open);
        self.events += 1;
        self.bytes += entry.bytes();
        open.bytes += entry.bytes();
        open.entries.push(entry);
    }

    /// Takes back all that was pushed at `revision`, which is being applied.
    pub(super) fn retract(&mut self, revision: u64) {
        let open = Arc::make_mut(&mut self.open);
        while let Some(entry) = open.entries.pop_if(|entry| entry.revision == revision) {
            self.events -= 1;
            self.bytes -= entry.bytes();
            open.bytes -= entry.bytes();
        }
    }

    /// The command at `revision` has been applied.
    pub(super) fn advance(&mut self, revision: u64) {
        self.next_revision = revision + 1;
        self.first_revision.get_or_insert(revision);
        if self.open.entries.len() >= BLOCK_EVENTS || self.open.bytes >= BLOCK_BYTES {
            let block = std::mem::take(&mut self.open);
            self.closed.insert(block.entries[0].revision, block);
        }
        while self.events > MAX_HISTORY_EVENTS || self.bytes > MAX_HISTORY_BYTES {
            let (_, oldest) =
                self.closed.get_min().expect("invariant: an open block is far below the limits");
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
    fn entries_from(&self, revision: u64) -> impl Iterator<Item = &Entry> {
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
        let mut answer = EventsAnswer { events: Vec::new(), next_revision: from_revision };
        match self.first_revision {
            // Nothing is known of what came before, and nothing has come since.
            None => return KvAnswer::Events(answer),
            Some(first_revision) if from_revision < first_revision => {
                return KvAnswer::Compacted { first_revision };
            }
            Some(_) => answer.next_revision = from_revision.max(self.next_revision),
        }
        let Some(range) = range else { return KvAnswer::Events(answer) };
        let (mut scanned, mut bytes) = (0, 0);
        // The revision at hand, and how many events there were before it.
        let (mut revision, mut before) = (None, 0);
        for entry in self.entries_from(from_revision) {
            if revision != Some(entry.revision) {
                let full = answer.events.len() >= bounds.limit || bytes >= bounds.max_bytes;
                if (full && !answer.events.is_empty()) || scanned >= MAX_SCANNED_EVENTS {
                    answer.next_revision = entry.revision;
                    break;
                }
                (revision, before) = (Some(entry.revision), answer.events.len());
            }
            scanned += 1;
            if !range.contains(&entry.key) {
                continue;
            }
            let event = event(range, entry);
            bytes += event_bytes(&event);
            answer.events.push(event);
            let overfull = answer.events.len() > bounds.limit || bytes > bounds.max_bytes;
            if overfull && before > 0 {
                answer.events.truncate(before);
                answer.next_revision = entry.revision;
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
        assert!(self.events <= MAX_HISTORY_EVENTS && self.bytes <= MAX_HISTORY_BYTES);
    }
}

/// How much one query wants to be told.
#[derive(Debug, Clone, Copy)]
pub(super) struct EventBounds {
    pub(super) limit: usize,
    pub(super) max_bytes: usize,
}

fn event(range: &KeyRange, entry: &Entry) -> Event {
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
