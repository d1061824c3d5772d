//! What is answered, in the words of those who ask.

use bytes::Bytes;

use super::request::Method;
use super::txn::TxnReply;
use crate::call::Header;

/// A key with its value and history.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Item {
    /// The key.
    pub key: Bytes,
    /// Its value.
    pub value: Bytes,
    /// Revision of the put that created the key.
    pub create_revision: u64,
    /// Revision of the put that wrote this value.
    pub mod_revision: u64,
    /// Puts since the key was created, from 1.
    pub version: u64,
    /// When the key expires, milliseconds since the Unix epoch by the cluster's clock; 0: never.
    pub expires_ms: u64,
    /// Whether that time has passed by the clock of the node that answered. The key goes with the write that removes it: a node that
    /// hears of no writes shows it for as long as that lasts.
    pub past_due: bool,
}

/// Answer to a put. With [`AckLevel::Leader`](crate::AckLevel::Leader) only the header is filled in: the put is not applied yet.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PutReply {
    /// Who answered, and where the write stands in the log.
    pub header: Header,
    /// Revision of the state after this put.
    pub revision: u64,
    /// Revision of the put that created the key.
    pub create_revision: u64,
    /// Puts since the key was created, from 1.
    pub version: u64,
}

/// Answer to a put that has a condition.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ConditionalPut {
    /// Who answered, and where the write stands in the log.
    pub header: Header,
    /// Whether the condition held, so that the value was set.
    pub succeeded: bool,
    /// Revision at which the condition was examined; of the value, if it was set.
    pub revision: u64,
    /// Revision of the put that created the key; 0 when the value was not set.
    pub create_revision: u64,
    /// Puts since the key was created, from 1; 0 when the value was not set.
    pub version: u64,
    /// What the key held instead, when the condition did not hold; `None` when it did not exist.
    pub current: Option<Item>,
}

/// Answer to a get.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GetReply {
    /// Who answered, from which state.
    pub header: Header,
    /// `None` when the key does not exist.
    pub item: Option<Item>,
}

/// Answer to a delete. With [`AckLevel::Leader`](crate::AckLevel::Leader) only the header is filled in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeleteReply {
    /// Who answered, and where the write stands in the log.
    pub header: Header,
    /// Whether the key existed.
    pub deleted: bool,
}

/// Answer to a removal of many keys. With [`AckLevel::Leader`](crate::AckLevel::Leader) only the header is filled in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeleteRangeReply {
    /// Who answered, and where the write, or the last of several, stands in the log.
    pub header: Header,
    /// How many keys were removed.
    pub deleted: u64,
    /// Whether a limit left some of the interval.
    pub more: bool,
}

/// Answer to a range read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RangeReply {
    /// Who answered, from which state.
    pub header: Header,
    /// The items, in the order of their keys.
    pub items: Vec<Item>,
    /// Set when there are more: the `start` to go on with.
    pub next: Option<Bytes>,
}

/// The answer to a [`Request`](super::Request), of the same kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Response {
    /// To a put.
    Put(PutReply),
    /// To a get.
    Get(GetReply),
    /// To a delete.
    Delete(DeleteReply),
    /// To a removal of many keys.
    DeleteRange(DeleteRangeReply),
    /// To a range read.
    Range(RangeReply),
    /// To a transaction.
    Txn(TxnReply),
}

impl Response {
    /// To which kind of request it is an answer.
    pub fn method(&self) -> Method {
        match self {
            Self::Put(_) => Method::Put,
            Self::Get(_) => Method::Get,
            Self::Delete(_) => Method::Delete,
            Self::DeleteRange(_) => Method::DeleteRange,
            Self::Range(_) => Method::Range,
            Self::Txn(_) => Method::Txn,
        }
    }
}
