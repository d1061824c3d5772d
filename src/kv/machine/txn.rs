//! How a transaction is carried out.
//!
//! Most limits are checked before. How much is read and deleted is known only on the way: then the items are put
//! back as they were, which costs the nodes copied so far, and nothing is told.

use std::cmp::Ordering;

use super::command::{Compare, Comparison, Condition, KvTxn, TxnOp, TxnResult};
use super::items::{ITEM_OVERHEAD_BYTES, Items};
use super::key::{self, KeyRange};
use super::limits::{KvRejection, MAX_DELETED_KEYS, MAX_TXN_RESULT_BYTES};
use super::{Item, KvReply, KvView, RangeAnswer};
use crate::machine::ApplyContext;

/// Carries out `txn`, which has been checked, on `state`.
pub(super) fn apply(state: &mut KvView, context: &ApplyContext, txn: &KvTxn) -> KvReply {
    let succeeded = succeeds(&state.items, txn);
    let operations = if succeeded { &txn.then } else { &txn.otherwise };
    // While a copy is alive every node that changes is copied, so one is made only if it may be needed.
    let before = operations.iter().any(may_break_a_limit).then(|| state.items.clone());
    let mut run = TxnRun { state, context, tenant: &txn.tenant, result_bytes: 0, deleted: 0 };
    match operations.iter().map(|operation| run.operation(operation)).collect() {
        Ok(results) => KvReply::Txn { revision: context.log_id.index, succeeded, results },
        Err(rejection) => {
            state.items = before.expect("invariant: only operations that may break a limit do");
            state.changes.clear();
            KvReply::Rejected(rejection)
        }
    }
}

/// Whether all compares of `txn` hold.
pub(super) fn succeeds(items: &Items, txn: &KvTxn) -> bool {
    txn.compares.iter().all(|compare| holds(items, &txn.tenant, compare))
}

fn holds(items: &Items, tenant: &str, compare: &Compare) -> bool {
    let found = items.record(&key::composite(tenant, &compare.collection, &compare.key));
    let (comparison, ordering) = match &compare.condition {
        Condition::Value(comparison, operand) => {
            let Some(record) = found else { return false };
            (comparison, record.value().cmp(operand))
        }
        Condition::Version(comparison, operand) => {
            (comparison, found.map_or(0, |record| record.version()).cmp(operand))
        }
        Condition::CreateRevision(comparison, operand) => {
            (comparison, found.map_or(0, |record| record.create_revision()).cmp(operand))
        }
        Condition::ModRevision(comparison, operand) => {
            (comparison, found.map_or(0, |record| record.mod_revision()).cmp(operand))
        }
    };
    match comparison {
        Comparison::Equal => ordering == Ordering::Equal,
        Comparison::NotEqual => ordering != Ordering::Equal,
        Comparison::Less => ordering == Ordering::Less,
        Comparison::Greater => ordering == Ordering::Greater,
    }
}

/// Whether `operation` can be rejected while it is carried out. Single deletes alone cannot: a transaction has
/// fewer operations than it may delete keys.
fn may_break_a_limit(operation: &TxnOp) -> bool {
    match operation {
        TxnOp::Get { .. } | TxnOp::Range { .. } | TxnOp::DeleteRange { .. } => true,
        TxnOp::Put { .. } | TxnOp::Delete { .. } => false,
    }
}

/// A branch being carried out.
struct TxnRun<'a> {
    state: &'a mut KvView,
    context: &'a ApplyContext,
    tenant: &'a str,
    /// As counted for [`MAX_TXN_RESULT_BYTES`].
    result_bytes: usize,
    /// As counted for [`MAX_DELETED_KEYS`].
    deleted: usize,
}

impl TxnRun<'_> {
    fn operation(&mut self, operation: &TxnOp) -> Result<TxnResult, KvRejection> {
        match operation {
            TxnOp::Get { collection, key } => {
                let item = self.state.items.get(&key::composite(self.tenant, collection, key));
                self.count_read(item.iter().map(item_bytes).sum())?;
                Ok(TxnResult::Item(item))
            }
            TxnOp::Range { collection, start, end, limit } => {
                let range = KeyRange::new(self.tenant, collection, start, end);
                self.range(range, *limit).map(TxnResult::Range)
            }
            TxnOp::Put { collection, key, value, ttl_ms } => {
                let key = key::composite(self.tenant, collection, key);
                let record = self.state.put(self.context, key, value, *ttl_ms);
                let (create_revision, version) = (record.create_revision(), record.version());
                Ok(TxnResult::Put { create_revision, version })
            }
            TxnOp::Delete { collection, key } => {
                let key = key::composite(self.tenant, collection, key);
                let existed = self.state.delete(&key);
                self.count_deleted(usize::from(existed))?;
                Ok(TxnResult::Deleted { existed })
            }
            TxnOp::DeleteRange { collection, start, end } => {
                let range = KeyRange::new(self.tenant, collection, start, end);
                let left = MAX_DELETED_KEYS - self.deleted;
                let keys = range.map_or_else(Vec::new, |range| self.state.items.keys(&range, left + 1));
                self.count_deleted(keys.len())?;
                for key in &keys {
                    self.state.delete(key);
                }
                Ok(TxnResult::DeletedRange { deleted: keys.len() as u64 })
            }
        }
    }

    fn range(&mut self, range: Option<KeyRange>, limit: u32) -> Result<RangeAnswer, KvRejection> {
        let Some(range) = range else { return Ok(RangeAnswer::default()) };
        let limit = match limit {
            0 => usize::MAX,
            limit => limit as usize,
        };
        let answer = self.state.items.range(&range, limit, MAX_TXN_RESULT_BYTES - self.result_bytes);
        self.count_read(answer.items.iter().map(|(key, item)| key.len() + item_bytes(item)).sum())?;
        if answer.next.is_some() && answer.items.len() < limit {
            return Err(KvRejection::ResultsTooLong); // it was the bytes that ended it
        }
        Ok(answer)
    }

    fn count_read(&mut self, bytes: usize) -> Result<(), KvRejection> {
        self.result_bytes += bytes;
        if self.result_bytes > MAX_TXN_RESULT_BYTES { Err(KvRejection::ResultsTooLong) } else { Ok(()) }
    }

    fn count_deleted(&mut self, keys: usize) -> Result<(), KvRejection> {
        self.deleted += keys;
        if self.deleted > MAX_DELETED_KEYS { Err(KvRejection::TooManyDeleted) } else { Ok(()) }
    }
}

fn item_bytes(item: &Item) -> usize {
    item.value.len() + ITEM_OVERHEAD_BYTES
}
