//! What the tree holds per key: revisions and value packed into one shared allocation.
//!
//! `create revision (8) · mod revision (8) · version (8) · value`, numbers in little-endian. The bytes
//! are what an item's hash is taken of and what a snapshot stores, so the layout is part of the snapshot
//! format.

use std::sync::Arc;

use bytes::Bytes;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::Item;
use super::key::MAX_VALUE_BYTES;

/// Bytes before the value.
pub(super) const HEADER_BYTES: usize = 24;

/// Most bytes of a record.
pub(super) const MAX_RECORD_BYTES: usize = HEADER_BYTES + MAX_VALUE_BYTES;

/// One record. Cloning it costs a reference count: the tree copies its nodes on write.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Record(Arc<[u8]>);

impl Record {
    pub(super) fn new(create_revision: u64, mod_revision: u64, version: u64, value: &[u8]) -> Self {
        // Collecting an iterator of known length allocates once; a Vec in between would be copied again.
        let mut bytes: Arc<[u8]> = std::iter::repeat_n(0, HEADER_BYTES + value.len()).collect();
        let slot = Arc::get_mut(&mut bytes).expect("invariant: a new allocation has one owner");
        slot[..8].copy_from_slice(&create_revision.to_le_bytes());
        slot[8..16].copy_from_slice(&mod_revision.to_le_bytes());
        slot[16..24].copy_from_slice(&version.to_le_bytes());
        slot[HEADER_BYTES..].copy_from_slice(value);
        Self(bytes)
    }

    /// The record with these bytes; `None` when they are too few or too many.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        (HEADER_BYTES..=MAX_RECORD_BYTES).contains(&bytes.len()).then(|| Self(bytes.into()))
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(super) fn create_revision(&self) -> u64 {
        self.number(0)
    }

    pub(super) fn mod_revision(&self) -> u64 {
        self.number(8)
    }

    pub(super) fn version(&self) -> u64 {
        self.number(16)
    }

    pub(super) fn value_len(&self) -> usize {
        self.0.len() - HEADER_BYTES
    }

    fn number(&self, at: usize) -> u64 {
        let bytes = self.0[at..at + 8].try_into().expect("invariant: a record holds its header");
        u64::from_le_bytes(bytes)
    }

    /// The item, its value a slice of this record.
    pub(super) fn item(&self) -> Item {
        Item {
            value: Bytes::from_owner(self.0.clone()).slice(HEADER_BYTES..),
            create_revision: self.create_revision(),
            mod_revision: self.mod_revision(),
            version: self.version(),
        }
    }
}

impl std::fmt::Debug for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.item().fmt(f)
    }
}

/// What one item adds to the state hash. The key is hashed into the seed, so that its end and the
/// record's beginning cannot be confused.
pub(super) fn item_hash(key: &[u8], record: &Record) -> u64 {
    xxh3_64_with_seed(&record.0, xxh3_64(key))
}
