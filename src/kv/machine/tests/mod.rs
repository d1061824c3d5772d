//! The machine against a model, its limits, and the bytes it must go on understanding.

mod encodings;
mod history;
mod limits;
mod model;
mod operations;
mod script;
mod size;
mod snapshots;

use super::*;
use crate::types::LogId;
use bytes::Bytes;

fn context(index: u64) -> ApplyContext {
    at(index, 0)
}

fn at(index: u64, elapsed_ms: u64) -> ApplyContext {
    // Nothing may depend on log time.
    ApplyContext { log_id: LogId::new(1, index), elapsed_ms, time_ms: u64::MAX }
}

fn bytes(bytes: impl AsRef<[u8]>) -> Bytes {
    Bytes::copy_from_slice(bytes.as_ref())
}

fn put(tenant: &str, collection: &str, key: &[u8], value: &[u8]) -> KvCommand {
    let (tenant, collection) = (tenant.to_owned(), collection.to_owned());
    KvCommand::Put { tenant, collection, key: bytes(key), value: bytes(value) }
}

fn put_expiring(collection: &str, key: &[u8], value: &[u8], ttl_ms: u64) -> KvCommand {
    let (tenant, collection) = ("t".to_owned(), collection.to_owned());
    KvCommand::PutExpiring { tenant, collection, key: bytes(key), value: bytes(value), ttl_ms }
}

fn delete(tenant: &str, collection: &str, key: &[u8]) -> KvCommand {
    KvCommand::Delete { tenant: tenant.to_owned(), collection: collection.to_owned(), key: bytes(key) }
}

fn delete_range(collection: &str, start: &[u8], end: &[u8], limit: u32) -> KvCommand {
    let (tenant, collection) = ("t".to_owned(), collection.to_owned());
    KvCommand::DeleteRange { tenant, collection, start: bytes(start), end: bytes(end), limit }
}

/// Operations on collection `c`.
fn op_get(key: &[u8]) -> TxnOp {
    TxnOp::Get { collection: "c".to_owned(), key: bytes(key) }
}

fn op_range(start: &[u8], end: &[u8], limit: u32) -> TxnOp {
    TxnOp::Range { collection: "c".to_owned(), start: bytes(start), end: bytes(end), limit }
}

fn op_put(key: &[u8], value: &[u8], ttl_ms: u64) -> TxnOp {
    TxnOp::Put { collection: "c".to_owned(), key: bytes(key), value: bytes(value), ttl_ms }
}

fn op_delete(key: &[u8]) -> TxnOp {
    TxnOp::Delete { collection: "c".to_owned(), key: bytes(key) }
}

fn op_delete_range(start: &[u8], end: &[u8]) -> TxnOp {
    TxnOp::DeleteRange { collection: "c".to_owned(), start: bytes(start), end: bytes(end) }
}

fn compare(key: &[u8], condition: Condition) -> Compare {
    Compare { collection: "c".to_owned(), key: bytes(key), condition }
}

/// A transaction of tenant `t`.
fn txn(compares: Vec<Compare>, then: Vec<TxnOp>, otherwise: Vec<TxnOp>) -> KvCommand {
    KvCommand::Txn(KvTxn { tenant: "t".to_owned(), compares, then, otherwise })
}

fn get(machine: &KvMachine, collection: &str, key: &[u8]) -> Option<Item> {
    let query = KvQuery::Get { tenant: "t".into(), collection: collection.into(), key: bytes(key) };
    match KvMachine::query(&machine.view(), query) {
        KvAnswer::Item(item) => item,
        other => panic!("{other:?}"),
    }
}

fn range_query(tenant: &str, collection: &str, start: &[u8], end: &[u8]) -> RangeQuery {
    RangeQuery {
        tenant: tenant.to_owned(),
        collection: collection.to_owned(),
        start: bytes(start),
        end: bytes(end),
        limit: usize::MAX,
        max_bytes: usize::MAX,
    }
}

fn range(view: &KvView, query: RangeQuery) -> RangeAnswer {
    match KvMachine::query(view, KvQuery::Range(query)) {
        KvAnswer::Range(answer) => answer,
        other => panic!("{other:?}"),
    }
}

/// All events of a collection of tenant `t`, in one answer.
fn events_query(collection: &str, from_revision: u64) -> EventsQuery {
    EventsQuery {
        tenant: "t".to_owned(),
        collection: collection.to_owned(),
        start: Bytes::new(),
        end: Bytes::new(),
        from_revision,
        limit: usize::MAX,
        max_bytes: usize::MAX,
        split: None,
    }
}

/// The answer, or the first revision known.
fn events(view: &KvView, query: EventsQuery) -> Result<EventsAnswer, u64> {
    match KvMachine::query(view, KvQuery::Events(query)) {
        KvAnswer::Events(answer) => Ok(answer),
        KvAnswer::Compacted { first_revision } => Err(first_revision),
        other => panic!("{other:?}"),
    }
}

fn snapshot_of(view: &KvView) -> Vec<u8> {
    let mut bytes = Vec::new();
    KvMachine::write_snapshot(view, &mut bytes).unwrap();
    bytes
}

fn assert_consistent(machine: &KvMachine) {
    machine.state.items.assert_consistent();
    machine.state.history.assert_consistent();
}
