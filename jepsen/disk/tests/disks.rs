//! The disks do what they say, to programs that know nothing of them. Needs the right to mount.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // a test file: clippy exempts only the functions marked as tests

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use quorate_disk::{Fault, FaultyDisk, SmallDisk, mounted};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(30);

fn faulty() -> Option<(TempDir, FaultyDisk)> {
    let dir = tempfile::tempdir().unwrap();
    let (backing, path) = (dir.path().join("backing"), dir.path().join("disk"));
    fs::create_dir(&backing).unwrap();
    fs::create_dir(&path).unwrap();
    let disk = mounted(FaultyDisk::mount(&backing, &path))?;
    Some((dir, disk))
}

#[test]
fn a_disk_without_a_fault_is_a_directory() {
    let Some((dir, disk)) = faulty() else { return };
    let below = disk.path().join("below");
    fs::create_dir(&below).unwrap();
    let path = below.join("file");
    let bytes: Vec<u8> = (0..300_000u32).map(|n| n as u8).collect();
    fs::write(&path, &bytes).unwrap();
    assert_eq!(fs::read(dir.path().join("backing/below/file")).unwrap(), bytes);

    let mut file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    file.seek(SeekFrom::Start(100)).unwrap();
    file.write_all(b"abc").unwrap();
    file.sync_all().unwrap();
    file.set_len(103).unwrap();
    fs::rename(&path, disk.path().join("moved")).unwrap();
    fs::rename(&below, disk.path().join("above")).unwrap();
    assert_eq!(fs::read(disk.path().join("moved")).unwrap()[100..], *b"abc");
    let mut names: Vec<_> = fs::read_dir(disk.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["above", "moved"]);

    fs::remove_file(disk.path().join("moved")).unwrap();
    let mut rest = Vec::new();
    file.seek(SeekFrom::Start(100)).unwrap();
    file.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"abc", "an open file outlives its name");
    fs::remove_dir(disk.path().join("above")).unwrap();
    assert_eq!(fs::read_dir(disk.path()).unwrap().count(), 0);
    File::open(disk.path()).unwrap().sync_all().unwrap();
}

#[test]
fn a_stalled_disk_holds_writes_and_answers_reads() {
    let Some((_dir, disk)) = faulty() else { return };
    let (path, other) = (disk.path().join("file"), disk.path().join("other"));
    fs::write(&path, b"before").unwrap();
    fs::write(&other, b"other").unwrap();
    disk.set(Fault::Stall);
    let (done, ended) = mpsc::channel();
    let stalled = path.clone();
    let writer = std::thread::spawn(move || {
        let file = OpenOptions::new().append(true).open(stalled).unwrap();
        let outcome = (&file).write_all(b" after").and_then(|()| file.sync_all());
        done.send(outcome).unwrap();
    });
    let start = Instant::now();
    while disk.held() == 0 {
        assert!(start.elapsed() < DEADLINE);
        std::thread::yield_now();
    }
    // Of another file: the kernel keeps readers away from a page that is being written.
    assert_eq!(fs::read(&other).unwrap(), b"other");
    assert!(ended.try_recv().is_err());
    disk.mend();
    ended.recv_timeout(DEADLINE).unwrap().unwrap();
    writer.join().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"before after");
}

#[test]
fn syncs_fail_and_space_runs_out_on_demand() {
    let Some((_dir, disk)) = faulty() else { return };
    let mut file = File::create(disk.path().join("file")).unwrap();
    disk.set(Fault::FailSyncs);
    file.write_all(b"x").unwrap();
    assert_eq!(file.sync_all().unwrap_err().raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    disk.set(Fault::Full);
    assert_eq!(file.write_all(b"x").unwrap_err().kind(), ErrorKind::StorageFull);
    disk.mend();
    file.write_all(b"x").unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_small_disk_fills_up_and_empties() {
    const BYTES: u64 = 8 * 1024 * 1024;
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = mounted(SmallDisk::mount(dir.path(), BYTES)) else { return };
    assert!(disk.fill("ballast").unwrap() > BYTES / 2);
    let full = fs::write(dir.path().join("file"), b"content").unwrap_err();
    assert_eq!(full.kind(), ErrorKind::StorageFull);
    disk.empty("ballast").unwrap();
    fs::write(dir.path().join("file"), b"content").unwrap();
}
