//! What one side says, the other understands.

use std::time::Duration;

use super::super::api::*;
use super::*;
use crate::call::{Header, Options};
use crate::reason::Reason;
use crate::types::{AckLevel, HistoryEpoch, LogId, ReadLevel, ReadOptions, SessionSlot, WriteOptions};

fn scope() -> Scope {
    Scope { tenant: "t".into(), collection: String::new() }
}

/// Every kind of request, with every field set.
fn requests() -> Vec<Request> {
    let range = || Range { start: "a".into(), end: "b".into(), limit_items: 7 };
    let ttl = Some(Duration::from_millis(1_500));
    let txn = Txn::new()
        .when(Compare::value("k").differs_from("v").in_collection("c"))
        .when(Compare::version("k").is(Comparison::Less, 3))
        .when(Compare::create_revision("k").is(Comparison::Greater, 4))
        .when(Compare::mod_revision("k").equals(5))
        .then(TxnOp::put_with_ttl("k", "v", Duration::from_secs(2)).in_collection("c"))
        .then(TxnOp::put("k", "v"))
        .then(TxnOp::get("k"))
        .otherwise(TxnOp::range(range()))
        .otherwise(TxnOp::delete("k"))
        .otherwise(TxnOp::delete_range(range().with_limit(0)));
    vec![
        Request::Put { scope: scope(), key: "k".into(), value: "v".into(), ttl },
        Request::Put { scope: scope(), key: "k".into(), value: "v".into(), ttl: None },
        Request::Get { scope: scope(), key: "k".into() },
        Request::Delete { scope: scope(), key: "k".into() },
        Request::DeleteRange { scope: scope(), range: range() },
        Request::Range { scope: scope(), range: range() },
        Request::Txn { scope: scope(), txn },
    ]
}

fn item() -> Item {
    let (key, value) = ("k".into(), "v".into());
    Item { key, value, create_revision: 1, mod_revision: 2, version: 3, expires_ms: 4, past_due: true }
}

#[test]
fn every_request_arrives_as_it_was_made() {
    let methods: std::collections::BTreeSet<_> = requests().iter().map(Request::method).collect();
    assert_eq!(methods.len(), Method::ALL.len());
    for request in requests() {
        assert_eq!(decode(encode(request.clone())), Ok(request));
    }
}

#[test]
fn how_a_request_is_carried_out_travels_in_its_message() {
    let history = HistoryEpoch(0xabc);
    let slot = Some(SessionSlot { session: 5, sequence: 7, first_unanswered: 6 });
    let write = WriteOptions { slot, ack: AckLevel::All, ack_timeout: Duration::from_secs(3), history };
    let read = ReadOptions { level: ReadLevel::Bounded { max_lag_ms: 9 }, after_index: 8, history };
    for request in requests() {
        let options = match request.method().is_write() {
            true => Options::Write(write),
            false => Options::Read(read),
        };
        let mut message = encode(request.clone());
        set_options(&mut message, &options);
        assert_eq!(take_options(&mut message), Ok(options), "{request:?}");
    }
}

#[test]
fn every_response_arrives_as_it_was_made() {
    let header = Header {
        node_id: 7,
        position: Some(LogId::new(3, 9)),
        history: HistoryEpoch(0xabc),
        ack: AckLevel::All,
        held_by: vec![1, 2],
        repeated_write: true,
    };
    let header = || header.clone();
    let next = Some("z".into());
    let results = vec![
        TxnResult::Get(Some(item())),
        TxnResult::Get(None),
        TxnResult::Range { items: vec![item()], next: next.clone() },
        TxnResult::Put { create_revision: 1, version: 2 },
        TxnResult::Delete { deleted: true },
        TxnResult::DeleteRange { deleted: 3 },
    ];
    let responses = [
        Response::Put(PutReply { header: header(), revision: 9, create_revision: 8, version: 2 }),
        Response::Get(GetReply { header: header(), item: Some(item()) }),
        Response::Get(GetReply { header: header(), item: None }),
        Response::Delete(DeleteReply { header: header(), deleted: true }),
        Response::DeleteRange(DeleteRangeReply { header: header(), deleted: 5, more: true }),
        Response::Range(RangeReply { header: header(), items: vec![item()], next }),
        Response::Range(RangeReply::default()),
        Response::Txn(TxnReply { header: header(), revision: 9, succeeded: true, results }),
    ];
    for response in responses {
        let mut message = encode_response(response.clone());
        let head = match &response {
            Response::Put(reply) => reply.header.clone(),
            Response::Get(reply) => reply.header.clone(),
            Response::Delete(reply) => reply.header.clone(),
            Response::DeleteRange(reply) => reply.header.clone(),
            Response::Range(reply) => reply.header.clone(),
            Response::Txn(reply) => reply.header.clone(),
        };
        assert_eq!(decode_response(head.clone(), message.clone()), Some(response));
        set_header(&mut message, head.clone().encode());
        assert_eq!(take_header(&mut message).map(|header| Header::decode(Some(header))), Some(head));
    }
    for kind in [EventKind::Put, EventKind::Delete, EventKind::Expire] {
        let event = WatchEvent { kind, revision: 4, item: item(), previous: None };
        assert_eq!(decode_event(encode_event(event.clone()), false), event);
        let before = [PreviousItem::Item(Item::default()), PreviousItem::Item(item()), PreviousItem::Unknown];
        for previous in before {
            let event = WatchEvent { previous: Some(previous), ..event.clone() };
            assert_eq!(decode_event(encode_event(event.clone()), true), event);
        }
        // A node that knows nothing of it tells of no previous item, which is not that there was none.
        let previous = decode_event(encode_event(event), true).previous;
        assert_eq!(previous, Some(PreviousItem::Unknown));
    }
    let first = Item { version: 1, ..item() };
    let previous = Some(PreviousItem::Absent);
    let created = WatchEvent { kind: EventKind::Put, revision: 4, item: first, previous };
    assert_eq!(decode_event(encode_event(created.clone()), true), created);
}

#[test]
fn what_a_message_cannot_mean_is_rejected() {
    let reason = |message| decode(message).map_err(|rejected| rejected.reason);
    let resumed = v1::RangeRequest { at: Some(v1::Position::default()), ..Default::default() };
    assert_eq!(reason(RequestMessage::Range(resumed)), Err(Reason::Invalid));
    let nothing = v1::TxnOperation::default();
    let txn = v1::TxnRequest { success: vec![nothing; 1_000], ..Default::default() };
    let rejected = decode(RequestMessage::Txn(txn)).unwrap_err();
    assert!(rejected.message.contains("1000 operations"), "{rejected:?}");
    let txn = v1::TxnRequest { compare: vec![v1::Compare::default(); 129], ..Default::default() };
    let rejected = decode(RequestMessage::Txn(txn)).unwrap_err();
    assert!(rejected.message.contains("129 comparisons, more than the limit of 128"), "{rejected:?}");
    let txn = v1::TxnRequest { failure: vec![v1::TxnOperation::default()], ..Default::default() };
    assert_eq!(reason(RequestMessage::Txn(txn)), Err(Reason::Invalid));
    let compare = v1::Compare { comparison: 99, ..Default::default() };
    let txn = v1::TxnRequest { compare: vec![compare], ..Default::default() };
    assert_eq!(reason(RequestMessage::Txn(txn)), Err(Reason::Invalid));
    let mut get = RequestMessage::Get(v1::GetRequest { level: 99, ..Default::default() });
    assert_eq!(take_options(&mut get).unwrap_err().reason, Reason::Invalid);
}
