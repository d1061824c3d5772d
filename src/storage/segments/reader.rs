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
        let mut found = FoundRecords { from, records: Vec::new(), room: max_bytes, is_full: false };
        let place = self.shared.lock().find(from).map(|segment| SegmentPlace::in_segment(segment, from));
        let mut next_place = place;
        while let Some(place) = next_place {
            let id = place.id;
            match self.read_segment(place, &mut found) {
                Ok(()) => {}
                // What is there already is right. Whoever asks for the rest is told.
                Err(_) if !found.records.is_empty() => break,
                Err(error) => return Err(error),
            }
            if found.is_full || (found.room == 0 && !found.records.is_empty()) {
                break;
            }
            // Only the very next one, or there would be a gap.
            next_place =
                self.shared.lock().with_id(id + 1).map(|segment| SegmentPlace::in_segment(segment, from));
        }
        Ok(found.records)
    }

    fn read_segment(&self, place: SegmentPlace, found: &mut FoundRecords) -> Result<(), ReadSegmentsError> {
        let file = match &place.file {
            Some(file) => file.clone(),
            None => Arc::new(self.open(&place)?),
        };
        let SegmentPlace { id, path, mut offset, mut chain, end, .. } = place;
        let mut needed = 0;
        while offset < end {
            let wanted = found.room.saturating_add(INDEX_BYTES as usize).min(PIECE_BYTES).max(needed);
            let length = wanted.min(usize::try_from(end - offset).unwrap_or(usize::MAX));
            let mut piece = vec![0; length];
            if let Err(error) = file.read_exact_at(&mut piece, offset) {
                // A file that has become shorter is damaged; one that cannot be read may not be.
                return match error.kind() {
                    ErrorKind::UnexpectedEof => Err(ReadSegmentsError::Damaged { path, offset }),
                    _ => Err(io_error("cannot read", &path, error).into()),
                };
            }
            let piece = Bytes::from(piece);
            let mut at = 0;
            needed = loop {
                match next(&piece[at..], chain) {
                    NextRecord::Record(head) => {
                        let end = at + head.bytes();
                        chain = head.checksum;
                        if head.key >= found.from {
                            let payload = piece.slice(at + RECORD_HEAD_BYTES..end);
                            let (key, count, time_ms) = (head.key, head.count, head.time_ms);
                            found.take(SegmentRecord { key, count, time_ms, payload });
                            if found.is_full {
                                return Ok(());
                            }
                        }
                        at = end;
                    }
                    NextRecord::Needs(bytes) if bytes as u64 <= end - offset - at as u64 => break bytes,
                    NextRecord::Needs(_) if at == piece.len() && offset + at as u64 == end => break 0,
                    NextRecord::Needs(_) | NextRecord::Invalid => {
                        return Err(self.damaged(id, path, offset + at as u64));
                    }
                }
            };
            offset += at as u64;
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

    fn damaged(&self, id: u64, path: PathBuf, offset: u64) -> ReadSegmentsError {
        match self.shared.lock().with_id(id) {
            Some(_) => ReadSegmentsError::Damaged { path, offset },
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

    fn log(dir: &std::path::Path, keys: std::ops::Range<u64>) -> SegmentLog {
        let (mut log, _) = SegmentLog::open(dir, SegmentOptions { segment_bytes: 100 }).unwrap();
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
        let mut found = FoundRecords { from, records: Vec::new(), room: 1000, is_full: false };
        reader.read_segment(place, &mut found)?;
        Ok(found.records.iter().map(|record| record.key).collect())
    }

    #[test]
    fn what_is_removed_between_looking_and_reading_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = log(dir.path(), 0..9);
        let limits = KeepLimits { max_count: 4, max_bytes: u64::MAX, max_age_ms: 0 };
        let outcome = read_late(&mut log, 1, |log| log.keep(&limits, 0).unwrap());
        assert!(matches!(outcome, Err(ReadSegmentsError::Purged { first_key: Some(5) })), "{outcome:?}");
        // Of the newest segment the file is at hand.
        assert_eq!(read_late(&mut log, 8, |log| log.clear().unwrap()).unwrap(), [8]);
    }

    #[test]
    fn a_new_file_of_the_same_name_is_not_taken_for_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = log(dir.path(), 0..9);
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
