//! Both stores against the same promises, then each way in which a file can be wrong.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::path::PathBuf;

use super::*;
use crate::storage::files;
use crate::types::{ClusterClock, HistoryEpoch, Incarnation, Intent, MachineVersion, Member};

fn meta(term: u64, index: u64) -> SnapshotMeta {
    let member =
        Member { peer: "p:1".into(), client: "c:1".into(), incarnation: Incarnation(7), ..Member::default() };
    SnapshotMeta {
        log_id: LogId::new(term, index),
        clock: ClusterClock { elapsed_ms: 1234, wall_offset_ms: -5, term, counted_ms: Some(34) },
        membership_log_id: Some(LogId::new(1, 2)),
        membership: Membership { voters: vec![[1].into()], members: BTreeMap::from([(1, member)]) },
        history: HistoryEpoch(0x0123_4567_89ab_cdef),
        quota_bytes: 1 << 30,
        machines: SnapshotMachines::default(),
    }
}

fn payload(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 31 + at / 251) as u8).collect()
}

fn write(store: &dyn SnapshotStore, meta: &SnapshotMeta, payload: &[u8]) -> SnapshotHandle {
    let mut writer = store.begin(meta).unwrap();
    // Pieces that agree with no frame.
    for piece in payload.chunks(100_003) {
        writer.write_all(piece).unwrap();
    }
    writer.finish().unwrap()
}

fn read(handle: &SnapshotHandle) -> Vec<u8> {
    let mut bytes = Vec::new();
    handle.open().unwrap().1.read_to_end(&mut bytes).unwrap();
    bytes
}

fn raw(handle: &SnapshotHandle) -> Vec<u8> {
    handle.read_at(0, handle.len_bytes() as usize + 100).unwrap().to_vec()
}

fn conformance(mine: &dyn SnapshotStore, theirs: &dyn SnapshotStore) {
    assert!(mine.newest().unwrap().is_none());
    for (index, bytes) in [(1, 0), (2, 1), (3, 256 * 1024), (4, 256 * 1024 + 1), (5, 1_500_000)] {
        let handle = write(mine, &meta(1, index), &payload(bytes));
        assert_eq!(read(&handle), payload(bytes));
        let newest = mine.newest().unwrap().unwrap();
        assert_eq!((newest.meta(), read(&newest)), (&meta(1, index), payload(bytes)));

        let mut receiver = theirs.receive(meta(1, index).log_id).unwrap();
        let mut offset = 0;
        while offset < handle.len_bytes() {
            let piece = handle.read_at(offset, 70_001).unwrap();
            assert_eq!(receiver.write(offset + 1, &piece).unwrap_err().kind(), ErrorKind::InvalidInput);
            assert_eq!(receiver.head(), (offset > 0).then(|| meta(1, index)), "from the first piece on");
            receiver.write(offset, &piece).unwrap();
            offset += piece.len() as u64;
        }
        assert_eq!(receiver.head(), Some(meta(1, index)));
        assert_eq!(receiver.received_bytes(), handle.len_bytes());
        let received = receiver.finish().unwrap();
        assert!(
            theirs.newest().unwrap().is_none_or(|newest| newest.meta() != received.meta()),
            "not placed yet"
        );
        let received = received.place().unwrap();
        assert_eq!((received.meta(), read(&received)), (&meta(1, index), payload(bytes)));
        assert_eq!(raw(&theirs.newest().unwrap().unwrap()), raw(&handle));
    }

    // A handle goes on reading what it was made for.
    let old = mine.newest().unwrap().unwrap();
    write(mine, &meta(2, 5), b"new");
    assert_eq!(read(&old), payload(1_500_000));
    // One that comes late does not become the newest.
    write(mine, &meta(1, 9), b"late");
    assert_eq!(read(&mine.newest().unwrap().unwrap()), b"new");
    // One that is dropped was never there.
    let mut writer = mine.begin(&meta(3, 6)).unwrap();
    writer.write_all(b"dropped").unwrap();
    drop(writer);
    drop(mine.receive(LogId::new(3, 7)).unwrap());
    assert_eq!(read(&mine.newest().unwrap().unwrap()), b"new");
}

#[test]
fn a_directory_keeps_the_promises() {
    let (mine, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    conformance(&SnapshotDir::open(mine.path()).unwrap(), &SnapshotDir::open(theirs.path()).unwrap());
    let names = files(mine.path());
    assert_eq!(names.len(), 2, "the newest and the late one: {names:?}");
}

#[test]
fn memory_keeps_the_promises() {
    conformance(&MemorySnapshots::new(), &MemorySnapshots::new());
}

fn files(path: &Path) -> Vec<PathBuf> {
    crate::storage::files::list(path).unwrap()
}

#[test]
fn the_newest_survives_and_older_ones_go() {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotDir::open(dir.path()).unwrap();
    for index in 0..3 {
        write(&store, &meta(1, index), &[index as u8]);
        assert_eq!(files(dir.path()).len(), 1);
    }
    drop(store);
    let store = SnapshotDir::open(dir.path()).unwrap();
    assert_eq!(read(&store.newest().unwrap().unwrap()), [2]);
}

#[test]
fn unfinished_files_mean_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotDir::open(dir.path()).unwrap();
    write(&store, &meta(1, 1), b"good");
    let mut writer = store.begin(&meta(1, 2)).unwrap();
    writer.write_all(&payload(600_000)).unwrap();
    std::mem::forget(writer); // as a crash would
    assert_eq!(files(dir.path()).len(), 2);
    let store = SnapshotDir::open(dir.path()).unwrap();
    assert_eq!(files(dir.path()).len(), 1);
    assert_eq!(read(&store.newest().unwrap().unwrap()), b"good");
}

#[test]
fn a_bad_transfer_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotDir::open(dir.path()).unwrap();
    write(&store, &meta(1, 1), b"good");
    let source = MemorySnapshots::new();
    let bytes = raw(&write(&source, &meta(1, 2), &payload(300_000)));
    let mut flipped = bytes.clone();
    flipped[200_000] ^= 1;
    for (log_id, bytes) in [
        (meta(1, 2).log_id, &flipped[..]),
        (meta(1, 2).log_id, &bytes[..bytes.len() - 1]),
        (meta(1, 2).log_id, &[]),
        (meta(1, 3).log_id, &bytes),
    ] {
        let mut receiver = store.receive(log_id).unwrap();
        receiver.write(0, bytes).unwrap();
        let error = receiver.finish().unwrap_err();
        assert!(matches!(&error, StorageError::Io { source, .. } if source.kind() == ErrorKind::InvalidData));
        assert_eq!(files(dir.path()).len(), 1);
        assert_eq!(read(&store.newest().unwrap().unwrap()), b"good");
    }
}

/// Writes a snapshot after an older one would have been removed, then `damage`s it, then opens again.
fn damaged(damage: impl FnOnce(&mut Vec<u8>)) -> StorageError {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotDir::open(dir.path()).unwrap();
    write(&store, &meta(1, 1), &payload(700_000));
    drop(store);
    let path = files(dir.path()).remove(0);
    let mut bytes = fs::read(&path).unwrap();
    damage(&mut bytes);
    fs::write(&path, &bytes).unwrap();
    let error = SnapshotDir::open(dir.path()).unwrap().newest().unwrap_err();
    assert_eq!(fs::read(&path).unwrap(), bytes, "a damaged snapshot is left alone");
    error
}

#[test]
fn damage_is_found_wherever_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let length = {
        let store = SnapshotDir::open(dir.path()).unwrap();
        write(&store, &meta(1, 1), &payload(700_000)).len_bytes() as usize
    };
    let head = (0..120).step_by(7);
    let frames = [121, 262_000, 263_000, 400_000, 699_000];
    let trailer = length - 16..length;
    for offset in head.chain(frames).chain(trailer) {
        let error = damaged(|bytes| bytes[offset] ^= 0x10);
        assert!(
            matches!(&error, StorageError::Corrupt { detail, .. } if detail.contains("byte ")),
            "byte {offset}: {error}"
        );
    }
}

/// As an older build meets it.
#[test]
fn a_newer_version_is_called_that() {
    let error = damaged(|bytes| {
        bytes[8] = 9;
        let meta_bytes = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        let checksum = crc32fast::hash(&bytes[..16 + meta_bytes]);
        bytes[16 + meta_bytes..20 + meta_bytes].copy_from_slice(&checksum.to_le_bytes());
    });
    assert!(matches!(error, StorageError::Version { found: 9, .. }), "{error}");
    assert!(!error.to_string().contains("aside"), "{error}");
}

#[test]
fn truncation_and_additions_are_found() {
    for keep in [0, 1, 15, 50, 300_000] {
        assert!(matches!(damaged(|bytes| bytes.truncate(keep)), StorageError::Corrupt { .. }), "{keep}");
    }
    assert!(matches!(
        damaged(|bytes| {
            bytes.pop();
        }),
        StorageError::Corrupt { .. }
    ));
    assert!(matches!(damaged(|bytes| bytes.push(0)), StorageError::Corrupt { .. }));
    // Two whole frames exchanged: each is intact, the file is not.
    let exchanged = damaged(|bytes| {
        let frame = 8 + 256 * 1024;
        let begin = bytes.len() - 16 - (700_000 - 2 * 256 * 1024) - 8 - 2 * frame;
        let (first, second) = bytes[begin..begin + 2 * frame].split_at_mut(frame);
        first.swap_with_slice(second);
    });
    assert!(matches!(&exchanged, StorageError::Corrupt { detail, .. } if detail.contains("whole file")));
}

#[test]
fn an_older_snapshot_does_not_stand_in_for_a_damaged_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotDir::open(dir.path()).unwrap();
    write(&store, &meta(1, 1), b"old");
    let copy = fs::read(&files(dir.path())[0]).unwrap();
    let name = files(dir.path())[0].clone();
    write(&store, &meta(1, 2), b"new");
    fs::write(&name, copy).unwrap(); // as if a crash had come before it was removed
    drop(store);
    let newest = files(dir.path()).pop().unwrap();
    fs::write(&newest, b"").unwrap();
    let store = SnapshotDir::open(dir.path()).unwrap();
    assert!(matches!(store.newest(), Err(StorageError::Corrupt { path, .. }) if path == newest));
    assert_eq!(files(dir.path()).len(), 2);
}

#[test]
fn damage_after_opening_is_found_when_read() {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotDir::open(dir.path()).unwrap();
    let handle = write(&store, &meta(1, 1), &payload(700_000));
    let path = files(dir.path()).remove(0);
    let mut bytes = fs::read(&path).unwrap();
    bytes[500_000] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let mut read = Vec::new();
    let error = handle.open().unwrap().1.read_to_end(&mut read).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    assert_eq!(read, payload(700_000)[..256 * 1024], "only intact frames were given out");
}

#[test]
fn only_its_own_file_is_published() {
    let dir = tempfile::tempdir().unwrap();
    let old = SnapshotDir::open(dir.path()).unwrap();
    let mut outliving = old.begin(&meta(1, 5)).unwrap();
    outliving.write_all(b"of the one before").unwrap();
    let theirs = files::list(dir.path()).unwrap().pop().unwrap();

    // The next to open the directory removes what is unfinished, and starts on the same position.
    let new = SnapshotDir::open(dir.path()).unwrap();
    let mut writer = new.begin(&meta(1, 5)).unwrap();
    writer.write_all(b"half").unwrap();
    let mine = files::list(dir.path()).unwrap().pop().unwrap();
    assert_ne!(mine, theirs, "names do not repeat");
    // Even if they did, the wrong file would not be taken.
    fs::hard_link(&mine, &theirs).unwrap();
    outliving.finish().unwrap_err();
    assert!(new.newest().unwrap().is_none());
    assert!(theirs.exists(), "nor removed");
    writer.write_all(b" and half").unwrap();
    assert_eq!(read(&writer.finish().unwrap()), b"half and half");
    assert_eq!(read(&new.newest().unwrap().unwrap()), b"half and half");
}

#[test]
fn large_files_are_synced_on_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotDir::open(dir.path()).unwrap();
    let content = payload(40 * 1024 * 1024);
    let handle = write(&store, &meta(1, 5), &content);
    assert!(read(&handle) == content);
}

#[test]
fn meta_data_of_version_2_is_read() {
    let SnapshotMeta { log_id, clock, membership_log_id, membership, .. } = meta(3, 9);
    let old = (log_id, clock.elapsed_ms, membership_log_id, membership.clone());
    let old = bincode::serde::encode_to_vec(old, bincode::config::standard()).unwrap();
    let mut file = b"QUORSNAP".to_vec();
    file.extend_from_slice(&2_u32.to_le_bytes());
    file.extend_from_slice(&(old.len() as u32).to_le_bytes());
    file.extend_from_slice(&old);
    file.extend_from_slice(&crc32fast::hash(&file).to_le_bytes());
    file.extend_from_slice(&[0; 12]);
    file.extend_from_slice(&crc32fast::hash(&file).to_le_bytes());
    let store = MemorySnapshots::new();
    let mut receiver = store.receive(log_id).unwrap();
    receiver.write(0, &file).unwrap();
    let handle = receiver.finish().unwrap().place().unwrap();
    let history = HistoryEpoch::UNKNOWN;
    let clock = ClusterClock { elapsed_ms: clock.elapsed_ms, ..ClusterClock::default() };
    let (quota_bytes, machines) = (0, SnapshotMachines::default());
    let expected =
        SnapshotMeta { log_id, clock, membership_log_id, membership, history, quota_bytes, machines };
    assert_eq!(handle.meta(), &expected);
    assert_eq!(handle.open().unwrap().0, 2);
}

#[test]
fn what_members_are_to_be_is_kept() {
    let plain = meta(3, 9);
    let membership = plain.membership.clone().with_intents([(1, 1, Intent::Learner), (1, 2, Intent::Voter)]);
    assert_eq!(membership.intents().count(), 2);
    let noted = SnapshotMeta { membership, ..plain };
    let handle = write(&MemorySnapshots::new(), &noted, &payload(10));
    assert_eq!(handle.meta(), &noted);
}

#[test]
fn a_snapshot_says_whose_it_is_only_where_builds_without_versions_could_not_read_it() {
    let plain = meta(3, 9);
    let of = |machine, version| MachineVersion { machine, version };
    let machines = SnapshotMachines { parts: vec![of(0, 2), of(4, 0)], agreed: vec![of(0, 1)] };
    let versioned = SnapshotMeta { machines, ..plain.clone() };
    for (meta, version) in [(plain, 3), (versioned, 4)] {
        let handle = write(&MemorySnapshots::new(), &meta, &payload(10));
        assert_eq!((handle.meta(), handle.open().unwrap().0), (&meta, version));
    }
}
