//! Transactions: comparisons, and what to do when all of them hold and when not, at one revision.

use std::time::Duration;

use bytes::Bytes;

use super::reply::Item;
use super::request::Range;
use crate::call::Header;

/// A transaction. Without comparisons it does what [`then`](Self::then) lists.
///
/// ```
/// use quorate::kv::{Compare, Txn, TxnOp};
///
/// let take_over = Txn::new()
///     .when(Compare::value("owner").equals("a"))
///     .when(Compare::version("lock").equals(3))
///     .then(TxnOp::put("owner", "b"))
///     .otherwise(TxnOp::get("owner"));
/// ```
///
/// The operations of a list are done in order and see each other's effects. The server bounds how many there may
/// be, and how large the results together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    pub(in crate::kv) compares: Vec<Compare>,
    pub(in crate::kv) then: Vec<TxnOp>,
    pub(in crate::kv) otherwise: Vec<TxnOp>,
}

impl Txn {
    /// One that does nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a comparison: all must hold.
    #[must_use]
    pub fn when(mut self, compare: Compare) -> Self {
        self.compares.push(compare);
        self
    }

    /// Adds an operation that is done if all comparisons hold.
    #[must_use]
    pub fn then(mut self, operation: TxnOp) -> Self {
        self.then.push(operation);
        self
    }

    /// Adds an operation that is done if one of the comparisons does not hold.
    #[must_use]
    pub fn otherwise(mut self, operation: TxnOp) -> Self {
        self.otherwise.push(operation);
        self
    }

    /// Whether it has neither comparisons nor operations.
    pub fn is_empty(&self) -> bool {
        self.compares.is_empty() && self.then.is_empty() && self.otherwise.is_empty()
    }
}

/// How what a key has is compared with what is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// It is the same.
    Equal,
    /// It is another.
    NotEqual,
    /// It comes before. Values are ordered byte by byte.
    Less,
    /// It comes after.
    Greater,
}

/// One comparison of a transaction: something of a key, with something given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    /// Empty: the transaction's.
    pub(in crate::kv) collection: String,
    pub(in crate::kv) key: Bytes,
    pub(in crate::kv) comparison: Comparison,
    pub(in crate::kv) target: CompareTarget,
}

/// What of a key is compared, and with what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::kv) enum CompareTarget {
    Value(Bytes),
    Version(u64),
    CreateRevision(u64),
    ModRevision(u64),
}

impl Compare {
    /// Compares the value of `key`. No comparison with the value of a key that does not exist holds.
    pub fn value(key: impl Into<Bytes>) -> ValueOf {
        ValueOf(key.into())
    }

    /// Compares how many puts `key` has had since it was created; 0 when it does not exist.
    pub fn version(key: impl Into<Bytes>) -> NumberOf {
        NumberOf { key: key.into(), target: CompareTarget::Version }
    }

    /// Compares the revision of the put that created `key`; 0 when it does not exist.
    pub fn create_revision(key: impl Into<Bytes>) -> NumberOf {
        NumberOf { key: key.into(), target: CompareTarget::CreateRevision }
    }

    /// Compares the revision of the last put to `key`; 0 when it does not exist.
    pub fn mod_revision(key: impl Into<Bytes>) -> NumberOf {
        NumberOf { key: key.into(), target: CompareTarget::ModRevision }
    }

    /// Holds when `key` exists.
    pub fn exists(key: impl Into<Bytes>) -> Self {
        Self::version(key).is(Comparison::Greater, 0)
    }

    /// Holds when `key` does not exist.
    pub fn missing(key: impl Into<Bytes>) -> Self {
        Self::version(key).equals(0)
    }

    /// The same for a key of another collection of the tenant.
    #[must_use]
    pub fn in_collection(self, collection: impl Into<String>) -> Self {
        Self { collection: collection.into(), ..self }
    }

    fn new(key: Bytes, comparison: Comparison, target: CompareTarget) -> Self {
        Self { collection: String::new(), key, comparison, target }
    }
}

/// The left side of a comparison of values.
#[derive(Debug, Clone)]
pub struct ValueOf(Bytes);

impl ValueOf {
    /// Holds when the value is `value`.
    pub fn equals(self, value: impl Into<Bytes>) -> Compare {
        self.is(Comparison::Equal, value)
    }

    /// Holds when the key exists and has another value.
    pub fn differs_from(self, value: impl Into<Bytes>) -> Compare {
        self.is(Comparison::NotEqual, value)
    }

    /// Holds when the value and `value` compare so.
    pub fn is(self, comparison: Comparison, value: impl Into<Bytes>) -> Compare {
        Compare::new(self.0, comparison, CompareTarget::Value(value.into()))
    }
}

/// The left side of a comparison of numbers.
#[derive(Debug, Clone)]
pub struct NumberOf {
    key: Bytes,
    target: fn(u64) -> CompareTarget,
}

impl NumberOf {
    /// Holds when the number is `number`.
    pub fn equals(self, number: u64) -> Compare {
        self.is(Comparison::Equal, number)
    }

    /// Holds when the number is another one.
    pub fn differs_from(self, number: u64) -> Compare {
        self.is(Comparison::NotEqual, number)
    }

    /// Holds when the number and `number` compare so.
    pub fn is(self, comparison: Comparison, number: u64) -> Compare {
        Compare::new(self.key, comparison, (self.target)(number))
    }
}

/// One operation of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnOp {
    /// Empty: the transaction's.
    pub(in crate::kv) collection: String,
    pub(in crate::kv) act: Act,
}

/// What an operation does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::kv) enum Act {
    Get(Bytes),
    Range(Range),
    Put { key: Bytes, value: Bytes, ttl: Option<Duration> },
    Delete(Bytes),
    DeleteRange(Range),
}

impl TxnOp {
    /// Reads `key`.
    pub fn get(key: impl Into<Bytes>) -> Self {
        Self::new(Act::Get(key.into()))
    }

    /// Reads the first keys of `range`, in order.
    pub fn range(range: Range) -> Self {
        Self::new(Act::Range(range))
    }

    /// Sets `key` to `value`.
    pub fn put(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        Self::new(Act::Put { key: key.into(), value: value.into(), ttl: None })
    }

    /// Sets `key` to `value`; it is removed after `ttl`, in milliseconds rounded up, unless it is written again.
    pub fn put_with_ttl(key: impl Into<Bytes>, value: impl Into<Bytes>, ttl: Duration) -> Self {
        Self::new(Act::Put { key: key.into(), value: value.into(), ttl: Some(ttl) })
    }

    /// Removes `key`.
    pub fn delete(key: impl Into<Bytes>) -> Self {
        Self::new(Act::Delete(key.into()))
    }

    /// Removes the keys of `range`, whose limit does not count: more than the server's limit fail the transaction.
    pub fn delete_range(range: Range) -> Self {
        Self::new(Act::DeleteRange(range))
    }

    /// The same in another collection of the tenant.
    #[must_use]
    pub fn in_collection(self, collection: impl Into<String>) -> Self {
        Self { collection: collection.into(), ..self }
    }

    fn new(act: Act) -> Self {
        Self { collection: String::new(), act }
    }
}

/// Answer to a transaction. With [`AckLevel::Leader`](crate::AckLevel::Leader) only the header is filled in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TxnReply {
    /// Who answered, and where the transaction stands in the log.
    pub header: Header,
    /// Revision of everything that it did.
    pub revision: u64,
    /// Whether all comparisons held, so that the first list was done.
    pub succeeded: bool,
    /// One for each operation that was done, in order.
    pub results: Vec<TxnResult>,
}

/// What came of one operation of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TxnResult {
    /// What a key held; `None` when it does not exist.
    Get(Option<Item>),
    /// The first keys of an interval.
    Range {
        /// In the order of their keys.
        items: Vec<Item>,
        /// Set when there are more: the first key that was left out.
        next: Option<Bytes>,
    },
    /// A key was set.
    Put {
        /// Revision of the put that created the key.
        create_revision: u64,
        /// Puts since the key was created, from 1.
        version: u64,
    },
    /// A key was removed.
    Delete {
        /// Whether it existed.
        deleted: bool,
    },
    /// Keys were removed.
    DeleteRange {
        /// How many.
        deleted: u64,
    },
}
