//! Transactions between the protocol and the machine. Pure functions, like [`wire`](super::wire).

use crate::machine::kv::{Compare, Comparison, Condition, KvTxn, MAX_TXN_OPERATIONS, TxnOp, TxnResult};
use crate::proto::v1;
use crate::proto::v1::compare::{Comparison as WireComparison, Target};
use crate::proto::v1::txn_operation::Operation;
use crate::proto::v1::txn_result::Result as WireResult;

use super::failure;
use super::wire::{self, name};

/// The transaction that `request` asks for.
///
/// # Errors
/// The failure to answer instead, when a part is missing or of a kind that this node does not know.
pub(super) fn decode(request: v1::TxnRequest) -> Result<KvTxn, v1::Failure> {
    let v1::TxnRequest { tenant, collection, compare, success, failure, options: _ } = request;
    // Before anything is made of them: a small message can hold millions.
    let parts = compare.len().max(success.len()).max(failure.len());
    if parts > MAX_TXN_OPERATIONS {
        return Err(failure::invalid(&format!(
            "a transaction has {parts} operations, more than {MAX_TXN_OPERATIONS}"
        )));
    }
    let collection = name(collection);
    let within = |own: String| if own.is_empty() { collection.clone() } else { own };
    let operations = |operations: Vec<v1::TxnOperation>| -> Result<Vec<TxnOp>, v1::Failure> {
        operations.into_iter().map(|operation| decode_operation(operation, &within)).collect()
    };
    Ok(KvTxn {
        tenant: name(tenant),
        compares: compare
            .into_iter()
            .map(|compare| decode_compare(compare, &within))
            .collect::<Result<_, _>>()?,
        then: operations(success)?,
        otherwise: operations(failure)?,
    })
}

fn decode_compare(compare: v1::Compare, within: &impl Fn(String) -> String) -> Result<Compare, v1::Failure> {
    let v1::Compare { collection, key, comparison, target } = compare;
    let comparison = match WireComparison::try_from(comparison) {
        Ok(WireComparison::Equal) => Comparison::Equal,
        Ok(WireComparison::NotEqual) => Comparison::NotEqual,
        Ok(WireComparison::Less) => Comparison::Less,
        Ok(WireComparison::Greater) => Comparison::Greater,
        Err(_) => return Err(failure::invalid("this node does not know the comparison asked for")),
    };
    let condition = match target {
        Some(Target::Value(value)) => Condition::Value(comparison, value),
        Some(Target::Version(version)) => Condition::Version(comparison, version),
        Some(Target::CreateRevision(revision)) => Condition::CreateRevision(comparison, revision),
        Some(Target::ModRevision(revision)) => Condition::ModRevision(comparison, revision),
        None => return Err(failure::invalid("a comparison does not say what to compare with")),
    };
    Ok(Compare { collection: within(collection), key, condition })
}

fn decode_operation(
    operation: v1::TxnOperation,
    within: &impl Fn(String) -> String,
) -> Result<TxnOp, v1::Failure> {
    let collection = within(operation.collection);
    let unknown = || failure::invalid("an operation is empty, or of a kind that this node does not know");
    Ok(match operation.operation.ok_or_else(unknown)? {
        Operation::Get(v1::TxnGet { key }) => TxnOp::Get { collection, key },
        Operation::Range(v1::TxnRange { start, end, limit }) => {
            TxnOp::Range { collection, start, end, limit }
        }
        Operation::Put(v1::TxnPut { key, value, ttl_ms }) => TxnOp::Put { collection, key, value, ttl_ms },
        Operation::Delete(v1::TxnDelete { key }) => TxnOp::Delete { collection, key },
        Operation::DeleteRange(v1::TxnDeleteRange { start, end }) => {
            TxnOp::DeleteRange { collection, start, end }
        }
    })
}

/// The keys that the operations of each branch read one by one: their results repeat them.
pub(super) type AskedKeys = [Vec<bytes::Bytes>; 2];

/// See [`AskedKeys`]: of `success`, then of `failure`.
pub(super) fn asked_keys(txn: &KvTxn) -> AskedKeys {
    [&txn.then, &txn.otherwise].map(|branch| {
        let key = |operation: &TxnOp| match operation {
            TxnOp::Get { key, .. } => key.clone(),
            _ => bytes::Bytes::new(),
        };
        branch.iter().map(key).collect()
    })
}

/// The results of the branch that was carried out at `revision`.
pub(super) fn results(
    revision: u64,
    succeeded: bool,
    results: Vec<TxnResult>,
    asked: AskedKeys,
) -> Vec<v1::TxnResult> {
    let [then, otherwise] = asked;
    // Results that outlive their request, such as those of a repeated write, come without keys.
    let keys = if succeeded { then } else { otherwise };
    let keys = keys.into_iter().chain(std::iter::repeat(bytes::Bytes::new()));
    let encode = |(result, key): (TxnResult, bytes::Bytes)| v1::TxnResult {
        result: Some(match result {
            TxnResult::Item(found) => WireResult::Get(v1::GetResponse {
                header: None,
                item: found.map(|found| wire::item(key, found)),
            }),
            TxnResult::Range(range) => WireResult::Range(wire::range(None, range)),
            TxnResult::Put { create_revision, version } => {
                WireResult::Put(v1::PutResponse { header: None, revision, create_revision, version })
            }
            TxnResult::Deleted { existed } => {
                WireResult::Delete(v1::DeleteResponse { header: None, deleted: existed })
            }
            TxnResult::DeletedRange { deleted } => {
                WireResult::DeleteRange(v1::DeleteRangeResponse { header: None, deleted, more: false })
            }
        }),
    };
    results.into_iter().zip(keys).map(encode).collect()
}
