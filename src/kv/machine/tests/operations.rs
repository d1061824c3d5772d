//! What each operation promises, by example.

use super::*;

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

    let reply = machine.apply(&context(10), delete_range("c", b"", b"", 0));
    assert_eq!(reply, KvReply::DeletedRange { revision: 10, deleted: 2, more: false });
    assert_eq!(machine.view().len(), 2);
    let reply = machine.apply(&context(11), delete_range("d", b"z", b"a", 0));
    assert_eq!(reply, KvReply::DeletedRange { revision: 11, deleted: 0, more: false });
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
        hash(&[(1, put_expiring("c", b"k", b"v", 1))]),
        hash(&[(1, put_expiring("c", b"k", b"v", 2))]),
    ];
    for (position, hash) in hashes.iter().enumerate() {
        assert!(!hashes[..position].contains(hash), "hash {position} equals an earlier one");
    }
}

#[test]
fn the_operations_of_a_transaction_see_one_another() {
    let mut machine = KvMachine::default();
    machine.apply(&context(1), put("t", "c", b"a", b"1"));
    let operations = vec![
        op_put(b"b", b"2", 0),
        op_get(b"b"),
        op_put(b"a", b"3", 50),
        op_delete(b"a"),
        op_put(b"a", b"4", 60),
        op_range(b"", b"", 1),
        op_delete_range(b"b", b""),
        op_delete(b"b"),
        op_get(b"b"),
    ];
    let (reply, told) = apply_told(&mut machine, &at(7, 1000), txn(vec![], operations, vec![]));
    let b = Item { value: bytes(b"2"), create_revision: 7, mod_revision: 7, version: 1, expires_ms: 0 };
    let a = Item { value: bytes(b"4"), create_revision: 7, mod_revision: 7, version: 1, expires_ms: 1060 };
    let results = vec![
        TxnResult::Put { create_revision: 7, version: 1 },
        TxnResult::Item(Some(b.clone())),
        TxnResult::Put { create_revision: 1, version: 2 },
        TxnResult::Deleted { existed: true },
        TxnResult::Put { create_revision: 7, version: 1 },
        TxnResult::Range(RangeAnswer { items: vec![(bytes(b"a"), a.clone())], next: Some(bytes(b"b")) }),
        TxnResult::DeletedRange { deleted: 1 },
        TxnResult::Deleted { existed: false },
        TxnResult::Item(None),
    ];
    assert_eq!(reply, KvReply::Txn { revision: 7, succeeded: true, results });
    assert_eq!(get(&machine, "c", b"a"), Some(a.clone()));
    assert_eq!(machine.next_wake_ms(), Some(1060));
    assert_consistent(&machine);

    // Each change is an event, in order, also those that later ones undid.
    let first_a =
        Item { value: bytes(b"3"), create_revision: 1, mod_revision: 7, version: 2, expires_ms: 1050 };
    let changes: Vec<_> =
        told.iter().map(|event| (event.operation, &event.key[..], item_after(event, 7))).collect();
    assert_eq!(
        changes,
        [
            (EventOperation::Insert, &b"b"[..], Some(b)),
            (EventOperation::Update, b"a", Some(first_a)),
            (EventOperation::Delete, b"a", None),
            (EventOperation::Insert, b"a", Some(a)),
            (EventOperation::Delete, b"b", None),
        ]
    );
}

#[test]
fn compares_choose_the_branch() {
    let mut machine = KvMachine::default();
    machine.apply(&context(3), put("t", "c", b"k", b"a"));
    machine.apply(&context(5), put("t", "c", b"k", b"m"));
    let mut index = 5;
    let mut succeeds = |compares: Vec<Compare>| {
        index += 1;
        match machine.apply(&context(index), txn(compares, vec![], vec![op_get(b"k")])) {
            KvReply::Txn { succeeded, results, .. } => {
                assert_eq!(results.len(), usize::from(!succeeded));
                succeeded
            }
            other => panic!("{other:?}"),
        }
    };
    let orderings = [Comparison::Equal, Comparison::NotEqual, Comparison::Less, Comparison::Greater];
    let mut truths = |key: &[u8], condition: &dyn Fn(Comparison) -> Condition| {
        orderings.map(|comparison| succeeds(vec![compare(key, condition(comparison))]))
    };
    let (equal, less, greater) =
        ([true, false, false, false], [false, true, true, false], [false, true, false, true]);
    assert_eq!(truths(b"k", &|how| Condition::Value(how, bytes(b"m"))), equal);
    assert_eq!(truths(b"k", &|how| Condition::Value(how, bytes(b"ma"))), less);
    assert_eq!(truths(b"k", &|how| Condition::Value(how, bytes(b""))), greater);
    assert_eq!(truths(b"k", &|how| Condition::Version(how, 2)), equal);
    assert_eq!(truths(b"k", &|how| Condition::Version(how, 3)), less);
    assert_eq!(truths(b"k", &|how| Condition::CreateRevision(how, 3)), equal);
    assert_eq!(truths(b"k", &|how| Condition::CreateRevision(how, 2)), greater);
    assert_eq!(truths(b"k", &|how| Condition::ModRevision(how, 5)), equal);
    assert_eq!(truths(b"k", &|how| Condition::ModRevision(how, 4)), greater);
    // A key that does not exist: numbers are 0, and its value is like nothing.
    assert_eq!(truths(b"none", &|how| Condition::Value(how, Bytes::new())), [false; 4]);
    assert_eq!(truths(b"none", &|how| Condition::Version(how, 0)), equal);
    assert_eq!(truths(b"none", &|how| Condition::CreateRevision(how, 0)), equal);
    assert_eq!(truths(b"none", &|how| Condition::ModRevision(how, 1)), less);

    let (holds, fails) = (
        compare(b"k", Condition::Version(Comparison::Equal, 2)),
        compare(b"k", Condition::Version(Comparison::Equal, 1)),
    );
    assert!(succeeds(vec![]));
    assert!(succeeds(vec![holds.clone(), holds.clone()]));
    assert!(!succeeds(vec![holds.clone(), fails.clone()]));
    assert!(!succeeds(vec![fails, holds]));
}

#[test]
fn a_key_stays_until_it_is_expired() {
    let mut machine = KvMachine::default();
    assert_eq!(machine.next_wake_ms(), None);
    machine.apply(&at(1, 1000), put_expiring("c", b"late", b"v", 200));
    machine.apply(&at(2, 1000), put_expiring("c", b"soon", b"v", 100));
    machine.apply(&at(3, 1000), put("t", "c", b"never", b"v"));
    assert_eq!(machine.next_wake_ms(), Some(1100));
    let expired = |removed, revision| KvReply::Expired { revision, removed };
    assert_eq!(machine.apply(&at(4, 1099), KvCommand::Expire), expired(0, 4));

    // Due since long ago, and still there for whoever asks.
    let compares = vec![compare(b"soon", Condition::Version(Comparison::Equal, 1))];
    let reply = machine.apply(&at(5, 1150), txn(compares, vec![], vec![]));
    assert_eq!(reply, KvReply::Txn { revision: 5, succeeded: true, results: vec![] });
    assert_eq!(get(&machine, "c", b"soon").unwrap().expires_ms, 1100);

    let (reply, told) = apply_told(&mut machine, &at(6, 1150), KvMachine::wake().unwrap());
    assert_eq!(reply, expired(1, 6));
    assert_eq!((told.len(), told[0].operation, &told[0].key[..]), (1, EventOperation::Expire, &b"soon"[..]));
    assert_eq!(get(&machine, "c", b"soon"), None);
    assert_eq!(machine.next_wake_ms(), Some(1200));
    let (reply, told) = apply_told(&mut machine, &at(7, 1200), KvCommand::Expire);
    assert_eq!(reply, expired(1, 7));
    assert_eq!((told.len(), told[0].operation, &told[0].key[..]), (1, EventOperation::Expire, &b"late"[..]));
    assert_eq!(machine.next_wake_ms(), None);
    assert_eq!(machine.view().len(), 1);
}

#[test]
fn the_last_write_decides_whether_a_key_expires() {
    let mut machine = KvMachine::default();
    machine.apply(&at(1, 1000), put_expiring("c", b"k", b"v", 100));
    machine.apply(&at(2, 1000), put_expiring("c", b"k", b"v", 500));
    assert_eq!(machine.next_wake_ms(), Some(1500));
    machine.apply(&at(3, 1000), put("t", "c", b"k", b"v"));
    assert_eq!((machine.next_wake_ms(), get(&machine, "c", b"k").unwrap().version), (None, 3));
    machine.apply(&at(4, 1000), put_expiring("c", b"k", b"v", u64::MAX));
    assert_eq!(machine.next_wake_ms(), Some(u64::MAX));
    machine.apply(&at(5, 1000), delete("t", "c", b"k"));
    assert_eq!(machine.next_wake_ms(), None);
    machine.apply(&at(6, 1000), put_expiring("c", b"k", b"v", 1));
    machine.apply(&at(7, 1000), delete_range("c", b"", b"", 0));
    assert_eq!(machine.next_wake_ms(), None);
    assert_consistent(&machine);
}
