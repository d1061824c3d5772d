//! Between protocol messages and what the engine takes and gives. Pure functions: defaults and limits
//! on the way in, headers on the way out.

use crate::engine::{ReadOutcome, Written};
use crate::error::{ReadError, WriteError};
use crate::machine::kv::{Item, KvAnswer, KvCommand, KvQuery, KvReply, RangeQuery};
use crate::proto::v1;
use crate::proto::v1::tagged_request::Request;
use crate::proto::v1::tagged_response::Response;
use crate::types::{LogId, NodeId, ReadLevel};

use super::failure;

/// Stands in for an empty tenant or collection.
pub(super) const DEFAULT_NAME: &str = "default";

/// Most items of one range answer, whatever the request allows: the answer is put together in one go.
pub(super) const MAX_RANGE_ITEMS: usize = 10_000;

/// Most bytes of keys and values in one range answer. One item may exceed it.
pub(super) const MAX_RANGE_BYTES: usize = 4 * 1024 * 1024;

/// What is counted and timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Put,
    Get,
    Delete,
    Range,
}

impl Method {
    pub(super) const ALL: [Self; 4] = [Self::Put, Self::Get, Self::Delete, Self::Range];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Get => "get",
            Self::Delete => "delete",
            Self::Range => "range",
        }
    }
}

/// What the engine is asked to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Call {
    Write(KvCommand),
    Read(KvQuery, ReadLevel),
}

pub(super) fn method(request: &Request) -> Method {
    match request {
        Request::Put(_) => Method::Put,
        Request::Get(_) => Method::Get,
        Request::Delete(_) => Method::Delete,
        Request::Range(_) => Method::Range,
    }
}

/// The call that `request` asks for, within the limits.
///
/// # Errors
/// The failure to answer instead.
pub(super) fn decode(request: Request) -> Result<Call, v1::Failure> {
    let call = match request {
        Request::Put(v1::PutRequest { tenant, collection, key, value }) => {
            Call::Write(KvCommand::Put { tenant: name(tenant), collection: name(collection), key, value })
        }
        Request::Delete(v1::DeleteRequest { tenant, collection, key }) => {
            Call::Write(KvCommand::Delete { tenant: name(tenant), collection: name(collection), key })
        }
        Request::Get(v1::GetRequest { tenant, collection, key, level }) => Call::Read(
            KvQuery::Get { tenant: name(tenant), collection: name(collection), key },
            read_level(level)?,
        ),
        Request::Range(v1::RangeRequest { tenant, collection, start, end, limit, level }) => {
            let limit = match usize::try_from(limit) {
                Ok(limit @ 1..=MAX_RANGE_ITEMS) => limit,
                _ => MAX_RANGE_ITEMS,
            };
            let (tenant, collection, max_bytes) = (name(tenant), name(collection), MAX_RANGE_BYTES);
            let query = RangeQuery { tenant, collection, start, end, limit, max_bytes };
            Call::Read(KvQuery::Range(query), read_level(level)?)
        }
    };
    match &call {
        Call::Write(command) => command.check()?,
        Call::Read(query, _) => query.check()?,
    }
    Ok(call)
}

fn name(name: String) -> String {
    if name.is_empty() { DEFAULT_NAME.to_owned() } else { name }
}

fn read_level(level: i32) -> Result<ReadLevel, v1::Failure> {
    match v1::ReadLevel::try_from(level) {
        Ok(v1::ReadLevel::Linearizable) => Ok(ReadLevel::Linearizable),
        Ok(v1::ReadLevel::Local) => Ok(ReadLevel::Local),
        // Never answer more weakly than was asked for.
        Err(_) => Err(failure::invalid("this node does not know the read level asked for")),
    }
}

/// The response to a write, or its failure.
pub(super) fn written(
    node_id: NodeId,
    outcome: Result<Written<KvReply>, WriteError>,
) -> Result<Response, v1::Failure> {
    let Written { log_id, reply } = outcome?;
    let header = Some(header(node_id, Some(log_id)));
    match reply {
        KvReply::Put { revision, create_revision, version } => {
            Ok(Response::Put(v1::PutResponse { header, revision, create_revision, version }))
        }
        KvReply::Deleted { existed, .. } => {
            Ok(Response::Delete(v1::DeleteResponse { header, deleted: existed }))
        }
        KvReply::Rejected(rejection) => Err(rejection.into()),
        KvReply::DeletedRange { .. } | KvReply::Txn { .. } | KvReply::Expired { .. } => {
            unreachable!("invariant: no request is decoded to a command with this reply")
        }
    }
}

/// The response to the read of `key` or, when that is not set, of a range; or its failure.
pub(super) fn answered(
    node_id: NodeId,
    key: Option<bytes::Bytes>,
    outcome: Result<ReadOutcome<KvAnswer>, ReadError>,
) -> Result<Response, v1::Failure> {
    let ReadOutcome { applied, answer } = outcome?;
    let header = Some(header(node_id, applied));
    match answer {
        KvAnswer::Item(found) => {
            let item = found.map(|found| item(key.unwrap_or_default(), found));
            Ok(Response::Get(v1::GetResponse { header, item }))
        }
        KvAnswer::Range(range) => {
            let items = range.items.into_iter().map(|(key, found)| item(key, found)).collect();
            let next = range.next.unwrap_or_default();
            Ok(Response::Range(v1::RangeResponse { header, items, next }))
        }
        KvAnswer::Rejected(rejection) => Err(rejection.into()),
        KvAnswer::Events(_) | KvAnswer::Compacted { .. } => {
            unreachable!("invariant: no request is decoded to a query with this answer")
        }
    }
}

/// The key that a get asks for: its response repeats it.
pub(super) fn asked_key(query: &KvQuery) -> Option<bytes::Bytes> {
    match query {
        KvQuery::Get { key, .. } => Some(key.clone()),
        KvQuery::Range(_) | KvQuery::Events(_) => None,
    }
}

fn item(key: bytes::Bytes, item: Item) -> v1::Item {
    let Item { value, create_revision, mod_revision, version, expires_ms: _ } = item;
    v1::Item { key, value, create_revision, mod_revision, version }
}

fn header(node_id: NodeId, log_id: Option<LogId>) -> v1::Header {
    v1::Header { node_id, position: log_id.map(position) }
}

pub(super) fn position(log_id: LogId) -> v1::Position {
    v1::Position { term: log_id.term, index: log_id.index }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::proto::v1::Reason;

    #[test]
    fn empty_names_mean_default() {
        let request = v1::DeleteRequest { tenant: String::new(), collection: "c".into(), key: "k".into() };
        let expected =
            KvCommand::Delete { tenant: "default".into(), collection: "c".into(), key: "k".into() };
        assert_eq!(decode(Request::Delete(request)).unwrap(), Call::Write(expected));
    }

    #[test]
    fn limits_are_checked_at_the_door() {
        let put = |key: &[u8], value: usize| {
            let request = v1::PutRequest {
                key: Bytes::copy_from_slice(key),
                value: vec![0; value].into(),
                ..Default::default()
            };
            decode(Request::Put(request)).map(|_| ()).map_err(|failure| failure.reason())
        };
        assert_eq!(put(b"k", 1024 * 1024), Ok(()));
        assert_eq!(put(b"k", 1024 * 1024 + 1), Err(Reason::TooLarge));
        assert_eq!(put(b"", 0), Err(Reason::Invalid));
        let get = v1::GetRequest { key: "k".into(), level: 99, ..Default::default() };
        assert_eq!(decode(Request::Get(get)).unwrap_err().reason(), Reason::Invalid);
    }

    #[test]
    fn a_range_is_bounded_by_the_server() {
        for (asked, expected) in [(0, MAX_RANGE_ITEMS), (7, 7), (u32::MAX, MAX_RANGE_ITEMS)] {
            let request = v1::RangeRequest { limit: asked, ..Default::default() };
            let Ok(Call::Read(KvQuery::Range(query), ReadLevel::Linearizable)) =
                decode(Request::Range(request))
            else {
                panic!("not a range")
            };
            assert_eq!((query.limit, query.max_bytes), (expected, MAX_RANGE_BYTES));
        }
    }
}
