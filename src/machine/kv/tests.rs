//! The machine against a model, and the bytes it must go on understanding.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::types::LogId;

/// Tenant, collection and key of an item.
type Address = (String, String, Vec<u8>);
type Model = BTreeMap<Address, (Vec<u8>, u64, u64, u64)>;

fn context(index: u64) -> ApplyContext {
    ApplyContext { log_id: LogId::new(1, index), time_ms: 0 }
}

fn put(tenant: &str, collection: &str, key: &[u8], value: &[u8]) -> KvCommand {
    KvCommand::Put {
        tenant: tenant.to_owned(),
        collection: collection.to_owned(),
        key: Bytes::copy_from_slice(key),
        value: Bytes::copy_from_slice(value),
    }
}

fn delete(tenant: &str, collection: &str, key: &[u8]) -> KvCommand {
    KvCommand::Delete {
        tenant: tenant.to_owned(),
        collection: collection.to_owned(),
        key: Bytes::copy_from_slice(key),
    }
}

fn range_query(tenant: &str, collection: &str, start: &[u8], end: &[u8]) -> RangeQuery {
    RangeQuery {
        tenant: tenant.to_owned(),
        collection: collection.to_owned(),
        start: Bytes::copy_from_slice(start),
        end: Bytes::copy_from_slice(end),
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

fn snapshot_of(view: &KvView) -> Vec<u8> {
    let mut bytes = Vec::new();
    KvMachine::write_snapshot(view, &mut bytes).unwrap();
    bytes
}

fn recomputed_hash(view: &KvView) -> u64 {
    view.items.iter().fold(0, |sum, (key, record)| sum.wrapping_add(record::item_hash(key, record)))
}

fn apply_to_model(model: &mut Model, revision: u64, command: &KvCommand) -> KvReply {
    match command.clone() {
        KvCommand::Put { tenant, collection, key, value } => {
            let slot = model.entry((tenant, collection, key.to_vec())).or_insert((vec![], revision, 0, 0));
            *slot = (value.to_vec(), slot.1, revision, slot.3 + 1);
            KvReply::Put { revision, create_revision: slot.1, version: slot.3 }
        }
        KvCommand::Delete { tenant, collection, key } => {
            let existed = model.remove(&(tenant, collection, key.to_vec())).is_some();
            KvReply::Deleted { revision, existed }
        }
    }
}

/// Few names and keys, so that histories overwrite, delete and neighbour one another.
fn address() -> impl Strategy<Value = Address> {
    let name = prop::sample::select(vec!["a", "b", "ab", "a\u{1}"]).prop_map(str::to_owned);
    (name.clone(), name, prop::collection::vec(prop::sample::select(vec![0_u8, 1, b'k', 255]), 1..4))
}

fn command() -> impl Strategy<Value = KvCommand> {
    let value = prop::collection::vec(any::<u8>(), 0..40);
    prop_oneof![
        3 => (address(), value).prop_map(|((tenant, collection, key), value)| put(&tenant, &collection, &key, &value)),
        1 => address().prop_map(|(tenant, collection, key)| delete(&tenant, &collection, &key)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn behaves_like_the_model(
        commands in prop::collection::vec(command(), 1..200),
        asked in prop::collection::vec((address(), address()), 20),
        limit in 1..20_usize,
        max_bytes in 1..600_usize,
    ) {
        let (mut machine, mut model) = (KvMachine::default(), Model::new());
        for (revision, command) in (10..).zip(commands) {
            let expected = apply_to_model(&mut model, revision, &command);
            prop_assert_eq!(machine.apply(&context(revision), command), expected);
        }
        let view = machine.view();
        prop_assert_eq!(view.len(), model.len());
        prop_assert_eq!(view.is_empty(), model.is_empty());
        prop_assert_eq!(KvMachine::state_hash(&view), recomputed_hash(&view));

        for ((tenant, collection, start), (_, _, end)) in asked {
            let found = KvMachine::query(&view, KvQuery::Get {
                tenant: tenant.clone(),
                collection: collection.clone(),
                key: start.clone().into(),
            });
            let expected = model.get(&(tenant.clone(), collection.clone(), start.clone())).map(item);
            prop_assert_eq!(found, KvAnswer::Item(expected));

            let expected: Vec<_> = model
                .iter()
                .filter(|((t, c, key), _)| (t, c) == (&tenant, &collection) && (&start..&end).contains(&key))
                .map(|((_, _, key), entry)| (Bytes::from(key.clone()), item(entry)))
                .collect();
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

    #[test]
    fn a_snapshot_restores_the_state(commands in prop::collection::vec(command(), 0..200)) {
        let mut machine = KvMachine::default();
        for (revision, command) in (1..).zip(commands) {
            machine.apply(&context(revision), command);
        }
        let bytes = snapshot_of(&machine.view());
        let restored = KvMachine::read_snapshot(&mut bytes.as_slice()).unwrap();
        prop_assert_eq!(&restored.view().items, &machine.view().items);
        prop_assert_eq!(KvMachine::state_hash(&restored.view()), KvMachine::state_hash(&machine.view()));
        prop_assert_eq!(snapshot_of(&restored.view()), bytes);
    }

    #[test]
    fn a_damaged_snapshot_is_refused(
        commands in prop::collection::vec(command(), 1..50),
        position in any::<prop::sample::Index>(),
        flip in 1..=255_u8,
    ) {
        let mut machine = KvMachine::default();
        for (revision, command) in (1..).zip(commands) {
            machine.apply(&context(revision), command);
        }
        let bytes = snapshot_of(&machine.view());
        let position = position.index(bytes.len());
        let mut damaged = bytes.clone();
        damaged[position] ^= flip;
        for garbage in [&damaged[..], &bytes[..position], &[&bytes[..], &[0]].concat()] {
            let error = KvMachine::read_snapshot(&mut &*garbage).unwrap_err();
            prop_assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_view_does_not_change(
        before in prop::collection::vec(command(), 0..60),
        after in prop::collection::vec(command(), 1..60),
    ) {
        let mut machine = KvMachine::default();
        for (revision, command) in (1..).zip(before) {
            machine.apply(&context(revision), command);
        }
        let view = machine.view();
        let (bytes, hash) = (snapshot_of(&view), KvMachine::state_hash(&view));
        for (revision, command) in (100..).zip(after) {
            machine.apply(&context(revision), command);
        }
        prop_assert_eq!(snapshot_of(&view), bytes);
        prop_assert_eq!(KvMachine::state_hash(&view), hash);
    }

    #[test]
    fn removed_keys_leave_no_trace_in_the_hash(
        kept in prop::collection::vec(any::<u8>(), 1..10),
        passing in prop::collection::vec(any::<u8>(), 0..10),
    ) {
        let (mut plain, mut busy) = (KvMachine::default(), KvMachine::default());
        for (revision, byte) in (0..).step_by(2).zip(&kept) {
            plain.apply(&context(revision), put("t", "kept", &[*byte], b"v"));
            busy.apply(&context(revision), put("t", "kept", &[*byte], b"v"));
            for byte in &passing {
                busy.apply(&context(revision + 1), put("t", "passing", &[*byte], b"w"));
            }
        }
        for byte in &passing {
            busy.apply(&context(1000), delete("t", "passing", &[*byte]));
        }
        prop_assert_eq!(KvMachine::state_hash(&plain.view()), KvMachine::state_hash(&busy.view()));
    }
}

fn item((value, create_revision, mod_revision, version): &(Vec<u8>, u64, u64, u64)) -> Item {
    Item {
        value: Bytes::from(value.clone()),
        create_revision: *create_revision,
        mod_revision: *mod_revision,
        version: *version,
    }
}

#[test]
fn each_part_of_an_item_shows_in_the_hash() {
    let hash = |commands: &[(u64, KvCommand)]| {
        let mut machine = KvMachine::default();
        for (index, command) in commands {
            machine.apply(&context(*index), command.clone());
        }
        KvMachine::state_hash(&machine.view())
    };
    let hashes = [
        hash(&[]),
        hash(&[(1, put("t", "c", b"k", b"v"))]),
        hash(&[(1, put("t", "c", b"k", b"w"))]),
        hash(&[(1, put("t", "c", b"kv", b""))]),
        hash(&[(1, put("t", "c", b"l", b"v"))]),
        hash(&[(1, put("t", "d", b"k", b"v"))]),
        hash(&[(1, put("u", "c", b"k", b"v"))]),
        hash(&[(2, put("t", "c", b"k", b"v"))]),
        hash(&[(1, put("t", "c", b"k", b"")), (2, put("t", "c", b"k", b"v"))]),
    ];
    for (position, hash) in hashes.iter().enumerate() {
        assert!(!hashes[..position].contains(hash), "hash {position} equals an earlier one");
    }
}

#[test]
fn what_breaks_a_limit_is_rejected_and_changes_nothing() {
    let mut machine = KvMachine::default();
    let long_key = vec![b'k'; MAX_KEY_BYTES + 1];
    let rejected = [
        (put("", "c", b"k", b""), KvRejection::EmptyName),
        (put("t", "a\0b", b"k", b""), KvRejection::NameContainsNul),
        (put("t", "c", b"", b""), KvRejection::EmptyKey),
        (put("t", "c", &long_key, b""), KvRejection::KeyTooLong { bytes: 4097 }),
        (
            put("t", "c", b"k", &vec![0; MAX_VALUE_BYTES + 1]),
            KvRejection::ValueTooLong { bytes: 1024 * 1024 + 1 },
        ),
        (delete(&"t".repeat(129), "c", b"k"), KvRejection::NameTooLong { bytes: 129 }),
    ];
    for (command, rejection) in rejected {
        assert_eq!(machine.apply(&context(1), command), KvReply::Rejected(rejection));
    }
    assert!(machine.view().is_empty());
    let query = KvQuery::Get { tenant: "t".into(), collection: "c".into(), key: Bytes::new() };
    assert_eq!(KvMachine::query(&machine.view(), query), KvAnswer::Rejected(KvRejection::EmptyKey));
}

#[test]
fn a_range_without_end_stays_in_its_collection() {
    let mut machine = KvMachine::default();
    for (index, (collection, key)) in [("b", b"a"), ("c", b"a"), ("c", b"z"), ("d", b"a")].iter().enumerate()
    {
        machine.apply(&context(index as u64), put("t", collection, *key, b"v"));
    }
    let keys = |start: &[u8], end: &[u8]| -> Vec<Bytes> {
        let answer = range(&machine.view(), range_query("t", "c", start, end));
        answer.items.into_iter().map(|(key, _)| key).collect()
    };
    assert_eq!(keys(b"", b""), ["a", "z"]);
    assert_eq!(keys(b"b", b""), ["z"]);
    assert_eq!(keys(b"", b"z"), ["a"]);
    assert!(keys(b"z", b"a").is_empty());
}

#[test]
fn a_snapshot_with_a_huge_length_allocates_nothing() {
    let mut bytes = 1_u32.to_le_bytes().to_vec();
    bytes.extend(u64::MAX.to_le_bytes());
    bytes.extend(u32::MAX.to_le_bytes());
    let error = KvMachine::read_snapshot(&mut bytes.as_slice()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    assert!(error.to_string().contains("more than the limit"), "{error}");
}

/// The encodings of commands and replies that logs in use contain. A failure here means that an
/// upgraded node could not read its own log.
#[test]
fn encodings_are_stable() {
    fn encoded(value: &impl Serialize) -> Vec<u8> {
        bincode::serde::encode_to_vec(value, bincode::config::standard()).unwrap()
    }
    assert_eq!(encoded(&put("t", "c", b"k", b"v")), b"\x00\x01t\x01c\x01k\x01v");
    assert_eq!(encoded(&delete("t", "c", b"k")), b"\x01\x01t\x01c\x01k");
    assert_eq!(encoded(&KvReply::Put { revision: 7, create_revision: 5, version: 2 }), [0, 7, 5, 2]);
    assert_eq!(encoded(&KvReply::Deleted { revision: 7, existed: true }), [1, 7, 1]);
    assert_eq!(encoded(&KvReply::Rejected(KvRejection::EmptyName)), [2, 0]);
    assert_eq!(encoded(&KvReply::Rejected(KvRejection::NameTooLong { bytes: 129 })), [2, 1, 129]);
    assert_eq!(encoded(&KvReply::Rejected(KvRejection::NameContainsNul)), [2, 2]);
    assert_eq!(encoded(&KvReply::Rejected(KvRejection::EmptyKey)), [2, 3]);
    assert_eq!(encoded(&KvReply::Rejected(KvRejection::KeyTooLong { bytes: 7 })), [2, 4, 7]);
    assert_eq!(encoded(&KvReply::Rejected(KvRejection::ValueTooLong { bytes: 7 })), [2, 5, 7]);
}

#[test]
fn a_snapshot_has_its_documented_bytes() {
    let mut machine = KvMachine::default();
    machine.apply(&context(5), put("t", "c", b"k", b"v"));
    let mut expected = Vec::new();
    expected.extend(1_u32.to_le_bytes());
    expected.extend(1_u64.to_le_bytes());
    expected.extend(5_u32.to_le_bytes());
    expected.extend(b"t\0c\0k");
    expected.extend(25_u32.to_le_bytes());
    for number in [5_u64, 5, 1] {
        expected.extend(number.to_le_bytes());
    }
    expected.extend(b"v");
    expected.extend(KvMachine::state_hash(&machine.view()).to_le_bytes());
    assert_eq!(snapshot_of(&machine.view()), expected);
}
