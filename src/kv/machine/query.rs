//! What is asked of one state, and what is answered.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::KvRejection;
use super::key;

/// A question to one state.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvQuery {
    /// The item of one key.
    Get {
        /// The tenant.
        tenant: String,
        /// The collection.
        collection: String,
        /// The key.
        key: Bytes,
    },
    /// The items of a range of keys within one collection, in the order of their keys.
    Range(RangeQuery),
}

/// A range of keys, and how much of it to return.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeQuery {
    /// The tenant.
    pub tenant: String,
    /// The collection.
    pub collection: String,
    /// The first key, inclusive. Empty: from the first key of the collection.
    pub start: Bytes,
    /// The end, exclusive. Empty: to the last key of the collection.
    pub end: Bytes,
    /// At most this many items.
    pub limit: usize,
    /// Stop before the items exceed this many bytes; at least one item is returned if there is one.
    pub max_bytes: usize,
}

impl KvQuery {
    /// Whether this query keeps within the limits.
    ///
    /// # Errors
    /// The rejection that the machine would answer.
    pub fn check(&self) -> Result<(), KvRejection> {
        match self {
            Self::Get { tenant, collection, key } => key::check(tenant, collection, key),
            Self::Range(RangeQuery { tenant, collection, start, end, .. }) => {
                key::check_range(tenant, collection, start, end)
            }
        }
    }
}

/// What a query is told.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum KvAnswer {
    /// The item, if the key exists.
    Item(Option<Item>),
    /// The items found.
    Range(RangeAnswer),
    /// The query breaks a limit.
    Rejected(KvRejection),
}

/// Items of a range. Encoded in replies: its fields never change.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RangeAnswer {
    /// Keys, within their collection, and items, in the order of the keys.
    pub items: Vec<(Bytes, Item)>,
    /// The next key of the range when a bound was reached: where to start the next query.
    pub next: Option<Bytes>,
}

/// What a key maps to. Encoded in replies: its fields never change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// The value. Shares its memory with the state, so that holding it does not copy it.
    pub value: Bytes,
    /// Revision of the write that created the key.
    pub create_revision: u64,
    /// Revision of the write that left this value.
    pub mod_revision: u64,
    /// Writes since the key was created, from 1.
    pub version: u64,
    /// When the key is due, in milliseconds of [elapsed time](crate::ApplyContext::elapsed_ms); 0: never.
    /// [`Engine::log_time_at`](crate::Engine::log_time_at) tells what wall clocks will show then. It exists until a command removes it.
    pub expires_ms: u64,
}

impl Item {
    /// Maps when it expires by `map`, unless it never does.
    pub fn map_expiry(&mut self, map: impl Fn(u64) -> u64) {
        if self.expires_ms != 0 {
            self.expires_ms = map(self.expires_ms);
        }
    }
}

impl RangeAnswer {
    /// Maps when the items expire by `map`; those that never do stay so.
    pub fn map_expiry(&mut self, map: impl Fn(u64) -> u64) {
        for (_, item) in &mut self.items {
            item.map_expiry(&map);
        }
    }
}

impl KvAnswer {
    /// Maps when the items in it expire, which is in elapsed time, by `map`; those that never do stay so.
    pub fn map_expiry(&mut self, map: impl Fn(u64) -> u64) {
        match self {
            Self::Item(Some(item)) => item.map_expiry(map),
            Self::Range(range) => range.map_expiry(map),
            Self::Item(None) | Self::Rejected(_) => {}
        }
    }
}
