//! All items, and what is kept up to date beside them: the deadlines and the state hash.

use std::ops::Bound;

use imbl::{OrdMap, OrdSet};

use super::composite::CompositeKey;
use super::key::KeyRange;
use super::record::{ItemRecord, RecordHeader, item_hash};
use super::{Item, RangeAnswer};

/// What an item counts in a bounded answer beyond its key and value: its revisions and the framing of any
/// encoding it is sent in.
pub(super) const ITEM_OVERHEAD_BYTES: usize = 64;

/// What an item counts in the size of the state beyond its key and record: its slot in the tree, the heads of two
/// allocations and what the allocator rounds up. Decides what fits the quota, so it never changes.
pub(super) const ITEM_STATE_BYTES: usize = 128;

/// What an item counts more if it is due some time: its slot among the deadlines.
pub(super) const DEADLINE_STATE_BYTES: usize = 64;

/// What an item counts in the size of the state.
pub(super) fn state_bytes(key_bytes: usize, record_bytes: usize, expires: bool) -> u64 {
    let deadline = if expires { DEADLINE_STATE_BYTES } else { 0 };
    (key_bytes + record_bytes + ITEM_STATE_BYTES + deadline) as u64
}

fn item_state_bytes(key: &[u8], record: &ItemRecord) -> u64 {
    state_bytes(key.len(), record.as_bytes().len(), record.expires_ms() != 0)
}

/// The items of all tenants. Cloning it costs two reference counts.
///
/// # Invariants
/// - Every key is a composite key ([`super::key`]) within the limits.
/// - `deadlines` holds exactly the items whose `expires_ms` is not 0.
/// - `hash` is the wrapping sum of [`item_hash`] over all items.
/// - `bytes` is the sum of [`state_bytes`] over all items.
///
/// They are asserted where the program is tested. Where it is used, a wrong deadline or size does less harm than the end of all
/// nodes at the same entry, at every start.
#[derive(Debug, Clone, Default)]
pub(super) struct Items {
    tree: OrdMap<CompositeKey, ItemRecord>,
    /// When an item is due, and its key: the earliest deadline comes first.
    deadlines: OrdSet<(u64, CompositeKey)>,
    hash: u64,
    bytes: u64,
}

impl Items {
    pub(super) fn len(&self) -> usize {
        self.tree.len()
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash
    }

    /// What all items count in the size of the state.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What the item of `key` counts in the size of the state; 0 if there is none.
    pub(super) fn bytes_of(&self, key: &[u8]) -> u64 {
        self.tree.get(key).map_or(0, |record| item_state_bytes(key, record))
    }

    /// All keys with their records, ascending.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&CompositeKey, &ItemRecord)> {
        self.tree.iter()
    }

    /// The items after that of the composite key `after`, ascending; all of them after an empty one.
    pub(super) fn after(&self, after: &[u8]) -> impl Iterator<Item = (&CompositeKey, &ItemRecord)> {
        self.tree.range::<_, [u8]>((Bound::Excluded(after), Bound::Unbounded))
    }

    pub(super) fn record(&self, key: &[u8]) -> Option<&ItemRecord> {
        self.tree.get(key)
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<Item> {
        self.tree.get(key).map(ItemRecord::item)
    }

    /// The items of `range`, at most `limit`, and one or as many as stay within `max_bytes`.
    pub(super) fn range(&self, range: &KeyRange, limit: usize, max_bytes: usize) -> RangeAnswer {
        let mut answer = RangeAnswer::default();
        let mut bytes = 0;
        for (full_key, record) in self.tree.range::<_, [u8]>(range.bounds()) {
            let key = range.key(full_key);
            bytes += key.len() + record.value().len() + ITEM_OVERHEAD_BYTES;
            let full = bytes > max_bytes && !answer.items.is_empty();
            if full || answer.items.len() >= limit {
                answer.next = Some(key);
                break;
            }
            answer.items.push((key, record.item()));
        }
        answer
    }

    /// The first keys of `range`, at most `limit`.
    pub(super) fn keys(&self, range: &KeyRange, limit: usize) -> Vec<CompositeKey> {
        self.tree.range::<_, [u8]>(range.bounds()).take(limit).map(|(key, _)| key.clone()).collect()
    }

    /// The earliest deadline and its key.
    pub(super) fn first_deadline(&self) -> Option<&(u64, CompositeKey)> {
        self.deadlines.get_min()
    }

    /// Writes `value` under `key`, due at `expires_ms` unless that is 0. Returns the new record, and the revision of the write before, if
    /// the key was there.
    pub(super) fn put(
        &mut self,
        key: &CompositeKey,
        value: &[u8],
        WrittenItem { revision, expires_ms }: WrittenItem,
    ) -> (ItemRecord, Option<u64>) {
        let Self { tree, deadlines, hash, bytes } = self;
        let mut header =
            RecordHeader { create_revision: revision, mod_revision: revision, version: 1, expires_ms };
        let mut previous = None;
        let record = if let Some(slot) = tree.get_mut(&**key) {
            previous = Some(slot.mod_revision());
            (header.create_revision, header.version) = (slot.create_revision(), slot.version() + 1);
            if slot.expires_ms() != 0 {
                let due = deadlines.remove(&(slot.expires_ms(), key.clone()));
                debug_assert!(due.is_some(), "invariant: an item that is due has a deadline");
            }
            *hash = hash.wrapping_sub(item_hash(key, slot.as_bytes()));
            *bytes -= item_state_bytes(key, slot);
            *slot = ItemRecord::new(header, value);
            slot.clone()
        } else {
            let record = ItemRecord::new(header, value);
            tree.insert(key.clone(), record.clone());
            record
        };
        *hash = hash.wrapping_add(item_hash(key, record.as_bytes()));
        *bytes += item_state_bytes(key, &record);
        if expires_ms != 0 {
            let other = deadlines.insert((expires_ms, key.clone()));
            debug_assert!(other.is_none(), "invariant: an item has one deadline");
        }
        (record, previous)
    }

    /// Removes `key`, and returns it as it was in the tree, with what was under it.
    pub(super) fn remove(&mut self, key: &[u8]) -> Option<(CompositeKey, ItemRecord)> {
        let (key, record) = self.tree.remove_with_key(key)?;
        self.hash = self.hash.wrapping_sub(item_hash(&key, record.as_bytes()));
        self.bytes -= item_state_bytes(&key, &record);
        if record.expires_ms() != 0 {
            let due = self.deadlines.remove(&(record.expires_ms(), key.clone()));
            debug_assert!(due.is_some(), "invariant: an item that is due has a deadline");
        }
        debug_assert!(self.bytes == 0 || !self.tree.is_empty(), "invariant: no item takes nothing");
        Some((key, record))
    }

    /// Adds an item that a snapshot holds; its key is new.
    pub(super) fn restore(&mut self, key: CompositeKey, record: ItemRecord) {
        self.hash = self.hash.wrapping_add(item_hash(&key, record.as_bytes()));
        self.bytes += item_state_bytes(&key, &record);
        if record.expires_ms() != 0 {
            self.deadlines.insert((record.expires_ms(), key.clone()));
        }
        self.tree.insert(key, record);
    }

    /// Checks the invariants against one another, item by item.
    #[cfg(test)]
    pub(super) fn assert_consistent(&self) {
        let sum = self
            .tree
            .iter()
            .fold(0_u64, |sum, (key, record)| sum.wrapping_add(item_hash(key, record.as_bytes())));
        assert_eq!(self.hash, sum, "the hash is not that of the items");
        let bytes: u64 = self.tree.iter().map(|(key, record)| item_state_bytes(key, record)).sum();
        assert_eq!(self.bytes, bytes, "the size is not that of the items");
        let mut deadlines: Vec<_> =
            self.tree.iter().map(|(key, record)| (record.expires_ms(), key.clone())).collect();
        deadlines.retain(|(expires_ms, _)| *expires_ms != 0);
        deadlines.sort();
        assert_eq!(self.deadlines.iter().cloned().collect::<Vec<_>>(), deadlines);
    }
}

/// What a write leaves in the record beside the value.
#[derive(Debug, Clone, Copy)]
pub(super) struct WrittenItem {
    pub(super) revision: u64,
    /// In elapsed time; 0 for never.
    pub(super) expires_ms: u64,
}
