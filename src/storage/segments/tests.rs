//! What a log of segments keeps, what of it is given up, and each way in which its files can be wrong.

mod beside;
mod damage;
mod full;
mod model;

use std::fs;
use std::path::{Path, PathBuf};

use super::catalogue::INDEX_BYTES;
use super::*;

fn small(segment_bytes: u64) -> SegmentOptions {
    SegmentOptions { segment_bytes }
}

/// A log that is found as it was left.
fn open(dir: &Path, segment_bytes: u64) -> SegmentLog {
    let (log, cut) = SegmentLog::open(dir, small(segment_bytes)).unwrap();
    assert_eq!(cut, None);
    log
}

/// What tests append under a key. Some are empty.
fn payload(key: u64) -> Vec<u8> {
    (0..key % 23).map(|at| (key * 31 + at) as u8).collect()
}

fn record(key: u64) -> SegmentRecord {
    let payload = payload(key).into();
    SegmentRecord { key, count: (key % 5) as u32, time_ms: 1000 + key, payload }
}

fn append(log: &mut SegmentLog, key: u64) -> Result<(), StorageError> {
    let SegmentRecord { key, count, time_ms, payload } = record(key);
    log.append(key, count, time_ms, &payload)
}

fn append_all(log: &mut SegmentLog, keys: impl IntoIterator<Item = u64>) {
    for key in keys {
        append(log, key).unwrap();
    }
}

/// Every record there is, from a reader.
fn all(log: &SegmentLog) -> Vec<SegmentRecord> {
    log.reader().read(0, usize::MAX).unwrap()
}

fn keys(log: &SegmentLog) -> Vec<u64> {
    let records = all(log);
    for found in &records {
        assert_eq!(*found, record(found.key));
    }
    records.iter().map(|record| record.key).collect()
}

/// Segment files, oldest first.
fn segments(dir: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> = paths.filter(|path| format::key_of(path).is_some()).collect();
    paths.sort();
    paths
}

/// Everything in a directory.
fn content(dir: &Path) -> Vec<(PathBuf, Option<Vec<u8>>)> {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> = paths.map(|path| (path.clone(), fs::read(&path).ok())).collect();
    found.sort();
    found
}

#[test]
fn what_was_synced_is_there_again_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/log");
    let mut log = open(&path, 300);
    assert_eq!((log.reach(), all(&log)), (SegmentReach::default(), vec![]));
    append_all(&mut log, (0..40).map(|number| number * number));
    log.sync().unwrap();
    let (reach, records) = (log.reach(), all(&log));
    assert_eq!(log.reader().reach(), reach);
    assert_eq!((reach.first_key, reach.last_key, reach.records), (Some(0), Some(39 * 39), 40));
    assert_eq!(reach.count, records.iter().map(|record| u64::from(record.count)).sum::<u64>());
    let files = segments(&path);
    assert!(files.len() > 3, "{files:?}");
    let on_disk: u64 = files.iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    assert_eq!(reach.bytes, on_disk);
    assert!(files.iter().all(|path| fs::metadata(path).unwrap().len() <= 300));
    drop(log);

    let mut log = open(&path, 300);
    assert_eq!((log.reach(), &all(&log)), (reach, &records));
    append_all(&mut log, 2000..2010);
    log.sync().unwrap();
    drop(log);
    let log = open(&path, 300);
    assert_eq!(keys(&log).len(), 50);
    assert_eq!(log.reach().last_key, Some(2009));
}

#[test]
fn readers_see_what_is_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path(), 10_000);
    let reader = log.reader();
    append_all(&mut log, 1..4);
    assert_eq!(reader.reach(), SegmentReach::default());
    assert_eq!((log.reach().records, log.reach().last_key), (3, Some(3)));
    log.flush().unwrap();
    assert_eq!((reader.reach(), reader.read(2, usize::MAX).unwrap().len()), (log.reach(), 2));
    append_all(&mut log, 4..5);
    assert_eq!((reader.reach().last_key, log.reach().last_key), (Some(3), Some(4)));
    assert_eq!(reader.read(4, usize::MAX).unwrap(), []);
    // What is buffered when it is dropped is lost, and only that.
    drop(log);
    assert_eq!(keys(&open(dir.path(), 10_000)), [1, 2, 3]);
}

#[test]
fn a_read_takes_what_there_is_room_for_and_at_least_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path(), 2_000_000);
    // Around and above what is read at once.
    let sizes = [0, 1, 100_000, 262_116, 262_144, 600_000, 0, 1_400_000, 5, 300_000];
    let bytes = |size: usize| (0..size).map(|at| (at * 7 + at / 253) as u8).collect::<Vec<_>>();
    for (number, size) in sizes.into_iter().enumerate() {
        log.append(10 * number as u64 + 5, 1, 0, &bytes(size)).unwrap();
    }
    log.flush().unwrap();
    assert!(segments(dir.path()).len() > 1);
    let reader = log.reader();
    for room in [0, 29, 100_000, 300_000, 700_000, 10_000_000] {
        let mut from = 0;
        let mut found = Vec::new();
        while let Some(last) = {
            let read = reader.read(from, room).unwrap();
            let taken: usize = read.iter().map(|record| record.payload.len() + 28).sum();
            assert!(taken <= room || read.len() == 1, "{taken} of {room}");
            found.extend(read);
            found.last().map(|record| record.key).filter(|last| *last >= from)
        } {
            from = last + 1;
        }
        assert_eq!(found.iter().map(|record| record.payload.len()).collect::<Vec<_>>(), sizes);
        assert!(found.iter().all(|record| record.payload == bytes(record.payload.len())));
    }
    // No key at, between and after those that there are.
    assert_eq!(reader.read(26, 0).unwrap()[0].key, 35);
    assert_eq!(reader.read(95, 0).unwrap()[0].key, 95);
    assert_eq!(reader.read(96, 0).unwrap(), []);
}

#[test]
fn reading_from_a_key_begins_close_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path(), 4_000_000);
    for key in 0..3000 {
        log.append(key, 1, 0, &[key as u8; 1000]).unwrap();
        if key % 7 == 0 {
            log.flush().unwrap();
        }
    }
    log.sync().unwrap();
    let entries = |log: &SegmentLog| {
        let shared = log.reader().shared;
        let catalogue = shared.lock();
        let segment = catalogue.oldest().unwrap();
        for key in 0..3000 {
            let (place, offset) = (segment.place(key).offset, 28 + key * 1028);
            assert!(place <= offset && offset - place < INDEX_BYTES + 1028, "{key}: {place}");
        }
        segment.index.clone()
    };
    let before = entries(&log);
    assert!(before.len() as u64 <= log.reach().bytes / INDEX_BYTES, "{}", before.len());
    for key in [0, 1, 63, 64, 65, 1500, 2999] {
        assert_eq!(log.reader().read(key, 1).unwrap()[0].key, key);
    }
    drop(log);
    assert_eq!(entries(&open(dir.path(), 4_000_000)), before);
}

#[test]
fn one_writer_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path(), 1000);
    let second = SegmentLog::open(dir.path(), small(1000));
    assert!(matches!(second, Err(StorageError::InUse { .. })));
    drop(log);
    open(dir.path(), 1000);
}

#[test]
fn after_everything_was_cleared_any_key_may_follow() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path(), 200);
    let reader = log.reader();
    for again in [false, true] {
        append_all(&mut log, 100..140);
        if again {
            log.sync().unwrap();
        }
        log.clear().unwrap();
        assert_eq!((log.reach(), reader.reach()), Default::default());
        assert_eq!(segments(dir.path()), Vec::<PathBuf>::new());
        append_all(&mut log, 5..9);
        log.flush().unwrap();
        assert_eq!(keys(&log), [5, 6, 7, 8]);
        assert_eq!(reader.read(0, usize::MAX).unwrap(), all(&log));
        log.clear().unwrap();
    }
    append_all(&mut log, 7..8);
    log.sync().unwrap();
    drop(log);
    assert_eq!(keys(&open(dir.path(), 200)), [7]);
}

#[test]
#[should_panic(expected = "keys of records rise")]
fn keys_rise() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path(), 200);
    append_all(&mut log, [5, 5]);
}

#[test]
fn a_record_that_is_too_long_is_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path(), u64::MAX);
    let bytes = vec![7; format::MAX_PAYLOAD_BYTES + 1];
    let error = log.append(1, 1, 0, &bytes).unwrap_err();
    assert!(error.to_string().contains("64 MiB"), "{error}");
    log.append(1, 1, 0, &bytes[1..]).unwrap();
    log.append(2, 1, 0, b"next").unwrap();
    log.sync().unwrap();
    drop(log);
    let log = open(dir.path(), u64::MAX);
    assert_eq!(log.reader().read(1, 0).unwrap()[0].payload, &bytes[1..]);
    assert_eq!(log.reader().read(2, 0).unwrap()[0].payload, &b"next"[..]);
}

/// Records of 100 bytes, with two operations each, one per second.
fn kept(limits: &KeepLimits, now_ms: u64) -> (SegmentReach, usize) {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path(), 2000);
    log.keep(limits, 0).unwrap();
    for key in 0..200 {
        log.append(key, 2, key * 1000, &[1; 72]).unwrap();
        log.keep(limits, 0).unwrap();
    }
    log.sync().unwrap();
    log.keep(limits, now_ms).unwrap();
    let (reach, files) = (log.reach(), segments(dir.path()).len());
    let records = all(&log);
    assert_eq!(records.first().map(|record| record.key), reach.first_key);
    assert_eq!((records.len() as u64, reach.last_key), (reach.records, Some(199)));
    assert_eq!(reach.records, 200 - reach.first_key.unwrap());
    drop(log);
    assert_eq!(open(dir.path(), 2000).reach(), reach);
    (reach, files)
}

#[test]
fn old_records_go_by_number_by_size_and_by_age() {
    let (reach, files) = kept(&KeepLimits::ALL, u64::MAX);
    assert_eq!((reach.records, files), (200, 11));
    // Within the limit, and by less than a 16th of it.
    let (reach, files) = kept(&KeepLimits { max_count: 160, ..KeepLimits::ALL }, u64::MAX);
    assert!(reach.count <= 160 && reach.count >= 150, "{reach:?}");
    assert_eq!(files, 16);
    let (reach, _) = kept(&KeepLimits { max_bytes: 8000, ..KeepLimits::ALL }, u64::MAX);
    assert!(reach.bytes <= 8000 && reach.bytes > 7500, "{reach:?}");
    // What is 50 seconds old stays, with what is in a segment with it.
    let limits = KeepLimits { max_age_ms: 50_000, ..KeepLimits::ALL };
    let (reach, _) = kept(&limits, 200_000);
    assert!((100..=150).contains(&reach.first_key.unwrap()), "{reach:?}");
    assert_eq!(kept(&limits, 0).0.records, 200);
    // The newest segment stays, whatever is in it.
    for limits in [
        KeepLimits { max_count: 0, ..KeepLimits::ALL },
        KeepLimits { max_bytes: 0, ..KeepLimits::ALL },
        KeepLimits { max_age_ms: 1, ..KeepLimits::ALL },
    ] {
        let (reach, files) = kept(&limits, u64::MAX);
        assert_eq!((reach.last_key, files), (Some(199), 1));
    }
}

#[test]
fn what_somebody_needs_stays_within_bounds() {
    let held = KeepLimits { max_count: 20, held_from: 100, max_held_bytes: u64::MAX, ..KeepLimits::ALL };
    let (reach, _) = kept(&held, u64::MAX);
    assert!((80..=100).contains(&reach.first_key.unwrap()), "{reach:?}");
    let aged = KeepLimits { max_age_ms: 1, max_count: u64::MAX, ..held };
    assert!((80..=100).contains(&kept(&aged, u64::MAX).0.first_key.unwrap()));
    let (reach, _) = kept(&KeepLimits { max_held_bytes: 5000, ..held }, u64::MAX);
    assert!(reach.bytes <= 5000 && reach.first_key > Some(140), "{reach:?}");
    assert!(kept(&KeepLimits { held_from: u64::MAX, ..held }, u64::MAX).0.first_key > Some(170));
}

/// Or a crash would leave nothing at all of a log of which something was durable.
#[test]
fn what_is_durable_goes_only_when_something_newer_is() {
    let dir = tempfile::tempdir().unwrap();
    let limits = KeepLimits { max_count: 0, max_bytes: 0, max_age_ms: 1, ..KeepLimits::ALL };
    let mut log = open(dir.path(), 100);
    for key in [1, 2, 3, 4] {
        log.append(key, 1, 0, &[0; 70]).unwrap();
    }
    for _ in 0..2 {
        log.keep(&limits, u64::MAX).unwrap();
        assert_eq!((log.reach().first_key, log.reader().reach().first_key), (Some(3), Some(3)));
        log.flush().unwrap();
    }
    fs::File::options().write(true).open(&segments(dir.path())[1]).unwrap().set_len(0).unwrap();
    drop(log);
    let mut log = open(dir.path(), 100);
    assert_eq!(log.reach().last_key, Some(3));
    log.append(4, 1, 0, &[0; 70]).unwrap();
    log.sync().unwrap();
    log.keep(&limits, u64::MAX).unwrap();
    assert_eq!((log.reach().first_key, segments(dir.path()).len()), (Some(4), 1));
}

/// A log that grows slowly: its segments would never be full.
#[test]
fn a_segment_that_is_old_is_ended_early() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path(), 1_000_000);
    let limits = KeepLimits { max_age_ms: 16_000, ..KeepLimits::ALL };
    for key in 0..100 {
        log.keep(&limits, key * 1000).unwrap();
        log.append(key, 1, key * 1000, b"x").unwrap();
    }
    log.sync().unwrap();
    log.keep(&limits, 100_000).unwrap();
    let first = log.reach().first_key.unwrap();
    assert!((80..=84).contains(&first), "{first}");
}

/// What this build writes, later ones read.
#[test]
fn bytes_of_a_small_log() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path(), 110);
    log.chain = 0x1234_5678;
    log.append(0x0102, 3, 0x0a0b_0c0d, b"first").unwrap();
    log.append(0x0103, 0, 0x0a0b_0c0e, b"").unwrap();
    log.append(0x0200, 1, 0x0a0b_0c0f, b"in the next file").unwrap();
    log.sync().unwrap();
    let hex = |bytes: Vec<u8>| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let files: Vec<_> = segments(dir.path())
        .into_iter()
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), hex(fs::read(path).unwrap())))
        .collect();
    let expected = [
        ("0000000000000102.segment", FIRST_FILE.concat()),
        ("0000000000000200.segment", SECOND_FILE.concat()),
    ];
    assert_eq!(files, expected.map(|(name, bytes)| (name.to_owned(), bytes)));
}

/// Magic, version, base, first key, checksum; then records: checksum, length, key, time, count, payload.
const FIRST_FILE: &[&str] = &[
    "51554f525345474d",
    "01000000",
    "78563412",
    "0201000000000000",
    "5a35c6af",
    "d160e23d",
    "05000000",
    "0201000000000000",
    "0d0c0b0a00000000",
    "03000000",
    "6669727374",
    "43b7fa90",
    "00000000",
    "0301000000000000",
    "0e0c0b0a00000000",
    "00000000",
];
const SECOND_FILE: &[&str] = &[
    "51554f525345474d",
    "01000000",
    "43b7fa90",
    "0002000000000000",
    "0cd0de71",
    "ec691dd0",
    "10000000",
    "0002000000000000",
    "0f0c0b0a00000000",
    "01000000",
    "696e20746865206e6578742066696c65",
];
