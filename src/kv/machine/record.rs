//! What the tree holds per key: revisions, expiry and value packed into one shared allocation.
//!
//! `create revision (8) · mod revision (8) · version (8) · expires (8) · value`, numbers in little-endian. The bytes
//! are what an item's hash is taken of and what a snapshot stores, so the layout is part of the snapshot
//! format. Snapshots of version 1 hold records without `expires`.

use std::sync::Arc;

use bytes::Bytes;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::Item;
use super::limits::MAX_VALUE_BYTES;

/// Bytes before the value.
pub(super) const HEADER_BYTES: usize = 32;

/// Bytes before the value in a snapshot of version 1.
const HEADER_BYTES_V1: usize = 24;

/// Most bytes of a record.
pub(super) const MAX_RECORD_BYTES: usize = HEADER_BYTES + MAX_VALUE_BYTES;

/// What a record says of its value.
#[derive(Clone, Copy)]
pub(super) struct RecordHeader {
    pub(super) create_revision: u64,
    pub(super) mod_revision: u64,
    pub(super) version: u64,
    /// In elapsed time; 0 for never.
    pub(super) expires_ms: u64,
}

/// One record. Cloning it costs a reference count: the tree copies its nodes on write.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct ItemRecord(Arc<[u8]>);

impl ItemRecord {
    pub(super) fn new(header: RecordHeader, value: &[u8]) -> Self {
        // Collecting an iterator of known length allocates once; a Vec in between would be copied again.
        let mut bytes: Arc<[u8]> = std::iter::repeat_n(0, HEADER_BYTES + value.len()).collect();
        let slot = Arc::get_mut(&mut bytes).expect("invariant: a new allocation has one owner");
        slot[..8].copy_from_slice(&header.create_revision.to_le_bytes());
        slot[8..16].copy_from_slice(&header.mod_revision.to_le_bytes());
        slot[16..24].copy_from_slice(&header.version.to_le_bytes());
        slot[24..32].copy_from_slice(&header.expires_ms.to_le_bytes());
        slot[HEADER_BYTES..].copy_from_slice(value);
        Self(bytes)
    }

    /// The record with these bytes; `None` when they are too few or too many.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        (HEADER_BYTES..=MAX_RECORD_BYTES).contains(&bytes.len()).then(|| Self(bytes.into()))
    }

    /// The record that a snapshot of version 1 holds as these bytes; `None` when they are too few or too many.
    pub(super) fn from_bytes_v1(bytes: &[u8]) -> Option<Self> {
        let (header, value) = bytes.split_at_checked(HEADER_BYTES_V1)?;
        let never = [0; HEADER_BYTES - HEADER_BYTES_V1];
        Self::from_bytes(&[header, &never[..], value].concat())
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

    pub(super) fn expires_ms(&self) -> u64 {
        self.number(24)
    }

    pub(super) fn value(&self) -> &[u8] {
        &self.0[HEADER_BYTES..]
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
            expires_ms: self.expires_ms(),
        }
    }
}

impl std::fmt::Debug for ItemRecord {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.item().fmt(f)
    }
}

/// What one item adds to the state hash, `record` being the record's bytes. The key is hashed into the seed, so
/// that its end and the record's beginning cannot be confused.
pub(super) fn item_hash(key: &[u8], record: &[u8]) -> u64 {
    xxh3_64_with_seed(record, xxh3_64(key))
}
