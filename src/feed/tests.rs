//! The feed without anything around it: what is recorded is told, once and in order, from memory and from disk.

use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::machine::{ApplyContext, EventOperation, EventSink, NewEvent};
use crate::types::{LogId, MachineVersion};

const HISTORY: HistoryEpoch = HistoryEpoch(7);
/// Limits that purge nothing here.
const ALL: EventLogLimits = EventLogLimits { operations: u64::MAX, bytes: u64::MAX, age_ms: 0 };

fn at(index: u64) -> ApplyContext {
    ApplyContext { log_id: LogId::new(1, index), elapsed_ms: index, time_ms: 1_000 + index }
}

/// What entry `index` does: every third nothing, every seventh several things, the others one.
fn happens(index: u64) -> Vec<(Vec<u8>, Vec<u8>)> {
    let count = if index.is_multiple_of(3) {
        0
    } else if index.is_multiple_of(7) {
        5
    } else {
        1
    };
    let value = |at: u64| vec![index as u8; ((index * 31 + at) % 400) as usize];
    (0..count).map(|at| (format!("{index}/{at}").into_bytes(), value(at))).collect()
}

fn tell(events: &mut dyn EventSink, index: u64) {
    for (key, value) in happens(index) {
        events.event(NewEvent {
            operation: EventOperation::Update,
            tenant: "t",
            collection: "c",
            key: &key,
            value: &value,
            created: 1,
            previous: index - 1,
            version: 2,
            deadline_ms: index.is_multiple_of(2).then_some(index),
        });
    }
}

fn record(recorder: &mut Recorder, entries: std::ops::RangeInclusive<u64>) {
    for index in entries {
        recorder.tell(&at(index), |events| tell(events, index));
        recorder.applied(index);
    }
}

/// All that a cursor tells from `next` on, in pages of about `page_bytes`, and where it ends.
async fn follow(feed: &Arc<Feed>, next: u64, page_bytes: usize) -> Result<(Vec<FeedRecord>, u64), FeedError> {
    let mut cursor = feed.follow(next);
    let mut all = Vec::new();
    loop {
        let page = cursor.page(page_bytes).await?;
        all.extend(page.records.iter().cloned());
        if page.is_last() {
            return Ok((all, page.next));
        }
    }
}

fn assert_told(records: &[FeedRecord], entries: std::ops::RangeInclusive<u64>) {
    let expected: Vec<_> = entries.filter(|index| !happens(*index).is_empty()).collect();
    let told: Vec<_> = records.iter().map(|record| record.log_id.index).collect();
    assert_eq!(told, expected);
    for record in records {
        let index = record.log_id.index;
        assert_eq!((record.time_ms, record.elapsed_ms), (1_000 + index, index));
        let FeedContent::Events(events) = &record.content else { panic!("{record:?}") };
        let told: Vec<_> = events.iter().map(|event| (event.key.to_vec(), event.value.to_vec())).collect();
        assert_eq!(told, happens(index));
        let first = &events[0];
        assert_eq!((first.tenant.as_ref(), first.collection.as_ref()), (&b"t"[..], &b"c"[..]));
        assert_eq!((first.created, first.previous, first.version), (1, index - 1, 2));
        assert_eq!(first.deadline_ms, index.is_multiple_of(2).then_some(index));
    }
}

fn log_in(dir: &Path) -> Arc<EventLog> {
    Arc::new(EventLog::open(dir, ALL).unwrap())
}

#[tokio::test]
async fn everything_is_told_from_memory_once_and_in_order() {
    let feed = Feed::new(None);
    let mut recorder = Recorder::new(feed.clone());
    recorder.begin(HISTORY, 0);
    record(&mut recorder, 1..=100);
    assert_eq!(follow(&feed, 0, 1).await.unwrap(), (vec![], 0), "nothing is told before it is published");
    recorder.publish();
    record(&mut recorder, 101..=1_000);
    recorder.publish();
    for page_bytes in [0, 1_000, usize::MAX] {
        for next in [0, 1, 77, 101, 1_000] {
            let (records, ended) = follow(&feed, next, page_bytes).await.unwrap();
            assert_told(&records, next.max(1)..=1_000);
            assert_eq!(ended, 1_001);
        }
    }
    assert_eq!(follow(&feed, 1_001, 9).await.unwrap(), (vec![], 1_001));
    assert_eq!(feed.reach().first, 0);
}

#[tokio::test]
async fn commands_are_told_as_they_are() {
    let feed = Feed::new(None);
    let mut recorder = Recorder::new(feed.clone());
    recorder.begin(HISTORY, 0);
    let wrote = MachineVersion { machine: 3, version: 9 };
    recorder.command(&at(1), wrote, b"");
    recorder.applied(1);
    recorder.command(&at(2), wrote, b"add one");
    recorder.applied(2);
    recorder.publish();
    let (records, _) = follow(&feed, 0, 0).await.unwrap();
    let commands: Vec<_> = records
        .iter()
        .map(|record| match &record.content {
            FeedContent::Command { wrote, command } => (*wrote, command.to_vec()),
            FeedContent::Events(_) => panic!("{record:?}"),
        })
        .collect();
    assert_eq!(commands, [(wrote, vec![]), (wrote, b"add one".to_vec())]);
}

#[tokio::test]
async fn memory_is_bounded_and_what_is_gone_is_named() {
    let feed = Feed::new(None);
    let mut recorder = Recorder::new(feed.clone());
    recorder.begin(HISTORY, 0);
    for index in 1..=300 {
        recorder.command(&at(index), MachineVersion::FIRST, &vec![0; 100_000]);
        recorder.applied(index);
        recorder.publish();
    }
    let first = feed.reach().first;
    assert!((200..=250).contains(&first), "{first}: 8 MiB of 30 MB");
    assert_eq!(follow(&feed, first - 1, 0).await.unwrap_err(), FeedError::Compacted { first });
    let (records, _) = follow(&feed, first, 0).await.unwrap();
    assert_eq!(records.first().map(|record| record.log_id.index), Some(first));
    assert_eq!(records.len() as u64, 301 - first);
    // One that is larger than all of it is told nevertheless.
    recorder.command(&at(301), MachineVersion::FIRST, &vec![1; 20_000_000]);
    recorder.applied(301);
    recorder.publish();
    assert_eq!(follow(&feed, 301, 0).await.unwrap().0.len(), 1);
}

#[tokio::test]
async fn the_log_tells_what_memory_has_let_go_of_and_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let feed = Feed::new(Some(log_in(dir.path())));
    let mut recorder = Recorder::new(feed.clone());
    recorder.begin(HISTORY, 0);
    for last in (1..=100_000).step_by(1_000).skip(1) {
        record(&mut recorder, last - 1_000..=last - 1);
        recorder.publish();
        feed.write_log();
    }
    let begins = feed.ring().begins;
    assert!(begins > 10_000, "memory holds only the newest: {begins}");
    for (next, page_bytes) in [(0, 1), (5, 100_000), (begins - 1, 0), (begins, 0), (50_000, usize::MAX)] {
        let (records, ended) = follow(&feed, next, page_bytes).await.unwrap();
        assert_told(&records, next.max(1)..=99_000);
        assert_eq!(ended, 99_001);
    }
    feed.sync_log(99_000);
    drop((recorder, feed));

    // The node begins at its snapshot, and applies again what follows it.
    let feed = Feed::new(Some(log_in(dir.path())));
    let mut recorder = Recorder::new(feed.clone());
    recorder.begin(HISTORY, 90_001);
    record(&mut recorder, 90_001..=95_000);
    recorder.publish();
    feed.write_log();
    let (records, ended) = follow(&feed, 0, 1 << 20).await.unwrap();
    assert_eq!(ended, 95_001, "what the log has beyond what is applied is not told");
    assert_told(&records, 1..=95_000);
    record(&mut recorder, 95_001..=99_500);
    recorder.publish();
    feed.write_log();
    record(&mut recorder, 99_501..=99_600);
    recorder.publish();
    let (records, _) = follow(&feed, 0, 1 << 20).await.unwrap();
    assert_told(&records, 1..=99_600);
    assert_eq!(feed.reach().restarts, 0);
}

#[tokio::test]
async fn a_log_that_does_not_reach_the_state_begins_anew() {
    for (history, begins) in [(HISTORY, 102), (HistoryEpoch(8), 50)] {
        let dir = tempfile::tempdir().unwrap();
        let feed = Feed::new(Some(log_in(dir.path())));
        let mut recorder = Recorder::new(feed.clone());
        recorder.begin(HISTORY, 0);
        record(&mut recorder, 1..=100);
        recorder.publish();
        feed.sync_log(100);
        drop((recorder, feed));

        let feed = Feed::new(Some(log_in(dir.path())));
        let mut recorder = Recorder::new(feed.clone());
        recorder.begin(history, begins);
        let gone = FeedError::Compacted { first: begins };
        assert_eq!(follow(&feed, 20, 0).await.unwrap_err(), gone);
        record(&mut recorder, begins..=begins + 10);
        recorder.publish();
        feed.write_log();
        assert_eq!(follow(&feed, 20, 0).await.unwrap_err(), gone);
        assert_told(&follow(&feed, begins, 0).await.unwrap().0, begins..=begins + 10);
        assert_eq!(feed.reach().first, begins);
    }
}

#[tokio::test]
async fn nothing_that_happens_for_long_is_no_gap() {
    let dir = tempfile::tempdir().unwrap();
    let feed = Feed::new(Some(log_in(dir.path())));
    let mut recorder = Recorder::new(feed.clone());
    recorder.begin(HISTORY, 0);
    record(&mut recorder, 1..=10);
    (11..=500).for_each(|index| recorder.applied(index));
    recorder.publish();
    feed.sync_log(500);
    drop((recorder, feed));
    let feed = Feed::new(Some(log_in(dir.path())));
    let mut recorder = Recorder::new(feed.clone());
    recorder.begin(HISTORY, 501);
    assert_told(&follow(&feed, 0, 0).await.unwrap().0, 1..=10);
    record(&mut recorder, 501..=520);
    recorder.publish();
    feed.write_log();
    let (records, ended) = follow(&feed, 4, 0).await.unwrap();
    let told: Vec<_> = records.iter().map(|record| record.log_id.index).collect();
    let expected: Vec<_> = (4..=10).chain(501..=520).filter(|index| !happens(*index).is_empty()).collect();
    assert_eq!((told, ended), (expected, 521));
}

#[tokio::test]
async fn a_state_that_comes_whole_is_never_told() {
    let feed = Feed::new(None);
    let mut recorder = Recorder::new(feed.clone());
    recorder.begin(HISTORY, 0);
    record(&mut recorder, 1..=10);
    recorder.publish();
    let mut behind = feed.follow(5);
    recorder.begin(HISTORY, 100);
    assert_eq!(behind.page(0).await.unwrap_err(), FeedError::Compacted { first: 100 });
    let mut ahead = feed.follow(100);
    recorder.begin(HistoryEpoch(9), 200);
    assert_eq!(ahead.page(0).await.unwrap_err(), FeedError::OtherHistory { known: HistoryEpoch(9) });
    let mut last = feed.follow(200);
    recorder.begin(HISTORY, 7);
    last.changed().await;
    let other = FeedError::OtherHistory { known: HISTORY };
    assert_eq!(last.page(0).await.unwrap_err(), other, "although its positions are smaller");
    let mut last = feed.follow(7);
    drop(recorder);
    last.changed().await;
    assert_eq!(last.page(0).await.unwrap_err(), FeedError::Stopped);
}

#[tokio::test]
async fn limits_are_kept_by_whole_files_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let limits = EventLogLimits { operations: 2_000, ..ALL };
    let feed = Feed::new(Some(Arc::new(EventLog::open(dir.path(), limits).unwrap())));
    let mut recorder = Recorder::new(feed.clone());
    recorder.begin(HISTORY, 0);
    for batch in 0..600 {
        record(&mut recorder, batch * 100 + 1..=batch * 100 + 100);
        recorder.publish();
        feed.write_log();
    }
    let reach = feed.reach();
    assert!(reach.first > 0, "{reach:?}");
    let (records, _) = follow(&feed, reach.first, 1 << 20).await.unwrap();
    assert_told(&records, reach.first..=60_000);
    assert!(records.len() >= 1_000);
    assert_eq!(
        follow(&feed, reach.first - 1, 0).await.unwrap_err(),
        FeedError::Compacted { first: reach.first }
    );
}

#[test]
fn bytes_that_are_no_record_are_refused() {
    let mut recorder = Recorder::new(Feed::new(None));
    recorder.begin(HISTORY, 0);
    record(&mut recorder, 1..=20);
    recorder.publish();
    let piece = recorder.feed().ring().pieces_from(0, 0).remove(0);
    let whole = piece.bytes.clone();
    let read = |bytes: bytes::Bytes| -> Result<Vec<FeedRecord>, record::NoRecord> {
        let (_, piece) = Piece::read(bytes)?;
        let mut records = Vec::new();
        piece.records((0, u64::MAX), &mut records).map(|()| records)
    };
    let records = read(whole.clone()).unwrap();
    assert_told(&records, 1..=20);
    for end in 0..whole.len() {
        // What is cut off at the end of a record cannot be told from what ends there.
        let short = read(whole.slice(..end));
        assert!(short.is_err() || short.unwrap().len() < records.len(), "{end}");
    }
    for at in 0..whole.len() {
        let mut changed = whole.to_vec();
        changed[at] ^= 0xff;
        // No panic, and no more memory than there are bytes; the checksum of the segment is what finds it.
        let _ = read(changed.into());
    }
}
