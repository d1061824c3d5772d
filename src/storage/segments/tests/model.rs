//! Any sequence of calls, compared with a map.

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;

use super::super::*;
use super::{open, segments};

#[derive(Debug, Clone)]
enum Step {
    Append { gap: u64, count: u32, bytes: usize },
    Flush,
    Sync,
    Keep(KeepLimits),
    Clear,
    Reopen,
    Read { from: u64, room: usize },
}

fn step() -> impl Strategy<Value = Step> {
    let append = (0_u64..4, 0_u32..6, prop_oneof![4 => 0_usize..60, 1 => Just(70_000)]);
    let keep = prop_oneof![
        (1_u64..60).prop_map(|max_count| KeepLimits { max_count, ..KeepLimits::ALL }),
        (100_u64..200_000).prop_map(|max_bytes| KeepLimits { max_bytes, ..KeepLimits::ALL }),
        (1_u64..200).prop_map(|max_age_ms| KeepLimits { max_age_ms, ..KeepLimits::ALL }),
        Just(KeepLimits::ALL),
    ];
    prop_oneof![
        12 => append.prop_map(|(gap, count, bytes)| Step::Append { gap, count, bytes }),
        3 => Just(Step::Flush),
        2 => Just(Step::Sync),
        2 => keep.prop_map(Step::Keep),
        1 => Just(Step::Clear),
        2 => Just(Step::Reopen),
        4 => (0_u64..200, 0_usize..400).prop_map(|(from, room)| Step::Read { from, room }),
    ]
}

/// A log, and what should be in it.
struct Rig<'a> {
    dir: &'a Path,
    segment_bytes: u64,
    log: Option<SegmentLog>,
    records: BTreeMap<u64, SegmentRecord>,
    /// Next key after the largest that was ever appended, and what is surely on disk.
    next: u64,
    flushed: Option<u64>,
}

impl Rig<'_> {
    fn log(&mut self) -> &mut SegmentLog {
        self.log.as_mut().unwrap()
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Append { gap, count, bytes } => {
                let key = self.next + gap;
                self.next = key + 1;
                let payload = vec![key as u8; bytes];
                self.log().append(key, count, key, &payload).unwrap();
                let record = SegmentRecord { key, count, time_ms: key, payload: payload.into() };
                self.records.insert(key, record);
            }
            Step::Flush | Step::Sync => {
                if matches!(step, Step::Sync) {
                    self.log().sync().unwrap()
                } else {
                    self.log().flush().unwrap()
                }
                self.flushed = self.records.last_key_value().map(|(key, _)| *key);
                assert_eq!(self.log().reader().reach(), self.log().reach());
            }
            Step::Keep(limits) => self.keep(&limits),
            Step::Clear => {
                self.log().clear().unwrap();
                self.records.clear();
                self.flushed = None;
                self.next = 0;
            }
            Step::Reopen => {
                drop(self.log.take());
                self.log = Some(open(self.dir, self.segment_bytes));
                let last = self.log().reach().last_key;
                assert!(last >= self.flushed, "{last:?} of {:?}", self.flushed);
                self.records.retain(|key, _| Some(*key) <= last);
                self.next = last.map_or(0, |last| last + 1);
            }
            Step::Read { from, room } => self.read(from, room),
        }
        self.check();
    }

    fn keep(&mut self, limits: &KeepLimits) {
        let now = self.next + 10;
        self.log().keep(limits, now).unwrap();
        let reach = self.log().reach();
        let first = reach.first_key.unwrap_or(u64::MAX);
        let gone: Vec<_> = self.records.range(..first).map(|(_, record)| record.clone()).collect();
        if *limits == KeepLimits::ALL {
            assert_eq!(gone, []);
        }
        if limits.max_age_ms > 0 {
            assert!(gone.iter().all(|record| record.time_ms + limits.max_age_ms < now));
        }
        self.records.retain(|key, _| *key >= first);
        // The newest stays, and so may the one before it.
        if segments(self.dir).len() > 2 {
            assert!(reach.count <= limits.max_count && reach.bytes <= limits.max_bytes, "{reach:?}");
        }
    }

    fn read(&mut self, from: u64, room: usize) {
        let reader = self.log().reader();
        let Some(last) = reader.reach().last_key else {
            assert_eq!(reader.read(from, room).unwrap(), []);
            return;
        };
        let mut left = Some(room);
        let there = self.records.range(from..).take_while(|(key, _)| **key <= last);
        let expected: Vec<_> = there
            .enumerate()
            .take_while(|(number, (_, record))| {
                left = left.and_then(|left| left.checked_sub(28 + record.payload.len()));
                *number == 0 || left.is_some()
            })
            .map(|(_, (_, record))| record.clone())
            .collect();
        assert_eq!(reader.read(from, room).unwrap(), expected);
    }

    fn check(&mut self) {
        let reach = self.log().reach();
        assert_eq!(reach.first_key, self.records.first_key_value().map(|(key, _)| *key));
        assert_eq!(reach.last_key, self.records.last_key_value().map(|(key, _)| *key));
        assert_eq!(reach.records, self.records.len() as u64);
        assert_eq!(reach.count, self.records.values().map(|record| u64::from(record.count)).sum::<u64>());
        let read = self.log().reader().read(0, usize::MAX).unwrap();
        assert!(read.iter().eq(self.records.values().take(read.len())));
        assert!(
            read.last().map(|record| record.key) >= self.flushed.filter(|key| self.records.contains_key(key))
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random(
        segment_bytes in prop_oneof![Just(150_u64), Just(500), Just(200_000)],
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let log = Some(open(dir.path(), segment_bytes));
        let records = BTreeMap::new();
        let mut rig = Rig { dir: dir.path(), segment_bytes, log, records, next: 0, flushed: None };
        steps.iter().chain([&Step::Sync, &Step::Reopen]).for_each(|step| rig.run(step));
    }
}
