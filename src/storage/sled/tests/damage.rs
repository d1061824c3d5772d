//! Damage: found, named, and left alone.

use super::record::HEADER_BYTES;
use super::*;

const ENTRIES: u64 = 60;

/// A closed log with small and large entries, written in several flushes, and partly purged.
fn sample() -> (Home, Vec<Entry>) {
    let home = Home::new();
    let store = open(&home.log()).unwrap();
    let entries: Vec<_> =
        (0..ENTRIES).map(|index| command(1, index, if index % 9 == 5 { 150_000 } else { 700 })).collect();
    for batch in entries.chunks(7) {
        append(&store, batch.to_vec()).unwrap();
    }
    save_vote(&store, 4).unwrap();
    purge(&store, LogId::new(1, 9)).unwrap();
    (home, entries[10..].to_vec())
}

fn corrupt(directory: &Path) -> String {
    let first = match open(directory) {
        Err(StorageError::Corrupt { detail, .. }) => detail,
        other => panic!("{other:?}"),
    };
    assert!(matches!(open(directory), Err(StorageError::Corrupt { .. })), "and again");
    first
}

#[test]
fn a_changed_record_is_corrupt() {
    let (home, _) = sample();
    let all = records(&raw(&home.log()), 0);
    for (key, _) in all {
        let copy = home.copy();
        {
            let trees = raw(&copy.log());
            let mut record = trees.log.get(key.encode()).unwrap().unwrap().to_vec();
            let middle = record.len() / 2;
            record[middle] ^= 4;
            trees.log.insert(key.encode(), record).unwrap();
        }
        assert!(corrupt(&copy.log()).contains(&format!("{key}: its checksum")));
    }
}

#[test]
fn a_missing_record_is_corrupt() {
    let (home, _) = sample();
    let all = records(&raw(&home.log()), 0);
    for (key, _) in all {
        let copy = home.copy();
        raw(&copy.log()).log.remove(key.encode()).unwrap();
        corrupt(&copy.log());
    }
}

#[test]
fn a_stale_record_is_corrupt() {
    let home = Home::new();
    let store = open(&home.log()).unwrap();
    append(&store, (0..4).map(|index| command(1, index, 10)).collect()).unwrap();
    append(&store, (4..8).map(|index| command(1, index, 10)).collect()).unwrap();
    drop(store);
    let stale = raw(&home.log()).log.get(Key::first(4).encode()).unwrap().unwrap();
    let store = open(&home.log()).unwrap();
    store.truncate(Some(LogId::new(1, 3)), completion().0);
    append(&store, (4..8).map(|index| command(2, index, 10)).collect()).unwrap();
    append(&store, (8..12).map(|index| command(2, index, 10)).collect()).unwrap();
    drop(store);
    let copy = home.copy();
    raw(&copy.log()).log.insert(Key::first(4).encode(), stale.clone()).unwrap();
    assert!(corrupt(&copy.log()).contains("does not follow"));
    // The same without a record after it: then only the hard state can know.
    {
        let trees = raw(&home.log());
        trees.log.remove(Key::first(8).encode()).unwrap();
        trees.log.insert(Key::first(4).encode(), stale).unwrap();
        let hard_state = trees.meta.get(hard_state::KEY).unwrap().unwrap();
        let hard_state = hard_state::HardState::decode(&hard_state).unwrap();
        disk::write_hard_state(&trees, &hard_state::HardState { last: Some(LogId::new(2, 7)), ..hard_state })
            .unwrap();
    }
    assert!(corrupt(&home.log()).contains("not the one that was last"));
}

#[test]
fn a_damaged_or_missing_ledger_is_corrupt() {
    let (home, _) = sample();
    let copy = home.copy();
    raw(&copy.log()).meta.remove(hard_state::KEY).unwrap();
    assert!(corrupt(&copy.log()).contains("ledger is missing"));
    {
        let trees = raw(&home.log());
        let mut hard_state = trees.meta.get(hard_state::KEY).unwrap().unwrap().to_vec();
        hard_state[20] ^= 1;
        trees.meta.insert(hard_state::KEY, hard_state).unwrap();
    }
    assert!(corrupt(&home.log()).contains("ledger is damaged"));
}

#[test]
fn a_newer_record_is_called_that() {
    let (home, _) = sample();
    {
        let trees = raw(&home.log());
        let (key, record) = records(&trees, 0).pop().unwrap();
        let mut record = record.to_vec();
        record[0] = 9;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&record[..4]);
        hasher.update(&record[8..]);
        record[4..8].copy_from_slice(&hasher.finalize().to_le_bytes());
        assert!(record.len() > HEADER_BYTES);
        trees.log.insert(key.encode(), record).unwrap();
    }
    assert!(matches!(open(&home.log()), Err(StorageError::Version { found: 9, .. })));
}

/// A large entry of which only some parts are there, after the last one that was flushed.
fn torn(index: u64, kept: impl Fn(u16) -> bool) -> Home {
    let donor = Home::new();
    let store = open(&donor.log()).unwrap();
    append(&store, (0..=index).map(|index| command(1, index, 200_000)).collect()).unwrap();
    drop(store);
    let home = Home::new();
    append(&open(&home.log()).unwrap(), (0..10).map(|index| command(1, index, 10)).collect()).unwrap();
    let parts = records(&raw(&donor.log()), index);
    assert_eq!(parts.len(), 4);
    let trees = raw(&home.log());
    for (key, record) in parts.into_iter().filter(|(key, _)| kept(key.part)) {
        trees.log.insert(key.encode(), record).unwrap();
    }
    drop(trees);
    home
}

#[test]
fn an_incomplete_entry_at_the_end_is_cut() {
    for parts in 1..4 {
        let home = torn(10, |part| part < parts);
        let store = open(&home.log()).unwrap();
        assert_eq!(store.bounds().last, Some(LogId::new(1, 9)));
        append(&store, vec![command(2, 10, 200_000)]).unwrap();
        drop(store);
        let store = open_without_tail(&home.log()).unwrap();
        assert_eq!(store.read(10, 11, 0).unwrap(), [command(2, 10, 200_000)]);
    }
    // A whole one is not.
    let store = open(&torn(10, |_| true).log()).unwrap();
    assert_eq!(store.bounds().last, Some(LogId::new(1, 10)));
}

#[test]
fn an_incomplete_entry_anywhere_else_is_corrupt() {
    corrupt(&torn(10, |part| part != 1).log());
    corrupt(&torn(10, |part| part != 0).log());
    corrupt(&torn(12, |part| part < 2).log());
    // At the end, but it had been flushed.
    let home = Home::new();
    append(&open(&home.log()).unwrap(), vec![command(1, 0, 200_000)]).unwrap();
    raw(&home.log()).log.remove(Key { index: 0, part: 3 }.encode()).unwrap();
    corrupt(&home.log());
}

/// Damages bytes all over sled's files. Whatever comes of it, it must not be another log.
#[test]
fn flipped_bytes_never_show_as_data() {
    let (home, entries) = sample();
    // As it is after a kill: not closed, so that sled has to recover.
    let killed = {
        let store = open(&home.log()).unwrap();
        save_vote(&store, 5).unwrap();
        append(&store, vec![command(1, ENTRIES, 700)]).unwrap();
        home.copy()
    };
    let mut entries = entries;
    entries.push(command(1, ENTRIES, 700));
    /// Bytes damaged in each of the files.
    const FLIPS: u64 = 40;
    let (mut refused, mut intact) = (0, 0);
    for path in files::list(&killed.log()).unwrap().into_iter().filter(|path| path.is_file()) {
        let length = used_bytes(&path);
        for flip in 0..FLIPS.min(length) {
            let copy = killed.copy();
            let path = copy.log().join(path.file_name().unwrap());
            let mut bytes = fs::read(&path).unwrap();
            bytes[(flip * length / FLIPS.min(length)) as usize] ^= 0x08;
            fs::write(&path, bytes).unwrap();
            for _ in 0..2 {
                match open_without_tail(&copy.log()) {
                    Ok(store) => {
                        assert_eq!(store.vote().map(|vote| vote.term), Some(5), "{}, {flip}", path.display());
                        match all(&store) {
                            Ok(read) => assert_eq!(read, entries, "{}, {flip}", path.display()),
                            Err(error) => assert_eq!(error.kind(), io::ErrorKind::InvalidData),
                        }
                        intact += 1;
                    }
                    Err(_) => refused += 1,
                }
            }
        }
    }
    assert!(refused > 20, "{refused} refused, {intact} intact: the damage has to hit something");
}

/// Length of a file without the unused bytes at its end.
fn used_bytes(path: &Path) -> u64 {
    let bytes = fs::read(path).unwrap();
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1)
}

/// Bytes of all of sled's files.
fn contents(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = files::list(directory).unwrap().into_iter().filter(|path| path.is_file());
    paths.map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

#[test]
fn a_damaged_segment_is_found_before_sled_overwrites_it() {
    const SEGMENT_BYTES: usize = 8 * 1024 * 1024;
    let home = Home::new();
    let store = open(&home.log()).unwrap();
    for index in 0..30 {
        append(&store, vec![command(1, index, 1_000_000)]).unwrap();
    }
    drop(store);
    let good = fs::read(home.log().join("db")).unwrap();
    assert!(good.len() > 3 * SEGMENT_BYTES);
    for offset in [0, SEGMENT_BYTES + 5, 2 * SEGMENT_BYTES + 19] {
        let mut bytes = good.clone();
        bytes[offset] ^= 0x10;
        fs::write(home.log().join("db"), &bytes).unwrap();
        let before = contents(&home.log());
        let message = corrupt(&home.log());
        assert!(message.contains("header of the segment"), "{message}");
        assert!(contents(&home.log()) == before, "nothing was changed");
    }
    fs::write(home.log().join("db"), &good).unwrap();
    assert_eq!(all(&open(&home.log()).unwrap()).unwrap().len(), 30);
}
