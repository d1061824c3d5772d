//! What a request asks of the machine, and what the machine's answers are to those who asked. Defaults and
//! limits on the way in, keys that the machine does not repeat on the way out, and whether their time has passed.

use bytes::Bytes;

use super::api::{
    self, Act, CompareTarget, DeleteRangeReply, DeleteReply, EventKind, GetReply, Item, Method, PutReply,
    Range, RangeReply, Request, Response, Scope, Txn, TxnReply, WatchEvent,
};
use super::codec::RequestMessage;
use super::machine::{
    self, Compare, Condition, KvAnswer, KvCommand, KvQuery, KvReply, KvTxn, MAX_KEY_BYTES,
    MAX_TXN_RESULT_BYTES, MAX_VALUE_BYTES, RangeAnswer, RangeQuery, TxnOp, TxnResult,
};
use crate::call::{Header, Rejected, whole_ms};
use crate::door::{Call, DataRight, Touch, Touched};
use crate::machine::{AppliedEvent, EventOperation};
use crate::proto::v1::txn_operation::Operation;
use crate::proto::v1::{TxnOperation, TxnRequest};
use crate::runtime;
use crate::types::LogId;

/// Stands in for an empty tenant or collection.
const DEFAULT_NAME: &str = "default";

/// Most items of one range answer, whatever the request allows: the answer is put together in one go.
const MAX_RANGE_ITEMS: usize = 10_000;

/// Most bytes of keys and values in one range answer, each item counted with 64 bytes more: what surrounds them must fit
/// a message of 4 MiB, which is what gRPC clients accept unless they are told otherwise.
const MAX_RANGE_BYTES: usize = 4 * 1024 * 1024 - 64 * 1024;

/// What of a request is needed to answer it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    method: Method,
    keys: Keys,
}

/// The keys that were asked for one by one: their items repeat them.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Keys {
    None,
    One(Bytes),
    /// Of each branch of a transaction, by operation.
    Txn(Box<[Vec<Bytes>; 2]>),
}

impl Asked {
    /// Whether it was a transaction.
    pub(super) fn is_txn(&self) -> bool {
        self.method == Method::Txn
    }
}

/// The call that `request` is, within the limits.
///
/// # Errors
/// What the machine would reject: it need not travel through the log.
pub(super) fn call(request: Request) -> Result<(Call<KvCommand, KvQuery>, Asked), Rejected> {
    let method = request.method();
    let mut keys = Keys::None;
    let call = match request {
        Request::Put { scope, key, value, ttl } => {
            let (tenant, collection) = names(scope);
            Call::Write(match ttl {
                None => KvCommand::Put { tenant, collection, key, value },
                Some(ttl) => KvCommand::PutExpiring { tenant, collection, key, value, ttl_ms: whole_ms(ttl) },
            })
        }
        Request::Get { scope, key } => {
            let (tenant, collection) = names(scope);
            // As it came, it is a slice of a message that may be large, and the answer may wait for its client for long.
            let key = Bytes::copy_from_slice(&key);
            keys = Keys::One(key.clone());
            Call::Read(KvQuery::Get { tenant, collection, key })
        }
        Request::Delete { scope, key } => {
            let (tenant, collection) = names(scope);
            Call::Write(KvCommand::Delete { tenant, collection, key })
        }
        Request::DeleteRange { scope, range } => {
            let (tenant, collection) = names(scope);
            let Range { start, end, limit_items: limit } = range;
            Call::Write(KvCommand::DeleteRange { tenant, collection, start, end, limit })
        }
        Request::Range { scope, range: Range { start, end, limit_items } } => {
            let (start, end) = (Bytes::copy_from_slice(&start), Bytes::copy_from_slice(&end));
            Call::Read(KvQuery::Range(range_query(scope, Range { start, end, limit_items })))
        }
        Request::Txn { scope, txn } => {
            let txn = transaction(scope, txn);
            keys = Keys::Txn(Box::new(asked_keys(&txn)));
            Call::Write(KvCommand::Txn(txn))
        }
    };
    match &call {
        Call::Write(command) => command.check()?,
        Call::Read(query) => query.check()?,
    }
    Ok((call, Asked { method, keys }))
}

/// What `request` touches: each collection that it names, with what it does there.
pub(super) fn touches(request: &RequestMessage, touch: &mut Touch<'_>) {
    let mut one = |right, tenant: &str, collection: &str| {
        touch(right, Touched::Collection { tenant: or_default(tenant), collection: or_default(collection) });
    };
    match request {
        RequestMessage::Put(put) => one(DataRight::Write, &put.tenant, &put.collection),
        RequestMessage::Get(get) => one(DataRight::Read, &get.tenant, &get.collection),
        RequestMessage::Delete(delete) => one(DataRight::Write, &delete.tenant, &delete.collection),
        RequestMessage::DeleteRange(delete) => one(DataRight::Write, &delete.tenant, &delete.collection),
        RequestMessage::Range(range) => one(DataRight::Read, &range.tenant, &range.collection),
        RequestMessage::Txn(txn) => transaction_touches(txn, &mut one),
        // They are no calls of this guest.
        RequestMessage::OpenSession(_) | RequestMessage::CloseSession(_) => {}
    }
}

/// Each comparison and each operation of both branches. A transaction travels through the log whatever it does, so one that only reads
/// takes the right to write, too.
fn transaction_touches(txn: &TxnRequest, one: &mut impl FnMut(DataRight, &str, &str)) {
    let within = |own: &'_ str| if own.is_empty() { txn.collection.clone() } else { own.to_owned() };
    for compare in &txn.compare {
        one(DataRight::Read, &txn.tenant, &within(&compare.collection));
    }
    let mut writes = false;
    for operation in txn.success.iter().chain(&txn.failure) {
        let right = match operation.operation {
            Some(Operation::Get(_) | Operation::Range(_)) => DataRight::Read,
            Some(Operation::Put(_) | Operation::Delete(_) | Operation::DeleteRange(_)) | None => {
                DataRight::Write
            }
        };
        writes |= right == DataRight::Write;
        one(right, &txn.tenant, &within(&operation.collection));
    }
    if !writes {
        one(DataRight::Write, &txn.tenant, &txn.collection);
    }
}

fn or_default(name: &str) -> &str {
    if name.is_empty() { DEFAULT_NAME } else { name }
}

/// What a range of `scope` touches.
pub(super) fn range_touches(tenant: &str, collection: &str, touch: &mut Touch<'_>) {
    touch(
        DataRight::Read,
        Touched::Collection { tenant: or_default(tenant), collection: or_default(collection) },
    );
}

/// Tenant and collection, with the default where one is empty.
pub(super) fn names(scope: Scope) -> (String, String) {
    let name = |name: String| if name.is_empty() { DEFAULT_NAME.to_owned() } else { name };
    (name(scope.tenant), name(scope.collection))
}

/// What is asked for a range: as much as fits one answer.
pub(super) fn range_query(scope: Scope, range: Range) -> RangeQuery {
    let (tenant, collection) = names(scope);
    let Range { start, end, limit_items } = range;
    let limit = match usize::try_from(limit_items) {
        Ok(limit @ 1..=MAX_RANGE_ITEMS) => limit,
        _ => MAX_RANGE_ITEMS,
    };
    RangeQuery { tenant, collection, start, end, limit, max_bytes: MAX_RANGE_BYTES }
}

fn transaction(scope: Scope, txn: Txn) -> KvTxn {
    let (tenant, collection) = names(scope);
    let within = |own: String| if own.is_empty() { collection.clone() } else { own };
    let compare = |compare: api::Compare| {
        let api::Compare { collection, key, comparison, target } = compare;
        let comparison = match comparison {
            api::Comparison::Equal => machine::Comparison::Equal,
            api::Comparison::NotEqual => machine::Comparison::NotEqual,
            api::Comparison::Less => machine::Comparison::Less,
            api::Comparison::Greater => machine::Comparison::Greater,
        };
        let condition = match target {
            CompareTarget::Value(value) => Condition::Value(comparison, value),
            CompareTarget::Version(version) => Condition::Version(comparison, version),
            CompareTarget::CreateRevision(revision) => Condition::CreateRevision(comparison, revision),
            CompareTarget::ModRevision(revision) => Condition::ModRevision(comparison, revision),
        };
        Compare { collection: within(collection), key, condition }
    };
    let operation = |operation: api::TxnOp| {
        let collection = within(operation.collection);
        match operation.act {
            Act::Get(key) => TxnOp::Get { collection, key },
            Act::Range(Range { start, end, limit_items: limit }) => {
                TxnOp::Range { collection, start, end, limit }
            }
            Act::Put { key, value, ttl } => {
                TxnOp::Put { collection, key, value, ttl_ms: ttl.map_or(0, whole_ms) }
            }
            Act::Delete(key) => TxnOp::Delete { collection, key },
            Act::DeleteRange(Range { start, end, .. }) => TxnOp::DeleteRange { collection, start, end },
        }
    };
    let Txn { compares, then, otherwise } = txn;
    let compares = compares.into_iter().map(compare).collect();
    let (then, otherwise) =
        (then.into_iter().map(operation).collect(), otherwise.into_iter().map(operation).collect());
    KvTxn { tenant, compares, then, otherwise }
}

fn asked_keys(txn: &KvTxn) -> [Vec<Bytes>; 2] {
    [&txn.then, &txn.otherwise].map(|branch| {
        let key = |operation: &TxnOp| match operation {
            TxnOp::Get { key, .. } => Bytes::copy_from_slice(key),
            TxnOp::Range { .. } | TxnOp::Put { .. } | TxnOp::Delete { .. } | TxnOp::DeleteRange { .. } => {
                Bytes::new()
            }
        };
        branch.iter().map(key).collect()
    })
}

/// The most that the answer to a request may have, where that is much and the request cannot be made again.
pub(super) fn expected_bytes(request: &RequestMessage) -> usize {
    let RequestMessage::Txn(TxnRequest { success, failure, .. }) = request else { return 0 };
    let of = |operations: &[TxnOperation]| {
        let operation = |operation: &TxnOperation| match operation.operation {
            Some(Operation::Get(_)) => MAX_VALUE_BYTES + MAX_KEY_BYTES,
            Some(Operation::Range(_)) => MAX_TXN_RESULT_BYTES,
            Some(Operation::Put(_) | Operation::Delete(_) | Operation::DeleteRange(_)) | None => 0,
        };
        operations.iter().map(operation).fold(0, usize::saturating_add)
    };
    of(success).max(of(failure)).min(MAX_TXN_RESULT_BYTES)
}

/// The response to a write that stands at `at`; the machine has not answered yet where that is what was asked for.
///
/// # Errors
/// What the machine has rejected.
pub(super) fn written(asked: Asked, at: LogId, reply: Option<KvReply>) -> Result<Response, Rejected> {
    let Some(reply) = reply else { return Ok(unapplied(asked.method, at.index)) };
    let header = Header::default();
    Ok(match (asked.method, reply) {
        (Method::Put, KvReply::Put { revision, create_revision, version }) => {
            Response::Put(PutReply { header, revision, create_revision, version })
        }
        (Method::Delete, KvReply::Deleted { existed, revision: _ }) => {
            Response::Delete(DeleteReply { header, deleted: existed })
        }
        (Method::DeleteRange, KvReply::DeletedRange { deleted, more, revision: _ }) => {
            Response::DeleteRange(DeleteRangeReply { header, deleted, more })
        }
        (Method::Txn, KvReply::Txn { revision, succeeded, results }) => {
            let results = self::results(succeeded, results, asked.keys);
            Response::Txn(TxnReply { header, revision, succeeded, results })
        }
        (_, KvReply::Rejected(rejection)) => return Err(rejection.into()),
        (_, KvReply::Expired { .. }) => return Err(Rejected::unexpected(true)),
        // The machine answers in kind: what it says of another kind, it has said to an earlier write of the same sequence.
        (
            _,
            KvReply::Put { .. }
            | KvReply::Deleted { .. }
            | KvReply::DeletedRange { .. }
            | KvReply::Txn { .. },
        ) => return Err(Rejected::other_request()),
    })
}

/// The response to a write that is acknowledged before it is applied: where it stands, and nothing else.
fn unapplied(method: Method, revision: u64) -> Response {
    match method {
        Method::Delete => Response::Delete(DeleteReply::default()),
        Method::DeleteRange => Response::DeleteRange(DeleteRangeReply::default()),
        Method::Txn => Response::Txn(TxnReply { revision, ..Default::default() }),
        Method::Put | Method::Get | Method::Range => {
            Response::Put(PutReply { revision, ..Default::default() })
        }
    }
}

/// The results of the branch that was carried out.
fn results(succeeded: bool, results: Vec<TxnResult>, keys: Keys) -> Vec<api::TxnResult> {
    let [then, otherwise] = match keys {
        Keys::Txn(keys) => *keys,
        // Results that outlive their request, such as those of a repeated write, come without keys.
        Keys::None | Keys::One(_) => [Vec::new(), Vec::new()],
    };
    let keys = if succeeded { then } else { otherwise };
    let keys = keys.into_iter().chain(std::iter::repeat(Bytes::new()));
    let result = |(result, key): (TxnResult, Bytes)| match result {
        TxnResult::Item(found) => api::TxnResult::Get(found.map(|found| item(key, found))),
        TxnResult::Range(RangeAnswer { items, next }) => {
            api::TxnResult::Range { items: self::items(items), next }
        }
        TxnResult::Put { create_revision, version } => api::TxnResult::Put { create_revision, version },
        TxnResult::Deleted { existed } => api::TxnResult::Delete { deleted: existed },
        TxnResult::DeletedRange { deleted } => api::TxnResult::DeleteRange { deleted },
    };
    results.into_iter().zip(keys).map(result).collect()
}

/// The response to a read.
///
/// # Errors
/// What the machine has rejected.
pub(super) fn answered(asked: Asked, answer: KvAnswer) -> Result<Response, Rejected> {
    match (answer, asked.keys) {
        (KvAnswer::Item(found), Keys::One(key)) => {
            let item = found.map(|found| item(key, found));
            Ok(Response::Get(GetReply { header: Header::default(), item }))
        }
        (KvAnswer::Range(answer), _) => Ok(Response::Range(range(answer))),
        (KvAnswer::Rejected(rejection), _) => Err(rejection.into()),
        (KvAnswer::Item(_), _) => Err(Rejected::unexpected(false)),
    }
}

/// The items of a range.
pub(super) fn range(answer: RangeAnswer) -> RangeReply {
    RangeReply { header: Header::default(), items: items(answer.items), next: answer.next }
}

fn items(found: Vec<(Bytes, machine::Item)>) -> Vec<Item> {
    found.into_iter().map(|(key, found)| item(key, found)).collect()
}

fn item(key: Bytes, item: machine::Item) -> Item {
    let machine::Item { value, create_revision, mod_revision, version, expires_ms } = item;
    let past_due = is_past_due(expires_ms);
    Item { key, value, create_revision, mod_revision, version, expires_ms, past_due }
}

/// Whether a key that expires at this time of day, if it ever does, would be gone if the clock of this node were asked.
fn is_past_due(expires_ms: u64) -> bool {
    expires_ms != 0 && expires_ms <= runtime::unix_time_ms()
}

/// A change at `revision`, as those who watch are told it, without what its key held before; `time_at` makes times of day of elapsed
/// time.
pub(super) fn event(revision: u64, event: AppliedEvent, time_at: impl Fn(u64) -> u64) -> WatchEvent {
    let (kind, item) = match event.operation {
        EventOperation::Insert | EventOperation::Update => {
            (EventKind::Put, written_item(revision, event, time_at))
        }
        EventOperation::Delete => (EventKind::Delete, Item { key: event.key, ..Item::default() }),
        EventOperation::Expire => (EventKind::Expire, Item { key: event.key, ..Item::default() }),
    };
    WatchEvent { kind, revision, item, previous: None }
}

/// The item that `event` has written at `mod_revision`.
pub(super) fn written_item(mod_revision: u64, event: AppliedEvent, time_at: impl Fn(u64) -> u64) -> Item {
    let AppliedEvent { key, value, created: create_revision, version, deadline_ms, .. } = event;
    let expires_ms = deadline_ms.map_or(0, time_at);
    let past_due = is_past_due(expires_ms);
    Item { key, value, create_revision, mod_revision, version, expires_ms, past_due }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::kv::api::WriteOptions;
    use crate::reason::Reason;

    fn default_scope() -> Scope {
        Scope::default()
    }

    #[test]
    fn empty_names_mean_default() {
        let scope = Scope { collection: "c".into(), ..default_scope() };
        let expected =
            KvCommand::Delete { tenant: "default".into(), collection: "c".into(), key: "k".into() };
        let (call, asked) = call(Request::Delete { scope, key: "k".into() }).unwrap();
        assert_eq!(call, Call::Write(expected));
        assert_eq!(asked, Asked { method: Method::Delete, keys: Keys::None });
    }

    #[test]
    fn limits_are_checked_at_the_door() {
        let put = |key: &'static [u8], value: usize, ttl| {
            let options = WriteOptions { ttl, ..WriteOptions::default() };
            let request = Request::put(default_scope(), key, vec![0; value], &options);
            call(request).map_err(|rejected| rejected.reason)
        };
        assert!(put(b"k", 1024 * 1024, None).is_ok());
        assert!(put(b"k", 0, Some(Duration::from_nanos(1))).is_ok());
        assert_eq!(put(b"k", 1024 * 1024 + 1, None).unwrap_err(), Reason::TooLarge);
        assert_eq!(put(b"", 0, None).unwrap_err(), Reason::Invalid);
    }

    #[test]
    fn a_range_is_bounded_by_the_server() {
        for (asked, expected) in [(0, MAX_RANGE_ITEMS), (7, 7), (u32::MAX, MAX_RANGE_ITEMS)] {
            let range = Range::all().with_limit(asked);
            let Ok((Call::Read(KvQuery::Range(query)), _)) =
                call(Request::Range { scope: default_scope(), range })
            else {
                panic!("not a range")
            };
            assert_eq!((query.limit, query.max_bytes), (expected, MAX_RANGE_BYTES));
        }
    }

    #[test]
    fn operations_without_a_collection_are_in_the_transactions() {
        let txn = Txn::new()
            .when(api::Compare::missing("k"))
            .then(api::TxnOp::put("k", "v").in_collection("own"))
            .otherwise(api::TxnOp::get("k"));
        let scope = Scope { tenant: "t".into(), collection: "c".into() };
        let (Call::Write(KvCommand::Txn(txn)), asked) = call(Request::Txn { scope, txn }).unwrap() else {
            panic!("no transaction")
        };
        assert_eq!(txn.compares[0].collection, "c");
        assert!(matches!(&txn.then[0], TxnOp::Put { collection, ttl_ms: 0, .. } if collection == "own"));
        assert!(matches!(&txn.otherwise[0], TxnOp::Get { collection, .. } if collection == "c"));
        let found = machine::Item {
            value: "v".into(),
            create_revision: 1,
            mod_revision: 1,
            version: 1,
            expires_ms: 0,
        };
        let reply =
            KvReply::Txn { revision: 9, succeeded: false, results: vec![TxnResult::Item(Some(found))] };
        let Ok(Response::Txn(reply)) = written(asked, LogId::new(3, 9), Some(reply)) else {
            panic!("no answer to a transaction")
        };
        assert!(
            matches!(&reply.results[0], api::TxnResult::Get(Some(item)) if item.key == "k" && item.value == "v")
        );
    }

    /// A session answers a sequence as it did the first time, whatever it comes with.
    #[test]
    fn a_sequence_that_was_another_requests_is_the_callers_mistake() {
        let requests = [
            Request::put(default_scope(), "k", "v", &WriteOptions::default()),
            Request::Delete { scope: default_scope(), key: "k".into() },
            Request::DeleteRange { scope: default_scope(), range: Range::all() },
            Request::Txn { scope: default_scope(), txn: Txn::new().then(api::TxnOp::get("k")) },
        ];
        let replies = [
            KvReply::Put { revision: 1, create_revision: 1, version: 1 },
            KvReply::Deleted { existed: true, revision: 1 },
            KvReply::DeletedRange { deleted: 1, more: false, revision: 1 },
            KvReply::Txn { revision: 1, succeeded: true, results: Vec::new() },
        ];
        for (asked_at, request) in requests.iter().enumerate() {
            for (replied_at, reply) in replies.iter().enumerate() {
                let (_, asked) = call(request.clone()).unwrap();
                match written(asked, LogId::new(3, 9), Some(reply.clone())) {
                    Ok(_) => assert_eq!(asked_at, replied_at),
                    Err(refused) => {
                        assert_ne!(asked_at, replied_at);
                        assert_eq!((refused.reason, refused.maybe_applied), (Reason::Invalid, false));
                        assert!(
                            refused.message.contains("that earlier one was applied"),
                            "{}",
                            refused.message
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_write_that_is_not_applied_yet_is_answered_with_where_it_stands() {
        let (_, asked) = call(Request::Delete { scope: default_scope(), key: "k".into() }).unwrap();
        let expected = Response::Delete(DeleteReply::default());
        assert_eq!(written(asked, LogId::new(3, 9), None), Ok(expected));
        let (_, asked) = call(Request::put(default_scope(), "k", "v", &WriteOptions::default())).unwrap();
        let expected = Response::Put(PutReply { revision: 9, ..Default::default() });
        assert_eq!(written(asked, LogId::new(3, 9), None), Ok(expected));
    }
}
