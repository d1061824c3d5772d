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
    /// The latest changes of a range of keys within one collection, in their order.
    Events(EventsQuery),
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

/// A range of keys, from which revision on their changes are asked for, and how many of them.
///
/// All events of one revision are in one answer, unless the query lets them be [`split`](Self::split). An answer exceeds
/// the two bounds only when the first revision in it does so alone; one that may be split only with a single event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventsQuery {
    /// The tenant.
    pub tenant: String,
    /// The collection.
    pub collection: String,
    /// The first key, inclusive. Empty: from the first key of the collection.
    pub start: Bytes,
    /// The end, exclusive. Empty: to the last key of the collection.
    pub end: Bytes,
    /// Changes at this revision or later.
    pub from_revision: u64,
    /// At most this many events.
    pub limit: usize,
    /// At most this many bytes of keys and values, each event counted with 64 bytes more.
    pub max_bytes: usize,
    /// Whether the events of a revision that exceeds the bounds alone may be split between answers. If so, this many events
    /// at `from_revision` are left out, because earlier answers had them: see [`EventsAnswer::told`].
    pub split: Option<usize>,
}

impl KvQuery {
    /// Whether this query keeps within the limits.
    ///
    /// # Errors
    /// The rejection that the machine would answer.
    pub fn check(&self) -> Result<(), KvRejection> {
        match self {
            Self::Get { tenant, collection, key } => key::check(tenant, collection, key),
            Self::Range(RangeQuery { tenant, collection, start, end, .. })
            | Self::Events(EventsQuery { tenant, collection, start, end, .. }) => {
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
    /// The events found.
    Events(EventsAnswer),
    /// This node's history does not reach back to the revision asked for. Whoever watches reads the range, and
    /// goes on from the revision of that read.
    Compacted {
        /// The first revision from which on it knows every change.
        first_revision: u64,
    },
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
            Self::Events(EventsAnswer { events, .. }) => {
                for event in events {
                    match &mut event.change {
                        Change::Put(item) => item.map_expiry(&map),
                        Change::Deleted | Change::Expired => {}
                    }
                }
            }
            Self::Item(None) | Self::Rejected(_) | Self::Compacted { .. } => {}
        }
    }
}

/// Changes of a range of keys.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EventsAnswer {
    /// The changes, in the order they were made.
    pub events: Vec<Event>,
    /// Every change of the range below this revision, from the one asked for on, is in `events`: where to start the
    /// next query. Never below the revision asked for. When that was too far ahead or nothing is left, there may
    /// be nothing to ask until a command with this revision or a later one has been applied.
    pub next_revision: u64,
    /// Not 0 when the events at `next_revision` were split: how many of them this answer and those before it had. What the
    /// next query says in [`EventsQuery::split`].
    pub told: usize,
    /// Whether nothing is left out up to the position of the state that answered, also where that is beyond
    /// `next_revision`: not all entries of a log are commands.
    pub complete: bool,
}

/// A change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Revision of the command that made it. The changes of one transaction share it.
    pub revision: u64,
    /// The key, within its collection.
    pub key: Bytes,
    /// What became of it.
    pub change: Change,
}

/// What became of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// It maps to this item.
    Put(Item),
    /// It was deleted.
    Deleted,
    /// It was due, and is gone.
    Expired,
}
