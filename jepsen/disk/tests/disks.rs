//! The disks do what they say, to programs that know nothing of them. Needs the right to mount.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)] // a test file: clippy exempts only the functions marked as tests

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use quorate_disk::{Cut, Fault, FaultyDisk, ForgetfulDisk, Names, Part, Read, SmallDisk, mounted};
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

fn forgetful(names: Names) -> Option<(TempDir, ForgetfulDisk)> {
    let dir = tempfile::tempdir().unwrap();
    let disk = mounted(ForgetfulDisk::mount(dir.path(), names))?;
    Some((dir, disk))
}

fn is_eio(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

#[test]
fn a_forgetful_disk_is_a_directory_while_the_power_is_on() {
    let Some((_dir, disk)) = forgetful(Names::WithFile) else { return };
    let below = disk.path().join("below");
    fs::create_dir(&below).unwrap();
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
    fs::write(below.join("file"), &bytes).unwrap();
    assert_eq!(fs::read(below.join("file")).unwrap(), bytes);
    let mut file = OpenOptions::new().read(true).write(true).open(below.join("file")).unwrap();
    file.seek(SeekFrom::Start(100)).unwrap();
    file.write_all(b"abc").unwrap();
    file.set_len(103).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 103);
    fs::rename(below.join("file"), disk.path().join("moved")).unwrap();
    assert_eq!(fs::read(disk.path().join("moved")).unwrap()[100..], *b"abc");
    fs::remove_dir(&below).unwrap();
    let names: Vec<_> = fs::read_dir(disk.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["moved"]);
    assert_eq!(fs::write(&below, b"").map(|()| fs::remove_file(&below).unwrap()).ok(), Some(()));
    assert_eq!(fs::remove_file(&below).unwrap_err().kind(), ErrorKind::NotFound);
    File::create(disk.path().join("moved")).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 0, "truncated under its other handle");
}

/// With the control: what nobody has synced is gone.
#[test]
fn a_power_cut_keeps_what_was_synced_and_nothing_else() {
    for names in [Names::WithFile, Names::WithDirectoryOnly] {
        let Some((_dir, disk)) = forgetful(names) else { return };
        let (synced, unsynced) = (disk.path().join("synced"), disk.path().join("unsynced"));
        let mut file = File::create(&synced).unwrap();
        file.write_all(b"durable").unwrap();
        file.sync_all().unwrap();
        File::open(disk.path()).unwrap().sync_all().unwrap();
        file.write_all(b" or not").unwrap();
        fs::write(&unsynced, b"content").unwrap();
        let before = disk.image();

        disk.cut_after(1);
        file.write_all(b"!").unwrap();
        assert!(!disk.is_off());
        assert!(is_eio(&file.write_all(b"?").unwrap_err()));
        assert!(disk.is_off());
        assert!(is_eio(&fs::read(&synced).unwrap_err()), "nothing answers without power");
        drop(file);
        disk.cut(Cut::DropUnsynced, 1);
        assert!(!disk.is_off());
        assert_eq!(fs::read(&synced).unwrap(), b"durable");
        assert_eq!(fs::read(&unsynced).unwrap_err().kind(), ErrorKind::NotFound);

        disk.restore(&before);
        assert_eq!(fs::read(&synced).unwrap(), b"durable or not");
        assert_eq!(fs::read(&unsynced).unwrap(), b"content");
    }
}

#[test]
fn one_read_fails_and_the_next_one_succeeds() {
    let Some((_dir, disk)) = forgetful(Names::WithFile) else { return };
    let path = disk.path().join("file");
    fs::write(&path, [7; 100]).unwrap();
    let file = File::open(&path).unwrap();
    let mut byte = [0];
    disk.count_reads(Some(1));
    file.read_exact_at(&mut byte, 3).unwrap();
    assert!(is_eio(&file.read_exact_at(&mut byte, 4).unwrap_err()));
    file.read_exact_at(&mut byte, 4).unwrap();
    let read = |part| Read { path: "file".into(), part };
    assert_eq!(disk.reads(), [3, 4, 4].map(|offset| read(Part::Bytes { offset, count: 1 })));

    disk.count_reads(Some(0));
    let listed = fs::read_dir(disk.path()).and_then(|entries| entries.collect::<Result<Vec<_>, _>>());
    assert!(is_eio(&listed.unwrap_err()), "names are read too");
    assert_eq!(disk.reads(), [Read { path: "".into(), part: Part::Names }]);
    disk.count_reads(None);
    assert_eq!(fs::read_dir(disk.path()).unwrap().count(), 1);

    disk.count_reads(Some(0));
    // Of an open file: by its name the kernel would ask twice.
    assert!(is_eio(&file.metadata().unwrap_err()), "and what a file is");
    assert_eq!(disk.reads(), [read(Part::Attributes)]);
    assert_eq!(fs::metadata(&path).unwrap().len(), 100);
}

#[test]
fn one_change_fails_and_the_next_one_succeeds() {
    let Some((_dir, disk)) = forgetful(Names::WithFile) else { return };
    let mut file = File::create(disk.path().join("file")).unwrap();
    disk.count_changes(Some(1));
    file.write_all(b"one").unwrap();
    assert!(is_eio(&file.sync_all().unwrap_err()));
    file.sync_all().unwrap();
    assert_eq!(disk.changes(), 3);
    disk.count_changes(None);
    file.write_all(b"two").unwrap();
    assert_eq!(disk.changes(), 1);
}
