//! The key-value machine: the state that `quorate serve` replicates.
//!
//! A key lives in a collection of a tenant. It maps to an [`Item`]: a value, the revision that created
//! it, the revision that last wrote it, and how often it was written since. The revision of a write is
//! the index of its log entry, so every revision names one operation, and revisions have gaps.
//!
//! # Shape
//!
//! All items are in one persistent B-tree, ordered by the composite key `tenant NUL collection NUL key`
//! ([`key`]); names contain no NUL, so a collection is one contiguous range. A view is a clone of the
//! tree's root: reads and snapshots go on undisturbed while commands are applied, and the nodes that
//! an apply touches are copied once per view. A slot of the tree is two pointers to shared bytes (the key
//! and the [`record`]), so that this copy is 512 bytes and some reference counts, and ten million small
//! items cost some 150 bytes each beyond their keys and values.
//!
//! # Promises
//!
//! - *Totality*: every command that can be decoded is answered; what breaks a limit is answered with
//!   [`KvReply::Rejected`] and changes nothing.
//! - *State hash*: the wrapping sum of one hash per item, kept up to date by every write. It does not
//!   depend on the order of writes nor on keys that are gone, and costs nothing to read.
//!
//! # What it does not do
//!
//! It keeps no older versions of a key, resolves no defaults for empty names (the server does), and
//! does not look at values.

mod key;
mod record;
mod snapshot;
#[cfg(test)]
mod tests;

use std::io::{self, Read, Write};
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use imbl::OrdMap;
use serde::{Deserialize, Serialize};

pub use key::{KvRejection, MAX_KEY_BYTES, MAX_NAME_BYTES, MAX_VALUE_BYTES};

use super::{ApplyContext, StateMachine};
use record::Record;

/// A change of the state.
///
/// Stored in the log with bincode, which writes the variant's index: variants are only ever added at
/// the end, and a variant's fields never change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum KvCommand {
    /// Writes `value` under `key`, whether or not the key exists.
    Put {
        /// The tenant, 1 to [`MAX_NAME_BYTES`] bytes without NUL.
        tenant: String,
        /// The collection, under the same rule.
        collection: String,
        /// The key, 1 to [`MAX_KEY_BYTES`] bytes.
        key: Bytes,
        /// The value, up to [`MAX_VALUE_BYTES`] bytes; may be empty.
        value: Bytes,
    },
    /// Removes `key` if it exists.
    Delete {
        /// The tenant.
        tenant: String,
        /// The collection.
        collection: String,
        /// The key.
        key: Bytes,
    },
}

impl KvCommand {
    /// Whether `apply` would accept this command. Doors ask before they propose, so that a command
    /// that breaks a limit does not travel through the log first.
    ///
    /// # Errors
    /// The rejection that `apply` would answer.
    pub fn check(&self) -> Result<(), KvRejection> {
        match self {
            Self::Put { tenant, collection, key, value } => {
                key::check(tenant, collection, key)?;
                key::check_value(value)
            }
            Self::Delete { tenant, collection, key } => key::check(tenant, collection, key),
        }
    }
}

/// What a command is answered. Encoded like [`KvCommand`], under the same rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum KvReply {
    /// The value is written.
    Put {
        /// Revision of this write.
        revision: u64,
        /// Revision of the write that created the key.
        create_revision: u64,
        /// Writes since the key was created, this one included; 1 when it is new.
        version: u64,
    },
    /// The key does not exist any more.
    Deleted {
        /// Revision of this delete.
        revision: u64,
        /// Whether there was something to remove.
        existed: bool,
    },
    /// The command breaks a limit; nothing has changed.
    Rejected(KvRejection),
}

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

/// Items of a range.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RangeAnswer {
    /// Keys, within their collection, and items, in the order of the keys.
    pub items: Vec<(Bytes, Item)>,
    /// The next key of the range when a bound was reached: where to start the next query.
    pub next: Option<Bytes>,
}

/// What a key maps to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The value. Shares its memory with the state, so that holding it does not copy it.
    pub value: Bytes,
    /// Revision of the write that created the key.
    pub create_revision: u64,
    /// Revision of the write that left this value.
    pub mod_revision: u64,
    /// Writes since the key was created, from 1.
    pub version: u64,
}

/// The key-value machine. See the [module](self).
#[derive(Debug, Clone, Default)]
pub struct KvMachine {
    state: KvView,
}

/// The state of a [`KvMachine`] at one point in time. Cloning it costs a reference count.
///
/// # Invariants
/// - Every key is a composite key ([`key`]) within the limits.
/// - `hash` is the wrapping sum of [`record::item_hash`] over all items.
#[derive(Debug, Clone, Default)]
pub struct KvView {
    items: OrdMap<Arc<[u8]>, Record>,
    hash: u64,
}

impl KvView {
    /// How many keys there are, over all tenants and collections.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is no key at all.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    fn get(&self, key: &[u8]) -> Option<Item> {
        self.items.get(key).map(Record::item)
    }

    fn range(&self, query: &RangeQuery) -> RangeAnswer {
        let mut answer = RangeAnswer::default();
        let prefix = key::prefix(&query.tenant, &query.collection);
        let start = key::within(&prefix, &query.start);
        let end = if query.end.is_empty() {
            key::collection_end(&prefix)
        } else {
            key::within(&prefix, &query.end)
        };
        if start >= end {
            return answer; // the tree, like the standard library's, does not accept such a range
        }
        let bounds = (Bound::Included(start.as_slice()), Bound::Excluded(end.as_slice()));
        let mut bytes = 0;
        for (full_key, record) in self.items.range::<_, [u8]>(bounds) {
            let key = Bytes::copy_from_slice(&full_key[prefix.len()..]);
            bytes += key.len() + record.value_len() + RANGE_ITEM_OVERHEAD_BYTES;
            let full = bytes > query.max_bytes && !answer.items.is_empty();
            if full || answer.items.len() >= query.limit {
                answer.next = Some(key);
                break;
            }
            answer.items.push((key, record.item()));
        }
        answer
    }
}

/// What an item of a range counts beyond its key and value: its revisions and the framing of any
/// encoding it is sent in.
const RANGE_ITEM_OVERHEAD_BYTES: usize = 64;

impl KvMachine {
    fn put(&mut self, revision: u64, full_key: Arc<[u8]>, value: &[u8]) -> KvReply {
        let KvView { items, hash } = &mut self.state;
        if let Some(slot) = items.get_mut(&*full_key) {
            let create_revision = slot.create_revision();
            let version = slot.version() + 1;
            let record = Record::new(create_revision, revision, version, value);
            *hash = hash
                .wrapping_sub(record::item_hash(&full_key, slot))
                .wrapping_add(record::item_hash(&full_key, &record));
            *slot = record;
            return KvReply::Put { revision, create_revision, version };
        }
        let record = Record::new(revision, revision, 1, value);
        *hash = hash.wrapping_add(record::item_hash(&full_key, &record));
        items.insert(full_key, record);
        KvReply::Put { revision, create_revision: revision, version: 1 }
    }

    fn delete(&mut self, revision: u64, full_key: &[u8]) -> KvReply {
        let KvView { items, hash } = &mut self.state;
        let removed = items.remove(full_key);
        if let Some(record) = &removed {
            *hash = hash.wrapping_sub(record::item_hash(full_key, record));
        }
        KvReply::Deleted { revision, existed: removed.is_some() }
    }
}

impl StateMachine for KvMachine {
    type Command = KvCommand;
    type Reply = KvReply;
    type Query = KvQuery;
    type Answer = KvAnswer;
    type View = KvView;

    fn apply(&mut self, context: &ApplyContext, command: KvCommand) -> KvReply {
        if let Err(rejection) = command.check() {
            return KvReply::Rejected(rejection);
        }
        let revision = context.log_id.index;
        match command {
            KvCommand::Put { tenant, collection, key, value } => {
                self.put(revision, key::composite(&tenant, &collection, &key).into(), &value)
            }
            KvCommand::Delete { tenant, collection, key } => {
                self.delete(revision, &key::composite(&tenant, &collection, &key))
            }
        }
    }

    fn view(&self) -> KvView {
        self.state.clone()
    }

    fn query(view: &KvView, query: KvQuery) -> KvAnswer {
        if let Err(rejection) = query.check() {
            return KvAnswer::Rejected(rejection);
        }
        match query {
            KvQuery::Get { tenant, collection, key } => {
                KvAnswer::Item(view.get(&key::composite(&tenant, &collection, &key)))
            }
            KvQuery::Range(query) => KvAnswer::Range(view.range(&query)),
        }
    }

    fn write_snapshot(view: &KvView, out: &mut dyn Write) -> io::Result<()> {
        snapshot::write(view, out)
    }

    fn read_snapshot(input: &mut dyn Read) -> io::Result<Self> {
        Ok(Self { state: snapshot::read(input)? })
    }

    fn running_hash(&self) -> Option<u64> {
        Some(self.state.hash)
    }

    fn state_hash(view: &KvView) -> u64 {
        view.hash
    }
}

impl KvQuery {
    /// Whether this query keeps within the limits.
    ///
    /// # Errors
    /// The rejection that the machine would answer.
    pub fn check(&self) -> Result<(), KvRejection> {
        match self {
            Self::Get { tenant, collection, key } => key::check(tenant, collection, key),
            Self::Range(query) => {
                key::check_names(&query.tenant, &query.collection)?;
                key::check_bound(&query.start)?;
                key::check_bound(&query.end)
            }
        }
    }
}
