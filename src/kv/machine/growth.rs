//! What a command adds to the size of the state, so that the quota can be held.
//!
//! Deletes and expiry add nothing and always pass. A put adds its item, less the item that it takes the place of: a
//! key can be written again at a full quota as long as it becomes no larger. A transaction counts the branch that its
//! compares choose, in order; what it deletes key by key makes room for what it writes afterwards, what it deletes by
//! range does not, because that would have to be carried out to be known.

use std::collections::BTreeMap;

use super::command::{KvCommand, KvTxn, TxnOp};
use super::items::{Items, state_bytes};
use super::record::HEADER_BYTES;
use super::{key, txn};

/// What an item counts.
fn item_bytes(tenant: &str, collection: &str, key: &[u8], value: &[u8], ttl_ms: u64) -> u64 {
    let key_bytes = tenant.len() + collection.len() + key.len() + 2;
    state_bytes(key_bytes, HEADER_BYTES + value.len(), ttl_ms != 0)
}

/// Most bytes that `command` adds to any state.
pub(super) fn most_bytes(command: &KvCommand) -> u64 {
    match command {
        KvCommand::Put { tenant, collection, key, value } => item_bytes(tenant, collection, key, value, 0),
        KvCommand::PutExpiring { tenant, collection, key, value, ttl_ms } => {
            item_bytes(tenant, collection, key, value, *ttl_ms)
        }
        KvCommand::Txn(txn) => {
            let branch = |branch: &[TxnOp]| branch.iter().map(|op| put_bytes(&txn.tenant, op)).sum::<u64>();
            branch(&txn.then).max(branch(&txn.otherwise))
        }
        KvCommand::Delete { .. } | KvCommand::DeleteRange { .. } | KvCommand::Expire => 0,
    }
}

fn put_bytes(tenant: &str, operation: &TxnOp) -> u64 {
    match operation {
        TxnOp::Put { collection, key, value, ttl_ms } => item_bytes(tenant, collection, key, value, *ttl_ms),
        TxnOp::Get { .. } | TxnOp::Range { .. } | TxnOp::Delete { .. } | TxnOp::DeleteRange { .. } => 0,
    }
}

/// Bytes that `command` would add to `items`.
pub(super) fn bytes(items: &Items, command: &KvCommand) -> u64 {
    match command {
        KvCommand::Put { tenant, collection, key, .. }
        | KvCommand::PutExpiring { tenant, collection, key, .. } => {
            let replaced = items.bytes_of(&key::composite(tenant, collection, key));
            most_bytes(command).saturating_sub(replaced)
        }
        KvCommand::Txn(txn) => txn_bytes(items, txn),
        KvCommand::Delete { .. } | KvCommand::DeleteRange { .. } | KvCommand::Expire => 0,
    }
}

/// What `txn` would add.
fn txn_bytes(items: &Items, txn: &KvTxn) -> u64 {
    let operations = if txn::succeeds(items, txn) { &txn.then } else { &txn.otherwise };
    // What each key that is touched counts before and after.
    let mut touched = BTreeMap::new();
    let mut touch = |collection: &str, key: &[u8], after: u64| {
        let composite = key::composite(&txn.tenant, collection, key);
        let before = items.bytes_of(&composite);
        touched.entry(composite).or_insert((before, before)).1 = after;
    };
    for operation in operations {
        match operation {
            TxnOp::Put { collection, key, .. } => touch(collection, key, put_bytes(&txn.tenant, operation)),
            TxnOp::Delete { collection, key } => touch(collection, key, 0),
            TxnOp::Get { .. } | TxnOp::Range { .. } | TxnOp::DeleteRange { .. } => {}
        }
    }
    // What a range deletes is not known here, and only makes less of it.
    let before: u64 = touched.values().map(|(before, _)| before).sum();
    let after: u64 = touched.values().map(|(_, after)| after).sum();
    after.saturating_sub(before)
}
