//! Random histories against a model that does everything the plain way.

use std::collections::BTreeMap;
use std::ops::Range;

use proptest::prelude::*;

use super::*;

/// Tenant, collection and key of an item.
type Address = (String, String, Vec<u8>);

#[derive(Debug, Clone, Default)]
struct Model(BTreeMap<Address, Item>);

impl Model {
    fn apply(&mut self, context: ApplyContext, command: &KvCommand) -> KvReply {
        let revision = context.log_id.index;
        match command.clone() {
            KvCommand::Put { tenant, collection, key, value } => {
                let item = self.put(context, (tenant, collection, key.to_vec()), value, 0);
                KvReply::Put { revision, create_revision: item.create_revision, version: item.version }
            }
            KvCommand::PutExpiring { tenant, collection, key, value, ttl_ms } => {
                let item = self.put(context, (tenant, collection, key.to_vec()), value, ttl_ms);
                KvReply::Put { revision, create_revision: item.create_revision, version: item.version }
            }
            KvCommand::Delete { tenant, collection, key } => {
                let existed = self.0.remove(&(tenant, collection, key.to_vec())).is_some();
                KvReply::Deleted { revision, existed }
            }
            KvCommand::DeleteRange { tenant, collection, start, end, limit } => {
                let found = self.range(&tenant, &collection, &start, &end);
                let limit = if limit == 0 { usize::MAX } else { limit as usize };
                for (key, _) in found.iter().take(limit) {
                    self.0.remove(&(tenant.clone(), collection.clone(), key.to_vec()));
                }
                let deleted = found.len().min(limit);
                KvReply::DeletedRange { revision, deleted: deleted as u64, more: found.len() > deleted }
            }
            KvCommand::Txn(txn) => {
                let succeeded = txn.compares.iter().all(|compare| self.holds(&txn.tenant, compare));
                let operations = if succeeded { txn.then } else { txn.otherwise };
                let results = operations.iter().map(|op| self.operation(context, &txn.tenant, op)).collect();
                KvReply::Txn { revision, succeeded, results }
            }
            KvCommand::Expire => {
                let before = self.0.len();
                self.0.retain(|_, item| item.expires_ms == 0 || item.expires_ms > context.elapsed_ms);
                KvReply::Expired { revision, removed: (before - self.0.len()) as u64 }
            }
        }
    }

    fn put(&mut self, context: ApplyContext, address: Address, value: Bytes, ttl_ms: u64) -> Item {
        let revision = context.log_id.index;
        let old = self.0.get(&address).cloned();
        let item = Item {
            value,
            create_revision: old.as_ref().map_or(revision, |old| old.create_revision),
            mod_revision: revision,
            version: old.map_or(0, |old| old.version) + 1,
            expires_ms: if ttl_ms == 0 { 0 } else { context.elapsed_ms + ttl_ms },
        };
        self.0.insert(address, item.clone());
        item
    }

    fn range(&self, tenant: &str, collection: &str, start: &[u8], end: &[u8]) -> Vec<(Bytes, Item)> {
        let inside = |key: &[u8]| start <= key && (end.is_empty() || key < end);
        self.0
            .iter()
            .filter(|((t, c, key), _)| t == tenant && c == collection && inside(key))
            .map(|((_, _, key), item)| (bytes(key), item.clone()))
            .collect()
    }

    fn holds(&self, tenant: &str, compare: &Compare) -> bool {
        let found = self.0.get(&(tenant.to_owned(), compare.collection.clone(), compare.key.to_vec()));
        let number = |part: fn(&Item) -> u64| found.map_or(0, part);
        match &compare.condition {
            Condition::Value(how, operand) => found.is_some_and(|item| holds(*how, &item.value, operand)),
            Condition::Version(how, operand) => holds(*how, &number(|item| item.version), operand),
            Condition::CreateRevision(how, operand) => {
                holds(*how, &number(|item| item.create_revision), operand)
            }
            Condition::ModRevision(how, operand) => holds(*how, &number(|item| item.mod_revision), operand),
        }
    }

    fn operation(&mut self, context: ApplyContext, tenant: &str, operation: &TxnOp) -> TxnResult {
        let address =
            |collection: &str, key: &Bytes| (tenant.to_owned(), collection.to_owned(), key.to_vec());
        match operation {
            TxnOp::Get { collection, key } => TxnResult::Item(self.0.get(&address(collection, key)).cloned()),
            TxnOp::Range { collection, start, end, limit } => {
                let mut items = self.range(tenant, collection, start, end);
                let rest =
                    items.split_off(items.len().min(if *limit == 0 { usize::MAX } else { *limit as usize }));
                TxnResult::Range(RangeAnswer { items, next: rest.first().map(|(key, _)| key.clone()) })
            }
            TxnOp::Put { collection, key, value, ttl_ms } => {
                let item = self.put(context, address(collection, key), value.clone(), *ttl_ms);
                TxnResult::Put { create_revision: item.create_revision, version: item.version }
            }
            TxnOp::Delete { collection, key } => {
                TxnResult::Deleted { existed: self.0.remove(&address(collection, key)).is_some() }
            }
            TxnOp::DeleteRange { collection, start, end } => {
                let found = self.range(tenant, collection, start, end);
                for (key, _) in &found {
                    self.0.remove(&address(collection, key));
                }
                TxnResult::DeletedRange { deleted: found.len() as u64 }
            }
        }
    }
}

fn holds<T: PartialOrd>(how: Comparison, found: &T, operand: &T) -> bool {
    match how {
        Comparison::Equal => found == operand,
        Comparison::NotEqual => found != operand,
        Comparison::Less => found < operand,
        Comparison::Greater => found > operand,
    }
}

/// Few names and keys, so that histories overwrite, delete and neighbour one another.
fn name() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["a", "b", "ab", "a\u{1}"]).prop_map(str::to_owned)
}

fn key_in(lengths: Range<usize>) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop::sample::select(vec![0_u8, 1, b'k', 255]), lengths)
}

fn key() -> impl Strategy<Value = Bytes> {
    key_in(1..4).prop_map(Bytes::from)
}

/// Also empty.
fn bound() -> impl Strategy<Value = Bytes> {
    key_in(0..4).prop_map(Bytes::from)
}

fn address() -> impl Strategy<Value = Address> {
    (name(), name(), key_in(1..4))
}

fn value() -> impl Strategy<Value = Bytes> {
    prop::collection::vec(any::<u8>(), 0..40).prop_map(Bytes::from)
}

fn operation() -> impl Strategy<Value = TxnOp> {
    prop_oneof![
        1 => (name(), key()).prop_map(|(collection, key)| TxnOp::Get { collection, key }),
        1 => (name(), bound(), bound(), 0..4_u32)
            .prop_map(|(collection, start, end, limit)| TxnOp::Range { collection, start, end, limit }),
        3 => (name(), key(), value(), prop_oneof![Just(0), 1..200_u64])
            .prop_map(|(collection, key, value, ttl_ms)| TxnOp::Put { collection, key, value, ttl_ms }),
        1 => (name(), key()).prop_map(|(collection, key)| TxnOp::Delete { collection, key }),
        1 => (name(), bound(), bound())
            .prop_map(|(collection, start, end)| TxnOp::DeleteRange { collection, start, end }),
    ]
}

fn comparing() -> impl Strategy<Value = Compare> {
    let how = || {
        prop::sample::select(vec![
            Comparison::Equal,
            Comparison::NotEqual,
            Comparison::Less,
            Comparison::Greater,
        ])
    };
    let condition = prop_oneof![
        (how(), value()).prop_map(|(how, operand)| Condition::Value(how, operand)),
        (how(), 0..4_u64).prop_map(|(how, operand)| Condition::Version(how, operand)),
        (how(), 0..300_u64).prop_map(|(how, operand)| Condition::CreateRevision(how, operand)),
        (how(), 0..300_u64).prop_map(|(how, operand)| Condition::ModRevision(how, operand)),
    ];
    (name(), key(), condition).prop_map(|(collection, key, condition)| Compare { collection, key, condition })
}

fn transaction() -> impl Strategy<Value = KvCommand> {
    let compares = prop::collection::vec(comparing(), 0..3);
    let operations = || prop::collection::vec(operation(), 0..6);
    (name(), compares, operations(), operations()).prop_map(|(tenant, compares, then, otherwise)| {
        KvCommand::Txn(KvTxn { tenant, compares, then, otherwise })
    })
}

fn command() -> impl Strategy<Value = KvCommand> {
    prop_oneof![
        6 => (name(), name(), key(), value())
            .prop_map(|(tenant, collection, key, value)| KvCommand::Put { tenant, collection, key, value }),
        2 => (name(), name(), key(), value(), 1..200_u64).prop_map(|(tenant, collection, key, value, ttl_ms)| {
            KvCommand::PutExpiring { tenant, collection, key, value, ttl_ms }
        }),
        2 => (name(), name(), key())
            .prop_map(|(tenant, collection, key)| KvCommand::Delete { tenant, collection, key }),
        1 => (name(), name(), bound(), bound(), 0..4_u32).prop_map(|(tenant, collection, start, end, limit)| {
            KvCommand::DeleteRange { tenant, collection, start, end, limit }
        }),
        3 => transaction(),
        1 => Just(KvCommand::Expire),
    ]
}

/// Commands with their contexts: revisions with gaps, and time that sometimes stands still.
fn history(length: Range<usize>) -> impl Strategy<Value = Vec<(ApplyContext, KvCommand)>> {
    prop::collection::vec((1..4_u64, 0..30_u64, command()), length).prop_map(|steps| {
        let (mut index, mut time_ms) = (9, 1000);
        let mut next = |(gap, pause_ms, command)| {
            index += gap;
            time_ms += pause_ms;
            (at(index, time_ms), command)
        };
        steps.into_iter().map(&mut next).collect()
    })
}

fn run(history: impl IntoIterator<Item = (ApplyContext, KvCommand)>) -> KvMachine {
    let mut machine = KvMachine::default();
    for (context, command) in history {
        machine.apply(&context, command);
    }
    machine
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn behaves_like_the_model(
        history in history(1..200),
        asked in prop::collection::vec((address(), key_in(0..4)), 20),
        limit in 1..20_usize,
        max_bytes in 1..600_usize,
    ) {
        let (mut machine, mut model) = (KvMachine::default(), Model::default());
        for (context, command) in history {
            let expected = model.apply(context, &command);
            let growth = KvMachine::growth_bytes(&machine.view(), &command);
            prop_assert!(growth <= KvMachine::most_growth_bytes(&command));
            let most = machine.view().state_bytes() + growth;
            prop_assert_eq!(machine.apply(&context, command), expected);
            prop_assert!(machine.view().state_bytes() <= most, "it has grown by more than was said");
            let deadlines = model.0.values().map(|item| item.expires_ms);
            prop_assert_eq!(machine.next_wake_ms(), deadlines.filter(|expires_ms| *expires_ms != 0).min());
        }
        assert_consistent(&machine);
        let view = machine.view();
        prop_assert_eq!(view.len(), model.0.len());
        prop_assert_eq!(view.is_empty(), model.0.is_empty());
        prop_assert_eq!(Some(KvMachine::state_hash(&view)), machine.running_hash());

        for ((tenant, collection, start), end) in asked {
            let found = KvMachine::query(&view, KvQuery::Get {
                tenant: tenant.clone(),
                collection: collection.clone(),
                key: start.clone().into(),
            });
            let expected = model.0.get(&(tenant.clone(), collection.clone(), start.clone())).cloned();
            prop_assert_eq!(found, KvAnswer::Item(expected));

            let expected = model.range(&tenant, &collection, &start, &end);
            let mut query = range_query(&tenant, &collection, &start, &end);
            prop_assert_eq!(&range(&view, query.clone()).items, &expected);

            // The same items in pieces, each within its bounds, none twice and none left out.
            (query.limit, query.max_bytes) = (limit, max_bytes);
            let mut pieces = Vec::new();
            loop {
                let piece = range(&view, query.clone());
                prop_assert!(piece.items.len() <= limit);
                let bytes: usize = piece.items.iter().map(|(key, item)| key.len() + item.value.len() + 64).sum();
                prop_assert!(bytes <= max_bytes || piece.items.len() == 1);
                pieces.extend(piece.items);
                let Some(next) = piece.next else { break };
                query.start = next;
            }
            prop_assert_eq!(pieces, expected);
        }
    }

    /// Whoever reads a range and then follows its events has what is there now.
    #[test]
    fn events_lead_from_any_state_to_the_present_one(
        history in history(1..150),
        since in any::<prop::sample::Index>(),
        (tenant, collection, start) in (name(), name(), bound()),
        end in bound(),
    ) {
        let since = since.index(history.len());
        let mut machine = run(history[..since].iter().cloned());
        let query = range_query(&tenant, &collection, &start, &end);
        let mut state: BTreeMap<_, _> = range(&machine.view(), query.clone()).items.into_iter().collect();
        for (context, command) in history[since..].iter().cloned() {
            let (reply, told) = apply_told(&mut machine, &context, command);
            prop_assert!(told.is_empty() || !matches!(reply, KvReply::Rejected(_)));
            for event in told {
                let is_inside = event.key >= start && (end.is_empty() || event.key < end);
                if !is_inside || event.tenant != tenant.as_bytes() || event.collection != collection.as_bytes() {
                    continue;
                }
                let before = state.remove(&event.key);
                let previous = before.as_ref().map_or(0, |item| item.mod_revision);
                prop_assert_eq!(event.previous, previous);
                match event.operation {
                    EventOperation::Insert => prop_assert!(before.is_none()),
                    EventOperation::Update | EventOperation::Delete => prop_assert!(before.is_some()),
                    EventOperation::Expire => prop_assert!(before.unwrap().expires_ms != 0),
                }
                state.extend(item_after(&event, context.log_id.index).map(|item| (event.key.clone(), item)));
            }
        }
        prop_assert_eq!(state.into_iter().collect::<Vec<_>>(), range(&machine.view(), query).items);
    }

    #[test]
    fn a_snapshot_restores_the_state(history in history(0..200), after in history(0..30)) {
        let mut machine = run(history);
        let bytes = snapshot_of(&machine.view());
        let mut restored = KvMachine::read_snapshot(0, &mut bytes.as_slice()).unwrap();
        assert_consistent(&restored);
        prop_assert_eq!(restored.running_hash(), machine.running_hash());
        prop_assert_eq!(snapshot_of(&restored.view()), bytes);
        // Deadlines included: it goes on like the original.
        for (context, command) in after {
            let context = at(context.log_id.index + 1000, context.elapsed_ms);
            prop_assert_eq!(restored.next_wake_ms(), machine.next_wake_ms());
            prop_assert_eq!(restored.apply(&context, command.clone()), machine.apply(&context, command));
        }
        prop_assert_eq!(restored.running_hash(), machine.running_hash());
    }

    #[test]
    fn a_damaged_snapshot_is_refused(
        history in history(1..50),
        position in any::<prop::sample::Index>(),
        flip in 1..=255_u8,
    ) {
        let bytes = snapshot_of(&run(history).view());
        let position = position.index(bytes.len());
        let mut damaged = bytes.clone();
        damaged[position] ^= flip;
        for garbage in [&damaged[..], &bytes[..position], &[&bytes[..], &[0]].concat()] {
            let error = KvMachine::read_snapshot(0, &mut &*garbage).unwrap_err();
            prop_assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_view_does_not_change(history in history(1..120), since in any::<prop::sample::Index>()) {
        let since = since.index(history.len());
        let mut machine = run(history[..since].iter().cloned());
        let view = machine.view();
        let observe = |view: &KvView| (snapshot_of(view), KvMachine::state_hash(view), view.next_revision);
        let before = observe(&view);
        for (context, command) in history[since..].iter().cloned() {
            machine.apply(&context, command);
        }
        prop_assert_eq!(observe(&view), before);
    }

    #[test]
    fn removed_keys_leave_no_trace_in_the_hash(
        kept in prop::collection::vec(any::<u8>(), 1..10),
        passing in prop::collection::vec(any::<u8>(), 0..10),
    ) {
        let (mut plain, mut busy) = (KvMachine::default(), KvMachine::default());
        for (revision, byte) in (0..).step_by(100).zip(&kept) {
            plain.apply(&context(revision), put("t", "kept", &[*byte], b"v"));
            busy.apply(&context(revision), put("t", "kept", &[*byte], b"v"));
            for (revision, byte) in (revision + 1..).zip(&passing) {
                busy.apply(&context(revision), put("t", "passing", &[*byte], b"w"));
            }
        }
        for (revision, byte) in (10_000..).zip(&passing) {
            busy.apply(&context(revision), delete("t", "passing", &[*byte]));
        }
        prop_assert_eq!(KvMachine::state_hash(&plain.view()), KvMachine::state_hash(&busy.view()));
    }
}
