//! Transactions.

use super::super::api::{Act, Compare, CompareTarget, Comparison, Range, Scope, Txn, TxnOp, TxnResult};
use super::super::machine::{KvRejection, MAX_TXN_COMPARES, MAX_TXN_OPERATIONS};
use super::request::{decode_ttl, encode_ttl};
use super::response::{decode_item, encode_item};
use crate::call::Rejected;
use crate::proto::v1;
use crate::proto::v1::compare::{Comparison as WireComparison, Target as WireTarget};
use crate::proto::v1::txn_operation::Operation;
use crate::proto::v1::txn_result::Result as WireResult;

pub(super) fn encode(scope: Scope, txn: Txn) -> v1::TxnRequest {
    let (Scope { tenant, collection }, Txn { compares, then, otherwise }) = (scope, txn);
    let list = |ops: Vec<TxnOp>| ops.into_iter().map(encode_operation).collect();
    v1::TxnRequest {
        tenant,
        collection,
        compare: compares.into_iter().map(encode_compare).collect(),
        success: list(then),
        failure: list(otherwise),
        options: None,
    }
}

/// # Errors
/// When a part is missing or of a kind that this version does not know.
pub(super) fn decode(request: v1::TxnRequest) -> Result<(Scope, Txn), Rejected> {
    let v1::TxnRequest { tenant, collection, compare, success, failure, options: _ } = request;
    // Before anything is made of them: a small message can hold millions.
    if compare.len() > MAX_TXN_COMPARES {
        return Err(KvRejection::TooManyCompares { compares: compare.len() as u64 }.into());
    }
    let operations = success.len().max(failure.len());
    if operations > MAX_TXN_OPERATIONS {
        return Err(KvRejection::TooManyOperations { operations: operations as u64 }.into());
    }
    let list = |ops: Vec<v1::TxnOperation>| -> Result<Vec<TxnOp>, Rejected> {
        ops.into_iter().map(decode_operation).collect()
    };
    let txn = Txn {
        compares: compare.into_iter().map(decode_compare).collect::<Result<_, _>>()?,
        then: list(success)?,
        otherwise: list(failure)?,
    };
    Ok((Scope { tenant, collection }, txn))
}

fn encode_compare(compare: Compare) -> v1::Compare {
    let Compare { collection, key, comparison, target } = compare;
    let comparison = match comparison {
        Comparison::Equal => WireComparison::Equal,
        Comparison::NotEqual => WireComparison::NotEqual,
        Comparison::Less => WireComparison::Less,
        Comparison::Greater => WireComparison::Greater,
    };
    let target = Some(match target {
        CompareTarget::Value(value) => WireTarget::Value(value),
        CompareTarget::Version(version) => WireTarget::Version(version),
        CompareTarget::CreateRevision(revision) => WireTarget::CreateRevision(revision),
        CompareTarget::ModRevision(revision) => WireTarget::ModRevision(revision),
    });
    v1::Compare { collection, key, comparison: comparison.into(), target }
}

fn decode_compare(compare: v1::Compare) -> Result<Compare, Rejected> {
    let v1::Compare { collection, key, comparison, target } = compare;
    let comparison = match WireComparison::try_from(comparison) {
        Ok(WireComparison::Equal) => Comparison::Equal,
        Ok(WireComparison::NotEqual) => Comparison::NotEqual,
        Ok(WireComparison::Less) => Comparison::Less,
        Ok(WireComparison::Greater) => Comparison::Greater,
        Err(_) => return Err(Rejected::invalid("this node does not know the comparison asked for")),
    };
    let target = match target {
        Some(WireTarget::Value(value)) => CompareTarget::Value(value),
        Some(WireTarget::Version(version)) => CompareTarget::Version(version),
        Some(WireTarget::CreateRevision(revision)) => CompareTarget::CreateRevision(revision),
        Some(WireTarget::ModRevision(revision)) => CompareTarget::ModRevision(revision),
        None => return Err(Rejected::invalid("a comparison does not say what to compare with")),
    };
    Ok(Compare { collection, key, comparison, target })
}

fn encode_operation(operation: TxnOp) -> v1::TxnOperation {
    let TxnOp { collection, act } = operation;
    let operation = Some(match act {
        Act::Get(key) => Operation::Get(v1::TxnGet { key }),
        Act::Range(Range { start, end, limit_items: limit }) => {
            Operation::Range(v1::TxnRange { start, end, limit })
        }
        Act::Put { key, value, ttl } => Operation::Put(v1::TxnPut { key, value, ttl_ms: encode_ttl(ttl) }),
        Act::Delete(key) => Operation::Delete(v1::TxnDelete { key }),
        Act::DeleteRange(Range { start, end, .. }) => {
            Operation::DeleteRange(v1::TxnDeleteRange { start, end })
        }
    });
    v1::TxnOperation { collection, operation }
}

fn decode_operation(operation: v1::TxnOperation) -> Result<TxnOp, Rejected> {
    let v1::TxnOperation { collection, operation } = operation;
    let unknown = || Rejected::invalid("an operation is empty, or of a kind that this node does not know");
    let act = match operation.ok_or_else(unknown)? {
        Operation::Get(v1::TxnGet { key }) => Act::Get(key),
        Operation::Range(v1::TxnRange { start, end, limit }) => {
            Act::Range(Range { start, end, limit_items: limit })
        }
        Operation::Put(v1::TxnPut { key, value, ttl_ms }) => Act::Put { key, value, ttl: decode_ttl(ttl_ms) },
        Operation::Delete(v1::TxnDelete { key }) => Act::Delete(key),
        Operation::DeleteRange(v1::TxnDeleteRange { start, end }) => {
            Act::DeleteRange(Range { start, end, limit_items: 0 })
        }
    };
    Ok(TxnOp { collection, act })
}

/// What came of one operation of a transaction at `revision`.
pub(super) fn encode_result(revision: u64, result: TxnResult) -> v1::TxnResult {
    let header = None;
    let result = Some(match result {
        TxnResult::Get(item) => WireResult::Get(v1::GetResponse { header, item: item.map(encode_item) }),
        TxnResult::Range { items, next } => WireResult::Range(v1::RangeResponse {
            header,
            items: items.into_iter().map(encode_item).collect(),
            next: next.unwrap_or_default(),
        }),
        TxnResult::Put { create_revision, version } => {
            WireResult::Put(v1::PutResponse { header, revision, create_revision, version })
        }
        TxnResult::Delete { deleted } => WireResult::Delete(v1::DeleteResponse { header, deleted }),
        TxnResult::DeleteRange { deleted } => {
            WireResult::DeleteRange(v1::DeleteRangeResponse { header, deleted, more: false })
        }
    });
    v1::TxnResult { result }
}

/// `None` for a kind that this version does not know.
pub(super) fn decode_result(result: v1::TxnResult) -> Option<TxnResult> {
    Some(match result.result? {
        WireResult::Get(get) => TxnResult::Get(get.item.map(decode_item)),
        WireResult::Range(range) => TxnResult::Range {
            items: range.items.into_iter().map(decode_item).collect(),
            next: (!range.next.is_empty()).then_some(range.next),
        },
        WireResult::Put(put) => TxnResult::Put { create_revision: put.create_revision, version: put.version },
        WireResult::Delete(delete) => TxnResult::Delete { deleted: delete.deleted },
        WireResult::DeleteRange(delete) => TxnResult::DeleteRange { deleted: delete.deleted },
    })
}
