//! The machine against a model, its limits, and the bytes it must go on understanding.

mod encodings;
mod limits;
mod model;
mod operations;
mod script;
mod size;
mod snapshots;

use super::*;
use crate::machine::{AppliedEvent, NewEvent};
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

/// All that a machine tells.
#[derive(Debug, Default)]
struct ToldEvents(Vec<AppliedEvent>);

impl EventSink for ToldEvents {
    fn event_of(&mut self, machine: u16, event: NewEvent<'_>) {
        self.0.push(AppliedEvent {
            machine,
            operation: event.operation,
            tenant: bytes(event.tenant),
            collection: bytes(event.collection),
            key: bytes(event.key),
            value: bytes(event.value),
            created: event.created,
            previous: event.previous,
            version: event.version,
            deadline_ms: event.deadline_ms,
        });
    }
}

/// Applies a command, and tells what that does.
fn apply_told(
    machine: &mut KvMachine,
    context: &ApplyContext,
    command: KvCommand,
) -> (KvReply, Vec<AppliedEvent>) {
    let mut told = ToldEvents::default();
    let reply = machine.apply_telling(context, command, &mut told);
    (reply, told.0)
}

/// The item that a key has after `event` at `revision`; `None` if it is gone.
fn item_after(event: &AppliedEvent, revision: u64) -> Option<Item> {
    matches!(event.operation, EventOperation::Insert | EventOperation::Update).then(|| Item {
        value: event.value.clone(),
        create_revision: event.created,
        mod_revision: revision,
        version: event.version,
        expires_ms: event.deadline_ms.unwrap_or(0),
    })
}

fn snapshot_of(view: &KvView) -> Vec<u8> {
    let mut bytes = Vec::new();
    KvMachine::write_snapshot(view, &mut bytes).unwrap();
    bytes
}

fn assert_consistent(machine: &KvMachine) {
    machine.state.items.assert_consistent();
    assert!(machine.state.changes.is_empty(), "something is left of a command");
}
