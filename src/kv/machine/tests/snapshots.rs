//! The bytes of snapshots, as nodes of every version so far have written them.

use super::*;

/// Written by the first release: puts at 5 and 7 of `t/c/k`, at 9 of `t/d/\0\xff`.
#[rustfmt::skip]
const V1: &[u8] = &[
    1, 0, 0, 0,
    2, 0, 0, 0, 0, 0, 0, 0,
    5, 0, 0, 0, b't', 0, b'c', 0, b'k',
    25, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, b'w',
    6, 0, 0, 0, b't', 0, b'd', 0, 0, 255,
    24, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,
    63, 94, 107, 130, 171, 150, 160, 121,
];

/// The same state, with an item at 11 that is due at 1500.
#[rustfmt::skip]
const V2: &[u8] = &[
    2, 0, 0, 0,
    12, 0, 0, 0, 0, 0, 0, 0,
    3, 0, 0, 0, 0, 0, 0, 0,
    5, 0, 0, 0, b't', 0, b'c', 0, b'e',
    33, 0, 0, 0, 11, 0, 0, 0, 0, 0, 0, 0, 11, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,
    220, 5, 0, 0, 0, 0, 0, 0, b'x',
    5, 0, 0, 0, b't', 0, b'c', 0, b'k',
    33, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, b'w',
    6, 0, 0, 0, b't', 0, b'd', 0, 0, 255,
    32, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0,
    213, 243, 1, 161, 183, 34, 68, 204,
];

/// The machine that [`V1`] is of.
fn machine_v1() -> KvMachine {
    let mut machine = KvMachine::default();
    machine.apply(&at(5, 1000), put("t", "c", b"k", b"v"));
    machine.apply(&at(7, 1000), put("t", "c", b"k", b"w"));
    machine.apply(&at(9, 1000), put("t", "d", b"\0\xff", b""));
    machine
}

fn read(mut bytes: &[u8]) -> KvMachine {
    KvMachine::read_snapshot(0, &mut bytes).unwrap()
}

#[test]
fn version_1_is_still_read() {
    let mut restored = read(V1);
    assert_consistent(&restored);
    assert_eq!(restored.running_hash(), machine_v1().running_hash());
    assert_eq!(restored.view().len(), 2);
    let item = Item { value: bytes(b"w"), create_revision: 5, mod_revision: 7, version: 2, expires_ms: 0 };
    assert_eq!(get(&restored, "c", b"k"), Some(item));

    // It does not tell its position, which is known again with the first command.
    assert_eq!(restored.state.next_revision, 0);
    let (_, told) = apply_told(&mut restored, &context(20), delete("t", "c", b"k"));
    assert_eq!((told[0].operation, told[0].previous), (EventOperation::Delete, 7));
    assert_eq!(restored.state.next_revision, 21);
}

#[test]
fn version_1_becomes_version_2() {
    let bytes = snapshot_of(&read(V1).view());
    assert_eq!(bytes[..4], 2_u32.to_le_bytes());
    assert_eq!(snapshot_of(&read(&bytes).view()), bytes);
}

#[test]
fn version_2_has_its_documented_bytes() {
    let mut machine = machine_v1();
    machine.apply(&at(11, 1000), put_expiring("c", b"e", b"x", 500));
    assert_eq!(snapshot_of(&machine.view()), V2);

    let restored = read(V2);
    assert_consistent(&restored);
    assert_eq!(restored.running_hash(), machine.running_hash());
    assert_eq!(restored.next_wake_ms(), Some(1500));
    assert_eq!(get(&restored, "c", b"e").unwrap().expires_ms, 1500);
    assert_eq!(snapshot_of(&restored.view()), V2);
    assert_eq!(restored.state.next_revision, 12, "it tells its position");
}

#[test]
fn of_nothing() {
    let bytes = snapshot_of(&KvMachine::default().view());
    assert_eq!(bytes.len(), 4 + 8 + 8 + 8);
    assert!(read(&bytes).view().is_empty());
}

#[test]
fn what_is_damaged_is_refused_in_version_1_too() {
    for position in 0..V1.len() {
        let mut damaged = V1.to_vec();
        damaged[position] ^= 1;
        for garbage in [&damaged[..], &V1[..position], &[V1, &[0]].concat()] {
            let error = KvMachine::read_snapshot(0, &mut &*garbage).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "byte {position}");
        }
    }
}

#[test]
fn another_version_is_refused_by_its_number() {
    let error = KvMachine::read_snapshot(0, &mut &[3, 0, 0, 0][..]).unwrap_err();
    assert!(error.to_string().contains("has version 3"), "{error}");
}

#[test]
fn a_huge_length_allocates_nothing() {
    for header in [&1_u32.to_le_bytes()[..], &[2, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]] {
        let mut bytes = header.to_vec();
        bytes.extend(u64::MAX.to_le_bytes());
        bytes.extend(u32::MAX.to_le_bytes());
        let error = KvMachine::read_snapshot(0, &mut bytes.as_slice()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("more than the limit"), "{error}");
    }
}
