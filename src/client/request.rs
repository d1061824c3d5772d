//! Requests and answers in the client's own types, and their passage to and from the wire.

use bytes::Bytes;

use crate::proto::v1::{self, tagged_request, tagged_response};
use crate::types::{LogId, NodeId, ReadLevel};

/// Whose keys: a collection of a tenant. Empty names mean `default`, and cost nothing to send.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Scope {
    /// The tenant.
    pub tenant: String,
    /// The collection.
    pub collection: String,
}

/// One operation on the key-value state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Sets a key.
    Put {
        /// Whose key.
        scope: Scope,
        /// The key.
        key: Bytes,
        /// Its new value.
        value: Bytes,
    },
    /// Reads a key.
    Get {
        /// Whose key.
        scope: Scope,
        /// The key.
        key: Bytes,
        /// How fresh.
        level: ReadLevel,
    },
    /// Removes a key.
    Delete {
        /// Whose key.
        scope: Scope,
        /// The key.
        key: Bytes,
    },
    /// Reads the keys of an interval, in order.
    Range {
        /// Whose keys.
        scope: Scope,
        /// The interval.
        range: Range,
        /// How fresh.
        level: ReadLevel,
    },
}

/// An interval of keys.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Range {
    /// The first key, if it exists.
    pub start: Bytes,
    /// The first key that is not part of the interval. Empty: to the end of the collection.
    pub end: Bytes,
    /// At most this many items; 0 means the server's limit.
    pub limit_items: u32,
}

/// How an operation is routed, and whether repeating it is harmless.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Write,
    LeaderRead,
    LocalRead,
}

impl Request {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Put { .. } | Self::Delete { .. } => Kind::Write,
            Self::Get { level, .. } | Self::Range { level, .. } => match level {
                ReadLevel::Linearizable => Kind::LeaderRead,
                ReadLevel::Lease => Kind::LeaderRead,
                ReadLevel::Local | ReadLevel::Bounded { .. } => Kind::LocalRead,
            },
        }
    }

    /// Bytes on the wire, give or take the framing.
    pub(super) fn size_bytes(&self) -> usize {
        let (scope, content) = match self {
            Self::Put { scope, key, value } => (scope, key.len() + value.len()),
            Self::Get { scope, key, .. } | Self::Delete { scope, key } => (scope, key.len()),
            Self::Range { scope, range, .. } => (scope, range.start.len() + range.end.len()),
        };
        scope.tenant.len() + scope.collection.len() + content
    }

    pub(super) fn into_wire(self) -> tagged_request::Request {
        match self {
            Self::Put { scope: Scope { tenant, collection }, key, value } => {
                tagged_request::Request::Put(v1::PutRequest {
                    tenant,
                    collection,
                    key,
                    value,
                    ..Default::default()
                })
            }
            Self::Get { scope: Scope { tenant, collection }, key, level } => {
                tagged_request::Request::Get(v1::GetRequest {
                    tenant,
                    collection,
                    key,
                    level: wire_level(level).into(),
                    ..Default::default()
                })
            }
            Self::Delete { scope: Scope { tenant, collection }, key } => {
                tagged_request::Request::Delete(v1::DeleteRequest {
                    tenant,
                    collection,
                    key,
                    ..Default::default()
                })
            }
            Self::Range { scope: Scope { tenant, collection }, range, level } => {
                tagged_request::Request::Range(v1::RangeRequest {
                    tenant,
                    collection,
                    start: range.start,
                    end: range.end,
                    limit: range.limit_items,
                    level: wire_level(level).into(),
                    ..Default::default()
                })
            }
        }
    }
}

fn wire_level(level: ReadLevel) -> v1::ReadLevel {
    match level {
        ReadLevel::Linearizable => v1::ReadLevel::Linearizable,
        ReadLevel::Local => v1::ReadLevel::Local,
        ReadLevel::Lease => v1::ReadLevel::Lease,
        ReadLevel::Bounded { .. } => v1::ReadLevel::Bounded,
    }
}

/// Who answered, and from which state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// The node that answered.
    pub node_id: NodeId,
    /// Of a write: its place in the log. Of a read: up to where the answering state had been applied.
    pub position: Option<LogId>,
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
}

/// Answer to a put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
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

/// Answer to a get.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GetReply {
    /// Who answered, from which state.
    pub header: Header,
    /// `None` when the key does not exist.
    pub item: Option<Item>,
}

/// Answer to a delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeleteReply {
    /// Who answered, and where the write stands in the log.
    pub header: Header,
    /// Whether the key existed.
    pub deleted: bool,
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

/// The answer to a [`Request`], of the same kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Response {
    /// To a put.
    Put(PutReply),
    /// To a get.
    Get(GetReply),
    /// To a delete.
    Delete(DeleteReply),
    /// To a range read.
    Range(RangeReply),
}

impl Response {
    /// Whether this is the kind of response that `request` asks for.
    pub(super) fn answers(&self, request: &Request) -> bool {
        matches!(
            (self, request),
            (Self::Put(_), Request::Put { .. })
                | (Self::Get(_), Request::Get { .. })
                | (Self::Delete(_), Request::Delete { .. })
                | (Self::Range(_), Request::Range { .. })
        )
    }

    /// The answer, or the failure that came in its place.
    pub(super) fn from_wire(response: tagged_response::Response) -> Result<Self, v1::Failure> {
        use tagged_response::Response as Wire;
        Ok(match response {
            Wire::Put(put) => Self::Put(PutReply {
                header: header(put.header),
                revision: put.revision,
                create_revision: put.create_revision,
                version: put.version,
            }),
            Wire::Get(get) => Self::Get(GetReply { header: header(get.header), item: get.item.map(item) }),
            Wire::Delete(delete) => {
                Self::Delete(DeleteReply { header: header(delete.header), deleted: delete.deleted })
            }
            Wire::Range(range) => Self::Range(RangeReply {
                header: header(range.header),
                items: range.items.into_iter().map(item).collect(),
                next: (!range.next.is_empty()).then_some(range.next),
            }),
            Wire::Failure(failure) => return Err(failure),
            _ => return Err(v1::Failure::default()),
        })
    }
}

fn header(header: Option<v1::Header>) -> Header {
    let header = header.unwrap_or_default();
    Header {
        node_id: header.node_id,
        position: header.position.map(|position| LogId::new(position.term, position.index)),
    }
}

fn item(item: v1::Item) -> Item {
    Item {
        key: item.key,
        value: item.value,
        create_revision: item.create_revision,
        mod_revision: item.mod_revision,
        version: item.version,
    }
}
