//! Responses, and what streams bring.

use super::super::api::{
    DeleteRangeReply, DeleteReply, EventKind, GetReply, Item, PreviousItem, PutReply, RangeReply, Response,
    TxnReply, WatchEvent,
};
use super::{ResponseMessage, txn};
use crate::call::Header;
use crate::proto::v1;

/// `response` as a message, without what heads it.
pub(crate) fn encode_response(response: Response) -> ResponseMessage {
    let header = None;
    match response {
        Response::Put(PutReply { header: _, revision, create_revision, version }) => {
            ResponseMessage::Put(v1::PutResponse { header, revision, create_revision, version })
        }
        Response::Get(GetReply { header: _, item }) => {
            ResponseMessage::Get(v1::GetResponse { header, item: item.map(encode_item) })
        }
        Response::Delete(DeleteReply { header: _, deleted }) => {
            ResponseMessage::Delete(v1::DeleteResponse { header, deleted })
        }
        Response::DeleteRange(DeleteRangeReply { header: _, deleted, more }) => {
            ResponseMessage::DeleteRange(v1::DeleteRangeResponse { header, deleted, more })
        }
        Response::Range(range) => ResponseMessage::Range(encode_range_reply(range)),
        Response::Txn(TxnReply { header: _, revision, succeeded, results }) => {
            let results = results.into_iter().map(|result| txn::encode_result(revision, result)).collect();
            ResponseMessage::Txn(v1::TxnResponse { header, revision, succeeded, results })
        }
    }
}

/// The response in `message`, headed by `header`; `None` for what is no response to any request of this guest.
pub(crate) fn decode_response(header: Header, message: ResponseMessage) -> Option<Response> {
    Some(match message {
        ResponseMessage::Put(v1::PutResponse { header: _, revision, create_revision, version }) => {
            Response::Put(PutReply { header, revision, create_revision, version })
        }
        ResponseMessage::Get(v1::GetResponse { header: _, item }) => {
            Response::Get(GetReply { header, item: item.map(decode_item) })
        }
        ResponseMessage::Delete(v1::DeleteResponse { header: _, deleted }) => {
            Response::Delete(DeleteReply { header, deleted })
        }
        ResponseMessage::DeleteRange(v1::DeleteRangeResponse { header: _, deleted, more }) => {
            Response::DeleteRange(DeleteRangeReply { header, deleted, more })
        }
        ResponseMessage::Range(range) => Response::Range(decode_range_reply(header, range)),
        ResponseMessage::Txn(v1::TxnResponse { header: _, revision, succeeded, results }) => {
            let results = results.into_iter().map(txn::decode_result).collect::<Option<_>>()?;
            Response::Txn(TxnReply { header, revision, succeeded, results })
        }
        ResponseMessage::Failure(_) | ResponseMessage::OpenSession(_) | ResponseMessage::CloseSession(_) => {
            return None;
        }
    })
}

/// Heads `message`, where it is on its own.
pub(crate) fn set_header(message: &mut ResponseMessage, header: v1::Header) {
    if let Some(place) = header_of(message) {
        *place = Some(header);
    }
}

/// Takes out of `message` what it is headed by, as clients do that call one by one.
#[cfg(test)]
pub(crate) fn take_header(message: &mut ResponseMessage) -> Option<v1::Header> {
    header_of(message).and_then(Option::take)
}

fn header_of(message: &mut ResponseMessage) -> Option<&mut Option<v1::Header>> {
    Some(match message {
        ResponseMessage::Put(put) => &mut put.header,
        ResponseMessage::Get(get) => &mut get.header,
        ResponseMessage::Delete(delete) => &mut delete.header,
        ResponseMessage::DeleteRange(delete) => &mut delete.header,
        ResponseMessage::Range(range) => &mut range.header,
        ResponseMessage::Txn(txn) => &mut txn.header,
        ResponseMessage::OpenSession(opened) => &mut opened.header,
        ResponseMessage::CloseSession(closed) => &mut closed.header,
        ResponseMessage::Failure(_) => return None,
    })
}

/// A range as a message, without what heads it.
pub(crate) fn encode_range_reply(range: RangeReply) -> v1::RangeResponse {
    let RangeReply { header: _, items, next } = range;
    let items = items.into_iter().map(encode_item).collect();
    v1::RangeResponse { header: None, items, next: next.unwrap_or_default() }
}

pub(crate) fn decode_range_reply(header: Header, range: v1::RangeResponse) -> RangeReply {
    let v1::RangeResponse { header: _, items, next } = range;
    let items = items.into_iter().map(decode_item).collect();
    RangeReply { header, items, next: (!next.is_empty()).then_some(next) }
}

pub(super) fn encode_item(item: Item) -> v1::Item {
    let Item { key, value, create_revision, mod_revision, version, expires_ms, past_due } = item;
    v1::Item { key, value, create_revision, mod_revision, version, expires_ms, past_due }
}

pub(super) fn decode_item(item: v1::Item) -> Item {
    let v1::Item { key, value, create_revision, mod_revision, version, expires_ms, past_due } = item;
    Item { key, value, create_revision, mod_revision, version, expires_ms, past_due }
}

pub(crate) fn encode_event(event: WatchEvent) -> v1::Event {
    let WatchEvent { kind, revision, item, previous } = event;
    let kind = match kind {
        EventKind::Put => v1::event::Kind::Put,
        EventKind::Delete => v1::event::Kind::Delete,
        EventKind::Expire => v1::event::Kind::Expire,
    };
    let previous_unknown = previous == Some(PreviousItem::Unknown);
    let previous = match previous {
        Some(PreviousItem::Item(item)) => Some(encode_item(item)),
        Some(PreviousItem::Absent | PreviousItem::Unknown) | None => None,
    };
    v1::Event { kind: kind.into(), revision, item: Some(encode_item(item)), previous, previous_unknown }
}

/// The event in `event`, of a watch that asks for what keys held before if `with_previous`.
pub(crate) fn decode_event(event: v1::Event, with_previous: bool) -> WatchEvent {
    let kind = match event.kind() {
        v1::event::Kind::Put => EventKind::Put,
        v1::event::Kind::Delete => EventKind::Delete,
        v1::event::Kind::Expire => EventKind::Expire,
    };
    let v1::Event { revision, item, previous, previous_unknown, .. } = event;
    let item = decode_item(item.unwrap_or_default());
    let previous = with_previous.then(|| match previous {
        Some(previous) => PreviousItem::Item(decode_item(previous)),
        None if !previous_unknown && kind == EventKind::Put && item.version == 1 => PreviousItem::Absent,
        // A node of an older version says nothing of it.
        None => PreviousItem::Unknown,
    });
    WatchEvent { kind, revision, item, previous }
}
