//! Disks that are full, or fail.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::super::writer::SegmentDisk;
use super::super::*;
use super::{append, append_all, keys, open, record, segments, small};
use crate::storage::files;

/// A disk with so much room, that fails as it is told.
#[derive(Clone)]
struct BadDisk(Arc<Mutex<Badness>>);

struct Badness {
    room: usize,
    fail_sync: bool,
    fail_directory: bool,
    fail_create: bool,
    fail_remove: bool,
    /// Of files and directories, those that failed included.
    syncs: u32,
}

impl BadDisk {
    fn with_room(room: usize) -> Self {
        let (fail_sync, fail_directory, fail_create, fail_remove) = (false, false, false, false);
        Self(Arc::new(Mutex::new(Badness {
            room,
            fail_sync,
            fail_directory,
            fail_create,
            fail_remove,
            syncs: 0,
        })))
    }

    fn set(&self, change: impl FnOnce(&mut Badness)) {
        change(&mut self.0.lock().unwrap());
    }

    fn syncs(&self) -> u32 {
        self.0.lock().unwrap().syncs
    }

    fn open(&self, dir: &Path, segment_bytes: u64) -> SegmentLog {
        SegmentLog::open_on(dir, small(segment_bytes), Box::new(self.clone())).unwrap().0
    }
}

fn fault(fails: bool, number: i32) -> io::Result<()> {
    if fails { Err(io::Error::from_raw_os_error(number)) } else { Ok(()) }
}

impl SegmentDisk for BadDisk {
    fn write(&mut self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut bad = self.0.lock().unwrap();
        let taken = bytes.len().min(bad.room);
        file.write_all_at(&bytes[..taken], offset)?;
        bad.room -= taken;
        fault(taken < bytes.len(), libc::ENOSPC)
    }

    fn sync(&mut self, file: &File) -> io::Result<()> {
        let mut bad = self.0.lock().unwrap();
        bad.syncs += 1;
        fault(bad.fail_sync, libc::EIO)?;
        file.sync_data()
    }

    fn sync_directory(&mut self, path: &Path) -> Result<(), StorageError> {
        let mut bad = self.0.lock().unwrap();
        bad.syncs += 1;
        fault(bad.fail_directory, libc::EIO).map_err(|error| files::io_error("cannot sync", path, error))
    }

    fn create(&mut self, path: &Path) -> io::Result<File> {
        fault(self.0.lock().unwrap().fail_create, libc::ENOSPC)?;
        File::options().read(true).write(true).create(true).truncate(true).open(path)
    }

    fn remove(&mut self, path: &Path) -> Result<(), StorageError> {
        let fails = self.0.lock().unwrap().fail_remove;
        fault(fails, libc::EIO).map_err(|error| files::io_error("cannot remove", path, error))?;
        files::remove(path)
    }
}

fn is_full(error: &StorageError) -> bool {
    matches!(error, StorageError::Io { source, .. } if files::is_full(source.kind()))
}

/// With room for so many bytes: within heads, payloads, and between them.
#[test]
fn what_a_full_disk_did_not_take_is_written_when_there_is_room() {
    for room in (0..700).step_by(5) {
        for crash in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let disk = BadDisk::with_room(room);
            let mut log = disk.open(dir.path(), 200);
            let mut refused = 0;
            let mut durable = None;
            for key in 1..=12 {
                if let Err(error) = append(&mut log, key) {
                    assert!(is_full(&error), "{error}");
                    refused = key;
                    break;
                }
                match log.sync() {
                    Ok(()) => durable = Some(key),
                    Err(error) => assert!(is_full(&error), "{error}"),
                }
                assert_eq!(log.reader().reach().last_key, durable);
                let on_disk: u64 =
                    segments(dir.path()).iter().map(|path| fs::metadata(path).unwrap().len()).sum();
                assert_eq!(log.reader().reach().bytes, on_disk, "cut back to the last whole record");
            }
            if crash {
                drop(log);
                let log = open(dir.path(), 200);
                assert_eq!(keys(&log), (1..=durable.unwrap_or(0)).collect::<Vec<_>>());
                continue;
            }
            disk.set(|disk| disk.room = usize::MAX);
            let rest = if refused == 0 { 13 } else { refused };
            append_all(&mut log, rest..=14);
            log.sync().unwrap();
            assert_eq!(keys(&log), (1..=14).collect::<Vec<_>>());
            drop(log);
            assert_eq!(keys(&open(dir.path(), 200)), (1..=14).collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_buffer_that_cannot_be_written_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let disk = BadDisk::with_room(0);
    let mut log = disk.open(dir.path(), u64::MAX);
    let mut taken = 0;
    while log.append(taken, 1, 0, &[7; 10_000]).is_ok() {
        taken += 1;
        assert!(taken < 1000);
    }
    assert!(log.reach().bytes < 300_000, "{:?}", log.reach());
    assert_eq!((log.reach().records, log.reader().reach().records), (taken, 0));
    for _ in 0..3 {
        assert!(is_full(&log.append(taken, 1, 0, &[7; 10_000]).unwrap_err()));
    }
    assert_eq!(log.reach().records, taken);
    disk.set(|disk| disk.room = usize::MAX);
    log.append(taken, 1, 0, &[7; 10_000]).unwrap();
    log.sync().unwrap();
    drop(log);
    assert_eq!(open(dir.path(), u64::MAX).reach().records, taken + 1);
}

#[test]
fn a_segment_that_cannot_be_begun_is_begun_later() {
    let dir = tempfile::tempdir().unwrap();
    let disk = BadDisk::with_room(usize::MAX);
    let mut log = disk.open(dir.path(), 100);
    append_all(&mut log, [22]);
    disk.set(|disk| disk.fail_create = true);
    for _ in 0..2 {
        assert!(is_full(&append(&mut log, 45).unwrap_err()));
        assert_eq!((log.reach().last_key, keys(&log)), (Some(22), vec![22]));
        log.sync().unwrap();
    }
    disk.set(|disk| disk.fail_create = false);
    append_all(&mut log, [44, 45]);
    log.sync().unwrap();
    drop(log);
    assert_eq!(keys(&open(dir.path(), 100)), [22, 44, 45]);
}

/// Every call fails from then on, and nothing is synced again.
fn is_dead(log: &mut SegmentLog, disk: &BadDisk) {
    disk.set(|disk| (disk.fail_sync, disk.fail_directory) = (false, false));
    let syncs = disk.syncs();
    for outcome in [
        append(log, 1000),
        log.flush(),
        log.sync(),
        log.sync(),
        log.keep(&KeepLimits { max_count: 0, ..KeepLimits::ALL }, 0),
        log.clear(),
    ] {
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains("a sync has failed before"), "{error}");
    }
    assert_eq!(disk.syncs(), syncs);
}

#[test]
fn a_sync_that_failed_is_final() {
    for failure in 0..5 {
        let dir = tempfile::tempdir().unwrap();
        let disk = BadDisk::with_room(usize::MAX);
        let mut log = disk.open(dir.path(), 200);
        append_all(&mut log, 1..10);
        log.sync().unwrap();
        append_all(&mut log, 10..11);
        disk.set(|disk| if failure < 2 { disk.fail_sync = true } else { disk.fail_directory = true });
        let error = match failure {
            0 => log.sync(),
            // In the middle: a segment is ended, or begun.
            1 | 2 => (11..50).try_for_each(|key| append(&mut log, key)),
            3 => log.keep(&KeepLimits { max_count: 1, ..KeepLimits::ALL }, 0),
            _ => log.clear(),
        };
        let error = error.unwrap_err().to_string();
        assert!(error.contains("cannot sync"), "{error}");
        is_dead(&mut log, &disk);
        // Readers go on, and so does who opens it again.
        let read = log.reader().read(0, usize::MAX).unwrap();
        assert!(read.iter().all(|found| *found == record(found.key)));
        drop(log);
        let found = keys(&open(dir.path(), 200));
        assert!(found.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{found:?}");
        assert!(failure >= 3 || found.starts_with(&[1, 2, 3, 4, 5, 6, 7, 8, 9]), "{found:?}");
    }
}

#[test]
fn nothing_new_is_synced_twice() {
    let dir = tempfile::tempdir().unwrap();
    let disk = BadDisk::with_room(usize::MAX);
    let mut log = disk.open(dir.path(), 10_000);
    append_all(&mut log, 1..5);
    assert_eq!(disk.syncs(), 1, "the directory, for the name of the file");
    for _ in 0..3 {
        log.sync().unwrap();
        assert_eq!(disk.syncs(), 2);
    }
    append_all(&mut log, 5..6);
    log.flush().unwrap();
    assert_eq!(disk.syncs(), 2);
    log.sync().unwrap();
    assert_eq!(disk.syncs(), 3);
}

#[test]
fn a_file_that_cannot_be_removed_is_removed_before_more_go_or_come() {
    let dir = tempfile::tempdir().unwrap();
    let disk = BadDisk::with_room(usize::MAX);
    let mut log = disk.open(dir.path(), 200);
    append_all(&mut log, 1..40);
    log.sync().unwrap();
    let before = segments(dir.path()).len();
    disk.set(|disk| disk.fail_remove = true);
    let limits = KeepLimits { max_count: 40, ..KeepLimits::ALL };
    log.keep(&limits, 0).unwrap_err();
    let first = log.reach().first_key.unwrap();
    assert!(first > 1 && keys(&log)[0] == first);
    assert_eq!(segments(dir.path()).len(), before);
    // Whoever opens it now has all of it, without a gap.
    let copy = tempfile::tempdir().unwrap();
    for path in segments(dir.path()) {
        fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
    }
    assert_eq!(keys(&open(copy.path(), 200)), (1..40).collect::<Vec<_>>());

    log.clear().unwrap_err();
    assert_eq!(log.reach(), SegmentReach::default());
    append(&mut log, 7).unwrap_err();
    disk.set(|disk| disk.fail_remove = false);
    append_all(&mut log, 7..9);
    log.sync().unwrap();
    assert_eq!(keys(&log), [7, 8]);
    drop(log);
    assert_eq!(keys(&open(dir.path(), 200)), [7, 8]);
}
