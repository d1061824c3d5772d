//! What changes the state, and what is answered to it.
//!
//! Commands are stored in the log, and replies beside them, with bincode, which writes a variant's index and the
//! fields in order: variants are only ever added at the end, and the fields of variants and structs never change.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::limits::{KvRejection, MAX_TXN_BYTES, MAX_TXN_COMPARES, MAX_TXN_OPERATIONS};
use super::{Item, RangeAnswer, key};

/// A change of the state.
///
/// Stored in the log with bincode, which writes the variant's index: variants are only ever added at
/// the end, and a variant's fields never change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum KvCommand {
    /// Writes `value` under `key`, whether or not the key exists. The key does not expire any more if it did.
    Put {
        /// The tenant, 1 to [`MAX_NAME_BYTES`](super::MAX_NAME_BYTES) bytes without NUL.
        tenant: String,
        /// The collection, under the same rule.
        collection: String,
        /// The key, 1 to [`MAX_KEY_BYTES`](super::MAX_KEY_BYTES) bytes.
        key: Bytes,
        /// The value, up to [`MAX_VALUE_BYTES`](super::MAX_VALUE_BYTES) bytes; may be empty.
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
    /// Like [`Put`](Self::Put), but the key is due `ttl_ms` after this command, in elapsed time. It stays until an
    /// [`Expire`](Self::Expire) removes it.
    PutExpiring {
        /// The tenant.
        tenant: String,
        /// The collection.
        collection: String,
        /// The key.
        key: Bytes,
        /// The value.
        value: Bytes,
        /// Time to live, in milliseconds, at least 1.
        ttl_ms: u64,
    },
    /// Removes a range of keys within one collection, or the first keys of it.
    DeleteRange {
        /// The tenant.
        tenant: String,
        /// The collection.
        collection: String,
        /// The first key, inclusive. Empty: from the first key of the collection.
        start: Bytes,
        /// The end, exclusive. Empty: to the last key of the collection.
        end: Bytes,
        /// Most keys to remove. 0, and everything above, means [`MAX_DELETED_KEYS`](super::MAX_DELETED_KEYS).
        limit: u32,
    },
    /// Compares, then changes and reads, all at one revision or not at all.
    Txn(KvTxn),
    /// Removes the keys that are due when this command was proposed, the earliest first, at most
    /// [`MAX_EXPIRED_KEYS`](super::MAX_EXPIRED_KEYS). Proposed by the leader.
    Expire,
}

/// A transaction on the items of one tenant.
///
/// When all compares hold, the operations of `then` are carried out, else those of `otherwise`: in order, each
/// seeing what those before it did. All of them have the transaction's revision. A transaction that breaks a
/// limit, be it in the branch not taken, is rejected and changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvTxn {
    /// The tenant.
    pub tenant: String,
    /// The conditions, at most [`MAX_TXN_COMPARES`]. None at all hold.
    pub compares: Vec<Compare>,
    /// What to do when all of them hold, at most [`MAX_TXN_OPERATIONS`].
    pub then: Vec<TxnOp>,
    /// What to do when one of them does not, at most [`MAX_TXN_OPERATIONS`].
    pub otherwise: Vec<TxnOp>,
}

/// A condition on one key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compare {
    /// The collection.
    pub collection: String,
    /// The key.
    pub key: Bytes,
    /// What must be true of it.
    pub condition: Condition,
}

/// What must be true of a key: that this part of its item compares to the operand like this. All numbers of a key
/// that does not exist are 0, and no condition on its value holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Condition {
    /// The value, byte by byte.
    Value(Comparison, Bytes),
    /// Writes since the key was created.
    Version(Comparison, u64),
    /// Revision of the write that created the key.
    CreateRevision(Comparison, u64),
    /// Revision of the write that left the value.
    ModRevision(Comparison, u64),
}

/// How what is found must compare to the operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Comparison {
    /// It is the same.
    Equal,
    /// It is not the same.
    NotEqual,
    /// It is less than the operand.
    Less,
    /// It is greater than the operand.
    Greater,
}

/// One operation of a transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum TxnOp {
    /// Reads the item of a key. Answered by [`TxnResult::Item`].
    Get {
        /// The collection.
        collection: String,
        /// The key.
        key: Bytes,
    },
    /// Reads the items of a range of keys. Answered by [`TxnResult::Range`].
    Range {
        /// The collection.
        collection: String,
        /// The first key, inclusive. Empty: from the first key of the collection.
        start: Bytes,
        /// The end, exclusive. Empty: to the last key of the collection.
        end: Bytes,
        /// Most items to read; 0: all of them.
        limit: u32,
    },
    /// Writes a key. Answered by [`TxnResult::Put`].
    Put {
        /// The collection.
        collection: String,
        /// The key.
        key: Bytes,
        /// The value.
        value: Bytes,
        /// Time to live, in milliseconds; 0: for ever.
        ttl_ms: u64,
    },
    /// Removes a key if it exists. Answered by [`TxnResult::Deleted`].
    Delete {
        /// The collection.
        collection: String,
        /// The key.
        key: Bytes,
    },
    /// Removes a range of keys, all of it. Answered by [`TxnResult::DeletedRange`].
    DeleteRange {
        /// The collection.
        collection: String,
        /// The first key, inclusive. Empty: from the first key of the collection.
        start: Bytes,
        /// The end, exclusive. Empty: to the last key of the collection.
        end: Bytes,
    },
}

impl KvReply {
    /// Maps when the items in it expire, which is in elapsed time, by `map`; those that never do stay so.
    pub fn map_expiry(&mut self, map: impl Fn(u64) -> u64) {
        match self {
            Self::Txn { results, .. } => {
                for result in results {
                    match result {
                        TxnResult::Item(Some(item)) => item.map_expiry(&map),
                        TxnResult::Range(range) => range.map_expiry(&map),
                        TxnResult::Item(None)
                        | TxnResult::Put { .. }
                        | TxnResult::Deleted { .. }
                        | TxnResult::DeletedRange { .. } => {}
                    }
                }
            }
            Self::Put { .. }
            | Self::Deleted { .. }
            | Self::Rejected(_)
            | Self::DeletedRange { .. }
            | Self::Expired { .. } => {}
        }
    }
}

impl KvCommand {
    /// Whether `apply` would accept this command. Doors ask before they propose, so that a command
    /// that breaks a limit does not travel through the log first.
    ///
    /// # Errors
    /// The rejection that `apply` would answer. Only [`KvRejection::ResultsTooLong`] and
    /// [`KvRejection::TooManyDeleted`] depend on the state, and are not found here.
    pub fn check(&self) -> Result<(), KvRejection> {
        match self {
            Self::Put { tenant, collection, key, value } => {
                key::check(tenant, collection, key)?;
                key::check_value(value)
            }
            Self::Delete { tenant, collection, key } => key::check(tenant, collection, key),
            Self::PutExpiring { tenant, collection, key, value, ttl_ms } => {
                key::check(tenant, collection, key)?;
                key::check_value(value)?;
                if *ttl_ms == 0 { Err(KvRejection::NoTimeToLive) } else { Ok(()) }
            }
            Self::DeleteRange { tenant, collection, start, end, limit: _ } => {
                key::check_range(tenant, collection, start, end)
            }
            Self::Txn(txn) => txn.check(),
            Self::Expire => Ok(()),
        }
    }
}

impl KvTxn {
    fn check(&self) -> Result<(), KvRejection> {
        if self.compares.len() > MAX_TXN_COMPARES {
            return Err(KvRejection::TooManyCompares { compares: self.compares.len() as u64 });
        }
        for branch in [&self.then, &self.otherwise] {
            if branch.len() > MAX_TXN_OPERATIONS {
                return Err(KvRejection::TooManyOperations { operations: branch.len() as u64 });
            }
        }
        key::check_name(&self.tenant)?;
        for compare in &self.compares {
            compare.check(&self.tenant)?;
        }
        for operation in self.then.iter().chain(&self.otherwise) {
            operation.check(&self.tenant)?;
        }
        match self.bytes() {
            bytes if bytes > MAX_TXN_BYTES => Err(KvRejection::TxnTooLong { bytes: bytes as u64 }),
            _ => Ok(()),
        }
    }

    /// Bytes of all names, keys and values.
    fn bytes(&self) -> usize {
        let compares: usize = self.compares.iter().map(Compare::bytes).sum();
        let operations: usize = self.then.iter().chain(&self.otherwise).map(TxnOp::bytes).sum();
        self.tenant.len() + compares + operations
    }
}

impl Compare {
    fn check(&self, tenant: &str) -> Result<(), KvRejection> {
        key::check(tenant, &self.collection, &self.key)?;
        match &self.condition {
            Condition::Value(_, value) => key::check_value(value),
            Condition::Version(..) | Condition::CreateRevision(..) | Condition::ModRevision(..) => Ok(()),
        }
    }

    fn bytes(&self) -> usize {
        let operand = match &self.condition {
            Condition::Value(_, value) => value.len(),
            Condition::Version(..) | Condition::CreateRevision(..) | Condition::ModRevision(..) => 0,
        };
        self.collection.len() + self.key.len() + operand
    }
}

impl TxnOp {
    fn check(&self, tenant: &str) -> Result<(), KvRejection> {
        match self {
            Self::Get { collection, key } | Self::Delete { collection, key } => {
                key::check(tenant, collection, key)
            }
            Self::Put { collection, key, value, ttl_ms: _ } => {
                key::check(tenant, collection, key)?;
                key::check_value(value)
            }
            Self::Range { collection, start, end, limit: _ }
            | Self::DeleteRange { collection, start, end } => {
                key::check_range(tenant, collection, start, end)
            }
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Get { collection, key } | Self::Delete { collection, key } => collection.len() + key.len(),
            Self::Put { collection, key, value, ttl_ms: _ } => collection.len() + key.len() + value.len(),
            Self::Range { collection, start, end, limit: _ }
            | Self::DeleteRange { collection, start, end } => collection.len() + start.len() + end.len(),
        }
    }
}

/// What a command is answered. Encoded like [`KvCommand`], under the same rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum KvReply {
    /// The value is written. To [`KvCommand::Put`] and [`KvCommand::PutExpiring`].
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
    /// The first keys of the range do not exist any more.
    DeletedRange {
        /// Revision of this delete.
        revision: u64,
        /// Keys removed.
        deleted: u64,
        /// Whether the range has more keys: the limit was reached.
        more: bool,
    },
    /// One branch of the transaction has been carried out.
    Txn {
        /// Revision of the transaction, and of all it wrote.
        revision: u64,
        /// Whether all compares held: it was the branch `then`.
        succeeded: bool,
        /// What its operations were answered, in their order.
        results: Vec<TxnResult>,
    },
    /// The keys that were due do not exist any more.
    Expired {
        /// Revision of this command.
        revision: u64,
        /// Keys removed.
        removed: u64,
    },
}

/// What an operation of a transaction is answered. Encoded like [`KvCommand`], under the same rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum TxnResult {
    /// The item, if the key exists.
    Item(Option<Item>),
    /// The items found.
    Range(RangeAnswer),
    /// The value is written.
    Put {
        /// Revision of the write that created the key.
        create_revision: u64,
        /// Writes since the key was created, this one included.
        version: u64,
    },
    /// The key does not exist any more.
    Deleted {
        /// Whether there was something to remove.
        existed: bool,
    },
    /// The range has no keys any more.
    DeletedRange {
        /// Keys removed.
        deleted: u64,
    },
}

/// Whether `encoded` is a [`KvCommand::Put`], which most commands are: its number, then four parts, the first two of them text,
/// and nothing else.
pub(super) fn is_put(encoded: &[u8]) -> bool {
    const PUT: u8 = 0;
    let put = || {
        let rest = encoded.strip_prefix(&[PUT])?;
        let (tenant, rest) = part(rest)?;
        let (collection, rest) = part(rest)?;
        let (_key, rest) = part(rest)?;
        let (_value, rest) = part(rest)?;
        let is_text = std::str::from_utf8(tenant).is_ok() && std::str::from_utf8(collection).is_ok();
        Some(is_text && rest.is_empty())
    };
    put().unwrap_or(false)
}

/// The part that `bytes` begin with, and what follows it. Its length comes first: one byte up to 250, else a mark and two or four
/// bytes. No command is longer.
fn part(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    const TWO_BYTES: u8 = 251;
    const FOUR_BYTES: u8 = 252;
    let (mark, rest) = bytes.split_first()?;
    let (length, rest) = match *mark {
        TWO_BYTES => {
            let (length, rest) = rest.split_first_chunk::<2>()?;
            (u32::from(u16::from_le_bytes(*length)), rest)
        }
        FOUR_BYTES => {
            let (length, rest) = rest.split_first_chunk::<4>()?;
            (u32::from_le_bytes(*length), rest)
        }
        short if short < TWO_BYTES => (u32::from(short), rest),
        _ => return None,
    };
    rest.split_at_checked(usize::try_from(length).ok()?)
}
