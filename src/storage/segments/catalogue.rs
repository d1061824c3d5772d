//! Which segments there are, and what of them readers may see.

use std::collections::VecDeque;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use super::SegmentReach;
use super::format::HEAD_BYTES;

/// Bytes of a file between two entries of its index, at least.
pub(super) const INDEX_BYTES: u64 = 64 * 1024;

/// Where a record begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct IndexEntry {
    pub(super) key: u64,
    pub(super) offset: u64,
    /// What the record's checksum begins with.
    pub(super) chain: u32,
}

/// What the records of one segment come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct SegmentTally {
    /// Bytes of the file up to the end of the last record.
    pub(super) end: u64,
    pub(super) last_key: u64,
    pub(super) records: u64,
    pub(super) count: u64,
    pub(super) oldest_ms: u64,
    pub(super) newest_ms: u64,
}

impl SegmentTally {
    /// Of a file with a head and nothing else.
    pub(super) fn empty() -> Self {
        Self { end: HEAD_BYTES, oldest_ms: u64::MAX, ..Self::default() }
    }

    pub(super) fn add(&mut self, key: u64, count: u32, time_ms: u64, bytes: usize) {
        self.end += bytes as u64;
        self.last_key = key;
        self.records += 1;
        self.count += u64::from(count);
        self.oldest_ms = self.oldest_ms.min(time_ms);
        self.newest_ms = self.newest_ms.max(time_ms);
    }
}

/// One segment, with at least one record.
#[derive(Debug, Clone)]
pub(super) struct KeptSegment {
    /// One more than that of the segment before it. After all were removed, the next has another one.
    pub(super) id: u64,
    pub(super) path: PathBuf,
    /// Of the segment that is being written. The others are opened by who reads them.
    pub(super) file: Option<Arc<File>>,
    pub(super) base: u32,
    pub(super) first_key: u64,
    pub(super) tally: SegmentTally,
    /// In the order of keys. The first record is not among them.
    pub(super) index: Vec<IndexEntry>,
}

impl KeptSegment {
    /// Where to begin reading for the record with this key.
    pub(super) fn place(&self, key: u64) -> IndexEntry {
        let before = self.index.partition_point(|entry| entry.key <= key);
        let first = IndexEntry { key: self.first_key, offset: HEAD_BYTES, chain: self.base };
        before.checked_sub(1).map_or(first, |at| self.index[at])
    }
}

/// All segments, oldest first.
#[derive(Debug, Default)]
pub(super) struct SegmentCatalogue {
    segments: VecDeque<KeptSegment>,
    records: u64,
    count: u64,
    bytes: u64,
}

impl SegmentCatalogue {
    pub(super) fn push(&mut self, segment: KeptSegment) {
        self.count_in(&segment.tally);
        self.segments.push_back(segment);
    }

    /// The newest segment has grown.
    pub(super) fn grow(&mut self, tally: SegmentTally, index: Vec<IndexEntry>) {
        let newest = self.segments.back_mut().expect("invariant: what grows was pushed");
        let before = std::mem::replace(&mut newest.tally, tally);
        newest.index.extend(index);
        self.count_out(&before);
        self.count_in(&tally);
    }

    /// The newest segment is complete.
    pub(super) fn close(&mut self) {
        if let Some(newest) = self.segments.back_mut() {
            newest.file = None;
        }
    }

    pub(super) fn pop_oldest(&mut self) -> Option<KeptSegment> {
        let oldest = self.segments.pop_front()?;
        self.count_out(&oldest.tally);
        Some(oldest)
    }

    pub(super) fn oldest(&self) -> Option<&KeptSegment> {
        self.segments.front()
    }

    /// The first segment with a record at or above `key`.
    pub(super) fn find(&self, key: u64) -> Option<&KeptSegment> {
        self.segments.get(self.segments.partition_point(|segment| segment.tally.last_key < key))
    }

    pub(super) fn with_id(&self, id: u64) -> Option<&KeptSegment> {
        let at = id.checked_sub(self.segments.front()?.id)?;
        self.segments.get(usize::try_from(at).ok()?)
    }

    pub(super) fn reach(&self) -> SegmentReach {
        SegmentReach {
            first_key: self.segments.front().map(|segment| segment.first_key),
            last_key: self.segments.back().map(|segment| segment.tally.last_key),
            records: self.records,
            count: self.count,
            bytes: self.bytes,
        }
    }

    fn count_in(&mut self, tally: &SegmentTally) {
        self.records += tally.records;
        self.count += tally.count;
        self.bytes += tally.end;
    }

    fn count_out(&mut self, tally: &SegmentTally) {
        self.records -= tally.records;
        self.count -= tally.count;
        self.bytes -= tally.end;
    }
}

/// What the writer and the readers share. The lock is never held during IO.
#[derive(Debug, Default)]
pub(super) struct SharedSegments(Mutex<SegmentCatalogue>);

impl SharedSegments {
    pub(super) fn new(catalogue: SegmentCatalogue) -> Arc<Self> {
        Arc::new(Self(Mutex::new(catalogue)))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, SegmentCatalogue> {
        self.0.lock().expect("invariant: no panic under this lock")
    }
}
