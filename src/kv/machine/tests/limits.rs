//! What breaks a limit is rejected, and nothing has changed: neither the items, nor the deadlines, and nothing is told.

use super::*;

/// The limits are part of what stored commands mean: see [`super::super::limits`].
#[test]
fn are_what_they_were() {
    assert_eq!([MAX_NAME_BYTES, MAX_KEY_BYTES, MAX_VALUE_BYTES], [128, 4096, 1 << 20]);
    assert_eq!([MAX_TXN_COMPARES, MAX_TXN_OPERATIONS], [128, 128]);
    assert_eq!([MAX_TXN_BYTES, MAX_TXN_RESULT_BYTES], [1_310_720, 2_097_152]);
    assert_eq!([MAX_DELETED_KEYS, MAX_EXPIRED_KEYS], [10_000, 4096]);
}

/// That `machine` rejects `command` and is as before.
#[track_caller]
fn assert_rejected(machine: &mut KvMachine, command: KvCommand, rejection: KvRejection) {
    let observe = |machine: &KvMachine| {
        let everything = range(&machine.view(), range_query("t", "c", b"", b""));
        (machine.running_hash(), machine.view().len(), machine.next_wake_ms(), everything)
    };
    let (before, index) = (observe(machine), machine.state.next_revision);
    let (reply, told) = apply_told(machine, &context(index), command);
    assert_eq!((reply, told), (KvReply::Rejected(rejection), vec![]));
    assert_eq!(observe(machine), before);
    assert_consistent(machine);
}

/// With one key that expires.
fn machine() -> KvMachine {
    let mut machine = KvMachine::default();
    machine.apply(&context(1), put_expiring("c", b"k", b"v", 9));
    machine
}

#[test]
fn of_single_commands() {
    let mut machine = machine();
    let long_key = vec![b'k'; MAX_KEY_BYTES + 1];
    let long_value = vec![0; MAX_VALUE_BYTES + 1];
    let rejected = [
        (put("", "c", b"k", b""), KvRejection::EmptyName),
        (put("t", "a\0b", b"k", b""), KvRejection::NameContainsNul),
        (put("t", "c", b"", b""), KvRejection::EmptyKey),
        (put("t", "c", &long_key, b""), KvRejection::KeyTooLong { bytes: 4097 }),
        (put("t", "c", b"k", &long_value), KvRejection::ValueTooLong { bytes: 1024 * 1024 + 1 }),
        (delete(&"t".repeat(129), "c", b"k"), KvRejection::NameTooLong { bytes: 129 }),
        (put_expiring("c", b"k", b"w", 0), KvRejection::NoTimeToLive),
        (put_expiring("c", b"", b"w", 1), KvRejection::EmptyKey),
        (put_expiring("c", b"k", &long_value, 1), KvRejection::ValueTooLong { bytes: 1024 * 1024 + 1 }),
        (delete_range("", b"", b"", 0), KvRejection::EmptyName),
        (delete_range("c", &[&long_key[..], b"k"].concat(), b"", 0), KvRejection::KeyTooLong { bytes: 4098 }),
        (delete_range("c", b"", &[&long_key[..], b"k"].concat(), 0), KvRejection::KeyTooLong { bytes: 4098 }),
    ];
    for (command, rejection) in rejected {
        assert_eq!(command.check(), Err(rejection.clone()));
        assert_rejected(&mut machine, command, rejection);
    }
}

#[test]
fn of_queries() {
    let view = machine().view();
    let rejected = |query| match KvMachine::query(&view, query) {
        KvAnswer::Rejected(rejection) => rejection,
        other => panic!("{other:?}"),
    };
    let get = KvQuery::Get { tenant: "t".into(), collection: "c".into(), key: Bytes::new() };
    assert_eq!(rejected(get), KvRejection::EmptyKey);
    assert_eq!(rejected(KvQuery::Range(range_query("", "c", b"", b""))), KvRejection::EmptyName);
    assert_eq!(rejected(KvQuery::Range(range_query("t", "a\0b", b"", b""))), KvRejection::NameContainsNul);
    let end = bytes(vec![b'k'; MAX_KEY_BYTES + 2]);
    let query = RangeQuery { end, ..range_query("t", "c", b"", b"") };
    assert_eq!(rejected(KvQuery::Range(query)), KvRejection::KeyTooLong { bytes: 4098 });
}

#[test]
fn of_transactions_hold_in_both_branches() {
    let mut machine = machine();
    let compares = |count: usize| vec![compare(b"k", Condition::Version(Comparison::Equal, 1)); count];
    let long_value = bytes(vec![0; MAX_VALUE_BYTES + 1]);
    let in_compare = |compare| txn(vec![compare], vec![op_put(b"k", b"w", 0)], vec![]);
    let mut rejected = vec![
        (txn(compares(129), vec![], vec![]), KvRejection::TooManyCompares { compares: 129 }),
        (in_compare(compare(b"", Condition::Version(Comparison::Equal, 0))), KvRejection::EmptyKey),
        (
            in_compare(compare(b"k", Condition::Value(Comparison::Equal, long_value))),
            KvRejection::ValueTooLong { bytes: 1024 * 1024 + 1 },
        ),
        (
            KvCommand::Txn(KvTxn {
                tenant: String::new(),
                compares: vec![],
                then: vec![],
                otherwise: vec![],
            }),
            KvRejection::EmptyName,
        ),
    ];
    // 1 byte of tenant, and 2 of collection and key beside each value, in whichever branch.
    let half = op_put(b"k", &vec![0; MAX_TXN_BYTES / 2 - 2], 0);
    let too_long = KvRejection::TxnTooLong { bytes: MAX_TXN_BYTES as u64 + 1 };
    rejected.push((txn(vec![], vec![half.clone(), half.clone()], vec![]), too_long.clone()));
    rejected.push((txn(vec![], vec![half.clone()], vec![half.clone()]), too_long.clone()));
    rejected.push((txn(vec![], vec![], vec![half.clone(), half]), too_long));
    let branches = [
        (vec![op_get(b"k"); 129], KvRejection::TooManyOperations { operations: 129 }),
        (vec![op_put(b"k", b"w", 0), op_put(b"", b"", 0)], KvRejection::EmptyKey),
        (vec![op_put(b"k", b"w", 0), op_get(b"")], KvRejection::EmptyKey),
        (vec![op_delete(b"k"), op_delete(b"")], KvRejection::EmptyKey),
        (vec![op_delete(b"k"), op_range(&[b'k'; 4098], b"", 0)], KvRejection::KeyTooLong { bytes: 4098 }),
        (vec![op_delete(b"k"), op_delete_range(b"", &[b'k'; 4098])], KvRejection::KeyTooLong { bytes: 4098 }),
    ];
    for (branch, rejection) in branches {
        rejected.push((txn(compares(1), branch.clone(), vec![]), rejection.clone()));
        rejected.push((txn(compares(1), vec![op_put(b"k", b"w", 0)], branch), rejection));
    }
    for (command, rejection) in rejected {
        assert_eq!(command.check(), Err(rejection.clone()));
        assert_rejected(&mut machine, command, rejection);
    }
}

#[test]
fn of_transactions_are_inclusive() {
    let mut machine = machine();
    let compares = vec![compare(b"k", Condition::Version(Comparison::Equal, 1)); MAX_TXN_COMPARES];
    let full = txn(compares, vec![op_get(b"k"); MAX_TXN_OPERATIONS], vec![op_get(b"k"); MAX_TXN_OPERATIONS]);
    assert!(matches!(machine.apply(&context(2), full), KvReply::Txn { succeeded: true, .. }));

    // 1 byte of tenant and 2 of collection and key per operation.
    let put_all = |bytes: usize| {
        let half = (bytes - 5) / 2;
        txn(
            vec![],
            vec![op_put(b"k", &vec![0; half], 0), op_put(b"k", &vec![0; bytes - 5 - half], 0)],
            vec![],
        )
    };
    assert_eq!(put_all(MAX_TXN_BYTES).check(), Ok(()));
    let encoded = bincode::serde::encode_to_vec(put_all(MAX_TXN_BYTES), bincode::config::standard()).unwrap();
    assert!(encoded.len() < 1536 * 1024, "does not fit the default limit on commands");
    assert!(matches!(machine.apply(&context(3), put_all(MAX_TXN_BYTES)), KvReply::Txn { .. }));
    let bytes = MAX_TXN_BYTES as u64 + 1;
    assert_eq!(put_all(MAX_TXN_BYTES + 1).check(), Err(KvRejection::TxnTooLong { bytes }));
}

#[test]
fn of_what_a_transaction_reads_undo_what_it_wrote() {
    let mut machine = machine();
    // Two of them fit, with the 64 bytes that each counts more; a byte longer and they do not.
    let largest = MAX_TXN_RESULT_BYTES / 2 - 64;
    machine.apply(&context(2), put("t", "c", b"l", &vec![0; largest]));
    machine.apply(&context(3), put("t", "c", b"m", &vec![0; largest - 2]));
    let writes = || vec![op_delete(b"k"), op_put(b"n", b"v", 1), op_put(b"l2", b"", 0), op_delete(b"l2")];
    let reading = |reads: Vec<TxnOp>| txn(vec![], [writes(), reads].concat(), vec![]);

    for reads in [
        vec![op_get(b"l"), op_get(b"l"), op_get(b"n")],
        vec![op_get(b"l"), op_range(b"l", b"n", 1)],
        vec![op_range(b"l", b"o", 0)],
        vec![op_get(b"l"), op_get(b"m"), op_range(b"l", b"m", 1)],
    ] {
        assert_rejected(&mut machine, reading(reads), KvRejection::ResultsTooLong);
    }
    for (index, reads) in (100..).zip([
        vec![op_get(b"l"), op_get(b"l")],
        vec![op_range(b"l", b"n", 0)],
        vec![op_range(b"l", b"o", 2)],
    ]) {
        let reply = machine.apply(&context(index), txn(vec![], reads, vec![]));
        assert!(matches!(reply, KvReply::Txn { .. }), "{reply:?}");
    }
}

#[test]
fn of_keys_a_command_deletes() {
    let mut machine = machine();
    for number in 0..=MAX_DELETED_KEYS as u64 {
        let key = format!("l{number:06}");
        machine.apply(&context(10 + number), put_expiring("c", key.as_bytes(), b"", 1_000_000));
    }
    let index = machine.state.next_revision;
    let (all, all_but_one) = (op_delete_range(b"l", b"m"), op_delete_range(b"l000001", b"m"));
    let rejected = [
        vec![op_put(b"a", b"", 5), all.clone()],
        vec![op_delete(b"k"), all_but_one.clone()],
        vec![op_delete_range(b"l005000", b"m"), op_delete_range(b"l", b"m")],
        vec![all_but_one.clone(), op_delete(b"l000000")],
    ];
    for (number, operations) in (0..).zip(rejected) {
        let before = (machine.running_hash(), machine.next_wake_ms());
        let command = txn(vec![], operations, vec![]);
        let (reply, told) = apply_told(&mut machine, &context(index + number), command);
        assert_eq!((machine.running_hash(), machine.next_wake_ms()), before);
        assert_eq!((reply, told), (KvReply::Rejected(KvRejection::TooManyDeleted), vec![]));
    }
    assert_consistent(&machine);
    assert_eq!(machine.view().len(), 10_002);

    // What is not there does not count.
    let operations = vec![op_delete(b"none"), all_but_one];
    let results = vec![TxnResult::Deleted { existed: false }, TxnResult::DeletedRange { deleted: 10_000 }];
    let mut other = machine.clone();
    let reply = other.apply(&context(index + 9), txn(vec![], operations, vec![]));
    assert_eq!(reply, KvReply::Txn { revision: index + 9, succeeded: true, results });
    assert_consistent(&other);

    // A command of its own stops at the limit, and says so.
    for limit in [0, 10_000, u32::MAX] {
        let reply = machine.clone().apply(&context(index + 9), delete_range("c", b"", b"", limit));
        assert_eq!(reply, KvReply::DeletedRange { revision: index + 9, deleted: 10_000, more: true });
    }
    let reply = machine.apply(&context(index + 9), delete_range("c", b"l", b"m", 10_000));
    assert_eq!(reply, KvReply::DeletedRange { revision: index + 9, deleted: 10_000, more: true });
    let reply = machine.apply(&context(index + 10), delete_range("c", b"l", b"m", 1));
    assert_eq!(reply, KvReply::DeletedRange { revision: index + 10, deleted: 1, more: false });
    assert_consistent(&machine);
}

#[test]
fn of_keys_that_expire_at_once() {
    let mut machine = KvMachine::default();
    for number in 0..MAX_EXPIRED_KEYS as u64 + 1 {
        machine.apply(&at(number, 0), put_expiring("c", &number.to_be_bytes(), b"", 10 + number % 2));
    }
    let removed = |machine: &mut KvMachine, index, time_ms| match machine
        .apply(&at(index, time_ms), KvCommand::Expire)
    {
        KvReply::Expired { removed, revision } if revision == index => removed,
        other => panic!("{other:?}"),
    };
    assert_eq!(removed(&mut machine, 5000, 11), MAX_EXPIRED_KEYS as u64);
    assert_eq!(machine.next_wake_ms(), Some(11));
    assert_eq!(removed(&mut machine, 5001, 11), 1);
    assert_eq!(machine.next_wake_ms(), None);
    assert_eq!(removed(&mut machine, 5002, 11), 0);
    assert_consistent(&machine);
}
