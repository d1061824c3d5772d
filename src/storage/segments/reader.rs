//! Reads beside the writer.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use super::catalogue::{INDEX_BYTES, KeptSegment, SharedSegments};
use super::format::{NextRecord, RECORD_HEAD_BYTES, next};
use super::{ReadSegmentsError, SegmentReach, SegmentRecord};
use crate::storage::files::io_error;

/// Bytes read at once.
const PIECE_BYTES: usize = 256 * 1024;

/// Reads what the writer has flushed. It does not keep the log open: once the writer is gone, another one may change the
/// files, and reads may fail.
#[derive(Debug, Clone)]
pub(crate) struct SegmentReader {
    pub(super) shared: Arc<SharedSegments>,
}

/// A segment as it was when it was looked up, and from where to read it.
struct SegmentPlace {
    id: u64,
    path: PathBuf,
    file: Option<Arc<File>>,
    offset: u64,
    chain: u32,
    /// Up to where there are records.
    end: u64,
}

impl SegmentPlace {
    fn in_segment(segment: &KeptSegment, from: u64) -> Self {
        let entry = segment.place(from);
        Self {
            id: segment.id,
            path: segment.path.clone(),
            file: segment.file.clone(),
            offset: entry.offset,
            chain: entry.chain,
            end: segment.tally.end,
        }
    }
}

/// What a read has found, and how much more it may.
struct FoundRecords {
    from: u64,
    records: Vec<SegmentRecord>,
    /// Bytes that are left for more.
    room: usize,
    is_full: bool,
}

impl FoundRecords {
    fn take(&mut self, record: SegmentRecord) {
        // With its head: records without a payload take memory too.
        let bytes = RECORD_HEAD_BYTES + record.payload.len();
        self.is_full = !self.records.is_empty() && bytes > self.room;
        if !self.is_full {
            self.room = self.room.saturating_sub(bytes);
            self.records.push(record);
        }
    }
}

impl SegmentReader {
    pub(super) fn new(shared: Arc<SharedSegments>) -> Self {
        Self { shared }
    }

    /// What can be read.
    pub(crate) fn reach(&self) -> SegmentReach {
        self.shared.lock().reach()
    }

    /// Records with keys at or above `from`, in order and without a gap. Their payloads and heads, which are 28 bytes each, take
    /// no more than `max_bytes`, but there is at least one record if the log holds any. Whether those before the first one were purged is for the caller to
    /// see, by [`reach`](Self::reach). Touches the disk only if there is something to read.
    ///
    /// # Errors
    /// [`ReadSegmentsError::Purged`] if the first of them was removed meanwhile. When a file cannot be read or is damaged, and
    /// nothing before that was asked for.
    pub(crate) fn read(&self, from: u64, max_bytes: usize) -> Result<Vec<SegmentRecord>, ReadSegmentsError> {
        let place = self.shared.lock().find(from).map(|segment| SegmentPlace::in_segment(segment, from));
        self.read_on(place, FoundRecords { from, records: Vec::new(), room: max_bytes, is_full: false })
    }

    /// Reads from `place` on.
    fn read_on(
        &self,
        mut place: Option<SegmentPlace>,
        mut found: FoundRecords,
    ) -> Result<Vec<SegmentRecord>, ReadSegmentsError> {
        while let Some(mut here) = place {
            match self.read_segment(&mut here, &mut found) {
                Ok(()) if found.is_full => break,
                Ok(()) => place = self.after(&here, found.from),
                // What is there already is right. Whoever asks for the rest is told.
                Err(_) if !found.records.is_empty() => break,
                Err(error) => return Err(error),
            }
        }
        Ok(found.records)
    }

    /// Where to go on after everything up to the end of `here` was read.
    fn after(&self, here: &SegmentPlace, from: u64) -> Option<SegmentPlace> {
        let catalogue = self.shared.lock();
        // Once it is gone it cannot be told whether it has grown before, and what is next may come after a gap.
        let segment = catalogue.with_id(here.id)?;
        if segment.tally.end > here.end {
            let (offset, chain) = (here.offset, here.chain);
            return Some(SegmentPlace { offset, chain, ..SegmentPlace::in_segment(segment, from) });
        }
        catalogue.with_id(here.id + 1).map(|segment| SegmentPlace::in_segment(segment, from))
    }

    /// Reads up to the end of `place`, or until enough was found.
    fn read_segment(
        &self,
        place: &mut SegmentPlace,
        found: &mut FoundRecords,
    ) -> Result<(), ReadSegmentsError> {
        let file = match &place.file {
            Some(file) => file.clone(),
            None => Arc::new(self.open(place)?),
        };
        let mut needed = 0;
        while place.offset < place.end {
            let left = usize::try_from(place.end - place.offset).unwrap_or(usize::MAX);
            let wanted = found.room.saturating_add(INDEX_BYTES as usize).min(PIECE_BYTES).max(needed);
            let mut piece = vec![0; wanted.min(left)];
            if let Err(error) = file.read_exact_at(&mut piece, place.offset) {
                // A file that has become shorter is damaged; one that cannot be read may not be.
                return Err(match error.kind() {
                    ErrorKind::UnexpectedEof => self.damaged(place),
                    _ => io_error("cannot read", &place.path, error).into(),
                });
            }
            let piece = Bytes::from(piece);
            let mut at = 0;
            needed = loop {
                match next(&piece[at..], place.chain) {
                    NextRecord::Record(head) => {
                        let end = at + head.bytes();
                        if head.key >= found.from {
                            let payload = piece.slice(at + RECORD_HEAD_BYTES..end);
                            let (key, count, time_ms) = (head.key, head.count, head.time_ms);
                            found.take(SegmentRecord { key, count, time_ms, payload });
                        }
                        if found.is_full {
                            return Ok(());
                        }
                        place.offset += head.bytes() as u64;
                        place.chain = head.checksum;
                        at = end;
                    }
                    NextRecord::Needs(_) if at == left => break 0,
                    NextRecord::Needs(bytes) if bytes <= left - at => break bytes,
                    NextRecord::Needs(_) | NextRecord::Invalid => return Err(self.damaged(place)),
                }
            };
        }
        Ok(())
    }

    /// Opens a segment that is complete, if it is still there.
    fn open(&self, place: &SegmentPlace) -> Result<File, ReadSegmentsError> {
        let opened = File::open(&place.path);
        // Another file may have got its name, but only after it was taken out of the catalogue.
        if self.shared.lock().with_id(place.id).is_none() {
            return Err(self.purged());
        }
        opened.map_err(|error| io_error("cannot open", &place.path, error).into())
    }

    fn damaged(&self, place: &SegmentPlace) -> ReadSegmentsError {
        match self.shared.lock().with_id(place.id) {
            Some(_) => ReadSegmentsError::Damaged { path: place.path.clone(), offset: place.offset },
            None => self.purged(),
        }
    }

    fn purged(&self) -> ReadSegmentsError {
        ReadSegmentsError::Purged { first_key: self.reach().first_key }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{KeepLimits, SegmentLog, SegmentOptions};
    use super::*;

    fn log(dir: &std::path::Path, segment_bytes: u64, keys: std::ops::Range<u64>) -> SegmentLog {
        let (mut log, _) = SegmentLog::open(dir, SegmentOptions { segment_bytes }).unwrap();
        for key in keys {
            log.append(key, 1, 0, &[key as u8; 30]).unwrap();
        }
        log.sync().unwrap();
        log
    }

    /// Looks a record up, has something happen, and then reads.
    fn read_late(
        log: &mut SegmentLog,
        from: u64,
        between: impl FnOnce(&mut SegmentLog),
    ) -> Result<Vec<u64>, ReadSegmentsError> {
        let reader = log.reader();
        let place = SegmentPlace::in_segment(reader.shared.lock().find(from).unwrap(), from);
        between(log);
        let found = FoundRecords { from, records: Vec::new(), room: 1000, is_full: false };
        let records = reader.read_on(Some(place), found)?;
        Ok(records.iter().map(|record| record.key).collect())
    }

    #[test]
    fn what_is_removed_between_looking_and_reading_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = log(dir.path(), 100, 0..9);
        let limits = KeepLimits { max_count: 4, ..KeepLimits::ALL };
        let outcome = read_late(&mut log, 1, |log| log.keep(&limits, 0).unwrap());
        assert!(matches!(outcome, Err(ReadSegmentsError::Purged { first_key: Some(5) })), "{outcome:?}");
        // Of the newest segment the file is at hand.
        assert_eq!(read_late(&mut log, 8, |log| log.clear().unwrap()).unwrap(), [8]);
    }

    /// The segment that was looked up goes on, and so does the log, before it is read.
    #[test]
    fn what_was_appended_between_looking_and_reading_makes_no_gap() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = log(dir.path(), 150, 0..3);
        let go_on = |log: &mut SegmentLog| {
            for key in 3..9 {
                log.append(key, 1, 0, b"").unwrap();
            }
            log.sync().unwrap();
        };
        assert_eq!(read_late(&mut log, 2, go_on).unwrap(), [2, 3, 4, 5, 6, 7, 8]);
        // Where that segment is gone too, it cannot be told.
        let mut other = self::log(&dir.path().join("other"), 150, 0..3);
        let limits = KeepLimits { max_count: 2, ..KeepLimits::ALL };
        let outcome = read_late(&mut other, 2, |log| {
            go_on(log);
            log.keep(&limits, 0).unwrap();
        });
        assert_eq!(outcome.unwrap(), [2]);
    }

    #[test]
    fn a_new_file_of_the_same_name_is_not_taken_for_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = log(dir.path(), 100, 0..9);
        let outcome = read_late(&mut log, 1, |log| {
            log.clear().unwrap();
            for key in 1..9 {
                log.append(key, 1, 0, b"another").unwrap();
            }
            log.sync().unwrap();
        });
        assert!(matches!(outcome, Err(ReadSegmentsError::Purged { first_key: Some(1) })), "{outcome:?}");
    }
}
