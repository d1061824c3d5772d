//! Answers in the client's own types, and their passage from the wire.

use bytes::Bytes;

use super::request::Request;
use super::txn::{TxnReply, TxnResult};
use crate::proto::v1::{self, tagged_response};
use crate::types::{AckLevel, Bookmark, HistoryEpoch, LogId, NodeId, ReadLevel, ReadOptions};

/// Who answered, and from which state.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Header {
    /// The node that answered.
    pub node_id: NodeId,
    /// Of a write: its place in the log. Of a read: up to where the answering state had been applied.
    pub position: Option<LogId>,
    /// The history that `position` belongs to.
    pub history: HistoryEpoch,
    /// Of a write: what the acknowledgement promises.
    pub ack: AckLevel,
    /// Of a write: the nodes known to hold it on disk when it was acknowledged.
    pub held_by: Vec<NodeId>,
    /// Of a write: an earlier attempt of it had been applied already, and this is the first one's answer.
    pub repeated_write: bool,
}

impl Header {
    /// What to ask for to read the state of this answer or a later one, on whatever node: one's own write, or
    /// never less than what was read before.
    pub fn then_read(&self, level: ReadLevel) -> ReadOptions {
        ReadOptions::from(level).after(self.bookmark())
    }

    /// The position, to be kept and come back with: index 0 where there is none.
    pub fn bookmark(&self) -> Bookmark {
        Bookmark { index: self.position.map_or(0, |position| position.index), history: self.history }
    }

    pub(super) fn from_wire(header: Option<v1::Header>) -> Self {
        let Some(header) = header else { return Self::default() };
        Self {
            ack: match header.ack() {
                v1::AckLevel::Quorum => AckLevel::Quorum,
                v1::AckLevel::All => AckLevel::All,
                v1::AckLevel::Leader => AckLevel::Leader,
            },
            node_id: header.node_id,
            history: HistoryEpoch(header.position.map_or(0, |position| position.history)),
            position: header.position.map(|position| LogId::new(position.term, position.index)),
            held_by: header.held_by,
            repeated_write: header.repeated_write,
        }
    }
}

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
}

impl Item {
    pub(super) fn from_wire(item: v1::Item) -> Self {
        Self {
            key: item.key,
            value: item.value,
            create_revision: item.create_revision,
            mod_revision: item.mod_revision,
            version: item.version,
            expires_ms: item.expires_ms,
        }
    }
}

/// Answer to a put. With [`AckLevel::Leader`] only the header is filled in: the put is not applied yet.
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

/// Answer to a delete. With [`AckLevel::Leader`] only the header is filled in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeleteReply {
    /// Who answered, and where the write stands in the log.
    pub header: Header,
    /// Whether the key existed.
    pub deleted: bool,
}

/// Answer to a removal of many keys. With [`AckLevel::Leader`] only the header is filled in.
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

impl RangeReply {
    pub(super) fn from_wire(range: v1::RangeResponse) -> Self {
        Self {
            header: Header::from_wire(range.header),
            items: range.items.into_iter().map(Item::from_wire).collect(),
            next: (!range.next.is_empty()).then_some(range.next),
        }
    }
}

/// The answer to a [`Request`], of the same kind.
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

/// What came in place of an answer.
#[derive(Debug)]
pub(super) enum NoAnswer {
    /// Boxed, because it is much larger than what else there is.
    Failure(Box<v1::Failure>),
    /// The answer to another kind of question.
    Unexpected,
}

impl Response {
    /// Whether this is the kind of response that `request` asks for.
    pub(super) fn answers(&self, request: &Request) -> bool {
        matches!(
            (self, request),
            (Self::Put(_), Request::Put { .. })
                | (Self::Get(_), Request::Get { .. })
                | (Self::Delete(_), Request::Delete { .. })
                | (Self::DeleteRange(_), Request::DeleteRange { .. })
                | (Self::Range(_), Request::Range { .. })
                | (Self::Txn(_), Request::Txn { .. })
        )
    }

    /// The answer, or what came in its place.
    pub(super) fn from_wire(response: tagged_response::Response) -> Result<Self, NoAnswer> {
        use tagged_response::Response as Wire;
        Ok(match response {
            Wire::Put(put) => Self::Put(PutReply {
                header: Header::from_wire(put.header),
                revision: put.revision,
                create_revision: put.create_revision,
                version: put.version,
            }),
            Wire::Get(get) => Self::Get(GetReply {
                header: Header::from_wire(get.header),
                item: get.item.map(Item::from_wire),
            }),
            Wire::Delete(delete) => Self::Delete(DeleteReply {
                header: Header::from_wire(delete.header),
                deleted: delete.deleted,
            }),
            Wire::DeleteRange(delete) => Self::DeleteRange(DeleteRangeReply {
                header: Header::from_wire(delete.header),
                deleted: delete.deleted,
                more: delete.more,
            }),
            Wire::Range(range) => Self::Range(RangeReply::from_wire(range)),
            Wire::Txn(txn) => Self::Txn(TxnReply {
                header: Header::from_wire(txn.header),
                revision: txn.revision,
                succeeded: txn.succeeded,
                results: txn
                    .results
                    .into_iter()
                    .map(TxnResult::from_wire)
                    .collect::<Option<_>>()
                    .ok_or(NoAnswer::Unexpected)?,
            }),
            Wire::Failure(failure) => return Err(NoAnswer::Failure(Box::new(failure))),
            Wire::OpenSession(_) | Wire::CloseSession(_) => return Err(NoAnswer::Unexpected),
        })
    }
}
