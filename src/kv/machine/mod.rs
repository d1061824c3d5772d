//! The key-value machine: the state that `quorate serve` replicates.
//!
//! A key lives in a collection of a tenant. It maps to an [`Item`]: a value, the revision that created
//! it, the revision that last wrote it, how often it was written since, and when it is due. The revision of a
//! write is the index of its log entry, so every revision names one operation, and revisions have gaps.
//! [`command`] says what changes items, [`query`] what can be asked.
//!
//! # Shape
//!
//! All items are in one persistent B-tree ([`items`]), ordered by the composite key `tenant NUL collection NUL key`
//! ([`key`]); names contain no NUL, so a collection is one contiguous range. A view is a clone of the
//! tree's root: reads and snapshots go on undisturbed while commands are applied, and the nodes that
//! an apply touches are copied once per view. A slot of the tree is the [key](composite), if it is short, and a
//! pointer to shared bytes (the [`record`]): this copy is 768 bytes and some reference counts, and ten million small items
//! cost some 140 bytes each beyond their keys and values.
//!
//! Beside the items there is a second tree with the deadlines of those that expire. It is persistent too, and part of the view.
//!
//! # What it tells
//!
//! Every change of an item is told to whoever follows ([`StateMachine::apply_telling`]), in the order they are made: the machine itself
//! keeps none of them. A command that is rejected tells nothing.
//!
//! # Time to live
//!
//! A write may give its key a deadline in elapsed time, which no wall clock enters. A key that is due is still there: it is read, compared
//! and overwritten like any other, until [`KvCommand::Expire`] removes it, so every node removes the same keys at the
//! same log id. [`next_wake_ms`](StateMachine::next_wake_ms) says when the leader should propose that.
//!
//! # Promises
//!
//! - *Totality*: every command that can be decoded is answered; what breaks a limit ([`limits`]) is answered with
//!   [`KvReply::Rejected`] and changes nothing.
//! - *Atomicity*: a [transaction](KvTxn) happens at one revision or not at all, also in what is told.
//! - *State hash*: the wrapping sum of one hash per item, kept up to date by every write. It does not
//!   depend on the order of writes nor on keys that are gone, and costs nothing to read.
//!
//! # Size
//!
//! Every item counts its composite key, its record (value and 32 bytes) and 128 bytes more, and another 64 if it is due
//! some time: what it takes in memory. The sum is kept up to date by every write, and is what the cluster's quota is
//! compared with ([`growth`] says what a command adds). What is deleted or expires counts no more.
//!
//! # What it does not do
//!
//! It keeps no older versions of a key to be read, resolves no defaults for empty names (the server does), and
//! does not look at values beyond comparing them.

mod changes;
mod command;
mod composite;
mod growth;
mod items;
mod key;
mod limits;
mod query;
mod record;
mod snapshot;
#[cfg(test)]
mod tests;
mod txn;

use std::io::{self, Read, Write};

pub use command::{Compare, Comparison, Condition, KvCommand, KvReply, KvTxn, TxnOp, TxnResult};
pub use limits::{
    KvRejection, MAX_DELETED_KEYS, MAX_EXPIRED_KEYS, MAX_KEY_BYTES, MAX_NAME_BYTES, MAX_TXN_BYTES,
    MAX_TXN_COMPARES, MAX_TXN_OPERATIONS, MAX_TXN_RESULT_BYTES, MAX_VALUE_BYTES,
};
pub use query::{Item, KvAnswer, KvQuery, RangeAnswer, RangeQuery};

use crate::machine::{AppliedEvent, ApplyContext, EventOperation, EventSink, StateMachine};
use changes::MadeChange;
use composite::CompositeKey;
use items::{Items, WrittenItem};
use key::KeyRange;
use record::ItemRecord;

/// The key-value machine. See the [module](self).
#[derive(Debug, Clone, Default)]
pub struct KvMachine {
    state: KvView,
}

/// The state of a [`KvMachine`] at one point in time. Cloning it costs a few reference counts.
#[derive(Debug, Clone, Default)]
pub struct KvView {
    items: Items,
    /// One above the revision of the last command applied; 0 if there is none or it is not known. The snapshot has it.
    next_revision: u64,
    /// What the command at hand has changed; empty between two commands.
    changes: Vec<MadeChange>,
}

impl KvView {
    /// How many keys there are, over all tenants and collections.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is no key at all.
    pub fn is_empty(&self) -> bool {
        self.items.len() == 0
    }

    /// Bytes that all items take, as the quota counts them.
    pub fn state_bytes(&self) -> u64 {
        self.items.bytes()
    }

    /// Carries out `command`, which has been checked.
    fn apply(&mut self, context: &ApplyContext, command: KvCommand) -> KvReply {
        let revision = context.log_id.index;
        let (tenant, collection, key, value, ttl_ms) = match command {
            KvCommand::Put { tenant, collection, key, value } => (tenant, collection, key, value, 0),
            KvCommand::PutExpiring { tenant, collection, key, value, ttl_ms } => {
                (tenant, collection, key, value, ttl_ms)
            }
            KvCommand::Delete { tenant, collection, key } => {
                let existed = self.delete(&key::composite(&tenant, &collection, &key));
                return KvReply::Deleted { revision, existed };
            }
            KvCommand::DeleteRange { tenant, collection, start, end, limit } => {
                let range = KeyRange::new(&tenant, &collection, &start, &end);
                return self.delete_range(context, range.as_ref(), limit);
            }
            KvCommand::Txn(txn) => return txn::apply(self, context, &txn),
            KvCommand::Expire => return self.expire(context),
        };
        let record = self.put(context, key::composite(&tenant, &collection, &key), &value, ttl_ms);
        let (create_revision, version) = (record.create_revision(), record.version());
        KvReply::Put { revision, create_revision, version }
    }

    /// Writes a key, due after `ttl_ms` unless that is 0.
    fn put(&mut self, context: &ApplyContext, key: CompositeKey, value: &[u8], ttl_ms: u64) -> ItemRecord {
        let expires_ms = if ttl_ms == 0 { 0 } else { context.elapsed_ms.saturating_add(ttl_ms) };
        let written = WrittenItem { revision: context.log_id.index, expires_ms };
        let (record, previous) = self.items.put(&key, value, written);
        self.changes.push(MadeChange::put(key, record.clone(), previous));
        record
    }

    /// Removes a key, and tells whether it existed.
    fn delete(&mut self, key: &[u8]) -> bool {
        let Some((key, record)) = self.items.remove(key) else { return false };
        self.changes.push(MadeChange::removed(EventOperation::Delete, key, record));
        true
    }

    /// Removes the first keys of `range`.
    fn delete_range(&mut self, context: &ApplyContext, range: Option<&KeyRange>, limit: u32) -> KvReply {
        let limit = match limit as usize {
            limit @ 1..=MAX_DELETED_KEYS => limit,
            _ => MAX_DELETED_KEYS,
        };
        let mut keys = range.map_or_else(Vec::new, |range| self.items.keys(range, limit + 1));
        let more = keys.len() > limit;
        keys.truncate(limit);
        for key in &keys {
            self.delete(key);
        }
        KvReply::DeletedRange { revision: context.log_id.index, deleted: keys.len() as u64, more }
    }

    /// Removes the keys that are due, the earliest first.
    fn expire(&mut self, context: &ApplyContext) -> KvReply {
        let mut removed = 0;
        while removed < MAX_EXPIRED_KEYS {
            let due = self.items.first_deadline().filter(|(expires_ms, _)| *expires_ms <= context.elapsed_ms);
            let Some((_, key)) = due.cloned() else { break };
            let (key, record) = self.items.remove(&key).expect("invariant: what has a deadline exists");
            self.changes.push(MadeChange::removed(EventOperation::Expire, key, record));
            removed += 1;
        }
        KvReply::Expired { revision: context.log_id.index, removed: removed as u64 }
    }

    fn range(&self, query: &RangeQuery) -> RangeAnswer {
        let RangeQuery { tenant, collection, start, end, limit, max_bytes } = query;
        let range = KeyRange::new(tenant, collection, start, end);
        range.map_or_else(RangeAnswer::default, |range| self.items.range(&range, *limit, *max_bytes))
    }
}

impl StateMachine for KvMachine {
    type Command = KvCommand;
    type Reply = KvReply;
    type Query = KvQuery;
    type Answer = KvAnswer;
    type View = KvView;

    const COMMANDS_ROUND_TRIP: bool = true;

    fn is_command(_: u32, encoded: &[u8]) -> bool {
        command::is_put(encoded)
    }

    const TELLS_EVENTS: bool = true;

    fn apply(&mut self, context: &ApplyContext, command: KvCommand) -> KvReply {
        self.apply_telling(context, command, &mut ())
    }

    fn apply_telling(
        &mut self,
        context: &ApplyContext,
        command: KvCommand,
        events: &mut dyn EventSink,
    ) -> KvReply {
        let state = &mut self.state;
        let reply = match command.check() {
            Ok(()) => state.apply(context, command),
            Err(rejection) => KvReply::Rejected(rejection),
        };
        state.changes.drain(..).for_each(|change| change.tell(events));
        state.next_revision = context.log_id.index + 1;
        reply
    }

    fn take_event(&mut self, index: u64, event: &AppliedEvent) -> Result<(), String> {
        changes::take_event(&mut self.state.items, index, event)
    }

    fn tell_state(
        view: &KvView,
        after: &[u8],
        max_bytes: usize,
        events: &mut dyn EventSink,
    ) -> Option<Vec<u8>> {
        changes::tell_state(&view.items, after, max_bytes, events)
    }

    fn view(&self) -> KvView {
        self.state.clone()
    }

    fn query(view: &KvView, query: KvQuery) -> KvAnswer {
        if let Err(rejection) = query.check() {
            return KvAnswer::Rejected(rejection);
        }
        match query {
            KvQuery::Get { tenant, collection, key } => {
                KvAnswer::Item(view.items.get(&key::composite(&tenant, &collection, &key)))
            }
            KvQuery::Range(query) => KvAnswer::Range(view.range(&query)),
        }
    }

    fn write_snapshot(view: &KvView, out: &mut dyn Write) -> io::Result<()> {
        snapshot::write(view, out)
    }

    fn read_snapshot(_: u32, input: &mut dyn Read) -> io::Result<Self> {
        Ok(Self { state: snapshot::read(input)? })
    }

    fn state_bytes(&self) -> Option<u64> {
        Some(self.state.state_bytes())
    }

    fn most_growth_bytes(command: &KvCommand) -> u64 {
        growth::most_bytes(command)
    }

    fn growth_bytes(view: &KvView, command: &KvCommand) -> u64 {
        growth::bytes(&view.items, command)
    }

    fn running_hash(&self) -> Option<u64> {
        Some(self.state.items.hash())
    }

    fn state_hash(view: &KvView) -> u64 {
        view.items.hash()
    }

    fn next_wake_ms(&self) -> Option<u64> {
        self.state.items.first_deadline().map(|(expires_ms, _)| *expires_ms)
    }

    fn wake() -> Option<KvCommand> {
        Some(KvCommand::Expire)
    }
}
