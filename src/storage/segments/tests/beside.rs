//! Readers beside the writer.

use std::thread;

use super::super::*;
use super::{append, keys, open, record};

const LAST: u64 = 1500;

/// Follows the log to its end; how many times it found that records were gone.
fn follow(reader: &SegmentReader, room: usize) -> u64 {
    let (mut next, mut gaps) = (0, 0);
    while next <= LAST {
        let read = match reader.read(next, room) {
            Ok(read) => read,
            Err(ReadSegmentsError::Purged { first_key }) => {
                let first_key = first_key.unwrap();
                assert!(first_key > next, "{first_key} is not after {next}");
                (next, gaps) = (first_key, gaps + 1);
                continue;
            }
            Err(error) => panic!("{error}"),
        };
        let Some(first) = read.first().map(|record| record.key) else {
            thread::yield_now();
            continue;
        };
        if first != next {
            // Then it was the first one there was.
            assert!(first > next && reader.reach().first_key.unwrap() >= first);
            gaps += 1;
        }
        for (found, key) in read.iter().zip(first..) {
            assert_eq!(*found, record(key));
        }
        next = first + read.len() as u64;
    }
    gaps
}

/// Writes, and purges if there are `limits`, while others follow. The first key that is left, and what they found.
fn write_beside_readers(limits: &KeepLimits) -> (u64, Vec<u64>) {
    let dir = tempfile::tempdir().unwrap();
    let mut log = open(dir.path(), 1000);
    let followers: Vec<_> = [0, 100, 5000]
        .map(|room| {
            let reader = log.reader();
            thread::spawn(move || follow(&reader, room))
        })
        .into();
    for key in 0..=LAST {
        append(&mut log, key).unwrap();
        if key % 3 == 0 {
            log.flush().unwrap();
        }
        if key % 16 == 0 {
            log.keep(limits, 0).unwrap();
        }
    }
    log.sync().unwrap();
    let gaps = followers.into_iter().map(|follower| follower.join().unwrap()).collect();
    let left = keys(&log);
    assert_eq!(left.last(), Some(&LAST));
    (left[0], gaps)
}

#[test]
fn readers_follow_the_writer() {
    assert_eq!(write_beside_readers(&KeepLimits::ALL), (0, vec![0, 0, 0]));
}

#[test]
fn readers_are_told_what_was_purged_beside_them() {
    let limits = KeepLimits { max_bytes: 3000, ..KeepLimits::ALL };
    let (first, _) = write_beside_readers(&limits);
    assert!(first > LAST - 100, "{first}");
}
