//! Files that a crash has cut, that are damaged, missing, or not to be read.

use std::fs;
use std::path::{Path, PathBuf};

use super::super::format::{FileHead, HEAD_BYTES, VERSION};
use super::super::*;
use super::{all, append_all, content, keys, open, payload, segments, small};

const SEGMENT_BYTES: u64 = 180;

/// A log of a few files with the keys 1 to 12, and for each byte of each file how many records are before it.
struct Original {
    _dir: tempfile::TempDir,
    files: Vec<(PathBuf, Vec<u8>, Vec<u64>)>,
}

impl Original {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut log = open(dir.path(), SEGMENT_BYTES);
        append_all(&mut log, 1..=12);
        log.sync().unwrap();
        drop(log);
        let mut key = 0;
        let files: Vec<_> = segments(dir.path())
            .into_iter()
            .map(|path| {
                let bytes = fs::read(&path).unwrap();
                let mut before = vec![key; HEAD_BYTES as usize];
                while before.len() < bytes.len() {
                    before.extend(vec![key; 28 + payload(key + 1).len()]);
                    key += 1;
                }
                assert_eq!(before.len(), bytes.len());
                (path.file_name().unwrap().into(), bytes, before)
            })
            .collect();
        assert_eq!(key, 12);
        assert!(files.len() >= 3, "{}", files.len());
        Self { _dir: dir, files }
    }

    /// A copy in which the bytes of one file are others.
    fn with(&self, number: usize, bytes: &[u8]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (at, (name, original, _)) in self.files.iter().enumerate() {
            fs::write(dir.path().join(name), if at == number { bytes } else { original }).unwrap();
        }
        dir
    }
}

/// Opens what is damaged, and finds the first `count` of the records 1 to 12; it goes on from there.
fn cut_to(dir: &Path, count: u64) -> Option<Cut> {
    let (mut log, cut) = SegmentLog::open(dir, small(SEGMENT_BYTES)).unwrap();
    assert_eq!(keys(&log), (1..=count).collect::<Vec<_>>());
    if let Some(cut) = &cut {
        assert_eq!(cut.at_key, (count > 0).then_some(count));
    }
    append_all(&mut log, 20..22);
    log.sync().unwrap();
    drop(log);
    assert_eq!(keys(&open(dir, SEGMENT_BYTES)), (1..=count).chain(20..22).collect::<Vec<_>>());
    cut
}

#[test]
fn a_file_that_ends_anywhere_leaves_a_prefix() {
    let original = Original::new();
    for (number, (name, bytes, before)) in original.files.iter().enumerate() {
        let is_newest = number + 1 == original.files.len();
        for length in 0..bytes.len() {
            let dir = original.with(number, &bytes[..length]);
            let at_boundary = length >= 28 && before[length - 1] != before[length];
            let cut = cut_to(dir.path(), before[length]);
            if is_newest && (length <= 28 || at_boundary) {
                // It ends where a record ends, or without one.
                assert_eq!(cut, None, "{length}");
                continue;
            }
            let cut = cut.unwrap();
            let reason = if is_newest { CutReason::TornTail } else { CutReason::Damage };
            assert_eq!(cut.reason, reason, "{length}");
            if cut.path == dir.path().join(name) {
                let rest: usize = original.files[number + 1..].iter().map(|(_, bytes, _)| bytes.len()).sum();
                assert_eq!(cut.bytes, length as u64 - cut.offset + rest as u64);
            }
        }
    }
}

#[test]
fn no_byte_can_change_unnoticed() {
    let original = Original::new();
    for (number, (name, bytes, before)) in original.files.iter().enumerate() {
        let reason = match number + 1 == original.files.len() {
            true => CutReason::TornTail,
            false => CutReason::Damage,
        };
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            let dir = original.with(number, &damaged);
            let cut = cut_to(dir.path(), before[at]).unwrap();
            assert_eq!((cut.reason, &cut.path), (reason, &dir.path().join(name)), "{at}");
        }
    }
}

#[test]
fn what_follows_the_end_of_a_file_is_cut() {
    let original = Original::new();
    let last = original.files.len() - 1;
    let (_, bytes, _) = &original.files[last];
    // Zeros, a copy of its own last records, the records of another file.
    for rest in [vec![0; 5000], bytes[28..].to_vec(), original.files[0].1[28..].to_vec(), vec![0xff; 40]] {
        let dir = original.with(last, &[bytes.as_slice(), &rest].concat());
        let cut = cut_to(dir.path(), 12).unwrap();
        assert_eq!((cut.reason, cut.offset), (CutReason::TornTail, bytes.len() as u64));
        assert_eq!(cut.bytes, rest.len() as u64);
    }
}

#[test]
fn a_file_that_is_missing_or_another_one_ends_the_log() {
    let original = Original::new();
    let (names, firsts): (Vec<_>, Vec<_>) =
        original.files.iter().map(|(name, _, before)| (name, before[0])).unzip();
    // Of the beginning it cannot be told that it is missing: it may have been purged.
    let dir = original.with(0, &original.files[0].1);
    fs::remove_file(dir.path().join(names[0])).unwrap();
    assert_eq!(keys(&open(dir.path(), SEGMENT_BYTES)), (firsts[1] + 1..=12).collect::<Vec<_>>());

    let dir = original.with(0, &original.files[0].1);
    fs::remove_file(dir.path().join(names[1])).unwrap();
    let cut = cut_to(dir.path(), firsts[1]).unwrap();
    assert_eq!((cut.reason, cut.path), (CutReason::Damage, dir.path().join(names[2])));
    // The bytes of its neighbour, under its name.
    let dir = original.with(1, &original.files[2].1);
    assert_eq!(cut_to(dir.path(), firsts[1]).unwrap().reason, CutReason::Damage);
    // The same keys, of another log: two logs never begin with the same number, nearly.
    let other = Original::new();
    let dir = original.with(1, &other.files[1].1);
    assert_eq!(cut_to(dir.path(), firsts[1]).unwrap().reason, CutReason::Damage);
    let last = original.files.len() - 1;
    let dir = original.with(last, &other.files[last].1);
    assert_eq!(cut_to(dir.path(), firsts[last]).unwrap().reason, CutReason::Damage);
}

#[test]
fn a_file_that_cannot_be_read_is_not_damage() {
    let original = Original::new();
    for (number, (name, bytes, _)) in original.files.iter().enumerate() {
        // Damage before it is no reason either.
        let dir = original.with(0, &original.files[0].1[..50]);
        let path = dir.path().join(name);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        fs::write(path.join("x"), bytes).unwrap();
        fs::write(dir.path().join("lock"), b"").unwrap();
        let before = content(dir.path());
        let error = SegmentLog::open(dir.path(), small(SEGMENT_BYTES)).err().unwrap();
        assert!(matches!(&error, StorageError::Unreadable { path: found, .. } if *found == path), "{error}");
        assert_eq!(content(dir.path()), before, "{number}");
    }
}

#[test]
fn a_later_version_is_left_alone() {
    let original = Original::new();
    for (number, (_, _, before)) in original.files.iter().enumerate().skip(1) {
        let head = FileHead { version: VERSION + 1, base: 0, first_key: before[0] + 1 };
        let dir = original.with(number, &head.encode());
        // Damage before it is no reason either.
        fs::write(dir.path().join(&original.files[0].0), b"x").unwrap();
        fs::write(dir.path().join("lock"), b"").unwrap();
        let before = content(dir.path());
        let error = SegmentLog::open(dir.path(), small(SEGMENT_BYTES)).err().unwrap();
        assert!(matches!(error, StorageError::Version { found: 2, supported: 1, .. }), "{error}");
        assert_eq!(content(dir.path()), before);
    }
}

#[test]
fn other_files_are_not_looked_at() {
    let original = Original::new();
    let dir = original.with(0, &original.files[0].1);
    let names = [
        "1.segment",
        "000000000000000A.segment",
        "+00000000000000a.segment",
        "000000000000000a.segment.unfinished",
        "notes",
    ];
    for name in names {
        fs::write(dir.path().join(name), b"x").unwrap();
    }
    fs::create_dir(dir.path().join("lost+found")).unwrap();
    let mut log = open(dir.path(), SEGMENT_BYTES);
    assert_eq!(all(&log).len(), 12);
    log.clear().unwrap();
    assert!(names.iter().all(|name| dir.path().join(name).exists()));
}

/// It was whole when the log was opened.
#[test]
fn a_reader_gives_out_nothing_that_is_damaged() {
    let original = Original::new();
    let (name, bytes, before) = &original.files[1];
    let dir = original.with(1, bytes);
    let log = open(dir.path(), SEGMENT_BYTES);
    let mut damaged = bytes.clone();
    let at = bytes.len() - 1;
    damaged[at] ^= 4;
    let path = dir.path().join(name);
    fs::write(&path, &damaged).unwrap();
    assert_eq!(keys(&log), (1..=before[at]).collect::<Vec<_>>(), "up to there");
    let error = log.reader().read(before[at] + 1, usize::MAX).unwrap_err();
    let offset = before.iter().position(|count| *count == before[at]).unwrap() as u64;
    assert!(
        matches!(&error, ReadSegmentsError::Damaged { path: found, offset: at } if *found == path && *at == offset),
        "{error}"
    );
    assert_eq!(log.reader().read(12, 0).unwrap()[0].key, 12, "in another file");
    fs::write(&path, &bytes[..at]).unwrap();
    let error = log.reader().read(before[at] + 1, usize::MAX).unwrap_err();
    assert!(matches!(error, ReadSegmentsError::Damaged { .. }), "{error}");
    fs::remove_file(&path).unwrap();
    let error = log.reader().read(before[at] + 1, usize::MAX).unwrap_err();
    assert!(matches!(error, ReadSegmentsError::Storage(_)), "{error}");
}
