//! The encodings of commands and replies that logs in use contain. A failure here means that an
//! upgraded node could not read its own log.

use serde::{Serialize, de::DeserializeOwned};

use super::*;

/// That `value` is encoded as `expected`, and decoded from it.
#[track_caller]
fn assert_encoding<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(
    value: T,
    expected: impl AsRef<[u8]>,
) {
    let config = bincode::config::standard();
    assert_eq!(bincode::serde::encode_to_vec(&value, config).unwrap(), expected.as_ref());
    let (decoded, length) = bincode::serde::decode_from_slice::<T, _>(expected.as_ref(), config).unwrap();
    assert_eq!((decoded, length), (value, expected.as_ref().len()));
}

#[test]
fn of_commands() {
    assert_encoding(put("t", "c", b"k", b"v"), b"\x00\x01t\x01c\x01k\x01v");
    assert_encoding(delete("t", "c", b"k"), b"\x01\x01t\x01c\x01k");
    assert_encoding(put_expiring("c", b"k", b"v", 7), b"\x02\x01t\x01c\x01k\x01v\x07");
    assert_encoding(delete_range("c", b"k", b"", 9), b"\x03\x01t\x01c\x01k\x00\x09");
    assert_encoding(KvCommand::Expire, b"\x05");
}

#[test]
fn of_transactions() {
    let compares = vec![
        compare(b"k", Condition::Value(Comparison::Equal, bytes(b"v"))),
        compare(b"k", Condition::Version(Comparison::NotEqual, 1)),
        compare(b"k", Condition::CreateRevision(Comparison::Less, 2)),
        compare(b"k", Condition::ModRevision(Comparison::Greater, 3)),
    ];
    let then = vec![op_get(b"k"), op_range(b"", b"z", 4), op_put(b"k", b"v", 5)];
    let otherwise = vec![op_delete(b"k"), op_delete_range(b"a", b"")];
    assert_encoding(
        txn(compares, then, otherwise),
        [
            &b"\x04\x01t"[..],
            b"\x04\x01c\x01k\x00\x00\x01v\x01c\x01k\x01\x01\x01\x01c\x01k\x02\x02\x02\x01c\x01k\x03\x03\x03",
            b"\x03\x00\x01c\x01k\x01\x01c\x00\x01z\x04\x02\x01c\x01k\x01v\x05",
            b"\x02\x03\x01c\x01k\x04\x01c\x01a\x00",
        ]
        .concat(),
    );
}

#[test]
fn of_replies() {
    assert_encoding(KvReply::Put { revision: 7, create_revision: 5, version: 2 }, [0, 7, 5, 2]);
    assert_encoding(KvReply::Deleted { revision: 7, existed: true }, [1, 7, 1]);
    assert_encoding(KvReply::DeletedRange { revision: 7, deleted: 3, more: true }, [3, 7, 3, 1]);
    assert_encoding(KvReply::Expired { revision: 7, removed: 3 }, [5, 7, 3]);
    let item = Item { value: bytes(b"v"), create_revision: 1, mod_revision: 2, version: 3, expires_ms: 4 };
    let results = vec![
        TxnResult::Item(None),
        TxnResult::Item(Some(item.clone())),
        TxnResult::Range(RangeAnswer { items: vec![(bytes(b"k"), item)], next: Some(bytes(b"l")) }),
        TxnResult::Put { create_revision: 5, version: 6 },
        TxnResult::Deleted { existed: true },
        TxnResult::DeletedRange { deleted: 8 },
    ];
    assert_encoding(
        KvReply::Txn { revision: 7, succeeded: true, results },
        [
            &[4, 7, 1, 6][..],
            &[0, 0],
            b"\x00\x01\x01v\x01\x02\x03\x04",
            b"\x01\x01\x01k\x01v\x01\x02\x03\x04\x01\x01l",
            &[2, 5, 6],
            &[3, 1],
            &[4, 8],
        ]
        .concat(),
    );
}

#[test]
fn of_rejections() {
    let encodings: [(KvRejection, &[u8]); 12] = [
        (KvRejection::EmptyName, &[0]),
        (KvRejection::NameTooLong { bytes: 129 }, &[1, 129]),
        (KvRejection::NameContainsNul, &[2]),
        (KvRejection::EmptyKey, &[3]),
        (KvRejection::KeyTooLong { bytes: 7 }, &[4, 7]),
        (KvRejection::ValueTooLong { bytes: 7 }, &[5, 7]),
        (KvRejection::NoTimeToLive, &[6]),
        (KvRejection::TooManyCompares { compares: 129 }, &[7, 129]),
        (KvRejection::TooManyOperations { operations: 129 }, &[8, 129]),
        (KvRejection::TxnTooLong { bytes: 7 }, &[9, 7]),
        (KvRejection::ResultsTooLong, &[10]),
        (KvRejection::TooManyDeleted, &[11]),
    ];
    for (rejection, encoding) in encodings {
        assert_encoding(KvReply::Rejected(rejection), [&[2], encoding].concat());
    }
}

fn decodes(encoded: &[u8]) -> bool {
    let decoded = bincode::serde::decode_from_slice::<KvCommand, _>(encoded, bincode::config::standard());
    decoded.is_ok_and(|(_, read)| read == encoded.len())
}

/// What is taken for a put without decoding it is one, and every put is.
#[test]
fn puts_are_told_from_their_bytes() {
    let encode =
        |command: &KvCommand| bincode::serde::encode_to_vec(command, bincode::config::standard()).unwrap();
    for length in [0, 1, 250, 251, 252, 300, 65_535, 65_536, 70_000] {
        let encoded = encode(&put("t", "c", b"key", &vec![7; length]));
        assert!(KvMachine::is_command(0, &encoded), "{length} bytes");
        assert!(!KvMachine::is_command(0, &[&encoded[..], &[0]].concat()), "{length} bytes and one more");
        for cut in (0..encoded.len()).take(300) {
            assert!(!KvMachine::is_command(0, &encoded[..cut]), "{length} bytes, cut at {cut}");
        }
    }
    assert!(!KvMachine::is_command(0, &encode(&delete("t", "c", b"k"))), "has to be decoded");
    assert!(!KvMachine::is_command(0, b"\x00\x01\xff\x01c\x01k\x01v"), "not text");
    // Every change of one byte, and of a byte after it.
    let encoded = encode(&put("t", "col", b"key", b"value"));
    for at in 0..encoded.len() {
        for byte in 0..=255 {
            let mut changed = encoded.clone();
            changed[at] = byte;
            assert!(!KvMachine::is_command(0, &changed) || decodes(&changed), "{changed:?}");
        }
    }
}
