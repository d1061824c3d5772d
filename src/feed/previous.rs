//! What a key was before a change: looked up where the change before was told.
//!
//! An event names the position at which its key was written last. What was told there has the value, so nothing is stored twice, and
//! who does not ask for it pays nothing. It is looked up in the ring, then in the event log: a lookup there reads from the entry of
//! its index before the position on, so the distance between two entries and one piece. Pieces that were read are used for what comes next.
//!
//! # Promises
//!
//! - What is told is what the key held: of its position, its key and its version. If the feed does not reach back to it, it is
//!   [unknown](KeyBefore::Unknown), and says so.
//! - Within a position that writes a key several times it is what the write before has left.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use super::event_log::LogPage;
use super::piece::Piece;
use super::record::{FeedContent, FeedRecord};
use super::{Feed, FeedCursor};
use crate::machine::{AppliedEvent, EventOperation};
use crate::runtime::offload;
use crate::types::HistoryEpoch;

/// Pieces that are read from disk for one message, 64 KiB and a piece each. Then what was found is sent first.
const MAX_READS: u32 = 64;

/// What a key was before a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KeyBefore {
    /// It was not there.
    Absent,
    /// It was there as this has written it.
    Written(AppliedEvent),
    /// It was there, and this node does not keep any more what it held.
    Unknown,
}

/// A key of one machine: number, tenant, collection and key.
type EventKey = (u16, Bytes, Bytes, Bytes);

fn key_of(event: &AppliedEvent) -> EventKey {
    (event.machine, event.tenant.clone(), event.collection.clone(), event.key.clone())
}

/// The events of one position, by their keys.
#[derive(Debug)]
struct EventsByKey {
    index: u64,
    events: Vec<AppliedEvent>,
    /// Where those of each key are, in order.
    places: HashMap<EventKey, Vec<usize>>,
}

impl EventsByKey {
    fn of(record: FeedRecord) -> Self {
        let events = match record.content {
            FeedContent::Events(events) => events,
            FeedContent::Command { .. } => Vec::new(),
        };
        let mut places: HashMap<_, Vec<_>> = HashMap::new();
        for (place, event) in events.iter().enumerate() {
            places.entry(key_of(event)).or_default().push(place);
        }
        Self { index: record.log_id.index, events, places }
    }

    /// The last event of the key of `event` that stands before `place`.
    fn last_before(&self, event: &AppliedEvent, place: usize) -> Option<&AppliedEvent> {
        let places = self.places.get(&key_of(event))?;
        let before = places.partition_point(|other| *other < place);
        Some(&self.events[places[before.checked_sub(1)?]])
    }
}

/// Looks up what keys were before. Keeps what it has read last: it is made for one message, and dropped with it.
#[derive(Debug)]
pub(crate) struct PreviousValues {
    feed: Arc<Feed>,
    history: HistoryEpoch,
    piece: Option<Piece>,
    record: Option<EventsByKey>,
    /// Pieces that were read from disk.
    reads: u32,
    /// Nothing up to here is kept any more.
    gone: Option<u64>,
}

impl FeedCursor {
    /// What looks up what keys were before the changes that this cursor tells.
    pub(crate) fn previous_values(&self) -> PreviousValues {
        PreviousValues {
            feed: self.feed.clone(),
            history: self.history(),
            piece: None,
            record: None,
            reads: 0,
            gone: None,
        }
    }
}

impl PreviousValues {
    /// What the key of `event`, which was told at position `index` in this `place` among the others there, was before.
    pub(crate) async fn before(&mut self, event: &AppliedEvent, index: u64, place: usize) -> KeyBefore {
        if event.operation == EventOperation::Insert {
            return KeyBefore::Absent;
        }
        // 0 is no position: the machine does not know it.
        if event.previous == 0 || event.previous > index {
            return KeyBefore::Unknown;
        }
        if self.record.as_ref().is_none_or(|record| record.index != event.previous) {
            self.record = self.record_at(event.previous).await.map(EventsByKey::of);
        }
        let place = if event.previous == index { place } else { usize::MAX };
        let found = self.record.as_ref().and_then(|record| record.last_before(event, place));
        match found.filter(|found| has_left(found, event)) {
            Some(found) => KeyBefore::Written(found.clone()),
            None => KeyBefore::Unknown,
        }
    }

    /// Whether so much was read from disk that what was found is to be sent before more is looked up.
    pub(crate) fn is_spent(&self) -> bool {
        self.reads >= MAX_READS
    }

    async fn record_at(&mut self, position: u64) -> Option<FeedRecord> {
        if self.piece.as_ref().is_none_or(|piece| !(piece.from..=piece.upto).contains(&position)) {
            // What is gone takes nothing away from what was read.
            self.piece = Some(self.piece_at(position).await?);
        }
        let mut records = Vec::new();
        self.piece.as_ref()?.records((position, position), &mut records).ok()?;
        records.pop()
    }

    async fn piece_at(&mut self, position: u64) -> Option<Piece> {
        if let Some(found) = self.feed.in_memory(self.history, position) {
            return found;
        }
        if self.gone.is_some_and(|gone| position <= gone) {
            return None;
        }
        let (log, history) = (self.feed.log.clone()?, self.history);
        let page = if log.has(history, position) {
            self.reads += 1;
            // At least one piece, and no more.
            offload(move || log.read(history, position, 0)).await
        } else {
            Ok(LogPage::Gone)
        };
        match page {
            Ok(LogPage::Pieces(pieces)) => pieces.into_iter().next(),
            Ok(LogPage::Gone) => {
                self.gone = self.gone.max(Some(position));
                None
            }
            Err(_) => None,
        }
    }
}

/// Whether the key is as `written` has left it when `event` happens.
fn has_left(written: &AppliedEvent, event: &AppliedEvent) -> bool {
    let is_there = matches!(written.operation, EventOperation::Insert | EventOperation::Update);
    let version = match event.operation {
        EventOperation::Insert | EventOperation::Update => event.version.saturating_sub(1),
        EventOperation::Delete | EventOperation::Expire => event.version,
    };
    // A machine that counts no writes says 0.
    is_there && (written.version == version || event.version == 0)
}

impl Feed {
    /// The piece in memory that covers `position`, if there is one; `None` if what there is in memory begins behind it.
    fn in_memory(&self, history: HistoryEpoch, position: u64) -> Option<Option<Piece>> {
        let ring = self.ring();
        if ring.history != history {
            return Some(None);
        }
        if position < ring.begins {
            return None;
        }
        Some(ring.pieces_from(position, 0).into_iter().next())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    use super::super::{EventLog, EventLogLimits, Recorder};
    use super::*;
    use crate::machine::{ApplyContext, EventSink, NewEvent};
    use crate::types::LogId;

    const HISTORY: HistoryEpoch = HistoryEpoch(7);
    const KEYS: usize = 12;

    /// What keys hold: the value, the position that has written it, and the number of writes.
    #[derive(Default)]
    struct ModelKeys(BTreeMap<usize, (Vec<u8>, u64, u64)>);

    impl ModelKeys {
        /// Something happens to a key at position `index`. What it held before.
        fn change(&mut self, index: u64, rng: &mut SmallRng, events: &mut dyn EventSink) -> Option<Vec<u8>> {
            let key = rng.random_range(0..KEYS);
            let before = self.0.remove(&key);
            let removal = [EventOperation::Delete, EventOperation::Expire][rng.random_range(0..2)];
            let (previous, version) = before.as_ref().map_or((0, 0), |(_, at, version)| (*at, *version));
            // Many are empty, some are as long as a piece.
            let length = [0, 0, 5, 200, 40_000][rng.random_range(0..5)];
            let value = vec![rng.random(); length];
            let (operation, version) = match &before {
                None => (EventOperation::Insert, 1),
                Some(_) if rng.random_bool(0.3) => (removal, version),
                Some(_) => (EventOperation::Update, version + 1),
            };
            let is_there = matches!(operation, EventOperation::Insert | EventOperation::Update);
            events.event(NewEvent {
                operation,
                tenant: "t",
                collection: if key.is_multiple_of(2) { "a" } else { "b" },
                key: format!("{}", key / 2).as_bytes(),
                value: if is_there { &value } else { &[] },
                created: 0,
                previous,
                version,
                deadline_ms: None,
            });
            if is_there {
                self.0.insert(key, (value, index, version));
            }
            before.map(|(value, ..)| value)
        }
    }

    /// What was told at each position, and what every key held before.
    type ToldBefore = BTreeMap<u64, Vec<Option<Vec<u8>>>>;

    fn apply(
        recorder: &mut Recorder,
        keys: &mut ModelKeys,
        rng: &mut SmallRng,
        index: u64,
        before: &mut ToldBefore,
    ) {
        let at = ApplyContext { log_id: LogId::new(1, index), elapsed_ms: index, time_ms: index };
        // Sometimes nothing happens, and sometimes a key is written and removed several times at one position.
        let count = rng.random_range(0..5) * rng.random_range(0..4);
        let told = recorder.tell(&at, |events| (0..count).map(|_| keys.change(index, rng, events)).collect());
        before.insert(index, told);
        recorder.applied(index);
        if rng.random_bool(0.2) {
            recorder.publish();
        }
    }

    /// Compares what is looked up with `before`, from position `next` on. How many were unknown, written and absent.
    async fn compare(feed: &Arc<Feed>, next: u64, before: &ToldBefore) -> [usize; 3] {
        let mut cursor = feed.follow(next);
        let mut found = [0; 3];
        loop {
            let page = cursor.page(100_000).await.unwrap();
            let mut looked_up = cursor.previous_values();
            for record in &page.records {
                let index = record.log_id.index;
                let FeedContent::Events(events) = &record.content else { panic!("{record:?}") };
                assert_eq!(events.len(), before[&index].len());
                for (place, (event, held)) in events.iter().zip(&before[&index]).enumerate() {
                    match (looked_up.before(event, index, place).await, held) {
                        (KeyBefore::Unknown, Some(_)) => found[0] += 1,
                        (KeyBefore::Written(written), Some(held)) => {
                            assert_eq!(written.value, *held, "{index}/{place}");
                            assert_eq!((&written.key, &written.collection), (&event.key, &event.collection));
                            found[1] += 1;
                        }
                        (KeyBefore::Absent, None) => found[2] += 1,
                        (found, held) => panic!("{index}/{place}: {found:?} in the place of {held:?}"),
                    }
                }
            }
            if page.is_last() {
                return found;
            }
        }
    }

    #[tokio::test]
    async fn what_a_key_was_before_is_what_the_change_before_has_left_or_unknown() {
        let (mut keys, mut before) = (ModelKeys::default(), ToldBefore::new());
        let mut rng = SmallRng::seed_from_u64(3);
        let dir = tempfile::tempdir().unwrap();
        let log = || Arc::new(EventLog::open(dir.path(), EventLogLimits::default()).unwrap());
        let feed = Feed::new(Some(log()));
        let mut recorder = Recorder::new(feed.clone());
        recorder.begin(HISTORY, 1);
        for index in 1..=600 {
            apply(&mut recorder, &mut keys, &mut rng, index, &mut before);
        }
        recorder.publish();
        let [unknown, written, absent] = compare(&feed, 1, &before).await;
        assert!(unknown == 0 && written > 1_000 && absent > 300, "{unknown}, {written}, {absent}");
        feed.sync_log(600);
        drop((recorder, feed));

        // After a restart memory begins with what is applied next: everything before is on disk.
        let feed = Feed::new(Some(log()));
        let mut recorder = Recorder::new(feed.clone());
        recorder.begin(HISTORY, 601);
        for index in 601..=700 {
            apply(&mut recorder, &mut keys, &mut rng, index, &mut before);
        }
        recorder.publish();
        assert_eq!(compare(&feed, 1, &before).await[0], 0);
        let [unknown, written, _] = compare(&feed, 601, &before).await;
        assert!(unknown == 0 && written > 100, "{unknown}, {written}");
        drop((recorder, feed));

        // A node that was sent the state as of 700 has nothing of what was before.
        let feed = Feed::new(None);
        let mut recorder = Recorder::new(feed.clone());
        recorder.begin(HISTORY, 701);
        for index in 701..=800 {
            apply(&mut recorder, &mut keys, &mut rng, index, &mut before);
        }
        recorder.publish();
        let [unknown, written, _] = compare(&feed, 701, &before).await;
        assert!((1..=KEYS).contains(&unknown) && written > 100, "{unknown}, {written}");
    }

    /// A node that was sent the state has nothing of what was before: a message full of changes of that is not told piece by piece.
    #[tokio::test]
    async fn what_is_gone_costs_no_reads() {
        let dir = tempfile::tempdir().unwrap();
        let log = Arc::new(EventLog::open(dir.path(), EventLogLimits::default()).unwrap());
        let feed = Feed::new(Some(log));
        let mut recorder = Recorder::new(feed.clone());
        recorder.begin(HISTORY, 701);
        let at = ApplyContext { log_id: LogId::new(1, 701), elapsed_ms: 0, time_ms: 0 };
        let update = NewEvent {
            operation: EventOperation::Update,
            tenant: "t",
            collection: "c",
            key: b"k",
            value: b"v",
            created: 5,
            previous: 5,
            version: 2,
            deadline_ms: None,
        };
        recorder.tell(&at, |events| events.event(update));
        recorder.applied(701);
        recorder.publish();
        let mut cursor = feed.follow(701);
        let page = cursor.page(0).await.unwrap();
        let FeedContent::Events(events) = &page.records[0].content else { panic!("{page:?}") };
        let mut looked_up = cursor.previous_values();
        for previous in [5, 300, 5, 9] {
            let update = AppliedEvent { previous, ..events[0].clone() };
            assert_eq!(looked_up.before(&update, 701, 0).await, KeyBefore::Unknown);
        }
        assert_eq!((looked_up.reads, looked_up.gone), (0, Some(300)));
    }

    /// What is looked up is of the version that the change follows: a feed that has something else there does not do.
    #[tokio::test]
    async fn another_version_or_another_machine_is_not_taken_for_it() {
        let feed = Feed::new(None);
        let mut recorder = Recorder::new(feed.clone());
        recorder.begin(HISTORY, 1);
        let at = ApplyContext { log_id: LogId::new(1, 1), elapsed_ms: 0, time_ms: 0 };
        let first = NewEvent {
            operation: EventOperation::Insert,
            tenant: "t",
            collection: "c",
            key: b"k",
            value: b"v",
            created: 1,
            previous: 0,
            version: 4,
            deadline_ms: None,
        };
        recorder.tell(&at, |events| events.event_of(3, first));
        recorder.applied(1);
        recorder.publish();
        let mut cursor = feed.follow(1);
        let page = cursor.page(0).await.unwrap();
        let FeedContent::Events(events) = &page.records[0].content else { panic!("{page:?}") };
        let update = AppliedEvent {
            operation: EventOperation::Update,
            previous: 1,
            version: 5,
            value: Bytes::new(),
            ..events[0].clone()
        };
        let mut looked_up = cursor.previous_values();
        let found = looked_up.before(&update, 9, 0).await;
        assert!(matches!(&found, KeyBefore::Written(written) if written.value == "v"), "{found:?}");
        let others = [
            AppliedEvent { version: 6, ..update.clone() },
            AppliedEvent { machine: 0, ..update.clone() },
            AppliedEvent { tenant: "other".into(), ..update.clone() },
            AppliedEvent { previous: 0, ..update.clone() },
            AppliedEvent { previous: 2, ..update.clone() },
            AppliedEvent { operation: EventOperation::Delete, ..update.clone() },
        ];
        for other in others {
            assert_eq!(looked_up.before(&other, 9, 0).await, KeyBefore::Unknown, "{other:?}");
        }
        let uncounted = AppliedEvent { version: 0, ..update };
        assert!(matches!(looked_up.before(&uncounted, 9, 0).await, KeyBefore::Written(_)));
    }
}
