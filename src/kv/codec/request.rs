//! Requests, and how they are to be carried out.

use std::time::Duration;

use super::super::api::{Range, Request, Scope};
use super::{RequestMessage, txn};
use crate::call::{self, Options, Rejected, whole_ms};
use crate::proto::v1;

/// `request` as a message, without how it is to be carried out.
pub(crate) fn encode(request: Request) -> RequestMessage {
    match request {
        Request::Put { scope: Scope { tenant, collection }, key, value, ttl } => {
            let ttl_ms = encode_ttl(ttl);
            RequestMessage::Put(v1::PutRequest { tenant, collection, key, value, ttl_ms, options: None })
        }
        Request::Get { scope: Scope { tenant, collection }, key } => {
            RequestMessage::Get(v1::GetRequest { tenant, collection, key, level: 0, freshness: None })
        }
        Request::Delete { scope: Scope { tenant, collection }, key } => {
            RequestMessage::Delete(v1::DeleteRequest { tenant, collection, key, options: None })
        }
        Request::DeleteRange { scope: Scope { tenant, collection }, range } => {
            let Range { start, end, limit_items: limit } = range;
            let options = None;
            RequestMessage::DeleteRange(v1::DeleteRangeRequest {
                tenant,
                collection,
                start,
                end,
                limit,
                options,
            })
        }
        Request::Range { scope, range } => RequestMessage::Range(encode_range(scope, range)),
        Request::Txn { scope, txn } => RequestMessage::Txn(txn::encode(scope, txn)),
    }
}

/// # Errors
/// When `message` is of another service, or says what no request can.
pub(crate) fn decode(message: RequestMessage) -> Result<Request, Rejected> {
    Ok(match message {
        RequestMessage::Put(v1::PutRequest { tenant, collection, key, value, ttl_ms, options: _ }) => {
            let ttl = decode_ttl(ttl_ms);
            Request::Put { scope: Scope { tenant, collection }, key, value, ttl }
        }
        RequestMessage::Get(v1::GetRequest { tenant, collection, key, level: _, freshness: _ }) => {
            Request::Get { scope: Scope { tenant, collection }, key }
        }
        RequestMessage::Delete(v1::DeleteRequest { tenant, collection, key, options: _ }) => {
            Request::Delete { scope: Scope { tenant, collection }, key }
        }
        RequestMessage::DeleteRange(request) => {
            let v1::DeleteRangeRequest { tenant, collection, start, end, limit, options: _ } = request;
            let range = Range { start, end, limit_items: limit };
            Request::DeleteRange { scope: Scope { tenant, collection }, range }
        }
        RequestMessage::Range(v1::RangeRequest { at: Some(_), .. }) => {
            return Err(Rejected::invalid("only a RangeStream can go on with the state of an earlier one"));
        }
        RequestMessage::Range(request) => {
            let (scope, range) = decode_range(request);
            Request::Range { scope, range }
        }
        RequestMessage::Txn(request) => {
            let (scope, txn) = txn::decode(request)?;
            Request::Txn { scope, txn }
        }
        RequestMessage::OpenSession(_) | RequestMessage::CloseSession(_) => {
            return Err(Rejected::invalid("sessions are opened and closed by a service of their own"));
        }
    })
}

/// The keys of `range`, as every kind of request for a range has them.
pub(crate) fn encode_range(scope: Scope, range: Range) -> v1::RangeRequest {
    let Scope { tenant, collection } = scope;
    let Range { start, end, limit_items: limit } = range;
    v1::RangeRequest { tenant, collection, start, end, limit, level: 0, freshness: None, at: None }
}

pub(crate) fn decode_range(request: v1::RangeRequest) -> (Scope, Range) {
    let v1::RangeRequest { tenant, collection, start, end, limit, level: _, freshness: _, at: _ } = request;
    (Scope { tenant, collection }, Range { start, end, limit_items: limit })
}

/// Says in `message` how it is to be carried out, as clients do that call one by one.
#[cfg(test)]
pub(crate) fn set_options(message: &mut RequestMessage, options: &Options) {
    match options {
        Options::Write(write) => {
            let write = call::encode_write(write);
            match message {
                RequestMessage::Put(put) => put.options = write,
                RequestMessage::Delete(delete) => delete.options = write,
                RequestMessage::DeleteRange(delete) => delete.options = write,
                RequestMessage::Txn(txn) => txn.options = write,
                RequestMessage::Get(_)
                | RequestMessage::Range(_)
                | RequestMessage::OpenSession(_)
                | RequestMessage::CloseSession(_) => {}
            }
        }
        Options::Read(read) => {
            let (level, freshness) = call::encode_read(*read);
            match message {
                RequestMessage::Get(get) => (get.level, get.freshness) = (level, freshness),
                RequestMessage::Range(range) => (range.level, range.freshness) = (level, freshness),
                RequestMessage::Put(_)
                | RequestMessage::Delete(_)
                | RequestMessage::DeleteRange(_)
                | RequestMessage::Txn(_)
                | RequestMessage::OpenSession(_)
                | RequestMessage::CloseSession(_) => {}
            }
        }
    }
}

/// Takes out of `message` how it is to be carried out.
///
/// # Errors
/// When that makes no sense.
pub(crate) fn take_options(message: &mut RequestMessage) -> Result<Options, Rejected> {
    let write = match message {
        RequestMessage::Put(put) => put.options.take(),
        RequestMessage::Delete(delete) => delete.options.take(),
        RequestMessage::DeleteRange(delete) => delete.options.take(),
        RequestMessage::Txn(txn) => txn.options.take(),
        RequestMessage::Get(get) => {
            return call::decode_read(get.level, get.freshness.take()).map(Options::Read);
        }
        RequestMessage::Range(range) => {
            return call::decode_read(range.level, range.freshness.take()).map(Options::Read);
        }
        RequestMessage::OpenSession(_) | RequestMessage::CloseSession(_) => None,
    };
    call::decode_write(write).map(Options::Write)
}

/// 0 is for ever.
pub(super) fn encode_ttl(ttl: Option<Duration>) -> u64 {
    ttl.map_or(0, whole_ms)
}

pub(super) fn decode_ttl(ttl_ms: u64) -> Option<Duration> {
    (ttl_ms != 0).then(|| Duration::from_millis(ttl_ms))
}
